//! The default backend: hand-vectorised CPU kernels and a persistent thread pool.
//!
//! Mapped weights are read where they lie, FP8 widened in registers; sums are F32 in an order that depends on neither the batch nor
//! the number of threads. Knows no models.

// Kernels must end up inside the function that carries the target features, see `simd`.
#![allow(clippy::inline_always)]
// Register tiles are arrays indexed by two loop variables at once.
#![allow(clippy::needless_range_loop)]
// Memory is untyped bytes; `view` checks the alignment for the element type when it borrows.
#![allow(clippy::cast_ptr_alignment)]

mod buffer;
mod ceiling;
mod isa;
mod kernels;
mod memory;
pub mod numa;
mod ops;
mod pool;
mod scratch;
mod simd;
mod view;

use std::convert::Infallible;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use r1_backend::{
    Activation, AttentionKind, Backend, BackendError, Batch, Capabilities, Experts, HeadWeight, HostSlice,
    HostSliceMut, HostTensor, KvCache, LatentCache, LogprobsOut, RopeTable, Routing, SamplingBatch, Tensor,
    Ticket, Weight, WeightFormat,
};
use r1_core::DType;

pub use buffer::{Buffer, Pages};
pub use ceiling::{BarrierCost, ComputeCeiling, ReadCeiling, ReadFrom};
pub use isa::Isa;

use buffer::{Meter, Slabs};
use isa::Available;
use numa::{Interleave, NumaNodes};
use pool::Pool;
use scratch::Workspace;

/// Tensors below this size are allocated without asking the system how much memory is left.
const SMALL_BYTES: usize = 1 << 20;

/// How the backend is set up. The default is the best this machine can do.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads that compute, the caller's included; `None`: as many as the process may use.
    pub threads: Option<usize>,
    /// Vector instructions; `None`: the best there are.
    pub isa: Option<Isa>,
}

/// Where weights lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightMemory {
    /// Mapped ones in the mapped file: nothing is copied, and processes share the page cache.
    /// Their pages are as large as the file system keeps them.
    #[default]
    InPlace,
    /// Matrices are copied into huge pages when they are imported, by all threads, and their pages in the file given back.
    HugePages,
}

/// Why a CPU backend could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// Instructions that this machine lacks.
    #[error("this machine has no {isa} instructions")]
    IsaUnavailable {
        /// What was asked for.
        isa: Isa,
    },
    /// int8 activations, where their products lack.
    #[error(
        "int8 activations need AVX-512 with BF16, VBMI and VNNI; the kernels use {isa} instructions here"
    )]
    NoInt8Products {
        /// What is used.
        isa: Isa,
    },
    /// Zero threads.
    #[error("the CPU backend needs at least one thread")]
    NoThreads,
    /// The system gives no more threads.
    #[error("cannot start {threads} threads: {source}")]
    Spawn {
        /// How many were wanted.
        threads: usize,
        /// The system's words.
        source: std::io::Error,
    },
    /// NUMA nodes, on a system whose nodes are not known here.
    #[error("threads and memory are placed on NUMA nodes on Linux alone")]
    NumaUnsupported,
    /// The nodes' description cannot be read.
    #[error("cannot read the machine's NUMA nodes in {}: {source}", path.display())]
    NumaUnreadable {
        /// File or folder.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// The nodes' description is none.
    #[error("{} is no list of numbers: {text:?}", path.display())]
    NumaMalformed {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// None of the nodes has a CPU that this process may run on.
    #[error("no NUMA node in {} has a CPU that this process may run on", root.display())]
    NumaNoNode {
        /// The folder that describes the nodes.
        root: PathBuf,
    },
    /// The system does not let this process place memory or threads.
    #[error("the system refuses {call}: {source}{}", numa_hint(source))]
    NumaRefused {
        /// The system call.
        call: &'static str,
        /// The system's words.
        source: std::io::Error,
    },
}

/// What the system's refusal to place memory means.
fn numa_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            "; containers forbid it unless they have the capability SYS_NICE (docker run --cap-add SYS_NICE)"
        }
        std::io::ErrorKind::Unsupported => "; the kernel is built without NUMA",
        _ => "",
    }
}

