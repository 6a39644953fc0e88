//! Tensors that lie inside larger, poisoned allocations, and weights that lie inside poisoned host bytes: reading past
//! a view brings NaN into the result, writing past it is found afterwards.

use std::sync::Arc;

use r1_core::DType;

use super::random::Random;
use super::rounding::{e4m3, round_to, to_bytes};
use crate::{
    Activation, Backend, Fp8Activation, HostSlice, HostSliceMut, HostTensor, Int4Group, Tensor, Weight,
    WeightFormat,
};

/// Poison of integer tensors: no row, no slot, no token.
const GARBAGE: u32 = 0xFFFF_FFF1;

/// How a view lies in its allocation. The first dimension always has a poisoned row before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Without gaps.
    Dense,
    /// Rows of the last dimension have poison before and after them, as a range of columns has.
    Gaps,
}

pub(super) const LAYOUTS: [Layout; 2] = [Layout::Dense, Layout::Gaps];

/// Poison before and after each row of a view with gaps; odd, so that rows begin at odd addresses.
const GAP: [usize; 2] = [3, 6];

pub(super) struct Slab<B: Backend> {
    /// What the operation is given.
    pub(super) view: Tensor<B>,
    whole: Tensor<B>,
    /// Of each element of `whole`, whether the view has it.
    inside: Vec<bool>,
    /// What was put into the view.
    pub(super) host: Vec<f64>,
}

/// The whole allocation's shape, and the view of it.
fn place<B: Backend>(backend: &B, shape: &[usize], dtype: DType, layout: Layout) -> (Tensor<B>, Tensor<B>) {
    let last = shape.len() - 1;
    let mut whole_shape = shape.to_vec();
    whole_shape[0] += 2;
    if layout == Layout::Gaps && last > 0 {
        whole_shape[last] += GAP[0] + GAP[1];
    }
    let whole = backend.alloc(&whole_shape, dtype).expect("alloc");
    let mut view = whole.rows(1..shape[0] + 1);
    if layout == Layout::Gaps && last > 0 {
        view = view.narrow(last, GAP[0]..GAP[0] + shape[last]);
    }
    (whole, view)
}

/// Which elements of `whole` `view` has.
fn inside<B: Backend>(whole: &Tensor<B>, view: &Tensor<B>) -> Vec<bool> {
    let mut indices = vec![view.offset()];
    for (&size, &stride) in view.shape().iter().zip(view.strides()) {
        indices = indices.iter().flat_map(|start| (0..size).map(move |i| start + i * stride)).collect();
    }
    let mut inside = vec![false; whole.num_elements()];
    for i in indices {
        inside[i] = true;
    }
    inside
}

impl<B: Backend> Slab<B> {
    /// A float tensor with `values`, rounded to its type.
    pub(super) fn floats(backend: &B, shape: &[usize], dtype: DType, layout: Layout, values: &[f64]) -> Self {
        let (whole, view) = place(backend, shape, dtype, layout);
        let inside = inside(&whole, &view);
        let host: Vec<f64> = values.iter().map(|v| round_to(dtype, *v)).collect();
        let mut next = host.iter();
        let image: Vec<f32> = inside
            .iter()
            .map(|&inside| if inside { *next.next().expect("a value per element") as f32 } else { f32::NAN })
            .collect();
        assert!(next.next().is_none(), "more values than elements");
        backend.upload(HostSlice::F32(&image), &whole);
        Self { view, whole, inside, host }
    }

    /// Normal values times `scale`.
    pub(super) fn normal(
        backend: &B,
        random: &mut Random,
        shape: &[usize],
        dtype: DType,
        layout: Layout,
        scale: f64,
    ) -> Self {
        Self::floats(backend, shape, dtype, layout, &random.normals(shape.iter().product(), scale))
    }

