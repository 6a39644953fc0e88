//! The bundled model in an engine of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use r1_backend::Backend;
use r1_core::{DType, Rank};
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::{EngineConfig, EngineInfo, Handle, Inbox, LocalRanks, RankLoader, Status};
use r1_gpu::Gpu;
use r1_model::{Fp8Compute, KvCacheFormat, MlaForm, ModelOptions, WeightFormat};
use r1_weights::{Checkpoint, ModelConfig};

use crate::emulated;

/// Where the bundled model lies.
pub fn tiny_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/model")
}

/// How an engine over the bundled model runs; by default small enough that prompts are chunked and sequences wait for each
/// other.
#[derive(Clone, Debug)]
pub struct Tiny {
    /// Devices, one per tensor-parallel rank.
    pub ranks: usize,
    /// Seats in the batch.
    pub max_num_seqs: usize,
    /// Tokens of a step.
    pub max_num_batched_tokens: usize,
    /// Longest context, tokens.
    pub max_model_len: usize,
    /// Rows of logits beyond one per sequence.
    pub prompt_logit_rows: usize,
    /// Blocks of 16 tokens; `None` has room for every seat.
    pub num_blocks: Option<usize>,
    /// Whether prompts share what they have in common.
    pub prefix_cache: bool,
    /// F32 or BF16.
    pub dtype: DType,
    /// W8 or W8A8.
    pub fp8: Fp8Compute,
    /// What the KV cache holds.
    pub kv_cache: KvCacheFormat,
    /// Whether tokens may depend on nothing but the request.
    pub deterministic: bool,
    /// Steps in flight.
    pub depth: usize,
    /// Most sequences of a captured decode step.
    pub max_captured_seqs: usize,
    /// Whether decode steps are padded to the sizes that would be captured.
    pub pad_decodes: bool,
    /// Places in the queue.
    pub max_queued: usize,
    /// Tokens that may wait to be read.
    pub max_unread_tokens: usize,
}

impl Default for Tiny {
    fn default() -> Self {
        Self {
            ranks: 1,
            max_num_seqs: 8,
            max_num_batched_tokens: 64,
            max_model_len: 512,
            prompt_logit_rows: 16,
            num_blocks: None,
            prefix_cache: true,
            dtype: DType::F32,
            fp8: Fp8Compute::WeightOnly,
            kv_cache: KvCacheFormat::Activations,
            deterministic: false,
            depth: 1,
            max_captured_seqs: usize::MAX,
            pad_decodes: false,
            max_queued: 64,
            max_unread_tokens: 4096,
        }
    }
}

impl Tiny {
    fn options(&self) -> ModelOptions {
        ModelOptions {
            activation_dtype: self.dtype,
            kv_cache: self.kv_cache,
            weights: WeightFormat::AsStored,
            fp8: self.fp8,
            mla_form: if self.deterministic { MlaForm::Absorbed } else { MlaForm::Auto },
            deterministic: self.deterministic,
            max_batched_tokens: self.max_num_batched_tokens,
            max_logit_rows: self.max_num_seqs + self.prompt_logit_rows,
            max_model_len: self.max_model_len,
            max_expanded_tokens: self.max_num_batched_tokens,
            layers: None,
            rank: Rank(0),
            world_size: 1,
        }
    }

    /// Starts the engine on `ranks` CPU backends with a thread each (two for a single rank).
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(&self) -> Handle {
        let threads = if self.ranks == 1 { 2 } else { 1 };
        let cpu = || Cpu::new(CpuOptions { threads: Some(threads), isa: None }).expect("a CPU");
        self.start_on((0..self.ranks).map(|_| Arc::new(cpu().sharing_memory(self.ranks))).collect())
    }

    /// Starts the engine on `ranks` emulated GPUs, which meet as GPUs do.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_emulated(&self) -> Handle {
        self.start_ranks(Arc::new(self.emulated_ranks()))
    }

    /// The ranks that [`start_emulated`](Self::start_emulated) starts.
    ///
    /// # Panics
    /// When the bundled model cannot be read.
    pub fn emulated_ranks(&self) -> LocalRanks<Gpu> {
        LocalRanks { connect: Arc::new(Gpu::connect), ..self.ranks_on(emulated(self.ranks)) }
    }

    /// Starts the engine on these devices.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_on<B: Backend>(&self, devices: Vec<Arc<B>>) -> Handle {
        self.start_ranks(Arc::new(self.ranks_on(devices)))
    }

    /// The ranks that [`start_on`](Self::start_on) starts.
    ///
    /// # Panics
    /// When the bundled model cannot be read.
    pub fn ranks_on<B: Backend>(&self, devices: Vec<Arc<B>>) -> LocalRanks<B> {
        LocalRanks::in_host_memory(
            devices,
            Arc::new(Checkpoint::open(&tiny_dir()).expect("the bundled weights")),
            ModelConfig::open(&tiny_dir()).expect("config.json"),
            self.options(),
        )
    }

    /// Both ends of an engine that runs like this.
    ///
    /// # Panics
    /// When the bundled config.json cannot be read.
    pub fn channel(&self) -> (Handle, Inbox) {
        let config = ModelConfig::open(&tiny_dir()).expect("config.json");
        Handle::channel(EngineInfo {
            max_model_len: self.max_model_len,
            vocab_size: config.vocab_size,
            max_num_seqs: self.max_num_seqs,
            max_queued: self.max_queued,
            max_unread_tokens: self.max_unread_tokens,
        })
    }

    /// The engine's side of it.
    pub fn engine(&self) -> EngineConfig {
        EngineConfig {
            block_size: 16,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_model_len: self.max_model_len,
            kv_memory_fraction: 0.5,
            num_blocks: self.num_blocks,
            prefix_cache: self.prefix_cache,
            depth: Some(self.depth),
            max_captured_seqs: self.max_captured_seqs,
            pad_decodes: self.pad_decodes,
            log_every_steps: 1000,
        }
    }

    /// Starts the engine on ranks of any making.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_ranks<B: Backend>(&self, ranks: Arc<dyn RankLoader<B>>) -> Handle {
        let (handle, inbox) = self.channel();
        r1_engine::spawn(inbox, self.engine(), ranks);
        loop {
            match handle.status() {
                Status::Ready => return handle,
                Status::Loading { .. } => thread::sleep(Duration::from_millis(5)),
                status => panic!("{status:?}"),
            }
        }
    }
}
