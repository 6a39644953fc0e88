//! The routed experts of a layer: every expert's weights are read once, for all tokens that chose it.

use std::ops::Range;

use r1_backend::{Activation, Experts, Tensor, shape};
use r1_core::DType;

use super::linear::{Linear, weight_chunks};
use super::{Chunks, TASKS_PER_THREAD, input_form, inputs, refuse_fp8};
use crate::Cpu;
use crate::kernels::{AnyRows, AnyWeight, InputForm, Product, XRows};
use crate::pool::Pool;
use crate::scratch::{Floats, Workspace};
use crate::simd::{Kernel, Simd, slice};
use crate::view::{In, Mat, MatMut, Out};

const OP: &str = "experts";
/// Tokens that are worked on together: bounds the hidden state, which is kept for every pair.
const TOKENS: usize = 512;
/// Columns of the output per task, where there are many pairs.
const OUT_COLS: usize = 64;
/// Pairs of which all results are kept before they are summed.
const FEW_PAIRS: usize = 64;

/// Pairs of a token and one of its experts, grouped by expert.
#[derive(Default)]
pub(crate) struct Pairs {
    /// Per local expert: where its pairs begin; one more entry for the end.
    start: Vec<u32>,
    /// Token of each pair.
    token: Vec<u32>,
    /// For `[tokens, k]`: where the choice's pair is, `NOT_LOCAL` when another rank has the expert.
    place: Vec<u32>,
    /// Experts that have pairs.
    active: Vec<u32>,
}

const NOT_LOCAL: u32 = u32::MAX;

impl Pairs {
    fn group(&mut self, ids: &In<'_>, tokens: Range<usize>, first: usize, num_local: usize) {
        let local = |id: u32| (id as usize).checked_sub(first).filter(|&local| local < num_local);
        self.start.clear();
        self.start.resize(num_local + 1, 0);
        self.place.clear();
        for t in tokens.clone() {
            for &id in ids.u32_row(t) {
                if let Some(expert) = local(id) {
                    self.start[expert + 1] += 1;
                }
            }
        }
        self.active.clear();
        for expert in 0..num_local {
            if self.start[expert + 1] > 0 {
                self.active.push(expert as u32);
            }
            self.start[expert + 1] += self.start[expert];
        }
        self.token.clear();
        self.token.resize(self.start[num_local] as usize, 0);
        for t in tokens {
            for &id in ids.u32_row(t) {
                self.place.push(local(id).map_or(NOT_LOCAL, |expert| {
                    let place = self.start[expert];
                    self.token[place as usize] = t as u32;
                    self.start[expert] += 1;
                    place
                }));
            }
        }
        // Each start has moved to its end, which is the next one's start.
        self.start.copy_within(..num_local, 1);
        self.start[0] = 0;
    }

    fn of(&self, expert: u32) -> Range<usize> {
        self.start[expert as usize] as usize..self.start[expert as usize + 1] as usize
    }
}

pub(crate) fn experts(
    cpu: &Cpu,
    x: &Activation<Cpu>,
    ids: &Tensor<Cpu>,
    weights: &Tensor<Cpu>,
    experts: &Experts<Cpu>,
    out: &Tensor<Cpu>,
) {
    shape::experts(x, ids, weights, experts, out);
    refuse_fp8(OP, "x", x);
    let (x, ids) = (In::new(OP, "x", &x.dense), In::new(OP, "ids", ids));
    let weights = In::new(OP, "weights", weights);
    let mut out = Out::new(OP, "out", out);
    let (weights, out) = (weights.mat(), out.mat());
    let Some(width) = experts.local.first().map(|expert| expert.gate.out_features()) else { return };
    let mut engine = cpu.engine();
    let crate::Engine { pool, workspace } = &mut *engine;
    let Workspace { x: x_room, y: hidden_room, z: ordered_room, results: results_room, pairs } = workspace;
    let [x_form, hidden_form] = forms(cpu, x.mat().dtype, experts);
    let hidden_dtype = if hidden_form == InputForm::F32 { DType::F32 } else { x.mat().dtype };
    let x = inputs(cpu.isa, pool, x.mat(), x_form, x_room);
    let batches = Chunks::new(x.rows, TOKENS);
    for tokens in (0..batches.count()).map(|batch| batches.range(batch)) {
        pairs.group(&ids, tokens.clone(), experts.first, experts.local.len());
        if pairs.active.is_empty() {
            continue;
        }
        let room = hidden_room.get(pairs.token.len() * width);
        let hidden = MatMut::scratch(room, hidden_dtype, pairs.token.len(), width);
        gate_up(cpu, pool, experts, pairs, x, hidden);
        let hidden = inputs(cpu.isa, pool, hidden.readable(), hidden_form, ordered_room);
        let sum = Sum { pairs, first_token: tokens.start, tokens: tokens.len(), weights, out };
        down(cpu, pool, experts, pairs, hidden, sum, results_room);
    }
}

