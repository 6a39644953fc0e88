//! Checks of grouped-query attention and of its cache. Nothing to check where the backend has none.

use std::ops::Range;

use r1_core::DType;

use super::attention::{assert_rows, rope_table};
use super::naive;
use super::paged::{Step, Tables, Turn, steps};
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close};
use super::settle;
use super::shapes::refuses;
use super::slab::{LAYOUTS, Layout, Slab};
use crate::{AttentionKind, Backend, KvCache, RopeTable};

/// Ragged, and the usual one.
const BLOCK_SIZES: [usize; 2] = [5, 16];

/// Heads, KV heads, and the sizes of a head's keys and values.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    heads: usize,
    kv_heads: usize,
    key: usize,
    value: usize,
}

const SIZES: [Sizes; 4] = [
    Sizes { heads: 1, kv_heads: 1, key: 2, value: 3 },
    Sizes { heads: 6, kv_heads: 2, key: 10, value: 12 },
    Sizes { heads: 5, kv_heads: 5, key: 6, value: 6 },
    Sizes { heads: 7, kv_heads: 1, key: 34, value: 20 },
];

/// Qwen2's and Llama 3's head, with a few of their heads; 7 share a KV head in Qwen2 7B.
const PUBLISHED: Sizes = Sizes { heads: 14, kv_heads: 2, key: 128, value: 128 };

fn has_gqa<B: Backend>(backend: &B) -> bool {
    backend.capabilities().attention.contains(&AttentionKind::Gqa)
}

/// Runs `check` for every activation type with every size and step, with published sizes, and with contexts long enough to be
/// split. The cache has an activation type of its own.
fn cases<B: Backend>(
    backend: &B,
    random: &mut Random,
    mut check: impl FnMut(&mut Random, Sizes, &[Turn], usize, [DType; 2]),
) {
    let turn = |cached, new| Turn { cached, new };
    let dtypes = backend.capabilities().activation_dtypes;
    for &dtype in &dtypes {
        for &cache_dtype in &dtypes {
            let dtypes = [dtype, cache_dtype];
            for sizes in SIZES {
                for turns in steps() {
                    check(random, sizes, &turns, BLOCK_SIZES[random.clone().below(2)], dtypes);
                }
            }
            check(random, PUBLISHED, &[turn(70, 1), turn(3, 40)], 64, dtypes);
            check(random, SIZES[1], &[turn(1100, 1), turn(600, 3), turn(0, 150)], 16, dtypes);
        }
    }
}

/// A cache that is poison wherever no token is.
struct KvSlab<B: Backend> {
    k: Slab<B>,
    v: Slab<B>,
    cache: KvCache<B>,
}

impl<B: Backend> KvSlab<B> {
    /// With random entries for the first `lens[s]` tokens of each sequence.
    fn new(
        backend: &B,
        random: &mut Random,
        tables: &Tables,
        sizes: Sizes,
        dtype: DType,
        lens: &[usize],
    ) -> Self {
        let mut slab = |dim: usize| {
            let width = sizes.kv_heads * dim;
            let mut values = vec![f64::NAN; tables.num_blocks * tables.block_size * width];
            for (seq, &len) in lens.iter().enumerate() {
                for position in 0..len {
                    let at = tables.slot(seq, position) * width;
                    values[at..at + width].copy_from_slice(&random.normals(width, 1.0));
                }
            }
            let shape = [tables.num_blocks, tables.block_size, sizes.kv_heads, dim];
            Slab::floats(backend, &shape, dtype, Layout::Dense, &values)
        };
        let (k, v) = (slab(sizes.key), slab(sizes.value));
        let cache = KvCache { k: k.view.clone(), v: v.view.clone() };
        Self { k, v, cache }
    }
}

/// What a KV head of a cache's tensor holds of a sequence's first `len` tokens, as it was put in.
fn entries<B: Backend>(
    slab: &Slab<B>,
    tables: &Tables,
    seq: usize,
    kv_head: usize,
    len: usize,
) -> Vec<Vec<f64>> {
    let (kv_heads, dim) = (slab.view.dim(2), slab.view.dim(3));
    let at = |p: usize| (tables.slot(seq, p) * kv_heads + kv_head) * dim;
    (0..len).map(|p| slab.host[at(p)..at(p) + dim].to_vec()).collect()
}

