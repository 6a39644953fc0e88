//! `out = x Wᵀ`.

use std::ops::Range;

use r1_backend::{Activation, Tensor, Weight, shape};

use super::{Chunks, TASKS_PER_THREAD, input_form, inputs, refuse_fp8};
use crate::Cpu;
use crate::kernels::{AnyRows, AnyWeight, Product, XRows};
use crate::simd::{Kernel, Simd};
use crate::view::{In, MatMut, Out};

/// Weight rows per task with many tokens: their partial sums of a token block stay in L2.
pub(crate) const BLOCK_ROWS: usize = 32;
/// Multiply-adds that are worth a task of their own.
const TASK_WORK: usize = 1 << 15;

pub(crate) fn linear(cpu: &Cpu, x: &Activation<Cpu>, w: &Weight<Cpu>, out: &Tensor<Cpu>) {
    const OP: &str = "linear";
    shape::linear(x, w, out);
    refuse_fp8(OP, "x", x);
    let form = input_form(cpu, x.dense.dtype(), w);
    let (x, w) = (In::new(OP, "x", &x.dense), AnyWeight::new(OP, "w", w));
    let mut out = Out::new(OP, "out", out);
    let (w, out) = (w.rows(), out.mat());
    let mut engine = cpu.engine();
    let crate::Engine { pool, workspace } = &mut *engine;
    let x = XRows::all(inputs(cpu.isa, pool, x.mat(), form, &mut workspace.x));
    let chunks = weight_chunks(w.cols(), w.rows(), x.len(), cpu.threads * TASKS_PER_THREAD);
    pool.run(chunks.count(), &|task, scratch| {
        let rows = chunks.range(task);
        let sizes = [w.scratch_floats(rows.len(), x.len()), rows.len() * x.len()];
        let bufs = scratch.floats.parts(sizes);
        cpu.isa.run(Linear { w, rows, x, out, col: 0, bufs });
    });
}

/// How `rows` rows of a weight of `cols` columns are cut for `tokens` inputs. Any cut gives the same bits.
pub(crate) fn weight_chunks(cols: usize, rows: usize, tokens: usize, tasks: usize) -> Chunks {
    let worth = TASK_WORK.div_ceil((cols * tokens).max(1));
    let even = rows.div_ceil(tasks);
    let per_task = if tokens > BLOCK_ROWS { even.min(BLOCK_ROWS) } else { even };
    Chunks::new(rows, per_task.max(worth).next_multiple_of(4))
}

/// A [`Product`] whose results go to columns `col + n` of `out`.
pub(crate) struct Linear<'a> {
    pub(crate) w: AnyRows<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) x: XRows<'a>,
    pub(crate) out: MatMut<'a>,
    /// Column of `out` that weight row `base` goes to, where `base` is the offset subtracted from `rows`.
    pub(crate) col: usize,
    /// The product's scratch and the results.
    pub(crate) bufs: [&'a mut [f32]; 2],
}

impl Kernel for Linear<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [scratch, y] = self.bufs;
        let (start, len) = (self.rows.start, self.rows.len());
        s.call(Product { w: self.w, rows: self.rows, x: self.x, y, ldy: len, scratch });
        for (t, row) in y.chunks(len.max(1)).enumerate() {
            // SAFETY: the columns of these weight rows belong to this task.
            unsafe { self.out.write(s, t, start - self.col, row) };
        }
    }
}
