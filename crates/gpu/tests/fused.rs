//! Composites of a decode step in few launches: how many, and that their bits are those of the operations one by one, however many rows there are
//! and however many blocks finish the work.

use std::sync::Arc;

use r1_backend::{
    Activation, Backend, Batch, CommError, Communicator, Experts, GroupScore, Groups, HeadForm, HeadWeight,
    HostSlice, HostSliceMut, HostTensor, LatentCache, MlpScratch, MlpWeights, MoeScratch, MoeWeights,
    QkvScratch, QkvWeights, QueryProjection, RopeTable, Routing, ScoreFunction, Tensor, Weight, composite,
};
use r1_core::DType;
use r1_gpu::Gpu;

const EPS: f32 = 1e-6;
/// Of short and middle tiles, one and several, ragged; the last one is beyond what is fused.
const TOKENS: [usize; 5] = [1, 8, 21, 64, 70];
const MOST: usize = 70;

/// Activations, their FP8 form, weights: each kind of kernel.
const FORMATS: [(DType, Option<bool>, DType); 5] = [
    (DType::F32, None, DType::F32),
    (DType::BF16, None, DType::BF16),
    (DType::BF16, None, DType::F8E4M3),
    (DType::BF16, Some(false), DType::F8E4M3),
    (DType::BF16, Some(true), DType::F8E4M3),
];

/// One block finishes a tile of rows, or several.
fn devices() -> [Gpu; 2] {
    [1, 8].map(|threads| Gpu::emulated(threads, 256 << 20).expect("an emulated device"))
}

/// Numbers in -1..1, without a pattern that sums would hide.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(gpu: &Gpu, shape: &[usize], dtype: DType, seed: u64) -> Tensor<Gpu> {
    let out = gpu.alloc(shape, dtype).expect("room");
    gpu.upload(HostSlice::F32(&noise(shape.iter().product(), seed)), &out);
    out
}

fn ids(gpu: &Gpu, values: &[u32]) -> Tensor<Gpu> {
    let out = gpu.alloc(&[values.len()], DType::U32).expect("room");
    gpu.upload(HostSlice::U32(values), &out);
    out
}

fn bits(gpu: &Gpu, x: &Tensor<Gpu>) -> Vec<u32> {
    if x.dtype() == DType::U32 {
        let mut values = vec![0; x.num_elements()];
        gpu.download(x, HostSliceMut::U32(&mut values)).expect("download");
        return values;
    }
    let mut values = vec![0.0; x.num_elements()];
    gpu.download(x, HostSliceMut::F32(&mut values)).expect("download");
    values.into_iter().map(f32::to_bits).collect()
}

fn activation_bits(gpu: &Gpu, x: &Activation<Gpu>) -> Vec<Vec<u32>> {
    let fp8 = x.fp8.iter().flat_map(|fp8| [&fp8.data, &fp8.scales]);
    [&x.dense].into_iter().chain(fp8).map(|part| bits(gpu, part)).collect()
}

fn weight(gpu: &Gpu, n: usize, k: usize, dtype: DType, seed: u64) -> Weight<Gpu> {
    if dtype != DType::F8E4M3 {
        return Weight::Dense { data: tensor(gpu, &[n, k], dtype, seed) };
    }
    // Codes without NaN.
    let codes: Vec<u8> = noise(n * k, seed).iter().map(|x| (x * 120.0) as i8 as u8 & 0xf7).collect();
    let data = gpu.import(&HostTensor::new(Arc::new(codes), 0..n * k, &[n, k], dtype)).expect("import");
    let offset = [100, 70];
    let blocks = [(n + offset[0]).div_ceil(128), (k + offset[1]).div_ceil(128)];
    Weight::Fp8Block { data, scales: tensor(gpu, &blocks, DType::F32, seed + 1), block: [128; 2], offset }
}

fn input(gpu: &Gpu, shape: [usize; 2], dtype: DType, fp8: Option<bool>) -> Activation<Gpu> {
    let x = Activation::alloc(gpu, shape[0], shape[1], dtype, fp8).expect("room");
    gpu.upload(HostSlice::F32(&noise(shape[0] * shape[1], 1)), &x.dense);
    gpu.quantize(&x);
    x
}

/// A group of one rank.
struct Alone;

