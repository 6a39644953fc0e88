//! A model in an engine's own steps, for the benches.

use std::path::Path;
use std::sync::Arc;

use r1_core::{DType, Rank};
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::{EngineConfig, LocalRanks, OneBatchBench};
use r1_model::{Fp8Compute, KvCacheFormat, MlaForm, ModelOptions, WeightFormat};
use r1_weights::{Checkpoint, ModelConfig};

/// Largest batch of a bench.
pub const MAX_NUM_SEQS: usize = 16;
/// Longest context of a bench.
pub const MAX_MODEL_LEN: usize = 1024;
/// Tokens of a prompt: so few that one step prefills the largest batch, and all sequences decode side by side from first to
/// last.
pub const INPUT_TOKENS: usize = 32;

/// The bundled model's configuration and weights.
///
/// # Panics
/// When they cannot be read.
pub fn bundled() -> (ModelConfig, Arc<Checkpoint>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/model");
    let checkpoint = Checkpoint::open(&folder).expect("the bundled weights");
    (ModelConfig::open(&folder).expect("config.json"), Arc::new(checkpoint))
}

/// How the benches run a model: absorbed means deterministic.
pub fn options(mla_form: MlaForm, max_num_seqs: usize, max_model_len: usize) -> ModelOptions {
    ModelOptions {
        activation_dtype: DType::F32,
        kv_cache: KvCacheFormat::Activations,
        weights: WeightFormat::AsStored,
        fp8: Fp8Compute::WeightOnly,
        mla_form,
        deterministic: mla_form == MlaForm::Absorbed,
        max_batched_tokens: MAX_MODEL_LEN,
        max_logit_rows: max_num_seqs,
        max_model_len,
        max_expanded_tokens: MAX_MODEL_LEN,
        layers: None,
        rank: Rank(0),
        world_size: 1,
    }
}

/// Loads a model on the CPU, with room for a prompt of the whole context in one step.
///
/// # Panics
/// When it does not load.
pub fn load(config: &ModelConfig, checkpoint: &Arc<Checkpoint>, mla_form: MlaForm) -> OneBatchBench<Cpu> {
    let options = options(mla_form, MAX_NUM_SEQS, MAX_MODEL_LEN);
    let engine = EngineConfig {
        block_size: 64,
        max_num_seqs: MAX_NUM_SEQS,
        max_num_batched_tokens: MAX_MODEL_LEN,
        max_model_len: MAX_MODEL_LEN,
        kv_memory_fraction: 0.5,
        num_blocks: None,
        prefix_cache: false,
        depth: None,
        max_captured_seqs: MAX_NUM_SEQS,
        pad_decodes: false,
        log_every_steps: u64::MAX,
    };
    let cpu = Cpu::new(CpuOptions::default()).expect("a CPU backend");
    let (checkpoint, config) = (checkpoint.clone(), config.clone());
    let ranks = LocalRanks::in_host_memory(vec![Arc::new(cpu)], checkpoint, config, options);
    OneBatchBench::new(Arc::new(ranks), &engine, &mut |_| {}).expect("it loads and has room for a cache")
}
