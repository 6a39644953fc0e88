//! Weights on their way to an emulated device: large ones in pieces, widened ones, and a device that is full.

use r1_backend::{Backend, BackendError, HostSliceMut, HostTensor};
use r1_core::DType;
use r1_gpu::Gpu;

fn read(gpu: &Gpu, x: &r1_backend::Tensor<Gpu>) -> Vec<f32> {
    let mut values = vec![0.0; x.num_elements()];
    gpu.download(x, HostSliceMut::F32(&mut values)).expect("a result");
    values
}

/// Numbers that no neighbour has.
fn ramp(len: usize) -> Vec<f32> {
    (0..len).map(|i| i as f32).collect()
}

#[test]
fn large_tensors_arrive_whole_and_in_order() {
    let gpu = Gpu::emulated(1, 256 << 20).expect("an emulated device");
    // More pieces than may wait, none of them of a round size; the range of each is given anew to the next.
    for len in [300_001, 9_000_003, 40_000_001] {
        let values = ramp(len);
        let x = gpu.import(&HostTensor::from_f32(&values, &[len])).expect("room");
        drop(gpu.import(&HostTensor::from_f32(&vec![-1.0; 400_000], &[400_000])).expect("room"));
        let zeros = gpu.alloc(&[400_000], DType::F32).expect("room");
        assert!(read(&gpu, &x) == values, "{len} elements");
        assert!(read(&gpu, &zeros).iter().all(|&value| value == 0.0), "a range that was given anew");
    }
    gpu.flush().wait().expect("nothing failed");
}

#[test]
fn fp8_blocks_are_widened_to_the_nearest_bf16() {
    let gpu = Gpu::emulated(2, 128 << 20).expect("an emulated device");
    for ([rows, cols], block, offset) in [
        ([3usize, 5], [128usize, 128], [0usize, 0]),
        ([200, 1500], [128, 128], [64, 100]),
        ([64, 2048], [16, 32], [3, 31]),
    ] {
        let codes: Vec<u8> =
            (0..rows * cols).map(|i| ((i * 37 + i / 251) % 127) as u8 | ((i % 2) << 7) as u8).collect();
        let blocks = [0, 1].map(|i: usize| ([rows, cols][i] + offset[i]).div_ceil(block[i]));
        let scales: Vec<f32> = (0..blocks[0] * blocks[1]).map(|i| 0.013 * (i + 1) as f32).collect();
        let want: Vec<f32> = codes
            .iter()
            .enumerate()
            .map(|(i, &code)| {
                let scale = (i / cols + offset[0]) / block[0] * blocks[1] + (i % cols + offset[1]) / block[1];
                let magnitude = match (code >> 3 & 15, code & 7) {
                    (0, mantissa) => f32::from(mantissa) / 512.0,
                    (exponent, mantissa) => {
                        (1.0 + f32::from(mantissa) / 8.0) * f32::from(exponent).exp2() / 128.0
                    }
                };
                let value = if code & 0x80 == 0 { magnitude } else { -magnitude };
                half::bf16::from_f32(value * scales[scale]).to_f32()
            })
            .collect();
        let data = HostTensor::from_vec(codes, &[rows, cols], DType::F8E4M3);
        let scales = HostTensor::from_f32(&scales, &blocks);
        let dense = gpu.import_widened(&data, &scales, block, offset).expect("room").expect("the GPU widens");
        assert_eq!((dense.shape(), dense.dtype()), (&[rows, cols][..], DType::BF16));
        assert_eq!(read(&gpu, &dense), want, "[{rows}, {cols}] in blocks of {block:?} from {offset:?}");
    }
}

#[test]
fn a_full_device_says_how_much_and_what_to_do() {
    let gpu = Gpu::emulated(1, 128 << 20).expect("an emulated device");
    let error = gpu.alloc(&[1 << 30], DType::F32).expect_err("4 GiB do not fit in 128 MiB");
    assert!(matches!(error, BackendError::OutOfMemory { requested_bytes: 4_294_967_296, .. }), "{error:?}");
    let text = error.to_string();
    for part in ["4294967296 bytes", "of 134217728 bytes are used", "--max-model-len", "--tp"] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    // Smaller ones still do.
    gpu.alloc(&[1 << 20], DType::F32).expect("room");
}
