//! 4-bit codes with a zero and a scale per group: of a few ranges, each somewhat narrower than the values', the one whose codes
//! stand for the values with the least squared error.
//!
//! The loops over a group are never inlined: compilers make vectors of them where they stand alone, and a quarter of the speed is
//! left where they do not.

use std::ops::Range;

use half::f16;
use r1_core::DType;

use super::{HostQuantized, Job, QUANTIZED_GROUP, ROUND, groups_touched, host, rounded};
use crate::awq::HostInt4;
use crate::error::WeightsError;

/// Codes per word, and lanes that the compiler makes vectors of.
const PER_WORD: usize = 8;
/// The largest code.
const MAX_CODE: f32 = 15.0;
/// Shares of the values' range that are tried: outliers are cut off where that serves the others better.
/// Three bring nearly all there is: on normal weights the error is 0.0956 of their root mean square, 0.0951 with fifteen ranges,
/// and 0.1007 with the values' own.
const SHARES: [f32; 3] = [0.97, 0.89, 0.81];

/// The group of a shard: a divisor of the whole matrix's where the shard begins inside a group.
pub(super) fn shard_group(columns: &Range<usize>) -> usize {
    let (mut a, mut b) = (QUANTIZED_GROUP, columns.start % QUANTIZED_GROUP);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

pub(super) fn quantize(job: &Job<'_>) -> Result<HostQuantized, WeightsError> {
    let columns = &job.columns;
    let group = shard_group(columns);
    let groups = columns.len().div_ceil(group);
    let first_group = groups_touched(columns).start;
    let offset = columns.start % QUANTIZED_GROUP;
    // In the shard's groups, which whole group each lies in.
    let whole = |i: usize| (columns.start + i * group) / QUANTIZED_GROUP - first_group;
    let (mut codes, mut zeros, mut scales) =
        (job.room(columns.len() / 2)?, job.room(2 * groups)?, job.room(2 * groups)?);
    job.each_row([&mut codes, &mut zeros, &mut scales], |values, [codes, zeros, scales]| {
        let mut codes = codes.as_chunks_mut::<4>().0;
        let mut skip = offset;
        let mut next = 0;
        let (zeros, scales) = (zeros.as_chunks_mut::<2>().0, scales.as_chunks_mut::<2>().0);
        for (index, values) in values.chunks(QUANTIZED_GROUP).enumerate() {
            let Some(found) = Group::of(values) else { return false };
            while next < groups && whole(next) == index {
                zeros[next] = f16::from_f32(found.zero).to_le_bytes();
                scales[next] = found.scale.to_le_bytes();
                next += 1;
            }
            let kept = &values[skip..];
            let (now, later) = codes.split_at_mut((kept.len() / PER_WORD).min(codes.len()));
            found.encode(kept, now);
            (codes, skip) = (later, 0);
        }
        true
    })?;
    let rows = job.rows.len();
    Ok(HostQuantized::Int4(HostInt4 {
        codes: host(codes, rows, columns.len() / PER_WORD, DType::U32),
        zeros: host(zeros, rows, groups, DType::F16),
        scales: host(scales, rows, groups, DType::F16),
        group,
    }))
}

/// A group's zero, a whole number from 0 to 15, and its scale.
struct Group {
    zero: f32,
    scale: f16,
}

impl Group {
    /// `None` of values that are not finite, or too large for an F16 scale.
    fn of(values: &[f32]) -> Option<Self> {
        let [least, most] = range(values)?;
        let step = (most - least) / MAX_CODE;
        if !(step >= f32::MIN_POSITIVE && (1.0 / step).is_finite()) {
            // All as good as zero; or a range that is not finite.
            return step.is_finite().then_some(Self { zero: 0.0, scale: f16::ZERO });
        }
        let zero = rounded(-least / step).clamp(0.0, MAX_CODE);
        let mut best = (0.0, step);
        for share in SHARES {
            let [with, own] = products(values, zero, 1.0 / (step * share));
            // With codes d and the scale s = Σ d x / Σ d² that suits them best, the squared error is Σ x² - s Σ d x.
            let scale = with / own;
            let gain = scale * with;
            if gain > best.0 {
                best = (gain, scale);
            }
        }
        let scale = f16::from_f32(best.1);
        scale.is_finite().then_some(Self { zero, scale })
    }

    #[inline(never)]
    fn encode(&self, values: &[f32], words: &mut [[u8; 4]]) {
        let scale = self.scale.to_f32();
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (values, word) in values.as_chunks::<PER_WORD>().0.iter().zip(words) {
            // As in `rounded`: the sum's lowest bits are the code.
            let codes = values.map(|value| (scaled(value, inverse, self.zero) + ROUND).to_bits() & 15);
            let packed = codes.into_iter().rev().fold(0, |word, code| word << 4 | code);
            *word = packed.to_le_bytes();
        }
    }
}

/// Where a value lies from 0 to 15, not rounded.
#[inline]
fn scaled(value: f32, inverse: f32, zero: f32) -> f32 {
    let code = value * inverse + zero;
    let code = if code > 0.0 { code } else { 0.0 };
    if code < MAX_CODE { code } else { MAX_CODE }
}

/// The least and the greatest value and 0; `None` when a value is not finite.
#[inline(never)]
fn range(values: &[f32]) -> Option<[f32; 2]> {
    let (mut least, mut most, mut check) = ([0.0f32; PER_WORD], [0.0f32; PER_WORD], [0.0f32; PER_WORD]);
    let chunks = values.as_chunks::<PER_WORD>().0;
    // One loop each: together they do not become vectors.
    for chunk in chunks {
        for (least, &value) in least.iter_mut().zip(chunk) {
            *least = if value < *least { value } else { *least };
        }
    }
    for chunk in chunks {
        for (most, &value) in most.iter_mut().zip(chunk) {
            *most = if value > *most { value } else { *most };
        }
    }
    for chunk in chunks {
        for (check, value) in check.iter_mut().zip(chunk) {
            // Zero, unless the value is NaN or infinite.
            *check += value * 0.0;
        }
    }
    check
        .iter()
        .all(|x| *x == 0.0)
        .then(|| [least.into_iter().fold(0.0, f32::min), most.into_iter().fold(0.0, f32::max)])
}

/// `Σ d x` and `Σ d²` over the codes `d`, counted from the zero.
#[inline(never)]
fn products(values: &[f32], zero: f32, inverse: f32) -> [f32; 2] {
    let (mut with, mut own) = ([0.0f32; PER_WORD], [0.0f32; PER_WORD]);
    for chunk in values.as_chunks::<PER_WORD>().0 {
        for i in 0..PER_WORD {
            let code = rounded(scaled(chunk[i], inverse, zero)) - zero;
            with[i] += code * chunk[i];
            own[i] += code * code;
        }
    }
    [with.into_iter().sum(), own.into_iter().sum()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(values: &[f32]) -> Vec<f32> {
        let group = Group::of(values).expect("finite");
        let mut words = vec![[0; 4]; values.len() / 8];
        group.encode(values, &mut words);
        let codes = words.iter().flat_map(|word| {
            let word = u32::from_le_bytes(*word);
            (0..8).map(move |i| (word >> (4 * i) & 15) as f32)
        });
        codes.map(|code| (code - group.zero) * group.scale.to_f32()).collect()
    }

    /// What fits sixteen steps exactly stays what it is, wherever zero lies among them.
    #[test]
    fn sixteen_steps_are_exact() {
        for zero in 0..16 {
            for scale in [0.25, 1.0, 2f32.powi(-12)] {
                let values: Vec<f32> = (0..16).map(|code| (code - zero) as f32 * scale).collect();
                assert_eq!(decoded(&values), values, "zero {zero}, scale {scale}");
            }
        }
    }

    /// An outlier is cut off where that serves the others: the error is never more than that of the full range.
    #[test]
    fn the_error_is_at_most_that_of_the_full_range() {
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        for outlier in [0.0, 0.7, 3.0, 40.0] {
            let mut values: Vec<f32> = (0..128).map(|_| random() + random() + random()).collect();
            values[5] = if outlier == 0.0 { values[5] } else { outlier };
            let error =
                |decoded: &[f32]| values.iter().zip(decoded).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
            let [least, most] = range(&values).expect("finite");
            let step = (most - least) / 15.0;
            let zero = rounded(-least / step);
            let plain: Vec<f32> =
                values.iter().map(|v| (rounded((v / step + zero).clamp(0.0, 15.0)) - zero) * step).collect();
            let (found, plain) = (error(&decoded(&values)), error(&plain));
            assert!(found < plain * 1.001, "outlier {outlier}: {found}, {plain} over the full range");
        }
    }

    #[test]
    fn zeros_and_the_tiniest_are_zero() {
        assert_eq!(decoded(&[0.0; 16]), [0.0; 16]);
        assert_eq!(decoded(&[1e-39; 16]), [0.0; 16]);
    }

    #[test]
    fn what_an_f16_scale_cannot_reach_is_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::MAX, 2e6] {
            let mut values = [1.0; 16];
            values[9] = bad;
            assert!(Group::of(&values).is_none(), "{bad}");
        }
        assert!(Group::of(&[-f32::MAX, f32::MAX, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]).is_none());
    }

    #[test]
    fn a_shard_s_group_divides_where_it_begins() {
        for (start, group) in [(0, 128), (128, 128), (64, 64), (8, 8), (704, 64), (1000, 8), (96, 32)] {
            assert_eq!(shard_group(&(start..start + 8)), group, "{start}");
        }
    }
}
