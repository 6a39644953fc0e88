//! Absorbed attention up to the output projection in one composite: the bits of the default body, of a row alone, and how many launches.

use std::sync::Arc;

use r1_backend::{
    Activation, Backend, Batch, Fp8Activation, HeadForm, HeadWeight, HostSlice, HostSliceMut, HostTensor,
    LatentCache, Tensor, Weight, composite,
};
use r1_core::DType;
use r1_gpu::Gpu;

const BLOCK_SIZE: usize = 16;
const SCALE: f32 = 0.2;
const ROPE: usize = 16;
/// One split, padding, several splits and whole ones, with rows enough for blocks of more than one.
const CONTEXTS: [usize; 7] = [3, 0, 700, 256, 257, 31, 0];
const MAX_BLOCKS: usize = 44;

#[derive(Clone, Copy, Debug)]
struct Case {
    heads: usize,
    latent: usize,
    value: usize,
    dtype: DType,
    cache: DType,
    weight: DType,
    has_fp8: bool,
    /// What a captured step of a decode launches.
    kernels: &'static [&'static str],
}

const CASES: [Case; 5] = [
    // Whole groups of 128: quantised along the way. So many heads that long contexts' splits do not fit scratch memory at once.
    Case {
        heads: 80,
        latent: 512,
        value: 128,
        dtype: DType::BF16,
        cache: DType::F8E4M3,
        weight: DType::F8E4M3,
        has_fp8: true,
        kernels: &["mla_split_fp8_512", "mla_finish_w8"],
    },
    Case {
        heads: 3,
        latent: 100,
        value: 256,
        dtype: DType::BF16,
        cache: DType::BF16,
        weight: DType::BF16,
        has_fp8: true,
        kernels: &["mla_split_bf16_128", "mla_finish_bf16"],
    },
    // Groups that heads share.
    Case {
        heads: 5,
        latent: 128,
        value: 72,
        dtype: DType::BF16,
        cache: DType::BF16,
        weight: DType::F8E4M3,
        has_fp8: true,
        kernels: &["mla_split_bf16_128", "mla_finish_w8", "quantize"],
    },
    Case {
        heads: 2,
        latent: 130,
        value: 70,
        dtype: DType::BF16,
        cache: DType::BF16,
        weight: DType::BF16,
        has_fp8: false,
        kernels: &["mla_split_bf16_512", "mla_finish_bf16"],
    },
    // The default body.
    Case {
        heads: 2,
        latent: 40,
        value: 24,
        dtype: DType::F32,
        cache: DType::F32,
        weight: DType::F32,
        has_fp8: false,
        kernels: &["mla_split_f32_128", "mla_combine", "gemm_simt"],
    },
];

/// Values in -1.5..1.5 that look random; the same for the same seed.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| {
        let mixed = (i as u32).wrapping_mul(0x9e37_79b9).wrapping_add(seed).wrapping_mul(0x85eb_ca6b);
        let mixed = (mixed ^ mixed >> 15).wrapping_mul(0xc2b2_ae35);
        ((mixed >> 8) as f32 / (1 << 24) as f32 - 0.5) * 3.0
    };
    (0..count).map(value).collect()
}

fn floats(gpu: &Gpu, shape: &[usize], dtype: DType, values: &[f32]) -> Tensor<Gpu> {
    let tensor = gpu.alloc(shape, dtype).expect("room");
    gpu.upload(HostSlice::F32(values), &tensor);
    tensor
}

fn ids(gpu: &Gpu, shape: &[usize], values: &[u32]) -> Tensor<Gpu> {
    let tensor = gpu.alloc(shape, DType::U32).expect("room");
    gpu.upload(HostSlice::U32(values), &tensor);
    tensor
}

/// Each of some sequences decodes one row; blocks of sequence `s` are `s * MAX_BLOCKS..`.
fn batch(gpu: &Gpu, seqs: std::ops::Range<usize>, max_context_len: usize) -> Batch<Gpu> {
    let rows = seqs.len();
    let counting: Vec<u32> = (0..=rows as u32).collect();
    let lens: Vec<u32> = seqs.clone().map(|seq| CONTEXTS[seq] as u32).collect();
    let table: Vec<u32> =
        seqs.flat_map(|seq| (0..MAX_BLOCKS).map(move |block| (seq * MAX_BLOCKS + block) as u32)).collect();
    Batch {
        positions: ids(gpu, &[rows], &vec![0; rows]),
        slots: ids(gpu, &[rows], &vec![0; rows]),
        query_start: ids(gpu, &[rows + 1], &counting),
        context_len: ids(gpu, &[rows], &lens),
        context_start: ids(gpu, &[rows + 1], &vec![0; rows + 1]),
        block_table: ids(gpu, &[rows, MAX_BLOCKS], &table),
        num_tokens: rows,
        num_seqs: rows,
        num_decodes: rows,
        prefill_context_tokens: 0,
        max_context_len,
    }
}

fn w_uv(gpu: &Gpu, case: &Case) -> HeadWeight<Gpu> {
    let (nope, k) = (24, case.latent);
    let rows_per_head = nope + case.value;
    let n = case.heads * rows_per_head;
    let weight = if case.weight == DType::F8E4M3 {
        // Codes without NaN.
        let codes: Vec<u8> = noise(n * k, 8).iter().map(|x| (x * 80.0) as i8 as u8 & 0xf7).collect();
        let data =
            gpu.import(&HostTensor::new(Arc::new(codes), 0..n * k, &[n, k], case.weight)).expect("import");
        let blocks = [n.div_ceil(128), k.div_ceil(128)];
        let scales = noise(blocks[0] * blocks[1], 9).iter().map(|x| x / 100.0).collect::<Vec<_>>();
        Weight::Fp8Block {
            data,
            scales: floats(gpu, &blocks, DType::F32, &scales),
            block: [128; 2],
            offset: [0; 2],
        }
    } else {
        Weight::Dense { data: floats(gpu, &[n, k], case.weight, &noise(n * k, 7)) }
    };
    HeadWeight { weight, rows_per_head, rows: nope..rows_per_head, form: HeadForm::RowsOut }
}

