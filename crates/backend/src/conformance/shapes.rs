//! Checks that every operation refuses wrong shapes, with its own name and the argument's.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use r1_core::DType;

use super::attention::rope_table;
use super::paged::{CacheSlab, SIZES, Step, Tables, Turn};
use super::random::{Random, seeded};
use super::slab::{Format, weight};
use crate::{
    Activation, Backend, Experts, Fp8Latent, HeadForm, HeadWeight, LatentCache, LogprobsOut, MlpWeights,
    Routing, RowSampling, SamplingBatch, ScoreFunction, Tensor,
};

/// Runs `operation`, which must panic with `argument: `.
#[track_caller]
pub(super) fn refuses(operation_and_argument: &str, operation: impl FnOnce()) {
    let panic: Box<dyn Any + Send> = match catch_unwind(AssertUnwindSafe(operation)) {
        Err(panic) => panic,
        Ok(()) => panic!("{operation_and_argument}: a wrong shape was taken"),
    };
    // A message without values is a `&str`.
    let fixed = panic.downcast_ref::<&str>().copied().unwrap_or_default();
    let message = panic.downcast_ref::<String>().map_or(fixed, String::as_str);
    assert!(
        message.starts_with(operation_and_argument),
        "panicked with {message:?}, expected {operation_and_argument:?} …"
    );
}

/// Every operation of the backend calls its check in [`shape`](crate::shape).
pub fn shape_panics<B: Backend>(backend: &B) {
    seeded("shape_panics", |random| {
        rows_and_matrices(backend, random);
        attention(backend, random);
        routing_and_sampling(backend, random);
        super::gqa::shape_panics(backend, random);
        super::grouped::shape_panics(backend, random);
    });
}

fn f32s<B: Backend>(backend: &B, shape: &[usize]) -> Tensor<B> {
    backend.alloc(shape, DType::F32).expect("alloc")
}

fn u32s<B: Backend>(backend: &B, shape: &[usize]) -> Tensor<B> {
    backend.alloc(shape, DType::U32).expect("alloc")
}

fn rows_and_matrices<B: Backend>(backend: &B, random: &mut Random) {
    let f = |shape: &[usize]| f32s(backend, shape);
    let x = f(&[2, 8]);
    let activation = |shape: &[usize]| Activation::dense(f(shape));
    let (w, _) = weight(backend, random, [4, 8], Format::Dense(DType::F32));

    let u = |shape: &[usize]| u32s(backend, shape);
    refuses("feed_tokens: ids", || backend.feed_tokens(&u(&[2]), &u(&[3]), &u(&[2])));
    refuses("feed_tokens: drawn", || backend.feed_tokens(&f(&[2]), &u(&[3]), &u(&[3])));
    refuses("embed: out", || backend.embed(&u32s(backend, &[2]), &f(&[5, 8]), 0, &f(&[2, 7])));
    refuses("embed: ids", || backend.embed(&f(&[2]), &f(&[5, 8]), 0, &f(&[2, 8])));
    refuses("rms_norm: weight", || backend.rms_norm(&x, &f(&[7]), 1e-6, &activation(&[2, 8])));
    refuses("linear: w", || backend.linear(&activation(&[2, 7]), &w, &f(&[2, 4])));
    refuses("linear: out", || backend.linear(&activation(&[2, 8]), &w, &f(&[3, 4])));
    let head = HeadWeight { weight: w, rows_per_head: 2, rows: 0..2, form: HeadForm::RowsIn };
    refuses("per_head: x", || backend.per_head(&f(&[3, 2, 5]), &head, &f(&[3, 2, 8])));
    refuses("silu_mul: gate_up", || backend.silu_mul(&f(&[2, 7]), &activation(&[2, 4])));
    refuses("add: x", || backend.add(&x, &f(&[3, 8])));
    refuses("gather_rows: out", || backend.gather_rows(&x, &u32s(backend, &[3]), &f(&[2, 8])));
}

