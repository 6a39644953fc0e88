//! Un-absorbed MLA over expanded keys and values: what long prefills use.
//!
//! A task is one head of a block of query rows. Tiles of keys are cut at fixed places of the context, and a row sums exactly
//! the keys it sees, so its bits do not depend on the rows beside it.

use std::ops::Range;

use r1_backend::{Batch, Tensor, shape};

use super::softmax::State;
use crate::Cpu;
use crate::kernels::{Combine, MatMul, TileSize, WeightRows, XRows};
use crate::simd::{Kernel, Simd};
use crate::view::{In, Mat, MatMut, Out};

const OP: &str = "mla_attention_expanded";
/// Keys per tile.
const TILE: usize = 64;
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
            let keys = WeightRows::from_f32(&[], 0, key_dim, key_dim);
            let tile = TileSize::floats(&keys, TILE, QUERY_ROWS).max(Combine::tile_floats(TILE));
            let bufs = scratch.floats.parts([
                block.len() * key_dim,
                TILE * key_dim,
                TILE * value_dim,
                block.len() * TILE,
                State::floats(block.len(), value_dim),
                tile,
            ]);
            cpu.isa.run(Block {
                q: q.middle(head),
                kv: kv.middle(head),
                k_rope,
                out: out.middle(head),
                seen: seen - (rows.end - block.start) + 1,
                first_key,
                rows: block,
                scale,
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
    /// Queries, keys, values, scores, state, products' scratch.
    bufs: [&'a mut [f32]; 6],
}

impl Kernel for Block<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [q, keys, values, scores, state, tile] = self.bufs;
        let (m, key_dim, value_dim) = (self.rows.len(), self.q.cols, self.out.cols);
        let nope = key_dim - self.k_rope.cols;
        for (i, row) in q.chunks_exact_mut(key_dim).enumerate() {
            self.q.read(s, self.rows.start + i, 0, row);
        }
        let q = Mat::from_f32(q, m, key_dim, key_dim);
        let mut state = State::empty(state, m, value_dim);
        let most = self.seen + m - 1;
        let mut begin = 0;
        while begin < most {
            let n = TILE.min(most - begin);
            for j in 0..n {
                let (row, key) = (self.first_key + begin + j, &mut keys[j * key_dim..][..key_dim]);
                self.kv.read(s, row, 0, &mut key[..nope]);
                self.k_rope.read(s, row, 0, &mut key[nope..]);
                self.kv.read(s, row, nope, &mut values[j * value_dim..][..value_dim]);
            }
            // Rows before `active` see nothing of this tile, rows from `full` on all of it.
            let active = (begin + 1).saturating_sub(self.seen).min(m);
            let full = (begin + n).saturating_sub(self.seen).min(m);
            let w = WeightRows::from_f32(keys, n, key_dim, key_dim);
            let x = XRows::range(q, active..m);
            s.call(MatMul { w, rows: 0..n, x, y: &mut scores[active * TILE..], ldy: TILE, tile });
            for i in active..m {
                let seen = n.min(self.seen + i - begin);
                state.weigh(s, i, &mut scores[i * TILE..][..seen], self.scale);
            }
            let w = WeightRows::from_f32(values, n, value_dim, value_dim);
            let mut sum = |i: usize, m: usize, rows: usize| {
                s.call(Combine {
                    w,
                    rows: 0..rows,
                    cols: 0..value_dim,
                    coef: &scores[i * TILE..],
                    ld_coef: TILE,
                    m,
                    y: state.sums(i),
                    ldy: value_dim,
                    tile,
                });
            };
            for i in active..full {
                sum(i, 1, self.seen + i - begin);
            }
            if full < m {
                sum(full, m - full, n);
            }
            begin += n;
        }
        for i in 0..m {
            let row = state.finish(s, i);
            // SAFETY: this head's rows belong to this task.
            unsafe { self.out.write(s, self.rows.start + i, 0, row) };
        }
    }
}
