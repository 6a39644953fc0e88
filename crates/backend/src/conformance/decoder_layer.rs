//! A whole decoder layer, made of composites and primitives as a model makes it, on two backends.

use r1_core::DType;

use super::attention::rope_table;
use super::moe::mlp;
use super::paged::{CacheSlab, SIZES, Sizes, Step, Tables, Turn};
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close};
use super::settle;
use super::slab::{Format, Layout, Slab, imported, weight};
use crate::{
    Activation, Backend, Experts, GroupScore, Groups, HeadForm, HeadWeight, LatentCache, MlpScratch,
    MoeScratch, MoeWeights, QkvScratch, QkvWeights, QueryProjection, RopeTable, Routing, ScoreFunction,
    Tensor, Weight,
};

const EPS: f32 = 1e-6;
const DTYPE: DType = DType::F32;
const DIM: usize = 136;
const LOW_RANK: usize = 40;
const EXPERT_WIDTH: usize = 70;
const EXPERTS: usize = 8;
const TOP_K: usize = 3;

struct Layer<B: Backend> {
    sizes: Sizes,
    norms: [Tensor<B>; 3],
    qkv: QkvWeights<B>,
    kv_b: Weight<B>,
    o: Weight<B>,
    moe: MoeWeights<B>,
    rope: RopeTable<B>,
}

impl<B: Backend> Layer<B> {
    fn new(backend: &B, random: &mut Random, sizes: Sizes, format: Format) -> Self {
        let Sizes { heads, latent, rope, nope, value } = sizes;
        let mut norm = |width: usize| imported(backend, random, &[width], DTYPE, 1.0).0;
        let norms = [norm(DIM), norm(latent), norm(DIM)];
        let low_rank_norm = norm(LOW_RANK);
        let mut w = |size| weight(backend, random, size, format).0;
        let q = QueryProjection::LowRank {
            a: w([LOW_RANK, DIM]),
            norm: low_rank_norm,
            b: w([heads * (nope + rope), LOW_RANK]),
        };
        let qkv = QkvWeights { q, kv_a: w([latent + rope, DIM]), eps: EPS };
        let (kv_b, o) = (w([heads * (nope + value), latent]), w([DIM, heads * value]));
        let (router, _) = weight(backend, random, [EXPERTS, DIM], Format::Dense(DTYPE));
        let (bias, _) = imported(backend, random, &[EXPERTS], DTYPE, 0.2);
        let mut expert = || mlp(backend, random, [DIM, EXPERT_WIDTH], format).0;
        let moe = MoeWeights {
            router,
            bias: Some(bias),
            routing: Routing {
                score: ScoreFunction::Sigmoid,
                groups: Some(Groups { n_group: 4, topk_group: 2, score: GroupScore::TopTwoSum }),
                top_k: TOP_K,
                norm_topk_prob: true,
                routed_scaling_factor: 2.5,
            },
            experts: Experts::new(backend, (0..EXPERTS).map(|_| expert()).collect(), 0, EXPERTS)
                .expect("table"),
            shared: expert(),
        };
        Self { sizes, norms, qkv, kv_b, o, moe, rope: rope_table(backend, rope).0 }
    }

