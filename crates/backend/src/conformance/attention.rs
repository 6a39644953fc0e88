//! Checks of RoPE, the latent cache, and both forms of MLA.

use r1_core::DType;

use super::paged::{CacheSlab, PUBLISHED, RAGGED_GROUPS, SIZES, Sizes, Step, Tables, Turn, steps};
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close, e4m3_spacing};
use super::slab::{LAYOUTS, Layout, Slab, imported};
use super::{naive, settle};
use crate::{Backend, RopeTable};

const EPS: f32 = 1e-6;
const MAX_POSITIONS: usize = 2048;
/// Ragged, and the usual one.
const BLOCK_SIZES: [usize; 2] = [5, 16];

fn context_lens(turns: &[Turn]) -> Vec<usize> {
    turns.iter().map(|turn| turn.cached + turn.new).collect()
}

/// Runs `check` for every activation type with every size, step and block size, with the published models' sizes, and with
/// contexts long enough to be split.
fn cases<B: Backend>(backend: &B, mut check: impl FnMut(Sizes, &[Turn], usize, DType)) {
    let turn = |cached, new| Turn { cached, new };
    for dtype in backend.capabilities().activation_dtypes {
        for sizes in SIZES {
            for turns in steps() {
                for block_size in BLOCK_SIZES {
                    check(sizes, &turns, block_size, dtype);
                }
            }
        }
        check(PUBLISHED, &[turn(70, 1), turn(3, 40)], 64, dtype);
        check(SIZES[1], &[turn(1100, 1), turn(600, 3), turn(0, 150)], 16, dtype);
    }
}

/// Element types of caches to try beside activations of `dtype`: the same, and the FP8 form where the backend has it.
pub(super) fn cache_dtypes<B: Backend>(backend: &B, dtype: DType) -> Vec<DType> {
    let fp8 = backend.capabilities().cache_dtypes.contains(&DType::F8E4M3);
    [dtype].into_iter().chain(fp8.then_some(DType::F8E4M3)).collect()
}

/// As [`cases`], with the element types of activations and cache, and groups of FP8 scales that end inside an entry.
fn cached_cases<B: Backend>(backend: &B, mut check: impl FnMut(Sizes, &[Turn], usize, [DType; 2])) {
    cases(backend, |sizes, turns, block_size, dtype| {
        for cache_dtype in cache_dtypes(backend, dtype) {
            check(sizes, turns, block_size, [dtype, cache_dtype]);
        }
    });
    for dtype in backend.capabilities().activation_dtypes {
        for &cache_dtype in &cache_dtypes(backend, dtype)[1..] {
            for (turns, block_size) in steps().iter().zip(BLOCK_SIZES.into_iter().cycle()) {
                check(RAGGED_GROUPS, turns, block_size, [dtype, cache_dtype]);
            }
        }
    }
}

/// Cosines and sines of every position, scaled as YaRN may scale them.
pub(super) fn rope_table<B: Backend>(backend: &B, rope_dim: usize) -> (RopeTable<B>, Vec<f64>) {
    let pairs = rope_dim / 2;
    let angle = |position: usize, pair: usize| position as f64 / 50f64.powf(pair as f64 / pairs as f64);
    let values: Vec<f64> = (0..MAX_POSITIONS)
        .flat_map(|position| {
            let cos = (0..pairs).map(move |pair| 1.25 * angle(position, pair).cos());
            cos.chain((0..pairs).map(move |pair| 1.25 * angle(position, pair).sin()))
        })
        .collect();
    let table = Slab::floats(backend, &[MAX_POSITIONS, rope_dim], DType::F32, Layout::Dense, &values);
    (RopeTable { cos_sin: table.view }, table.host)
}

