//! The latent cache as kernels see it: entries are read and written whole, in F32, whichever form they are kept in.
//! Knows neither sequences nor block tables.

use r1_backend::LatentCache;
use r1_core::DType;

use crate::Cpu;
use crate::simd::Simd;
use crate::view::{Cube, CubeMut, In, Mat, Out};

/// Channels per scale of the FP8 form.
const GROUP: usize = 128;
/// The largest E4M3 value.
const FP8_MAX: f32 = 448.0;
/// Least largest magnitude of a group, so that a group of zeros has a scale.
const MIN_AMAX: f32 = 1e-4;

/// A cache borrowed for reading.
pub(crate) struct LatentIn<'a> {
    data: In<'a>,
    /// Scales and rotated keys.
    fp8: Option<[In<'a>; 2]>,
}

impl<'a> LatentIn<'a> {
    #[track_caller]
    pub(crate) fn new(op: &str, cache: &'a LatentCache<Cpu>) -> Self {
        let data = In::new(op, "cache", &cache.data);
        let fp8 = cache
            .fp8
            .as_ref()
            .map(|fp8| [In::new(op, "cache.scales", &fp8.scales), In::new(op, "cache.rope", &fp8.rope)]);
        Self { data, fp8 }
    }

    pub(crate) fn entries(&self) -> Entries<'_> {
        Entries { data: self.data.cube(), fp8: self.fp8.as_ref().map(|parts| parts.each_ref().map(In::cube)) }
    }
}

/// Readable entries `[num_blocks, block_size, C + R]`.
#[derive(Clone, Copy)]
pub(crate) struct Entries<'a> {
    data: Cube<'a>,
    fp8: Option<[Cube<'a>; 2]>,
}

impl Entries<'_> {
    pub(crate) fn num_blocks(&self) -> usize {
        self.data.shape[0]
    }

    pub(crate) fn block_size(&self) -> usize {
        self.data.shape[1]
    }

    /// Whether entries are BF16 as they lie.
    pub(crate) fn are_bf16(&self) -> bool {
        self.fp8.is_none() && self.data.dtype == DType::BF16
    }

    /// Entries `offset..offset + n` of `block` as they lie, of a cache that is not FP8.
    pub(crate) fn rows(&self, block: usize, offset: usize, n: usize) -> Mat<'_> {
        assert!(self.fp8.is_none(), "an entry of an FP8 cache lies in parts");
        self.data.outer(block).slice(offset..offset + n)
    }

    /// Reads the entry at `offset` of `block`: codes times their scales, each product rounded once.
    #[inline(always)]
    pub(crate) fn read<S: Simd>(&self, s: S, block: usize, offset: usize, entry: &mut [f32]) {
        let data = self.data.outer(block);
        let Some([scales, rope]) = &self.fp8 else {
            data.read(s, offset, 0, entry);
            return;
        };
        let (latent, keys) = entry.split_at_mut(data.cols);
        let scales = scales.outer(block).f32_row(offset);
        for (i, (group, &scale)) in latent.chunks_mut(GROUP).zip(scales).enumerate() {
            data.read_f8(s, offset, i * GROUP, scale, group);
        }
        rope.outer(block).read(s, offset, 0, keys);
    }
}

/// A cache borrowed for writing.
pub(crate) struct LatentOut<'a> {
    data: Out<'a>,
    /// Scales and rotated keys.
    fp8: Option<[Out<'a>; 2]>,
}

impl<'a> LatentOut<'a> {
    #[track_caller]
    pub(crate) fn new(op: &str, cache: &'a LatentCache<Cpu>) -> Self {
        let data = Out::new(op, "cache", &cache.data);
        let fp8 = cache
            .fp8
            .as_ref()
            .map(|fp8| [Out::new(op, "cache.scales", &fp8.scales), Out::new(op, "cache.rope", &fp8.rope)]);
        Self { data, fp8 }
    }

    pub(crate) fn entries(&mut self) -> EntriesMut<'_> {
        let fp8 = self.fp8.as_mut().map(|parts| parts.each_mut().map(Out::cube));
        EntriesMut { data: self.data.cube(), fp8 }
    }
}

/// Writable entries `[num_blocks, block_size, C + R]`.
#[derive(Clone, Copy)]
pub(crate) struct EntriesMut<'a> {
    data: CubeMut<'a>,
    fp8: Option<[CubeMut<'a>; 2]>,
}

impl EntriesMut<'_> {
    pub(crate) fn num_blocks(&self) -> usize {
        self.data.shape[0]
    }

    pub(crate) fn block_size(&self) -> usize {
        self.data.shape[1]
    }

    /// Writes the entry at `offset` of `block`, rounded once.
    ///
    /// # Safety
    /// No other task touches the entry at the same time.
    #[inline(always)]
    pub(crate) unsafe fn write<S: Simd>(&self, s: S, block: usize, offset: usize, entry: &[f32]) {
        let data = self.data.outer(block);
        let Some([scales, rope]) = &self.fp8 else {
            // SAFETY: the same contract.
            unsafe { data.write(s, offset, 0, entry) };
            return;
        };
        let (latent, keys) = entry.split_at(data.cols);
        // SAFETY: the scales are F32, and the same contract.
        let scales = unsafe { scales.outer(block).row_mut::<f32>(offset) };
        let mut quotients = [0.0; GROUP];
        for (i, (group, scale)) in latent.chunks(GROUP).zip(scales).enumerate() {
            *scale = group.iter().fold(MIN_AMAX, |amax, value| amax.max(value.abs())) / FP8_MAX;
            let quotients = &mut quotients[..group.len()];
            for (quotient, value) in quotients.iter_mut().zip(group) {
                *quotient = value / *scale;
            }
            // SAFETY: the same contract.
            unsafe { data.write(s, offset, i * GROUP, quotients) };
        }
        // SAFETY: the same contract.
        unsafe { rope.outer(block).write(s, offset, 0, keys) };
    }
}