/// What one operation at a time uses.
pub(crate) struct Engine {
    pool: Pool,
    workspace: Workspace,
}

/// The CPU as a device. Operations run at once, on the caller's thread and the pool's.
pub struct Cpu {
    isa: Available,
    threads: usize,
    engine: Mutex<Engine>,
    weight_memory: WeightMemory,
    int8_activations: bool,
    slabs: Mutex<Slabs>,
    /// How memory is placed; `None`: as the system does.
    numa: Option<Interleave>,
    owned_bytes: Meter,
    /// Imported in place: pages of a file that the system counts as available, but that every step reads.
    mapped_bytes: AtomicUsize,
    /// What the system could give when the backend was made: zeroed memory is lent untouched, so what is left shrinks late.
    budget_bytes: Option<usize>,
    /// Backends that share the machine's memory, this one included.
    sharing: usize,
}

impl Cpu {
    /// Starts the threads.
    pub fn new(options: CpuOptions) -> Result<Self, CpuError> {
        Self::start(options, None, |_| Ok(()))
    }

    /// As [`Cpu::new`], on NUMA nodes: threads but the caller's are bound to nodes, as [`NumaNodes::spread`] says of threads
    /// `first_thread..`, and memory from 2 MiB on is interleaved over the nodes, with the pages of mapped weights that are not in the
    /// page cache yet. The caller's thread runs where the system lets it, since what it starts would inherit a bond.
    ///
    /// # Errors
    /// Those of [`Cpu::new`], and [`CpuError::NumaRefused`].
    pub fn on_nodes(options: CpuOptions, nodes: &NumaNodes, first_thread: usize) -> Result<Self, CpuError> {
        let interleave = Interleave::new(nodes)?;
        let nodes = nodes.clone();
        let bind = move |index| {
            let node = nodes.spread().nth(first_thread + index).expect("there is one for any thread");
            let node = &nodes.nodes()[node];
            numa::bind_thread(&node.cpus).map_err(|error| {
                let text = format!("one cannot be bound to the CPUs of node {}: {error}", node.id);
                std::io::Error::new(error.kind(), text)
            })
        };
        Self::start(options, Some(interleave), bind)
    }

