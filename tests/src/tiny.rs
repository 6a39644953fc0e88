//! The bundled model in an engine of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use r1_backend::Backend;
use r1_comm::Local;
use r1_core::{DType, Rank};
use r1_engine::{EngineConfig, EngineInfo, Handle, Status};
use r1_model::{DeepSeek, Fp8Compute, MlaForm, ModelOptions, WeightFormat};
use r1_weights::{Checkpoint, ModelConfig};

/// Where the bundled model lies.
pub fn tiny_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/model")
}

/// An engine over the bundled weights, small enough that prompts are chunked and sequences wait for each other.
///
/// # Panics
/// When it does not start.
pub fn start_tiny<B: Backend>(backend: Arc<B>, max_num_seqs: usize) -> Handle {
    let config = ModelConfig::open(&tiny_dir()).expect("config.json");
    let max_model_len = 512;
    let options = ModelOptions {
        activation_dtype: DType::F32,
        weights: WeightFormat::AsStored,
        fp8: Fp8Compute::WeightOnly,
        mla_form: MlaForm::Auto,
        max_batched_tokens: 64,
        max_logit_rows: max_num_seqs,
        max_model_len,
        max_expanded_tokens: 64,
        layers: None,
        deterministic: false,
        rank: Rank(0),
        world_size: 1,
    };
    let engine = EngineConfig {
        block_size: 16,
        max_num_seqs,
        max_num_batched_tokens: 64,
        max_model_len,
        kv_memory_fraction: 0.5,
        log_every_steps: 1000,
    };
    let (handle, inbox) = Handle::channel(EngineInfo {
        max_model_len,
        vocab_size: config.vocab_size,
        max_num_seqs,
        max_queued: 64,
    });
    r1_engine::spawn(inbox, engine, move |progress| {
        let checkpoint = Checkpoint::open(&tiny_dir())?;
        DeepSeek::load(backend, Arc::new(Local::single()), &checkpoint, &config, options, progress)
    });
    loop {
        match handle.status() {
            Status::Ready => return handle,
            Status::Loading { .. } => thread::sleep(Duration::from_millis(5)),
            status => panic!("{status:?}"),
        }
    }
}
