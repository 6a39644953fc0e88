//! Batches of sequences over a paged cache whose blocks are shuffled and poisoned wherever nothing was cached.

use std::ops::Range;

use r1_core::DType;

use super::naive;
use super::random::Random;
use super::rounding::round_to;
use super::slab::{Layout, Slab};
use crate::{Backend, Batch, Fp8Latent, HostSlice, LatentCache, NO_SLOT};

/// What one sequence brings to a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    /// Tokens that are in the cache already.
    pub(super) cached: usize,
    /// Rows of this step.
    pub(super) new: usize,
}

/// Heads, kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) heads: usize,
    pub(super) latent: usize,
    pub(super) rope: usize,
    pub(super) nope: usize,
    pub(super) value: usize,
}

pub(super) const SIZES: [Sizes; 3] = [
    Sizes { heads: 1, latent: 7, rope: 2, nope: 3, value: 5 },
    Sizes { heads: 3, latent: 36, rope: 6, nope: 10, value: 12 },
    Sizes { heads: 5, latent: 128, rope: 16, nope: 32, value: 24 },
];

/// DeepSeek-V2 and V3's, with a few of their heads.
pub(super) const PUBLISHED: Sizes = Sizes { heads: 4, latent: 512, rope: 64, nope: 128, value: 128 };

/// More than one group of FP8 scales, the last one short.
pub(super) const RAGGED_GROUPS: Sizes = Sizes { heads: 3, latent: 300, rope: 6, nope: 5, value: 9 };

impl Sizes {
    pub(super) fn entry(self) -> usize {
        self.latent + self.rope
    }
}

/// Steps: decode only, prefill only, and mixed, with chunks that go on from a cached prefix, contexts around a
/// block's end, and a prefill of one row.
pub(super) fn steps() -> Vec<Vec<Turn>> {
    let turn = |cached, new| Turn { cached, new };
    vec![
        vec![turn(0, 1)],
        vec![turn(15, 1), turn(16, 1), turn(130, 1)],
        vec![turn(0, 17)],
        vec![turn(33, 1), turn(0, 1), turn(5, 9), turn(0, 33), turn(48, 16), turn(20, 1)],
    ]
}

/// The block tables of some sequences.
pub(super) struct Tables {
    pub(super) block_size: usize,
    pub(super) num_blocks: usize,
    /// Blocks of each sequence.
    blocks: Vec<Vec<usize>>,
}

impl Tables {
    /// Blocks for sequences of these lengths, in random order, with a few left unused.
    pub(super) fn new(random: &mut Random, block_size: usize, lens: impl Iterator<Item = usize>) -> Self {
        let counts: Vec<usize> = lens.map(|len| len.div_ceil(block_size)).collect();
        let num_blocks = counts.iter().sum::<usize>() + 3;
        let mut free = random.permutation(num_blocks);
        let blocks = counts.into_iter().map(|count| free.split_off(free.len() - count)).collect();
        Self { block_size, num_blocks, blocks }
    }

    /// Where a token of a sequence lies in the cache.
    pub(super) fn slot(&self, seq: usize, position: usize) -> usize {
        self.blocks[seq][position / self.block_size] * self.block_size + position % self.block_size
    }
}

/// One step's batch on the backend.
pub(super) struct Step<B: Backend> {
    pub(super) batch: Batch<B>,
    pub(super) turns: Vec<Turn>,
    /// Rows of each sequence.
    pub(super) rows: Vec<Range<usize>>,
    /// Index of each turn's sequence in the tables.
    pub(super) seqs: Vec<usize>,
    inputs: Vec<Slab<B>>,
}

impl<B: Backend> Step<B> {
    /// The step of all sequences of `tables`.
    pub(super) fn new(backend: &B, tables: &Tables, turns: &[Turn]) -> Self {
        Self::of(backend, tables, turns, (0..turns.len()).collect())
    }

    /// The step in which turn `i` is that of sequence `seqs[i]` of `tables`.
    pub(super) fn of(backend: &B, tables: &Tables, turns: &[Turn], seqs: Vec<usize>) -> Self {
        Self::build(backend, tables, turns, seqs, 0)
    }

    /// The step of all sequences of `tables`, which all decode, and of so many padding sequences.
    pub(super) fn padded(backend: &B, tables: &Tables, turns: &[Turn], padding: usize) -> Self {
        assert!(
            padding == 0 || turns.iter().all(|turn| turn.new == 1),
            "padding stands beside decodes alone"
        );
        Self::build(backend, tables, turns, (0..turns.len()).collect(), padding)
    }

