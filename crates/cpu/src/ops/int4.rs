//! `out = x Wᵀ` of int4 weights.
//!
//! A strip of weight rows is widened to F32, which holds every value exactly, and meets all tokens by the product of F32 rows;
//! so the bits depend on neither the number of tokens nor the cut into strips, as there.

use r1_backend::{Activation, Int4Group, Tensor};

use super::linear::weight_chunks;
use super::{Chunks, widened};
use crate::Cpu;
use crate::kernels::{MatMul, TileSize, WeightRows, XRows};
use crate::simd::{Kernel, Simd};
use crate::view::{In, Mat, MatMut, Out};

const OP: &str = "linear";
/// Codes per word.
const PER_WORD: usize = 8;
/// Floats of a widened strip: half of a 1 MiB L2.
const STRIP_FLOATS: usize = 1 << 17;
/// The most rows of a strip.
const STRIP_ROWS: usize = 32;

/// `x` and the shapes were checked.
pub(crate) fn linear(cpu: &Cpu, x: &Activation<Cpu>, w: &Int4Group<Cpu>, out: &Tensor<Cpu>) {
    let x = In::new(OP, "x", &x.dense);
    let (codes, zeros) = (In::new(OP, "w.codes", &w.codes), In::new(OP, "w.zeros", &w.zeros));
    let scales = In::new(OP, "w.scales", &w.scales);
    let mut out = Out::new(OP, "out", out);
    let (n, k) = (w.out_features(), w.in_features());
    let w = Packed { codes: codes.mat(), zeros: zeros.mat(), scales: scales.mat(), group: w.group };
    let out = out.mat();
    let mut engine = cpu.engine();
    let crate::Engine { pool, workspace } = &mut *engine;
    let x = XRows::all(widened(cpu.isa, pool, x.mat(), &mut workspace.x));
    let shape = WeightRows::from_f32(&[], 0, k, k);
    let chunks = weight_chunks(&shape, n, x.len(), cpu.threads);
    let per_strip = (STRIP_FLOATS / k.max(1) / 4 * 4).clamp(4, STRIP_ROWS);
    pool.run(chunks.count(), &|task, scratch| {
        let rows = chunks.range(task);
        let strip = per_strip.min(rows.len());
        let sizes =
            [strip * k, w.groups(), w.groups(), TileSize::floats(&shape, strip, x.len()), strip * x.len()];
        let bufs = scratch.floats.parts(sizes);
        let strips = Chunks::new(rows.len(), strip);
        cpu.isa.run(Int4Rows { w, k, first: rows.start, strips, x, out, bufs });
    });
}

/// The weight's tensors.
#[derive(Clone, Copy)]
struct Packed<'a> {
    /// `[N, K / 8]` U32.
    codes: Mat<'a>,
    /// `[N, groups]` F16.
    zeros: Mat<'a>,
    /// `[N, groups]` F16.
    scales: Mat<'a>,
    group: usize,
}

impl Packed<'_> {
    fn groups(&self) -> usize {
        self.zeros.cols
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

struct Int4Rows<'a> {
    w: Packed<'a>,
    k: usize,
    /// First weight row of the task.
    first: usize,
    /// The task's rows, cut into strips.
    strips: Chunks,
    x: XRows<'a>,
    out: MatMut<'a>,
    /// The strip, a row's zeros and scales, the product's scratch, the strip's results.
    bufs: [&'a mut [f32]; 5],
}

impl Kernel for Int4Rows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [strip, zeros, scales, tile, y] = self.bufs;
        for rows in (0..self.strips.count()).map(|i| self.strips.range(i)) {
            let (first, len) = (self.first + rows.start, rows.len());
            for (i, dst) in strip.chunks_exact_mut(self.k.max(1)).take(len).enumerate() {
                self.w.widen(s, first + i, zeros, scales, dst);
            }
            let w = WeightRows::from_f32(strip, len, self.k, self.k);
            s.call(MatMul { w, rows: 0..len, x: self.x, y, ldy: len, tile });
            for (t, row) in y.chunks(len).take(self.x.len()).enumerate() {
                // SAFETY: the columns of these weight rows belong to this task.
                unsafe { self.out.write(s, t, first, row) };
            }
        }
    }
}
