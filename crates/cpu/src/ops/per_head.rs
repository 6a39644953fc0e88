//! One matrix per head: W_uk and W_uv of absorbed MLA, read from `kv_b_proj` where it lies.

use std::ops::Range;

use r1_backend::{HeadForm, HeadWeight, Tensor, shape};
use r1_core::DType;

use super::linear::{Linear, weight_chunks};
use super::{Chunks, TASKS_PER_THREAD};
use crate::Cpu;
use crate::kernels::{AnyRows, Combine, InColumns, PairRows, TileSize, WeightIn, WeightRows, XRows};
use crate::simd::{Kernel, Simd};
use crate::view::{Cube, CubeMut, In, Mat, MatMut, Out};

/// Columns per task of the row-sum form are a multiple of it.
const STRIP_COLS: usize = 128;

pub(crate) fn per_head(cpu: &Cpu, x: &Tensor<Cpu>, w: &HeadWeight<Cpu>, out: &Tensor<Cpu>) {
    const OP: &str = "per_head";
    shape::per_head(x, w, out);
    let (x, weight) = (In::new(OP, "x", x), WeightIn::new(OP, "w", &w.weight));
    let mut out = Out::new(OP, "out", out);
    let (x, weight, out) = (x.cube(), weight.rows(), out.cube());
    match w.form {
        HeadForm::RowsOut => rows_out(cpu, x, weight, w, out),
        HeadForm::RowsIn => rows_in(cpu, x, weight, w, out),
    }
}

/// `out[t, h, r] = W_h[r, :] · x[t, h, :]`.
fn rows_out(cpu: &Cpu, x: Cube<'_>, weight: WeightRows<'_>, w: &HeadWeight<Cpu>, out: CubeMut<'_>) {
    let [tokens, heads, k] = x.shape;
    let chunks =
        weight_chunks(k, w.rows.len(), tokens, (cpu.threads * TASKS_PER_THREAD).div_ceil(heads.max(1)));
    cpu.engine().pool.run(heads * chunks.count(), &|task, scratch| {
        let (head, rows) = (task / chunks.count(), chunks.range(task % chunks.count()));
        let first = head * w.rows_per_head + w.rows.start;
        let rows = first + rows.start..first + rows.end;
        let sizes = [tokens * k, TileSize::floats(&weight, rows.len(), tokens), rows.len() * tokens];
        let [x_buf, tile, y] = scratch.floats.parts(sizes);
        let task =
            HeadRows { w: weight, first, rows, x: x.middle(head), out: out.middle(head), x_buf, tile, y };
        cpu.isa.run(task);
    });
}

struct HeadRows<'a> {
    w: WeightRows<'a>,
    first: usize,
    rows: Range<usize>,
    x: Mat<'a>,
    out: MatMut<'a>,
    x_buf: &'a mut [f32],
    tile: &'a mut [f32],
    y: &'a mut [f32],
}

impl Kernel for HeadRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let pairs = S::PAIRS && self.x.dtype == DType::BF16 && self.w.has_pairs();
        let x = XRows::all(if pairs { self.x } else { dense(s, self.x, self.x_buf) });
        let (w, rows, out) = (self.w, self.rows, self.out);
        Linear { w: AnyRows::Plain(w), rows, x, out, col: self.first, bufs: [self.tile, self.y] }.run(s);
    }
}

/// `x` in F32: in place, or widened into `buf`.
#[inline(always)]
fn dense<'a, S: Simd>(s: S, x: Mat<'a>, buf: &'a mut [f32]) -> Mat<'a> {
    if x.dtype == DType::F32 {
        return x;
    }
    for t in 0..x.rows {
        x.read(s, t, 0, &mut buf[t * x.cols..][..x.cols]);
    }
    Mat::from_f32(buf, x.rows, x.cols, x.cols)
}

/// `out[t, h, :] = Σ_r x[t, h, r] W_h[r, :]`.
fn rows_in(cpu: &Cpu, x: Cube<'_>, weight: WeightRows<'_>, w: &HeadWeight<Cpu>, out: CubeMut<'_>) {
    let [tokens, heads, rows] = x.shape;
    // As few strips as keep every thread busy: a strip reads its part of every row.
    let wanted = (cpu.threads * TASKS_PER_THREAD).div_ceil(heads.max(1));
    let strip = weight.data.cols.div_ceil(wanted).next_multiple_of(STRIP_COLS);
    let strips = Chunks::new(weight.data.cols, strip);
    let suits = (0..strips.count()).all(|strip| PairRows::suits(&weight, strips.range(strip).start));
    let pairs = cpu.isa.has_pairs() && x.dtype == DType::BF16 && suits;
    cpu.engine().pool.run(heads * strips.count(), &|task, scratch| {
        let (head, cols) = (task / strips.count(), strips.range(task % strips.count()));
        let first = head * w.rows_per_head + w.rows.start;
        let (w, rows_of_head, x, out) = (weight, first..first + rows, x.middle(head), out.middle(head));
        if pairs {
            let floats = tokens * PairRows::width(cols.len());
            let bufs = scratch.floats.parts([floats, floats]);
            cpu.isa.run(HeadPairs { w, rows: rows_of_head, cols, x, out, bufs });
        } else {
            let tile = Combine::scaled_floats(&w, rows, tokens);
            let bufs = scratch.floats.parts([tokens * rows, tokens * cols.len(), tile]);
            cpu.isa.run(HeadSum { w, rows: rows_of_head, cols, x, out, bufs });
        }
    });
}

struct HeadPairs<'a> {
    w: WeightRows<'a>,
    rows: Range<usize>,
    cols: Range<usize>,
    x: Mat<'a>,
    out: MatMut<'a>,
    bufs: [&'a mut [f32]; 2],
}

impl Kernel for HeadPairs<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [y, part] = self.bufs;
        let (w, rows, cols, x) = (self.w, self.rows, self.cols.clone(), self.x);
        let ld = PairRows::width(cols.len());
        PairRows { w, rows, cols, x, y, part, ld }.run(s);
        for (t, row) in y.chunks_mut(ld.max(1)).enumerate() {
            s.pairs(InColumns { row });
            // SAFETY: this head's columns belong to this task.
            unsafe { self.out.write(s, t, self.cols.start, &row[..self.cols.len()]) };
        }
    }
}

struct HeadSum<'a> {
    w: WeightRows<'a>,
    rows: Range<usize>,
    cols: Range<usize>,
    x: Mat<'a>,
    out: MatMut<'a>,
    bufs: [&'a mut [f32]; 3],
}

impl Kernel for HeadSum<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [coef, y, tile] = self.bufs;
        let (m, width, col) = (self.x.rows, self.cols.len(), self.cols.start);
        for t in 0..m {
            self.x.read(s, t, 0, &mut coef[t * self.x.cols..][..self.x.cols]);
        }
        y.fill(0.0);
        let (rows, cols, ld_coef) = (self.rows, self.cols, self.x.cols);
        s.call(Combine { w: self.w, rows, cols, coef, ld_coef, m, y, ldy: width, tile });
        for (t, row) in y.chunks(width.max(1)).enumerate() {
            // SAFETY: this head's columns belong to this task.
            unsafe { self.out.write(s, t, col, row) };
        }
    }
}