    fn build(backend: &B, tables: &Tables, turns: &[Turn], seqs: Vec<usize>, padding: usize) -> Self {
        let mut query_start = vec![0];
        let mut context_start = vec![0];
        let mut positions = Vec::new();
        let mut slots = Vec::new();
        for (turn, &seq) in turns.iter().zip(&seqs) {
            query_start.push(query_start[query_start.len() - 1] + turn.new as u32);
            context_start.push(context_start[context_start.len() - 1] + (turn.cached + turn.new) as u32);
            for position in turn.cached..turn.cached + turn.new {
                positions.push(position as u32);
                slots.push(tables.slot(seq, position) as u32);
            }
        }
        let mut context_len: Vec<u32> = turns.iter().map(|turn| (turn.cached + turn.new) as u32).collect();
        let num_decodes = turns.iter().take_while(|turn| turn.new == 1).count() + padding;
        let longest = context_len.iter().max().map_or(0, |len| *len as usize);
        let max_blocks = longest.div_ceil(tables.block_size) + 2;
        let mut table: Vec<u32> = seqs
            .iter()
            .zip(&context_len)
            .flat_map(|(&seq, &len)| {
                let used = (len as usize).div_ceil(tables.block_size);
                // No block has this number, so that reading the entry is found.
                (0..max_blocks).map(move |i| if i < used { tables.blocks[seq][i] as u32 } else { u32::MAX })
            })
            .collect();
        for _ in 0..padding {
            query_start.push(query_start[query_start.len() - 1] + 1);
            context_start.push(context_start[context_start.len() - 1]);
            positions.push(0);
            slots.push(NO_SLOT);
            context_len.push(0);
        }
        table.resize(table.len() + padding * max_blocks, u32::MAX);

        let ids = |shape: &[usize], values: &[u32]| Slab::ids(backend, shape, values);
        let (num_tokens, num_seqs) = (positions.len(), turns.len() + padding);
        let inputs = vec![
            ids(&[num_tokens], &positions),
            ids(&[num_tokens], &slots),
            ids(&[num_seqs + 1], &query_start),
            ids(&[num_seqs], &context_len),
            ids(&[num_seqs + 1], &context_start),
            ids(&[num_seqs, max_blocks], &table),
        ];
        let view = |index: usize| inputs[index].view.clone();
        let batch = Batch {
            positions: view(0),
            slots: view(1),
            query_start: view(2),
            context_len: view(3),
            context_start: view(4),
            block_table: view(5),
            num_tokens,
            num_seqs,
            num_decodes,
            prefill_context_tokens: context_len[num_decodes..].iter().sum::<u32>() as usize,
            max_context_len: longest,
        };
        let rows =
            query_start[..=turns.len()].windows(2).map(|pair| pair[0] as usize..pair[1] as usize).collect();
        Self { batch, turns: turns.to_vec(), rows, seqs, inputs }
    }

    pub(super) fn assert_unchanged(&self, backend: &B) {
        self.inputs.iter().for_each(|input| input.assert_unchanged(backend));
    }

    /// Ranges of sequences to attend: all, those that decode, those that prefill, and single ones.
    pub(super) fn ranges(&self) -> Vec<Range<usize>> {
        let seqs = self.turns.len();
        let mut ranges = vec![0..seqs, self.batch.decodes(), self.batch.prefills(), seqs - 1..seqs];
        ranges.retain(|range| !range.is_empty());
        ranges.dedup();
        ranges
    }
}

/// A latent cache that is poison wherever no token is.
pub(super) struct CacheSlab<B: Backend> {
    pub(super) cache: LatentCache<B>,
    sizes: Sizes,
    /// Whole entries; in the FP8 form codes, scales and rotated keys.
    slabs: Vec<Slab<B>>,
    /// `[slots, C + R]`: the entries that were put in, as the cache holds them; NaN where there are none.
    pub(super) host: Vec<f64>,
}

/// What an FP8 cache holds of an entry: codes, scales, rotated keys.
fn fp8_parts(entry: &[f64], latent: usize) -> Vec<Vec<f64>> {
    let (values, rope) = entry.split_at(latent);
    let scales = naive::fp8_scales(values, latent, false);
    let code = |(i, value): (usize, &f64)| round_to(DType::F8E4M3, value / scales[i / 128]);
    let codes = values.iter().enumerate().map(code).collect();
    vec![codes, scales, rope.to_vec()]
}

