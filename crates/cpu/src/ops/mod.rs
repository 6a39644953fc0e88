//! The operations: check shapes, borrow tensors, cut the work into tasks, run kernels.

pub(crate) mod attention;
pub(crate) mod expanded;
pub(crate) mod experts;
pub(crate) mod gqa;
pub(crate) mod host;
pub(crate) mod latent;
pub(crate) mod linear;
pub(crate) mod logprobs;
pub(crate) mod norm;
pub(crate) mod per_head;
pub(crate) mod rope;
pub(crate) mod route;
pub(crate) mod rows;
pub(crate) mod sample;
mod softmax;
mod tile;

use std::ops::Range;

use r1_backend::{Activation, Weight};
use r1_core::DType;

use crate::Cpu;
use crate::isa::Available;
use crate::kernels::{InputForm, Quantize, by_chunks, padded, quantized_bytes};
use crate::pool::Pool;
use crate::scratch::Floats;
use crate::simd::{Kernel, Simd};
use crate::view::{Mat, MatMut, Shared};

/// Elements that are worth a task of their own: handing one out costs about a microsecond.
const TASK_ELEMENTS: usize = 8192;
/// Tasks per thread, so that a slow thread does not hold up the others.
const TASKS_PER_THREAD: usize = 8;

/// # Panics
/// When `x` has an FP8 form: this backend says in its capabilities that it makes none.
#[track_caller]
pub(crate) fn refuse_fp8(op: &str, arg: &str, x: &Activation<Cpu>) {
    assert!(
        x.fp8.is_none(),
        "{op}: {arg} has an FP8 form, which the CPU backend does not keep (see capabilities)"
    );
}

/// `len` things cut into equal ranges.
#[derive(Clone, Copy)]
pub(crate) struct Chunks {
    len: usize,
    per_task: usize,
}

impl Chunks {
    fn new(len: usize, per_task: usize) -> Self {
        Self { len, per_task: per_task.max(1) }
    }

    /// Rows of `cost` elements each, several tasks per thread unless they would be tiny.
    fn rows(len: usize, cost: usize, threads: usize) -> Self {
        Self::new(len, len.div_ceil(threads * TASKS_PER_THREAD).max(TASK_ELEMENTS / cost.max(1)))
    }

    fn count(&self) -> usize {
        self.len.div_ceil(self.per_task)
    }

    fn range(&self, task: usize) -> Range<usize> {
        task * self.per_task..((task + 1) * self.per_task).min(self.len)
    }
}

/// What products with a weight want of inputs of this type.
fn input_form(cpu: &Cpu, x: DType, w: &Weight<Cpu>) -> InputForm {
    let quantized = if cpu.int8_activations { InputForm::quantized(w) } else { None };
    quantized.unwrap_or_else(|| {
        if x == DType::BF16 && cpu.isa.has_pairs() { InputForm::of(w) } else { InputForm::F32 }
    })
}

/// `x` in that form: in place where it has it, else in `room`.
fn inputs<'a>(isa: Available, pool: &mut Pool, x: Mat<'a>, form: InputForm, room: &'a mut Floats) -> Mat<'a> {
    match form {
        InputForm::F32 => widened(isa, pool, x, room),
        InputForm::Pairs => x,
        InputForm::Chunks => {
            let cols = padded(x.cols);
            let out = MatMut::scratch(room.get(x.rows * cols / 2), DType::BF16, x.rows, cols);
            let chunks = Chunks::rows(x.rows, x.cols, pool.threads());
            pool.run(chunks.count(), &|task, _| {
                for row in chunks.range(task) {
                    // SAFETY: every row belongs to one task.
                    by_chunks(x.bf16_row(row), unsafe { out.row_mut::<u16>(row) });
                }
            });
            out.readable()
        }
        InputForm::Int8(order) => {
            let bytes = quantized_bytes(x.cols);
            let room = room.get((x.rows * bytes).div_ceil(size_of::<f32>()));
            let out = MatMut::scratch(room, DType::I8, x.rows, bytes);
            let chunks = Chunks::rows(x.rows, x.cols, pool.threads());
            pool.run(chunks.count(), &|task, scratch| {
                let wide = scratch.floats.get(padded(x.cols));
                isa.run(Quantize { x, rows: chunks.range(task), order, out, wide });
            });
            out.readable()
        }
    }
}

/// `mat` in F32: in place, or widened into `room`.
fn widened<'a>(isa: Available, pool: &mut Pool, mat: Mat<'a>, room: &'a mut Floats) -> Mat<'a> {
    if mat.dtype == DType::F32 {
        return mat;
    }
    let stride = mat.cols.next_multiple_of(16);
    let room = room.get(mat.rows * stride);
    {
        let dst = Shared::new(room);
        let chunks = Chunks::rows(mat.rows, mat.cols, pool.threads());
        pool.run(chunks.count(), &|task, _| {
            isa.run(WidenRows { mat, stride, rows: chunks.range(task), dst });
        });
    }
    Mat::from_f32(room, mat.rows, mat.cols, stride)
}

struct WidenRows<'a> {
    mat: Mat<'a>,
    stride: usize,
    rows: Range<usize>,
    dst: Shared<'a>,
}

impl Kernel for WidenRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            // SAFETY: every row belongs to one task.
            let dst = unsafe { self.dst.part(row * self.stride, self.mat.cols) };
            self.mat.read(s, row, 0, dst);
        }
    }
}

/// A vector of floats widened into `room`.
fn widened_vector<'a>(isa: Available, mat: Mat<'_>, room: &'a mut Floats) -> &'a [f32] {
    let room = room.get(mat.cols);
    isa.run(WidenRows { mat, stride: 0, rows: 0..1, dst: Shared::new(room) });
    room
}
