//! Batches of sequences over a paged cache whose blocks are shuffled and poisoned wherever nothing was cached.

use std::ops::Range;

use r1_core::DType;

use super::random::Random;
use super::slab::{Layout, Slab};
use crate::{Backend, Batch, LatentCache, NO_SLOT};

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
    pub(super) slab: Slab<B>,
    pub(super) cache: LatentCache<B>,
}

impl<B: Backend> CacheSlab<B> {
    /// With random entries for the first `lens[s]` tokens of each sequence.
    pub(super) fn new(
        backend: &B,
        random: &mut Random,
        tables: &Tables,
        sizes: Sizes,
        dtype: DType,
        lens: &[usize],
    ) -> Self {
        let entry = sizes.entry();
        let mut values = vec![f64::NAN; tables.num_blocks * tables.block_size * entry];
        for (seq, &len) in lens.iter().enumerate() {
            for position in 0..len {
                let at = tables.slot(seq, position) * entry;
                values[at..at + entry].copy_from_slice(&random.normals(entry, 1.0));
            }
        }
        let shape = [tables.num_blocks, tables.block_size, entry];
        let slab = Slab::floats(backend, &shape, dtype, Layout::Dense, &values);
        let cache = LatentCache { data: slab.view.clone(), latent_dim: sizes.latent };
        Self { slab, cache }
    }

    /// The entries of a sequence's first `len` tokens, as they were put in.
    pub(super) fn entries(&self, tables: &Tables, seq: usize, len: usize) -> Vec<Vec<f64>> {
        let entry = self.slab.view.dim(2);
        (0..len).map(|p| self.slab.host[tables.slot(seq, p) * entry..][..entry].to_vec()).collect()
    }
}
