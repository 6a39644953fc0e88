//! Borrowed tensors as kernels see them: typed, strided, checked once against their memory.

use std::marker::PhantomData;
use std::ops::Range;

use half::f16;
use r1_backend::Tensor;
use r1_core::DType;

use crate::Cpu;
use crate::buffer::{ReadGuard, WriteGuard, WriteRefused};
use crate::simd::{F8, Simd, slice};

/// Panics unless the tensor lies inside its memory and is aligned: kernels rely on it.
fn check(op: &str, arg: &str, tensor: &Tensor<Cpu>, start: *const u8, len_bytes: usize) {
    let size = tensor.dtype().size_bytes();
    let last = tensor.shape().iter().zip(tensor.strides()).map(|(n, stride)| n.saturating_sub(1) * stride);
    let end = tensor.offset() + last.sum::<usize>() + 1;
    assert!(
        tensor.num_elements() == 0 || end * size <= len_bytes,
        "{op}: {arg} {tensor:?} reaches past its {len_bytes} bytes"
    );
    assert!(start.addr().is_multiple_of(size), "{op}: {arg} is not aligned for {}", tensor.dtype());
    let dense = tensor.shape().last().is_none_or(|&n| n <= 1 || tensor.strides().last() == Some(&1));
    assert!(dense, "{op}: {arg} {tensor:?} has gaps in its last dimension");
}

/// A tensor borrowed for reading.
pub(crate) struct In<'a> {
    guard: ReadGuard<'a>,
    tensor: &'a Tensor<Cpu>,
}

impl<'a> In<'a> {
    /// # Panics
    /// When the tensor is being written: by another thread, or as another argument.
    #[track_caller]
    pub(crate) fn new(op: &str, arg: &str, tensor: &'a Tensor<Cpu>) -> Self {
        let guard = tensor.buffer().read().unwrap_or_else(|| {
            panic!("{op}: {arg} is being written: it shares its buffer with the output, or another thread writes it")
        });
        check(op, arg, tensor, guard.ptr, guard.len);
        Self { guard, tensor }
    }

    fn start(&self) -> *const u8 {
        // `wrapping`: an empty view may begin at the very end.
        self.guard.ptr.wrapping_add(self.tensor.offset() * self.tensor.dtype().size_bytes())
    }

    /// Rows of the last dimension; earlier ones must be one dimension at most.
    pub(crate) fn mat(&self) -> Mat<'_> {
        self.cube().flat()
    }

    /// Up to three dimensions, missing ones in front; of four the first two become one.
    pub(crate) fn cube(&self) -> Cube<'_> {
        let (shape, strides) = three(self.tensor);
        Cube { ptr: self.start(), dtype: self.tensor.dtype(), shape, strides, life: PhantomData }
    }

    /// The elements of a U32 vector.
    pub(crate) fn u32s(&self) -> &[u32] {
        assert!(
            self.tensor.dtype() == DType::U32 && self.tensor.is_contiguous(),
            "{:?} is no U32 run",
            self.tensor
        );
        // SAFETY: checked against its memory at the borrow, aligned, and nobody writes while the guard lives.
        unsafe { std::slice::from_raw_parts(self.start().cast(), self.tensor.num_elements()) }
    }

    /// Row `i` of a U32 matrix.
    pub(crate) fn u32_row(&self, i: usize) -> &[u32] {
        self.mat().u32_row(i)
    }
}

fn three(tensor: &Tensor<Cpu>) -> ([usize; 3], [usize; 3]) {
    if let (&[a, b, c, d], &[ld_a, ld_b, ld_c, ld_d]) = (tensor.shape(), tensor.strides()) {
        assert!(a <= 1 || ld_a == b * ld_b, "{tensor:?} has four dimensions and a gap between the first two");
        return ([a * b, c, d], [ld_b, ld_c, ld_d]);
    }
    let rank = tensor.shape().len();
    let (mut shape, mut strides) = ([1; 3], [0; 3]);
    shape[3 - rank..].copy_from_slice(tensor.shape());
    strides[3 - rank..].copy_from_slice(tensor.strides());
    (shape, strides)
}

/// Readable `[A, B, C]` elements; the last dimension is dense.
#[derive(Clone, Copy)]
pub(crate) struct Cube<'a> {
    ptr: *const u8,
    pub(crate) dtype: DType,
    pub(crate) shape: [usize; 3],
    strides: [usize; 3],
    life: PhantomData<&'a [u8]>,
}

// SAFETY: a view of memory that nobody writes while the borrow it comes from lives.
unsafe impl Send for Cube<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for Cube<'_> {}