    /// One step over the layer; gives the residual stream after it.
    fn step(&self, backend: &B, residual: &[f64], step: &Step<B>, cache: &LatentCache<B>) -> Vec<f64> {
        let Sizes { heads, latent, rope, nope, value } = self.sizes;
        let tokens = step.batch.num_tokens;
        let poison = |shape: &[usize], dtype| Slab::poison(backend, shape, dtype, Layout::Dense).view;
        let new = |width: usize| poison(&[tokens, width], DTYPE);
        let residual = Slab::floats(backend, &[tokens, DIM], DTYPE, Layout::Dense, residual);
        let normed = Activation::dense(new(DIM));
        let [input_norm, latent_norm, post_norm] = &self.norms;

        backend.rms_norm(&residual.view, input_norm, EPS, &normed);
        let (q, kv_a) = (new(heads * (nope + rope)), new(latent + rope));
        let scratch = QkvScratch { q_a: new(LOW_RANK), q_a_normed: Activation::dense(new(LOW_RANK)) };
        backend.mla_qkv(&normed, &self.qkv, &scratch, &q, &kv_a);
        let q = q.split_last(&[heads, nope + rope]);
        let (q_nope, q_rope) = (q.narrow(2, 0..nope), q.narrow(2, nope..nope + rope));
        backend.rope_cache(&q_rope, &kv_a, latent_norm, EPS, &self.rope, &step.batch, cache);

        let by_head = |width: usize| poison(&[tokens, heads, width], DTYPE);
        let head_weight =
            |rows, form| HeadWeight { weight: self.kv_b.clone(), rows_per_head: nope + value, rows, form };
        let (q_latent, attended, values) = (by_head(latent), by_head(latent), by_head(value));
        backend.per_head(&q_nope, &head_weight(0..nope, HeadForm::RowsIn), &q_latent);
        let seqs = 0..step.turns.len();
        backend.mla_attention(&q_latent, &q_rope, cache, &step.batch, seqs, 0.2, &attended);
        backend.per_head(&attended, &head_weight(nope..nope + value, HeadForm::RowsOut), &values);
        let out = new(DIM);
        backend.linear(&Activation::dense(values.reshape(&[tokens, heads * value])), &self.o, &out);

        backend.add_rms_norm(&residual.view, &out, post_norm, EPS, &normed);
        let scratch = MoeScratch {
            logits: new(EXPERTS),
            ids: poison(&[tokens, TOP_K], DType::U32),
            weights: new(TOP_K),
            shared: MlpScratch {
                gate_up: new(2 * EXPERT_WIDTH),
                hidden: Activation::dense(new(EXPERT_WIDTH)),
            },
        };
        backend.moe_layer(&normed, &self.moe, &scratch, &out);
        backend.add(&residual.view, &out);
        settle(backend, "decoder layer");
        residual.read(backend)
    }
}

/// Prefills two sequences, then decodes one while the other's prefill goes on and a third one's begins.
fn run<B: Backend>(backend: &B, mut random: Random, format: Format) -> Vec<f64> {
    let sizes = SIZES[1];
    let layer = Layer::new(backend, &mut random, sizes, format);
    let tables = Tables::new(&mut random, 16, [18, 40, 21].into_iter());
    let cache = CacheSlab::new(backend, &mut random, &tables, sizes, DTYPE, &[]);
    let turn = |cached, new| Turn { cached, new };
    let steps = [vec![turn(0, 17), turn(0, 31)], vec![turn(17, 1), turn(31, 9), turn(0, 21)]];
    let step = |turns: &Vec<Turn>| {
        let step = Step::new(backend, &tables, turns);
        let residual = random.normals(step.batch.num_tokens * DIM, 1.0);
        layer.step(backend, &residual, &step, &cache.cache)
    };
    steps.iter().flat_map(step).collect()
}

/// A decoder layer in F32 gives on `backend` what it gives on `oracle`, for every kind of weight. In BF16 a rounding may
/// send a token to another expert, so that whole layers are not comparable; their operations are.
pub fn decoder_layer<B: Backend, O: Backend>(backend: &B, oracle: &O) {
    seeded("decoder_layer", |random| {
        for format in [Format::Dense(DType::F32), Format::Dense(DType::BF16), Format::Fp8([0, 0])] {
            let inputs = random.split();
            let own = run(backend, inputs.clone(), format);
            let want = run(oracle, inputs, format);
            let tolerance = Tolerance { relative: 1e-4, of_rms: 1e-4 };
            assert_close(&format!("decoder layer {format:?}"), &own, &want, tolerance);
        }
    });
}
