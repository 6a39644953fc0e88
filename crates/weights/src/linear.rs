//! A linear layer's weight, dense or FP8 blocks, cut to a rank's shard. Knows no layer by name and no device.

use r1_backend::HostTensor;
use r1_core::DType;

use crate::checkpoint::Checkpoint;
use crate::config::Fp8BlockConfig;
use crate::error::WeightsError;
use crate::f8::f8e4m3_to_f32;

/// dtypes of an unquantised weight.
pub(crate) const DENSE: &[DType] = &[DType::F32, DType::BF16, DType::F16];
/// dtypes of a linear layer's weight.
pub(crate) const LINEAR: &[DType] = &[DType::F32, DType::BF16, DType::F16, DType::F8E4M3];
/// dtypes of block scales: F32 as published, BF16 is widened.
pub(crate) const SCALES: &[DType] = &[DType::F32, DType::BF16];
/// What a quantised tensor's name carries for its scales (they multiply, despite the name).
pub(crate) const SCALE_SUFFIX: &str = "_scale_inv";

/// The largest scale: times the largest F8_E4M3, 448, it is finite. NaN, infinities and negative scales are no scales; 0
/// is what a quantiser writes for a block of zeros, and denormals are small scales like others.
const MAX_SCALE: f32 = f32::MAX / 448.0;

/// The part of a weight `[N, K]` that a rank holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partition {
    /// All of it.
    Replicated,
    /// Column-parallel: the `rank`-th of `world` equal ranges of rows (outputs, N). Heads lie in rows one after
    /// another, so this is aligned with heads when `world` divides their number.
    Column {
        /// This rank.
        rank: usize,
        /// How many ranks.
        world: usize,
    },
    /// Row-parallel: the `rank`-th of `world` equal ranges of columns (inputs, K).
    Row {
        /// This rank.
        rank: usize,
        /// How many ranks.
        world: usize,
    },
    /// Any range of rows.
    Rows {
        /// The first row.
        start: usize,
        /// How many.
        len: usize,
    },
    /// Any range of columns.
    Columns {
        /// The first column.
        start: usize,
        /// How many.
        len: usize,
    },
}

/// A linear layer's weight in host memory. Row ranges lie in the checkpoint's mapping, column ranges are copies.
#[derive(Clone, Debug)]
pub enum HostLinear {
    /// `[N, K]` F32, BF16 or F16.
    Dense(HostTensor),
    /// FP8 blocks: element `(n, k)` is
    /// `data[n, k] · scales[(offset[0] + n) / block[0], (offset[1] + k) / block[1]]`.
    Fp8Block {
        /// `[N, K]` F8_E4M3.
        data: HostTensor,
        /// `[ceil((offset[0] + N) / block[0]), ceil((offset[1] + K) / block[1])]` F32, from 0 to `f32::MAX / 448`.
        scales: HostTensor,
        /// Rows and columns of a block.
        block: [usize; 2],
        /// Where element (0, 0) lies in its block: not `[0, 0]` when the shard's cut falls inside a block.
        offset: [usize; 2],
    },
}

impl HostLinear {
    /// `[N, K]` of this shard.
    pub fn shape(&self) -> [usize; 2] {
        let (Self::Dense(data) | Self::Fp8Block { data, .. }) = self;
        [data.shape()[0], data.shape()[1]]
    }

    /// Bytes of data and scales.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Dense(data) => data.bytes().len(),
            Self::Fp8Block { data, scales, .. } => data.bytes().len() + scales.bytes().len(),
        }
    }

    /// Says that the bytes were copied and their pages may leave memory.
    pub fn discard(&self) {
        match self {
            Self::Dense(data) => data.discard(),
            Self::Fp8Block { data, scales, .. } => {
                data.discard();
                scales.discard();
            }
        }
    }

    /// All values, `[N, K]` row-major, scales applied in f32. Allocates `4 · N · K` bytes.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::Dense(data) => widen_to_f32(data),
            Self::Fp8Block { data, scales, block, offset } => {
                let [_, k] = self.shape();
                let values: [f32; 256] = std::array::from_fn(|code| f8e4m3_to_f32(code as u8));
                let scale_columns = scales.shape()[1];
                let scales = widen_to_f32(scales);
                let mut out = Vec::with_capacity(data.bytes().len());
                for (n, row) in data.bytes().chunks_exact(k).enumerate() {
                    let from = (offset[0] + n) / block[0] * scale_columns;
                    let mut start = 0;
                    for (j, scale) in scales[from..from + scale_columns].iter().enumerate() {
                        let end = k.min((j + 1) * block[1] - offset[1]);
                        out.extend(row[start..end].iter().map(|&code| values[usize::from(code)] * scale));
                        start = end;
                    }
                }
                out
            }
        }
    }
}

/// The values of an F32, BF16, F16, F8_E4M3 or I8 tensor (without any scale), whatever its address's alignment.
///
/// # Panics
/// On U32, which holds ids and no values.
pub fn widen_to_f32(tensor: &HostTensor) -> Vec<f32> {
    let pairs = |widen: fn([u8; 2]) -> f32| tensor.bytes().as_chunks().0.iter().map(|&b| widen(b)).collect();
    match tensor.dtype() {
        DType::F32 => tensor.bytes().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        DType::BF16 => pairs(|b| half::bf16::from_le_bytes(b).to_f32()),
        DType::F16 => pairs(|b| half::f16::from_le_bytes(b).to_f32()),
        DType::F8E4M3 => tensor.bytes().iter().map(|&b| f8e4m3_to_f32(b)).collect(),
        DType::I8 => tensor.bytes().iter().map(|&b| f32::from(b.cast_signed())).collect(),
        DType::U32 => panic!("widen_to_f32: U32 tensors hold ids"),
    }
}