/// [`Backend::rope_cache`]: queries in place inside wider rows, entries at their slots, and nothing else touched. The
/// cache may be wider than the activations.
pub fn rope_cache<B: Backend>(backend: &B) {
    seeded("rope_cache", |random| {
        cached_cases(backend, |sizes, turns, block_size, [dtype, mut cache_dtype]| {
            if cache_dtype == dtype {
                let mut dense = backend.capabilities().cache_dtypes;
                dense.retain(|dtype| *dtype != DType::F8E4M3);
                cache_dtype = dense[random.below(dense.len())];
            }
            check_rope_cache(backend, random, sizes, turns, block_size, [dtype, cache_dtype]);
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
    let tables = Tables::new(random, block_size, context_lens(turns).into_iter());
    let step = Step::new(backend, &tables, turns);
    let cached: Vec<usize> = turns.iter().map(|turn| turn.cached).collect();
    let cache = CacheSlab::new(backend, random, &tables, sizes, cache_dtype, &cached);
    let (rope, angles) = rope_table(backend, sizes.rope);
    let (norm, norm_values) = imported(backend, random, &[sizes.latent], dtype, 1.0);
    let tokens = step.batch.num_tokens;
    let q_rope = Slab::normal(backend, random, &[tokens, sizes.heads, sizes.rope], dtype, Layout::Gaps, 1.0);
    let layout = LAYOUTS[random.below(2)];
    let mut values = random.normals(tokens * sizes.entry(), 1.0);
    // A latent of zeros has a scale, too.
    values[..sizes.latent].fill(0.0);
    let kv_a = Slab::floats(backend, &[tokens, sizes.entry()], dtype, layout, &values);

    backend.rope_cache(&q_rope.view, &kv_a.view, &norm, EPS, &rope, &step.batch, &cache.cache);
    settle(backend, "rope_cache");

    let what = format!("rope_cache {sizes:?} {turns:?} {dtype} into {cache_dtype}");
    let found = cache.read(backend);
    let mut unchanged = vec![true; tables.num_blocks * block_size];
    let (mut written, mut entries) = (Vec::new(), Vec::new());
    let mut rotated = Vec::new();
    for (turn, (seq, rows)) in turns.iter().zip(step.rows.iter().enumerate()) {
        for (row, position) in rows.clone().zip(turn.cached..) {
            let angles = &angles[position * sizes.rope..][..sizes.rope];
            for head in 0..sizes.heads {
                let at = (row * sizes.heads + head) * sizes.rope;
                rotated.extend(naive::rotate(&q_rope.host[at..at + sizes.rope], angles));
            }
            let kv_a = &kv_a.host[row * sizes.entry()..][..sizes.entry()];
            let mut entry = naive::rms_norm(&kv_a[..sizes.latent], &norm_values, EPS);
            entry.extend(naive::rotate(&kv_a[sizes.latent..], angles));
            let slot = tables.slot(seq, position);
            unchanged[slot] = false;
            match found(slot).as_slice() {
                [codes, scales, rope] => {
                    assert_fp8_latent(&what, codes, scales, &entry[..sizes.latent]);
                    written.extend_from_slice(rope);
                    entries.extend_from_slice(&entry[sizes.latent..]);
                }
                whole => {
                    written.extend_from_slice(&whole[0]);
                    entries.extend_from_slice(&entry);
                }
            }
        }
    }
    assert_close(&what, &q_rope.read(backend), &rotated, Tolerance::rounded_once(dtype));
    let kept = if cache_dtype == DType::F8E4M3 { DType::BF16 } else { cache_dtype };
    assert_close(&what, &written, &entries, Tolerance::rounded_once(kept));
    for slot in (0..unchanged.len()).filter(|slot| unchanged[*slot]) {
        cache.assert_slot_unchanged(&what, slot, &found(slot));
    }
    kv_a.assert_unchanged(backend);
    step.assert_unchanged(backend);
}

/// Checks that codes and scales are those of normed values that were computed in F32.
#[track_caller]
fn assert_fp8_latent(what: &str, codes: &[f64], scales: &[f64], want: &[f64]) {
    // What the norm may be off by.
    const RELATIVE: f64 = 1e-5;
    let want_scales = naive::fp8_scales(want, want.len(), false);
    assert_close(what, scales, &want_scales, Tolerance { relative: RELATIVE, of_rms: 0.0 });
    for (i, (code, value)) in codes.iter().zip(want).enumerate() {
        let exact = (value / scales[i / 128]).clamp(-448.0, 448.0);
        let allowed = e4m3_spacing(exact) * 0.5 + exact.abs() * RELATIVE;
        assert!((code - exact).abs() <= allowed, "{what}: channel {i} is {code}, expected {exact}");
    }
}

/// Random rows for the sequences `seqs`, poison for all others.
fn queries<B: Backend>(
    backend: &B,
    random: &mut Random,
    step: &Step<B>,
    seqs: &std::ops::Range<usize>,
    shape: &[usize],
    dtype: DType,
) -> Slab<B> {
    let width: usize = shape[1..].iter().product();
    let mut values = vec![f64::NAN; shape[0] * width];
    for seq in seqs.clone() {
        let rows = &step.rows[seq];
        values[rows.start * width..rows.end * width]
            .copy_from_slice(&random.normals(rows.len() * width, 1.0));
    }
    Slab::floats(backend, shape, dtype, Layout::Gaps, &values)
}

/// Compares the rows of `seqs`; all others must still be poison.
#[track_caller]
pub(super) fn assert_rows<B: Backend>(
    what: &str,
    backend: &B,
    out: &Slab<B>,
    want: &[Option<Vec<f64>>],
    tolerance: Tolerance,
) {
    let width = out.view.num_elements() / out.view.dim(0);
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for (row, (now, want)) in out.read(backend).chunks(width).zip(want).enumerate() {
        match want {
            // Padding: its zeros are exact, and say nothing about how large the other rows' errors may be.
            Some(want) if want.iter().all(|v| *v == 0.0) => assert_eq!(now, want, "{what}: row {row}"),
            Some(want) => {
                found.extend_from_slice(now);
                expected.extend_from_slice(want);
            }
            None => assert!(now.iter().all(|v| v.is_nan()), "{what}: wrote row {row} of another sequence"),
        }
    }
    assert_close(what, &found, &expected, tolerance);
}

/// [`Backend::mla_attention`]: mixed batches, ranges of sequences, poison behind every context.
pub fn mla_attention<B: Backend>(backend: &B) {
    seeded("mla_attention", |random| {
        cached_cases(backend, |sizes, turns, block_size, [dtype, cache_dtype]| {
            let tables = Tables::new(random, block_size, context_lens(turns).into_iter());
            let step = Step::new(backend, &tables, turns);
            let cache = CacheSlab::new(backend, random, &tables, sizes, cache_dtype, &context_lens(turns));
            for seqs in step.ranges() {
                check_mla_attention(backend, random, sizes, dtype, &tables, &step, &cache, seqs);
            }
            cache.assert_unchanged(backend);
            step.assert_unchanged(backend);
        });
    });
}

fn check_mla_attention<B: Backend>(
    backend: &B,
    random: &mut Random,
    sizes: Sizes,
    dtype: DType,
    tables: &Tables,
    step: &Step<B>,
    cache: &CacheSlab<B>,
    seqs: std::ops::Range<usize>,
) {
    let tokens = step.batch.num_tokens;
    let Sizes { heads, latent, rope, .. } = sizes;
    let q_latent = queries(backend, random, step, &seqs, &[tokens, heads, latent], dtype);
    let q_rope = queries(backend, random, step, &seqs, &[tokens, heads, rope], dtype);
    let out = Slab::poison(backend, &[tokens, heads, latent], dtype, LAYOUTS[random.below(2)]);
    let scale = random.uniform(0.1, 0.4) as f32;
    backend.mla_attention(
        &q_latent.view,
        &q_rope.view,
        &cache.cache,
        &step.batch,
        seqs.clone(),
        scale,
        &out.view,
    );
    settle(backend, "mla_attention");

    let mut want = vec![None; tokens];
    for seq in seqs.clone() {
        for (row, position) in step.rows[seq].clone().zip(step.turns[seq].cached..) {
            let keys = cache.entries(tables, step.seqs[seq], position + 1);
            let values: Vec<Vec<f64>> = keys.iter().map(|entry| entry[..latent].to_vec()).collect();
            let by_head = (0..heads).flat_map(|head| {
                let at = row * heads + head;
                let mut q = q_latent.host[at * latent..][..latent].to_vec();
                q.extend_from_slice(&q_rope.host[at * rope..][..rope]);
                naive::attend(&q, &keys, &values, scale)
            });
            want[row] = Some(by_head.collect());
        }
    }
    let held = cache.cache.data.dtype();
    let what = format!("mla_attention {sizes:?} {:?} seqs {seqs:?} {dtype} over {held}", step.turns);
    assert_rows(&what, backend, &out, &want, Tolerance::rounded_between(dtype));
}

/// [`Backend::gather_latent`]: bit for bit what a dense cache holds, and rounded once what an FP8 one stands for.
pub fn gather_latent<B: Backend>(backend: &B) {
    seeded("gather_latent", |random| {
        cached_cases(backend, |sizes, turns, block_size, [dtype, cache_dtype]| {
            let tables = Tables::new(random, block_size, context_lens(turns).into_iter());
            let step = Step::new(backend, &tables, turns);
            let cache = CacheSlab::new(backend, random, &tables, sizes, cache_dtype, &context_lens(turns));
            for seqs in step.ranges() {
                let want: Vec<f64> = seqs
                    .clone()
                    .flat_map(|seq| cache.entries(&tables, seq, context_lens(turns)[seq]))
                    .flatten()
                    .collect();
                // Room for more rows than there are, as a buffer sized at start has.
                let rows = want.len() / sizes.entry();
                let out = Slab::poison(backend, &[rows + 2, sizes.entry()], dtype, LAYOUTS[random.below(2)]);
                backend.gather_latent(&cache.cache, &step.batch, seqs, &out.view);
                settle(backend, "gather_latent");
                let found = out.read(backend);
                let what = format!("gather_latent {sizes:?} {turns:?} {dtype} from {cache_dtype}");
                if cache_dtype == dtype {
                    assert_eq!(found[..want.len()], want, "{what}");
                } else {
                    assert_close(&what, &found[..want.len()], &want, Tolerance::rounded_once(dtype));
                }
                assert!(
                    found[want.len()..].iter().all(|v| v.is_nan()),
                    "gather_latent wrote past the contexts"
                );
            }
        });
    });
}

/// [`Backend::mla_attention_expanded`]: as [`mla_attention`].
pub fn mla_attention_expanded<B: Backend>(backend: &B) {
    seeded("mla_attention_expanded", |random| {
        cases(backend, |sizes, turns, block_size, dtype| {
            let tables = Tables::new(random, block_size, context_lens(turns).into_iter());
            let step = Step::new(backend, &tables, turns);
            for seqs in step.ranges() {
                check_expanded(backend, random, sizes, dtype, &step, seqs);
            }
        });
    });
}

fn check_expanded<B: Backend>(
    backend: &B,
    random: &mut Random,
    sizes: Sizes,
    dtype: DType,
    step: &Step<B>,
    seqs: std::ops::Range<usize>,
) {
    let Sizes { heads, rope, nope, value, .. } = sizes;
    let tokens = step.batch.num_tokens;
    let contexts = context_lens(&step.turns);
    let gathered: usize = contexts[seqs.clone()].iter().sum();
    let q = queries(backend, random, step, &seqs, &[tokens, heads, nope + rope], dtype);
    let kv_shape = [gathered, heads, nope + value];
    let layout = LAYOUTS[random.below(2)];
    let kv = Slab::normal(backend, random, &kv_shape, dtype, layout, 1.0);
    let k_rope = Slab::normal(backend, random, &[gathered, rope], dtype, Layout::Gaps, 1.0);
    let out = Slab::poison(backend, &[tokens, heads, value], dtype, LAYOUTS[random.below(2)]);
    let scale = random.uniform(0.1, 0.4) as f32;
    backend.mla_attention_expanded(
        &q.view,
        &kv.view,
        &k_rope.view,
        &step.batch,
        seqs.clone(),
        scale,
        &out.view,
    );
    settle(backend, "mla_attention_expanded");

    let mut want = vec![None; tokens];
    let mut first = 0;
    for seq in seqs.clone() {
        for (row, position) in step.rows[seq].clone().zip(step.turns[seq].cached..) {
            let by_head = (0..heads).flat_map(|head| {
                let kv_row =
                    |p: usize| &kv.host[((first + p) * heads + head) * (nope + value)..][..nope + value];
                let key =
                    |p: usize| [&kv_row(p)[..nope], &k_rope.host[(first + p) * rope..][..rope]].concat();
                let keys: Vec<Vec<f64>> = (0..=position).map(key).collect();
                let values: Vec<Vec<f64>> = (0..=position).map(|p| kv_row(p)[nope..].to_vec()).collect();
                let q = &q.host[(row * heads + head) * (nope + rope)..][..nope + rope];
                naive::attend(q, &keys, &values, scale)
            });
            want[row] = Some(by_head.collect());
        }
        first += contexts[seq];
    }
    let what = format!("mla_attention_expanded {sizes:?} {:?} seqs {seqs:?} {dtype}", step.turns);
    assert_rows(&what, backend, &out, &want, Tolerance::rounded_between(dtype));
}

/// [`Backend::mla_attention`] of scores that are far apart: the softmax must subtract its maximum.
pub fn mla_attention_range<B: Backend>(backend: &B) {
    seeded("mla_attention_range", |random| {
        let sizes = SIZES[1];
        let turns = [Turn { cached: 40, new: 1 }, Turn { cached: 0, new: 20 }];
        let tables = Tables::new(random, 16, context_lens(&turns).into_iter());
        let step = Step::new(backend, &tables, &turns);
        let cache = CacheSlab::new(backend, random, &tables, sizes, DType::F32, &context_lens(&turns));
        let tokens = step.batch.num_tokens;
        let shape = |width| [tokens, sizes.heads, width];
        let dtype = DType::F32;
        let q_latent = Slab::normal(backend, random, &shape(sizes.latent), dtype, Layout::Dense, 100.0);
        let q_rope = Slab::normal(backend, random, &shape(sizes.rope), dtype, Layout::Gaps, 100.0);
        let out = Slab::poison(backend, &shape(sizes.latent), dtype, Layout::Dense);
        backend.mla_attention(
            &q_latent.view,
            &q_rope.view,
            &cache.cache,
            &step.batch,
            0..turns.len(),
            1.0,
            &out.view,
        );
        settle(backend, "mla_attention");
        // Every output lies between the least and the largest of its values.
        let largest = cache.host.iter().filter(|v| !v.is_nan()).fold(0.0, |max: f64, v| max.max(v.abs()));
        for value in out.read(backend) {
            assert!(
                value.abs() <= largest * 1.0001,
                "mla_attention: {value} is no mean of values up to {largest}"
            );
        }
    });
}