/// Turns some sequences of a step of several into padding: their rows have no slot, and they have no context and no blocks.
/// Gives which, and the inputs that took the place of the step's own.
fn pad<B: Backend>(
    backend: &B,
    random: &mut Random,
    tables: &Tables,
    step: &mut Step<B>,
) -> (Vec<bool>, Vec<Slab<B>>) {
    let several = step.turns.len() > 1;
    let padded: Vec<bool> = step.turns.iter().map(|_| several && random.below(4) == 0).collect();
    let max_blocks = step.batch.block_table.dim(1);
    let (mut slots, mut positions, mut lens, mut starts) = (Vec::new(), Vec::new(), Vec::new(), vec![0]);
    let mut table = Vec::new();
    for (seq, (turn, &padded)) in step.turns.iter().zip(&padded).enumerate() {
        for position in turn.cached..turn.cached + turn.new {
            slots.push(if padded { u32::MAX } else { tables.slot(seq, position) as u32 });
            positions.push(if padded { 0 } else { position as u32 });
        }
        let len = if padded { 0 } else { turn.cached + turn.new };
        lens.push(len as u32);
        starts.push(starts[seq] + len as u32);
        let used = len.div_ceil(tables.block_size);
        let block = |i: usize| (tables.slot(seq, i * tables.block_size) / tables.block_size) as u32;
        table.extend((0..max_blocks).map(|i| if i < used { block(i) } else { u32::MAX }));
    }
    let batch = &mut step.batch;
    let mut slabs = Vec::new();
    for (tensor, values) in [
        (&mut batch.slots, slots),
        (&mut batch.positions, positions),
        (&mut batch.context_len, lens),
        (&mut batch.context_start, starts),
        (&mut batch.block_table, table),
    ] {
        let slab = Slab::ids(backend, tensor.shape(), &values);
        *tensor = slab.view.clone();
        slabs.push(slab);
    }
    (padded, slabs)
}

/// Random `[T, width]`, poison for the sequences that `has` not.
fn rows_of<B: Backend>(
    random: &mut Random,
    step: &Step<B>,
    width: usize,
    has: impl Fn(usize) -> bool,
) -> Vec<f64> {
    let mut values = vec![f64::NAN; step.batch.num_tokens * width];
    for (seq, rows) in step.rows.iter().enumerate() {
        if has(seq) {
            values[rows.start * width..rows.end * width]
                .copy_from_slice(&random.normals(rows.len() * width, 1.0));
        }
    }
    values
}

/// Rotates one head by `cos_sin`: half cosines, half sines; pairs are (i, i + Dh / 2).
fn rotate(head: &[f64], cos_sin: &[f64]) -> Vec<f64> {
    let half = head.len() / 2;
    let (cos, sin) = cos_sin.split_at(half);
    let low = (0..half).map(|i| head[i] * cos[i] - head[i + half] * sin[i]);
    low.chain((0..half).map(|i| head[i + half] * cos[i] + head[i] * sin[i])).collect()
}

/// [`Backend::rope_cache_gqa`]: queries in place inside wider rows, keys and values at their slots, and nothing else touched,
/// by padding neither.
pub fn rope_cache_gqa<B: Backend>(backend: &B) {
    if !has_gqa(backend) {
        return;
    }
    seeded("rope_cache_gqa", |random| {
        cases(backend, random, |random, sizes, turns, block_size, dtypes| {
            check_rope_cache(backend, random, sizes, turns, block_size, dtypes);
        });
    });
}

