//! Weights and FP8 activations as F32 matrices. Knows the formats, no operation.

use candle_core::{D, Device, Result, Tensor};
use r1_backend::{Activation, Fp8Activation, Int4Group, Weight};

use crate::Reference;
use crate::storage::{self, read, read_u32};

/// Channels per activation scale.
const BLOCK: usize = 128;
/// The largest E4M3 value.
const FP8_MAX: f64 = 448.0;
/// Least largest magnitude of a block, so that a block of zeros has a scale.
const MIN_AMAX: f64 = 1e-4;

/// `[N, K]` F32.
pub(crate) fn dequantized(w: &Weight<Reference>) -> Result<Tensor> {
    match w {
        Weight::Dense { data } => read(data),
        Weight::Fp8Block { data, scales, block, offset } => {
            let block_of = |dim: usize| {
                let index = (0..data.dim(dim)).map(|i| ((i + offset[dim]) / block[dim]) as u32);
                Tensor::from_iter(index, &Device::Cpu)
            };
            let scales = read(scales)?.index_select(&block_of(0)?, 0)?.index_select(&block_of(1)?, 1)?;
            read(data)? * scales
        }
        Weight::Int8Group { data, scales, group, offset } => {
            let group_of = (0..data.dim(1)).map(|i| ((i + offset) / group) as u32);
            read(data)? * read(scales)?.index_select(&Tensor::from_iter(group_of, &Device::Cpu)?, 1)?
        }
        Weight::Int4Group(w) => dequantized_int4(w),
    }
}

fn dequantized_int4(w: &Int4Group<Reference>) -> Result<Tensor> {
    let (n, k) = (w.out_features(), w.in_features());
    let codes: Vec<f32> = read_u32(&w.codes)?
        .into_iter()
        .flat_map(|word| (0..8).map(move |i| (word >> (4 * i) & 15) as f32))
        .collect();
    let group_of = Tensor::from_iter((0..k).map(|i| (i / w.group) as u32), &Device::Cpu)?;
    let zeros = read(&w.zeros)?.index_select(&group_of, 1)?;
    let scales = read(&w.scales)?.index_select(&group_of, 1)?;
    (Tensor::from_vec(codes, (n, k), &Device::Cpu)? - zeros)? * scales
}

/// `x` as `w` meets it: dequantised from its FP8 form where both are FP8.
pub(crate) fn operand(x: &Activation<Reference>, w: &Weight<Reference>) -> Result<Tensor> {
    match (&x.fp8, w) {
        (Some(fp8), Weight::Fp8Block { .. }) => {
            read(&fp8.data)? * expand(&read(&fp8.scales)?, fp8.data.dim(1))?
        }
        _ => read(&x.dense),
    }
}

/// `x` `[T, K]` F32 as an FP8 weight meets it once it went through an FP8 activation.
pub(crate) fn round_trip(x: &Tensor, power_of_two_scales: bool) -> Result<Tensor> {
    let scales = expand(&scales_of(x, power_of_two_scales)?, x.dim(1)?)?;
    let codes = (x / &scales)?.to_dtype(candle_core::DType::F8E4M3)?;
    codes.to_dtype(candle_core::DType::F32)? * scales
}

/// Codes, to be rounded when they are written, and scales of `x` `[T, C]` F32 in an FP8 latent cache.
pub(crate) fn latent_codes(x: &Tensor) -> Result<[Tensor; 2]> {
    let scales = scales_of(x, false)?;
    Ok([(x / expand(&scales, x.dim(1)?)?)?, scales])
}

/// What `codes` `[T, C]` F32 with `scales` `[T, ceil(C / 128)]` stand for.
pub(crate) fn latent_values(codes: &Tensor, scales: &Tensor) -> Result<Tensor> {
    codes * expand(scales, codes.dim(1)?)?
}

/// Writes the FP8 form of `dense`. Source: `act_quant` of DeepSeek-V3's published inference code.
pub(crate) fn quantize(dense: &Tensor, out: &Fp8Activation<Reference>) -> Result<()> {
    let scales = scales_of(dense, out.power_of_two_scales)?;
    storage::write(&out.data, &(dense / expand(&scales, dense.dim(1)?)?)?)?;
    storage::write(&out.scales, &scales)
}

/// `[T, ceil(K / 128)]`: `max(amax, 1e-4) / 448` of every block, the last one perhaps short.
fn scales_of(x: &Tensor, power_of_two: bool) -> Result<Tensor> {
    let (rows, cols) = x.dims2()?;
    let blocks = cols.div_ceil(BLOCK);
    let amax = x
        .pad_with_zeros(1, 0, blocks * BLOCK - cols)?
        .reshape((rows, blocks, BLOCK))?
        .abs()?
        .max(D::Minus1)?;
    let scales = (amax.maximum(MIN_AMAX)? / FP8_MAX)?;
    if !power_of_two {
        return Ok(scales);
    }
    let rounded_up = scales.flatten_all()?.to_vec1::<f32>()?.into_iter().map(next_power_of_two).collect();
    Tensor::from_vec(rounded_up, (rows, blocks), &Device::Cpu)
}

/// The least power of two that is not below a positive normal number.
fn next_power_of_two(x: f32) -> f32 {
    const MANTISSA: u32 = (1 << 23) - 1;
    f32::from_bits((x.to_bits() + MANTISSA) & !MANTISSA)
}

/// One scale per block `[T, blocks]` as one per channel `[T, cols]`.
fn expand(scales: &Tensor, cols: usize) -> Result<Tensor> {
    let block_of = Tensor::from_iter((0..cols).map(|i| (i / BLOCK) as u32), &Device::Cpu)?;
    scales.index_select(&block_of, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_rounded_up_to() {
        for (x, want) in [(1.0, 1.0), (1.0001, 2.0), (0.75, 1.0), (0.5, 0.5), (3e-7, 2f32.powi(-21))] {
            assert_eq!(next_power_of_two(x), want);
        }
    }
}
