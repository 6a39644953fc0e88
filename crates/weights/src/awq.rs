//! AWQ's int4 weights as files of AutoAWQ's GEMM layout hold them, repacked into the layout that backends read. Knows the packing,
//! no layer by name; nothing reads such a checkpoint yet.

use r1_backend::HostTensor;
use r1_core::DType;

use crate::error::WeightsError;

/// Codes per word.
const PER_WORD: usize = 8;
/// Of the eight columns that a word holds, the one that each nibble belongs to, lowest nibble first.
const COLUMN_OF_NIBBLE: [usize; PER_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];

/// A linear layer's int4 weight in host memory, as `r1_backend::Int4Group` documents it: element `(n, k)` is
/// `(code[n, k] - zeros[n, k / group]) * scales[n, k / group]`.
#[derive(Clone, Debug)]
pub struct HostInt4 {
    /// `[N, K / 8]` U32, the lowest nibble first.
    pub codes: HostTensor,
    /// `[N, K / group]` F16, whole numbers from 0 to 15.
    pub zeros: HostTensor,
    /// `[N, K / group]` F16.
    pub scales: HostTensor,
    /// Inputs that share a zero and a scale.
    pub group: usize,
}

/// Repacks the three tensors of the layer `prefix` from AutoAWQ's GEMM layout: transposed, and in its order of nibbles.
///
/// - `qweight` `[K, N / 8]` and `qzeros` `[K / group, N / 8]`: the files' I32 as U32, bit for bit
/// - `scales` `[K / group, N]` F16
///
/// Shapes or dtypes that do not fit each other, groups that are no multiple of 8, and scales that are not finite are errors.
/// Allocates what the result holds.
pub fn repack_awq(
    prefix: &str,
    qweight: &HostTensor,
    qzeros: &HostTensor,
    scales: &HostTensor,
) -> Result<HostInt4, WeightsError> {
    let Some([n, k, group]) = sizes(qweight, qzeros, scales) else {
        let of = |t: &HostTensor| (t.shape().to_vec(), t.dtype());
        return Err(WeightsError::AwqMismatch {
            prefix: prefix.to_owned(),
            found: Box::new([qweight, qzeros, scales].map(of)),
        });
    };
    Ok(HostInt4 {
        codes: codes(qweight, n, k),
        zeros: zeros(qzeros, n, k / group),
        scales: transposed_scales(prefix, scales, n, k / group)?,
        group,
    })
}

/// N, K and the group, where the three tensors agree about them.
fn sizes(qweight: &HostTensor, qzeros: &HostTensor, scales: &HostTensor) -> Option<[usize; 3]> {
    let dtypes = [qweight.dtype(), qzeros.dtype(), scales.dtype()];
    let (&[k, words], &[groups, n]) = (qweight.shape(), scales.shape()) else { return None };
    let whole = k > 0 && words > 0 && groups > 0 && n == words * PER_WORD && k.is_multiple_of(groups);
    let group = if whole { k / groups } else { return None };
    let fits = dtypes == [DType::U32, DType::U32, DType::F16]
        && qzeros.shape() == [groups, words]
        && group.is_multiple_of(PER_WORD);
    fits.then_some([n, k, group])
}

/// Nibble `i` of a word.
fn nibble(word: u32, i: usize) -> u32 {
    word >> (4 * i) & 15
}

/// Word `i` of a U32 tensor, whatever its address's alignment.
fn word(tensor: &HostTensor, i: usize) -> u32 {
    u32::from_le_bytes(tensor.bytes().as_chunks().0[i])
}

