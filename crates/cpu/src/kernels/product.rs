//! The product of rows with a weight of any format: int4 rows are widened to F32 strip by strip, which holds every value
//! exactly, and meet the inputs there; all others are [`MatMul`]'s own. Knows no threads.
//!
//! The product's bits depend on neither the number of tokens nor the cut into strips, as `MatMul`'s do not.

use std::ops::Range;

use r1_backend::Weight;
use r1_core::DType;

use super::int8_dot::{self, ColumnOrder, Int8Mul};
use super::pair_int4::{self, Int4Mul};
use super::{MatMul, TileSize, WeightIn, WeightRows, XRows};
use crate::Cpu;
use crate::simd::{CHUNK, Kernel, Simd};
use crate::view::{In, Mat};

/// Codes per word.
const PER_WORD: usize = 8;
/// Floats of a widened strip: half of a 1 MiB L2.
const STRIP_FLOATS: usize = 1 << 17;
/// The most rows of a strip.
const STRIP_ROWS: usize = 32;

/// What a product wants its inputs to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InputForm {
    /// F32.
    F32,
    /// BF16 as they are, multiplied in pairs.
    Pairs,
    /// BF16 in the order of an int4 weight's chunks, multiplied in pairs.
    Chunks,
    /// Quantized to int8 and multiplied in fours.
    Int8(ColumnOrder),
}

impl InputForm {
    /// For inputs of a weight that are quantized where it takes them so; `None`: not this one's.
    pub(crate) fn quantized(w: &Weight<Cpu>) -> Option<Self> {
        let order = match w {
            Weight::Int4Group(_) => ColumnOrder::EvenThenOdd,
            Weight::Int8Group { .. } | Weight::Fp8Block { .. } | Weight::Dense { .. } => {
                ColumnOrder::AsStored
            }
        };
        w.takes_int8_activations().then_some(Self::Int8(order))
    }

    /// For BF16 inputs of a weight, where the machine multiplies pairs.
    pub(crate) fn of(w: &Weight<Cpu>) -> Self {
        match w {
            Weight::Dense { data } if data.dtype() == DType::BF16 => Self::Pairs,
            Weight::Fp8Block { .. } | Weight::Int8Group { .. } => Self::Pairs,
            Weight::Int4Group(w) if w.group.is_multiple_of(CHUNK) => Self::Chunks,
            Weight::Dense { .. } | Weight::Int4Group(_) => Self::F32,
        }
    }
}

/// A weight's tensors, borrowed: of any format.
pub(crate) enum AnyWeight<'a> {
    Plain(WeightIn<'a>),
    Int4 {
        /// Codes, zeros, scales.
        tensors: [In<'a>; 3],
        group: usize,
    },
}

impl<'a> AnyWeight<'a> {
    #[track_caller]
    pub(crate) fn new(op: &str, arg: &str, w: &'a Weight<Cpu>) -> Self {
        match w {
            Weight::Int4Group(w) => Self::Int4 {
                tensors: [&w.codes, &w.zeros, &w.scales].map(|tensor| In::new(op, arg, tensor)),
                group: w.group,
            },
            _ => Self::Plain(WeightIn::new(op, arg, w)),
        }
    }

    pub(crate) fn rows(&self) -> AnyRows<'_> {
        match self {
            Self::Plain(w) => AnyRows::Plain(w.rows()),
            Self::Int4 { tensors: [codes, zeros, scales], group } => AnyRows::Int4(Packed {
                codes: codes.mat(),
                zeros: zeros.mat(),
                scales: scales.mat(),
                group: *group,
            }),
        }
    }
}

/// A weight matrix `[N, K]` of any format where it lies.
#[derive(Clone, Copy)]
pub(crate) enum AnyRows<'a> {
    Plain(WeightRows<'a>),
    Int4(Packed<'a>),
}

impl AnyRows<'_> {
    /// N.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Plain(w) => w.data.rows,
            Self::Int4(w) => w.codes.rows,
        }
    }

    /// K.
    pub(crate) fn cols(&self) -> usize {
        match self {
            Self::Plain(w) => w.data.cols,
            Self::Int4(w) => w.cols(),
        }
    }

    /// Floats of a [`Product`]'s scratch for so many rows of the weight and of the input.
    pub(crate) fn scratch_floats(&self, rows: usize, tokens: usize) -> usize {
        let floats = match self {
            Self::Plain(w) => TileSize::floats(w, rows, tokens),
            Self::Int4(w) => {
                w.parts(rows, tokens).iter().sum::<usize>().max(pair_int4::scratch_floats(w, rows, tokens))
            }
        };
        floats.max(int8_dot::scratch_floats(self.cols(), rows, tokens))
    }
}