fn check_rope_cache<B: Backend>(
    backend: &B,
    random: &mut Random,
    sizes: Sizes,
    turns: &[Turn],
    block_size: usize,
    [dtype, cache_dtype]: [DType; 2],
) {
    let Sizes { heads, kv_heads, key, value } = sizes;
    let tables = Tables::new(random, block_size, turns.iter().map(|turn| turn.cached + turn.new));
    let mut step = Step::new(backend, &tables, turns);
    let (padded, inputs) = pad(backend, random, &tables, &mut step);
    let cached: Vec<usize> = turns.iter().map(|turn| turn.cached).collect();
    let cache = KvSlab::new(backend, random, &tables, sizes, cache_dtype, &cached);
    let (rope, angles) = rope_table(backend, key);
    let tokens = step.batch.num_tokens;
    let mut slab = |heads: usize, dim: usize| {
        let values = rows_of(random, &step, heads * dim, |seq| !padded[seq]);
        let layout = LAYOUTS[random.below(2)];
        Slab::floats(backend, &[tokens, heads, dim], dtype, layout, &values)
    };
    let (q, k, v) = (slab(heads, key), slab(kv_heads, key), slab(kv_heads, value));

    backend.rope_cache_gqa(&q.view, &k.view, &v.view, &rope, &step.batch, &cache.cache);
    settle(backend, "rope_cache_gqa");

    let what = format!("rope_cache_gqa {sizes:?} {turns:?} padding {padded:?} {dtype} into {cache_dtype}");
    let (found_q, mut got, mut want) = (q.read(backend), Vec::new(), Vec::new());
    let mut written = [cache.k.host.clone(), cache.v.host.clone()];
    for (seq, turn) in turns.iter().enumerate().filter(|(seq, _)| !padded[*seq]) {
        for (row, position) in step.rows[seq].clone().zip(turn.cached..) {
            let angles = &angles[position * key..][..key];
            got.extend_from_slice(&found_q[row * heads * key..][..heads * key]);
            want.extend(
                q.host[row * heads * key..][..heads * key].chunks(key).flat_map(|q| rotate(q, angles)),
            );
            let slot = tables.slot(seq, position);
            let keys = k.host[row * kv_heads * key..][..kv_heads * key].chunks(key);
            let keys: Vec<f64> = keys.flat_map(|k| rotate(k, angles)).collect();
            written[0][slot * kv_heads * key..][..keys.len()].copy_from_slice(&keys);
            let values = &v.host[row * kv_heads * value..][..kv_heads * value];
            written[1][slot * kv_heads * value..][..values.len()].copy_from_slice(values);
        }
    }
    assert_close(&what, &got, &want, Tolerance::rounded_once(dtype));
    for (slab, want) in [&cache.k, &cache.v].into_iter().zip(&written) {
        let found = slab.read(backend);
        let untouched = found.iter().zip(want).all(|(now, want)| !want.is_nan() || now.is_nan());
        assert!(untouched, "{what}: wrote past its slots");
        let there = |values: &[f64]| -> Vec<f64> {
            values.iter().zip(want).filter(|(_, want)| !want.is_nan()).map(|(value, _)| *value).collect()
        };
        assert_close(&what, &there(&found), &there(want), Tolerance::rounded_once(cache_dtype));
    }
    [&k, &v].into_iter().chain(&inputs).for_each(|input| input.assert_unchanged(backend));
    step.assert_unchanged(backend);
}

/// [`Backend::gqa_attention`]: mixed batches, ranges of sequences, padding, poison behind every context.
pub fn gqa_attention<B: Backend>(backend: &B) {
    if !has_gqa(backend) {
        return;
    }
    seeded("gqa_attention", |random| {
        cases(backend, random, |random, sizes, turns, block_size, [dtype, cache_dtype]| {
            let lens: Vec<usize> = turns.iter().map(|turn| turn.cached + turn.new).collect();
            let tables = Tables::new(random, block_size, lens.iter().copied());
            let mut step = Step::new(backend, &tables, turns);
            let (padded, inputs) = pad(backend, random, &tables, &mut step);
            let cache = KvSlab::new(backend, random, &tables, sizes, cache_dtype, &lens);
            for seqs in step.ranges() {
                check_attention(backend, random, sizes, dtype, &tables, &step, &padded, &cache, seqs);
            }
            [&cache.k, &cache.v].into_iter().chain(&inputs).for_each(|input| input.assert_unchanged(backend));
            step.assert_unchanged(backend);
        });
    });
}

