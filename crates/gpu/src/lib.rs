//! The GPU backend: buffers, one arena, one stream, and a launch per operation, over whichever driver there is.
//!
//! The kernels are in `kernels/`, written once for CUDA, HIP and the host; `ops` chooses geometry and fills their argument
//! structs. Knows no models.

mod arena;
mod comm;
mod devices;
mod driver;
mod host;
mod kernels;
mod launch;
mod ops;
mod staging;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use r1_backend::{
    Activation, AttentionKind, Backend, BackendError, Batch, Capabilities, Communicator, Experts, HeadWeight,
    HostSlice, HostSliceMut, HostTensor, KvCache, LatentCache, LogprobsOut, MemoryUse, MlpScratch,
    MlpWeights, MoeScratch, MoeWeights, QkvScratch, QkvWeights, RopeTable, Routing, SamplingBatch, Tensor,
    Ticket, Weight, WeightFormat,
};
use r1_core::DType;

pub use comm::Ranks;
pub use devices::{Found, devices};
pub use driver::DriverError;

use arena::Arena;
use driver::emu::{Emu, EmuOptions};
use driver::{DevicePtr, Driver, ReadOrder, RecordedGraph};
use staging::Staging;

/// Of an emulated device: scratch is lent untouched, so it costs what is used.
const EMU_SCRATCH_BYTES: usize = 64 << 20;
/// Counters of [`Gpu::counters`].
const COUNTERS: usize = 16_384;

/// The host's memory.
fn host_memory_bytes() -> usize {
    // SAFETY: reads two numbers of the system.
    let (pages, page_bytes) =
        unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    usize::try_from(pages).unwrap_or(0).saturating_mul(usize::try_from(page_bytes).unwrap_or(0))
}

/// Device memory of a tensor.
pub struct Buffer {
    range: Arc<arena::Range>,
}

impl Buffer {
    pub(crate) fn at(&self) -> DevicePtr {
        self.range.at()
    }
}

/// A captured step.
pub struct Graph {
    recorded: RecordedGraph,
    kernels: Vec<&'static str>,
}

impl Graph {
    /// The kernels that it launches, in order.
    pub fn kernels(&self) -> &[&'static str] {
        &self.kernels
    }
}

/// A GPU as a device: work is enqueued on one stream and runs behind the caller's back.
pub struct Gpu {
    driver: Arc<dyn Driver>,
    arena: Arc<Arena>,
    scratch: arena::Range,
    scratch_bytes: usize,
    counters: arena::Range,
    staging: Staging,
    /// Parameters of the rows that are drawn from.
    sampling: Mutex<ops::sample::Room>,
    /// Names of the launches of the step that is being captured.
    recorded: Mutex<Option<Vec<&'static str>>>,
    /// The first failure since the last flush that was known when its work was enqueued.
    failure: Mutex<Option<BackendError>>,
}

impl Gpu {
    /// An emulated device that runs the kernels on `threads` threads of the host and lends `memory_bytes` as device memory.
    pub fn emulated(threads: usize, memory_bytes: usize) -> Result<Self, DriverError> {
        let driver = Emu::new(EmuOptions { threads, memory_bytes })?;
        Self::new(Arc::new(driver), memory_bytes, EMU_SCRATCH_BYTES)
    }

    /// `devices` emulated devices that share the host: its cores, and half of its memory, which they only take as they use it.
    pub fn emulated_on_host(threads: Option<usize>, devices: usize) -> Result<Vec<Self>, DriverError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (threads.unwrap_or(cores) / devices).max(1);
        let memory_bytes = host_memory_bytes() / 2 / devices;
        (0..devices).map(|_| Self::emulated(threads, memory_bytes)).collect()
    }

    fn new(driver: Arc<dyn Driver>, memory_bytes: usize, scratch_bytes: usize) -> Result<Self, DriverError> {
        let arena = Arena::new(driver.reserve(memory_bytes)?, memory_bytes);
        let counter_bytes = COUNTERS * size_of::<u32>();
        let sampling_bytes = ops::sample::Room::USUAL_BYTES;
        let short = || DriverError::OutOfMemory {
            requested_bytes: scratch_bytes + counter_bytes + sampling_bytes,
            free_bytes: memory_bytes,
            total_bytes: driver.info().total_bytes,
        };
        let scratch = arena.take(scratch_bytes).ok_or_else(short)?;
        let counters = arena.take(counter_bytes).ok_or_else(short)?;
        driver.fill(counters.at(), counter_bytes, 0)?;
        let sampling = Mutex::new(ops::sample::Room::new(arena.take(sampling_bytes).ok_or_else(short)?));
        let staging = Staging::new(driver.clone());
        let failure = Mutex::new(None);
        Ok(Self {
            driver,
            arena,
            scratch,
            scratch_bytes,
            counters,
            staging,
            sampling,
            recorded: Mutex::new(None),
            failure,
        })
    }

    /// Most scratch memory that an operation may use.
    pub(crate) fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    fn failed(&self, op: &'static str, error: &DriverError) -> BackendError {
        BackendError::Failed { device: self.driver.info().name.clone(), op, why: error.to_string() }
    }

    /// Keeps a failure until the step is closed.
    fn note(&self, op: &'static str, result: Result<(), DriverError>) {
        if let Err(error) = result {
            let failed = self.failed(op, &error);
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failed);
        }
    }

    fn take_failure(&self) -> Option<BackendError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Weights that are on their way come before what is enqueued next.
    fn settle_weights(&self) {
        self.note("import", self.staging.settle());
    }

    /// Memory that holds anything.
    fn buffer(&self, shape: &[usize], dtype: DType) -> Result<(Buffer, usize), BackendError> {
        let size = shape.iter().try_fold(dtype.size_bytes(), |size, &dim| size.checked_mul(dim));
        let size_bytes = size.unwrap_or(usize::MAX);
        let range = self.arena.take(size_bytes).ok_or_else(|| {
            let (used, total) = (self.arena.used_bytes(), self.arena.size_bytes());
            BackendError::OutOfMemory {
                device: self.driver.info().name.clone(),
                what: format!("a tensor {shape:?} {dtype}"),
                requested_bytes: size_bytes,
                hint: format!(
                    "{used} of {total} bytes are used, {} are free in one piece; lower --max-model-len, --max-num-seqs, \
                     --max-num-batched-tokens or --max-total-tokens, raise --tp, or take a smaller model",
                    self.arena.largest_free_bytes()
                ),
            }
        })?;
        Ok((Buffer { range: Arc::new(range) }, size_bytes))
    }
}

