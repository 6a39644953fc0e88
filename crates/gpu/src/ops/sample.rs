//! Sampling. Kernels: `kernels/sample.cu`.

use std::sync::PoisonError;

use r1_backend::{RowSampling, SamplingBatch, Tensor, shape};

use crate::Gpu;
use crate::arena;
use crate::driver::{DevicePtr, DriverError, Rows};
use crate::launch::{Args, Geometry, is_vectorizable, ptr, stride};

const OP: &str = "sample";
/// Most tokens of a row, `MAX_ID + 1` in vocab.cuh.
const MAX_VOCAB: usize = 1 << 24;
/// No range of words, no adjusted copy.
const NONE: u32 = u32::MAX;
/// `sizeof(sample::Shared)`.
const SHARED_BYTES: usize = 2 * BEST_SCRATCH_BYTES + HISTOGRAM_BYTES;
/// `sizeof(vocab::BestScratch)`.
pub(super) const BEST_SCRATCH_BYTES: usize = 32 * 8;
/// `sizeof(vocab::Histogram)`.
pub(super) const HISTOGRAM_BYTES: usize = 1024 * (8 + 4) + 64 * 8 + 32;

/// Device memory for the parameters of one step's rows, and what they are put together in. It grows when a step brings more than
/// ever before.
pub(crate) struct Room {
    device: arena::Range,
    device_bytes: usize,
    host: Vec<u8>,
}

impl Room {
    /// Enough for a thousand rows with a bias or a penalty here and there. Masks of many rows and long lists of seen tokens outgrow
    /// it; what they need then comes from what the KV cache left.
    pub(crate) const USUAL_BYTES: usize = 1 << 20;

    /// With [`USUAL_BYTES`](Self::USUAL_BYTES) of device memory.
    pub(crate) fn new(device: arena::Range) -> Self {
        Self { device, device_bytes: Self::USUAL_BYTES, host: Vec::new() }
    }

    /// Writes `host` to the device, and says where it is.
    fn upload(&mut self, gpu: &Gpu) -> Result<DevicePtr, DriverError> {
        let size_bytes = self.host.len();
        if size_bytes > self.device_bytes {
            let wanted = size_bytes.next_power_of_two();
            self.device = gpu.arena.take(wanted).ok_or_else(|| DriverError::OutOfMemory {
                requested_bytes: wanted,
                free_bytes: gpu.arena.largest_free_bytes(),
                total_bytes: gpu.arena.size_bytes(),
            })?;
            self.device_bytes = wanted;
        }
        gpu.driver.write(&self.host, Rows::dense(self.device.at(), size_bytes))?;
        Ok(self.device.at())
    }
}

/// `sizeof(sample::Row)`.
const ROW_BYTES: usize = 20 * size_of::<u32>();

fn put(host: &mut Vec<u8>, words: impl IntoIterator<Item = u32>) {
    words.into_iter().for_each(|word| host.extend_from_slice(&word.to_le_bytes()));
}

fn check(token: u32, vocab: usize, what: &str) {
    assert!((token as usize) < vocab, "{OP}: {what} for token {token} of {vocab}");
}

/// Puts rows, then the words that they point to, into `host`. `copies` says which adjusted copy a row has.
fn pack(host: &mut Vec<u8>, sampling: &SamplingBatch, copies: &[u32], vocab: usize) {
    host.clear();
    let mut next = 0;
    let mut take = |words: usize| {
        let at = next;
        next += u32::try_from(words).expect("fewer words than 2^32");
        at
    };
    for (row, &copy) in sampling.rows.iter().zip(copies) {
        let floats = [row.temperature, row.top_p, row.min_p].map(f32::to_bits);
        let penalties =
            [row.repetition_penalty, row.presence_penalty, row.frequency_penalty].map(f32::to_bits);
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        let (num_bias, num_seen) = (row.bias.len(), row.seen.len());
        let lists = [take(2 * num_bias), num_bias as u32, take(2 * num_seen), num_seen as u32];
        let mask = row.mask.as_ref().map_or(NONE, |words| take(words.len()));
        let before = host.len();
        put(host, floats.into_iter().chain([row.top_k]).chain(penalties).chain([copy]));
        put(host, halves(row.seed).into_iter().chain(halves(row.position)).chain(lists));
        put(host, [mask, 0, 0, 0]);
        assert_eq!(host.len() - before, ROW_BYTES);
    }
    for row in &sampling.rows {
        let mut bias = sampling.bias[row.bias.clone()].to_vec();
        // A token's entries side by side, in their order.
        bias.sort_by_key(|entry| entry.0);
        for (token, bias) in bias {
            check(token, vocab, "bias");
            put(host, [token, bias.to_bits()]);
        }
        for seen in &sampling.seen[row.seen.clone()] {
            check(seen.token, vocab, "penalty");
            put(host, [seen.token, seen.output_count]);
        }
        if let Some(words) = &row.mask {
            let words = &sampling.mask[words.clone()];
            assert!(
                words.len() == vocab.div_ceil(32),
                "{OP}: a mask of {} words for {vocab} tokens",
                words.len()
            );
            put(host, words.iter().copied());
        }
    }
}