fn check_attention<B: Backend>(
    backend: &B,
    random: &mut Random,
    sizes: Sizes,
    dtype: DType,
    tables: &Tables,
    step: &Step<B>,
    padded: &[bool],
    cache: &KvSlab<B>,
    seqs: Range<usize>,
) {
    let Sizes { heads, kv_heads, key, value } = sizes;
    let tokens = step.batch.num_tokens;
    let q = rows_of(random, step, heads * key, |seq| seqs.contains(&seq) && !padded[seq]);
    let q = Slab::floats(backend, &[tokens, heads, key], dtype, LAYOUTS[random.below(2)], &q);
    let out = Slab::poison(backend, &[tokens, heads, value], dtype, LAYOUTS[random.below(2)]);
    let scale = random.uniform(0.1, 0.4) as f32;
    backend.gqa_attention(&q.view, &cache.cache, &step.batch, seqs.clone(), scale, &out.view);
    settle(backend, "gqa_attention");

    let what = format!("gqa_attention {sizes:?} {:?} padding {padded:?} seqs {seqs:?} {dtype}", step.turns);
    let found = out.read(backend);
    let mut want = vec![None; tokens];
    for seq in seqs {
        for (row, position) in step.rows[seq].clone().zip(step.turns[seq].cached..) {
            if padded[seq] {
                let zeros = vec![0.0; heads * value];
                assert_eq!(found[row * zeros.len()..][..zeros.len()], zeros, "{what}: padding row {row}");
                want[row] = Some(zeros);
                continue;
            }
            let by_kv_head = (0..kv_heads).flat_map(|kv_head| {
                let keys = entries(&cache.k, tables, seq, kv_head, position + 1);
                let values = entries(&cache.v, tables, seq, kv_head, position + 1);
                let sharing = kv_head * (heads / kv_heads)..(kv_head + 1) * (heads / kv_heads);
                let attend = |head: usize| {
                    naive::attend(&q.host[(row * heads + head) * key..][..key], &keys, &values, scale)
                };
                sharing.flat_map(attend).collect::<Vec<f64>>()
            });
            want[row] = Some(by_kv_head.collect());
        }
    }
    assert_rows(&what, backend, &out, &want, Tolerance::rounded_between(dtype));
    q.assert_unchanged(backend);
}

/// Sequences that are prefilled together up to their last token and decode that together give what each gives alone and at
/// once; bit for bit where the backend says that it ignores the batch.
pub fn gqa_batch_equals_alone<B: Backend>(backend: &B) {
    if !has_gqa(backend) {
        return;
    }
    let lens = [41, 2, 70, 17];
    seeded("gqa_batch_equals_alone", |random| {
        for sizes in [SIZES[1], SIZES[3]] {
            for dtype in backend.capabilities().activation_dtypes {
                let tables = Tables::new(random, 16, lens.iter().copied());
                let layer = Layer::new(backend, random, sizes, dtype, &lens);
                let mut alone = Vec::new();
                let cache = KvSlab::new(backend, random, &tables, sizes, dtype, &[]).cache;
                for (seq, &new) in lens.iter().enumerate() {
                    let step = Step::of(backend, &tables, &[Turn { cached: 0, new }], vec![seq]);
                    alone.extend(layer.run(backend, &step, &cache));
                }
                let cache = KvSlab::new(backend, random, &tables, sizes, dtype, &[]).cache;
                let prefill = lens.map(|len| Turn { cached: 0, new: len - 1 });
                let decode = lens.map(|len| Turn { cached: len - 1, new: 1 });
                let mut batch = layer.run(backend, &Step::new(backend, &tables, &prefill), &cache);
                let last = layer.run(backend, &Step::new(backend, &tables, &decode), &cache);
                batch.iter_mut().zip(last).for_each(|(rows, last)| rows.extend(last));
                let what = format!("gqa_attention of a batch and of its sequences alone {sizes:?} {dtype}");
                if backend.capabilities().batch_invariant {
                    assert_eq!(batch, alone, "{what}");
                } else {
                    assert_close(&what, &batch.concat(), &alone.concat(), Tolerance::rounded_between(dtype));
                }
            }
        }
    });
}

/// Every token's inputs of some sequences, `[len, heads * dim]` each.
struct Layer<B: Backend> {
    sizes: Sizes,
    dtype: DType,
    rope: RopeTable<B>,
    q: Vec<Vec<f64>>,
    k: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
}

impl<B: Backend> Layer<B> {
    fn new(backend: &B, random: &mut Random, sizes: Sizes, dtype: DType, lens: &[usize]) -> Self {
        let mut rows = |width: usize| lens.iter().map(|len| random.normals(len * width, 1.0)).collect();
        Self {
            sizes,
            dtype,
            rope: rope_table(backend, sizes.key).0,
            q: rows(sizes.heads * sizes.key),
            k: rows(sizes.kv_heads * sizes.key),
            v: rows(sizes.kv_heads * sizes.value),
        }
    }

