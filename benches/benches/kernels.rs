//! Kernels of the CPU backend at DeepSeek-V3's sizes: achieved bandwidth against what the memory gives, and candle's
//! matrix product of the same run beside ours.
#![forbid(unsafe_code)]
#![allow(missing_docs)] // criterion's macros make public functions

use candle_core::{Device, Tensor as CandleTensor};
use criterion::{Criterion, criterion_group, criterion_main};
use r1_backend::{
    Activation, Backend, Batch, Experts, HostSlice, LatentCache, MlpWeights, RowSampling, SamplingBatch,
    Tensor, Weight,
};
use r1_benches::{Machine, Random};
use r1_core::DType;
use r1_cpu::Cpu;

/// Rows and columns of V3's q_b_proj: 37.7 M weights, larger than any cache.
const N: usize = 24_576;
const K: usize = 1_536;

fn weight(cpu: &Cpu, random: &mut Random, n: usize, k: usize, dtype: DType) -> Weight<Cpu> {
    let data = random.tensor(cpu, &[n, k], dtype);
    if dtype != DType::F8E4M3 {
        return Weight::Dense { data };
    }
    let scales = random.tensor(cpu, &[n.div_ceil(128), k.div_ceil(128)], DType::F32);
    Weight::Fp8Block { data, scales, block: [128, 128], offset: [0, 0] }
}

fn filled(cpu: &Cpu, random: &mut Random, shape: &[usize]) -> Tensor<Cpu> {
    let tensor = cpu.alloc(shape, DType::F32).expect("memory");
    cpu.upload(HostSlice::F32(&random.f32s(tensor.num_elements())), &tensor);
    tensor
}

fn linear(c: &mut Criterion) {
    let machine = Machine::measure();
    let (cpu, mut random) = (&machine.cpu, Random::new(1));
    for dtype in [DType::F8E4M3, DType::BF16, DType::F32] {
        let w = weight(cpu, &mut random, N, K, dtype);
        for rows in [1, 4, 64] {
            let x = Activation::dense(filled(cpu, &mut random, &[rows, K]));
            let out = cpu.alloc(&[rows, N], DType::F32).expect("memory");
            let name = format!("{dtype} {N}x{K}, {rows} rows");
            let took = machine.bench(c, "linear", &name, w.size_bytes(), || cpu.linear(&x, &w, &out));
            println!("{name}: {:.1} GFLOP/s\n", (2 * rows * N * K) as f64 / took.as_secs_f64() / 1e9);
        }
    }
    let b = CandleTensor::from_vec(random.f32s(N * K), (N, K), &Device::Cpu)
        .and_then(|w| w.t())
        .expect("a matrix");
    for rows in [1, 64] {
        let a = CandleTensor::from_vec(random.f32s(rows * K), (rows, K), &Device::Cpu).expect("a matrix");
        let name = format!("candle F32 {N}x{K}, {rows} rows");
        let took = machine.bench(c, "linear", &name, N * K * 4, || {
            std::hint::black_box(a.matmul(&b).expect("a product"));
        });
        println!("{name}: {:.1} GFLOP/s\n", (2 * rows * N * K) as f64 / took.as_secs_f64() / 1e9);
    }
}

fn experts(c: &mut Criterion) {
    let machine = Machine::measure();
    let (cpu, mut random) = (&machine.cpu, Random::new(2));
    let (hidden, width, total, top_k) = (7168, 2048, 8, 8);
    let local: Vec<_> = (0..total)
        .map(|_| MlpWeights {
            gate: weight(cpu, &mut random, width, hidden, DType::F8E4M3),
            up: weight(cpu, &mut random, width, hidden, DType::F8E4M3),
            down: weight(cpu, &mut random, hidden, width, DType::F8E4M3),
        })
        .collect();
    let bytes: usize =
        local.iter().map(|e| e.gate.size_bytes() + e.up.size_bytes() + e.down.size_bytes()).sum();
    let experts = Experts::new(cpu, local, 0, total).expect("no table is made");
    let x = Activation::dense(filled(cpu, &mut random, &[1, hidden]));
    let ids = cpu.alloc(&[1, top_k], DType::U32).expect("memory");
    cpu.upload(HostSlice::U32(&[3, 1, 4, 0, 5, 2, 6, 7]), &ids);
    let weights = filled(cpu, &mut random, &[1, top_k]);
    let out = cpu.alloc(&[1, hidden], DType::F32).expect("memory");
    machine.bench(c, "experts", "8 of V3's experts, 1 row", bytes, || {
        cpu.experts(&x, &ids, &weights, &experts, &out);
    });
}

