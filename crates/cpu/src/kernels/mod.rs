//! The two products that everything heavy is made of: rows with rows (`dot`) and sums of rows (`combine`).
//! Know neither tensors nor threads.

mod combine;
mod dot;
mod int8_dot;
mod pair_combine;
mod pair_dot;
mod pair_int4;
mod pair_rows;
mod product;

use r1_backend::Weight;
use r1_core::DType;

use crate::Cpu;
use crate::view::{In, Mat};

pub(crate) use combine::Combine;
pub(crate) use dot::{MatMul, TileSize, XRows};
pub(crate) use int8_dot::{Quantize, quantized_bytes};
pub(crate) use pair_combine::{InColumns, PairCombine};
pub(crate) use pair_int4::{DIFFERENCES, by_chunks, padded};
pub(crate) use pair_rows::PairRows;
pub(crate) use product::{AnyRows, AnyWeight, InputForm, Product};

/// Runs `$body` with `$E` bound to the element type of `$dtype`.
macro_rules! with_elem {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            r1_core::DType::F32 => {
                type $E = f32;
                $body
            }
            r1_core::DType::BF16 => {
                type $E = half::bf16;
                $body
            }
            r1_core::DType::F16 => {
                type $E = half::f16;
                $body
            }
            r1_core::DType::F8E4M3 => {
                type $E = crate::simd::F8;
                $body
            }
            r1_core::DType::I8 => {
                type $E = i8;
                $body
            }
            r1_core::DType::U32 => panic!("a U32 tensor where a weight is expected"),
        }
    };
}
pub(crate) use with_elem;

/// A weight's tensors, borrowed: of any format but int4.
pub(crate) struct WeightIn<'a> {
    data: In<'a>,
    scales: Option<(In<'a>, [usize; 2], [usize; 2])>,
}

impl<'a> WeightIn<'a> {
    #[track_caller]
    pub(crate) fn new(op: &str, arg: &str, w: &'a Weight<Cpu>) -> Self {
        match w {
            Weight::Dense { data } => Self { data: In::new(op, arg, data), scales: None },
            Weight::Fp8Block { data, scales, block, offset } => Self {
                data: In::new(op, arg, data),
                scales: Some((In::new(op, arg, scales), *block, *offset)),
            },
            Weight::Int8Group { data, scales, group, offset } => Self {
                data: In::new(op, arg, data),
                scales: Some((In::new(op, arg, scales), [1, *group], [0, *offset])),
            },
            Weight::Int4Group(_) => unreachable!(
                "{op}: {arg} is an int4 weight, which the check of shapes lets through to `Product` alone"
            ),
        }
    }

    pub(crate) fn rows(&self) -> WeightRows<'_> {
        let scales = self.scales.as_ref().map(|(scales, block, offset)| Scales {
            values: scales.mat(),
            block: *block,
            offset: *offset,
        });
        WeightRows { data: self.data.mat(), scales }
    }
}

/// A weight matrix `[N, K]` where it lies.
#[derive(Clone, Copy)]
pub(crate) struct WeightRows<'a> {
    pub(crate) data: Mat<'a>,
    pub(crate) scales: Option<Scales<'a>>,
}

impl<'a> WeightRows<'a> {
    /// F32 rows that were widened already.
    pub(crate) fn from_f32(values: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Self { data: Mat::from_f32(values, rows, cols, stride), scales: None }
    }

    /// # Panics
    /// When a block of the weight has no scale: kernels read them without looking.
    pub(crate) fn check(&self) {
        let Some(Scales { values, block, offset }) = self.scales else { return };
        let blocks = [self.data.rows, self.data.cols].map(|n| n.saturating_sub(1));
        let [rows, cols] = [0, 1].map(|i| (blocks[i] + offset[i]) / block[i] + 1);
        assert!(
            rows <= values.rows && cols <= values.cols && values.dtype == DType::F32,
            "a weight of {rows} x {cols} blocks has {} x {} scales",
            values.rows,
            values.cols
        );
    }

    /// Whether BF16 inputs can meet it in pairs.
    pub(crate) fn has_pairs(&self) -> bool {
        match self.data.dtype {
            DType::BF16 => self.scales.is_none(),
            DType::F8E4M3 => true,
            DType::I8 => self.scales.is_some(),
            DType::F32 | DType::F16 | DType::U32 => false,
        }
    }
}

/// Scales of blocks of an FP8 weight, or of the groups of an int8 one: blocks of one row.
#[derive(Clone, Copy)]
pub(crate) struct Scales<'a> {
    values: Mat<'a>,
    block: [usize; 2],
    offset: [usize; 2],
}

impl Scales<'_> {
    /// The scales of weight row `row` from column `col` on.
    fn row_from(&self, row: usize, col: usize) -> *const f32 {
        let block_row = (row + self.offset[0]) / self.block[0];
        let block_col = self.column(col);
        assert!(block_col < self.values.cols && self.values.dtype == DType::F32, "column {col} has no scale");
        self.values.row(block_row).cast::<f32>().wrapping_add(block_col)
    }

    fn at(&self, row: usize, col: usize) -> f32 {
        self.values.f32_row((row + self.offset[0]) / self.block[0])[self.column(col)]
    }

    /// The block that column `col` lies in.
    fn column(&self, col: usize) -> usize {
        (col + self.offset[1]) / self.block[1]
    }

    /// End of the block that index `i` of dimension `dim` lies in.
    fn block_end(&self, dim: usize, i: usize) -> usize {
        ((i + self.offset[dim]) / self.block[dim] + 1) * self.block[dim] - self.offset[dim]
    }
}
