//! Parts of a batch, refusals, and how many launches a decode-sized layer is.

use std::sync::Arc;

use r1_backend::{Backend, HostSlice, HostSliceMut, MlpScratch, Routing, ScoreFunction};
use r1_core::DType;

use super::*;
use crate::driver::emu::{Emu, EmuOptions};

const TOKENS: usize = 50;
const DIM: usize = 64;
const WIDTH: usize = 48;

fn run(scratch_bytes: usize) -> Vec<f32> {
    let memory_bytes = 64 << 20;
    let driver = Emu::new(EmuOptions { threads: 2, memory_bytes }).expect("an emulated device");
    let gpu = Gpu::new(Arc::new(driver), memory_bytes, scratch_bytes).expect("room");
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let mut tensor = |shape: [usize; 2]| {
        let tensor = gpu.alloc(&shape, DType::F32).expect("room");
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| next() as f32 / 1e7 - 0.8).collect();
        gpu.upload(HostSlice::F32(&values), &tensor);
        tensor
    };
    let mut mlp = || MlpWeights {
        gate: Weight::Dense { data: tensor([WIDTH, DIM]) },
        up: Weight::Dense { data: tensor([WIDTH, DIM]) },
        down: Weight::Dense { data: tensor([DIM, WIDTH]) },
    };
    let local = vec![mlp(), mlp(), mlp()];
    let (x, weights, out) = (tensor([TOKENS, DIM]), tensor([TOKENS, 2]), tensor([TOKENS, DIM]));
    let ids = gpu.alloc(&[TOKENS, 2], DType::U32).expect("room");
    let choices: Vec<u32> = (0..TOKENS as u32).flat_map(|t| [t % 4, (t + 1 + t / 4 % 3) % 4]).collect();
    gpu.upload(HostSlice::U32(&choices), &ids);
    let table = Experts::new(&gpu, local, 1, 4).expect("table");
    gpu.experts(&Activation::dense(x), &ids, &weights, &table, &out);
    let mut values = vec![0.0; TOKENS * DIM];
    gpu.flush().wait().expect("a step");
    gpu.download(&out, HostSliceMut::F32(&mut values)).expect("download");
    values
}

#[test]
fn parts_give_what_all_tokens_at_once_give() {
    let whole = run(1 << 20);
    assert!(whole.iter().any(|value| value.abs() > 1.0));
    // Room for a dozen tokens.
    assert_eq!(whole, run(16 << 10));
}

#[test]
fn gate_and_up_of_different_formats_are_refused() {
    let driver = Emu::new(EmuOptions { threads: 1, memory_bytes: 8 << 20 }).expect("an emulated device");
    let gpu = Gpu::new(Arc::new(driver), 8 << 20, 1 << 10).expect("room");
    let dense = |dtype| Weight::Dense { data: gpu.alloc(&[4, 4], dtype).expect("room") };
    let mlp = MlpWeights { gate: dense(DType::BF16), up: dense(DType::F32), down: dense(DType::BF16) };
    let refused = Experts::new(&gpu, vec![mlp], 0, 1).err().expect("refused").to_string();
    assert!(refused.contains("expert 0 is int8 or int4, or its gate and up differ in format"), "{refused}");
}

#[test]
fn a_decode_sized_layer_is_three_launches() {
    let memory_bytes = 64 << 20;
    let driver = Emu::new(EmuOptions { threads: 2, memory_bytes }).expect("an emulated device");
    let gpu = Gpu::new(Arc::new(driver), memory_bytes, 16 << 20).expect("room");
    for tokens in [1, 7, 128] {
        let tensor = |shape: &[usize], dtype| gpu.alloc(shape, dtype).expect("room");
        let dense = |n, k| Weight::Dense { data: tensor(&[n, k], DType::BF16) };
        let mlp = || MlpWeights { gate: dense(WIDTH, DIM), up: dense(WIDTH, DIM), down: dense(DIM, WIDTH) };
        let w = MoeWeights {
            router: dense(4, DIM),
            bias: None,
            routing: Routing {
                score: ScoreFunction::Softmax,
                groups: None,
                top_k: 2,
                norm_topk_prob: false,
                routed_scaling_factor: 1.0,
            },
            experts: Experts::new(&gpu, vec![mlp(), mlp(), mlp(), mlp()], 0, 4).expect("table"),
            shared: mlp(),
        };
        let scratch = MoeScratch {
            logits: tensor(&[tokens, 4], DType::F32),
            ids: tensor(&[tokens, 2], DType::U32),
            weights: tensor(&[tokens, 2], DType::F32),
            shared: MlpScratch {
                gate_up: tensor(&[tokens, 2 * WIDTH], DType::BF16),
                hidden: Activation::dense(tensor(&[tokens, WIDTH], DType::BF16)),
            },
        };
        let x = Activation::dense(tensor(&[tokens, DIM], DType::BF16));
        let out = tensor(&[tokens, DIM], DType::BF16);
        let layer = gpu.capture(&mut || gpu.moe_layer(&x, &w, &scratch, &out));
        let layer = layer.expect("it can be captured").expect("the device captures");
        assert_eq!(layer.kernels().len(), 3, "{tokens} tokens: {:?}", layer.kernels());
    }
}
