//! Host memory on its way to a backend: a checkpoint's bytes with shape and dtype. Knows no device.

use std::collections::TryReserveError;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use r1_core::DType;

/// Bytes that stay where they are while anyone holds them: a mapped file, or an owned allocation.
pub trait HostBytes: Send + Sync {
    /// All bytes.
    fn bytes(&self) -> &[u8];

    /// Whether they are memory of this process, which the system no longer counts as free, and not pages of a file, which it
    /// does.
    fn is_resident(&self) -> bool {
        false
    }

    /// Tells the owner that `range` will be read soon, and again and again: a file is read now, so that no step waits for it.
    fn will_read(&self, _range: Range<usize>) {}

    /// Tells the owner that `range` was copied elsewhere and its pages may leave memory.
    /// Reading the range afterwards is allowed and gives the same bytes.
    fn discard(&self, _range: Range<usize>) {}
}

impl HostBytes for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }

    fn is_resident(&self) -> bool {
        true
    }
}

impl HostBytes for &'static [u8] {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A dense row-major tensor in host memory, shared and read-only.
#[derive(Clone)]
pub struct HostTensor {
    owner: Arc<dyn HostBytes>,
    range: Range<usize>,
    shape: Vec<usize>,
    dtype: DType,
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostTensor")
            .field("shape", &self.shape)
            .field("dtype", &self.dtype)
            .finish_non_exhaustive()
    }
}

impl HostTensor {
    /// Wraps `range` of `owner` as `shape` of `dtype`.
    ///
    /// # Panics
    /// When `range` is not exactly the shape's size in bytes or lies outside the owner.
    pub fn new(owner: Arc<dyn HostBytes>, range: Range<usize>, shape: &[usize], dtype: DType) -> Self {
        let size_bytes = shape.iter().product::<usize>() * dtype.size_bytes();
        assert_eq!(
            range.len(),
            size_bytes,
            "HostTensor: range has {} bytes, {shape:?} {dtype} takes {size_bytes}",
            range.len()
        );
        assert!(
            range.end <= owner.bytes().len(),
            "HostTensor: range {range:?} ends past {} bytes",
            owner.bytes().len()
        );
        Self { owner, range, shape: shape.to_vec(), dtype }
    }

    /// Owns `data` (little-endian elements).
    pub fn from_vec(data: Vec<u8>, shape: &[usize], dtype: DType) -> Self {
        let range = 0..data.len();
        Self::new(Arc::new(data), range, shape, dtype)
    }

    /// Owns `values` as F32.
    pub fn from_f32(values: &[f32], shape: &[usize]) -> Self {
        Self::from_vec(values.iter().flat_map(|v| v.to_le_bytes()).collect(), shape, DType::F32)
    }

    /// The elements' bytes, little-endian, row-major.
    pub fn bytes(&self) -> &[u8] {
        &self.owner.bytes()[self.range.clone()]
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Who keeps the bytes alive, and where in it they lie: for a backend that uses them in place.
    pub fn owner(&self) -> (&Arc<dyn HostBytes>, Range<usize>) {
        (&self.owner, self.range.clone())
    }

    /// Says that the bytes will be read where they are, soon and often.
    pub fn will_read(&self) {
        self.owner.will_read(self.range.clone());
    }

    /// Says that the bytes were copied and their pages may leave memory.
    pub fn discard(&self) {
        self.owner.discard(self.range.clone());
    }

    /// Rows `start..start + len` of the first dimension, without copying.
    ///
    /// # Panics
    /// When the rows do not exist.
    pub fn rows(&self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.shape[0], "HostTensor::rows: {start}+{len} past {:?}", self.shape);
        let row_bytes = self.shape[1..].iter().product::<usize>() * self.dtype.size_bytes();
        let from = self.range.start + start * row_bytes;
        let mut shape = self.shape.clone();
        shape[0] = len;
        Self { owner: self.owner.clone(), range: from..from + len * row_bytes, shape, dtype: self.dtype }
    }

    /// Columns `start..start + len` of a matrix, copied; an error where there is no room for the copy.
    ///
    /// # Panics
    /// When this is no matrix or the columns do not exist.
    pub fn columns(&self, start: usize, len: usize) -> Result<Self, TryReserveError> {
        let [rows, cols] = self.shape[..] else {
            panic!("HostTensor::columns: {:?} is no matrix", self.shape)
        };
        assert!(start + len <= cols, "HostTensor::columns: {start}+{len} past {cols}");
        let size = self.dtype.size_bytes();
        let bytes = self.bytes();
        let mut out = Vec::new();
        out.try_reserve_exact(rows * len * size)?;
        for row in 0..rows {
            let from = (row * cols + start) * size;
            out.extend_from_slice(&bytes[from..from + len * size]);
        }
        Ok(Self::from_vec(out, &[rows, len], self.dtype))
    }
}