/// Whether a row is drawn from other logits than it was given.
fn is_adjusted(row: &RowSampling) -> bool {
    row.mask.is_some() || !row.bias.is_empty() || !row.seen.is_empty()
}

/// Warps for a row of `vocab` logits; they depend on nothing else.
pub(super) fn row_warps(gpu: &Gpu, vocab: usize) -> u32 {
    const MAX_THREADS: u32 = 1024;
    // Four loads of four per thread.
    vocab.div_ceil(16 * gpu.warp_size() as usize).clamp(1, (MAX_THREADS / gpu.warp_size()) as usize) as u32
}

pub(super) fn check_vocab(op: &str, vocab: usize) {
    assert!(0 < vocab && vocab <= MAX_VOCAB, "{op}: a vocabulary of {vocab}, it takes 1 to {MAX_VOCAB}");
}

#[derive(Clone, Copy)]
#[repr(C)]
struct SampleArgs {
    logits: DevicePtr,
    adjusted: DevicePtr,
    rows: DevicePtr,
    words: DevicePtr,
    out: DevicePtr,
    logits_stride: i64,
    adjusted_stride: i64,
    vocab: u32,
    vectors: u32,
}

// SAFETY: the twin of sample::Args.
unsafe impl Args for SampleArgs {}

pub(crate) fn sample(gpu: &Gpu, logits: &Tensor<Gpu>, sampling: &SamplingBatch, out: &Tensor<Gpu>) {
    shape::sample(logits, sampling, out);
    if sampling.rows.is_empty() {
        return;
    }
    let vocab = logits.dim(1);
    check_vocab(OP, vocab);
    // Copies begin at the addresses of vectors.
    let copy_stride = vocab.next_multiple_of(4);
    let copies_at_once = gpu.scratch_bytes() / (copy_stride * size_of::<f32>());
    assert!(
        copies_at_once > 0,
        "{OP}: {vocab} logits are more than {} bytes of scratch",
        gpu.scratch_bytes()
    );

    // Where each launch begins, and the copies of its rows.
    let (mut starts, mut copies, mut used) = (vec![0], Vec::with_capacity(sampling.rows.len()), 0);
    for (index, row) in sampling.rows.iter().enumerate() {
        if !is_adjusted(row) {
            copies.push(NONE);
            continue;
        }
        if used == copies_at_once {
            starts.push(index);
            used = 0;
        }
        copies.push(used as u32);
        used += 1;
    }
    let mut room = gpu.sampling.lock().unwrap_or_else(PoisonError::into_inner);
    pack(&mut room.host, sampling, &copies, vocab);
    let parameters = match room.upload(gpu) {
        Ok(at) => at,
        Err(error) => return gpu.note(OP, Err(error)),
    };
    let adjusted = gpu.scratch(copies_at_once.min(sampling.rows.len()) * copy_stride * size_of::<f32>());
    let ends = starts[1..].iter().copied().chain([sampling.rows.len()]);
    for (start, end) in starts.iter().copied().zip(ends) {
        let args = SampleArgs {
            logits: ptr(&logits.rows(start..end)),
            adjusted,
            rows: parameters.offset(start * ROW_BYTES),
            words: parameters.offset(sampling.rows.len() * ROW_BYTES),
            out: ptr(&out.rows(start..end)),
            logits_stride: stride(logits, 0),
            adjusted_stride: copy_stride as i64,
            vocab: vocab as u32,
            vectors: row_vectors(logits),
        };
        let warps = row_warps(gpu, vocab);
        gpu.launch(
            "sample_rows",
            Geometry { grid: [end - start, 1, 1], warps, shared_bytes: SHARED_BYTES },
            &args,
        );
    }
}

/// Whether rows begin at the addresses of vectors; their ends do not matter.
pub(super) fn row_vectors(logits: &Tensor<Gpu>) -> u32 {
    let whole = logits.dim(1) / 4 * 4;
    is_vectorizable(&logits.narrow(1, 0..whole)).into()
}
