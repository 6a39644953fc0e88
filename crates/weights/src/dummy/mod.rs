//! Random weights of whatever shape a config.json says, so that a shape can be run, and measured, without its checkpoint. They
//! are for speed: norms near 1, linears that keep their input's size, routers that spread tokens over the experts. Knows the
//! published names and dtypes through `shapes`, and no forward pass.

mod values;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use r1_backend::HostBytes;
use r1_core::DType;

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::WeightsError;
use crate::linear::{SCALE_SUFFIX, scale_shape};
use crate::shapes::{ExpectedTensor, TensorKind, expected_tensors};
use values::{Fp8Matrix, Normal, Stream};

/// What tensors of cache lines, and vectors of any instruction set, are aligned to.
const ALIGN: usize = 64;

/// A tensor of random values, which are a function of seed and name: the same FP8 and BF16 models have the same weights, up to
/// what FP8 rounds.
#[derive(Clone, Debug)]
pub struct DummyTensor {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    recipe: Recipe,
}

/// How the values are made.
#[derive(Clone, Copy, Debug)]
enum Recipe {
    Dense(Normal, Stream),
    Codes(Fp8Matrix),
    Scales(Fp8Matrix),
}

impl DummyTensor {
    /// Full name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// F32, BF16 or F8_E4M3.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_bytes()
    }

    /// Writes the values, little-endian and row-major, on all cores where there are many.
    ///
    /// # Panics
    /// When `out` has another size than [`size_bytes`](Self::size_bytes).
    pub fn write_to(&self, out: &mut [u8]) {
        assert_eq!(out.len(), self.size_bytes(), "{}: a buffer of another size", self.name);
        let columns = self.shape[self.shape.len() - 1];
        match (self.recipe, self.dtype) {
            (Recipe::Dense(normal, stream), DType::F32) => normal.f32(stream, columns, out),
            (Recipe::Dense(normal, stream), _) => normal.bf16(stream, columns, out),
            (Recipe::Codes(matrix), _) => matrix.codes(out),
            (Recipe::Scales(matrix), _) => matrix.scales(out),
        }
    }
}

/// Every tensor of a random checkpoint in the published layout: BF16, F32 for the correction bias, and FP8 blocks with their
/// scales for linears where the config declares them. A head that is tied is left out.
pub fn dummy_tensors(config: &ModelConfig, seed: u64) -> impl Iterator<Item = DummyTensor> + '_ {
    let is_stored =
        |tensor: &ExpectedTensor| !(config.tie_word_embeddings && tensor.name == "lm_head.weight");
    expected_tensors(config).filter(is_stored).flat_map(move |tensor| of(config, seed, tensor))
}

fn of(config: &ModelConfig, seed: u64, tensor: ExpectedTensor) -> Vec<DummyTensor> {
    let ExpectedTensor { name, shape, kind, .. } = tensor;
    // Copies have the values of what they are copies of.
    let original = match kind {
        TensorKind::Head if !config.tie_word_embeddings => "lm_head.weight",
        TensorKind::Head | TensorKind::Embedding => "model.embed_tokens.weight",
        _ => &name,
    };
    let stream = Stream::of(original, seed);
    let inputs = shape[shape.len() - 1] as f64;
    let normal = match kind {
        TensorKind::Norm => Normal { mean: 1.0, deviation: 0.1 },
        TensorKind::CorrectionBias => Normal { mean: 0.0, deviation: 0.1 },
        TensorKind::Embedding if !config.tie_word_embeddings => Normal { mean: 0.0, deviation: 1.0 },
        _ => Normal { mean: 0.0, deviation: inputs.sqrt().recip() },
    };
    let dense = |dtype| {
        let recipe = Recipe::Dense(normal, stream);
        vec![DummyTensor { name: name.clone(), dtype, shape: shape.clone(), recipe }]
    };
    match (kind, config.quantization) {
        (TensorKind::CorrectionBias, _) => dense(DType::F32),
        (TensorKind::Linear | TensorKind::ExpertLinear, Some(fp8)) => {
            let matrix = Fp8Matrix { normal, stream, shape: [shape[0], shape[1]], fp8 };
            let scales = DummyTensor {
                name: format!("{name}{SCALE_SUFFIX}"),
                dtype: DType::F32,
                shape: scale_shape(shape[0], shape[1], fp8.block).to_vec(),
                recipe: Recipe::Scales(matrix),
            };
            vec![DummyTensor { name, dtype: DType::F8E4M3, shape, recipe: Recipe::Codes(matrix) }, scales]
        }
        _ => dense(DType::BF16),
    }
}

impl Checkpoint {
    /// A checkpoint of random weights of that shape, in no file. A tensor is made each time that it is asked for while nobody
    /// holds it, and shared while somebody does: what a backend copies, converts or cuts into its own memory is not kept
    /// beside it.
    pub fn dummy(config: &ModelConfig, seed: u64) -> Self {
        Self::of_made("random weights", dummy_tensors(config, seed).map(Made::new))
    }
}

/// A tensor that is made when it is asked for.
pub(crate) struct Made {
    pub(crate) tensor: DummyTensor,
    held: Mutex<Weak<Aligned>>,
}

impl Made {
    fn new(tensor: DummyTensor) -> Self {
        Self { tensor, held: Mutex::new(Weak::new()) }
    }

    /// The tensor's bytes, and where in them it lies.
    pub(crate) fn bytes(&self) -> Result<(Arc<dyn HostBytes>, Range<usize>), WeightsError> {
        // A maker that panicked left nothing behind.
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = if let Some(bytes) = held.upgrade() {
            bytes
        } else {
            let bytes = Arc::new(Aligned::of(&self.tensor)?);
            *held = Arc::downgrade(&bytes);
            bytes
        };
        Ok((bytes, 0..self.tensor.size_bytes()))
    }
}

/// Bytes that begin at a multiple of [`ALIGN`].
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn of(tensor: &DummyTensor) -> Result<Self, WeightsError> {
        let size = tensor.size_bytes() + ALIGN - 1;
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(size)
            .map_err(|_| WeightsError::NoRoom { tensor: tensor.name().to_owned(), requested_bytes: size })?;
        bytes.resize(size, 0);
        let start = bytes.as_ptr().align_offset(ALIGN);
        tensor.write_to(&mut bytes[start..start + tensor.size_bytes()]);
        Ok(Self { bytes, start })
    }
}

impl HostBytes for Aligned {
    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    fn is_resident(&self) -> bool {
        true
    }
}
