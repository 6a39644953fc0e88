//! A step allocates nothing: once every operation has run, running them again takes no memory from the heap.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use r1_backend::{
    Activation, Backend, Batch, Experts, HeadForm, HeadWeight, LatentCache, LogprobsOut, MlpWeights,
    RopeTable, Routing, RowSampling, SamplingBatch, ScoreFunction,
};
use r1_core::DType;
use support::{FORMATS, Random, cpu, ids, tensor, weight};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the same contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_second_step_allocates_nothing() {
    // One thread: with more, which of them needs its scratch first is up to the system.
    let cpu = cpu(None, 1);
    let mut random = Random(1);
    let (tokens, d, i, vocab, k) = (70, 96, 64, 500, 2);
    let mut float = |shape: &[usize], dtype| {
        let values = random.floats(shape.iter().product());
        tensor(&cpu, &values, shape, dtype)
    };
    let (x, hidden) = (float(&[tokens, d], DType::BF16), float(&[tokens, d], DType::BF16));
    let norm = float(&[d], DType::BF16);
    let normed = Activation::dense(float(&[tokens, d], DType::BF16));
    let gate_up = float(&[tokens, 2 * i], DType::BF16);
    let acted = Activation::dense(float(&[tokens, i], DType::BF16));
    let router_logits = float(&[tokens, 4], DType::F32);
    let weights = float(&[tokens, k], DType::F32);
    let logits = float(&[1, vocab], DType::F32);
    let heads = float(&[tokens, 2, 24], DType::BF16);
    let headed = float(&[tokens, 2, d], DType::BF16);
    let logprobs = LogprobsOut {
        chosen: float(&[1], DType::F32),
        top_ids: ids(&cpu, &[0; 5], &[1, 5]),
        top: float(&[1, 5], DType::F32),
    };
    let (latent, rotated) = (140, 6);
    let caches = [DType::F32, DType::F8E4M3]
        .map(|dtype| LatentCache::alloc(&cpu, dtype, [1, tokens], latent, rotated).expect("room"));
    let (q_latent, o_latent) =
        (float(&[tokens, 2, latent], DType::F32), float(&[tokens, 2, latent], DType::F32));
    let q_rope = float(&[tokens, 2, rotated], DType::F32);
    let entries = [0; 2].map(|_| float(&[tokens, latent + rotated], DType::F32));
    let [kv_a, gathered] = &entries;
    let latent_norm = float(&[latent], DType::F32);
    let rope = RopeTable { cos_sin: float(&[tokens, rotated], DType::F32) };
    let mut weight = |size| weight(&cpu, &mut random, size, FORMATS[3]).0;
    let head = HeadWeight { weight: weight([96, d]), rows_per_head: 48, rows: 0..24, form: HeadForm::RowsIn };
    let linear = weight([2 * i, d]);
    let local = (0..4)
        .map(|_| MlpWeights { gate: weight([i, d]), up: weight([i, d]), down: weight([d, i]) })
        .collect();
    let experts = Experts::new(&cpu, local, 0, 4).expect("no table is made");
    let chosen = ids(&cpu, &vec![0; tokens * k], &[tokens, k]);
    let drawn = ids(&cpu, &[0], &[1]);
    let routing = Routing {
        score: ScoreFunction::Sigmoid,
        groups: None,
        top_k: k,
        norm_topk_prob: true,
        routed_scaling_factor: 1.0,
    };
    let row = RowSampling { temperature: 1.0, top_p: 0.9, top_k: 40, ..RowSampling::greedy() };
    let sampling = SamplingBatch { rows: vec![row], ..SamplingBatch::default() };
    let u32s = |values: &[u32]| ids(&cpu, values, &[values.len()]);
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let batch = Batch {
        positions: u32s(&positions),
        slots: u32s(&positions),
        query_start: u32s(&[0, tokens as u32]),
        context_len: u32s(&[tokens as u32]),
        context_start: u32s(&[0, tokens as u32]),
        block_table: ids(&cpu, &[0], &[1, 1]),
        num_tokens: tokens,
        num_seqs: 1,
        num_decodes: 0,
        prefill_context_tokens: tokens,
        max_context_len: tokens,
    };
    let (from, fed) = (ids(&cpu, &[0, u32::MAX], &[2]), ids(&cpu, &[1, 2], &[2]));
    let step = || {
        cpu.feed_tokens(&drawn, &from, &fed);
        cpu.add_rms_norm(&hidden, &x, &norm, 1e-6, &normed);
        cpu.linear(&normed, &linear, &gate_up);
        cpu.silu_mul(&gate_up, &acted);
        cpu.per_head(&heads, &head, &headed);
        cpu.route(&router_logits, None, &routing, &chosen, &weights);
        cpu.experts(&normed, &chosen, &weights, &experts, &hidden);
        for cache in &caches {
            cpu.rope_cache(&q_rope, kv_a, &latent_norm, 1e-6, &rope, &batch, cache);
            cpu.mla_attention(&q_latent, &q_rope, cache, &batch, 0..1, 0.1, &o_latent);
            cpu.gather_latent(cache, &batch, 0..1, gathered);
        }
        cpu.sample(&logits, &sampling, &drawn);
        cpu.logprobs(&logits, &drawn, &logprobs);
    };
    step();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    assert!(before > 0, "allocations are counted");
    step();
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
}