impl<'a> Cube<'a> {
    fn at(&self, dim: usize, index: usize) -> *const u8 {
        assert!(index < self.shape[dim], "index {index} of {:?}", self.shape);
        self.ptr.wrapping_add(index * self.strides[dim] * self.dtype.size_bytes())
    }

    /// `[B, C]` at index `i` of the first dimension.
    pub(crate) fn outer(&self, i: usize) -> Mat<'a> {
        Mat {
            ptr: self.at(0, i),
            dtype: self.dtype,
            rows: self.shape[1],
            cols: self.shape[2],
            stride: self.strides[1],
            life: PhantomData,
        }
    }

    /// `[A, C]` at index `i` of the middle dimension.
    pub(crate) fn middle(&self, i: usize) -> Mat<'a> {
        Mat {
            ptr: self.at(1, i),
            dtype: self.dtype,
            rows: self.shape[0],
            cols: self.shape[2],
            stride: self.strides[0],
            life: PhantomData,
        }
    }

    fn flat(&self) -> Mat<'a> {
        assert_eq!(self.shape[0], 1, "a matrix is expected, not {:?}", self.shape);
        self.outer(0)
    }
}

/// Readable rows of floats.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    ptr: *const u8,
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
    life: PhantomData<&'a [u8]>,
}

// SAFETY: a view of memory that nobody writes while the borrow it comes from lives.
unsafe impl Send for Mat<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mat<'_> {}

impl<'a> Mat<'a> {
    /// Dense F32 rows `stride` apart.
    pub(crate) fn from_f32(values: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || (rows - 1) * stride + cols <= values.len(),
            "{rows} rows of {cols} past the slice"
        );
        Self { ptr: values.as_ptr().cast(), dtype: DType::F32, rows, cols, stride, life: PhantomData }
    }

    /// No rows.
    pub(crate) fn empty(dtype: DType, cols: usize) -> Self {
        Self { ptr: std::ptr::dangling(), dtype, rows: 0, cols, stride: cols, life: PhantomData }
    }

    /// Where row `i` begins.
    pub(crate) fn row(&self, i: usize) -> *const u8 {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        self.ptr.wrapping_add(i * self.stride * self.dtype.size_bytes())
    }

    /// Whether the rows follow each other without a gap.
    pub(crate) fn is_contiguous(&self) -> bool {
        self.stride == self.cols
    }

    /// Rows `range`.
    pub(crate) fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let ptr = self.ptr.wrapping_add(range.start * self.stride * self.dtype.size_bytes());
        Self { ptr, rows: range.len(), ..*self }
    }

    /// Row `i` of a U32 matrix, in place.
    pub(crate) fn u32_row(&self, i: usize) -> &'a [u32] {
        assert_eq!(self.dtype, DType::U32, "rows are not U32");
        // SAFETY: the row exists, is aligned, and nobody writes it during 'a.
        unsafe { std::slice::from_raw_parts(self.row(i).cast(), self.cols) }
    }

    /// Row `i` of an F16 matrix, in place.
    pub(crate) fn f16_row(&self, i: usize) -> &'a [f16] {
        assert_eq!(self.dtype, DType::F16, "rows are not F16");
        // SAFETY: the row exists, is aligned, and nobody writes it during 'a.
        unsafe { std::slice::from_raw_parts(self.row(i).cast(), self.cols) }
    }

    /// Row `i` of a BF16 matrix as bits, in place.
    pub(crate) fn bf16_row(&self, i: usize) -> &'a [u16] {
        assert_eq!(self.dtype, DType::BF16, "rows are not BF16");
        // SAFETY: the row exists, is aligned, and nobody writes it during 'a.
        unsafe { std::slice::from_raw_parts(self.row(i).cast(), self.cols) }
    }

    /// Row `i` of an F32 matrix, in place.
    pub(crate) fn f32_row(&self, i: usize) -> &'a [f32] {
        assert_eq!(self.dtype, DType::F32, "rows are not F32");
        // SAFETY: the row exists, is aligned, and nobody writes it during 'a.
        unsafe { std::slice::from_raw_parts(self.row(i).cast(), self.cols) }
    }

    /// Columns `range`.
    pub(crate) fn columns(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.cols, "columns {range:?} of {}", self.cols);
        let ptr = self.ptr.wrapping_add(range.start * self.dtype.size_bytes());
        Self { ptr, cols: range.len(), ..*self }
    }

    /// Columns `col..col + dst.len()` of row `i`, widened.
    #[inline(always)]
    pub(crate) fn read<S: Simd>(&self, s: S, i: usize, col: usize, dst: &mut [f32]) {
        assert!(col + dst.len() <= self.cols, "columns {col}+{} of {}", dst.len(), self.cols);
        // SAFETY: the row exists and the columns lie inside it.
        unsafe { slice::read(s, self.row(i).add(col * self.dtype.size_bytes()), self.dtype, dst) }
    }
}