impl Communicator<Gpu> for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn all_reduce(&self, _: &Gpu, _: &Tensor<Gpu>) {}
    fn all_gather(&self, _: &Gpu, _: &Tensor<Gpu>, _: &Tensor<Gpu>) {}
    fn all_gather_last(&self, _: &Gpu, _: &Tensor<Gpu>, _: &Tensor<Gpu>) {}
    fn reduce_scatter(&self, _: &Gpu, _: &Tensor<Gpu>, _: &Tensor<Gpu>) {}
    fn all_to_all(&self, _: &Gpu, _: &Tensor<Gpu>, _: &Tensor<Gpu>) {}
    fn broadcast(&self, _: &Gpu, _: &Tensor<Gpu>, _: usize) {}
    fn send(&self, _: &Gpu, _: &Tensor<Gpu>, _: usize) {}
    fn recv(&self, _: &Gpu, _: &Tensor<Gpu>, _: usize) {}
    fn check(&self) -> Result<(), CommError> {
        Ok(())
    }
}

/// What a composite gives, fused (`true`) and not, for the first rows.
fn same_bits(what: &str, tokens: &[usize], run: impl Fn(usize, bool) -> Vec<Vec<u32>>) {
    for &tokens in tokens {
        let (fused, plain) = (run(tokens, true), run(tokens, false));
        for (i, (fused, plain)) in fused.iter().zip(&plain).enumerate() {
            let differs = fused.iter().zip(plain).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{what}, {tokens} tokens: of result {i}, the first value that differs");
        }
    }
}

/// A captured call launches so many kernels, for so many rows.
fn launches(what: &str, gpu: &Gpu, most: usize, run: impl Fn(usize)) {
    for tokens in [1, 8, 32] {
        let graph = gpu.capture(&mut || run(tokens)).expect("capture").expect("a device that captures");
        let kernels = graph.kernels();
        assert!(!kernels.is_empty() && kernels.len() <= most, "{what}, {tokens} tokens: {kernels:?}");
    }
}

/// Row widths of one warp's norm and of several, k cut into ranges and not.
const LINEARS: [[usize; 2]; 2] = [[70, 1100], [2056, 72]];

#[test]
fn linear_add_norm() {
    for gpu in &devices() {
        for (dtype, fp8, format) in FORMATS {
            for [n, k] in LINEARS {
                let what = format!("linear_add_norm {dtype} {fp8:?} × {format} [{n}, {k}]");
                let (x, w) = (input(gpu, [MOST, k], dtype, fp8), weight(gpu, n, k, format, 3));
                let norm = tensor(gpu, &[n], dtype, 5);
                let block_out = gpu.alloc(&[MOST, n], dtype).expect("room");
                let residual = gpu.alloc(&[MOST, n], dtype).expect("room");
                let out = Activation::alloc(gpu, MOST, n, dtype, fp8).expect("room");
                let run = |tokens: usize, fused: bool| {
                    let (x, b) = (x.rows(0..tokens), block_out.rows(0..tokens));
                    let (r, o) = (residual.rows(0..tokens), out.rows(0..tokens));
                    if fused {
                        gpu.linear_add_norm(&Alone, &x, &w, &b, &r, &norm, EPS, &o);
                    } else {
                        composite::linear_add_norm(gpu, &Alone, &x, &w, &b, &r, &norm, EPS, &o);
                    }
                };
                same_bits(&what, &TOKENS, |tokens, fused| {
                    gpu.upload(HostSlice::F32(&noise(MOST * n, 6)), &residual);
                    run(tokens, fused);
                    gpu.flush().wait().expect("the step");
                    let mut all = activation_bits(gpu, &out.rows(0..tokens));
                    all.push(bits(gpu, &residual));
                    all
                });
                launches(&what, gpu, 1, |tokens| run(tokens, true));
            }
        }
    }
}

