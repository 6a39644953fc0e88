//! FP8 blocks and shards of them, held against a de-quantisation in f64 that knows no shards.

use r1_core::DType;
use r1_weights::{Checkpoint, Fp8BlockConfig, HostLinear, Partition, ScaleFmt, WeightsError};
use safetensors::Dtype;

use crate::support::{Tensor, Tensors, file, noise};

const FP8: Fp8BlockConfig = Fp8BlockConfig { block: [128, 128], scale_fmt: ScaleFmt::F32 };

fn checkpoint(tensors: &Tensors) -> Checkpoint {
    Checkpoint::from_bytes("test", std::sync::Arc::new(file(tensors))).unwrap()
}

/// e4m3 by its definition, in f64.
fn decode(code: u8) -> f64 {
    let (e, m) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
    let magnitude = if e == 0 { m * 2f64.powi(-6) } else { (1.0 + m) * 2f64.powi(e - 7) };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// A random FP8 weight and what it means.
struct Case {
    n: usize,
    k: usize,
    block: [usize; 2],
    codes: Vec<u8>,
    scales: Vec<f32>,
    checkpoint: Checkpoint,
}

impl Case {
    fn new(n: usize, k: usize, block: [usize; 2]) -> Self {
        // Codes without the two NaNs.
        let codes: Vec<u8> = noise((n * 1000 + k) as u64, n * k)
            .into_iter()
            .map(|c| if c & 0x7f == 0x7f { c - 1 } else { c })
            .collect();
        let shape = [n.div_ceil(block[0]), k.div_ceil(block[1])];
        let scales: Vec<f32> =
            noise(7, shape[0] * shape[1]).into_iter().map(|b| (f32::from(b) + 1.0) * 3.1e-4).collect();
        let tensors = vec![
            ("w.weight".to_owned(), Tensor::f8(codes.clone(), &[n, k])),
            ("w.weight_scale_inv".to_owned(), Tensor::f32(&scales, &shape)),
        ];
        Self { n, k, block, codes, scales, checkpoint: checkpoint(&tensors) }
    }

    fn value(&self, row: usize, column: usize) -> f64 {
        let scale =
            self.scales[row / self.block[0] * self.k.div_ceil(self.block[1]) + column / self.block[1]];
        decode(self.codes[row * self.k + column]) * f64::from(scale)
    }

    fn linear(&self, partition: Partition) -> HostLinear {
        let quant = Fp8BlockConfig { block: self.block, ..FP8 };
        self.checkpoint.linear("w", self.n, self.k, Some(&quant), partition).unwrap()
    }

    /// The shard's values are those of its rows and columns of the whole.
    #[track_caller]
    fn check(&self, shard: &HostLinear, row: usize, column: usize, shape: [usize; 2]) {
        assert_eq!(shard.shape(), shape);
        let HostLinear::Fp8Block { scales, block, offset, .. } = shard else { panic!("{shard:?}") };
        let covered = |i: usize| (offset[i] + shape[i]).div_ceil(block[i]);
        assert_eq!(scales.shape(), [covered(0), covered(1)], "no more scales than the shard touches");
        let values = shard.to_f32();
        assert_eq!(values.len(), shape[0] * shape[1]);
        for (i, &value) in values.iter().enumerate() {
            let (r, c) = (row + i / shape[1], column + i % shape[1]);
            let expected = self.value(r, c);
            let gap = (f64::from(value) - expected).abs();
            assert!(gap <= expected.abs() * 1e-7, "[{r}, {c}] is {value}, not {expected}");
        }
    }
}

#[test]
fn ragged_blocks_dequantise() {
    for (n, k) in [(1, 1), (128, 128), (129, 127), (300, 200), (256, 384), (72, 160)] {
        let case = Case::new(n, k, [128, 128]);
        case.check(&case.linear(Partition::Replicated), 0, 0, [n, k]);
    }
    let case = Case::new(10, 9, [4, 2]);
    case.check(&case.linear(Partition::Replicated), 0, 0, [10, 9]);
}

/// 288 rows over 2, 3, 4 and 6 ranks: cuts on and inside 128-row blocks.
#[test]
fn column_parallel_shards_lie_in_place() {
    let case = Case::new(288, 200, [128, 128]);
    let whole = case.checkpoint.tensor("w.weight").unwrap();
    for world in [1, 2, 3, 4, 6] {
        let rows = 288 / world;
        for rank in 0..world {
            let shard = case.linear(Partition::Column { rank, world });
            case.check(&shard, rank * rows, 0, [rows, 200]);
            let HostLinear::Fp8Block { data, offset, .. } = &shard else { panic!() };
            assert_eq!(*offset, [rank * rows % 128, 0]);
            assert_eq!(data.bytes().as_ptr(), whole.bytes()[rank * rows * 200..].as_ptr(), "not a copy");
        }
    }
}

#[test]
fn row_parallel_shards_keep_their_blocks_scales() {
    let case = Case::new(140, 288, [128, 128]);
    for world in [1, 2, 3, 4, 6] {
        let columns = 288 / world;
        for rank in 0..world {
            let shard = case.linear(Partition::Row { rank, world });
            case.check(&shard, 0, rank * columns, [140, columns]);
            let HostLinear::Fp8Block { offset, .. } = &shard else { panic!() };
            assert_eq!(*offset, [0, rank * columns % 128]);
        }
    }
}

#[test]
fn any_range_can_be_cut() {
    let case = Case::new(300, 290, [128, 128]);
    for (start, len) in [(0, 1), (127, 2), (128, 128), (100, 190), (299, 1)] {
        case.check(&case.linear(Partition::Rows { start, len }), start, 0, [len, 290]);
    }
    for (start, len) in [(0, 290), (127, 2), (128, 128), (100, 190), (289, 1)] {
        case.check(&case.linear(Partition::Columns { start, len }), 0, start, [300, len]);
    }
}

#[test]
fn dense_weights_are_cut_the_same_way() {
    let values: Vec<f32> = (0..6 * 4).map(|i| i as f32).collect();
    let tensors = vec![("w.weight".to_owned(), Tensor::bf16(&values, &[6, 4]))];
    let checkpoint = checkpoint(&tensors);
    // Also where the config declares FP8: layers may be left unquantised.
    let cut = |partition| checkpoint.linear("w", 6, 4, Some(&FP8), partition).unwrap();
    let all = cut(Partition::Replicated);
    assert!(matches!(&all, HostLinear::Dense(w) if w.dtype() == DType::BF16));
    assert_eq!((all.to_f32(), all.size_bytes()), (values.clone(), 48));
    assert_eq!(cut(Partition::Column { rank: 2, world: 3 }).to_f32(), values[16..]);
    assert_eq!(
        cut(Partition::Row { rank: 1, world: 2 }).to_f32(),
        [2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23].map(|i| i as f32)
    );
    let error = checkpoint.linear("w", 6, 4, None, Partition::Column { rank: 0, world: 4 }).unwrap_err();
    let WeightsError::NotDivisible { dim, size, world, .. } = error else { panic!("{error}") };
    assert_eq!((dim, size, world), ("rows (N)", 6, 4));
    let error = checkpoint.linear("w", 6, 4, None, Partition::Row { rank: 0, world: 3 }).unwrap_err();
    assert!(matches!(error, WeightsError::NotDivisible { dim: "columns (K)", .. }));
}

#[test]
fn scales_are_checked() {
    let with_scales =
        |scales: Tensor| {
            let weight = Tensor::zeros(Dtype::F8_E4M3, &[130, 130]);
            checkpoint(&vec![("w.weight".to_owned(), weight), ("w.weight_scale_inv".to_owned(), scales)])
                .linear("w", 130, 130, Some(&FP8), Partition::Replicated)
        };
    assert!(with_scales(Tensor::f32(&[1.0, 0.0, 1.0, 1e-12], &[2, 2])).is_ok());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0] {
        let error = with_scales(Tensor::f32(&[1.0, 1.0, bad, 1.0], &[2, 2])).unwrap_err();
        let WeightsError::BadScale { tensor, index, .. } = &error else { panic!("{error}") };
        assert_eq!((tensor.as_str(), *index), ("w.weight_scale_inv", [1, 0]));
    }
    let widened = with_scales(Tensor::bf16(&[0.5, 1.0, 2.0, 4.0], &[2, 2])).unwrap();
    let HostLinear::Fp8Block { scales, .. } = widened else { panic!() };
    assert_eq!((scales.dtype(), r1_weights::widen_to_f32(&scales)), (DType::F32, vec![0.5, 1.0, 2.0, 4.0]));
    let error = with_scales(Tensor::f32(&[1.0; 4], &[4, 1])).unwrap_err();
    assert!(matches!(error, WeightsError::ShapeMismatch { expected, .. } if expected == [2, 2]));
    let error = with_scales(Tensor::zeros(Dtype::F8_E8M0, &[2, 2])).unwrap_err();
    assert!(matches!(error, WeightsError::DTypeMismatch { found, .. } if found == "F8_E8M0"));
}

#[test]
fn fp8_needs_scales_and_a_config() {
    let alone = checkpoint(&vec![("w.weight".to_owned(), Tensor::zeros(Dtype::F8_E4M3, &[4, 4]))]);
    let error = alone.linear("w", 4, 4, None, Partition::Replicated).unwrap_err();
    assert!(
        matches!(&error, WeightsError::Fp8WithoutConfig { tensor, .. } if tensor == "w.weight"),
        "{error}"
    );
    let error = alone.linear("w", 4, 4, Some(&FP8), Partition::Replicated).unwrap_err();
    assert!(
        matches!(&error, WeightsError::Missing { tensor, .. } if tensor == "w.weight_scale_inv"),
        "{error}"
    );
    let error = alone.linear("w", 4, 5, Some(&FP8), Partition::Replicated).unwrap_err();
    assert!(matches!(error, WeightsError::ShapeMismatch { .. }));
}