/// An int4 weight's tensors.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    /// `[N, K / 8]` U32.
    pub(super) codes: Mat<'a>,
    /// `[N, groups]` F16.
    pub(super) zeros: Mat<'a>,
    /// `[N, groups]` F16.
    pub(super) scales: Mat<'a>,
    pub(super) group: usize,
}

impl Packed<'_> {
    pub(super) fn rows(&self) -> usize {
        self.codes.rows
    }

    pub(super) fn cols(&self) -> usize {
        self.codes.cols * PER_WORD
    }

    /// Whether a chunk of codes has one scale.
    pub(super) fn has_chunks(&self) -> bool {
        self.group.is_multiple_of(CHUNK)
    }

    /// Rows that are widened together.
    fn strip(&self, rows: usize) -> usize {
        (STRIP_FLOATS / self.cols().max(1) / 4 * 4).clamp(4, STRIP_ROWS).min(rows)
    }

    /// Floats of the widened strip, of a row's zeros and scales, and of the product's tile.
    fn parts(&self, rows: usize, tokens: usize) -> [usize; 4] {
        let (strip, k, groups) = (self.strip(rows), self.cols(), self.zeros.cols);
        let tile = TileSize::floats(&WeightRows::from_f32(&[], 0, k, k), strip, tokens);
        [strip * k, groups, groups, tile]
    }

    /// Row `n` in F32. `zeros` and `scales` are scratch.
    #[inline(always)]
    fn widen<S: Simd>(&self, s: S, n: usize, zeros: &mut [f32], scales: &mut [f32], dst: &mut [f32]) {
        self.zeros.read(s, n, 0, zeros);
        self.scales.read(s, n, 0, scales);
        let words = self.codes.u32_row(n);
        let per_group = self.group / PER_WORD;
        let groups = words.chunks(per_group).zip(dst.chunks_mut(self.group));
        for ((words, dst), (&zero, &scale)) in groups.zip(zeros.iter().zip(scales.iter())) {
            for (&word, dst) in words.iter().zip(dst.as_chunks_mut::<PER_WORD>().0) {
                // Eight independent lanes, which the compiler makes a vector of.
                for (i, value) in dst.iter_mut().enumerate() {
                    let code = (word >> (4 * i) & 15).cast_signed();
                    *value = (code as f32 - zero) * scale;
                }
            }
        }
    }
}

/// `y[t * ldy + n - rows.start] = x[t] · w[n]` for the weight rows `rows`.
pub(crate) struct Product<'a> {
    pub(crate) w: AnyRows<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) x: XRows<'a>,
    pub(crate) y: &'a mut [f32],
    pub(crate) ldy: usize,
    /// Of [`AnyRows::scratch_floats`].
    pub(crate) scratch: &'a mut [f32],
}

impl Kernel for Product<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { w, rows, x, y, ldy, scratch } = self;
        let w = match w {
            w if x.dtype() == DType::I8 => return s.pairs(Int8Mul { w, rows, x, y, ldy, tile: scratch }),
            AnyRows::Plain(w) => return s.call(MatMul { w, rows, x, y, ldy, tile: scratch }),
            AnyRows::Int4(w) if x.dtype() == DType::BF16 => {
                return s.pairs(Int4Mul { w, rows, x, y, ldy, tile: scratch });
            }
            AnyRows::Int4(w) => w,
        };
        let [strip_len, zeros_len, scales_len, tile_len] = w.parts(rows.len(), x.len());
        let (strip, rest) = scratch.split_at_mut(strip_len);
        let (zeros, rest) = rest.split_at_mut(zeros_len);
        let (scales, rest) = rest.split_at_mut(scales_len);
        let (k, tile) = (w.cols(), &mut rest[..tile_len]);
        let mut first = rows.start;
        while first < rows.end {
            let len = w.strip(rows.len()).min(rows.end - first);
            for (i, dst) in strip.chunks_exact_mut(k.max(1)).take(len).enumerate() {
                w.widen(s, first + i, zeros, scales, dst);
            }
            let widened = WeightRows::from_f32(strip, len, k, k);
            let y = &mut y[first - rows.start..];
            s.call(MatMul { w: widened, rows: 0..len, x, y, ldy, tile });
            first += len;
        }
    }
}