    /// For a result: poison throughout, so that an element that is not written is found too.
    pub(super) fn poison(backend: &B, shape: &[usize], dtype: DType, layout: Layout) -> Self {
        if dtype == DType::U32 {
            return Self::ids(backend, shape, &vec![GARBAGE; shape.iter().product()]);
        }
        Self::floats(backend, shape, dtype, layout, &vec![f64::NAN; shape.iter().product()])
    }

    /// An integer tensor.
    pub(super) fn ids(backend: &B, shape: &[usize], values: &[u32]) -> Self {
        let (whole, view) = place(backend, shape, DType::U32, Layout::Dense);
        let inside = inside(&whole, &view);
        let mut next = values.iter();
        let image: Vec<u32> = inside
            .iter()
            .map(|&inside| if inside { *next.next().expect("a value per element") } else { GARBAGE })
            .collect();
        assert!(next.next().is_none(), "more values than elements");
        backend.upload(HostSlice::U32(&image), &whole);
        Self { view, whole, inside, host: values.iter().map(|v| f64::from(*v)).collect() }
    }

    /// The view's values now.
    ///
    /// # Panics
    /// When the poison around it was touched.
    #[track_caller]
    pub(super) fn read(&self, backend: &B) -> Vec<f64> {
        let all: Vec<f64> = if self.whole.dtype() == DType::U32 {
            let mut all = vec![0; self.whole.num_elements()];
            backend.download(&self.whole, HostSliceMut::U32(&mut all)).expect("download");
            all.into_iter().map(f64::from).collect()
        } else {
            let mut all = vec![0.0; self.whole.num_elements()];
            backend.download(&self.whole, HostSliceMut::F32(&mut all)).expect("download");
            all.into_iter().map(f64::from).collect()
        };
        for (index, (&value, &inside)) in all.iter().zip(&self.inside).enumerate() {
            assert!(
                inside || value.is_nan() || value == f64::from(GARBAGE),
                "wrote {value} outside of {:?}, to element {index} of {:?}",
                self.view,
                self.whole
            );
        }
        all.into_iter().zip(&self.inside).filter(|(_, inside)| **inside).map(|(value, _)| value).collect()
    }

    /// As [`read`](Slab::read), for ids.
    #[track_caller]
    pub(super) fn read_ids(&self, backend: &B) -> Vec<u32> {
        self.read(backend).into_iter().map(|id| id as u32).collect()
    }

    /// # Panics
    /// When an operation changed what it may only read.
    #[track_caller]
    pub(super) fn assert_unchanged(&self, backend: &B) {
        let now = self.read(backend);
        let same = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan();
        assert!(now.iter().zip(&self.host).all(same), "an input was written to: {:?}", self.view);
    }
}

/// An activation with both forms in slabs.
pub(super) struct ActivationSlab<B: Backend> {
    pub(super) activation: Activation<B>,
    pub(super) dense: Slab<B>,
    pub(super) fp8: Option<(Slab<B>, Slab<B>)>,
}

impl<B: Backend> ActivationSlab<B> {
    /// `dense` with a poisoned FP8 form where `fp8` says whether its scales are powers of two.
    pub(super) fn new(backend: &B, dense: Slab<B>, fp8: Option<bool>, layout: Layout) -> Self {
        let (rows, cols) = (dense.view.dim(0), dense.view.dim(1));
        let slabs = fp8.map(|_| {
            let scales = Slab::poison(backend, &[rows, cols.div_ceil(128)], DType::F32, layout);
            (Slab::poison(backend, &[rows, cols], DType::F8E4M3, layout), scales)
        });
        let form = slabs.as_ref().zip(fp8).map(|((data, scales), power_of_two_scales)| Fp8Activation {
            data: data.view.clone(),
            scales: scales.view.clone(),
            power_of_two_scales,
        });
        Self { activation: Activation { dense: dense.view.clone(), fp8: form }, dense, fp8: slabs }
    }

