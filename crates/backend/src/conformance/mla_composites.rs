//! Checks that a backend's composites around absorbed attention give what their default bodies give.

use r1_core::DType;

use super::attention::rope_table;
use super::dense::fp8_forms;
use super::paged::{CacheSlab, SIZES, Sizes, Step, Tables, Turn, steps};
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close};
use super::settle;
use super::slab::{ActivationSlab, Format, Layout, Slab, imported, weight};
use crate::{Backend, HeadForm, HeadWeight, composite};

const EPS: f32 = 1e-6;
const SCALE: f32 = 0.2;
const BLOCK_SIZE: usize = 16;

/// Runs `check` for all sizes, steps (one of them padded), activation types and formats of `kv_b`.
fn cases<B: Backend>(
    backend: &B,
    check_name: &'static str,
    mut check: impl FnMut(&mut Random, Sizes, DType, Format, &Tables, &Step<B>),
) {
    seeded(check_name, |random| {
        for sizes in SIZES {
            for dtype in backend.capabilities().activation_dtypes {
                for format in [Format::Dense(dtype), Format::Fp8([0, 0])] {
                    for turns in steps() {
                        // Only steps that decode and nothing else are padded.
                        let padding = if turns.iter().all(|turn| turn.new == 1) { 2 } else { 0 };
                        let lens = turns.iter().map(|turn: &Turn| turn.cached + turn.new);
                        let tables = Tables::new(random, BLOCK_SIZE, lens);
                        let step = Step::padded(backend, &tables, &turns, padding);
                        check(random, sizes, dtype, format, &tables, &step);
                    }
                }
            }
        }
    });
}

/// W_uk or W_uv of a `kv_b`.
fn half<B: Backend>(
    backend: &B,
    random: &mut Random,
    sizes: Sizes,
    format: Format,
    form: HeadForm,
) -> HeadWeight<B> {
    let Sizes { heads, latent, nope, value, .. } = sizes;
    let (weight, _) = weight(backend, random, [heads * (nope + value), latent], format);
    let rows = if form == HeadForm::RowsIn { 0..nope } else { nope..nope + value };
    HeadWeight { weight, rows_per_head: nope + value, rows, form }
}

/// [`Backend::mla_absorb`], for all rows, for those that decode, and for none.
pub fn mla_absorb<B: Backend>(backend: &B) {
    cases(backend, "mla_absorb", |random, sizes, dtype, format, tables, step| {
        let Sizes { heads, latent, rope: rope_dim, nope, .. } = sizes;
        let w_uk = half(backend, random, sizes, format, HeadForm::RowsIn);
        let (norm, _) = imported(backend, random, &[latent], dtype, 1.0);
        let (rope, _) = rope_table(backend, rope_dim);
        let cached: Vec<usize> = step.turns.iter().map(|turn| turn.cached).collect();
        let tokens = step.batch.num_tokens;
        let kv_a = Slab::normal(backend, random, &[tokens, sizes.entry()], dtype, Layout::Gaps, 1.0);
        let q = random.normals(tokens * heads * (nope + rope_dim), 1.0);
        for rows in [tokens, step.batch.num_decodes, 0] {
            let seed = random.split();
            let run = |default: bool| {
                let mut random = seed.clone();
                let cache = CacheSlab::new(backend, &mut random, tables, sizes, dtype, &cached);
                let q = Slab::floats(backend, &[tokens, heads, nope + rope_dim], dtype, Layout::Gaps, &q);
                let q_latent = Slab::poison(backend, &[tokens, heads, latent], dtype, Layout::Dense);
                let (q_view, kv_a, first) = (&q.view, &kv_a.view, q_latent.view.rows(0..rows));
                let (batch, cached) = (&step.batch, &cache.cache);
                if default {
                    composite::mla_absorb(
                        backend, q_view, kv_a, &norm, EPS, &rope, batch, cached, &w_uk, &first,
                    );
                } else {
                    backend.mla_absorb(q_view, kv_a, &norm, EPS, &rope, batch, cached, &w_uk, &first);
                }
                settle(backend, "mla_absorb");
                let q_latent = q_latent.read(backend);
                let (first, rest) = q_latent.split_at(rows * heads * latent);
                assert!(rest.iter().all(|value| value.is_nan()), "mla_absorb wrote past its {rows} rows");
                let entries = cache.contents(backend);
                let poison: Vec<bool> = entries.iter().map(|value| value.is_nan()).collect();
                let entries = entries.into_iter().filter(|value| !value.is_nan()).collect::<Vec<_>>();
                (q.read(backend), first.to_vec(), entries, poison)
            };
            let (own, default) = (run(false), run(true));
            assert_close("mla_absorb: q", &own.0, &default.0, Tolerance::rounded_once(dtype));
            assert_close("mla_absorb: q_latent", &own.1, &default.1, Tolerance::rounded_between(dtype));
            assert_eq!(own.3, default.3, "mla_absorb: slots that were written");
            assert_close("mla_absorb: cache", &own.2, &default.2, Tolerance::rounded_once(dtype));
        }
        step.assert_unchanged(backend);
    });
}

/// [`Backend::mla_attend`], of all sequences and of those that decode.
pub fn mla_attend<B: Backend>(backend: &B) {
    cases(backend, "mla_attend", |random, sizes, dtype, format, tables, step| {
        let Sizes { heads, latent, rope: rope_dim, value, .. } = sizes;
        let w_uv = half(backend, random, sizes, format, HeadForm::RowsOut);
        let lens: Vec<usize> = step.turns.iter().map(|turn| turn.cached + turn.new).collect();
        let cache = CacheSlab::new(backend, random, tables, sizes, dtype, &lens);
        let tokens = step.batch.num_tokens;
        let normal = |random: &mut Random, width| {
            Slab::normal(backend, random, &[tokens, heads, width], dtype, Layout::Dense, 1.0)
        };
        let (q_latent, q_rope) = (normal(random, latent), normal(random, rope_dim));
        let mut ranges = vec![(0..step.batch.num_seqs, tokens)];
        if step.batch.num_decodes > 0 {
            ranges.push((step.batch.decodes(), step.batch.num_decodes));
        }
        for (seqs, rows) in ranges {
            for fp8 in fp8_forms(backend) {
                let run = |default: bool| {
                    let o_latent = Slab::poison(backend, &[tokens, heads, latent], dtype, Layout::Dense);
                    let dense = Slab::poison(backend, &[rows, heads * value], dtype, Layout::Dense);
                    let out = ActivationSlab::new(backend, dense, fp8, Layout::Dense);
                    let (q_latent, q_rope, o_latent) = (&q_latent.view, &q_rope.view, &o_latent.view);
                    let (batch, cache, seqs, out_) =
                        (&step.batch, &cache.cache, seqs.clone(), &out.activation);
                    if default {
                        composite::mla_attend(
                            backend, q_latent, q_rope, cache, batch, seqs, SCALE, &w_uv, o_latent, out_,
                        );
                    } else {
                        backend
                            .mla_attend(q_latent, q_rope, cache, batch, seqs, SCALE, &w_uv, o_latent, out_);
                    }
                    settle(backend, "mla_attend");
                    (out.dense.read(backend), out.dequantized(backend).unwrap_or_default())
                };
                let (own, default) = (run(false), run(true));
                let tolerance = Tolerance::rounded_between(dtype);
                assert_close("mla_attend", &own.0, &default.0, tolerance);
                assert_close("mla_attend: FP8", &own.1, &default.1, Tolerance::fp8_between());
            }
        }
        step.assert_unchanged(backend);
    });
}
