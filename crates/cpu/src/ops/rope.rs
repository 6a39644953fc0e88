//! RoPE and the cache write.

use std::ops::Range;

use r1_backend::{Batch, LatentCache, NO_SLOT, RopeTable, Tensor, shape};

use super::latent::{EntriesMut, LatentOut};
use super::norm::normed;
use super::{Chunks, TASKS_PER_THREAD, widened_vector};
use crate::Cpu;
use crate::simd::{Kernel, Simd};
use crate::view::{CubeMut, In, Mat, Out};

const OP: &str = "rope_cache";

pub(crate) fn rope_cache(
    cpu: &Cpu,
    q_rope: &Tensor<Cpu>,
    kv_a: &Tensor<Cpu>,
    norm: &Tensor<Cpu>,
    eps: f32,
    rope: &RopeTable<Cpu>,
    batch: &Batch<Cpu>,
    cache: &LatentCache<Cpu>,
) {
    shape::rope_cache(q_rope, kv_a, norm, rope, batch, cache);
    let (kv_a, norm) = (In::new(OP, "kv_a", kv_a), In::new(OP, "norm", norm));
    let cos_sin = In::new(OP, "rope.cos_sin", &rope.cos_sin);
    let positions = In::new(OP, "batch.positions", &batch.positions);
    let slots = In::new(OP, "batch.slots", &batch.slots);
    let mut q_rope = Out::new(OP, "q_rope", q_rope);
    let mut cache = LatentOut::new(OP, cache);
    let (kv_a, q_rope, cache) = (kv_a.mat(), q_rope.cube(), cache.entries());
    let rotation = Rotation { cos_sin: cos_sin.mat(), positions: positions.u32s() };
    let slots = slots.u32s();
    let [tokens, heads, dim] = q_rope.shape;
    let mut engine = cpu.engine();
    let crate::Engine { pool, workspace } = &mut *engine;
    let norm = widened_vector(cpu.isa, norm.mat(), &mut workspace.y);
    let chunks = Chunks::rows(tokens, heads * dim, cpu.threads);
    pool.run(chunks.count(), &|task, scratch| {
        let buf = scratch.floats.get(dim);
        cpu.isa.run(RotateQueries { q: q_rope, rotation, tokens: chunks.range(task), buf });
    });
    // Tasks own slots, not tokens: two tokens with one slot must not be written at once.
    let owners = Chunks::rows(tokens, kv_a.cols, cpu.threads).count().min(cpu.threads * TASKS_PER_THREAD);
    pool.run(owners, &|task, scratch| {
        let bufs = scratch.floats.parts([kv_a.cols, kv_a.cols]);
        let owner = (task, owners);
        cpu.isa.run(WriteCache { kv_a, norm, eps, rotation, slots, owner, cache, bufs });
    });
}

#[derive(Clone, Copy)]
struct Rotation<'a> {
    /// `[max_positions, R]`: cosines, then sines.
    cos_sin: Mat<'a>,
    positions: &'a [u32],
}

impl Rotation<'_> {
    /// Rotates interleaved pairs: `(x, y) -> (x cos - y sin, y cos + x sin)`.
    fn apply(&self, token: usize, x: &mut [f32]) {
        let position = self.positions[token] as usize;
        assert!(position < self.cos_sin.rows, "{OP}: position {position} of {}", self.cos_sin.rows);
        let (cos, sin) = self.cos_sin.f32_row(position).split_at(x.len() / 2);
        for ((pair, cos), sin) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
            (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
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
    kv_a: Mat<'a>,
    norm: &'a [f32],
    eps: f32,
    rotation: Rotation<'a>,
    slots: &'a [u32],
    /// Of so many tasks, this one writes the slots that leave this remainder.
    owner: (usize, usize),
    cache: EntriesMut<'a>,
    bufs: [&'a mut [f32]; 2],
}

impl Kernel for WriteCache<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (num_blocks, block_size) = (self.cache.num_blocks(), self.cache.block_size());
        let latent = self.norm.len();
        let [row, out] = self.bufs;
        for (token, &slot) in self.slots.iter().enumerate().filter(|(_, slot)| **slot != NO_SLOT) {
            let slot = slot as usize;
            if slot % self.owner.1 != self.owner.0 {
                continue;
            }
            assert!(
                slot < num_blocks * block_size,
                "{OP}: slot {slot} of {num_blocks} blocks of {block_size}"
            );
            self.kv_a.read(s, token, 0, row);
            normed(s, &row[..latent], self.norm, self.eps, &mut out[..latent]);
            out[latent..].copy_from_slice(&row[latent..]);
            self.rotation.apply(token, &mut out[latent..]);
            // SAFETY: the slot belongs to this task.
            unsafe { self.cache.write(s, slot / block_size, slot % block_size, out) };
        }
    }
}
