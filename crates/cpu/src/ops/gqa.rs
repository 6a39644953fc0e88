//! Grouped-query attention over the paged cache of keys and values, and the write to it.
//!
//! A task is one KV head and a block of a sequence's tokens: each cached row of that head is widened once and meets all query
//! heads of all these tokens. Tiles are cut at fixed places of the context, and a row sums exactly the tokens it sees, so its
//! bits do not depend on the rows beside it.

use std::ops::Range;

use r1_backend::{Batch, KvCache, RopeTable, Tensor, shape};

use super::softmax::State;
use super::{Chunks, TASKS_PER_THREAD};
use crate::Cpu;
use crate::kernels::{Combine, MatMul, TileSize, WeightRows, XRows};
use crate::simd::{Kernel, Simd};
use crate::view::{Cube, CubeMut, In, Mat, Out};

/// Cached tokens per tile.
const TILE: usize = 64;
/// Query rows per task, a row being a token's head, unless a token alone has more.
const QUERY_ROWS: usize = 32;
/// The slot of a row that is padding.
const NO_SLOT: u32 = u32::MAX;

pub(crate) fn gqa_attention(
    cpu: &Cpu,
    q: &Tensor<Cpu>,
    cache: &KvCache<Cpu>,
    batch: &Batch<Cpu>,
    seqs: &Range<usize>,
    scale: f32,
    out: &Tensor<Cpu>,
) {
    const OP: &str = "gqa_attention";
    shape::gqa_attention(q, cache, batch, seqs, out);
    let kv_heads = cache.num_kv_heads();
    let (keys, values) = (In::new(OP, "cache.k", &cache.k), In::new(OP, "cache.v", &cache.v));
    let q = In::new(OP, "q", q);
    let query_start = In::new(OP, "batch.query_start", &batch.query_start);
    let context_len = In::new(OP, "batch.context_len", &batch.context_len);
    let table = In::new(OP, "batch.block_table", &batch.block_table);
    let mut out = Out::new(OP, "out", out);
    let (query_start, context_len) = (query_start.u32s(), context_len.u32s());
    let (q, out) = (q.cube(), out.cube());
    let [tokens, heads, value_dim] = out.shape;
    let (key_dim, shared_by) = (q.shape[2], heads / kv_heads);
    let end = query_start[seqs.end] as usize;
    assert!(end <= tokens, "{OP}: query_start ends at {end} of {tokens} tokens");
    let rows_of = |seq: usize| query_start[seq] as usize..query_start[seq + 1] as usize;
    let blocks_of = |seq: usize| Chunks::new(rows_of(seq).len(), QUERY_ROWS / shared_by.max(1));
    let blocks: usize = seqs.clone().map(|seq| blocks_of(seq).count()).sum();
    let task_of = |task: usize| {
        let (kv_head, mut block) = (task % kv_heads, task / kv_heads);
        let mut seq = seqs.start;
        while block >= blocks_of(seq).count() {
            block -= blocks_of(seq).count();
            seq += 1;
        }
        let (rows, context) = (rows_of(seq), context_len[seq] as usize);
        let block = blocks_of(seq).range(block);
        let seen = match context {
            0 => 0,
            _ => (context + block.start + 1)
                .checked_sub(rows.len())
                .filter(|&seen| seen > block.start)
                .unwrap_or_else(|| panic!("{OP}: sequence {seq} has more rows than context")),
        };
        let (keys, values) = (keys.cube(), values.cube());
        let pages = Pages { keys, values, block_size: cache.block_size(), table: table.u32_row(seq) };
        let tokens = rows.start + block.start..rows.start + block.end;
        Block { pages, q, out, kv_head, shared_by, dims: [key_dim, value_dim], seen, tokens, scale }
    };
    cpu.engine().pool.run(blocks * kv_heads, &|task, scratch| {
        let block = task_of(task);
        let bufs = scratch.floats.parts(block.sizes());
        cpu.isa.run(Attend { block, bufs });
    });
}

/// Where the tokens of one sequence lie in the paged cache.
struct Pages<'a> {
    /// `[num_blocks * block_size, G, Dh]`.
    keys: Cube<'a>,
    /// `[num_blocks * block_size, G, Dv]`.
    values: Cube<'a>,
    block_size: usize,
    table: &'a [u32],
}

impl Pages<'_> {
    /// The slot of token `j`.
    fn slot(&self, j: usize) -> usize {
        let (entry, offset) = (j / self.block_size, j % self.block_size);
        assert!(
            entry < self.table.len(),
            "gqa_attention: token {j} past a block table of {}",
            self.table.len()
        );
        let num_blocks = self.keys.shape[0] / self.block_size;
        let block = self.table[entry] as usize;
        assert!(block < num_blocks, "gqa_attention: block {block} of {num_blocks}");
        block * self.block_size + offset
    }
}

