//! Operations on rows of activations: a row alone is, bit for bit, what it is in a batch; padding rows write to no cache.

use std::iter::once;
use std::ops::Range;

use r1_backend::{Activation, Backend, Batch, HostSlice, HostSliceMut, LatentCache, RopeTable, Tensor};
use r1_core::DType;
use r1_gpu::Gpu;

const ROWS: usize = 5;
const DTYPES: [DType; 2] = [DType::F32, DType::BF16];

fn emu() -> Gpu {
    Gpu::emulated(2, 256 << 20).expect("an emulated device")
}

/// Values that repeat nowhere, of both signs.
fn noise(seed: u32, count: usize) -> Vec<f32> {
    let mut state = u64::from(seed) << 32 | 0x9E37_79B9;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| 3.0 * next()).collect()
}

fn floats(gpu: &Gpu, shape: &[usize], dtype: DType, values: &[f32]) -> Tensor<Gpu> {
    let tensor = gpu.alloc(shape, dtype).expect("room");
    gpu.upload(HostSlice::F32(values), &tensor);
    tensor
}

fn ids(gpu: &Gpu, values: &[u32]) -> Tensor<Gpu> {
    let tensor = gpu.alloc(&[values.len()], DType::U32).expect("room");
    gpu.upload(HostSlice::U32(values), &tensor);
    tensor
}

fn bits(gpu: &Gpu, tensor: &Tensor<Gpu>) -> Vec<u32> {
    let mut values = vec![0.0; tensor.num_elements()];
    gpu.download(tensor, HostSliceMut::F32(&mut values)).expect("download");
    values.into_iter().map(f32::to_bits).collect()
}

fn activation(gpu: &Gpu, cols: usize, dtype: DType) -> Activation<Gpu> {
    Activation::alloc(gpu, ROWS, cols, dtype, Some(false)).expect("room")
}

/// All that an activation holds.
fn all_bits(gpu: &Gpu, x: &Activation<Gpu>) -> Vec<Vec<u32>> {
    let fp8 = x.fp8.as_ref().expect("an FP8 form");
    [&x.dense, &fp8.data, &fp8.scales].map(|part| bits(gpu, part)).into()
}

/// Runs `op` on all rows at once and row by row, and compares.
fn check(gpu: &Gpu, what: &str, cols: usize, dtype: DType, op: impl Fn(Range<usize>, &Activation<Gpu>)) {
    let (together, apart) = (activation(gpu, cols, dtype), activation(gpu, cols, dtype));
    op(0..ROWS, &together);
    // In another order, too.
    for row in (0..ROWS).rev() {
        op(row..row + 1, &apart.rows(row..row + 1));
    }
    gpu.flush().wait().expect("the kernels run");
    let together = all_bits(gpu, &together);
    assert!(together[0].iter().any(|bits| *bits != 0), "{what}: nothing was written");
    assert!(together == all_bits(gpu, &apart), "{what} of {cols} columns {dtype}: rows depend on each other");
}

#[test]
fn a_row_alone_is_what_it_is_in_a_batch() {
    let gpu = emu();
    // One eight, rows of whole vectors and not, several eights per thread.
    for cols in [3, 136, 576, 2049] {
        for dtype in DTYPES {
            let x = floats(&gpu, &[ROWS, 2 * cols], dtype, &noise(1, 2 * ROWS * cols));
            let half = x.narrow(1, 0..cols);
            let weight = floats(&gpu, &[cols], dtype, &noise(2, cols));
            check(&gpu, "rms_norm", cols, dtype, |rows, out| {
                gpu.rms_norm(&half.rows(rows), &weight, 1e-6, out);
            });
            check(&gpu, "silu_mul", cols, dtype, |rows, out| gpu.silu_mul(&x.rows(rows), out));
            check(&gpu, "add_rms_norm", cols, dtype, |rows, out| {
                let residual = floats(&gpu, &[ROWS, cols], dtype, &noise(3, ROWS * cols)).rows(rows.clone());
                gpu.add_rms_norm(&residual, &half.rows(rows), &weight, 1e-6, out);
            });
            check(&gpu, "quantize", cols, dtype, |rows, out| {
                let values = noise(4, ROWS * cols);
                gpu.upload(HostSlice::F32(&values[rows.start * cols..rows.end * cols]), &out.dense);
                gpu.quantize(out);
            });
        }
    }
}

