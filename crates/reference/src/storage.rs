//! Device memory of the oracle: flat one-dimensional candle tensors of the stored dtype, read and written through views.
//! Knows strides and rounding, no operation.

use candle_core::{DType, Device, Result, Tensor};
use r1_backend::{BackendError, HostTensor};

use crate::Reference;

/// A tensor of this backend, as opposed to candle's own.
pub(crate) type View = r1_backend::Tensor<Reference>;

pub(crate) fn candle_dtype(dtype: r1_core::DType) -> DType {
    match dtype {
        r1_core::DType::F32 => DType::F32,
        r1_core::DType::BF16 => DType::BF16,
        r1_core::DType::F16 => DType::F16,
        r1_core::DType::F8E4M3 => DType::F8E4M3,
        // candle has no I8: the bits.
        r1_core::DType::I8 => DType::U8,
        r1_core::DType::U32 => DType::U32,
    }
}

/// Refuses what the allocator does not have: candle would end the process.
pub(crate) fn check_room(shape: &[usize], dtype: r1_core::DType) -> std::result::Result<(), BackendError> {
    let size_bytes = shape.iter().try_fold(dtype.size_bytes(), |size, &dim| size.checked_mul(dim));
    let mut probe = Vec::<u8>::new();
    if size_bytes.is_some_and(|size_bytes| probe.try_reserve_exact(size_bytes).is_ok()) {
        return Ok(());
    }
    Err(BackendError::OutOfMemory {
        device: "reference".to_owned(),
        what: format!("a tensor {shape:?} {dtype}"),
        requested_bytes: size_bytes.unwrap_or(usize::MAX),
        hint: "lower --max-model-len or --max-num-seqs, or take a smaller model".to_owned(),
    })
}

pub(crate) fn zeros(shape: &[usize], dtype: r1_core::DType) -> Result<View> {
    let flat = Tensor::zeros(shape.iter().product::<usize>(), candle_dtype(dtype), &Device::Cpu)?;
    Ok(View::from_buffer(flat, shape, dtype))
}

pub(crate) fn import(host: &HostTensor) -> Result<View> {
    let elements = host.shape().iter().product();
    let flat = Tensor::from_raw_buffer(host.bytes(), candle_dtype(host.dtype()), &[elements], &Device::Cpu)?;
    host.discard();
    Ok(View::from_buffer(flat, host.shape(), host.dtype()))
}

/// Where the runs of elements without gaps begin in the buffer, and how long each is.
fn runs(view: &View) -> (Vec<usize>, usize) {
    if view.num_elements() == 0 {
        return (Vec::new(), 0);
    }
    if view.is_contiguous() {
        return (vec![view.offset()], view.num_elements());
    }
    let (&len, rows) = view.shape().split_last().expect("a view with gaps has dimensions");
    let mut starts = vec![view.offset()];
    for (&size, &stride) in rows.iter().zip(view.strides()) {
        starts = starts.iter().flat_map(|start| (0..size).map(move |i| start + i * stride)).collect();
    }
    (starts, len)
}

/// The values in their stored dtype.
pub(crate) fn read_stored(view: &View) -> Result<Tensor> {
    let (starts, len) = runs(view);
    if starts.is_empty() {
        return Tensor::zeros(view.shape(), candle_dtype(view.dtype()), &Device::Cpu);
    }
    let runs =
        starts.into_iter().map(|start| view.buffer().narrow(0, start, len)).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&runs, 0)?.reshape(view.shape())
}

/// The values, widened to F32.
pub(crate) fn read(view: &View) -> Result<Tensor> {
    let values = read_stored(view)?.to_dtype(DType::F32)?;
    if view.dtype() == r1_core::DType::I8 {
        let is_negative = values.ge(128.0)?.to_dtype(DType::F32)?;
        return values - (is_negative * 256.0)?;
    }
    Ok(values)
}

/// Token ids, positions, rows.
pub(crate) fn read_u32(view: &View) -> Result<Vec<u32>> {
    read_stored(view)?.flatten_all()?.to_vec1()
}

/// Writes `values` of the view's shape, rounded to nearest even where the view is narrower.
pub(crate) fn write(view: &View, values: &Tensor) -> Result<()> {
    if values.dims() != view.shape() {
        candle_core::bail!("result of shape {:?} for a tensor of shape {:?}", values.dims(), view.shape());
    }
    if view.dtype() == r1_core::DType::I8 {
        candle_core::bail!("codes of int8 weights are imported, not computed");
    }
    let flat = values.to_dtype(candle_dtype(view.dtype()))?.flatten_all()?.contiguous()?;
    let (starts, len) = runs(view);
    for (i, start) in starts.into_iter().enumerate() {
        view.buffer().slice_set(&flat.narrow(0, i * len, len)?, 0, start)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The OCP FP8 specification's E4M3: bias 7, subnormals below 2^-6, no infinities, NaN at 0x7f and 0xff.
    fn e4m3(code: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let magnitude = match (exponent, code & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa * 2f32.powi(-9),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn every_fp8_code_is_read_as_specified() {
        let codes: Vec<u8> = (0..=255).collect();
        let view = import(&HostTensor::from_vec(codes, &[256], r1_core::DType::F8E4M3)).unwrap();
        let values = read(&view).unwrap().to_vec1::<f32>().unwrap();
        for (code, value) in (0..=255).zip(values) {
            let want = e4m3(code);
            assert!(
                value == want || value.is_nan() && want.is_nan(),
                "code {code:#04x} reads {value}, not {want}"
            );
        }
    }

    #[test]
    fn every_int8_code_is_read_in_two_s_complement() {
        let codes: Vec<u8> = (0..=255).collect();
        let view = import(&HostTensor::from_vec(codes, &[256], r1_core::DType::I8)).unwrap();
        let want: Vec<f32> = (0..=255u8).map(|bits| f32::from(bits.cast_signed())).collect();
        assert_eq!(read(&view).unwrap().to_vec1::<f32>().unwrap(), want);
        assert!(write(&view, &read(&view).unwrap()).is_err());
    }

    #[test]
    fn fp8_is_written_to_the_nearest_even_and_saturates() {
        let view = zeros(&[7], r1_core::DType::F8E4M3).unwrap();
        // 17 lies between 16 and 18, 19 between 18 and 20; 2^-10 between 0 and the least subnormal.
        let values = [17.0, 19.0, -1e9, 464.0, f32::INFINITY, 2f32.powi(-10), 1.5 * 2f32.powi(-9)];
        write(&view, &Tensor::new(&values, &Device::Cpu).unwrap()).unwrap();
        let got = read(&view).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(got, [16.0, 20.0, -448.0, 448.0, 448.0, 0.0, 2.0 * 2f32.powi(-9)]);
    }

    #[test]
    fn a_view_with_gaps_reads_and_writes_its_own_elements_only() {
        let whole = zeros(&[3, 2, 4], r1_core::DType::F32).unwrap();
        let view = whole.rows(1..3).narrow(2, 1..3);
        let values = Tensor::arange(1f32, 9f32, &Device::Cpu).unwrap().reshape((2, 2, 2)).unwrap();
        write(&view, &values).unwrap();
        assert_eq!(read(&view).unwrap().to_vec3::<f32>().unwrap(), values.to_vec3::<f32>().unwrap());
        let all = read(&whole).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(all[8..16], [0.0, 1.0, 2.0, 0.0, 0.0, 3.0, 4.0, 0.0]);
        assert_eq!(all.iter().sum::<f32>(), 36.0);
    }
}