/// What the products want of inputs and of the hidden state: one form for all experts of the layer, since what a token meets may
/// not depend on who else is there.
fn forms(cpu: &Cpu, x: DType, experts: &Experts<Cpu>) -> [InputForm; 2] {
    match experts.local.first() {
        Some(first) if experts.are_alike() => {
            let forms = [&first.gate, &first.down].map(|w| input_form(cpu, x, w));
            if forms.contains(&InputForm::F32) { [InputForm::F32; 2] } else { forms }
        }
        _ => [InputForm::F32; 2],
    }
}

/// `hidden[pair] = silu(gate x) * (up x)`.
fn gate_up(
    cpu: &Cpu,
    pool: &mut Pool,
    experts: &Experts<Cpu>,
    pairs: &Pairs,
    x: Mat<'_>,
    hidden: MatMut<'_>,
) {
    let width = hidden.cols;
    let active = pairs.active.len();
    let chunks = {
        let mean_pairs = pairs.token.len().div_ceil(active);
        weight_chunks(x.cols, width, mean_pairs, (cpu.threads * TASKS_PER_THREAD).div_ceil(active))
    };
    pool.run(active * chunks.count(), &|task, scratch| {
        let expert = pairs.active[task / chunks.count()];
        let weights = &experts.local[expert as usize];
        let gate = AnyWeight::new(OP, "experts.gate", &weights.gate);
        let up = AnyWeight::new(OP, "experts.up", &weights.up);
        let w = [gate.rows(), up.rows()];
        let (rows, range) = (chunks.range(task % chunks.count()), pairs.of(expert));
        let product = w.each_ref().map(|w| w.scratch_floats(rows.len(), range.len()));
        let y = rows.len() * range.len();
        let bufs = scratch.floats.parts([product[0].max(product[1]), y, y]);
        let x = XRows::gathered(x, &pairs.token[range.clone()]);
        cpu.isa.run(GateUp { w, rows, x, first: range.start, hidden, bufs });
    });
}

struct GateUp<'a> {
    w: [AnyRows<'a>; 2],
    rows: Range<usize>,
    x: XRows<'a>,
    /// The expert's first pair.
    first: usize,
    hidden: MatMut<'a>,
    /// The product's scratch, gates and ups.
    bufs: [&'a mut [f32]; 3],
}

impl Kernel for GateUp<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [scratch, gate, up] = self.bufs;
        let len = self.rows.len();
        for (w, y) in self.w.into_iter().zip([&mut *gate, &mut *up]) {
            s.call(Product { w, rows: self.rows.clone(), x: self.x, y, ldy: len, scratch });
        }
        for i in 0..self.x.len() {
            let (gate, up) = (&gate[i * len..][..len], &mut up[i * len..][..len]);
            slice::update!(s, gate, up, |gate, up| s.mul(slice::silu(s, gate), up));
            // SAFETY: these columns of the expert's pairs belong to this task.
            unsafe { self.hidden.write(s, self.first + i, self.rows.start, up) };
        }
    }
}

