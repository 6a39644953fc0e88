//! Absorbed MLA over the paged latent cache: every head reads the same cached rows.
//!
//! A task is one token and a group of its heads: each cached row is widened once and meets the whole group, and nothing past
//! the token's own context is touched. The context is cut at fixed places: tiles of `TILE` tokens, an online softmax over
//! the tiles of a split, splits merged in order. Whether splits run side by side or in turn gives the same bits, so a
//! token's result depends on its own context alone.

use std::ops::Range;

use r1_backend::{Batch, LatentCache, Tensor, shape};
use r1_core::DType;

use super::latent::LatentIn;
use super::rows::Pages;
use super::softmax::State;
use super::tile::{Products, TILE, Tile};
use crate::Cpu;
use crate::simd::{Kernel, Simd};
use crate::view::{Cube, CubeMut, In, Mat, MatMut, Out, Shared};

const OP: &str = "mla_attention";
/// Cached tokens per split, a multiple of `TILE`.
const SPLIT: usize = 512;
/// Heads that share a widened tile.
const MAX_HEADS: usize = 16;

pub(crate) fn mla_attention(
    cpu: &Cpu,
    q_latent: &Tensor<Cpu>,
    q_rope: &Tensor<Cpu>,
    cache: &LatentCache<Cpu>,
    batch: &Batch<Cpu>,
    seqs: &Range<usize>,
    scale: f32,
    out: &Tensor<Cpu>,
) {
    shape::mla_attention(q_latent, q_rope, cache, batch, seqs, out);
    let (q_latent, q_rope) = (In::new(OP, "q_latent", q_latent), In::new(OP, "q_rope", q_rope));
    let cache = LatentIn::new(OP, cache);
    let query_start = In::new(OP, "batch.query_start", &batch.query_start);
    let context_len = In::new(OP, "batch.context_len", &batch.context_len);
    let table = In::new(OP, "batch.block_table", &batch.block_table);
    let mut out = Out::new(OP, "out", out);
    let (query_start, context_len, out) = (query_start.u32s(), context_len.u32s(), out.cube());
    let [tokens, heads, latent] = out.shape;
    let first = query_start[seqs.start] as usize;
    let rows = query_start[seqs.end] as usize - first;
    assert!(first + rows <= tokens, "{OP}: query_start ends at {} of {tokens} tokens", first + rows);
    if rows == 0 || heads == 0 {
        return;
    }
    let bf16 = cache.entries().are_bf16()
        && q_latent.cube().dtype == DType::BF16
        && q_rope.cube().dtype == DType::BF16;
    let products = Products::of(bf16 && cpu.isa.has_pairs());
    let groups_wanted = cpu.threads.div_ceil(rows);
    let per_group = heads.div_ceil(groups_wanted).next_multiple_of(4).min(MAX_HEADS);
    let head_groups = heads.div_ceil(per_group);
    let task_of = |group: usize| {
        let token = first + group / head_groups;
        let head = group % head_groups * per_group;
        // The last sequence that begins at or before the token; sequences without rows begin where the next one does.
        let seq = query_start[..=seqs.end].partition_point(|&start| start as usize <= token) - 1;
        let later = query_start[seq + 1] as usize - token - 1;
        let context = context_len[seq] as usize;
        // Padding has a row and no context.
        let seen = context.checked_sub(later).filter(|&seen| seen > 0 || context == 0);
        Task {
            token,
            heads: head..(head + per_group).min(heads),
            seen: seen.unwrap_or_else(|| panic!("{OP}: sequence {seq} has more rows than context")),
            pages: Pages { cache: cache.entries(), table: table.u32_row(seq), op: OP },
            q: [q_latent.cube(), q_rope.cube()],
            latent,
            products,
            scale,
        }
    };
    let groups = rows * head_groups;
    let most = context_len[seqs.clone()].iter().max().map_or(0, |&len| (len as usize).div_ceil(SPLIT));
    let wave = if groups >= 2 * cpu.threads { 1 } else { most.min((4 * cpu.threads).div_ceil(groups)) };
    let state_floats = State::floats(per_group, products.state_width(latent));
    let mut engine = cpu.engine();
    let crate::Engine { pool, workspace } = &mut *engine;
    if wave <= 1 {
        pool.run(groups, &|group, scratch| {
            let task = task_of(group);
            let [state, part, bufs] = scratch.floats.parts([state_floats, state_floats, task.floats()]);
            cpu.isa.run(Whole { task, state, part, bufs, out });
        });
        return;
    }
    let states = Shared::new(workspace.x.get(groups * state_floats));
    let parts = Shared::new(workspace.y.get(groups * wave * state_floats));
    for begin in (0..most).step_by(wave) {
        pool.run(groups * wave, &|index, scratch| {
            let (task, split) = (task_of(index / wave), begin + index % wave);
            if split < task.splits() {
                let bufs = scratch.floats.get(task.floats());
                // SAFETY: the part belongs to this task.
                let part = unsafe { parts.part(index * state_floats, state_floats) };
                cpu.isa.run(Split { task: &task, index: split, part, bufs });
            }
        });
        pool.run(groups, &|group, _| {
            let task = task_of(group);
            let splits = task.splits().saturating_sub(begin).min(wave);
            // SAFETY: the state and the parts of this group belong to this task.
            let (state, parts) = unsafe {
                (
                    states.part(group * state_floats, state_floats),
                    parts.part(group * wave * state_floats, splits * state_floats),
                )
            };
            // A row without context has its zeros written by the first wave.
            let last = begin + splits == task.splits() && (splits > 0 || begin == 0);
            cpu.isa.run(Merge { task, begin, state, parts, state_floats, out: last.then_some(out) });
        });
    }
}

