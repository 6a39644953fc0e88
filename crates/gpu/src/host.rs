//! Traffic with the host: element types on the way, views with gaps.

use half::bf16;
use r1_backend::{HostSlice, HostSliceMut, Tensor};
use r1_core::DType;

use crate::Gpu;
use crate::driver::{ReadOrder, Rows};

/// The value of an E4M3 code.
pub(crate) fn e4m3_to_f32(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    let value = match (magnitude >> 3, magnitude & 7) {
        (15, 7) => f32::NAN,
        (0, mantissa) => mantissa as f32 / 512.0,
        (exponent, mantissa) => f32::from_bits((exponent + 120) << 23 | mantissa << 20),
    };
    if code & 0x80 == 0 { value } else { -value }
}

/// The nearest E4M3 code, ties to even; saturates at 448. A device whose units read FNUZ gets no -0, which is NaN to them.
pub(crate) fn f32_to_e4m3(x: f32, fnuz: bool) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs();
    if x.is_nan() {
        return sign | 0x7f;
    }
    let code = if magnitude >= 448.0 {
        0x7e
    } else if magnitude < 0.015_625 {
        // Below 2^-6 the spacing is 2^-9: adding 2^14 rounds there.
        (magnitude + 16384.0).to_bits() as u8
    } else {
        let bits = magnitude.to_bits();
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        ((rounded >> 20) - (120 << 3)).min(0x7e) as u8
    };
    if fnuz && code == 0 { 0 } else { sign | code }
}

/// `bytes` of `dtype` from F32, rounded to nearest even; no -0 in E4M3 where the device is `fnuz`.
pub(crate) fn narrow(dtype: DType, values: &[f32], bytes: &mut [u8], fnuz: bool) {
    match dtype {
        DType::BF16 => {
            let pairs = bytes.as_chunks_mut().0.iter_mut().zip(values);
            pairs.for_each(|(bytes, &x)| *bytes = bf16::from_f32(x).to_le_bytes());
        }
        DType::F16 => {
            let pairs = bytes.as_chunks_mut().0.iter_mut().zip(values);
            pairs.for_each(|(bytes, &x)| *bytes = half::f16::from_f32(x).to_le_bytes());
        }
        DType::F8E4M3 => bytes.iter_mut().zip(values).for_each(|(code, &x)| *code = f32_to_e4m3(x, fnuz)),
        DType::F32 => {
            let quads = bytes.as_chunks_mut().0.iter_mut().zip(values);
            quads.for_each(|(bytes, x)| *bytes = x.to_le_bytes());
        }
        DType::I8 | DType::U32 => panic!("{dtype} elements are not made from floats"),
    }
}

/// F32 from `bytes` of `dtype`.
pub(crate) fn widen(dtype: DType, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        DType::BF16 => {
            let pairs = values.iter_mut().zip(bytes.as_chunks().0);
            pairs.for_each(|(x, &bytes)| *x = bf16::from_le_bytes(bytes).to_f32());
        }
        DType::F16 => {
            let pairs = values.iter_mut().zip(bytes.as_chunks().0);
            pairs.for_each(|(x, &bytes)| *x = half::f16::from_le_bytes(bytes).to_f32());
        }
        DType::F8E4M3 => values.iter_mut().zip(bytes).for_each(|(x, &code)| *x = e4m3_to_f32(code)),
        DType::F32 => {
            let quads = values.iter_mut().zip(bytes.as_chunks().0);
            quads.for_each(|(x, &bytes)| *x = f32::from_le_bytes(bytes));
        }
        DType::I8 => values.iter_mut().zip(bytes).for_each(|(x, &code)| *x = f32::from(code.cast_signed())),
        DType::U32 => panic!("ids are no floats"),
    }
}