/// `out[t] += Σ_j weights[t, j] * down(hidden[pair of (t, j)])`. Few pairs: expert by expert, in runs of rows as long as they can be,
/// into `room`, then summed. Many: a task has the columns of all pairs, which stay near.
fn down(
    cpu: &Cpu,
    pool: &mut Pool,
    experts: &Experts<Cpu>,
    pairs: &Pairs,
    hidden: Mat<'_>,
    sum: Sum<'_>,
    room: &mut Floats,
) {
    let out_cols = sum.out.cols;
    let of = |expert: u32| AnyWeight::new(OP, "experts.down", &experts.local[expert as usize].down);
    if hidden.rows <= FEW_PAIRS {
        let active = pairs.active.len();
        let results = MatMut::scratch(room.get(hidden.rows * out_cols), DType::F32, hidden.rows, out_cols);
        let mean_pairs = hidden.rows.div_ceil(active);
        let chunks = weight_chunks(
            hidden.cols,
            out_cols,
            mean_pairs,
            (cpu.threads * TASKS_PER_THREAD).div_ceil(active),
        );
        pool.run(active * chunks.count(), &|task, scratch| {
            let expert = pairs.active[task / chunks.count()];
            let (w, range, rows) = (of(expert), pairs.of(expert), chunks.range(task % chunks.count()));
            let (w, x) = (w.rows(), XRows::range(hidden, range.clone()));
            let bufs = scratch.floats.parts([w.scratch_floats(rows.len(), x.len()), rows.len() * x.len()]);
            cpu.isa.run(Linear { w, rows, x, out: results.slice(range), col: 0, bufs });
        });
        let results = results.readable();
        let chunks = Chunks::rows(out_cols, hidden.rows, cpu.threads);
        pool.run(chunks.count(), &|task, scratch| {
            let cols = chunks.range(task);
            let bufs = scratch.floats.parts([cols.len(), cols.len()]);
            cpu.isa.run(SumColumns { sum, results: results.columns(cols.clone()), cols, bufs });
        });
        return;
    }
    let chunks = Chunks::new(out_cols, OUT_COLS);
    pool.run(chunks.count(), &|task, scratch| {
        let cols = chunks.range(task);
        let product = pairs
            .active
            .iter()
            .map(|&expert| of(expert).rows().scratch_floats(cols.len(), pairs.of(expert).len()));
        let sizes = [product.max().unwrap_or(0), hidden.rows * cols.len(), cols.len(), cols.len()];
        let [product, results, a, b] = scratch.floats.parts(sizes);
        for &expert in &pairs.active {
            let (w, range) = (of(expert), pairs.of(expert));
            let x = XRows::range(hidden, range.clone());
            let y = &mut results[range.start * cols.len()..];
            let (w, rows, ldy) = (w.rows(), cols.clone(), cols.len());
            cpu.isa.run(Product { w, rows, x, y, ldy, scratch: product });
        }
        let results = Mat::from_f32(results, hidden.rows, cols.len(), cols.len());
        cpu.isa.run(SumColumns { sum, results, cols, bufs: [a, b] });
    });
}

/// What the pairs' results are summed by, and where to.
#[derive(Clone, Copy)]
struct Sum<'a> {
    pairs: &'a Pairs,
    first_token: usize,
    tokens: usize,
    weights: Mat<'a>,
    out: MatMut<'a>,
}

struct SumColumns<'a> {
    sum: Sum<'a>,
    /// `[pairs, cols.len()]` F32.
    results: Mat<'a>,
    /// Columns of the output.
    cols: Range<usize>,
    /// A token's sum and what the output held.
    bufs: [&'a mut [f32]; 2],
}

impl Kernel for SumColumns<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Sum { pairs, first_token, tokens, weights, out } = self.sum;
        let [sum, held] = self.bufs;
        let k = weights.cols;
        for i in 0..tokens {
            let t = first_token + i;
            // In the order of the choices, whatever the batch: the sum's bits are the token's own.
            sum.fill(0.0);
            for (&place, &weight) in pairs.place[i * k..][..k].iter().zip(weights.f32_row(t)) {
                if place != NOT_LOCAL {
                    slice::axpby(s, weight, self.results.f32_row(place as usize), 1.0, sum);
                }
            }
            // SAFETY: these columns belong to this task.
            unsafe {
                out.read(s, t, self.cols.start, held);
                slice::axpby(s, 1.0, held, 1.0, sum);
                out.write(s, t, self.cols.start, sum);
            }
        }
    }
}
