//! A token's mixture of experts has the same bits alone and in a batch: whatever the height of the tiles, whichever block adds up,
//! and with the shared expert or without.

use r1_backend::{
    Activation, Backend, Experts, GroupScore, Groups, HostSlice, HostSliceMut, HostTensor, MlpScratch,
    MlpWeights, MoeScratch, MoeWeights, Routing, ScoreFunction, Tensor, Weight,
};
use r1_core::DType;
use r1_gpu::Gpu;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }
}

fn tensor(gpu: &Gpu, values: &[f32], shape: &[usize], dtype: DType) -> Tensor<Gpu> {
    let tensor = gpu.alloc(shape, dtype).expect("room");
    gpu.upload(HostSlice::F32(values), &tensor);
    tensor
}

fn bits(gpu: &Gpu, tensor: &Tensor<Gpu>) -> Vec<u32> {
    let mut values = vec![0.0; tensor.num_elements()];
    gpu.download(tensor, HostSliceMut::F32(&mut values)).expect("download");
    assert!(values.iter().all(|value| value.is_finite()));
    values.into_iter().map(f32::to_bits).collect()
}

/// E4M3 weights begin inside a block where `offset` says so.
fn weight(
    gpu: &Gpu,
    random: &mut Random,
    [n, k]: [usize; 2],
    dtype: DType,
    offset: [usize; 2],
) -> Weight<Gpu> {
    let spread = 1.0 / (k as f32).sqrt();
    if dtype != DType::F8E4M3 {
        let values: Vec<f32> = random.floats(n * k).into_iter().map(|value| 2.0 * spread * value).collect();
        return Weight::Dense { data: tensor(gpu, &values, &[n, k], dtype) };
    }
    let codes = (0..n * k).map(|_| (random.next() % 0x70) as u8 | (random.next() & 0x80) as u8).collect();
    let blocks = [(n + offset[0]).div_ceil(128), (k + offset[1]).div_ceil(128)];
    let scales: Vec<f32> =
        (0..blocks[0] * blocks[1]).map(|_| spread / 60.0 * (1.5 + random.float())).collect();
    Weight::Fp8Block {
        data: gpu.import_matrix(&HostTensor::from_vec(codes, &[n, k], DType::F8E4M3)).expect("import"),
        scales: tensor(gpu, &scales, &blocks, DType::F32),
        block: [128; 2],
        offset,
    }
}

fn mlp(
    gpu: &Gpu,
    random: &mut Random,
    [dim, width]: [usize; 2],
    dtype: DType,
    offset: [usize; 2],
) -> MlpWeights<Gpu> {
    MlpWeights {
        gate: weight(gpu, random, [width, dim], dtype, offset),
        up: weight(gpu, random, [width, dim], dtype, offset),
        down: weight(gpu, random, [dim, width], dtype, offset),
    }
}

struct Case {
    x: DType,
    fp8: Option<bool>,
    /// Of the experts, in turn; the shared one has the first.
    weights: &'static [DType],
    /// Of x, of the routed experts and of the shared one.
    sizes: [usize; 3],
    offset: [usize; 2],
}

const TOKENS: usize = 150;
const TOTAL: usize = 4;
const TOP_K: usize = 2;

