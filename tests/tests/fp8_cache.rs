//! The FP8 KV cache: what it costs in accuracy, and that it takes the memory that it is said to take.
#![forbid(unsafe_code)]

use std::fs;
use std::sync::Arc;

use r1_backend::{Backend, Tensor};
use r1_cpu::{Cpu, CpuOptions};
use r1_model::{KvCacheFormat, MlaForm};
use r1_reference::Reference;
use r1_tests::{Feed, Gap, Golden, Load, emulated, goldens_dir, teacher_force, tiny_dir};

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { threads: Some(2), isa: None }).expect("a CPU"))
}

fn fp8(form: MlaForm) -> Load {
    Load { kv_cache: KvCacheFormat::Fp8, ..Load::f32(form) }
}

/// Questions to the bundled model with the replies that transformers gives.
fn replies() -> Vec<Vec<u32>> {
    let golden = fs::read(goldens_dir().join("tiny_r1.json")).expect("the golden");
    let golden: serde_json::Value = serde_json::from_slice(&golden).expect("JSON");
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    let replies = golden["replies"].as_array().expect("replies").iter();
    replies.map(|reply| [ids(&reply["prompt_ids"]), ids(&reply["output_ids"])].concat()).collect()
}

/// Logits after every token of every sequence, one after the other, prefilled in chunks of 48.
fn logits<B: Backend>(backend: &Arc<B>, load: Load, dir: &std::path::Path, seqs: &[Vec<u32>]) -> Vec<f32> {
    let model = load.open(backend.clone(), dir);
    let feeds: Vec<_> = seqs.iter().map(|tokens| Feed { tokens, chunk: 48 }).collect();
    feeds.chunks(10).flat_map(|feeds| teacher_force(&model, feeds).concat()).collect()
}

/// Fed with the replies that transformers gives, the bundled model would go on with the same token at 0.9974 of 4263 places.
/// Its logits move by 0.027 on average and by 4.6 at most.
#[test]
fn the_bundled_model_means_the_same() {
    let seqs = replies();
    let tokens = seqs.iter().map(Vec::len).sum::<usize>();
    let dense = logits(&cpu(), Load::f32(MlaForm::Absorbed), &tiny_dir(), &seqs);
    for form in [MlaForm::Absorbed, MlaForm::Expanded] {
        let gap = Gap::between(&logits(&cpu(), fp8(form), &tiny_dir(), &seqs), &dense, dense.len() / tokens);
        assert!(gap.argmax_agree > 0.99 && gap.mean_abs < 0.06 && gap.max_abs < 8.0, "{form:?}: {gap:?}");
        assert!(gap.mean_abs > 1e-3, "{form:?}: {gap:?} is not what FP8 does");
    }
}

/// A tenth of it on the emulated GPU.
#[test]
fn the_bundled_model_means_the_same_on_emu() {
    let seqs: Vec<_> = replies().into_iter().step_by(10).collect();
    let tokens = seqs.iter().map(Vec::len).sum::<usize>();
    let emu = emulated(1).remove(0);
    let dense = logits(&cpu(), Load::f32(MlaForm::Absorbed), &tiny_dir(), &seqs);
    for form in [MlaForm::Absorbed, MlaForm::Expanded] {
        let gap = Gap::between(&logits(&emu, fp8(form), &tiny_dir(), &seqs), &dense, dense.len() / tokens);
        assert!(gap.argmax_agree > 0.98 && gap.mean_abs < 0.06 && gap.max_abs < 8.0, "{form:?}: {gap:?}");
        assert!(gap.mean_abs > 1e-3, "{form:?}: {gap:?} is not what FP8 does");
    }
}

/// On random weights logits move by 0.014 to 0.066 of their standard deviation, and in the oracle in the same way.
#[test]
fn the_toys_mean_the_same() {
    for name in ["toy_v3_f32", "toy_v3_fp8", "toy_v2_lite", "toy_v2", "toy_moonlight", "toy_ragged_fp8"] {
        let golden = Golden::open(name);
        let (ids, expected) = (vec![golden.input_ids()], golden.logits("logits"));
        let (vocab_size, std) = (expected.len() / ids[0].len(), golden.fact("/logits_std"));
        let on_cpu = logits(&cpu(), fp8(MlaForm::Absorbed), &golden.dir, &ids);
        let gap = Gap::between(&on_cpu, &expected, vocab_size);
        assert!(gap.argmax_agree > 0.9 && gap.mean_abs < 0.1 * std, "{name}: {gap:?}");
        let oracle = logits(&Arc::new(Reference::new()), fp8(MlaForm::Absorbed), &golden.dir, &ids);
        // A sum in another order can move a latent across a rounding boundary.
        let gap = Gap::between(&on_cpu, &oracle, vocab_size);
        assert!(gap.mean_abs < 2e-3 * std, "{name}, CPU and oracle: {gap:?}");
    }
}

#[test]
fn the_toys_mean_the_same_on_emu() {
    let emu = emulated(1).remove(0);
    for name in ["toy_v3_fp8", "toy_v2", "toy_ragged_fp8"] {
        let golden = Golden::open(name);
        let (ids, expected) = (vec![golden.input_ids()], golden.logits("logits"));
        let (vocab_size, std) = (expected.len() / ids[0].len(), golden.fact("/logits_std"));
        for form in [MlaForm::Absorbed, MlaForm::Expanded] {
            let found = logits(&emu, fp8(form), &golden.dir, &ids);
            let gap = Gap::between(&found, &expected, vocab_size);
            assert!(gap.argmax_agree > 0.9 && gap.mean_abs < 0.1 * std, "{name} {form:?}: {gap:?}");
            let oracle = logits(&Arc::new(Reference::new()), fp8(form), &golden.dir, &ids);
            let gap = Gap::between(&found, &oracle, vocab_size);
            assert!(gap.mean_abs < 2e-3 * std, "{name} {form:?}, emu and oracle: {gap:?}");
        }
    }
}

/// Bytes of a cache's tensors are what the engine reckons with.
#[test]
fn it_takes_the_memory_that_it_is_said_to_take() {
    let bytes = |tensor: &Tensor<Cpu>| tensor.num_elements() * tensor.dtype().size_bytes();
    for name in ["toy_v3_f32", "toy_ragged_fp8"] {
        let golden = Golden::open(name);
        for load in [Load::f32(MlaForm::Absorbed), fp8(MlaForm::Absorbed)] {
            let model = load.open(cpu(), &golden.dir);
            let caches = model.alloc_cache(3, 16).expect("a small cache");
            let of_cache = caches.iter().map(|cache| {
                let beside = cache.fp8.iter().map(|fp8| bytes(&fp8.scales) + bytes(&fp8.rope));
                bytes(&cache.data) + beside.sum::<usize>()
            });
            assert_eq!(of_cache.sum::<usize>(), model.kv_bytes_per_token() * 3 * 16, "{name} {load:?}");
            let (latent, rope) = (model.config().kv_lora_rank, model.config().qk_rope_head_dim);
            let per_layer = match load.kv_cache {
                KvCacheFormat::Activations => 4 * (latent + rope),
                KvCacheFormat::Fp8 => latent + 4 * latent.div_ceil(128) + 2 * rope,
            };
            assert_eq!(model.kv_bytes_per_token(), caches.len() * per_layer, "{name} {load:?}");
        }
    }
}