struct Layer<'a> {
    gpu: &'a Gpu,
    case: Case,
    cache: LatentCache<Gpu>,
    w_uv: HeadWeight<Gpu>,
}

/// Of each row, dense values, codes and scales, as bits.
type Rows = Vec<Vec<u32>>;

impl<'a> Layer<'a> {
    fn new(gpu: &'a Gpu, case: Case) -> Self {
        let pages = [CONTEXTS.len() * MAX_BLOCKS, BLOCK_SIZE];
        let cache = LatentCache::alloc(gpu, case.cache, pages, case.latent, ROPE).expect("room");
        gpu.upload(HostSlice::F32(&noise(cache.data.num_elements(), 1)), &cache.data);
        if let Some(fp8) = &cache.fp8 {
            let positive: Vec<_> =
                noise(fp8.scales.num_elements(), 2).iter().map(|v| v.abs() + 0.1).collect();
            gpu.upload(HostSlice::F32(&positive), &fp8.scales);
            gpu.upload(HostSlice::F32(&noise(fp8.rope.num_elements(), 3)), &fp8.rope);
        }
        Self { gpu, case, cache, w_uv: w_uv(gpu, &case) }
    }

    fn run(
        &self,
        seqs: std::ops::Range<usize>,
        longest: usize,
        is_default: bool,
    ) -> (Rows, Vec<&'static str>) {
        let Self { gpu, case, .. } = self;
        let (rows, width) = (seqs.len(), case.heads * case.value);
        let query = |dim: usize, seed| {
            let per_row = case.heads * dim;
            let all = noise(CONTEXTS.len() * per_row, seed);
            floats(gpu, &[rows, case.heads, dim], case.dtype, &all[seqs.start * per_row..seqs.end * per_row])
        };
        let (q_latent, q_rope) = (query(case.latent, 4), query(ROPE, 5));
        let poison =
            |shape: &[usize], dtype| floats(gpu, shape, dtype, &vec![f32::NAN; shape.iter().product()]);
        let o_latent = poison(&[rows, case.heads, case.latent], case.dtype);
        let attended = Activation {
            dense: poison(&[rows, width], case.dtype),
            fp8: case.has_fp8.then(|| Fp8Activation {
                data: poison(&[rows, width], DType::F8E4M3),
                scales: poison(&[rows, width.div_ceil(128)], DType::F32),
                power_of_two_scales: false,
            }),
        };
        let batch = batch(gpu, seqs, longest);
        let mut step = || {
            let all = 0..rows;
            if is_default {
                composite::mla_attend(
                    *gpu,
                    &q_latent,
                    &q_rope,
                    &self.cache,
                    &batch,
                    all,
                    SCALE,
                    &self.w_uv,
                    &o_latent,
                    &attended,
                );
            } else {
                gpu.mla_attend(
                    &q_latent,
                    &q_rope,
                    &self.cache,
                    &batch,
                    all,
                    SCALE,
                    &self.w_uv,
                    &o_latent,
                    &attended,
                );
            }
        };
        // What is uploaded is there before.
        gpu.flush().wait().expect("uploads");
        let graph = gpu.capture(&mut step).expect("a graph").expect("captures");
        gpu.replay(&graph);
        gpu.flush().wait().expect("no launch fails");
        let fp8 = attended.fp8.as_ref();
        let parts = [Some(&attended.dense), fp8.map(|fp8| &fp8.data), fp8.map(|fp8| &fp8.scales)];
        let mut out = vec![Vec::new(); rows];
        for part in parts.into_iter().flatten() {
            let mut values = vec![0.0; part.num_elements()];
            gpu.download(part, HostSliceMut::F32(&mut values)).expect("a download");
            for (row, values) in out.iter_mut().zip(values.chunks(part.dim(1))) {
                assert!(values.iter().all(|value| value.is_finite()), "{case:?}: a value is left out");
                row.extend(values.iter().map(|value| value.to_bits()));
            }
        }
        (out, graph.kernels().to_vec())
    }
}

#[test]
fn attended_rows_have_the_default_bodys_bits() {
    let gpu = Gpu::emulated(2, 1 << 30).expect("an emulated device");
    for case in CASES {
        let layer = Layer::new(&gpu, case);
        let (all, longest) = (0..CONTEXTS.len(), 700);
        let (own, kernels) = layer.run(all.clone(), longest, false);
        assert_eq!(kernels, case.kernels, "{case:?}");
        let (default, _) = layer.run(all.clone(), longest, true);
        for (row, (own, default)) in own.iter().zip(&default).enumerate() {
            let differs = (0..own.len()).find(|&i| own[i] != default[i]);
            assert_eq!(differs, None, "{case:?}: of row {row}, the first value that differs");
        }
        let dense = case.heads * case.value;
        assert!(own[1][..dense].iter().all(|&bits| bits << 1 == 0), "{case:?}: padding gives zeros");
        assert!(own[2][..dense].iter().any(|&bits| bits != 0), "{case:?}: a row of zeros");
        // As a captured step's geometry; in parts, where scratch memory is short.
        assert!(layer.run(all, 100_000, false).0 == own, "{case:?}: made for longer contexts");
        for row in [0, 2, 4] {
            let longest = CONTEXTS[row];
            assert!(layer.run(row..row + 1, longest, false).0[0] == own[row], "{case:?}: row {row} alone");
        }
    }
}