/// More than the tokens that decode takes, of which an expert has more than a tile.
fn check(case: &Case) {
    let gpu = &Gpu::emulated(2, 256 << 20).expect("an emulated device");
    let random = &mut Random(7);
    let [dim, width, shared_width] = case.sizes;
    let local = (0..TOTAL - 1)
        .map(|e| mlp(gpu, random, [dim, width], case.weights[e % case.weights.len()], case.offset))
        .collect();
    let layer = MoeWeights {
        router: weight(gpu, random, [TOTAL, dim], DType::F32, [0; 2]),
        bias: None,
        routing: Routing {
            score: ScoreFunction::Sigmoid,
            groups: Some(Groups { n_group: 2, topk_group: 1, score: GroupScore::TopTwoSum }),
            top_k: TOP_K,
            norm_topk_prob: true,
            routed_scaling_factor: 2.5,
        },
        experts: Experts::new(gpu, local, 1, TOTAL).expect("table"),
        shared: mlp(gpu, random, [dim, shared_width], case.weights[0], case.offset),
    };
    let x = Activation::alloc(gpu, TOKENS, dim, case.x, case.fp8).expect("room");
    gpu.upload(HostSlice::F32(&random.floats(TOKENS * dim)), &x.dense);
    gpu.quantize(&x);
    let before = random.floats(TOKENS * dim);

    let run = |rows: std::ops::Range<usize>| {
        let tokens = rows.len();
        let alloc = |cols, dtype| gpu.alloc(&[tokens, cols], dtype).expect("room");
        let scratch = MoeScratch {
            logits: alloc(TOTAL, DType::F32),
            ids: alloc(TOP_K, DType::U32),
            weights: alloc(TOP_K, DType::F32),
            shared: MlpScratch {
                gate_up: alloc(2 * shared_width, case.x),
                hidden: Activation::alloc(gpu, tokens, shared_width, case.x, case.fp8).expect("room"),
            },
        };
        let x = x.rows(rows.clone());
        let whole = alloc(dim, case.x);
        gpu.moe_layer(&x, &layer, &scratch, &whole);
        let routed = tensor(gpu, &before[rows.start * dim..rows.end * dim], &[tokens, dim], case.x);
        gpu.experts(&x, &scratch.ids, &scratch.weights, &layer.experts, &routed);
        gpu.flush().wait().expect("a step");
        (bits(gpu, &whole), bits(gpu, &routed))
    };
    let (whole, routed) = run(0..TOKENS);
    for rows in [0..1, 77..78, TOKENS - 1..TOKENS, 3..40, 20..148] {
        let (part_whole, part_routed) = run(rows.clone());
        let range = rows.start * dim..rows.end * dim;
        assert!(part_whole == whole[range.clone()], "moe_layer: tokens {rows:?}");
        assert!(part_routed == routed[range], "experts: tokens {rows:?}");
    }
}

#[test]
fn fp8_aligned() {
    let weights = &[DType::F8E4M3];
    check(&Case { x: DType::BF16, fp8: Some(false), weights, sizes: [256, 144, 288], offset: [0; 2] });
}

#[test]
fn fp8_ragged() {
    let weights = &[DType::F8E4M3];
    check(&Case { x: DType::BF16, fp8: Some(true), weights, sizes: [136, 70, 35], offset: [100, 70] });
}

#[test]
fn fp8_begins_at_half_a_block() {
    let weights = &[DType::F8E4M3];
    check(&Case { x: DType::F32, fp8: Some(false), weights, sizes: [192, 160, 64], offset: [64, 64] });
}

#[test]
fn w8() {
    let weights = &[DType::F8E4M3];
    check(&Case { x: DType::BF16, fp8: None, weights, sizes: [160, 144, 288], offset: [0, 32] });
}

#[test]
fn bf16() {
    let weights = &[DType::BF16];
    check(&Case { x: DType::BF16, fp8: None, weights, sizes: [136, 72, 140], offset: [0; 2] });
}

#[test]
fn f32() {
    let weights = &[DType::F32];
    check(&Case { x: DType::F32, fp8: None, weights, sizes: [70, 33, 20], offset: [0; 2] });
}

#[test]
fn mixed() {
    let weights = &[DType::F8E4M3, DType::BF16];
    check(&Case { x: DType::BF16, fp8: Some(false), weights, sizes: [136, 72, 140], offset: [0; 2] });
    let weights = &[DType::F16, DType::F8E4M3, DType::BF16];
    check(&Case { x: DType::BF16, fp8: None, weights, sizes: [136, 72, 140], offset: [0; 2] });
}