/// One KV head and a block of a sequence's tokens. Row `i` is query head `i % shared_by` of token `i / shared_by`.
struct Block<'a> {
    pages: Pages<'a>,
    q: Cube<'a>,
    out: CubeMut<'a>,
    kv_head: usize,
    /// Query heads per KV head.
    shared_by: usize,
    /// Dh and Dv.
    dims: [usize; 2],
    /// Cached tokens that the first token sees; each later one sees one more. 0: the sequence is padding.
    seen: usize,
    /// Rows of the batch.
    tokens: Range<usize>,
    scale: f32,
}

impl Block<'_> {
    fn rows(&self) -> usize {
        self.tokens.len() * self.shared_by
    }

    /// Floats of queries, keys, values, scores, state, the products' scratch.
    fn sizes(&self) -> [usize; 6] {
        let [key_dim, value_dim] = self.dims;
        let (rows, keys) = (self.rows(), WeightRows::from_f32(&[], 0, key_dim, key_dim));
        let tile = TileSize::floats(&keys, TILE, rows).max(Combine::tile_floats(TILE));
        let state = State::floats(rows, value_dim);
        [rows * key_dim, TILE * key_dim, TILE * value_dim, rows * TILE, state, tile]
    }

    /// Row `i` in the batch: its token and its head.
    fn place(&self, i: usize) -> (usize, usize) {
        (self.tokens.start + i / self.shared_by, self.kv_head * self.shared_by + i % self.shared_by)
    }
}

struct Attend<'a> {
    block: Block<'a>,
    bufs: [&'a mut [f32]; 6],
}

impl Kernel for Attend<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let block = self.block;
        let [q, keys, values, scores, state, tile] = self.bufs;
        let (m, per, [key_dim, value_dim]) = (block.rows(), block.shared_by, block.dims);
        if block.seen == 0 {
            let zeros = &mut values[..value_dim];
            zeros.fill(0.0);
            for i in 0..m {
                let (token, head) = block.place(i);
                // SAFETY: the heads of these tokens belong to this task.
                unsafe { block.out.outer(token).write(s, head, 0, zeros) };
            }
            return;
        }
        for i in 0..m {
            let (token, head) = block.place(i);
            block.q.outer(token).read(s, head, 0, &mut q[i * key_dim..][..key_dim]);
        }
        let q = Mat::from_f32(q, m, key_dim, key_dim);
        let mut state = State::empty(state, m, value_dim);
        let most = block.seen + block.tokens.len() - 1;
        let mut begin = 0;
        while begin < most {
            let n = TILE.min(most - begin);
            for j in 0..n {
                let slot = block.pages.slot(begin + j);
                let (key, value) = (block.pages.keys.outer(slot), block.pages.values.outer(slot));
                key.read(s, block.kv_head, 0, &mut keys[j * key_dim..][..key_dim]);
                value.read(s, block.kv_head, 0, &mut values[j * value_dim..][..value_dim]);
            }
            // Tokens before `active` see nothing of this tile, tokens from `full` on all of it.
            let active = (begin + 1).saturating_sub(block.seen).min(block.tokens.len());
            let full = (begin + n).saturating_sub(block.seen).min(block.tokens.len());
            let w = WeightRows::from_f32(keys, n, key_dim, key_dim);
            let x = XRows::range(q, active * per..m);
            s.call(MatMul { w, rows: 0..n, x, y: &mut scores[active * per * TILE..], ldy: TILE, tile });
            for i in active * per..m {
                let seen = n.min(block.seen + i / per - begin);
                state.weigh(s, i, &mut scores[i * TILE..][..seen], block.scale);
            }
            let w = WeightRows::from_f32(values, n, value_dim, value_dim);
            let mut sum = |token: usize, tokens: usize, seen: usize| {
                s.call(Combine {
                    w,
                    rows: 0..seen,
                    cols: 0..value_dim,
                    coef: &scores[token * per * TILE..],
                    ld_coef: TILE,
                    m: tokens * per,
                    y: state.sums(token * per),
                    ldy: value_dim,
                    tile,
                });
            };
            for token in active..full {
                sum(token, 1, block.seen + token - begin);
            }
            if full < block.tokens.len() {
                sum(full, block.tokens.len() - full, n);
            }
            begin += n;
        }
        for i in 0..m {
            let (token, head) = block.place(i);
            let row = state.finish(s, i);
            // SAFETY: the heads of these tokens belong to this task.
            unsafe { block.out.outer(token).write(s, head, 0, row) };
        }
    }
}