#[test]
fn mla_qkv() {
    for gpu in &devices() {
        for (dtype, fp8, format) in FORMATS {
            let (dim, rank, q_width, kv_width) = (1100, 300, 40, 42);
            let what = format!("mla_qkv {dtype} {fp8:?} × {format}");
            let x = input(gpu, [MOST, dim], dtype, fp8);
            let w = QkvWeights {
                q: QueryProjection::LowRank {
                    a: weight(gpu, rank, dim, format, 2),
                    norm: tensor(gpu, &[rank], dtype, 4),
                    b: weight(gpu, q_width, rank, format, 6),
                },
                kv_a: weight(gpu, kv_width, dim, format, 8),
                eps: EPS,
            };
            let scratch = QkvScratch {
                q_a: gpu.alloc(&[MOST, rank], dtype).expect("room"),
                q_a_normed: Activation::alloc(gpu, MOST, rank, dtype, fp8).expect("room"),
            };
            let q = gpu.alloc(&[MOST, q_width], dtype).expect("room");
            let kv_a = gpu.alloc(&[MOST, kv_width], dtype).expect("room");
            let run = |tokens: usize, fused: bool| {
                let scratch = QkvScratch {
                    q_a: scratch.q_a.rows(0..tokens),
                    q_a_normed: scratch.q_a_normed.rows(0..tokens),
                };
                let (x, q, kv_a) = (x.rows(0..tokens), q.rows(0..tokens), kv_a.rows(0..tokens));
                if fused {
                    gpu.mla_qkv(&x, &w, &scratch, &q, &kv_a);
                } else {
                    composite::mla_qkv(gpu, &x, &w, &scratch, &q, &kv_a);
                }
            };
            same_bits(&what, &TOKENS, |tokens, fused| {
                run(tokens, fused);
                gpu.flush().wait().expect("the step");
                let mut all = activation_bits(gpu, &scratch.q_a_normed.rows(0..tokens));
                all.extend([&q, &kv_a].map(|x| bits(gpu, &x.rows(0..tokens))));
                all
            });
            launches(&what, gpu, 2, |tokens| run(tokens, true));
        }
    }
}

/// A step of sequences that decode, the last of them padding where there are several.
fn decodes(gpu: &Gpu, tokens: usize) -> Batch<Gpu> {
    let count = tokens as u32;
    let mut slots: Vec<u32> = (0..count).rev().collect();
    if tokens > 1 {
        slots[tokens - 1] = u32::MAX;
    }
    Batch {
        positions: ids(gpu, &(0..count).map(|t| t * 7 % 32).collect::<Vec<_>>()),
        slots: ids(gpu, &slots),
        query_start: ids(gpu, &(0..=count).collect::<Vec<_>>()),
        context_len: ids(gpu, &vec![1; tokens]),
        context_start: ids(gpu, &(0..=count).collect::<Vec<_>>()),
        block_table: ids(gpu, &vec![0; tokens]).reshape(&[tokens, 1]),
        num_tokens: tokens,
        num_seqs: tokens,
        num_decodes: tokens,
        prefill_context_tokens: 0,
        max_context_len: 1,
    }
}

#[test]
fn mla_absorb() {
    let (heads, nope, value, rope_dim) = (3, 48, 8, 16);
    for gpu in &devices() {
        let batches: Vec<_> = (0..=MOST).map(|tokens| (tokens > 0).then(|| decodes(gpu, tokens))).collect();
        let rope = RopeTable { cos_sin: tensor(gpu, &[32, rope_dim], DType::F32, 8) };
        for (dtype, _, format) in FORMATS {
            for (cache_dtype, latent) in [(dtype, 40), (DType::F8E4M3, 300)] {
                let what = format!("mla_absorb {dtype} × {format} into {cache_dtype}");
                let w_uk = HeadWeight {
                    weight: weight(gpu, heads * (nope + value), latent, format, 2),
                    rows_per_head: nope + value,
                    rows: 0..nope,
                    form: HeadForm::RowsIn,
                };
                let norm = tensor(gpu, &[latent], dtype, 4);
                let kv_a = tensor(gpu, &[MOST, latent + rope_dim], dtype, 5);
                let q = gpu.alloc(&[MOST, heads, nope + rope_dim], dtype).expect("room");
                let q_latent = gpu.alloc(&[MOST, heads, latent], dtype).expect("room");
                let run = |tokens: usize, fused: bool, cache: &LatentCache<Gpu>| {
                    let batch = batches[tokens].as_ref().expect("tokens");
                    let (q, kv_a) = (q.rows(0..tokens), kv_a.rows(0..tokens));
                    // Not all rows are absorbed.
                    let q_latent = q_latent.rows(0..tokens.div_ceil(2));
                    if fused {
                        gpu.mla_absorb(&q, &kv_a, &norm, EPS, &rope, batch, cache, &w_uk, &q_latent);
                    } else {
                        composite::mla_absorb(
                            gpu, &q, &kv_a, &norm, EPS, &rope, batch, cache, &w_uk, &q_latent,
                        );
                    }
                };
                let alloc = || LatentCache::alloc(gpu, cache_dtype, [5, 16], latent, rope_dim).expect("room");
                same_bits(&what, &TOKENS, |tokens, fused| {
                    let cache = alloc();
                    gpu.upload(HostSlice::F32(&noise(q.num_elements(), 6)), &q);
                    run(tokens, fused, &cache);
                    gpu.flush().wait().expect("the step");
                    let fp8 = cache.fp8.iter().flat_map(|fp8| [&fp8.scales, &fp8.rope]);
                    [&q, &q_latent, &cache.data].into_iter().chain(fp8).map(|x| bits(gpu, x)).collect()
                });
                let cache = alloc();
                launches(&what, gpu, 1, |tokens| run(tokens, true, &cache));
            }
        }
    }
}

