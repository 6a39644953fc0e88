//! Checks that padding rows of a batch write nothing, get zeros from attention, and change nobody else's result.

use r1_core::DType;

use super::attention::rope_table;
use super::paged::{CacheSlab, PUBLISHED, SIZES, Sizes, Step, Tables, Turn};
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close};
use super::settle;
use super::slab::{Layout, Slab, imported};
use crate::{Backend, Capabilities};

const EPS: f32 = 1e-6;
const SCALE: f32 = 0.2;
const BLOCK_SIZE: usize = 16;
const PADDING: usize = 3;

/// Padding rows of a step that decodes, as [`Batch`](crate::Batch) describes them: beside short contexts, beside ones long
/// enough to be split, and on their own.
pub fn padding<B: Backend>(backend: &B) {
    seeded("padding", |random| {
        let Capabilities { activation_dtypes, cache_dtypes, .. } = backend.capabilities();
        for dtype in activation_dtypes {
            for &cache_dtype in &cache_dtypes {
                let dtypes = [dtype, cache_dtype];
                for sizes in SIZES {
                    for cached in [&[15, 0, 130][..], &[1100], &[]] {
                        check(backend, random, sizes, dtypes, cached);
                    }
                }
                check(backend, random, PUBLISHED, dtypes, &[70, 3]);
            }
        }
    });
}

fn check<B: Backend>(
    backend: &B,
    random: &mut Random,
    sizes: Sizes,
    [dtype, cache_dtype]: [DType; 2],
    cached: &[usize],
) {
    let turns: Vec<Turn> = cached.iter().map(|&cached| Turn { cached, new: 1 }).collect();
    let tables = Tables::new(random, BLOCK_SIZE, cached.iter().map(|cached| cached + 1));
    let cache = CacheSlab::new(backend, random, &tables, sizes, cache_dtype, cached);
    let (rope, _) = rope_table(backend, sizes.rope);
    let (norm, _) = imported(backend, random, &[sizes.latent], dtype, 1.0);
    let Sizes { heads, latent, rope: rope_dim, .. } = sizes;
    // The values of the rows that count, then poison.
    let mut rows = |width: usize| {
        let mut values = random.normals(turns.len() * width, 1.0);
        values.resize((turns.len() + PADDING) * width, f64::NAN);
        values
    };
    let (kv_a, q_rope, q_latent) = (rows(sizes.entry()), rows(heads * rope_dim), rows(heads * latent));
    let before = cache.contents(backend);
    let run = |padding: usize| {
        let step = Step::padded(backend, &tables, &turns, padding);
        let tokens = step.batch.num_tokens;
        let slab = |shape: &[usize], values: &[f64]| {
            let values = &values[..shape.iter().product()];
            Slab::floats(backend, shape, dtype, Layout::Dense, values)
        };
        cache.restore(backend, &before);
        let q_rope = slab(&[tokens, heads, rope_dim], &q_rope);
        let kv_a = slab(&[tokens, sizes.entry()], &kv_a);
        let q_latent = slab(&[tokens, heads, latent], &q_latent);
        let out = Slab::poison(backend, &[tokens, heads, latent], dtype, Layout::Gaps);
        backend.rope_cache(&q_rope.view, &kv_a.view, &norm, EPS, &rope, &step.batch, &cache.cache);
        let seqs = 0..step.batch.num_seqs;
        let (q_latent, q_rope) = (&q_latent.view, &q_rope.view);
        backend.mla_attention(q_latent, q_rope, &cache.cache, &step.batch, seqs, SCALE, &out.view);
        settle(backend, "padding");
        step.assert_unchanged(backend);
        (out.read(backend), cache.contents(backend))
    };
    let what = format!("padding {sizes:?} {cached:?} {dtype}, cache {cache_dtype}");
    let (padded, written) = run(PADDING);
    let real = turns.len() * heads * latent;
    assert!(padded[real..].iter().all(|&value| value == 0.0), "{what}: {:?}", &padded[real..]);
    if turns.is_empty() {
        assert_same(&what, &written, &before);
        return;
    }
    let (plain, written_plain) = run(0);
    assert_same(&format!("{what}: the cache"), &written, &written_plain);
    if backend.capabilities().batch_invariant {
        assert_eq!(padded[..real], plain, "{what}");
    } else {
        assert_close(&what, &padded[..real], &plain, Tolerance::rounded_between(dtype));
    }
}

/// The same values; NaN is NaN.
fn assert_same(what: &str, a: &[f64], b: &[f64]) {
    let differs = a.iter().zip(b).position(|(a, b)| a != b && !(a.is_nan() && b.is_nan()));
    assert!(a.len() == b.len() && differs.is_none(), "{what}: element {differs:?} differs");
}