fn attention(c: &mut Criterion) {
    let machine = Machine::measure();
    let (cpu, mut random) = (&machine.cpu, Random::new(3));
    let (heads, latent, rope, block_size, context) = (128, 512, 64, 64, 4096);
    let num_blocks = context / block_size;
    let u32s = |values: &[u32]| {
        let tensor = cpu.alloc(&[values.len()], DType::U32).expect("memory");
        cpu.upload(HostSlice::U32(values), &tensor);
        tensor
    };
    let table: Vec<u32> = (0..num_blocks as u32).rev().collect();
    let batch = Batch {
        positions: u32s(&[context as u32 - 1]),
        slots: u32s(&[block_size as u32 - 1]),
        query_start: u32s(&[0, 1]),
        context_len: u32s(&[context as u32]),
        context_start: u32s(&[0, context as u32]),
        block_table: u32s(&table).reshape(&[1, num_blocks]),
        num_tokens: 1,
        num_seqs: 1,
        num_decodes: 1,
        prefill_context_tokens: 0,
        max_context_len: context,
    };
    let q_latent = filled(cpu, &mut random, &[1, heads, latent]);
    let q_rope = filled(cpu, &mut random, &[1, heads, rope]);
    let out = cpu.alloc(&[1, heads, latent], DType::F32).expect("memory");
    for dtype in [DType::F32, DType::BF16, DType::F8E4M3] {
        let cache = LatentCache::alloc(cpu, dtype, [num_blocks, block_size], latent, rope).expect("memory");
        let mut fill = |part: &Tensor<Cpu>| {
            cpu.upload(HostSlice::F32(&random.f32s(part.num_elements())), part);
        };
        fill(&cache.data);
        cache.fp8.iter().for_each(|fp8| [&fp8.scales, &fp8.rope].into_iter().for_each(&mut fill));
        let name = format!("absorbed decode, {heads} heads, {context} tokens, {dtype} cache");
        let bytes = context * r1_backend::latent_bytes_per_token(dtype, latent, rope);
        let took = machine.bench(c, "mla_attention", &name, bytes, || {
            cpu.mla_attention(&q_latent, &q_rope, &cache, &batch, 0..1, 0.1, &out);
        });
        let flops = 2 * context * heads * (2 * latent + rope);
        println!("{name}: {:.1} GFLOP/s\n", flops as f64 / took.as_secs_f64() / 1e9);
    }
}

fn small(c: &mut Criterion) {
    let machine = Machine::measure();
    let (cpu, mut random) = (&machine.cpu, Random::new(4));
    let (rows, hidden, vocab) = (64, 7168, 129_280);
    let (x, out) =
        (filled(cpu, &mut random, &[rows, hidden]), cpu.alloc(&[rows, hidden], DType::F32).expect("memory"));
    let (norm, out) = (random.tensor(cpu, &[hidden], DType::BF16), Activation::dense(out));
    machine.bench(c, "rms_norm", "64 rows of 7168", 2 * rows * hidden * 4, || {
        cpu.rms_norm(&x, &norm, 1e-6, &out);
    });

    let logits = filled(cpu, &mut random, &[1, vocab]);
    let drawn = cpu.alloc(&[1], DType::U32).expect("memory");
    let row = RowSampling { temperature: 0.6, top_p: 0.95, seed: 7, ..RowSampling::greedy() };
    let sampling = SamplingBatch { rows: vec![row], ..SamplingBatch::default() };
    machine.bench(c, "sample", "1 row of 129280, temperature 0.6, top-p 0.95", vocab * 4, || {
        cpu.sample(&logits, &sampling, &drawn);
    });
}

criterion_group! {
    name = kernels;
    config = Criterion::default().sample_size(10).warm_up_time(std::time::Duration::from_millis(500));
    targets = linear, experts, attention, small
}
criterion_main!(kernels);
