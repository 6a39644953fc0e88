//! A tensor: a shared handle to device memory with shape, strides and dtype. Views cost nothing and copy nothing.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use r1_core::DType;

use crate::Backend;

/// Up to four sizes or strides, inline, so that views allocate nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    len: u8,
    sizes: [usize; 4],
}

impl Dims {
    /// # Panics
    /// With more than four dimensions.
    pub fn new(sizes: &[usize]) -> Self {
        assert!(sizes.len() <= 4, "tensors have at most 4 dimensions, not {sizes:?}");
        let mut out = [0; 4];
        out[..sizes.len()].copy_from_slice(sizes);
        Self { len: sizes.len() as u8, sizes: out }
    }

    /// As a slice.
    pub fn as_slice(&self) -> &[usize] {
        &self.sizes[..self.len as usize]
    }

    fn set(&mut self, dim: usize, size: usize) {
        self.sizes[..self.len as usize][dim] = size;
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().fmt(f)
    }
}

/// Device memory seen as an array. Clones and views share the memory; operations write through them.
///
/// The last dimension is always contiguous (stride 1); earlier strides may skip, so a range of columns is a view.
pub struct Tensor<B: Backend> {
    buffer: Arc<B::Buffer>,
    offset: usize,
    shape: Dims,
    strides: Dims,
    dtype: DType,
}

impl<B: Backend> Clone for Tensor<B> {
    fn clone(&self) -> Self {
        Self { buffer: self.buffer.clone(), ..*self }
    }
}

impl<B: Backend> fmt::Debug for Tensor<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({:?} {} strides {:?} at {})", self.shape, self.dtype, self.strides, self.offset)
    }
}

impl<B: Backend> Tensor<B> {
    /// A whole buffer as a dense row-major tensor. For backends: nobody else makes buffers.
    ///
    /// # Panics
    /// With more than four dimensions.
    pub fn from_buffer(buffer: B::Buffer, shape: &[usize], dtype: DType) -> Self {
        let mut strides = Dims::new(shape);
        let mut stride = 1;
        for dim in (0..shape.len()).rev() {
            strides.set(dim, stride);
            stride *= shape[dim];
        }
        Self { buffer: Arc::new(buffer), offset: 0, shape: Dims::new(shape), strides, dtype }
    }

    /// The memory. Element `(i, j, …)` lies at `offset() + i * strides()[0] + j * strides()[1] + …`.
    pub fn buffer(&self) -> &B::Buffer {
        &self.buffer
    }

    /// Index of the first element in the buffer, in elements.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Sizes.
    pub fn shape(&self) -> &[usize] {
        self.shape.as_slice()
    }

    /// Size of one dimension.
    pub fn dim(&self, dim: usize) -> usize {
        self.shape()[dim]
    }

    /// Distances between neighbours, in elements.
    pub fn strides(&self) -> &[usize] {
        self.strides.as_slice()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// Whether elements follow each other without gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut stride = 1;
        for (&size, &have) in self.shape().iter().zip(self.strides()).rev() {
            if size != 1 && have != stride {
                return false;
            }
            stride *= size;
        }
        true
    }

    /// Whether both look at the same buffer.
    pub fn shares_buffer(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer)
    }

    /// Elements `range` of dimension `dim`.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn narrow(&self, dim: usize, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.dim(dim),
            "narrow: {range:?} of dimension {dim} in {:?}",
            self.shape
        );
        let mut view = self.clone();
        view.offset += range.start * self.strides()[dim];
        view.shape.set(dim, range.len());
        view
    }

    /// Rows `range` of the first dimension.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn rows(&self, range: Range<usize>) -> Self {
        self.narrow(0, range)
    }

    /// The last dimension split into `parts`: `[T, H * D]` as `[T, H, D]`, also when rows have gaps.
    ///
    /// # Panics
    /// When the sizes do not multiply to the last dimension.
    pub fn split_last(&self, parts: &[usize]) -> Self {
        let (&last, front) = self.shape().split_last().expect("split_last: a tensor without dimensions");
        assert!(!parts.is_empty(), "split_last: no parts");
        assert_eq!(last, parts.iter().product::<usize>(), "split_last: {parts:?} of {:?}", self.shape);
        let len = front.len() + parts.len();
        assert!(len <= 4, "split_last: {parts:?} of {:?} has more than 4 dimensions", self.shape);
        let (mut shape, mut strides) = ([0; 4], [0; 4]);
        shape[..front.len()].copy_from_slice(front);
        shape[front.len()..len].copy_from_slice(parts);
        strides[..front.len()].copy_from_slice(&self.strides()[..front.len()]);
        for (i, stride) in strides[front.len()..len].iter_mut().enumerate() {
            *stride = parts[i + 1..].iter().product();
        }
        Self { shape: Dims::new(&shape[..len]), strides: Dims::new(&strides[..len]), ..self.clone() }
    }

    /// The dense elements under another shape of equal size.
    ///
    /// # Panics
    /// When there are gaps, or the sizes differ.
    pub fn reshape(&self, shape: &[usize]) -> Self {
        assert!(self.is_contiguous(), "reshape: {self:?} has gaps");
        assert_eq!(
            shape.iter().product::<usize>(),
            self.num_elements(),
            "reshape: {shape:?} of {:?}",
            self.shape
        );
        let mut strides = Dims::new(shape);
        let mut stride = 1;
        for dim in (0..shape.len()).rev() {
            strides.set(dim, stride);
            stride *= shape[dim];
        }
        Self { shape: Dims::new(shape), strides, ..self.clone() }
    }
}
