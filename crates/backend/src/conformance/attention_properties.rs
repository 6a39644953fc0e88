//! Properties of attention as a whole: the absorbed form equals the expanded one, chunks equal the whole, and a batch
//! equals its sequences alone.

use r1_core::DType;

use super::attention::{cache_dtypes, rope_table};
use super::paged::{CacheSlab, SIZES, Sizes, Step, Tables, Turn};
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close};
use super::settle;
use super::slab::{Format, Layout, Slab, imported, weight};
use crate::{Activation, Backend, HeadForm, HeadWeight, LatentCache, RopeTable, Tensor, Weight};

const EPS: f32 = 1e-6;
const SCALE: f32 = 0.2;

/// One attention layer's weights and every token's inputs, of some sequences.
struct Layer<B: Backend> {
    sizes: Sizes,
    dtype: DType,
    cache_dtype: DType,
    kv_b: Weight<B>,
    norm: Tensor<B>,
    rope: RopeTable<B>,
    /// Of each sequence `[len, H * (P + R)]`.
    q: Vec<Vec<f64>>,
    /// Of each sequence `[len, C + R]`.
    kv_a: Vec<Vec<f64>>,
}

/// Which form computes the scores.
#[derive(Clone, Copy)]
enum Form {
    Absorbed,
    Expanded,
}

impl<B: Backend> Layer<B> {
    fn new(
        backend: &B,
        random: &mut Random,
        sizes: Sizes,
        [dtype, cache_dtype]: [DType; 2],
        format: Format,
        lens: &[usize],
    ) -> Self {
        let Sizes { heads, latent, rope, nope, value } = sizes;
        let (kv_b, _) = weight(backend, random, [heads * (nope + value), latent], format);
        let (norm, _) = imported(backend, random, &[latent], dtype, 1.0);
        let mut rows = |width: usize| lens.iter().map(|len| random.normals(len * width, 1.0)).collect();
        Self {
            sizes,
            dtype,
            cache_dtype,
            kv_b,
            norm,
            rope: rope_table(backend, rope).0,
            q: rows(heads * (nope + rope)),
            kv_a: rows(sizes.entry()),
        }
    }

    /// Runs one step through cache and attention; gives each turn's output rows `[new, H * U]`.
    fn step(&self, backend: &B, step: &Step<B>, cache: &LatentCache<B>, form: Form) -> Vec<Vec<f64>> {
        let Sizes { heads, latent, rope, nope, value } = self.sizes;
        let tokens = step.batch.num_tokens;
        let floats = |width: usize, of: &[Vec<f64>]| {
            let turn = |(turn, seq): (&Turn, &usize)| {
                of[*seq][turn.cached * width..(turn.cached + turn.new) * width].to_vec()
            };
            let values: Vec<f64> = step.turns.iter().zip(&step.seqs).flat_map(turn).collect();
            Slab::floats(backend, &[tokens, width], self.dtype, Layout::Dense, &values)
        };
        let poison = |shape: &[usize]| Slab::poison(backend, shape, self.dtype, Layout::Dense);
        let q = floats(heads * (nope + rope), &self.q);
        let q = q.view.split_last(&[heads, nope + rope]);
        let (q_nope, q_rope) = (q.narrow(2, 0..nope), q.narrow(2, nope..nope + rope));
        let kv_a = floats(self.sizes.entry(), &self.kv_a);
        let out = poison(&[tokens, heads, value]);
        let seqs = 0..step.turns.len();

        backend.rope_cache(&q_rope, &kv_a.view, &self.norm, EPS, &self.rope, &step.batch, cache);
        match form {
            Form::Absorbed => {
                let head_weight = |rows, form| HeadWeight {
                    weight: self.kv_b.clone(),
                    rows_per_head: nope + value,
                    rows,
                    form,
                };
                let (q_latent, attended) =
                    (poison(&[tokens, heads, latent]), poison(&[tokens, heads, latent]));
                backend.per_head(&q_nope, &head_weight(0..nope, HeadForm::RowsIn), &q_latent.view);
                backend.mla_attention(
                    &q_latent.view,
                    &q_rope,
                    cache,
                    &step.batch,
                    seqs,
                    SCALE,
                    &attended.view,
                );
                let w_uv = head_weight(nope..nope + value, HeadForm::RowsOut);
                backend.per_head(&attended.view, &w_uv, &out.view);
            }
            Form::Expanded => {
                let context = step.turns.iter().map(|turn| turn.cached + turn.new).sum::<usize>();
                let gathered = poison(&[context, latent + rope]);
                let kv = poison(&[context, heads * (nope + value)]);
                backend.gather_latent(cache, &step.batch, seqs.clone(), &gathered.view);
                let latents = Activation::dense(gathered.view.narrow(1, 0..latent));
                backend.linear(&latents, &self.kv_b, &kv.view);
                backend.mla_attention_expanded(
                    &q,
                    &kv.view.split_last(&[heads, nope + value]),
                    &gathered.view.narrow(1, latent..latent + rope),
                    &step.batch,
                    seqs,
                    SCALE,
                    &out.view,
                );
            }
        }
        settle(backend, "attention");
        let out = out.read(backend);
        step.rows
            .iter()
            .map(|rows| out[rows.start * heads * value..rows.end * heads * value].to_vec())
            .collect()
    }

