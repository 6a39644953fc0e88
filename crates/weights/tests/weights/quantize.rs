//! Weights quantised at load, held against the values that they are made of.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use r1_backend::{HostBytes, HostTensor};
use r1_core::DType;
use r1_weights::{
    Checkpoint, Fp8BlockConfig, HostInt4, HostLinear, HostQuantized, Partition, QuantizedFormat, ScaleFmt,
    WeightsError, quantize, widen_to_f32,
};

use crate::support::{Tensor, file, noise};

const FORMATS: [QuantizedFormat; 2] = [QuantizedFormat::Int8, QuantizedFormat::Int4];

/// Normal by the sum of twelve uniform numbers.
fn normals(seed: u64, len: usize) -> Vec<f32> {
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| f32::from(byte) / 256.0).sum::<f32>() - 6.0;
    noise(seed, 12 * len).chunks(12).map(sum).collect()
}

/// The values, and of each the distance between two codes around it.
fn decoded(w: &HostQuantized) -> (Vec<f32>, Vec<f32>) {
    match w {
        HostQuantized::Int8 { data, scales, group, offset } => {
            let (k, groups) = (data.shape()[1], scales.shape()[1]);
            let (codes, scales) = (widen_to_f32(data), widen_to_f32(scales));
            assert!(codes.iter().all(|code| *code >= -127.0), "-128 is no code");
            let step = |i: usize| scales[i / k * groups + (i % k + offset) / group];
            let steps: Vec<f32> = (0..codes.len()).map(step).collect();
            (codes.iter().zip(&steps).map(|(code, step)| code * step).collect(), steps)
        }
        HostQuantized::Int4(HostInt4 { codes, zeros, scales, group }) => {
            let (k, groups) = (codes.shape()[1] * 8, scales.shape()[1]);
            let (zeros, scales) = (widen_to_f32(zeros), widen_to_f32(scales));
            assert!(zeros.iter().all(|zero| zero.fract() == 0.0 && (0.0..=15.0).contains(zero)));
            let words = codes.bytes().as_chunks().0.iter().map(|&word| u32::from_le_bytes(word));
            let codes: Vec<u32> = words.flat_map(|word| (0..8).map(move |i| word >> (4 * i) & 15)).collect();
            let at = |i: usize| i / k * groups + i % k / group;
            let value = |(i, &code): (usize, &u32)| (code as f32 - zeros[at(i)]) * scales[at(i)];
            (codes.iter().enumerate().map(value).collect(), (0..codes.len()).map(|i| scales[at(i)]).collect())
        }
    }
}

fn dense(values: &[f32], shape: [usize; 2], dtype: DType) -> HostLinear {
    let bytes = match dtype {
        DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        _ => unreachable!("a dense dtype"),
    };
    HostLinear::Dense(HostTensor::from_vec(bytes, &shape, dtype))
}

/// A checkpoint with an FP8 weight `w` in blocks of 128 × 128.
fn fp8([n, k]: [usize; 2]) -> Checkpoint {
    let codes = noise(5, n * k).into_iter().map(|c| if c & 0x7f == 0x7f { c - 1 } else { c }).collect();
    let shape = [n.div_ceil(128), k.div_ceil(128)];
    let scales: Vec<f32> = noise(7, shape[0] * shape[1]).into_iter().map(|b| f32::from(b) * 1e-4).collect();
    let tensors = vec![
        ("w.weight".to_owned(), Tensor::f8(codes, &[n, k])),
        ("w.weight_scale_inv".to_owned(), Tensor::f32(&scales, &shape)),
    ];
    Checkpoint::from_bytes("test", Arc::new(file(&tensors))).expect("a checkpoint")
}

const FP8: Fp8BlockConfig = Fp8BlockConfig { block: [128, 128], scale_fmt: ScaleFmt::F32 };

fn relative_error(values: &[f32], found: &[f32]) -> f64 {
    let squares = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let errors = &mut values.iter().zip(found).map(|(a, b)| f64::from(*a) - f64::from(*b));
    (squares(errors) / squares(&mut values.iter().map(|x| f64::from(*x)))).sqrt()
}

/// Every int8 value is within half a step; int4's range is cut, so it is held to its error as a whole.
#[test]
fn codes_stand_for_the_values() {
    for [n, k] in [[1, 8], [5, 72], [33, 304], [7, 1160]] {
        let values = normals((n * k) as u64, n * k);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let host = dense(&values, [n, k], dtype);
            let stored = host.to_f32();
            for format in FORMATS {
                let quantized = quantize("w", &host, 0..k, format, 2).expect("finite");
                assert_eq!(quantized.size_bytes(), format.size_bytes(n, &(0..k)));
                let (found, steps) = decoded(&quantized);
                assert_eq!(found.len(), n * k);
                let bound = if format == QuantizedFormat::Int8 { 0.5001 } else { 2.6 };
                for (i, (value, found)) in stored.iter().zip(&found).enumerate() {
                    assert!(
                        (value - found).abs() <= bound * steps[i],
                        "{format:?} [{n}, {k}] {dtype}: element {i} is {found}, not {value}, at steps of {}",
                        steps[i]
                    );
                }
                let most = if format == QuantizedFormat::Int8 { 0.01 } else { 0.105 };
                let error = relative_error(&stored, &found);
                assert!(error < most, "{format:?} [{n}, {k}] {dtype}: {error}");
            }
        }
    }
}