#[test]
fn moe_layer() {
    const MANY: usize = 140;
    let (dim, width, total, top_k) = (1100, 40, 40, 3);
    for gpu in &devices() {
        for (dtype, fp8, format) in FORMATS {
            let what = format!("moe_layer {dtype} {fp8:?} × {format}");
            let mlp = |seed| MlpWeights {
                gate: weight(gpu, width, dim, format, seed),
                up: weight(gpu, width, dim, format, seed + 2),
                down: weight(gpu, dim, width, format, seed + 4),
            };
            let w = MoeWeights {
                router: weight(gpu, total, dim, dtype, 2),
                bias: Some(tensor(gpu, &[total], DType::F32, 3)),
                routing: Routing {
                    score: ScoreFunction::Sigmoid,
                    groups: Some(Groups { n_group: 4, topk_group: 2, score: GroupScore::TopTwoSum }),
                    top_k,
                    norm_topk_prob: true,
                    routed_scaling_factor: 2.5,
                },
                experts: Experts::new(gpu, (0..4).map(|e| mlp(10 + 6 * e)).collect(), 0, total)
                    .expect("room"),
                shared: mlp(100),
            };
            let x = input(gpu, [MANY, dim], dtype, fp8);
            let out = gpu.alloc(&[MANY, dim], dtype).expect("room");
            let scratch = |tokens: usize| MoeScratch {
                logits: gpu.alloc(&[tokens, total], DType::F32).expect("room"),
                ids: gpu.alloc(&[tokens, top_k], DType::U32).expect("room"),
                weights: gpu.alloc(&[tokens, top_k], DType::F32).expect("room"),
                shared: MlpScratch {
                    gate_up: gpu.alloc(&[tokens, 2 * width], dtype).expect("room"),
                    hidden: Activation::alloc(gpu, tokens, width, dtype, fp8).expect("room"),
                },
            };
            // The choice, and the first token's sum, whatever the others are.
            same_bits(&what, &[1, 8, 21, 128, MANY], |tokens, fused| {
                let scratch = scratch(tokens);
                let MoeScratch { logits, ids, weights, .. } = &scratch;
                if fused {
                    gpu.moe_layer(&x.rows(0..tokens), &w, &scratch, &out.rows(0..tokens));
                } else {
                    gpu.linear(&Activation::dense(x.dense.rows(0..tokens)), &w.router, logits);
                    gpu.route(logits, w.bias.as_ref(), &w.routing, ids, weights);
                    gpu.moe_layer(&x.rows(0..1), &w, &rows(&scratch, 1), &out.rows(0..1));
                }
                gpu.flush().wait().expect("the step");
                [logits, ids, weights, &out.rows(0..1)].map(|x| bits(gpu, x)).into()
            });
            let most = scratch(32);
            launches(&what, gpu, 3, |tokens| {
                let scratch = rows(&most, tokens);
                gpu.moe_layer(&x.rows(0..tokens), &w, &scratch, &out.rows(0..tokens));
            });
        }
    }
}

fn rows(scratch: &MoeScratch<Gpu>, tokens: usize) -> MoeScratch<Gpu> {
    MoeScratch {
        logits: scratch.logits.rows(0..tokens),
        ids: scratch.ids.rows(0..tokens),
        weights: scratch.weights.rows(0..tokens),
        shared: MlpScratch {
            gate_up: scratch.shared.gate_up.rows(0..tokens),
            hidden: scratch.shared.hidden.rows(0..tokens),
        },
    }
}