/// What [`Backend::rope_cache`] makes of queries and of the cache, of the tokens `rows` in one step; `slots` as given.
fn rope_cache(
    gpu: &Gpu,
    cache_dtype: DType,
    steps: impl IntoIterator<Item = Range<usize>>,
    slots: [u32; ROWS],
) -> Vec<Vec<u32>> {
    const HEADS: usize = 3;
    const LATENT: usize = 200;
    const ROPE: usize = 16;
    let q = floats(gpu, &[ROWS, HEADS, ROPE], DType::BF16, &noise(5, ROWS * HEADS * ROPE));
    let kv_a = floats(gpu, &[ROWS, LATENT + ROPE], DType::BF16, &noise(6, ROWS * (LATENT + ROPE)));
    let norm = floats(gpu, &[LATENT], DType::BF16, &noise(7, LATENT));
    let rope = RopeTable { cos_sin: floats(gpu, &[32, ROPE], DType::F32, &noise(8, 32 * ROPE)) };
    let cache = LatentCache::alloc(gpu, cache_dtype, [3, 4], LATENT, ROPE).expect("room");
    for rows in steps {
        let num_tokens = rows.len();
        let positions: Vec<u32> = rows.clone().map(|row| 3 * row as u32).collect();
        let batch = Batch {
            positions: ids(gpu, &positions),
            slots: ids(gpu, &slots[rows.clone()]),
            query_start: ids(gpu, &(0..=num_tokens as u32).collect::<Vec<_>>()),
            context_len: ids(gpu, &vec![1; num_tokens]),
            context_start: ids(gpu, &(0..=num_tokens as u32).collect::<Vec<_>>()),
            block_table: ids(gpu, &vec![0; num_tokens]).reshape(&[num_tokens, 1]),
            num_tokens,
            num_seqs: num_tokens,
            num_decodes: num_tokens,
            prefill_context_tokens: 0,
            max_context_len: 1,
        };
        gpu.rope_cache(&q.rows(rows.clone()), &kv_a.rows(rows.clone()), &norm, 1e-6, &rope, &batch, &cache);
        gpu.flush().wait().expect("the kernel runs");
    }
    let fp8 = cache.fp8.iter().flat_map(|fp8| [&fp8.scales, &fp8.rope]);
    [&q, &cache.data].into_iter().chain(fp8).map(|part| bits(gpu, part)).collect()
}

#[test]
fn a_cached_token_alone_is_what_it_is_in_a_batch() {
    let gpu = emu();
    let slots = [7, 0, 11, 3, 5];
    for cache_dtype in [DType::F32, DType::BF16, DType::F8E4M3] {
        let together = rope_cache(&gpu, cache_dtype, once(0..ROWS), slots);
        let apart = (0..ROWS).rev().map(|row| row..row + 1);
        assert!(together == rope_cache(&gpu, cache_dtype, apart, slots), "into {cache_dtype}");
    }
}

#[test]
fn padding_rows_write_to_no_slot() {
    let gpu = emu();
    for cache_dtype in [DType::F32, DType::BF16, DType::F8E4M3] {
        let padded = rope_cache(&gpu, cache_dtype, once(0..ROWS), [7, 0, 11, u32::MAX, u32::MAX]);
        let shorter = rope_cache(&gpu, cache_dtype, once(0..3), [7, 0, 11, 0, 0]);
        assert!(padded[1..] == shorter[1..], "into {cache_dtype}");
    }
}

#[test]
fn a_row_too_long_for_a_block_is_refused() {
    let gpu = emu();
    let cols = 40_000;
    let (x, out) = (
        gpu.alloc(&[1, cols], DType::BF16).expect("room"),
        gpu.alloc(&[1, cols], DType::BF16).expect("room"),
    );
    let weight = gpu.alloc(&[cols], DType::BF16).expect("room");
    gpu.rms_norm(&x, &weight, 1e-6, &Activation::dense(out));
    let error = gpu.flush().wait().expect_err("a row of 40,000").to_string();
    assert!(error.contains("rows of 40000 values are too long, it takes 32768 at most"), "{error}");
}
