//! Kernels of the CPU backend, at the sizes of DeepSeek-V3 and of a model a hundredth as large ("mid"): achieved bandwidth and
//! arithmetic against what this machine gives, and candle's matrix product of the same run beside ours.
//!
//! In a model every weight is cold when its turn comes, so small operands are there several times and take turns.
#![forbid(unsafe_code)]
#![allow(missing_docs)] // criterion's macros make public functions

use std::collections::BTreeSet;
use std::time::Duration;

use candle_core::{Device, Tensor as CandleTensor};
use criterion::{Criterion, criterion_group, criterion_main};
use r1_backend::{
    Activation, Backend, Batch, Experts, HostSlice, LatentCache, MlpWeights, RowSampling, SamplingBatch,
    Tensor, Weight,
};
use r1_benches::{Machine, Random, Work};
use r1_core::DType;
use r1_cpu::Cpu;

/// Weights that take turns are together at least so large that no cache holds them.
const COLD_BYTES: usize = 128 << 20;
const BLOCK_SIZE: usize = 64;
/// `kv_lora_rank`, `qk_rope_head_dim`, `qk_nope_head_dim` and `v_head_dim` of V3 and of mid.
const LATENT: usize = 512;
const ROPE: usize = 64;
const NOPE: usize = 128;
const VALUE: usize = 128;

fn weight(cpu: &Cpu, random: &mut Random, n: usize, k: usize, dtype: DType) -> Weight<Cpu> {
    let data = random.tensor(cpu, &[n, k], dtype);
    if dtype != DType::F8E4M3 {
        return Weight::Dense { data };
    }
    let scales = random.tensor(cpu, &[n.div_ceil(128), k.div_ceil(128)], DType::F32);
    Weight::Fp8Block { data, scales, block: [128, 128], offset: [0, 0] }
}

fn filled(cpu: &Cpu, random: &mut Random, shape: &[usize], dtype: DType) -> Tensor<Cpu> {
    let tensor = cpu.alloc(shape, dtype).expect("memory");
    cpu.upload(HostSlice::F32(&random.f32s(tensor.num_elements())), &tensor);
    tensor
}

fn u32s(cpu: &Cpu, values: &[u32], shape: &[usize]) -> Tensor<Cpu> {
    let tensor = cpu.alloc(&[values.len()], DType::U32).expect("memory");
    cpu.upload(HostSlice::U32(values), &tensor);
    tensor.reshape(shape)
}

/// Gives the items one after the other, again and again.
fn in_turns<'a, T>(items: &'a [T]) -> impl FnMut() -> &'a T {
    let mut turn = 0;
    move || {
        turn = (turn + 1) % items.len();
        &items[turn]
    }
}