impl Mat<'_> {
    /// Columns `col..col + dst.len()` of row `i` of an F8 matrix, widened, times `scale`.
    #[inline(always)]
    pub(crate) fn read_f8<S: Simd>(&self, s: S, i: usize, col: usize, scale: f32, dst: &mut [f32]) {
        assert_eq!(self.dtype, DType::F8E4M3, "rows are not F8");
        assert!(col + dst.len() <= self.cols, "columns {col}+{} of {}", dst.len(), self.cols);
        // SAFETY: the row exists and the columns lie inside it.
        unsafe { slice::widen_scaled(s, self.row(i).add(col).cast::<F8>(), scale, dst) }
    }
}

/// A tensor borrowed for writing.
pub(crate) struct Out<'a> {
    guard: WriteGuard<'a>,
    tensor: &'a Tensor<Cpu>,
}

impl<'a> Out<'a> {
    /// # Panics
    /// When the tensor is read-only or in use: by another thread, or as another argument.
    #[track_caller]
    pub(crate) fn new(op: &str, arg: &str, tensor: &'a Tensor<Cpu>) -> Self {
        let guard = tensor.buffer().write().unwrap_or_else(|why| match why {
            WriteRefused::ReadOnly => panic!("{op}: {arg} is read-only: it was imported"),
            WriteRefused::Borrowed => {
                panic!("{op}: {arg} is in use: it shares its buffer with another argument, or another thread uses it")
            }
        });
        check(op, arg, tensor, guard.ptr, guard.len);
        let (shape, strides) = (tensor.shape(), tensor.strides());
        // Rows that overlap could not be given to different tasks.
        let disjoint = tensor.num_elements() == 0
            || (1..shape.len())
                .all(|dim| shape[dim - 1] == 1 || strides[dim - 1] >= shape[dim] * strides[dim]);
        assert!(disjoint, "{op}: {arg} {tensor:?} overlaps itself");
        Self { guard, tensor }
    }

    fn start(&self) -> *mut u8 {
        self.guard.ptr.wrapping_add(self.tensor.offset() * self.tensor.dtype().size_bytes())
    }

    pub(crate) fn mat(&mut self) -> MatMut<'_> {
        self.cube().flat()
    }

    /// Up to three dimensions, missing ones in front; of four the first two become one.
    pub(crate) fn cube(&mut self) -> CubeMut<'_> {
        let (shape, strides) = three(self.tensor);
        CubeMut { ptr: self.start(), dtype: self.tensor.dtype(), shape, strides, life: PhantomData }
    }
}

/// Writable `[A, B, C]` elements; the last dimension is dense.
#[derive(Clone, Copy)]
pub(crate) struct CubeMut<'a> {
    ptr: *mut u8,
    pub(crate) dtype: DType,
    pub(crate) shape: [usize; 3],
    strides: [usize; 3],
    life: PhantomData<&'a mut [u8]>,
}

// SAFETY: memory that only this operation reaches; its tasks promise disjoint rows where they write.
unsafe impl Send for CubeMut<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for CubeMut<'_> {}

impl<'a> CubeMut<'a> {
    fn at(&self, dim: usize, index: usize) -> *mut u8 {
        assert!(index < self.shape[dim], "index {index} of {:?}", self.shape);
        self.ptr.wrapping_add(index * self.strides[dim] * self.dtype.size_bytes())
    }

    /// `[B, C]` at index `i` of the first dimension.
    pub(crate) fn outer(&self, i: usize) -> MatMut<'a> {
        MatMut {
            ptr: self.at(0, i),
            dtype: self.dtype,
            rows: self.shape[1],
            cols: self.shape[2],
            stride: self.strides[1],
            life: PhantomData,
        }
    }

    /// `[A, C]` at index `i` of the middle dimension.
    pub(crate) fn middle(&self, i: usize) -> MatMut<'a> {
        MatMut {
            ptr: self.at(1, i),
            dtype: self.dtype,
            rows: self.shape[0],
            cols: self.shape[2],
            stride: self.strides[0],
            life: PhantomData,
        }
    }

    fn flat(&self) -> MatMut<'a> {
        assert_eq!(self.shape[0], 1, "a matrix is expected, not {:?}", self.shape);
        self.outer(0)
    }
}

/// Writable rows.
#[derive(Clone, Copy)]
pub(crate) struct MatMut<'a> {
    ptr: *mut u8,
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    stride: usize,
    life: PhantomData<&'a mut [u8]>,
}