    /// What the FP8 form stands for.
    pub(super) fn dequantized(&self, backend: &B) -> Option<Vec<f64>> {
        let (data, scales) = self.fp8.as_ref()?;
        let cols = data.view.dim(1);
        let scales = scales.read(backend);
        let blocks = cols.div_ceil(128);
        let scale = |i: usize| scales[i / cols * blocks + i % cols / 128];
        Some(data.read(backend).into_iter().enumerate().map(|(i, code)| code * scale(i)).collect())
    }
}

/// A host tensor with NaN before and after it, at an address that is a multiple of nothing.
pub(super) fn host_tensor(bytes: &[u8], shape: &[usize], dtype: DType, misalignment: usize) -> HostTensor {
    const POISON: usize = 256;
    let start = POISON + misalignment;
    let mut owner = vec![0xFF; start];
    owner.extend_from_slice(bytes);
    owner.resize(owner.len() + POISON, 0xFF);
    HostTensor::new(Arc::new(owner), start..start + bytes.len(), shape, dtype)
}

/// An imported tensor and its values.
pub(super) fn imported<B: Backend>(
    backend: &B,
    random: &mut Random,
    shape: &[usize],
    dtype: DType,
    scale: f64,
) -> (Tensor<B>, Vec<f64>) {
    let values = random.normals(shape.iter().product(), scale);
    let values: Vec<f64> = values.into_iter().map(|v| round_to(dtype, v)).collect();
    let host = host_tensor(&to_bytes(dtype, &values), shape, dtype, 0);
    (backend.import(&host).expect("import"), values)
}

/// Formats that a linear's weight may have.
#[derive(Clone, Copy, Debug)]
pub(super) enum Format {
    Dense(DType),
    /// Blocks of 128 × 128, the first cut off at this row and column.
    Fp8([usize; 2]),
    /// 8-bit codes in groups of this many, the first cut off at this column.
    Int8 {
        group: usize,
        offset: usize,
    },
    /// 4-bit codes in groups of this many; K is a multiple of 8.
    Int4 {
        group: usize,
    },
}

impl Format {
    pub(super) fn kind(self) -> WeightFormat {
        match self {
            Self::Dense(_) => WeightFormat::Dense,
            Self::Fp8(_) => WeightFormat::Fp8Block,
            Self::Int8 { .. } => WeightFormat::Int8Group,
            Self::Int4 { .. } => WeightFormat::Int4Group,
        }
    }

    /// A width that it has: `width`, or the next one where rows are whole words.
    pub(super) fn width(self, width: usize) -> usize {
        if matches!(self, Self::Int4 { .. }) { width.next_multiple_of(8) } else { width }
    }
}

pub(super) const FORMATS: [Format; 5] = [
    Format::Dense(DType::F32),
    Format::Dense(DType::BF16),
    Format::Dense(DType::F16),
    Format::Fp8([0, 0]),
    Format::Fp8([100, 70]),
];

/// A weight and its values, `[N, K]` with variance 1 / K.
pub(super) fn weight<B: Backend>(
    backend: &B,
    random: &mut Random,
    [n, k]: [usize; 2],
    format: Format,
) -> (Weight<B>, Vec<f64>) {
    const BLOCK: usize = 128;
    let spread = 1.0 / (k as f64).sqrt();
    match format {
        Format::Dense(dtype) => {
            let values: Vec<f64> =
                random.normals(n * k, spread).into_iter().map(|v| round_to(dtype, v)).collect();
            let host = host_tensor(&to_bytes(dtype, &values), &[n, k], dtype, 0);
            (Weight::Dense { data: backend.import_matrix(&host).expect("import_matrix") }, values)
        }
        Format::Int8 { group, offset } => int8(backend, random, [n, k], group, offset),
        Format::Int4 { group } => int4(backend, random, [n, k], group),
        Format::Fp8(offset) => {
            let codes: Vec<u8> = (0..n * k)
                .map(|_| {
                    loop {
                        let code = random.next() as u8;
                        if !e4m3(code).is_nan() {
                            return code;
                        }
                    }
                })
                .collect();
            let [rows, cols] = [(n + offset[0]).div_ceil(BLOCK), (k + offset[1]).div_ceil(BLOCK)];
            // E4M3 codes have a root mean square of about 100.
            let scales: Vec<f64> = (0..rows * cols)
                .map(|_| round_to(DType::F32, spread / 100.0 * random.uniform(0.25, 2.0)))
                .collect();
            let values = (0..n * k)
                .map(|i| {
                    let block = (i / k + offset[0]) / BLOCK * cols + (i % k + offset[1]) / BLOCK;
                    e4m3(codes[i]) * scales[block]
                })
                .collect();
            let data = host_tensor(&codes, &[n, k], DType::F8E4M3, 1);
            let scales = host_tensor(&to_bytes(DType::F32, &scales), &[rows, cols], DType::F32, 0);
            let weight = Weight::Fp8Block {
                data: backend.import_matrix(&data).expect("import_matrix"),
                scales: backend.import(&scales).expect("import"),
                block: [BLOCK; 2],
                offset,
            };
            (weight, values)
        }
    }
}