/// Name, rows, columns, element types, and numbers of tokens.
type Matrix = (&'static str, usize, usize, &'static [DType], &'static [usize]);

fn linear(c: &mut Criterion, machine: &Machine) {
    let (cpu, mut random) = (&machine.cpu, Random::new(1));
    let all: &[usize] = &[1, 8, 64, 512];
    let shapes: [Matrix; 7] = [
        ("V3's q_b", 24_576, 1_536, &[DType::F8E4M3, DType::BF16, DType::F32], all),
        ("V3's expert down", 7_168, 2_048, &[DType::F8E4M3, DType::BF16], all),
        ("mid's q_b", 3_072, 512, &[DType::F8E4M3, DType::BF16], all),
        ("mid's o", 1_024, 2_048, &[DType::F8E4M3, DType::BF16], all),
        ("mid's dense gate", 2_816, 1_024, &[DType::F8E4M3, DType::BF16], all),
        ("mid's q_a", 512, 1_024, &[DType::F8E4M3, DType::BF16], all),
        // A head has rows of sequences alone.
        ("mid's head", 129_280, 1_024, &[DType::BF16], &[1, 8]),
    ];
    for (what, n, k, dtypes, rows) in shapes {
        for &dtype in dtypes {
            let first = weight(cpu, &mut random, n, k, dtype);
            let bytes = first.size_bytes();
            let more = (1..COLD_BYTES.div_ceil(bytes)).map(|_| weight(cpu, &mut random, n, k, dtype));
            let weights: Vec<_> = std::iter::once(first).chain(more.collect::<Vec<_>>()).collect();
            for &rows in rows.iter().filter(|&&rows| dtype != DType::F32 || rows == 1 || rows == 64) {
                let x = Activation::dense(filled(cpu, &mut random, &[rows, k], machine.activation));
                let out = cpu.alloc(&[rows, n], machine.activation).expect("memory");
                let mut next = in_turns(&weights);
                let name = format!("{what} {n}x{k} {dtype}, rows {rows}");
                let work = Work { bytes, flops: 2 * rows * n * k };
                machine.bench(c, "linear", &name, work, || cpu.linear(&x, next(), &out));
            }
        }
    }
    candle(c, machine, &mut random, 24_576, 1_536);
}

fn candle(c: &mut Criterion, machine: &Machine, random: &mut Random, n: usize, k: usize) {
    let b = CandleTensor::from_vec(random.f32s(n * k), (n, k), &Device::Cpu)
        .and_then(|w| w.t())
        .expect("a matrix");
    for rows in [1, 64] {
        let a = CandleTensor::from_vec(random.f32s(rows * k), (rows, k), &Device::Cpu).expect("a matrix");
        let name = format!("candle {n}x{k} F32, rows {rows}");
        machine.bench(c, "linear", &name, Work { bytes: n * k * 4, flops: 2 * rows * n * k }, || {
            std::hint::black_box(a.matmul(&b).expect("a product"));
        });
    }
}

struct MoeShape {
    name: &'static str,
    hidden: usize,
    width: usize,
    total: usize,
    top_k: usize,
    dtype: DType,
    tokens: &'static [usize],
}

fn experts(c: &mut Criterion, machine: &Machine) {
    let all: &[usize] = &[1, 8, 512];
    let mid = MoeShape {
        name: "mid, 6 of 64",
        hidden: 1024,
        width: 512,
        total: 64,
        top_k: 6,
        dtype: DType::BF16,
        tokens: all,
    };
    let v3 = MoeShape {
        name: "V3, 8 of 8",
        hidden: 7168,
        width: 2048,
        total: 8,
        top_k: 8,
        dtype: DType::F8E4M3,
        tokens: &[1, 8, 64],
    };
    for shape in [MoeShape { dtype: DType::F8E4M3, ..mid }, mid, v3] {
        some_experts(c, machine, &shape);
    }
}

fn some_experts(c: &mut Criterion, machine: &Machine, shape: &MoeShape) {
    let &MoeShape { name, hidden, width, total, top_k, dtype, tokens } = shape;
    let (cpu, mut random) = (&machine.cpu, Random::new(2));
    let mlp = |random: &mut Random| MlpWeights {
        gate: weight(cpu, random, width, hidden, dtype),
        up: weight(cpu, random, width, hidden, dtype),
        down: weight(cpu, random, hidden, width, dtype),
    };
    let local: Vec<_> = (0..total).map(|_| mlp(&mut random)).collect();
    let expert_bytes = local[0].gate.size_bytes() + local[0].up.size_bytes() + local[0].down.size_bytes();
    let experts = Experts::new(cpu, local, 0, total).expect("no table is made");
    for &tokens in tokens {
        // Other experts each time, so that few of them are in a cache still.
        let choices: Vec<(Tensor<Cpu>, usize)> = (0..8)
            .map(|_| {
                let ids: Vec<u32> = (0..tokens).flat_map(|_| distinct(&mut random, top_k, total)).collect();
                let used = ids.iter().collect::<BTreeSet<_>>().len();
                (u32s(cpu, &ids, &[tokens, top_k]), used)
            })
            .collect();
        let used = choices.iter().map(|(_, used)| used).sum::<usize>() / choices.len();
        let x = Activation::dense(filled(cpu, &mut random, &[tokens, hidden], machine.activation));
        let weights = filled(cpu, &mut random, &[tokens, top_k], DType::F32);
        let out = cpu.alloc(&[tokens, hidden], machine.activation).expect("memory");
        let mut next = in_turns(&choices);
        let work = Work { bytes: used * expert_bytes, flops: 2 * tokens * top_k * 3 * hidden * width };
        machine.bench(c, "experts", &format!("{name} {dtype}, tokens {tokens}"), work, || {
            cpu.experts(&x, &next().0, &weights, &experts, &out);
        });
    }
}

/// `n` different numbers below `below`.
fn distinct(random: &mut Random, n: usize, below: usize) -> Vec<u32> {
    let mut all: Vec<u32> = (0..below as u32).collect();
    for i in 0..n {
        let other = i + random.next_u64() as usize % (below - i);
        all.swap(i, other);
    }
    all.truncate(n);
    all
}

/// Sequences with `rows` new tokens each, the last of `context`, in blocks that lie backwards.
fn batch(cpu: &Cpu, seqs: usize, rows: usize, context: usize) -> Batch<Cpu> {
    let (blocks, is_decode) = (context.div_ceil(BLOCK_SIZE), rows == 1);
    let table: Vec<u32> = (0..(seqs * blocks) as u32).rev().collect();
    let new = || (0..seqs).flat_map(|seq| (context - rows..context).map(move |position| (seq, position)));
    let positions: Vec<u32> = new().map(|(_, position)| position as u32).collect();
    let slot = |(seq, position): (usize, usize)| {
        table[seq * blocks + position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
    };
    let slots: Vec<u32> = new().map(slot).collect();
    let starts = |each: usize| -> Vec<u32> { (0..=seqs).map(|seq| (seq * each) as u32).collect() };
    Batch {
        positions: u32s(cpu, &positions, &[seqs * rows]),
        slots: u32s(cpu, &slots, &[seqs * rows]),
        query_start: u32s(cpu, &starts(rows), &[seqs + 1]),
        context_len: u32s(cpu, &vec![context as u32; seqs], &[seqs]),
        context_start: u32s(cpu, &starts(context), &[seqs + 1]),
        block_table: u32s(cpu, &table, &[seqs, blocks]),
        num_tokens: seqs * rows,
        num_seqs: seqs,
        num_decodes: if is_decode { seqs } else { 0 },
        prefill_context_tokens: if is_decode { 0 } else { seqs * context },
        max_context_len: context,
    }
}

fn attention(c: &mut Criterion, machine: &Machine) {
    let f32 = DType::F32;
    for (heads, seqs, context, caches) in [
        (128, 1, 512, &[f32, DType::BF16][..]),
        (128, 1, 4096, &[f32, DType::BF16, DType::F8E4M3]),
        (16, 1, 512, &[f32, DType::BF16]),
        (16, 8, 512, &[f32, DType::BF16]),
        (16, 1, 4096, &[f32, DType::BF16, DType::F8E4M3]),
    ] {
        for &dtype in caches {
            let name = format!("decode, {heads} heads, {seqs} x {context} tokens, {dtype} cache");
            absorbed(c, machine, heads, &batch(&machine.cpu, seqs, 1, context), dtype, &name);
        }
    }
    for (heads, rows) in [(16, 512), (128, 512)] {
        let batch = batch(&machine.cpu, 1, rows, rows);
        expanded(c, machine, heads, &batch, &format!("prefill expanded, {heads} heads, {rows} tokens"));
    }
    let batch = batch(&machine.cpu, 1, 512, 512);
    absorbed(c, machine, 16, &batch, machine.activation, "prefill absorbed, 16 heads, 512 tokens");
}

/// Pairs of a row and a token that it sees.
fn seen(batch: &Batch<Cpu>) -> usize {
    let (rows, context) = (batch.num_tokens / batch.num_seqs, batch.max_context_len);
    batch.num_seqs * (context - rows + 1..=context).sum::<usize>()
}

fn absorbed(
    c: &mut Criterion,
    machine: &Machine,
    heads: usize,
    batch: &Batch<Cpu>,
    dtype: DType,
    name: &str,
) {
    let (cpu, mut random) = (&machine.cpu, Random::new(3));
    let (rows, context) = (batch.num_tokens, batch.num_seqs * batch.max_context_len);
    let q_latent = filled(cpu, &mut random, &[rows, heads, LATENT], machine.activation);
    let q_rope = filled(cpu, &mut random, &[rows, heads, ROPE], machine.activation);
    let out = cpu.alloc(&[rows, heads, LATENT], machine.activation).expect("memory");
    let blocks = context.div_ceil(BLOCK_SIZE);
    let cache = LatentCache::alloc(cpu, dtype, [blocks, BLOCK_SIZE], LATENT, ROPE).expect("memory");
    let mut fill = |part: &Tensor<Cpu>| {
        cpu.upload(HostSlice::F32(&random.f32s(part.num_elements())), part);
    };
    fill(&cache.data);
    cache.fp8.iter().for_each(|fp8| [&fp8.scales, &fp8.rope].into_iter().for_each(&mut fill));
    let work = Work {
        bytes: context * r1_backend::latent_bytes_per_token(dtype, LATENT, ROPE),
        flops: 2 * seen(batch) * heads * (2 * LATENT + ROPE),
    };
    machine.bench(c, "mla_attention", name, work, || {
        cpu.mla_attention(&q_latent, &q_rope, &cache, batch, 0..batch.num_seqs, 0.1, &out);
    });
}

fn expanded(c: &mut Criterion, machine: &Machine, heads: usize, batch: &Batch<Cpu>, name: &str) {
    let (cpu, mut random) = (&machine.cpu, Random::new(6));
    let (rows, context) = (batch.num_tokens, batch.max_context_len);
    let q = filled(cpu, &mut random, &[rows, heads, NOPE + ROPE], machine.activation);
    let kv = filled(cpu, &mut random, &[context, heads, NOPE + VALUE], machine.activation);
    let k_rope = filled(cpu, &mut random, &[context, ROPE], machine.activation);
    let out = cpu.alloc(&[rows, heads, VALUE], machine.activation).expect("memory");
    let size = machine.activation.size_bytes();
    let work = Work {
        bytes: size * (q.num_elements() + kv.num_elements() + k_rope.num_elements() + out.num_elements()),
        flops: 2 * seen(batch) * heads * (NOPE + ROPE + VALUE),
    };
    machine.bench(c, "mla_attention", name, work, || {
        cpu.mla_attention_expanded(&q, &kv, &k_rope, batch, 0..1, 0.1, &out);
    });
}

fn small(c: &mut Criterion, machine: &Machine) {
    let (cpu, mut random) = (&machine.cpu, Random::new(4));
    let (rows, hidden, vocab) = (64, 7168, 129_280);
    let x = filled(cpu, &mut random, &[rows, hidden], machine.activation);
    let out = cpu.alloc(&[rows, hidden], machine.activation).expect("memory");
    let (norm, out) = (random.tensor(cpu, &[hidden], DType::BF16), Activation::dense(out));
    let work = Work { bytes: 2 * rows * hidden * machine.activation.size_bytes(), flops: 0 };
    machine
        .bench(c, "rms_norm", "64 rows of 7168, in the caches", work, || cpu.rms_norm(&x, &norm, 1e-6, &out));

    for rows in [1, 8] {
        let logits = filled(cpu, &mut random, &[rows, vocab], DType::F32);
        let drawn = cpu.alloc(&[rows], DType::U32).expect("memory");
        let drawing = RowSampling { temperature: 0.6, top_p: 0.95, seed: 7, ..RowSampling::greedy() };
        for (how, row) in [("greedy", RowSampling::greedy()), ("temperature 0.6, top-p 0.95", drawing)] {
            let sampling = SamplingBatch { rows: vec![row.clone(); rows], ..SamplingBatch::default() };
            let name = format!("rows {rows} of {vocab}, {how}");
            machine.bench(c, "sample", &name, Work { bytes: rows * vocab * 4, flops: 0 }, || {
                cpu.sample(&logits, &sampling, &drawn);
            });
        }
    }
}

fn all(c: &mut Criterion) {
    let machine = Machine::measure();
    for part in [linear, experts, attention, small] {
        part(c, &machine);
    }
}

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = all
}
criterion_main!(kernels);