/// One token and a group of its heads.
struct Task<'a> {
    token: usize,
    heads: Range<usize>,
    /// Cached tokens that it sees; none where it is padding.
    seen: usize,
    pages: Pages<'a>,
    /// Latent and rope parts of the queries.
    q: [Cube<'a>; 2],
    latent: usize,
    products: Products,
    scale: f32,
}

impl Task<'_> {
    fn splits(&self) -> usize {
        self.seen.div_ceil(SPLIT)
    }

    fn width(&self) -> usize {
        self.latent + self.q[1].shape[2]
    }

    /// Sizes of the queries, a tile of the cache, and what a tile takes.
    fn sizes(&self) -> [usize; 5] {
        let (heads, width) = (self.heads.len(), self.width());
        let [scores, weights, scratch] = self.products.tile_floats(heads, width);
        [self.products.floats(heads, width), self.products.floats(TILE, width), scores, weights, scratch]
            .map(|size| size.next_multiple_of(16))
    }

    fn floats(&self) -> usize {
        self.sizes().iter().sum()
    }

    fn state<'s>(&self, floats: &'s mut [f32]) -> State<'s> {
        State::kept(floats, self.heads.len(), self.products.state_width(self.latent))
    }

    fn empty_state<'s>(&self, floats: &'s mut [f32]) -> State<'s> {
        State::empty(floats, self.heads.len(), self.products.state_width(self.latent))
    }

    /// The group's queries, latent parts before rotated ones.
    #[inline(always)]
    fn queries<'s, S: Simd>(&self, s: S, room: &'s mut [f32]) -> Mat<'s> {
        let [latent, rope] = self.q.map(|part| part.outer(self.token));
        let width = self.width();
        let q = MatMut::scratch(room, self.products.dtype(), self.heads.len(), width);
        for (i, head) in self.heads.clone().enumerate() {
            // SAFETY: the task's own memory, of the type that the products want.
            unsafe {
                if self.products == Products::Pairs {
                    q.copy(i, 0, latent, head);
                    q.copy(i, self.latent, rope, head);
                } else {
                    let (to_latent, to_rope) = q.row_mut::<f32>(i).split_at_mut(self.latent);
                    latent.read(s, head, 0, to_latent);
                    rope.read(s, head, 0, to_rope);
                }
            }
        }
        q.readable()
    }

    /// Attention over one split of the context, from nothing.
    #[inline(always)]
    fn split<S: Simd>(&self, s: S, split: usize, part: &mut [f32], bufs: &mut [f32]) {
        let width = self.width();
        let [q_len, kv_len, scores_len, weights_len, _] = self.sizes();
        let (q, rest) = bufs.split_at_mut(q_len);
        let (kv, rest) = rest.split_at_mut(kv_len);
        let (scores, rest) = rest.split_at_mut(scores_len);
        let (weights, scratch) = rest.split_at_mut(weights_len);
        let q = self.queries(s, q);
        let mut state = self.empty_state(part);
        let end = self.seen.min((split + 1) * SPLIT);
        let mut begin = split * SPLIT;
        while begin < end {
            let n = TILE.min(end - begin);
            let room = MatMut::scratch(kv, self.products.dtype(), n, width);
            let keys = if self.products == Products::Pairs {
                self.pages.rows(begin, n, room)
            } else {
                for j in 0..n {
                    // SAFETY: the task's own memory, F32.
                    self.pages.read(s, begin + j, unsafe { room.row_mut::<f32>(j) });
                }
                room.readable()
            };
            let values = keys.columns(0..self.latent);
            let tile = Tile { q, keys, values, seen: n.cast_signed(), step: 0, scale: self.scale };
            tile.run(s, self.products, &mut state, [&mut *scores, &mut *weights, &mut *scratch]);
            begin += n;
        }
    }

    #[inline(always)]
    fn write<S: Simd>(&self, s: S, state: &mut State<'_>, out: CubeMut<'_>) {
        for (i, head) in self.heads.clone().enumerate() {
            let row = self.products.finish(s, state, i, self.latent);
            // SAFETY: the token's heads belong to this task.
            unsafe { out.outer(self.token).write(s, head, 0, row) };
        }
    }
}

/// All splits in turn.
struct Whole<'a> {
    task: Task<'a>,
    state: &'a mut [f32],
    part: &'a mut [f32],
    bufs: &'a mut [f32],
    out: CubeMut<'a>,
}

impl Kernel for Whole<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut state = self.task.empty_state(self.state);
        for split in 0..self.task.splits() {
            self.task.split(s, split, self.part, self.bufs);
            state.merge(s, &self.task.state(self.part));
        }
        self.task.write(s, &mut state, self.out);
    }
}

/// One split of several that run side by side.
struct Split<'a> {
    task: &'a Task<'a>,
    index: usize,
    part: &'a mut [f32],
    bufs: &'a mut [f32],
}

impl Kernel for Split<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.task.split(s, self.index, self.part, self.bufs);
    }
}

/// The splits of a wave into the state, and the state to the output after the last.
struct Merge<'a> {
    task: Task<'a>,
    begin: usize,
    state: &'a mut [f32],
    parts: &'a mut [f32],
    state_floats: usize,
    out: Option<CubeMut<'a>>,
}

impl Kernel for Merge<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut state =
            if self.begin == 0 { self.task.empty_state(self.state) } else { self.task.state(self.state) };
        for part in self.parts.chunks_exact_mut(self.state_floats) {
            state.merge(s, &self.task.state(part));
        }
        if let Some(out) = self.out {
            self.task.write(s, &mut state, out);
        }
    }
}
