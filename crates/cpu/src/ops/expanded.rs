//! Un-absorbed MLA over expanded keys and values: what long prefills use.
//!
//! A task is one head of a block of query rows. Tiles of keys are cut at fixed places of the context, and a row sums exactly
//! the keys it sees, so its bits do not depend on the rows beside it.

use std::ops::Range;

use r1_backend::{Batch, Tensor, shape};
use r1_core::DType;

use super::softmax::State;
use super::tile::{Products, TILE, Tile};
use crate::Cpu;
use crate::simd::{Kernel, Simd};
use crate::view::{In, Mat, MatMut, Out};

const OP: &str = "mla_attention_expanded";
/// Query rows per task.
const QUERY_ROWS: usize = 32;

pub(crate) fn mla_attention_expanded(
    cpu: &Cpu,
    q: &Tensor<Cpu>,
    kv: &Tensor<Cpu>,
    k_rope: &Tensor<Cpu>,
    batch: &Batch<Cpu>,
    seqs: &Range<usize>,
    scale: f32,
    out: &Tensor<Cpu>,
) {
    shape::mla_attention_expanded(q, kv, k_rope, batch, seqs, out);
    let (q, kv, k_rope) = (In::new(OP, "q", q), In::new(OP, "kv", kv), In::new(OP, "k_rope", k_rope));
    let query_start = In::new(OP, "batch.query_start", &batch.query_start);
    let context_len = In::new(OP, "batch.context_len", &batch.context_len);
    let context_start = In::new(OP, "batch.context_start", &batch.context_start);
    let mut out = Out::new(OP, "out", out);
    let (q, kv, k_rope, out) = (q.cube(), kv.cube(), k_rope.mat(), out.cube());
    let (query_start, context_len) = (query_start.u32s(), context_len.u32s());
    let context_start = context_start.u32s();
    let [tokens, heads, value_dim] = out.shape;
    let key_dim = q.shape[2];
    let bf16 = [q.dtype, kv.dtype, k_rope.dtype].iter().all(|&dtype| dtype == DType::BF16);
    let products = Products::of(bf16 && cpu.isa.has_pairs());
    let mut engine = cpu.engine();
    for seq in seqs.clone() {
        let rows = query_start[seq] as usize..query_start[seq + 1] as usize;
        let seen = context_len[seq] as usize;
        let first_key = (context_start[seq] - context_start[seqs.start]) as usize;
        assert!(rows.end <= tokens, "{OP}: query_start ends at {} of {tokens} tokens", rows.end);
        assert!(rows.len() <= seen, "{OP}: sequence {seq} has more rows than context");
        assert!(first_key + seen <= k_rope.rows, "{OP}: sequence {seq} ends past {} keys", k_rope.rows);
        let blocks = rows.len().div_ceil(QUERY_ROWS);
        engine.pool.run(heads * blocks, &|task, scratch| {
            let (head, block) = (task / blocks, task % blocks);
            let begin = rows.start + block * QUERY_ROWS;
            let block = begin..(begin + QUERY_ROWS).min(rows.end);
            let m = block.len();
            let [scores, weights, tile] = products.tile_floats(m, key_dim);
            // Queries and values are used in place where they are BF16 as the products want them.
            let [queries, values] = match products {
                Products::F32 => [m * key_dim, TILE * value_dim],
                Products::Pairs => [0, 0],
            };
            let keys = products.floats(TILE, key_dim);
            let state = State::floats(m, products.state_width(value_dim));
            let bufs = scratch.floats.parts([queries, keys, values, state, scores, weights, tile]);
            cpu.isa.run(Block {
                q: q.middle(head),
                kv: kv.middle(head),
                k_rope,
                out: out.middle(head),
                seen: seen - (rows.end - block.start) + 1,
                first_key,
                rows: block,
                scale,
                products,
                bufs,
            });
        });
    }
}

struct Block<'a> {
    q: Mat<'a>,
    kv: Mat<'a>,
    k_rope: Mat<'a>,
    out: MatMut<'a>,
    /// Keys that the first row sees; each later row sees one more.
    seen: usize,
    /// Row of the keys that is the sequence's first.
    first_key: usize,
    rows: Range<usize>,
    scale: f32,
    products: Products,
    /// Queries, keys, values, state, and what a tile takes.
    bufs: [&'a mut [f32]; 7],
}

impl Kernel for Block<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [q_room, key_room, value_room, state, scores, weights, tile] = self.bufs;
        let (m, key_dim, value_dim) = (self.rows.len(), self.q.cols, self.out.cols);
        let (nope, pairs) = (key_dim - self.k_rope.cols, self.products == Products::Pairs);
        let q = if pairs {
            self.q.slice(self.rows.clone())
        } else {
            for (i, row) in q_room.chunks_exact_mut(key_dim).enumerate() {
                self.q.read(s, self.rows.start + i, 0, row);
            }
            Mat::from_f32(q_room, m, key_dim, key_dim)
        };
        let mut state = State::empty(state, m, self.products.state_width(value_dim));
        let most = self.seen + m - 1;
        let mut begin = 0;
        while begin < most {
            let n = TILE.min(most - begin);
            let first = self.first_key + begin;
            let kv = self.kv.slice(first..first + n);
            let k_rope = self.k_rope.slice(first..first + n);
            let keys = MatMut::scratch(key_room, self.products.dtype(), n, key_dim);
            let values = if pairs {
                for j in 0..n {
                    // SAFETY: the task's own memory.
                    unsafe {
                        keys.copy(j, 0, kv.columns(0..nope), j);
                        keys.copy(j, nope, k_rope, j);
                    }
                }
                kv.columns(nope..nope + value_dim)
            } else {
                for j in 0..n {
                    // SAFETY: the task's own memory, F32.
                    let key = unsafe { keys.row_mut::<f32>(j) };
                    kv.read(s, j, 0, &mut key[..nope]);
                    k_rope.read(s, j, 0, &mut key[nope..]);
                    kv.read(s, j, nope, &mut value_room[j * value_dim..][..value_dim]);
                }
                Mat::from_f32(value_room, n, value_dim, value_dim)
            };
            let seen = self.seen.cast_signed() - begin.cast_signed();
            let keys = keys.readable();
            let tiles = Tile { q, keys, values, seen, step: 1, scale: self.scale };
            tiles.run(s, self.products, &mut state, [&mut *scores, &mut *weights, &mut *tile]);
            begin += n;
        }
        for i in 0..m {
            let row = self.products.finish(s, &mut state, i, value_dim);
            // SAFETY: this head's rows belong to this task.
            unsafe { self.out.write(s, self.rows.start + i, 0, row) };
        }
    }
}
