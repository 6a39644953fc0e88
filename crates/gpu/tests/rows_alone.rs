//! Products of a weight with many rows: each row has the bits that it has alone, whichever tile its batch's size chooses.

use std::sync::Arc;

use r1_backend::{
    Activation, Backend, Fp8Activation, HeadForm, HeadWeight, HostSlice, HostSliceMut, HostTensor,
    MlpScratch, MlpWeights, Tensor, Weight,
};
use r1_core::DType;
use r1_gpu::Gpu;

/// Short, middle and tall tiles, several of each, with a ragged end.
const ROWS: [usize; 4] = [16, 21, 64, 150];
/// Rows that are looked at: of several tiles, first ones and last ones.
const LOOKED_AT: [usize; 6] = [0, 13, 15, 20, 63, 149];

fn gpu() -> Gpu {
    Gpu::emulated(2, 1 << 30).expect("an emulated device")
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
    let out = gpu.alloc(shape, dtype).expect("alloc");
    gpu.upload(HostSlice::F32(&noise(shape.iter().product(), seed)), &out);
    out
}

fn values(gpu: &Gpu, x: &Tensor<Gpu>) -> Vec<f32> {
    let mut out = vec![0.0; x.num_elements()];
    gpu.download(x, HostSliceMut::F32(&mut out)).expect("download");
    out
}

fn weight(gpu: &Gpu, n: usize, k: usize, dtype: DType) -> Weight<Gpu> {
    if dtype != DType::F8E4M3 {
        return Weight::Dense { data: tensor(gpu, &[n, k], dtype, 7) };
    }
    // Codes without NaN.
    let codes: Vec<u8> = noise(n * k, 8).iter().map(|x| (x * 120.0) as i8 as u8 & 0xf7).collect();
    let data = gpu.import(&HostTensor::new(Arc::new(codes), 0..n * k, &[n, k], dtype)).expect("import");
    let offset = [100, 70];
    let blocks = [(n + offset[0]).div_ceil(128), (k + offset[1]).div_ceil(128)];
    Weight::Fp8Block { data, scales: tensor(gpu, &blocks, DType::F32, 9), block: [128; 2], offset }
}

/// Runs `op` on the first rows, as many as [`ROWS`] says, and compares rows with what they give alone.
fn each_row_is_its_own(what: &str, gpu: &Gpu, all: &[usize], op: impl Fn(usize, &Tensor<Gpu>, usize)) {
    let run = |from: usize, rows: usize| {
        let mut shape = all.to_vec();
        shape[0] = rows;
        let out = gpu.alloc(&shape, DType::F32).expect("alloc");
        op(from, &out, rows);
        gpu.flush().wait().expect("the step");
        values(gpu, &out)
    };
    let width: usize = all[1..].iter().product();
    let alone = LOOKED_AT.map(|row| run(row, 1));
    assert!(alone.iter().flatten().all(|x| x.is_finite()), "{what}: finite");
    for rows in ROWS {
        let together = run(0, rows);
        for (row, alone) in LOOKED_AT.into_iter().zip(&alone).filter(|&(row, _)| row < rows) {
            let same = |i: usize| together[row * width + i].to_bits() == alone[i].to_bits();
            let differs = (0..width).find(|&i| !same(i));
            assert_eq!(differs, None, "{what}: of row {row} of {rows}, the first value that differs");
        }
    }
}

/// Few outputs, so that k is cut into ranges, and a ragged k.
const LINEARS: [[usize; 2]; 2] = [[70, 1100], [40, 1792]];

#[test]
fn linear_rows_are_their_own() {
    let gpu = gpu();
    let most = ROWS[ROWS.len() - 1];
    for (input, format) in [
        (DType::F32, DType::BF16),
        (DType::F32, DType::F8E4M3),
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F8E4M3),
        (DType::F8E4M3, DType::F8E4M3),
    ] {
        for [n, k] in LINEARS {
            let w = weight(&gpu, n, k, format);
            let dense = tensor(&gpu, &[most, k], if input == DType::F32 { input } else { DType::BF16 }, 1);
            let fp8 = (input == DType::F8E4M3).then(|| Fp8Activation {
                data: tensor(&gpu, &[most, k], DType::F8E4M3, 2),
                scales: tensor(&gpu, &[most, k.div_ceil(128)], DType::F32, 3),
                power_of_two_scales: false,
            });
            let x = Activation { dense, fp8 };
            each_row_is_its_own(
                &format!("{input} × {format} [{n}, {k}]"),
                &gpu,
                &[most, n],
                |from, out, rows| {
                    gpu.linear(&x.rows(from..from + rows), &w, out);
                },
            );
        }
    }
}

#[test]
fn per_head_rows_are_their_own() {
    let gpu = gpu();
    let (most, heads, k) = (ROWS[ROWS.len() - 1], 2, 136);
    for (input, format) in [
        (DType::F32, DType::F8E4M3),
        (DType::BF16, DType::F16),
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F8E4M3),
    ] {
        for form in [HeadForm::RowsIn, HeadForm::RowsOut] {
            let (rows_per_head, rows) = (80, 8..80);
            let (from, to) = match form {
                HeadForm::RowsIn => (rows.len(), k),
                HeadForm::RowsOut => (k, rows.len()),
            };
            let w = HeadWeight {
                weight: weight(&gpu, heads * rows_per_head, k, format),
                rows_per_head,
                rows,
                form,
            };
            let x = tensor(&gpu, &[most, heads, from], input, 1);
            each_row_is_its_own(
                &format!("{input} × {format} {form:?}"),
                &gpu,
                &[most, heads, to],
                |at, out, rows| {
                    gpu.per_head(&x.rows(at..at + rows), &w, out);
                },
            );
        }
    }
}

/// Few rows meet one kernel for the MLP's first half, many meet those of its parts.
#[test]
fn mlp_rows_are_their_own() {
    let gpu = gpu();
    let (most, width, k) = (ROWS[ROWS.len() - 1], 200, 1100);
    for (format, fp8) in [
        (DType::BF16, None),
        (DType::BF16, Some(true)),
        (DType::F8E4M3, None),
        (DType::F8E4M3, Some(false)),
        (DType::F8E4M3, Some(true)),
    ] {
        let w = MlpWeights {
            gate: weight(&gpu, width, k, format),
            up: weight(&gpu, width, k, format),
            down: weight(&gpu, 24, width, format),
        };
        let x = Activation::alloc(&gpu, most, k, DType::BF16, fp8).expect("alloc");
        gpu.upload(HostSlice::F32(&noise(most * k, 1)), &x.dense);
        gpu.quantize(&x);
        each_row_is_its_own(
            &format!("MLP of {format}, FP8 form {fp8:?}"),
            &gpu,
            &[most, 24],
            |from, out, rows| {
                let scratch = MlpScratch {
                    gate_up: gpu.alloc(&[rows, 2 * width], DType::BF16).expect("alloc"),
                    hidden: Activation::alloc(&gpu, rows, width, DType::BF16, fp8).expect("alloc"),
                };
                gpu.mlp(&x.rows(from..from + rows), &w, &scratch, out);
            },
        );
    }
}