fn codes(qweight: &HostTensor, n: usize, k: usize) -> HostTensor {
    let (words, row_words) = (n / PER_WORD, k / PER_WORD);
    let mut out = vec![0u8; n * row_words * 4];
    let (out_words, _) = out.as_chunks_mut::<4>();
    for block in 0..row_words {
        for column in 0..words {
            // An 8 × 8 block of codes: eight inputs, eight outputs.
            let inputs: [u32; PER_WORD] =
                std::array::from_fn(|j| word(qweight, (block * PER_WORD + j) * words + column));
            for (i, offset) in COLUMN_OF_NIBBLE.into_iter().enumerate() {
                let codes = inputs.iter().enumerate();
                let packed = codes.fold(0, |packed, (j, &input)| packed | nibble(input, i) << (4 * j));
                let row = column * PER_WORD + offset;
                out_words[row * row_words + block] = packed.to_le_bytes();
            }
        }
    }
    HostTensor::from_vec(out, &[n, row_words], DType::U32)
}

fn zeros(qzeros: &HostTensor, n: usize, groups: usize) -> HostTensor {
    let words = n / PER_WORD;
    let mut out = vec![0u8; n * groups * 2];
    let (halves, _) = out.as_chunks_mut::<2>();
    for group in 0..groups {
        for column in 0..words {
            let packed = word(qzeros, group * words + column);
            for (i, offset) in COLUMN_OF_NIBBLE.into_iter().enumerate() {
                let row = column * PER_WORD + offset;
                halves[row * groups + group] = half::f16::from_f32(nibble(packed, i) as f32).to_le_bytes();
            }
        }
    }
    HostTensor::from_vec(out, &[n, groups], DType::F16)
}