// SAFETY: memory that only this operation reaches; its tasks promise disjoint elements where they write.
unsafe impl Send for MatMut<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// Dense rows of F32 or BF16 in working memory.
    pub(crate) fn scratch(room: &'a mut [f32], dtype: DType, rows: usize, cols: usize) -> Self {
        assert!(
            rows * cols * dtype.size_bytes() <= size_of_val(room),
            "{rows} rows of {cols} past their room"
        );
        Self { ptr: room.as_mut_ptr().cast(), dtype, rows, cols, stride: cols, life: PhantomData }
    }

    /// Copies columns `col..col + src.cols` of row `i` from row `row` of `src`, which has the same element type.
    ///
    /// # Safety
    /// No other task touches them at the same time.
    #[inline(always)]
    pub(crate) unsafe fn copy(&self, i: usize, col: usize, src: Mat<'_>, row: usize) {
        assert_eq!(self.dtype, src.dtype, "copies between element types");
        let (from, to) = (src.row(row), self.place(i, col, src.cols));
        // SAFETY: both lie inside their memory; the caller has this place alone, so they are apart.
        unsafe { std::ptr::copy_nonoverlapping(from, to, src.cols * src.dtype.size_bytes()) };
    }

    /// Rows `range`.
    pub(crate) fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let ptr = self.ptr.wrapping_add(range.start * self.stride * self.dtype.size_bytes());
        Self { ptr, rows: range.len(), ..*self }
    }

    /// The same rows for reading, once nobody writes them any more.
    pub(crate) fn readable(self) -> Mat<'a> {
        let Self { ptr, dtype, rows, cols, stride, life: _ } = self;
        Mat { ptr, dtype, rows, cols, stride, life: PhantomData }
    }
}

impl MatMut<'_> {
    fn place(&self, i: usize, col: usize, len: usize) -> *mut u8 {
        assert!(
            i < self.rows && col + len <= self.cols,
            "[{i}, {col}+{len}] of [{}, {}]",
            self.rows,
            self.cols
        );
        self.ptr.wrapping_add((i * self.stride + col) * self.dtype.size_bytes())
    }

    /// Writes columns `col..` of row `i`, rounded to nearest even.
    ///
    /// # Safety
    /// No other task touches them at the same time.
    #[inline(always)]
    pub(crate) unsafe fn write<S: Simd>(&self, s: S, i: usize, col: usize, values: &[f32]) {
        // SAFETY: the place lies inside the tensor, and the caller has it alone.
        unsafe { slice::write(s, values, self.place(i, col, values.len()), self.dtype) }
    }

    /// Reads columns `col..` of row `i`, widened.
    ///
    /// # Safety
    /// No other task writes them at the same time.
    #[inline(always)]
    pub(crate) unsafe fn read<S: Simd>(&self, s: S, i: usize, col: usize, dst: &mut [f32]) {
        // SAFETY: the place lies inside the tensor, and nobody writes it now.
        unsafe { slice::read(s, self.place(i, col, dst.len()), self.dtype, dst) }
    }

    /// Row `i` of a U32 or F32 matrix as 32-bit elements.
    ///
    /// # Safety
    /// `T` is the element type; no other task touches the row while the slice lives.
    pub(crate) unsafe fn row_mut<'b, T: Copy>(&self, i: usize) -> &'b mut [T]
    where
        Self: 'b,
    {
        // SAFETY: the same contract.
        unsafe { self.row_part(i, 0, self.cols) }
    }

    /// Columns `col..col + len` of row `i` as 32-bit elements.
    ///
    /// # Safety
    /// `T` is the element type; no other task touches the columns while the slice lives.
    pub(crate) unsafe fn row_part<'b, T: Copy>(&self, i: usize, col: usize, len: usize) -> &'b mut [T]
    where
        Self: 'b,
    {
        assert_eq!(self.dtype.size_bytes(), size_of::<T>(), "elements are {}", self.dtype);
        // SAFETY: the place exists, is aligned, and the caller has it alone.
        unsafe { std::slice::from_raw_parts_mut(self.place(i, col, len).cast(), len) }
    }
}

/// A slice whose elements tasks write, each its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    ptr: *mut f32,
    len: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: the slice is borrowed exclusively; its tasks promise disjoint ranges.
unsafe impl Send for Shared<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(values: &'a mut [f32]) -> Self {
        Self { ptr: values.as_mut_ptr(), len: values.len(), life: PhantomData }
    }

    /// `start..start + len`.
    ///
    /// # Safety
    /// No other task touches them while the slice lives.
    #[allow(clippy::mut_from_ref)] // what the contract is for
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start + len <= self.len, "{start}+{len} of {}", self.len);
        // SAFETY: inside the slice, and the caller has it alone.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), len) }
    }
}