impl<B: Backend> CacheSlab<B> {
    /// With random entries for the first `lens[s]` tokens of each sequence; F8E4M3 makes the FP8 form.
    pub(super) fn new(
        backend: &B,
        random: &mut Random,
        tables: &Tables,
        sizes: Sizes,
        dtype: DType,
        lens: &[usize],
    ) -> Self {
        let Sizes { latent, rope, .. } = sizes;
        let fp8 = dtype == DType::F8E4M3;
        let parts = if fp8 {
            vec![(latent, dtype), (latent.div_ceil(128), DType::F32), (rope, DType::BF16)]
        } else {
            vec![(sizes.entry(), dtype)]
        };
        let slots = tables.num_blocks * tables.block_size;
        let mut images: Vec<_> = parts.iter().map(|(width, _)| vec![f64::NAN; slots * width]).collect();
        for (seq, &len) in lens.iter().enumerate() {
            for position in 0..len {
                let mut entry = random.normals(sizes.entry(), 1.0);
                if fp8 {
                    // Groups of unlike scales, so that another group's or another token's is found out.
                    for group in entry[..latent].chunks_mut(128) {
                        let factor = random.uniform(0.25, 1.5);
                        for value in group {
                            *value *= factor;
                        }
                    }
                }
                let held = if fp8 { fp8_parts(&entry, latent) } else { vec![entry] };
                let slot = tables.slot(seq, position);
                for (image, part) in images.iter_mut().zip(held) {
                    image[slot * part.len()..][..part.len()].copy_from_slice(&part);
                }
            }
        }
        let slabs: Vec<_> = parts
            .iter()
            .zip(&images)
            .map(|(&(width, dtype), image)| {
                let shape = [tables.num_blocks, tables.block_size, width];
                Slab::floats(backend, &shape, dtype, Layout::Dense, image)
            })
            .collect();
        let view = |part: usize| slabs[part].view.clone();
        let cache = LatentCache {
            data: view(0),
            latent_dim: latent,
            fp8: fp8.then(|| Fp8Latent { scales: view(1), rope: view(2) }),
        };
        let host: Vec<_> = slabs.iter().map(|slab| slab.host.clone()).collect();
        let host = entries_of(sizes, &host);
        Self { cache, sizes, slabs, host }
    }

    /// Everything that the cache holds as it lies there, poison included.
    pub(super) fn contents(&self, backend: &B) -> Vec<f64> {
        self.slabs.iter().flat_map(|slab| slab.read(backend)).collect()
    }

    /// Puts back what [`contents`](CacheSlab::contents) gave.
    pub(super) fn restore(&self, backend: &B, contents: &[f64]) {
        let mut rest = contents;
        for slab in &self.slabs {
            let (part, others) = rest.split_at(slab.view.num_elements());
            let values: Vec<f32> = part.iter().map(|&value| value as f32).collect();
            backend.upload(HostSlice::F32(&values), &slab.view);
            rest = others;
        }
    }

    /// The entries of a sequence's first `len` tokens, as they were put in.
    pub(super) fn entries(&self, tables: &Tables, seq: usize, len: usize) -> Vec<Vec<f64>> {
        let entry = self.sizes.entry();
        (0..len).map(|p| self.host[tables.slot(seq, p) * entry..][..entry].to_vec()).collect()
    }

    /// What the cache holds at a slot now, by parts: the whole entry, or codes, scales and rotated keys.
    pub(super) fn read(&self, backend: &B) -> impl Fn(usize) -> Vec<Vec<f64>> + use<B> {
        let widths: Vec<_> = self.slabs.iter().map(|slab| slab.view.dim(2)).collect();
        let parts: Vec<_> = self.slabs.iter().map(|slab| slab.read(backend)).collect();
        move |slot| {
            let of = |(part, &width): (&Vec<f64>, &usize)| part[slot * width..][..width].to_vec();
            parts.iter().zip(&widths).map(of).collect()
        }
    }

    /// Checks that nothing was written to a slot.
    #[track_caller]
    pub(super) fn assert_slot_unchanged(&self, what: &str, slot: usize, now: &[Vec<f64>]) {
        for (slab, now) in self.slabs.iter().zip(now) {
            let before = &slab.host[slot * now.len()..][..now.len()];
            let same = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan();
            assert!(now.iter().zip(before).all(same), "{what}: slot {slot} was {before:?}, is {now:?}");
        }
    }

    #[track_caller]
    pub(super) fn assert_unchanged(&self, backend: &B) {
        self.slabs.iter().for_each(|slab| slab.assert_unchanged(backend));
    }
}

/// `[slots, C + R]` of a cache's parts, each `[slots, width]`.
fn entries_of(sizes: Sizes, parts: &[Vec<f64>]) -> Vec<f64> {
    let [codes, scales, rope] = parts else { return parts[0].clone() };
    let groups = sizes.latent.div_ceil(128);
    (codes.chunks(sizes.latent))
        .zip(scales.chunks(groups).zip(rope.chunks(sizes.rope)))
        .flat_map(|(codes, (scales, rope))| {
            let value = move |(i, code): (usize, &f64)| code * scales[i / 128];
            codes.iter().enumerate().map(value).chain(rope.iter().copied())
        })
        .collect()
}
