//! dev only
use r1_core::{DType, Rank};
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::{EngineConfig, LocalRanks, OneBatch, OneBatchBench};
use r1_model::{Fp8Compute, KvCacheFormat, MlaForm, ModelOptions, WeightFormat};
use r1_weights::{Checkpoint, ModelConfig};
use std::path::Path;
use std::sync::Arc;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let folder = Path::new(&a[1]);
    let checkpoint = Arc::new(Checkpoint::open(folder).unwrap());
    let config = ModelConfig::open(folder).unwrap();
    let options = ModelOptions {
        activation_dtype: DType::BF16,
        kv_cache: KvCacheFormat::Activations,
        weights: match std::env::var("Q").as_deref() { Ok("int8") => WeightFormat::Int8, Ok("int4") => WeightFormat::Int4, _ => WeightFormat::AsStored },
        fp8: Fp8Compute::WeightOnly,
        mla_form: MlaForm::Auto,
        deterministic: false,
        max_batched_tokens: 4096,
        max_logit_rows: 16,
        max_model_len: 2048,
        max_expanded_tokens: 4096,
        layers: None,
        rank: Rank(0),
        world_size: 1,
    };
    let engine = EngineConfig {
        block_size: 64,
        max_num_seqs: 16,
        max_num_batched_tokens: 4096,
        max_model_len: 2048,
        kv_memory_fraction: 0.2,
        num_blocks: Some(600),
        prefix_cache: false,
        depth: None,
        max_captured_seqs: 16,
        pad_decodes: false,
        log_every_steps: u64::MAX,
    };
    let cpu = Cpu::new(CpuOptions::default()).unwrap().with_weights(if std::env::var("H").is_ok() { r1_cpu::WeightMemory::HugePages } else { r1_cpu::WeightMemory::InPlace });
    let start = std::time::Instant::now();
    let ranks = LocalRanks::in_host_memory(vec![Arc::new(cpu)], checkpoint, config, options);
    let mut b = OneBatchBench::new(Arc::new(ranks), &engine, &mut |_| {}).unwrap();
    println!("loaded in {:.2} s", start.elapsed().as_secs_f64());
    for spec in &a[2..] {
        let v: Vec<usize> = spec.split('/').map(|x| x.parse().unwrap()).collect();
        let batch = OneBatch { batch_size: v[0], input_tokens: v[1], output_tokens: v[2] };
        let t = b.run(batch, |_| {}).unwrap();
        let mut d = t.decode_steps.clone();
        d.sort();
        let m = d.get(d.len() / 2).map_or(0.0, |x| x.as_secs_f64());
        println!(
            "b{} in{} : prefill {:.3} s = {:.1} tok/s; decode {:.2} ms (min {:.2}) = {:.1} tok/s",
            v[0],
            v[1],
            t.prefill.as_secs_f64(),
            (v[0] * v[1]) as f64 / t.prefill.as_secs_f64(),
            m * 1e3,
            d.first().map_or(0.0, |x| x.as_secs_f64() * 1e3),
            v[0] as f64 / m
        );
    }
}
