//! Element-wise operations and norms: one pass over rows that stay in L1.

use std::ops::Range;

use r1_backend::{Activation, Tensor, shape};

use super::{Chunks, refuse_fp8, widened_vector};
use crate::Cpu;
use crate::simd::{Kernel, Simd, slice};
use crate::view::{In, Mat, MatMut, Out};

pub(crate) fn rms_norm(cpu: &Cpu, x: &Tensor<Cpu>, weight: &Tensor<Cpu>, eps: f32, out: &Activation<Cpu>) {
    const OP: &str = "rms_norm";
    shape::rms_norm(x, weight, out);
    refuse_fp8(OP, "out", out);
    let (x, weight) = (In::new(OP, "x", x), In::new(OP, "weight", weight));
    let mut out = Out::new(OP, "out", &out.dense);
    norm_rows(cpu, Source::Rows(x.mat()), weight.mat(), eps, out.mat());
}

pub(crate) fn add_rms_norm(
    cpu: &Cpu,
    residual: &Tensor<Cpu>,
    x: &Tensor<Cpu>,
    weight: &Tensor<Cpu>,
    eps: f32,
    out: &Activation<Cpu>,
) {
    const OP: &str = "add_rms_norm";
    shape::add(residual, x);
    shape::rms_norm(residual, weight, out);
    refuse_fp8(OP, "out", out);
    let (x, weight) = (In::new(OP, "x", x), In::new(OP, "weight", weight));
    let mut residual = Out::new(OP, "residual", residual);
    let mut out = Out::new(OP, "out", &out.dense);
    norm_rows(cpu, Source::Sum(residual.mat(), x.mat()), weight.mat(), eps, out.mat());
}

/// What is normed.
#[derive(Clone, Copy)]
enum Source<'a> {
    Rows(Mat<'a>),
    /// A residual that the rows are added to first.
    Sum(MatMut<'a>, Mat<'a>),
}

fn norm_rows(cpu: &Cpu, source: Source<'_>, weight: Mat<'_>, eps: f32, out: MatMut<'_>) {
    let mut engine = cpu.engine();
    let crate::Engine { pool, workspace } = &mut *engine;
    let weight = widened_vector(cpu.isa, weight, &mut workspace.y);
    let chunks = Chunks::rows(out.rows, out.cols, cpu.threads);
    pool.run(chunks.count(), &|task, scratch| {
        let bufs = scratch.floats.parts([out.cols, out.cols]);
        cpu.isa.run(NormRows { source, weight, eps, out, rows: chunks.range(task), bufs });
    });
}

struct NormRows<'a> {
    source: Source<'a>,
    weight: &'a [f32],
    eps: f32,
    out: MatMut<'a>,
    rows: Range<usize>,
    bufs: [&'a mut [f32]; 2],
}

impl Kernel for NormRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [a, b] = self.bufs;
        for row in self.rows {
            match self.source {
                Source::Rows(x) => x.read(s, row, 0, a),
                Source::Sum(residual, x) => add_row(s, residual, x, row, a, b),
            }
            normed(s, a, self.weight, self.eps, b);
            // SAFETY: the row belongs to this task.
            unsafe { self.out.write(s, row, 0, b) };
        }
    }
}

/// `out = x * rsqrt(mean(x²) + eps) * weight`.
#[inline(always)]
pub(crate) fn normed<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = slice::sum_of_squares(s, x) / x.len() as f32;
    let inverse = s.splat(1.0 / (mean + eps).sqrt());
    slice::zip!(s, x, weight, out, |x, w| s.mul(s.mul(x, inverse), w));
}

/// `residual[row] += x[row]`; leaves in `sum` what the residual now holds, rounded as it is.
#[inline(always)]
fn add_row<S: Simd>(s: S, residual: MatMut<'_>, x: Mat<'_>, row: usize, sum: &mut [f32], buf: &mut [f32]) {
    x.read(s, row, 0, buf);
    // SAFETY: the row belongs to this task.
    unsafe {
        residual.read(s, row, 0, sum);
        slice::axpby(s, 1.0, buf, 1.0, sum);
        residual.write(s, row, 0, sum);
        residual.read(s, row, 0, sum);
    }
}

pub(crate) fn add(cpu: &Cpu, residual: &Tensor<Cpu>, x: &Tensor<Cpu>) {
    shape::add(residual, x);
    let x = In::new("add", "x", x);
    let mut residual = Out::new("add", "residual", residual);
    let (x, residual) = (x.mat(), residual.mat());
    let chunks = Chunks::rows(x.rows, x.cols, cpu.threads);
    cpu.engine().pool.run(chunks.count(), &|task, scratch| {
        let bufs = scratch.floats.parts([x.cols, x.cols]);
        cpu.isa.run(AddRows { residual, x, rows: chunks.range(task), bufs });
    });
}

struct AddRows<'a> {
    residual: MatMut<'a>,
    x: Mat<'a>,
    rows: Range<usize>,
    bufs: [&'a mut [f32]; 2],
}

impl Kernel for AddRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [sum, buf] = self.bufs;
        for row in self.rows {
            add_row(s, self.residual, self.x, row, sum, buf);
        }
    }
}

pub(crate) fn silu_mul(cpu: &Cpu, gate_up: &Tensor<Cpu>, out: &Activation<Cpu>) {
    shape::silu_mul(gate_up, out);
    refuse_fp8("silu_mul", "out", out);
    let gate_up = In::new("silu_mul", "gate_up", gate_up);
    let mut out = Out::new("silu_mul", "out", &out.dense);
    let (gate_up, out) = (gate_up.mat(), out.mat());
    let chunks = Chunks::rows(out.rows, out.cols, cpu.threads);
    cpu.engine().pool.run(chunks.count(), &|task, scratch| {
        let bufs = scratch.floats.parts([out.cols, out.cols, out.cols]);
        cpu.isa.run(SiluMul { gate_up, out, rows: chunks.range(task), bufs });
    });
}

struct SiluMul<'a> {
    gate_up: Mat<'a>,
    out: MatMut<'a>,
    rows: Range<usize>,
    bufs: [&'a mut [f32]; 3],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [gate, up, out] = self.bufs;
        for row in self.rows {
            self.gate_up.read(s, row, 0, gate);
            self.gate_up.read(s, row, up.len(), up);
            slice::zip!(s, gate, up, out, |gate, up| s.mul(slice::silu(s, gate), up));
            // SAFETY: the row belongs to this task.
            unsafe { self.out.write(s, row, 0, out) };
        }
    }
}
