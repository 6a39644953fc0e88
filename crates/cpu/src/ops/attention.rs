//! Absorbed MLA over the paged latent cache: every head reads the same cached rows.
//!
//! A task is one token and a group of its heads: each cached row is widened once and meets the whole group, and nothing past
//! the token's own context is touched. The context is cut at fixed places: tiles of `TILE` tokens, an online softmax over
//! the tiles of a split, splits merged in order. Whether splits run side by side or in turn gives the same bits, so a
//! token's result depends on its own context alone.

use std::ops::Range;

use r1_backend::{Batch, LatentCache, Tensor, shape};

use super::latent::LatentIn;
use super::rows::Pages;
use super::softmax::State;
use crate::Cpu;
use crate::kernels::{Combine, MatMul, TileSize, WeightRows, XRows};
use crate::simd::{Kernel, Simd};
use crate::view::{Cube, CubeMut, In, Mat, Out, Shared};

const OP: &str = "mla_attention";
/// Cached tokens per tile.
const TILE: usize = 64;
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
            scale,
        }
    };
    let groups = rows * head_groups;
    let most = context_len[seqs.clone()].iter().max().map_or(0, |&len| (len as usize).div_ceil(SPLIT));
    let wave = if groups >= 2 * cpu.threads { 1 } else { most.min((4 * cpu.threads).div_ceil(groups)) };
    let state_floats = State::floats(per_group, latent);
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
    scale: f32,
}

impl Task<'_> {
    fn splits(&self) -> usize {
        self.seen.div_ceil(SPLIT)
    }

    fn width(&self) -> usize {
        self.latent + self.q[1].shape[2]
    }

    /// Sizes of the queries, a widened tile of the cache, scores, and the products' scratch.
    fn sizes(&self) -> [usize; 4] {
        let (heads, width) = (self.heads.len(), self.width());
        let keys = WeightRows::from_f32(&[], 0, width, width);
        let tile = TileSize::floats(&keys, TILE, heads).max(Combine::tile_floats(TILE));
        [heads * width, TILE * width, heads * TILE, tile].map(|size| size.next_multiple_of(16))
    }

    fn floats(&self) -> usize {
        self.sizes().iter().sum()
    }

    fn state<'s>(&self, floats: &'s mut [f32]) -> State<'s> {
        State::kept(floats, self.heads.len(), self.latent)
    }

    fn empty_state<'s>(&self, floats: &'s mut [f32]) -> State<'s> {
        State::empty(floats, self.heads.len(), self.latent)
    }

    /// Attention over one split of the context, from nothing.
    #[inline(always)]
    fn split<S: Simd>(&self, s: S, split: usize, part: &mut [f32], bufs: &mut [f32]) {
        let (heads, width) = (self.heads.len(), self.width());
        let [q_len, kv_len, scores_len, _] = self.sizes();
        let (q, rest) = bufs.split_at_mut(q_len);
        let (kv, rest) = rest.split_at_mut(kv_len);
        let (scores, tile) = rest.split_at_mut(scores_len);
        for (i, head) in self.heads.clone().enumerate() {
            let (latent, rope) = q[i * width..][..width].split_at_mut(self.latent);
            self.q[0].outer(self.token).read(s, head, 0, latent);
            self.q[1].outer(self.token).read(s, head, 0, rope);
        }
        let q = XRows::all(Mat::from_f32(q, heads, width, width));
        let mut state = self.empty_state(part);
        let end = self.seen.min((split + 1) * SPLIT);
        let mut begin = split * SPLIT;
        while begin < end {
            let n = TILE.min(end - begin);
            for (j, row) in kv.chunks_exact_mut(width).take(n).enumerate() {
                self.pages.read(s, begin + j, row);
            }
            let keys = WeightRows::from_f32(kv, n, width, width);
            s.call(MatMul { w: keys, rows: 0..n, x: q, y: scores, ldy: TILE, tile });
            for i in 0..heads {
                state.weigh(s, i, &mut scores[i * TILE..][..n], self.scale);
            }
            s.call(Combine {
                w: keys,
                rows: 0..n,
                cols: 0..self.latent,
                coef: scores,
                ld_coef: TILE,
                m: heads,
                y: state.sums(0),
                ldy: self.latent,
                tile,
            });
            begin += n;
        }
    }

    #[inline(always)]
    fn write<S: Simd>(&self, s: S, state: &mut State<'_>, out: CubeMut<'_>) {
        for (i, head) in self.heads.clone().enumerate() {
            let row = state.finish(s, i);
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