/// Calls `visit` with each run of rows of a view, and where its bytes stand among the dense ones.
fn rows_of(tensor: &Tensor<Gpu>, mut visit: impl FnMut(Rows, usize)) {
    let size = tensor.dtype().size_bytes();
    let at = tensor.buffer().at().offset(tensor.offset() * size);
    if tensor.num_elements() == 0 {
        return;
    }
    if tensor.is_contiguous() {
        return visit(Rows::dense(at, tensor.num_elements() * size), 0);
    }
    // Four dimensions, outer ones of size 1 in front.
    let (mut shape, mut strides) = ([1; 4], [0; 4]);
    let from = 4 - tensor.shape().len();
    shape[from..].copy_from_slice(tensor.shape());
    strides[from..].copy_from_slice(tensor.strides());
    let width_bytes = shape[3] * size;
    for i in 0..shape[0] {
        for j in 0..shape[1] {
            let at = at.offset((i * strides[0] + j * strides[1]) * size);
            let rows = Rows { at, num_rows: shape[2], width_bytes, pitch_bytes: strides[2] * size };
            visit(rows, (i * shape[1] + j) * rows.size_bytes());
        }
    }
}

#[track_caller]
fn check(op: &str, arg: &str, tensor: &Tensor<Gpu>, len: usize, is_u32: bool) {
    let kind = if is_u32 { "u32s" } else { "floats" };
    assert!(is_u32 == (tensor.dtype() == DType::U32), "{op}: {kind} for {arg} of dtype {}", tensor.dtype());
    assert!(len == tensor.num_elements(), "{op}: {len} {kind} for {arg} of shape {:?}", tensor.shape());
}

pub(crate) fn upload(gpu: &Gpu, src: HostSlice<'_>, dst: &Tensor<Gpu>) {
    let bytes: Vec<u8> = match src {
        HostSlice::U32(values) => {
            check("upload", "dst", dst, values.len(), true);
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        }
        HostSlice::F32(values) => {
            check("upload", "dst", dst, values.len(), false);
            let mut bytes = vec![0; values.len() * dst.dtype().size_bytes()];
            narrow(dst.dtype(), values, &mut bytes, gpu.driver.info().fnuz);
            bytes
        }
    };
    gpu.settle_weights();
    rows_of(dst, |rows, from| {
        gpu.note("upload", gpu.driver.write(&bytes[from..from + rows.size_bytes()], rows));
    });
}

pub(crate) fn download(
    gpu: &Gpu,
    src: &Tensor<Gpu>,
    dst: HostSliceMut<'_>,
    order: ReadOrder,
) -> Result<(), r1_backend::BackendError> {
    match &dst {
        HostSliceMut::U32(values) => check("download", "src", src, values.len(), true),
        HostSliceMut::F32(values) => check("download", "src", src, values.len(), false),
    }
    gpu.settle_weights();
    let mut bytes = vec![0; src.num_elements() * src.dtype().size_bytes()];
    let mut result = Ok(());
    rows_of(src, |rows, from| {
        if result.is_ok() {
            result = gpu.driver.read(rows, &mut bytes[from..from + rows.size_bytes()], order);
        }
    });
    result.map_err(|error| gpu.failed("download", &error))?;
    match dst {
        HostSliceMut::U32(dst) => {
            dst.iter_mut().zip(bytes.as_chunks().0).for_each(|(dst, &src)| *dst = u32::from_le_bytes(src));
        }
        HostSliceMut::F32(dst) => widen(src.dtype(), &bytes, dst),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_codes_survive_and_values_take_the_nearest() {
        for code in 0..=255u8 {
            let value = e4m3_to_f32(code);
            assert_eq!(f32_to_e4m3(value, false), code, "{value}");
            let want = if code == 0x80 { 0 } else { code };
            assert_eq!(f32_to_e4m3(value, true), want, "{value}");
        }
        for step in 0..40_000 {
            let x = step as f32 / 64.0 - 300.0;
            let gap = |code: u8| (e4m3_to_f32(code) - x).abs();
            let found = gap(f32_to_e4m3(x, false));
            let best = (0..=255).map(gap).filter(|gap| !gap.is_nan()).fold(f32::MAX, f32::min);
            assert_eq!(found, best, "{x}");
        }
        assert_eq!(e4m3_to_f32(f32_to_e4m3(1e9, false)), 448.0);
        assert_eq!(e4m3_to_f32(f32_to_e4m3(-1e9, false)), -448.0);
    }
}