    fn start(
        options: CpuOptions,
        numa: Option<Interleave>,
        setup: impl Fn(usize) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Result<Self, CpuError> {
        let isa = Available::choose(options.isa)?;
        let threads = match options.threads {
            Some(0) => return Err(CpuError::NoThreads),
            Some(threads) => threads,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        let pool = Pool::with_setup(threads, setup).map_err(|source| CpuError::Spawn { threads, source })?;
        Ok(Self {
            isa,
            threads,
            engine: Mutex::new(Engine { pool, workspace: Workspace::default() }),
            weight_memory: WeightMemory::default(),
            int8_activations: false,
            slabs: Mutex::default(),
            numa,
            owned_bytes: Meter::default(),
            mapped_bytes: AtomicUsize::new(0),
            budget_bytes: memory::available_bytes(),
            sharing: 1,
        })
    }

    /// Says that `backends` of this process share the machine's memory, this one included: each counts on an equal part.
    ///
    /// # Panics
    /// When that is none.
    #[must_use]
    pub fn sharing_memory(self, backends: usize) -> Self {
        assert!(backends > 0, "this backend is one of them");
        Self { sharing: backends, ..self }
    }

    /// Says where matrices that are imported from now on shall lie.
    #[must_use]
    pub fn with_weights(self, weight_memory: WeightMemory) -> Self {
        Self { weight_memory, ..self }
    }

    /// Says that inputs of int8 and int4 weights are quantized to int8: see [`Capabilities::int8_activations`].
    ///
    /// # Errors
    /// [`CpuError::NoInt8Products`].
    pub fn with_int8_activations(self) -> Result<Self, CpuError> {
        if !self.multiplies_int8() {
            return Err(CpuError::NoInt8Products { isa: self.isa() });
        }
        Ok(Self { int8_activations: true, ..self })
    }

    /// The instructions in use.
    pub fn isa(&self) -> Isa {
        self.isa.isa()
    }

    /// Whether BF16 numbers are multiplied as they are, not widened to F32 first.
    pub fn multiplies_bf16(&self) -> bool {
        self.isa.has_pairs()
    }

    /// Whether int8 activations are multiplied as they are: see [`Cpu::with_int8_activations`].
    pub fn multiplies_int8(&self) -> bool {
        self.isa.has_pairs()
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// One operation at a time. An operation that panicked left nothing half-done that the next would read.
    fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the system can still give: what it says now, and what it said at the start less what was taken since, whichever
    /// is less.
    fn left_bytes(&self) -> Option<usize> {
        let owned = self.owned_bytes.load(Ordering::Relaxed);
        let left = self.budget_bytes.map(|budget| (budget / self.sharing).saturating_sub(owned));
        left.into_iter().chain(memory::available_bytes().map(|bytes| bytes / self.sharing)).min()
    }

    /// A copy of a matrix in huge pages; the host's own pages are given back.
    fn copy_to_huge_pages(&self, host: &HostTensor) -> Result<Tensor<Self>, BackendError> {
        let size_bytes = host.bytes().len();
        let what = || {
            let (shape, dtype) = (host.shape(), host.dtype());
            format!("a copy in huge pages of weights {shape:?} {dtype}, which could stay in place")
        };
        self.check_room(size_bytes, &what)?;
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = Buffer::in_huge_pages(
            host.bytes(),
            &mut slabs,
            &mut self.engine().pool,
            self.numa.as_ref(),
            &self.owned_bytes,
        )
        .ok_or_else(|| out_of_memory(size_bytes, what(), self.left_bytes()))?;
        host.discard();
        Ok(Tensor::from_buffer(copy, host.shape(), host.dtype()))
    }

    /// Refuses what the machine cannot hold.
    fn check_room(&self, size_bytes: usize, what: &dyn Fn() -> String) -> Result<(), BackendError> {
        if size_bytes < SMALL_BYTES {
            return Ok(());
        }
        match self.left_bytes() {
            Some(left) if size_bytes > left => Err(out_of_memory(size_bytes, what(), Some(left))),
            _ => Ok(()),
        }
    }
}

fn out_of_memory(requested_bytes: usize, what: String, left: Option<usize>) -> BackendError {
    let left = left.map_or(String::new(), |left| format!("{left} bytes are left; "));
    let hint = format!(
        "{left}lower --max-model-len, --max-num-seqs, --max-num-batched-tokens or --max-total-tokens, or take a smaller model"
    );
    BackendError::OutOfMemory { device: "cpu".to_owned(), what, requested_bytes, hint }
}

const ALL_FORMATS: [WeightFormat; 4] =
    [WeightFormat::Dense, WeightFormat::Fp8Block, WeightFormat::Int8Group, WeightFormat::Int4Group];

impl Backend for Cpu {
    type Buffer = Buffer;
    type Graph = Infallible;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn host_threads(&self) -> Option<usize> {
        Some(self.threads)
    }

    fn describe(&self) -> String {
        let plural = if self.threads == 1 { "" } else { "s" };
        let weights = match self.weight_memory {
            WeightMemory::InPlace => "",
            WeightMemory::HugePages => ", weights copied into huge pages",
        };
        let nodes = match self.numa.as_ref().map(Interleave::num_nodes) {
            None => String::new(),
            Some(1) => " on one NUMA node".to_owned(),
            Some(nodes) => format!(" on {nodes} NUMA nodes"),
        };
        format!("cpu: {}, {} thread{plural}{nodes}{weights}", self.isa(), self.threads)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            activation_dtypes: vec![DType::F32, DType::BF16],
            weight_formats: ALL_FORMATS.to_vec(),
            expert_formats: ALL_FORMATS.to_vec(),
            attention: vec![AttentionKind::Mla, AttentionKind::Gqa],
            cache_dtypes: vec![DType::F32, DType::BF16, DType::F8E4M3],
            fp8_activations: false,
            int8_activations: self.int8_activations,
            asynchronous: false,
            batch_invariant: true,
            captures: false,
        }
    }

    fn free_bytes(&self) -> Option<usize> {
        let mapped = self.mapped_bytes.load(Ordering::Relaxed);
        self.left_bytes().map(|left| left.saturating_sub(mapped))
    }

    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor<Self>, BackendError> {
        let what = || format!("a tensor {shape:?} {dtype}");
        let size_bytes = shape
            .iter()
            .try_fold(dtype.size_bytes(), |size, &dim| size.checked_mul(dim))
            .ok_or_else(|| out_of_memory(usize::MAX, what(), self.left_bytes()))?;
        self.check_room(size_bytes, &what)?;
        let buffer = Buffer::zeroed(size_bytes, self.numa.as_ref(), &self.owned_bytes)
            .ok_or_else(|| out_of_memory(size_bytes, what(), self.left_bytes()))?;
        Ok(Tensor::from_buffer(buffer, shape, dtype))
    }

    fn import(&self, host: &HostTensor) -> Result<Tensor<Self>, BackendError> {
        let bytes = host.bytes();
        let in_place = bytes.as_ptr().addr().is_multiple_of(host.dtype().size_bytes());
        let buffer = if in_place {
            if !host.owner().0.is_resident() {
                match &self.numa {
                    Some(numa) => numa.reading(|| host.will_read()),
                    None => host.will_read(),
                }
                self.mapped_bytes.fetch_add(bytes.len(), Ordering::Relaxed);
            }
            Buffer::host(host.clone())
        } else {
            let what = || format!("a copy of misaligned weights {:?} {}", host.shape(), host.dtype());
            self.check_room(bytes.len(), &what)?;
            let copy = Buffer::copied(bytes, self.numa.as_ref(), &self.owned_bytes)
                .ok_or_else(|| out_of_memory(bytes.len(), what(), self.left_bytes()))?;
            host.discard();
            copy
        };
        Ok(Tensor::from_buffer(buffer, host.shape(), host.dtype()))
    }

    fn import_matrix(&self, host: &HostTensor) -> Result<Tensor<Self>, BackendError> {
        // What the host has made for this call, codes of a quantized weight, say, costs one copy more and lies better then. Where
        // there is no room for the copy, it stays where it is.
        let made = host.owner().0.is_resident();
        let in_place = self.weight_memory == WeightMemory::InPlace;
        if host.bytes().is_empty() || in_place && !made {
            return self.import(host);
        }
        match self.copy_to_huge_pages(host) {
            Err(_) if in_place => self.import(host),
            copied => copied,
        }
    }

    fn upload(&self, src: HostSlice<'_>, dst: &Tensor<Self>) {
        ops::host::upload(self, src, dst);
    }

    fn download(&self, src: &Tensor<Self>, dst: HostSliceMut<'_>) -> Result<(), BackendError> {
        ops::host::download(self, src, dst);
        Ok(())
    }

    fn flush(&self) -> Ticket {
        Ticket::ready(Ok(()))
    }

    fn feed_tokens(&self, drawn: &Tensor<Self>, from: &Tensor<Self>, ids: &Tensor<Self>) {
        ops::rows::feed_tokens(drawn, from, ids);
    }

    fn embed(&self, ids: &Tensor<Self>, table: &Tensor<Self>, first_row: usize, out: &Tensor<Self>) {
        ops::rows::embed(self, ids, table, first_row, out);
    }

    fn rms_norm(&self, x: &Tensor<Self>, weight: &Tensor<Self>, eps: f32, out: &Activation<Self>) {
        ops::norm::rms_norm(self, x, weight, eps, out);
    }

    fn quantize(&self, x: &Activation<Self>) {
        r1_backend::shape::quantize(x);
        ops::refuse_fp8("quantize", "x", x);
    }

    fn linear(&self, x: &Activation<Self>, w: &Weight<Self>, out: &Tensor<Self>) {
        ops::linear::linear(self, x, w, out);
    }

    fn per_head(&self, x: &Tensor<Self>, w: &HeadWeight<Self>, out: &Tensor<Self>) {
        ops::per_head::per_head(self, x, w, out);
    }

    fn rope_cache(
        &self,
        q_rope: &Tensor<Self>,
        kv_a: &Tensor<Self>,
        norm: &Tensor<Self>,
        eps: f32,
        rope: &RopeTable<Self>,
        batch: &Batch<Self>,
        cache: &LatentCache<Self>,
    ) {
        ops::rope::rope_cache(self, q_rope, kv_a, norm, eps, rope, batch, cache);
    }

    fn mla_attention(
        &self,
        q_latent: &Tensor<Self>,
        q_rope: &Tensor<Self>,
        cache: &LatentCache<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        scale: f32,
        out: &Tensor<Self>,
    ) {
        ops::attention::mla_attention(self, q_latent, q_rope, cache, batch, &seqs, scale, out);
    }

    fn gather_latent(
        &self,
        cache: &LatentCache<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        out: &Tensor<Self>,
    ) {
        ops::rows::gather_latent(self, cache, batch, &seqs, out);
    }

    fn mla_attention_expanded(
        &self,
        q: &Tensor<Self>,
        kv: &Tensor<Self>,
        k_rope: &Tensor<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        scale: f32,
        out: &Tensor<Self>,
    ) {
        ops::expanded::mla_attention_expanded(self, q, kv, k_rope, batch, &seqs, scale, out);
    }

    fn rope_cache_gqa(
        &self,
        q: &Tensor<Self>,
        k: &Tensor<Self>,
        v: &Tensor<Self>,
        rope: &RopeTable<Self>,
        batch: &Batch<Self>,
        cache: &KvCache<Self>,
    ) {
        ops::gqa::rope_cache_gqa(self, q, k, v, rope, batch, cache);
    }

    fn gqa_attention(
        &self,
        q: &Tensor<Self>,
        cache: &KvCache<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        scale: f32,
        out: &Tensor<Self>,
    ) {
        ops::gqa::gqa_attention(self, q, cache, batch, &seqs, scale, out);
    }

    fn route(
        &self,
        logits: &Tensor<Self>,
        bias: Option<&Tensor<Self>>,
        routing: &Routing,
        ids: &Tensor<Self>,
        weights: &Tensor<Self>,
    ) {
        ops::route::route(self, logits, bias, routing, ids, weights);
    }

    fn experts(
        &self,
        x: &Activation<Self>,
        ids: &Tensor<Self>,
        weights: &Tensor<Self>,
        experts: &Experts<Self>,
        out: &Tensor<Self>,
    ) {
        ops::experts::experts(self, x, ids, weights, experts, out);
    }

    fn silu_mul(&self, gate_up: &Tensor<Self>, out: &Activation<Self>) {
        ops::norm::silu_mul(self, gate_up, out);
    }

    fn add(&self, residual: &Tensor<Self>, x: &Tensor<Self>) {
        ops::norm::add(self, residual, x);
    }

    fn gather_rows(&self, x: &Tensor<Self>, rows: &Tensor<Self>, out: &Tensor<Self>) {
        ops::rows::gather_rows(self, x, rows, out);
    }

    fn sample(&self, logits: &Tensor<Self>, sampling: &SamplingBatch, out: &Tensor<Self>) {
        ops::sample::sample(self, logits, sampling, out);
    }

    fn logprobs(&self, logits: &Tensor<Self>, tokens: &Tensor<Self>, out: &LogprobsOut<Self>) {
        ops::logprobs::logprobs(self, logits, tokens, out);
    }

    fn add_rms_norm(
        &self,
        residual: &Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
        out: &Activation<Self>,
    ) {
        ops::norm::add_rms_norm(self, residual, x, weight, eps, out);
    }

    fn replay(&self, graph: &Infallible) {
        match *graph {}
    }
}
