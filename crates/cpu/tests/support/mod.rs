//! Random tensors for the tests of this crate.
#![allow(dead_code)] // each test file uses its part

use r1_backend::{Backend, HostSlice, HostSliceMut, HostTensor, Int4Group, Tensor, Weight};
use r1_core::DType;
use r1_cpu::{Cpu, CpuOptions, Isa};

/// A small generator (SplitMix64), so that every run sees the same numbers.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (-1, 1).
    pub(crate) fn float(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound as u64) as usize
    }
}

/// One backend per instruction set of this machine.
pub(crate) fn every_isa(threads: usize) -> impl Iterator<Item = Cpu> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(move |isa| cpu(Some(isa), threads))
}

pub(crate) fn cpu(isa: Option<Isa>, threads: usize) -> Cpu {
    Cpu::new(CpuOptions { threads: Some(threads), isa }).expect("threads start")
}

pub(crate) fn tensor(cpu: &Cpu, values: &[f32], shape: &[usize], dtype: DType) -> Tensor<Cpu> {
    let tensor = cpu.alloc(shape, dtype).expect("room");
    cpu.upload(HostSlice::F32(values), &tensor);
    tensor
}

pub(crate) fn ids(cpu: &Cpu, values: &[u32], shape: &[usize]) -> Tensor<Cpu> {
    let tensor = cpu.alloc(shape, DType::U32).expect("room");
    cpu.upload(HostSlice::U32(values), &tensor);
    tensor
}

pub(crate) fn read(cpu: &Cpu, tensor: &Tensor<Cpu>) -> Vec<f32> {
    let mut out = vec![0.0; tensor.num_elements()];
    cpu.download(tensor, HostSliceMut::F32(&mut out)).expect("download");
    out
}

pub(crate) fn read_ids(cpu: &Cpu, tensor: &Tensor<Cpu>) -> Vec<u32> {
    let mut out = vec![0; tensor.num_elements()];
    cpu.download(tensor, HostSliceMut::U32(&mut out)).expect("download");
    out
}

/// Bits, so that equality means identity.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Formats of weights, with where an FP8 block or an int8 group is cut.
pub(crate) const FORMATS: [(DType, [usize; 2]); 8] = [
    (DType::F32, [0, 0]),
    (DType::BF16, [0, 0]),
    (DType::F16, [0, 0]),
    (DType::F8E4M3, [0, 0]),
    (DType::F8E4M3, [37, 51]),
    (DType::I8, [0, 0]),
    (DType::I8, [0, 51]),
    // Int4.
    (DType::U32, [0, 0]),
];
/// Inputs per scale of the weights in groups.
const GROUP: usize = 64;

/// A weight `[n, k]` and the values it stands for.
pub(crate) fn weight(
    cpu: &Cpu,
    random: &mut Random,
    [n, k]: [usize; 2],
    (dtype, offset): (DType, [usize; 2]),
) -> (Weight<Cpu>, Vec<f32>) {
    match dtype {
        DType::I8 => return int8(cpu, random, [n, k], offset[1]),
        DType::U32 => return int4(cpu, random, [n, k], GROUP),
        _ => {}
    }
    let data = tensor(cpu, &random.floats(n * k), &[n, k], dtype);
    let mut values = read(cpu, &data);
    if dtype != DType::F8E4M3 {
        return (Weight::Dense { data }, values);
    }
    let [rows, cols] = [(n + offset[0]).div_ceil(128), (k + offset[1]).div_ceil(128)];
    let scales: Vec<f32> = (0..rows * cols).map(|_| random.float().abs() + 0.1).collect();
    for (i, value) in values.iter_mut().enumerate() {
        *value *= scales[(i / k + offset[0]) / 128 * cols + (i % k + offset[1]) / 128];
    }
    let scales = tensor(cpu, &scales, &[rows, cols], DType::F32);
    (Weight::Fp8Block { data, scales, block: [128, 128], offset }, values)
}

fn int8(cpu: &Cpu, random: &mut Random, [n, k]: [usize; 2], offset: usize) -> (Weight<Cpu>, Vec<f32>) {
    let codes: Vec<i8> = (0..n * k).map(|_| (random.below(255) as i32 - 127) as i8).collect();
    let groups = (k + offset).div_ceil(GROUP);
    let scales: Vec<f32> = (0..n * groups).map(|_| (random.float().abs() + 0.1) / 127.0).collect();
    let scale = |i: usize| scales[i / k * groups + (i % k + offset) / GROUP];
    let values = codes.iter().enumerate().map(|(i, &code)| f32::from(code) * scale(i)).collect();
    let bytes = codes.into_iter().map(i8::cast_unsigned).collect();
    let data = cpu.import_matrix(&HostTensor::from_vec(bytes, &[n, k], DType::I8)).expect("import");
    let scales = tensor(cpu, &scales, &[n, groups], DType::F32);
    (Weight::Int8Group { data, scales, group: GROUP, offset }, values)
}

/// `k` is a multiple of 8.
pub(crate) fn int4(
    cpu: &Cpu,
    random: &mut Random,
    [n, k]: [usize; 2],
    group: usize,
) -> (Weight<Cpu>, Vec<f32>) {
    let groups = k.div_ceil(group);
    let words: Vec<u32> = (0..n * k / 8).map(|_| random.word() as u32).collect();
    let zeros: Vec<f32> = (0..n * groups).map(|_| random.below(16) as f32).collect();
    // Values of about one, as those of the other formats.
    let scales: Vec<f32> = random.floats(n * groups).into_iter().map(|scale| scale / 8.0).collect();
    let scales = tensor(cpu, &scales, &[n, groups], DType::F16);
    let held = read(cpu, &scales);
    let value = |i: usize| {
        let (row, col) = (i / k, i % k);
        let code = (words[i / 8] >> (4 * (col % 8)) & 15) as f32;
        let group = row * groups + col / group;
        (code - zeros[group]) * held[group]
    };
    let values = (0..n * k).map(value).collect();
    let codes = ids(cpu, &words, &[n, k / 8]);
    let zeros = tensor(cpu, &zeros, &[n, groups], DType::F16);
    (Weight::Int4Group(Int4Group { codes, zeros, scales, group }), values)
}

/// A host tensor of F8 codes.
pub(crate) fn codes(values: Vec<u8>, shape: &[usize]) -> HostTensor {
    HostTensor::from_vec(values, shape, DType::F8E4M3)
}

/// Whether F32 sums of `terms` terms of about one are this close.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f64], terms: usize, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let allowed = 1e-6 * (terms as f64).sqrt().max(1.0) * want.abs().max(1.0);
        assert!((f64::from(got) - want).abs() <= allowed, "{what}: element {i} is {got}, not {want}");
    }
}