impl Checkpoint {
    /// The weight `{prefix}.weight` of a linear layer, cut to `partition` of its rows `n` or columns `k`.
    ///
    /// An F8_E4M3 weight takes its scales from `{prefix}.weight_scale_inv` in blocks of `quant`; a weight of another
    /// dtype is dense, whatever `quant` says. Scales are checked, all of them whatever the partition (0 to `f32::MAX / 448`, so no NaN), and weights are not read.
    ///
    /// # Panics
    /// When a rank is not below its world, or a range lies outside the weight.
    pub fn linear(
        &self,
        prefix: &str,
        n: usize,
        k: usize,
        quant: Option<&Fp8BlockConfig>,
        partition: Partition,
    ) -> Result<HostLinear, WeightsError> {
        let tensor = format!("{prefix}.weight");
        let weight = self.take(&tensor, &[n, k], LINEAR)?;
        let cut = Cut::new(&tensor, n, k, partition)?;
        if weight.dtype() != DType::F8E4M3 {
            return Ok(HostLinear::Dense(cut.of(&tensor, &weight)?));
        }
        let block = quant.ok_or_else(|| self.fp8_without_config(&tensor))?.block;
        let scale_name = format!("{tensor}{SCALE_SUFFIX}");
        let scales = self.scales(&scale_name, scale_shape(n, k, block))?;
        let scale_cut = match cut {
            Cut::All => Cut::All,
            Cut::Rows(start, len) => {
                Cut::Rows(start / block[0], (start + len).div_ceil(block[0]) - start / block[0])
            }
            Cut::Columns(start, len) => {
                Cut::Columns(start / block[1], (start + len).div_ceil(block[1]) - start / block[1])
            }
        };
        let offset = match cut {
            Cut::All => [0, 0],
            Cut::Rows(start, _) => [start % block[0], 0],
            Cut::Columns(start, _) => [0, start % block[1]],
        };
        let (data, scales) = (cut.of(&tensor, &weight)?, scale_cut.of(&scale_name, &scales)?);
        Ok(HostLinear::Fp8Block { data, scales, block, offset })
    }

    pub(crate) fn fp8_without_config(&self, tensor: &str) -> WeightsError {
        let file = self.info(tensor).map_or_else(String::new, |i| i.file.to_owned());
        WeightsError::Fp8WithoutConfig { tensor: tensor.to_owned(), file }
    }

    /// Scales as F32, every one checked: in place when they are stored so.
    fn scales(&self, tensor: &str, shape: [usize; 2]) -> Result<HostTensor, WeightsError> {
        let stored = self.take(tensor, &shape, SCALES)?;
        let values = widen_to_f32(&stored);
        if let Some(at) = values.iter().position(|s| !(0.0..=MAX_SCALE).contains(s)) {
            return Err(WeightsError::BadScale {
                tensor: tensor.to_owned(),
                index: [at / shape[1], at % shape[1]],
                value: values[at],
                file: self.info(tensor).map_or_else(String::new, |i| i.file.to_owned()),
            });
        }
        Ok(if stored.dtype() == DType::F32 { stored } else { HostTensor::from_f32(&values, &shape) })
    }
}

/// Shape of the scales of `[n, k]` in blocks; edge blocks may be ragged.
pub(crate) fn scale_shape(n: usize, k: usize, block: [usize; 2]) -> [usize; 2] {
    [n.div_ceil(block[0]), k.div_ceil(block[1])]
}

/// A partition as a range: `(start, len)`.
#[derive(Clone, Copy)]
pub(crate) enum Cut {
    All,
    Rows(usize, usize),
    Columns(usize, usize),
}

impl Cut {
    pub(crate) fn new(tensor: &str, n: usize, k: usize, partition: Partition) -> Result<Self, WeightsError> {
        let share = |dim, size: usize, rank: usize, world: usize| {
            assert!(rank < world, "{tensor}: rank {rank} of {world}");
            if size.is_multiple_of(world) {
                return Ok((rank * (size / world), size / world));
            }
            Err(WeightsError::NotDivisible { tensor: tensor.to_owned(), dim, size, world })
        };
        let cut = match partition {
            Partition::Replicated => Self::All,
            Partition::Column { rank, world } => {
                let (start, len) = share("rows (N)", n, rank, world)?;
                Self::Rows(start, len)
            }
            Partition::Row { rank, world } => {
                let (start, len) = share("columns (K)", k, rank, world)?;
                Self::Columns(start, len)
            }
            Partition::Rows { start, len } => Self::Rows(start, len),
            Partition::Columns { start, len } => Self::Columns(start, len),
        };
        Ok(match cut {
            Self::Rows(start, len) => {
                assert!(len > 0 && start + len <= n, "{tensor}: rows {start}+{len} of {n}");
                cut
            }
            // All columns are no copy.
            Self::Columns(0, len) if len == k => Self::All,
            Self::Columns(start, len) => {
                assert!(len > 0 && start + len <= k, "{tensor}: columns {start}+{len} of {k}");
                cut
            }
            Self::All => cut,
        })
    }

    fn of(self, name: &str, tensor: &HostTensor) -> Result<HostTensor, WeightsError> {
        match self {
            Self::All => Ok(tensor.clone()),
            Self::Rows(start, len) => Ok(tensor.rows(start, len)),
            Self::Columns(start, len) => tensor.columns(start, len).map_err(|_| WeightsError::NoRoom {
                tensor: name.to_owned(),
                requested_bytes: tensor.shape()[0] * len * tensor.dtype().size_bytes(),
            }),
        }
    }
}