fn int8<B: Backend>(
    backend: &B,
    random: &mut Random,
    [n, k]: [usize; 2],
    group: usize,
    offset: usize,
) -> (Weight<B>, Vec<f64>) {
    let codes: Vec<i8> = (0..n * k).map(|_| (random.below(255) as i32 - 127) as i8).collect();
    let groups = (k + offset).div_ceil(group);
    // Codes have a root mean square of about 73.
    let spread = 1.0 / (k as f64).sqrt() / 73.0;
    let scales: Vec<f64> =
        (0..n * groups).map(|_| round_to(DType::F32, spread * random.uniform(0.25, 2.0))).collect();
    let scale = |i: usize| scales[i / k * groups + (i % k + offset) / group];
    let values = codes.iter().enumerate().map(|(i, &code)| f64::from(code) * scale(i)).collect();
    let bytes: Vec<u8> = codes.iter().map(|code| code.cast_unsigned()).collect();
    let data = host_tensor(&bytes, &[n, k], DType::I8, 1);
    let scales = host_tensor(&to_bytes(DType::F32, &scales), &[n, groups], DType::F32, 0);
    let weight = Weight::Int8Group {
        data: backend.import_matrix(&data).expect("import_matrix"),
        scales: backend.import(&scales).expect("import"),
        group,
        offset,
    };
    (weight, values)
}

fn int4<B: Backend>(
    backend: &B,
    random: &mut Random,
    [n, k]: [usize; 2],
    group: usize,
) -> (Weight<B>, Vec<f64>) {
    let groups = k.div_ceil(group);
    let words: Vec<u32> = (0..n * k / 8).map(|_| random.next() as u32).collect();
    let zeros: Vec<f64> = (0..n * groups).map(|_| random.below(17) as f64).collect();
    let spread = 1.0 / (k as f64).sqrt() / 6.0;
    let scales: Vec<f64> =
        (0..n * groups).map(|_| round_to(DType::F16, spread * random.uniform(0.25, 2.0))).collect();
    let value = |i: usize| {
        let (row, col) = (i / k, i % k);
        let code = words[i / 8] >> (4 * (col % 8)) & 15;
        let group = row * groups + col / group;
        (f64::from(code) - zeros[group]) * scales[group]
    };
    let values = (0..n * k).map(value).collect();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let codes = host_tensor(&bytes, &[n, k / 8], DType::U32, random.below(2));
    let per_group = |values: &[f64]| {
        let host = host_tensor(&to_bytes(DType::F16, values), &[n, groups], DType::F16, 0);
        backend.import(&host).expect("import")
    };
    let weight = Int4Group {
        codes: backend.import_matrix(&codes).expect("import_matrix"),
        zeros: per_group(&zeros),
        scales: per_group(&scales),
        group,
    };
    (Weight::Int4Group(weight), values)
}