/// What `QUANTIZED_GROUP` says of normal weights.
#[test]
fn the_error_on_normal_weights_is_what_is_said() {
    let values = normals(1, 256 * 1024);
    let host = dense(&values, [256, 1024], DType::F32);
    for (format, [least, most]) in FORMATS.into_iter().zip([[0.004, 0.0075], [0.090, 0.097]]) {
        let quantized = quantize("w", &host, 0..1024, format, 2).expect("finite");
        let error = relative_error(&values, &decoded(&quantized).0);
        assert!((least..most).contains(&error), "{format:?}: {error}");
    }
}

/// A shard's values are the whole's, wherever rows and columns are cut: inside groups, inside FP8 blocks.
#[test]
fn shards_hold_the_values_of_the_whole() {
    let [n, k] = [264, 1040];
    let checkpoint = fp8([n, k]);
    for format in FORMATS {
        let of = |partition, threads| {
            let quantized = checkpoint.quantized("w", n, k, Some(&FP8), partition, format, threads);
            decoded(&quantized.expect("finite")).0
        };
        let whole = of(Partition::Replicated, 1);
        let exact =
            checkpoint.linear("w", n, k, Some(&FP8), Partition::Replicated).expect("it is there").to_f32();
        let most = if format == QuantizedFormat::Int8 { 0.02 } else { 0.15 };
        assert!(relative_error(&exact, &whole) < most, "{}", relative_error(&exact, &whole));
        assert_eq!(of(Partition::Replicated, 5), whole, "whatever the threads");
        let part = |rows: Range<usize>, cols: Range<usize>| -> Vec<f32> {
            rows.flat_map(|row| whole[row * k..][cols.clone()].to_vec()).collect()
        };
        for (world, rank) in [(2, 0), (2, 1), (8, 3), (4, 3)] {
            let rows = rank * n / world..(rank + 1) * n / world;
            assert_eq!(of(Partition::Column { rank, world }, 2), part(rows, 0..k), "rows of {rank}/{world}");
        }
        // 520, 208 and 104 columns each: cuts inside groups of 128.
        for (world, rank) in [(2, 0), (2, 1), (5, 2), (10, 9), (10, 1)] {
            let cols = rank * k / world..(rank + 1) * k / world;
            let shard = of(Partition::Row { rank, world }, 2);
            assert_eq!(shard, part(0..n, cols.clone()), "{format:?}: columns {cols:?}");
        }
        for (start, len) in [(0, 8), (8, 8), (120, 16), (128, 128), (1032, 8), (64, 976)] {
            let partition = Partition::Columns { start, len };
            assert_eq!(
                of(partition, 1),
                part(0..n, start..start + len),
                "{format:?}: {len} columns from {start}"
            );
            let quantized =
                checkpoint.quantized("w", n, k, Some(&FP8), partition, format, 1).expect("finite");
            assert_eq!(quantized.size_bytes(), format.size_bytes(n, &(start..start + len)));
        }
    }
}

#[test]
fn values_that_are_not_finite_are_refused_by_tensor_and_row() {
    for (bad, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        for format in FORMATS {
            let mut values = normals(3, 6000 * 64);
            values[5017 * 64 + 40] = bad;
            let host = dense(&values, [6000, 64], DType::BF16);
            let error = quantize("layers.3.up_proj.weight", &host, 0..64, format, 3).expect_err("refused");
            assert!(matches!(error, WeightsError::Unquantizable { row: 5017, .. }), "{error}");
            let text = error.to_string();
            assert!(text.starts_with("layers.3.up_proj.weight: row 5017 ") && text.contains(shown), "{text}");
        }
    }
}

/// Bytes that count how many of them were given back.
struct Counting(Vec<u8>, Arc<AtomicUsize>);

impl HostBytes for Counting {
    fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn discard(&self, range: Range<usize>) {
        self.1.fetch_add(range.len(), Ordering::Relaxed);
    }
}

#[test]
fn what_was_read_is_given_back() {
    let tensors = vec![("w.weight".to_owned(), Tensor::bf16(&[0.5; 16 * 256], &[16, 256]))];
    for (partition, given_back) in [
        (Partition::Replicated, 16 * 512),
        (Partition::Column { rank: 1, world: 2 }, 8 * 512),
        (Partition::Row { rank: 1, world: 2 }, 16 * 512),
    ] {
        let counter = Arc::new(AtomicUsize::new(0));
        let bytes = Counting(file(&tensors), counter.clone());
        let checkpoint = Checkpoint::from_bytes("test", Arc::new(bytes)).expect("a checkpoint");
        for format in FORMATS {
            checkpoint.quantized("w", 16, 256, None, partition, format, 1).expect("finite");
            assert_eq!(counter.swap(0, Ordering::Relaxed), given_back, "{partition:?}");
        }
    }
}
