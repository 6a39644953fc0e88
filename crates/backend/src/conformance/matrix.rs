//! Checks of the operations that apply weights: linears, per-head matrices.

use r1_core::DType;

use super::dense::ROWS;
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close};
use super::slab::{ActivationSlab, FORMATS, Format, LAYOUTS, Layout, Slab, weight};
use super::{naive, settle};
use crate::{Activation, Backend, HeadForm, HeadWeight};

/// [N, K]: multiples of nothing, of a SIMD vector, of a block; more rows than a block; and
/// more of both than a cache tile.
const SIZES: [[usize; 2]; 6] = [[1, 1], [5, 33], [150, 300], [64, 128], [131, 264], [264, 1040]];

/// [`Backend::linear`] of dense activations with every format of weight.
pub fn linear<B: Backend>(backend: &B) {
    seeded("linear", |random| {
        let dtypes = backend.capabilities().activation_dtypes;
        for format in FORMATS {
            for &input in &dtypes {
                for output in [DType::F32, input] {
                    for (rows, [n, k]) in ROWS.into_iter().cycle().zip(SIZES) {
                        let layout = LAYOUTS[random.below(2)];
                        let x = Slab::normal(backend, random, &[rows, k], input, layout, 1.0);
                        let (w, values) = weight(backend, random, [n, k], format);
                        let out = Slab::poison(backend, &[rows, n], output, layout);
                        backend.linear(&Activation::dense(x.view.clone()), &w, &out.view);
                        settle(backend, "linear");
                        let want = naive::linear(&x.host, &values, k);
                        let what = format!("linear [{rows}, {k}] {input} × [{n}, {k}] {format:?} → {output}");
                        assert_close(&what, &out.read(backend), &want, Tolerance::rounded_once(output));
                        x.assert_unchanged(backend);
                    }
                }
            }
        }
    });
}

/// [`Backend::linear`] of FP8 activations with FP8 weights (W8A8); dense weights meet the dense form.
/// Nothing to check where the backend has none.
pub fn linear_fp8_activations<B: Backend>(backend: &B) {
    if !backend.capabilities().fp8_activations {
        return;
    }
    seeded("linear_fp8_activations", |random| {
        for dtype in backend.capabilities().activation_dtypes {
            for format in FORMATS {
                for (power_of_two, layout) in [false, true].into_iter().zip(LAYOUTS) {
                    for (rows, [n, k]) in ROWS.into_iter().cycle().zip(SIZES) {
                        let dense = Slab::normal(backend, random, &[rows, k], dtype, layout, 1.0);
                        let x = ActivationSlab::new(backend, dense, Some(power_of_two), layout);
                        backend.quantize(&x.activation);
                        let (w, values) = weight(backend, random, [n, k], format);
                        let out = Slab::poison(backend, &[rows, n], dtype, layout);
                        backend.linear(&x.activation, &w, &out.view);
                        settle(backend, "linear");
                        let met = match format {
                            Format::Fp8(_) => x.dequantized(backend).expect("an FP8 form"),
                            _ => x.dense.host.clone(),
                        };
                        let want = naive::linear(&met, &values, k);
                        let what = format!("linear [{rows}, {k}] FP8 × [{n}, {k}] {format:?} → {dtype}");
                        assert_close(&what, &out.read(backend), &want, Tolerance::rounded_once(dtype));
                    }
                }
            }
        }
    });
}

/// [`Backend::per_head`] in both forms, on columns of wider rows, with every format of weight.
pub fn per_head<B: Backend>(backend: &B) {
    seeded("per_head", |random| {
        for format in FORMATS {
            for dtype in backend.capabilities().activation_dtypes {
                for form in [HeadForm::RowsIn, HeadForm::RowsOut] {
                    for (heads, rows_per_head, k) in [(1, 3, 5), (3, 24, 33), (5, 48, 136)] {
                        let rows = [1, 4, 19][random.below(3)];
                        let sizes = [heads, rows_per_head, k];
                        check_per_head(backend, random, format, dtype, form, rows, sizes);
                    }
                }
            }
        }
    });
}

pub(super) fn check_per_head<B: Backend>(
    backend: &B,
    random: &mut Random,
    format: Format,
    dtype: DType,
    form: HeadForm,
    tokens: usize,
    [heads, rows_per_head, k]: [usize; 3],
) {
    let (w, values) = weight(backend, random, [heads * rows_per_head, k], format);
    let split = 1 + rows_per_head / 3;
    // The absorbed form's two halves of each head.
    let rows = match form {
        HeadForm::RowsIn => 0..split,
        HeadForm::RowsOut => split..rows_per_head,
    };
    let (from, to) = match form {
        HeadForm::RowsIn => (rows.len(), k),
        HeadForm::RowsOut => (k, rows.len()),
    };
    let x = Slab::normal(backend, random, &[tokens, heads, from], dtype, Layout::Gaps, 1.0);
    let out = Slab::poison(backend, &[tokens, heads, to], dtype, LAYOUTS[random.below(2)]);
    let w = HeadWeight { weight: w, rows_per_head, rows: rows.clone(), form };
    backend.per_head(&x.view, &w, &out.view);
    settle(backend, "per_head");
    let want = naive::per_head(&x.host, &values, heads, k, &rows, form);
    let what = format!("per_head {form:?} {format:?} {dtype} T={tokens} H={heads} rows={rows:?} K={k}");
    assert_close(&what, &out.read(backend), &want, Tolerance::rounded_once(dtype));
    x.assert_unchanged(backend);
}
