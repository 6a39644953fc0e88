//! 8-bit codes: each group's largest magnitude becomes ±127.

use r1_core::DType;

use super::{HostQuantized, Job, QUANTIZED_GROUP, ROUND, groups_touched, host};
use crate::error::WeightsError;

pub(super) fn quantize(job: &Job<'_>) -> Result<HostQuantized, WeightsError> {
    let groups = groups_touched(&job.columns).len();
    let offset = job.columns.start % QUANTIZED_GROUP;
    let mut data = job.room(job.columns.len())?;
    let mut scales = job.room(4 * groups)?;
    job.each_row([&mut data, &mut scales], |values, [codes, scales]| {
        let mut codes = codes;
        // The first group may begin before the job's columns, the last one end behind them.
        let mut skip = offset;
        for (group, scale_bytes) in values.chunks(QUANTIZED_GROUP).zip(scales.as_chunks_mut::<4>().0) {
            let Some(scale) = scale(group) else { return false };
            *scale_bytes = scale.to_le_bytes();
            let kept = &group[skip..];
            let (now, later) = codes.split_at_mut(kept.len().min(codes.len()));
            encode(kept, scale, now);
            (codes, skip) = (later, 0);
        }
        true
    })?;
    let rows = job.rows.len();
    Ok(HostQuantized::Int8 {
        data: host(data, rows, job.columns.len(), DType::I8),
        scales: host(scales, rows, groups, DType::F32),
        group: QUANTIZED_GROUP,
        offset,
    })
}

/// What a group's codes are multiplied by; `None` of values that are not finite. 0 of a group that is as good as zero.
fn scale(group: &[f32]) -> Option<f32> {
    let (chunks, rest) = group.as_chunks::<8>();
    let (mut largest, mut check) = ([0.0f32; 8], [0.0f32; 8]);
    for chunk in chunks {
        for i in 0..8 {
            let magnitude = chunk[i].abs();
            largest[i] = if magnitude > largest[i] { magnitude } else { largest[i] };
            // Zero, unless the value is NaN or infinite.
            check[i] += chunk[i] * 0.0;
        }
    }
    let tail = rest.iter().fold(0.0, |a: f32, x| a.max(x.abs()));
    let is_finite = check.iter().all(|x| *x == 0.0) && rest.iter().all(|x| x.is_finite());
    let scale = largest.into_iter().fold(tail, f32::max) / 127.0;
    // One over a smaller one may be infinite.
    is_finite.then_some(if scale < f32::MIN_POSITIVE * 127.0 { 0.0 } else { scale })
}

fn encode(values: &[f32], scale: f32, codes: &mut [u8]) {
    if scale == 0.0 {
        return codes.fill(0);
    }
    let inverse = 1.0 / scale;
    for (&value, code) in values.iter().zip(codes) {
        // At most 127 and a little: the largest magnitude over 127, times 127 over it. The sum's lowest byte is the code.
        *code = (value * inverse + ROUND).to_bits() as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(values: &[f32]) -> (Vec<i8>, f32) {
        let scale = scale(values).expect("finite");
        let mut codes = vec![7; values.len()];
        encode(values, scale, &mut codes);
        (codes.into_iter().map(u8::cast_signed).collect(), scale)
    }

    #[test]
    fn the_largest_magnitude_is_127_and_nothing_is_further() {
        assert_eq!(codes(&[1.0, -127.0, 0.5, 1.5, 2.5, -0.49, 63.2]), (vec![1, -127, 0, 2, 2, 0, 63], 1.0));
        for largest in [1e-30f32, 3.3e-7, 0.1, 0.017, 1.0, 12345.0, f32::MAX] {
            let (codes, _) = codes(&[largest, -largest, largest * 0.999, 0.0]);
            assert_eq!(codes, [127, -127, 127, 0], "{largest}");
        }
    }

    #[test]
    fn zeros_and_the_tiniest_are_zero() {
        assert_eq!(codes(&[0.0, -0.0]), (vec![0, 0], 0.0));
        assert_eq!(codes(&[1e-40, -1e-42]), (vec![0, 0], 0.0));
    }

    #[test]
    fn what_is_not_finite_has_no_scale() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 7, 8, 10] {
                let mut values = [1.0; 11];
                values[at] = bad;
                assert_eq!(scale(&values), None, "{bad} at {at}");
            }
        }
    }
}