    /// A cache with nothing in it.
    fn cache(&self, backend: &B, random: &mut Random, tables: &Tables) -> LatentCache<B> {
        CacheSlab::new(backend, random, tables, self.sizes, self.cache_dtype, &[]).cache
    }

    /// Each sequence whole, in a batch of its own.
    fn alone(&self, backend: &B, random: &mut Random, tables: &Tables, form: Form) -> Vec<Vec<f64>> {
        let cache = self.cache(backend, random, tables);
        (0..self.q.len())
            .map(|seq| {
                let new = self.kv_a[seq].len() / self.sizes.entry();
                let step = Step::of(backend, tables, &[Turn { cached: 0, new }], vec![seq]);
                self.step(backend, &step, &cache, form).remove(0)
            })
            .collect()
    }
}

/// Runs `check` on a layer of every activation type, with every kind of cache, and some sequences.
fn layers<B: Backend>(
    backend: &B,
    check_name: &'static str,
    lens: &[usize],
    mut check: impl FnMut(&mut Random, &Layer<B>, &Tables),
) {
    seeded(check_name, |random| {
        for sizes in SIZES {
            for dtype in backend.capabilities().activation_dtypes {
                for cache_dtype in cache_dtypes(backend, dtype) {
                    for format in [Format::Dense(dtype), Format::Fp8([0, 0])] {
                        let layer = Layer::new(backend, random, sizes, [dtype, cache_dtype], format, lens);
                        let tables = Tables::new(random, 16, lens.iter().copied());
                        check(random, &layer, &tables);
                    }
                }
            }
        }
    });
}

/// Both forms of MLA, each made of its primitives from the same weights and the same cache, give the same.
pub fn absorbed_equals_expanded<B: Backend>(backend: &B) {
    layers(backend, "absorbed_equals_expanded", &[37, 1, 20], |random, layer, tables| {
        let absorbed = layer.alone(backend, random, tables, Form::Absorbed);
        let expanded = layer.alone(backend, random, tables, Form::Expanded);
        let mut tolerance = Tolerance::rounded_between(layer.dtype);
        if layer.cache_dtype == DType::F8E4M3 && layer.dtype != DType::F32 {
            // Gathered latents are rounded to the activations' type, those that the absorbed form reads need not be; and an
            // error of a latent is one of all channels of a key.
            tolerance.of_rms *= 4.0;
        }
        assert_close("absorbed and expanded", &absorbed.concat(), &expanded.concat(), tolerance);
    });
}

/// A sequence that is prefilled in chunks, and decoded at its end, gives what it gives at once.
pub fn chunked_equals_whole<B: Backend>(backend: &B) {
    let lens = [45, 30];
    layers(backend, "chunked_equals_whole", &lens, |random, layer, tables| {
        for form in [Form::Absorbed, Form::Expanded] {
            let whole = layer.alone(backend, random, tables, form);
            let cache = layer.cache(backend, random, tables);
            for seq in 0..lens.len() {
                let mut chunked = Vec::new();
                let mut cached = 0;
                for new in [16, 7, lens[seq] - 25, 1, 1] {
                    let step = Step::of(backend, tables, &[Turn { cached, new }], vec![seq]);
                    chunked.extend(layer.step(backend, &step, &cache, form).remove(0));
                    cached += new;
                }
                let tolerance = Tolerance::rounded_between(layer.dtype);
                assert_close("chunks and the whole", &chunked, &whole[seq], tolerance);
            }
        }
    });
}

/// A sequence in a batch of several gives what it gives alone.
pub fn batch_equals_alone<B: Backend>(backend: &B) {
    let lens = [1, 1, 33, 17];
    layers(backend, "batch_equals_alone", &lens, |random, layer, tables| {
        for form in [Form::Absorbed, Form::Expanded] {
            let alone = layer.alone(backend, random, tables, form);
            let turns = lens.map(|new| Turn { cached: 0, new });
            let cache = layer.cache(backend, random, tables);
            let step = Step::new(backend, tables, &turns);
            let batch = layer.step(backend, &step, &cache, form);
            let tolerance = Tolerance::rounded_between(layer.dtype);
            assert_close("a batch and its sequences", &batch.concat(), &alone.concat(), tolerance);
        }
    });
}