impl Backend for Gpu {
    type Buffer = Buffer;
    type Graph = Graph;

    fn name(&self) -> &'static str {
        self.driver.info().driver
    }

    fn describe(&self) -> String {
        let info = self.driver.info();
        format!("{}: {} ({})", self.name(), info.name, info.arch)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            activation_dtypes: vec![DType::F32, DType::BF16],
            cache_dtypes: vec![DType::F32, DType::BF16, DType::F8E4M3],
            fp8_activations: self.driver.info().fp8,
            int8_activations: false,
            asynchronous: true,
            captures: true,
            batch_invariant: true,
            weight_formats: vec![WeightFormat::Dense, WeightFormat::Fp8Block, WeightFormat::Int4Group],
            expert_formats: vec![WeightFormat::Dense, WeightFormat::Fp8Block],
            attention: vec![AttentionKind::Mla, AttentionKind::Gqa],
        }
    }

    fn memory(&self) -> Option<MemoryUse> {
        let (total_bytes, used_bytes) = (self.arena.size_bytes(), self.arena.used_bytes());
        Some(MemoryUse { total_bytes, used_bytes })
    }

    fn free_bytes(&self) -> Option<usize> {
        Some(self.arena.largest_free_bytes())
    }

    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor<Self>, BackendError> {
        let (buffer, size_bytes) = self.buffer(shape, dtype)?;
        self.driver.fill(buffer.at(), size_bytes, 0).map_err(|error| self.failed("alloc", &error))?;
        Ok(Tensor::from_buffer(buffer, shape, dtype))
    }

    fn import(&self, host: &HostTensor) -> Result<Tensor<Self>, BackendError> {
        let (buffer, _) = self.buffer(host.shape(), host.dtype())?;
        self.staging.load(host, &buffer.range).map_err(|error| self.failed("import", &error))?;
        Ok(Tensor::from_buffer(buffer, host.shape(), host.dtype()))
    }

    fn import_widened(
        &self,
        data: &HostTensor,
        scales: &HostTensor,
        block: [usize; 2],
        offset: [usize; 2],
    ) -> Result<Option<Tensor<Self>>, BackendError> {
        ops::widen::import_widened(self, data, scales, block, offset).map(Some)
    }

    fn upload(&self, src: HostSlice<'_>, dst: &Tensor<Self>) {
        host::upload(self, src, dst);
    }

    fn download(&self, src: &Tensor<Self>, dst: HostSliceMut<'_>) -> Result<(), BackendError> {
        host::download(self, src, dst, ReadOrder::AfterAll)
    }

    fn read_back(&self, src: &Tensor<Self>, dst: HostSliceMut<'_>) -> Result<(), BackendError> {
        host::download(self, src, dst, ReadOrder::AtOnce)
    }

    fn flush(&self) -> Ticket {
        self.settle_weights();
        let known = self.take_failure();
        let device = self.driver.info().name.clone();
        let mark = self.driver.mark();
        let failed =
            move |error: DriverError| BackendError::Failed { device, op: "step", why: error.to_string() };
        match (known, mark) {
            (Some(failure), Ok(mark)) => Ticket::waiting(move || {
                // Waited for all the same: what follows starts from a stream that is done.
                let _ = mark.wait();
                Err(failure)
            }),
            (Some(failure), Err(_)) => Ticket::ready(Err(failure)),
            (None, Ok(mark)) => Ticket::waiting(move || mark.wait().map_err(failed)),
            (None, Err(error)) => Ticket::ready(Err(failed(error))),
        }
    }

    fn feed_tokens(&self, drawn: &Tensor<Self>, from: &Tensor<Self>, ids: &Tensor<Self>) {
        ops::rows::feed_tokens(self, drawn, from, ids);
    }

    fn embed(&self, ids: &Tensor<Self>, table: &Tensor<Self>, first_row: usize, out: &Tensor<Self>) {
        ops::rows::embed(self, ids, table, first_row, out);
    }

    fn rms_norm(&self, x: &Tensor<Self>, weight: &Tensor<Self>, eps: f32, out: &Activation<Self>) {
        ops::norm::rms_norm(self, x, weight, eps, out);
    }

    fn quantize(&self, x: &Activation<Self>) {
        ops::norm::quantize(self, x);
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

    fn mla_attend(
        &self,
        q_latent: &Tensor<Self>,
        q_rope: &Tensor<Self>,
        cache: &LatentCache<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        scale: f32,
        w_uv: &HeadWeight<Self>,
        o_latent: &Tensor<Self>,
        attended: &Activation<Self>,
    ) {
        ops::attend::mla_attend(self, q_latent, q_rope, cache, batch, &seqs, scale, w_uv, o_latent, attended);
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

    fn gather_latent(
        &self,
        cache: &LatentCache<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        out: &Tensor<Self>,
    ) {
        ops::rope::gather_latent(self, cache, batch, &seqs, out);
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

    fn expert_table(
        &self,
        local: &[r1_backend::MlpWeights<Self>],
    ) -> Result<Option<Tensor<Self>>, BackendError> {
        ops::experts::expert_table(self, local).map(Some)
    }

    fn moe_layer(
        &self,
        x: &Activation<Self>,
        w: &MoeWeights<Self>,
        scratch: &MoeScratch<Self>,
        out: &Tensor<Self>,
    ) {
        ops::experts::moe_layer(self, x, w, scratch, out);
    }

    fn silu_mul(&self, gate_up: &Tensor<Self>, out: &Activation<Self>) {
        ops::norm::silu_mul(self, gate_up, out);
    }

    fn mla_qkv(
        &self,
        x: &Activation<Self>,
        w: &QkvWeights<Self>,
        scratch: &QkvScratch<Self>,
        q: &Tensor<Self>,
        kv_a: &Tensor<Self>,
    ) {
        ops::fused::mla_qkv(self, x, w, scratch, q, kv_a);
    }

    fn mla_absorb(
        &self,
        q: &Tensor<Self>,
        kv_a: &Tensor<Self>,
        norm: &Tensor<Self>,
        eps: f32,
        rope: &RopeTable<Self>,
        batch: &Batch<Self>,
        cache: &LatentCache<Self>,
        w_uk: &HeadWeight<Self>,
        q_latent: &Tensor<Self>,
    ) {
        ops::absorb::mla_absorb(self, q, kv_a, norm, eps, rope, batch, cache, w_uk, q_latent);
    }

    fn linear_add_norm(
        &self,
        comm: &dyn Communicator<Self>,
        x: &Activation<Self>,
        w: &Weight<Self>,
        block_out: &Tensor<Self>,
        residual: &Tensor<Self>,
        norm: &Tensor<Self>,
        eps: f32,
        out: &Activation<Self>,
    ) {
        ops::linear_norm::linear_add_norm(self, comm, x, w, block_out, residual, norm, eps, out);
    }

    fn mlp(
        &self,
        x: &Activation<Self>,
        w: &MlpWeights<Self>,
        scratch: &MlpScratch<Self>,
        out: &Tensor<Self>,
    ) {
        ops::fused::mlp(self, x, w, scratch, out);
    }

    fn add(&self, residual: &Tensor<Self>, x: &Tensor<Self>) {
        ops::rows::add(self, residual, x);
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

    fn capture(&self, step: &mut dyn FnMut()) -> Result<Option<Graph>, BackendError> {
        // Neither weights that are on their way nor an older failure belong to this step.
        self.settle_weights();
        if let Some(failure) = self.take_failure() {
            return Err(failure);
        }
        self.driver.begin_capture().map_err(|error| self.failed("capture", &error))?;
        *self.recorded.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
        let run = catch_unwind(AssertUnwindSafe(step));
        let kernels = self.recorded.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        // Also after a panic: the stream would stay in capture.
        let recorded = self.driver.end_capture();
        if let Err(panic) = run {
            resume_unwind(panic);
        }
        // What the step itself could not enqueue says more than that the recording is spoilt.
        if let Some(failure) = self.take_failure() {
            return Err(failure);
        }
        let recorded = recorded.map_err(|error| self.failed("capture", &error))?;
        Ok(Some(Graph { recorded, kernels }))
    }

    fn replay(&self, graph: &Graph) {
        self.settle_weights();
        self.note("replay", self.driver.replay(&graph.recorded));
    }
}