    /// Runs one step through cache and attention; gives each turn's output rows.
    fn run(&self, backend: &B, step: &Step<B>, cache: &KvCache<B>) -> Vec<Vec<f64>> {
        let Sizes { heads, kv_heads, key, value } = self.sizes;
        let tokens = step.batch.num_tokens;
        let floats = |heads: usize, dim: usize, of: &[Vec<f64>]| {
            let turn = |(turn, seq): (&Turn, &usize)| {
                of[*seq][turn.cached * heads * dim..(turn.cached + turn.new) * heads * dim].to_vec()
            };
            let values: Vec<f64> = step.turns.iter().zip(&step.seqs).flat_map(turn).collect();
            Slab::floats(backend, &[tokens, heads, dim], self.dtype, Layout::Dense, &values)
        };
        let (q, k, v) =
            (floats(heads, key, &self.q), floats(kv_heads, key, &self.k), floats(kv_heads, value, &self.v));
        let out = Slab::poison(backend, &[tokens, heads, value], self.dtype, Layout::Dense);
        backend.rope_cache_gqa(&q.view, &k.view, &v.view, &self.rope, &step.batch, cache);
        backend.gqa_attention(&q.view, cache, &step.batch, 0..step.turns.len(), 0.2, &out.view);
        settle(backend, "gqa_attention");
        let (out, width) = (out.read(backend), heads * value);
        step.rows.iter().map(|rows| out[rows.start * width..rows.end * width].to_vec()).collect()
    }
}

/// Both operations refuse wrong shapes; a backend without them refuses them altogether.
pub(super) fn shape_panics<B: Backend>(backend: &B, random: &mut Random) {
    let f = |shape: &[usize]| backend.alloc(shape, DType::F32).expect("alloc");
    let (sizes, tokens) = (SIZES[1], 3);
    let Sizes { heads, kv_heads, key, value } = sizes;
    let tables = Tables::new(random, 4, [tokens].into_iter());
    let step = Step::new(backend, &tables, &[Turn { cached: 0, new: tokens }]);
    let cache = KvSlab::new(backend, random, &tables, sizes, DType::F32, &[tokens]).cache;
    let (rope, _) = rope_table(backend, key);
    let (q, k, v) = (f(&[tokens, heads, key]), f(&[tokens, kv_heads, key]), f(&[tokens, kv_heads, value]));
    let out = f(&[tokens, heads, value]);
    if !has_gqa(backend) {
        refuses("rope_cache_gqa: ", || backend.rope_cache_gqa(&q, &k, &v, &rope, &step.batch, &cache));
        refuses("gqa_attention: ", || backend.gqa_attention(&q, &cache, &step.batch, 0..1, 1.0, &out));
        return;
    }
    refuses("rope_cache_gqa: q has 5 heads", || {
        backend.rope_cache_gqa(&f(&[tokens, 5, key]), &k, &v, &rope, &step.batch, &cache);
    });
    refuses("rope_cache_gqa: k", || {
        backend.rope_cache_gqa(&q, &f(&[tokens, heads, key]), &v, &rope, &step.batch, &cache);
    });
    refuses("rope_cache_gqa: rope.cos_sin", || {
        let rope = RopeTable { cos_sin: f(&[9, key / 2]) };
        backend.rope_cache_gqa(&q, &k, &v, &rope, &step.batch, &cache);
    });
    refuses("gqa_attention: out", || backend.gqa_attention(&q, &cache, &step.batch, 0..1, 1.0, &q));
    refuses("gqa_attention: sequences", || {
        backend.gqa_attention(&q, &cache, &step.batch, 0..2, 1.0, &out);
    });
    refuses("gqa_attention: cache.k", || {
        let wide = f(&[tables.num_blocks, 4, kv_heads, key + 1]);
        let cache = KvCache { k: wide.narrow(3, 0..key), v: cache.v.clone() };
        backend.gqa_attention(&q, &cache, &step.batch, 0..1, 1.0, &out);
    });
}