fn transposed_scales(
    prefix: &str,
    scales: &HostTensor,
    n: usize,
    groups: usize,
) -> Result<HostTensor, WeightsError> {
    let mut out = vec![0u8; n * groups * 2];
    let (halves, _) = out.as_chunks_mut::<2>();
    for (i, &bytes) in scales.bytes().as_chunks::<2>().0.iter().enumerate() {
        let (group, row) = (i / n, i % n);
        let value = half::f16::from_le_bytes(bytes);
        if !value.is_finite() {
            return Err(WeightsError::AwqScale {
                prefix: prefix.to_owned(),
                index: [group, row],
                value: value.to_f32(),
            });
        }
        halves[row * groups + group] = bytes;
    }
    Ok(HostTensor::from_vec(out, &[n, groups], DType::F16))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(values: &[u32], shape: &[usize]) -> HostTensor {
        HostTensor::from_vec(values.iter().flat_map(|v| v.to_le_bytes()).collect(), shape, DType::U32)
    }

    fn halves(values: &[f32], shape: &[usize]) -> HostTensor {
        let bytes = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
        HostTensor::from_vec(bytes, shape, DType::F16)
    }

    /// Numbers without a pattern (Knuth's multiplicative hash).
    fn scattered(i: usize) -> u32 {
        (i as u32 + 1).wrapping_mul(2_654_435_761).rotate_left(7) ^ 0x5bd1_e995
    }

    /// AutoAWQ's de-quantisation as plain loops: unpack each word's nibbles in order, put the columns of every eight back by
    /// the inverse permutation, subtract, scale. Gives `[K, N]`.
    fn auto_awq(qweight: &[u32], qzeros: &[u32], scales: &[f32], [n, k, group]: [usize; 3]) -> Vec<f64> {
        const REVERSE_ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
        let unpack = |words: &[u32]| -> Vec<i32> {
            let shuffled: Vec<i32> = words
                .iter()
                .flat_map(|&w| [0, 4, 8, 12, 16, 20, 24, 28].map(|shift| (w >> shift & 0xf) as i32))
                .collect();
            (0..shuffled.len()).map(|i| shuffled[i / 8 * 8 + REVERSE_ORDER[i % 8]]).collect()
        };
        let (codes, zeros) = (unpack(qweight), unpack(qzeros));
        let mut out = Vec::new();
        for row in 0..k {
            for col in 0..n {
                let at = row / group * n + col;
                out.push(f64::from(codes[row * n + col] - zeros[at]) * f64::from(scales[at]));
            }
        }
        out
    }

    #[test]
    fn repacked_weights_are_what_auto_awq_makes_of_them() {
        for [n, k, group] in [[8, 8, 8], [16, 48, 16], [40, 256, 128], [24, 64, 64]] {
            let groups = k / group;
            let qweight: Vec<u32> = (0..k * n / 8).map(scattered).collect();
            let qzeros: Vec<u32> = (0..groups * n / 8).map(|i| scattered(i + 7919)).collect();
            let scales: Vec<f32> =
                (0..groups * n).map(|i| half::f16::from_f32((i as f32 + 1.0) * 0.001).to_f32()).collect();
            let want = auto_awq(&qweight, &qzeros, &scales, [n, k, group]);
            let packed = repack_awq(
                "layer",
                &words(&qweight, &[k, n / 8]),
                &words(&qzeros, &[groups, n / 8]),
                &halves(&scales, &[groups, n]),
            )
            .expect("they fit");
            assert_eq!(packed.group, group);
            assert_eq!(packed.codes.shape(), [n, k / 8]);
            let of = crate::widen_to_f32;
            let (zeros, scales) = (of(&packed.zeros), of(&packed.scales));
            for row in 0..n {
                for col in 0..k {
                    let bytes = &packed.codes.bytes()[(row * k + col) / 8 * 4..][..4];
                    let word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
                    let at = row * groups + col / group;
                    let code = (word >> (4 * (col % 8)) & 15) as f32;
                    let value = f64::from((code - zeros[at]) * scales[at]);
                    assert_eq!(value, want[col * n + row], "[{row}, {col}] of [{n}, {k}] in {group}");
                }
            }
        }
    }

    /// One word by hand: its nibbles 0 to 7 from the lowest are columns 0, 2, 4, 6, 1, 3, 5, 7.
    #[test]
    fn a_word_holds_even_columns_first() {
        let mut qweight = [0; 8];
        qweight[3] = 0x7654_3210;
        let qweight = words(&qweight, &[8, 1]);
        let packed = repack_awq("layer", &qweight, &words(&[0], &[1, 1]), &halves(&[1.0; 8], &[1, 8]));
        let codes = packed.expect("they fit").codes;
        let rows: Vec<u32> = codes.bytes().as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        // Input 3 is bits 12 to 16 of every output's word.
        assert_eq!(rows, [0, 4, 1, 5, 2, 6, 3, 7].map(|code| code << 12));
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused_by_name_and_shape() {
        let good = || (words(&[0; 32], &[16, 2]), words(&[0; 4], &[2, 2]), halves(&[1.0; 32], &[2, 16]));
        let (qweight, qzeros, scales) = good();
        assert!(repack_awq("layer", &qweight, &qzeros, &scales).is_ok());
        let wrong = [
            (words(&[0; 32], &[16, 2]), words(&[0; 2], &[1, 2]), halves(&[1.0; 32], &[2, 16])),
            (words(&[0; 32], &[16, 2]), words(&[0; 4], &[2, 2]), halves(&[1.0; 30], &[2, 15])),
            // Groups of four.
            (words(&[0; 16], &[8, 2]), words(&[0; 4], &[2, 2]), halves(&[1.0; 32], &[2, 16])),
            (words(&[0; 32], &[32]), words(&[0; 4], &[2, 2]), halves(&[1.0; 32], &[2, 16])),
            (words(&[0; 32], &[16, 2]), words(&[0; 4], &[2, 2]), words(&[1; 32], &[2, 16])),
            (words(&[], &[0, 2]), words(&[], &[0, 2]), halves(&[], &[0, 16])),
        ];
        for (qweight, qzeros, scales) in &wrong {
            let error = repack_awq("layers.3.up_proj", qweight, qzeros, scales).expect_err("no fit");
            assert!(matches!(error, WeightsError::AwqMismatch { .. }), "{error}");
            assert!(error.to_string().starts_with("layers.3.up_proj: "), "{error}");
        }
        let mut values = [1.0; 32];
        values[16 + 5] = f32::NAN;
        let error = repack_awq("layer", &qweight, &qzeros, &halves(&values, &[2, 16])).expect_err("NaN");
        assert!(matches!(error, WeightsError::AwqScale { index: [1, 5], .. }), "{error}");
    }
}