pub(crate) fn rope_cache_gqa(
    cpu: &Cpu,
    q: &Tensor<Cpu>,
    k: &Tensor<Cpu>,
    v: &Tensor<Cpu>,
    rope: &RopeTable<Cpu>,
    batch: &Batch<Cpu>,
    cache: &KvCache<Cpu>,
) {
    const OP: &str = "rope_cache_gqa";
    shape::rope_cache_gqa(q, k, v, rope, batch, cache);
    let (k, v) = (In::new(OP, "k", k), In::new(OP, "v", v));
    let cos_sin = In::new(OP, "rope.cos_sin", &rope.cos_sin);
    let positions = In::new(OP, "batch.positions", &batch.positions);
    let slots = In::new(OP, "batch.slots", &batch.slots);
    let mut q = Out::new(OP, "q", q);
    let (mut keys, mut values) = (Out::new(OP, "cache.k", &cache.k), Out::new(OP, "cache.v", &cache.v));
    let (q, k, v) = (q.cube(), k.cube(), v.cube());
    let (keys, values) = (keys.cube(), values.cube());
    let rotation = Rotation { cos_sin: cos_sin.mat(), positions: positions.u32s() };
    let slots = slots.u32s();
    let [tokens, heads, dim] = q.shape;
    let mut engine = cpu.engine();
    let chunks = Chunks::rows(tokens, heads * dim, cpu.threads);
    engine.pool.run(chunks.count(), &|task, scratch| {
        let buf = scratch.floats.get(dim);
        cpu.isa.run(RotateQueries { q, rotation, tokens: chunks.range(task), buf });
    });
    // Tasks own slots, not tokens: two tokens with one slot must not be written at once.
    let width = k.shape[1] * (dim + v.shape[2]);
    let owners = Chunks::rows(tokens, width, cpu.threads).count().min(cpu.threads * TASKS_PER_THREAD);
    engine.pool.run(owners, &|task, scratch| {
        let buf = scratch.floats.get(dim.max(v.shape[2]));
        let owner = (task, owners);
        cpu.isa.run(WriteCache { from: [k, v], to: [keys, values], rotation, slots, owner, buf });
    });
}

#[derive(Clone, Copy)]
struct Rotation<'a> {
    /// `[max_positions, Dh]`: cosines, then sines.
    cos_sin: Mat<'a>,
    positions: &'a [u32],
}

impl Rotation<'_> {
    /// Rotates the pairs (i, i + Dh / 2): `(x, y) -> (x cos - y sin, y cos + x sin)`.
    #[inline(always)]
    fn apply(&self, token: usize, x: &mut [f32]) {
        let position = self.positions[token] as usize;
        assert!(position < self.cos_sin.rows, "rope_cache_gqa: position {position} of {}", self.cos_sin.rows);
        let (cos, sin) = self.cos_sin.f32_row(position).split_at(x.len() / 2);
        let (low, high) = x.split_at_mut(cos.len());
        for ((x, y), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
            (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
        }
    }
}

struct RotateQueries<'a> {
    q: CubeMut<'a>,
    rotation: Rotation<'a>,
    tokens: Range<usize>,
    buf: &'a mut [f32],
}

impl Kernel for RotateQueries<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for token in self.tokens {
            let heads = self.q.outer(token);
            for head in 0..heads.rows {
                // SAFETY: the token belongs to this task.
                unsafe {
                    heads.read(s, head, 0, self.buf);
                    self.rotation.apply(token, self.buf);
                    heads.write(s, head, 0, self.buf);
                }
            }
        }
    }
}

struct WriteCache<'a> {
    /// k and v.
    from: [Cube<'a>; 2],
    /// `[num_blocks * block_size, G, Dh]` and the same with Dv.
    to: [CubeMut<'a>; 2],
    rotation: Rotation<'a>,
    slots: &'a [u32],
    /// Of so many tasks, this one writes the slots that leave this remainder.
    owner: (usize, usize),
    buf: &'a mut [f32],
}

impl Kernel for WriteCache<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let num_slots = self.to[0].shape[0];
        for (token, &slot) in self.slots.iter().enumerate().filter(|(_, slot)| **slot != NO_SLOT) {
            let slot = slot as usize;
            if slot % self.owner.1 != self.owner.0 {
                continue;
            }
            assert!(slot < num_slots, "rope_cache_gqa: slot {slot} of {num_slots}");
            for (what, (from, to)) in self.from.iter().zip(&self.to).enumerate() {
                let (heads, to) = (from.outer(token), to.outer(slot));
                let row = &mut self.buf[..heads.cols];
                for head in 0..heads.rows {
                    heads.read(s, head, 0, row);
                    if what == 0 {
                        self.rotation.apply(token, row);
                    }
                    // SAFETY: the slot belongs to this task.
                    unsafe { to.write(s, head, 0, row) };
                }
            }
        }
    }
}