fn attention<B: Backend>(backend: &B, random: &mut Random) {
    let f = |shape: &[usize]| f32s(backend, shape);
    let sizes = SIZES[0];
    let (heads, latent, rope, tokens) = (sizes.heads, sizes.latent, sizes.rope, 3);
    let tables = Tables::new(random, 4, [tokens].into_iter());
    let step = Step::new(backend, &tables, &[Turn { cached: 0, new: tokens }]);
    let cache = CacheSlab::new(backend, random, &tables, sizes, DType::F32, &[tokens]);
    let (cache, batch) = (&cache.cache, &step.batch);
    let (table, _) = rope_table(backend, rope);
    let q_rope = f(&[tokens, heads, rope]);

    refuses("rope_cache: kv_a", || {
        let kv_a = f(&[tokens, latent + rope + 1]);
        backend.rope_cache(&q_rope, &kv_a, &f(&[latent]), 1e-6, &table, batch, cache);
    });
    refuses("mla_attention: q_latent", || {
        let q_latent = f(&[tokens, heads, latent + 1]);
        backend.mla_attention(&q_latent, &q_rope, cache, batch, 0..1, 1.0, &f(&[tokens, heads, latent]));
    });
    refuses("mla_attention: sequences", || {
        let q_latent = f(&[tokens, heads, latent]);
        backend.mla_attention(&q_latent, &q_rope, cache, batch, 0..2, 1.0, &f(&[tokens, heads, latent]));
    });
    if backend.capabilities().cache_dtypes.contains(&DType::F8E4M3) {
        let part = |shape: &[usize], dtype| backend.alloc(shape, dtype).expect("a small cache");
        let gather = |data: Tensor<B>, scales: &[usize], rope: usize| {
            let scales = f(scales);
            let rope = part(&[2, 4, rope], DType::BF16);
            let cache = LatentCache { data, latent_dim: latent, fp8: Some(Fp8Latent { scales, rope }) };
            backend.gather_latent(&cache, batch, 0..1, &f(&[tokens, sizes.entry()]));
        };
        let codes = || part(&[2, 4, latent], DType::F8E4M3);
        refuses("gather_latent: cache has dtype", || gather(f(&[2, 4, latent]), &[2, 4, 1], rope));
        refuses("gather_latent: cache.scales", || gather(codes(), &[2, 4, 2], rope));
        refuses("gather_latent: cache.scales", || gather(codes(), &[2, 3, 1], rope));
        refuses("gather_latent: out", || gather(codes(), &[2, 4, 1], rope + 2));
    }
    refuses("gather_latent: out", || backend.gather_latent(cache, batch, 0..1, &f(&[tokens, latent])));
    refuses("mla_attention_expanded: kv", || {
        let (q, kv) = (f(&[tokens, heads, 3 + rope]), f(&[tokens, heads, 3]));
        let out = f(&[tokens, heads, 5]);
        backend.mla_attention_expanded(&q, &kv, &f(&[tokens, rope]), batch, 0..1, 1.0, &out);
    });
}

fn routing_and_sampling<B: Backend>(backend: &B, random: &mut Random) {
    let (f, u) = (|shape: &[usize]| f32s(backend, shape), |shape: &[usize]| u32s(backend, shape));
    let routing = Routing {
        score: ScoreFunction::Softmax,
        groups: None,
        top_k: 2,
        norm_topk_prob: false,
        routed_scaling_factor: 1.0,
    };
    refuses("route: ids", || backend.route(&f(&[3, 6]), None, &routing, &u(&[3, 1]), &f(&[3, 2])));
    refuses("route: bias", || {
        backend.route(&f(&[3, 6]), Some(&f(&[5])), &routing, &u(&[3, 2]), &f(&[3, 2]));
    });
    let mut w = |size| weight(backend, random, size, Format::Dense(DType::F32)).0;
    let mut expert = |i, d, down| MlpWeights { gate: w([i, d]), up: w([i, d]), down: w(down) };
    let together = |local| Experts::new(backend, local, 0, 2).expect("table");
    let run = |d: usize, experts: &Experts<B>| {
        let x = Activation::dense(f(&[3, d]));
        backend.experts(&x, &u(&[3, 2]), &f(&[3, 2]), experts, &f(&[3, d]));
    };
    // Within an expert, between two, and between them and their inputs.
    let uneven = expert(4, 8, [8, 5]);
    refuses("experts: down has shape", || run(8, &together(vec![uneven])));
    for other in [expert(4, 10, [10, 4]), expert(6, 8, [8, 6])] {
        let first = expert(4, 8, [8, 4]);
        refuses("experts: gate has shape", || run(8, &together(vec![first, other])));
    }
    let whole = expert(4, 8, [8, 4]);
    refuses("experts: gate has shape", || run(10, &together(vec![whole])));
    let sampling = SamplingBatch { rows: vec![RowSampling::greedy(); 2], ..Default::default() };
    refuses("sample: logits", || backend.sample(&f(&[3, 9]), &sampling, &u(&[2])));
    refuses("logprobs: out.top", || {
        let out = LogprobsOut { chosen: f(&[2]), top_ids: u(&[2, 3]), top: f(&[2, 4]) };
        backend.logprobs(&f(&[2, 9]), &u(&[2]), &out);
    });
}
