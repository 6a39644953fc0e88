//! What the kernels of experts are given: argument structs, and the table of a layer's experts.

use r1_backend::{Backend, BackendError, HostTensor, MlpWeights, Tensor, Weight};
use r1_core::DType;

use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, dtype_code, is_vectorizable, ptr, stride};
use crate::ops::route::MAX_EXPERTS;

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Matrix {
    data: DevicePtr,
    scales: DevicePtr,
    dtype: u32,
    stride: u32,
    scale_stride: u32,
    block: [u32; 2],
    offset: [u32; 2],
    is_vectorizable: u32,
}

impl Matrix {
    fn new(w: &Weight<Gpu>) -> Self {
        let data = w.data();
        // Without scales: one block that never ends.
        let (scales, scale_stride, block, offset) = match w {
            Weight::Dense { .. } => (DevicePtr::default(), 0, [u32::MAX; 2], [0; 2]),
            Weight::Fp8Block { scales, block, offset, .. } => (
                ptr(scales),
                stride(scales, 0),
                block.map(|size| size as u32),
                offset.map(|size| size as u32),
            ),
            Weight::Int8Group { .. } | Weight::Int4Group(_) => unreachable!("the table refuses them"),
        };
        Self {
            data: ptr(data),
            scales,
            dtype: dtype_code(data.dtype()),
            stride: stride(data, 0) as u32,
            scale_stride: scale_stride as u32,
            block,
            offset,
            is_vectorizable: u32::from(is_vectorizable(data)),
        }
    }

    /// As it lies in the layer's table.
    fn to_bytes(self) -> impl Iterator<Item = u8> {
        let [block, offset] = [self.block, self.offset];
        let words = [self.dtype, self.stride, self.scale_stride, block[0], block[1], offset[0], offset[1]];
        let addresses = [self.data.0, self.scales.0].into_iter().flat_map(u64::to_ne_bytes);
        addresses.chain(words.into_iter().chain([self.is_vectorizable]).flat_map(u32::to_ne_bytes))
    }
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Expert {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Expert {
    pub(super) fn new(mlp: &MlpWeights<Gpu>) -> Self {
        Self { gate: Matrix::new(&mlp.gate), up: Matrix::new(&mlp.up), down: Matrix::new(&mlp.down) }
    }
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(in crate::ops) struct SortArgs {
    pub(super) ids: DevicePtr,
    pub(super) ids_stride: i64,
    pub(super) num_tiles: DevicePtr,
    pub(super) tiles: DevicePtr,
    pub(super) order: DevicePtr,
    pub(super) num_tokens: u32,
    pub(super) top_k: u32,
    pub(super) first: u32,
    pub(super) num_local: u32,
    pub(super) tile_rows: u32,
    pub(super) has_shared: u32,
}

// SAFETY: the twin of moe::SortArgs.
unsafe impl Args for SortArgs {}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct ExpertsArgs {
    pub(super) experts: DevicePtr,
    pub(super) num_tiles: DevicePtr,
    pub(super) tiles: DevicePtr,
    pub(super) order: DevicePtr,
    pub(super) x: DevicePtr,
    pub(super) x_scales: DevicePtr,
    pub(super) x_stride: i64,
    pub(super) x_scale_stride: i64,
    pub(super) hidden: DevicePtr,
    pub(super) hidden_codes: DevicePtr,
    pub(super) hidden_scales: DevicePtr,
    pub(super) products: DevicePtr,
    pub(super) ids: DevicePtr,
    pub(super) weights: DevicePtr,
    pub(super) out: DevicePtr,
    pub(super) ids_stride: i64,
    pub(super) weights_stride: i64,
    pub(super) out_stride: i64,
    pub(super) counters: DevicePtr,
    pub(super) num_tokens: u32,
    pub(super) top_k: u32,
    pub(super) first: u32,
    pub(super) num_local: u32,
    pub(super) dim: u32,
    pub(super) width: u32,
    pub(super) shared_width: u32,
    pub(super) hidden_stride: u32,
    pub(super) hidden_groups: u32,
    pub(super) x_dtype: u32,
    pub(super) x_is_vectorizable: u32,
    pub(super) activation_dtype: u32,
    pub(super) hidden_dtype: u32,
    pub(super) out_dtype: u32,
    pub(super) dtypes: u32,
    pub(super) quantizes: u32,
    pub(super) power_of_two_scales: u32,
    pub(super) has_shared: u32,
    pub(super) shared: Expert,
}

// SAFETY: the twin of experts::Args.
unsafe impl Args for ExpertsArgs {}

/// Whether the kernels take it: they have no weights in groups, and multiply gate and up side by side, in the same steps.
pub(super) fn is_supported(mlp: &MlpWeights<Gpu>) -> bool {
    let is_pair = match (&mlp.gate, &mlp.up) {
        (Weight::Dense { data: gate }, Weight::Dense { data: up }) => gate.dtype() == up.dtype(),
        (
            Weight::Fp8Block { block: gate, offset: gate_offset, .. },
            Weight::Fp8Block { block: up, offset: up_offset, .. },
        ) => gate[1] == up[1] && gate_offset[1] == up_offset[1],
        _ => false,
    };
    is_pair && matches!(mlp.down, Weight::Dense { .. } | Weight::Fp8Block { .. })
}

/// The addresses and formats of a layer's experts, as the kernels read them.
pub(crate) fn expert_table(gpu: &Gpu, local: &[MlpWeights<Gpu>]) -> Result<Tensor<Gpu>, BackendError> {
    let refused = |why: String| BackendError::Failed { device: gpu.describe(), op: "expert_table", why };
    if local.len() > MAX_EXPERTS {
        let why = format!("{} experts on one device, {MAX_EXPERTS} are supported: raise --tp", local.len());
        return Err(refused(why));
    }
    if let Some(index) = local.iter().position(|mlp| !is_supported(mlp)) {
        return Err(refused(format!(
            "expert {index} is int8 or int4, or its gate and up differ in format; convert it to FP8 blocks or BF16"
        )));
    }
    let matrices = local.iter().map(Expert::new).flat_map(|expert| [expert.gate, expert.up, expert.down]);
    let mut bytes: Vec<u8> = matrices.flat_map(Matrix::to_bytes).collect();
    bytes.resize(bytes.len().max(4), 0);
    let words = bytes.len() / 4;
    gpu.import(&HostTensor::from_vec(bytes, &[words], DType::U32))
}
