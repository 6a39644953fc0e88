//! Checks of the operations that work row by row.

use r1_core::DType;

use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close, e4m3_spacing};
use super::slab::{ActivationSlab, LAYOUTS, Layout, Slab, imported};
use super::{naive, settle};
use crate::Backend;

/// Rows of a batch; none is a multiple of anything but one.
pub(super) const ROWS: [usize; 4] = [1, 3, 17, 64];
const WIDTHS: [usize; 4] = [1, 7, 130, 576];
const EPS: f32 = 1e-6;

/// Runs `check` for every pair of activation types of input and output, and both layouts.
fn dtypes<B: Backend>(backend: &B, mut check: impl FnMut([DType; 2], Layout)) {
    let dtypes = backend.capabilities().activation_dtypes;
    for &input in &dtypes {
        for &output in &dtypes {
            for layout in LAYOUTS {
                check([input, output], layout);
            }
        }
    }
}

/// FP8 forms to ask an operation for: none, and both kinds of scale where the backend has them.
pub(super) fn fp8_forms<B: Backend>(backend: &B) -> Vec<Option<bool>> {
    if backend.capabilities().fp8_activations { vec![None, Some(false), Some(true)] } else { vec![None] }
}

/// Checks that the FP8 form holds the nearest codes of what the dense form holds.
#[track_caller]
fn assert_quantized<B: Backend>(backend: &B, x: &ActivationSlab<B>) {
    let Some((data, scales)) = &x.fp8 else { return };
    let power_of_two = x.activation.fp8.as_ref().is_some_and(|fp8| fp8.power_of_two_scales);
    let (dense, cols) = (x.dense.read(backend), data.view.dim(1));
    let want = naive::fp8_scales(&dense, cols, power_of_two);
    let scales = scales.read(backend);
    assert_close("fp8 scales", &scales, &want, Tolerance { relative: 1e-6, of_rms: 0.0 });
    let blocks = cols.div_ceil(128);
    for (i, code) in data.read(backend).into_iter().enumerate() {
        let exact = (dense[i] / scales[i / cols * blocks + i % cols / 128]).clamp(-448.0, 448.0);
        let allowed = e4m3_spacing(exact) * 0.5001;
        assert!((code - exact).abs() <= allowed, "fp8 element {i} of {cols} columns: {code} for {exact}");
    }
}

/// [`Backend::feed_tokens`]: some ids come from the tokens drawn before, several of them from the same, others stay.
pub fn feed_tokens<B: Backend>(backend: &B) {
    seeded("feed_tokens", |random| {
        for (tokens, rows) in ROWS.into_iter().zip([1, 5, 2, 300]) {
            for kept_of_four in [0, 1, 4] {
                let any = |random: &mut Random| random.next() as u32;
                let drawn: Vec<u32> = (0..rows).map(|_| any(random)).collect();
                let before: Vec<u32> = (0..tokens).map(|_| any(random)).collect();
                let from: Vec<u32> =
                    (0..tokens)
                        .map(|_| {
                            if random.below(4) < kept_of_four { u32::MAX } else { random.below(rows) as u32 }
                        })
                        .collect();
                let drawn_slab = Slab::ids(backend, &[rows], &drawn);
                let from_slab = Slab::ids(backend, &[tokens], &from);
                let ids = Slab::ids(backend, &[tokens], &before);
                backend.feed_tokens(&drawn_slab.view, &from_slab.view, &ids.view);
                settle(backend, "feed_tokens");
                let pairs = from.iter().zip(&before);
                let want: Vec<u32> =
                    pairs.map(|(&row, &id)| drawn.get(row as usize).copied().unwrap_or(id)).collect();
                assert_eq!(ids.read_ids(backend), want, "feed_tokens from {from:?}");
                drawn_slab.assert_unchanged(backend);
                from_slab.assert_unchanged(backend);
            }
        }
    });
}

/// [`Backend::embed`]: also a shard of the vocabulary, whose other rows are zeros.
pub fn embed<B: Backend>(backend: &B) {
    seeded("embed", |random| {
        let dtypes = backend.capabilities().activation_dtypes;
        for table_dtype in [DType::F32, DType::BF16, DType::F16] {
            for (&out_dtype, layout) in dtypes.iter().zip(LAYOUTS.into_iter().cycle()) {
                for (rows, dim) in ROWS.into_iter().zip(WIDTHS) {
                    let (vocab, first_row) = (19, 5);
                    let (table, values) = imported(backend, random, &[vocab, dim], table_dtype, 1.0);
                    let mut ids: Vec<u32> = (0..rows).map(|_| random.below(vocab + 10) as u32).collect();
                    ids[0] = u32::MAX;
                    let ids_slab = Slab::ids(backend, &[rows], &ids);
                    let out = Slab::poison(backend, &[rows, dim], out_dtype, layout);
                    backend.embed(&ids_slab.view, &table, first_row, &out.view);
                    settle(backend, "embed");
                    let want = naive::embed(&ids, &values, dim, first_row);
                    let tolerance = Tolerance::rounded_once(out_dtype);
                    assert_close("embed", &out.read(backend), &want, tolerance);
                    ids_slab.assert_unchanged(backend);
                }
            }
        }
    });
}

/// [`Backend::rms_norm`], its FP8 form included.
pub fn rms_norm<B: Backend>(backend: &B) {
    seeded("rms_norm", |random| {
        for fp8 in fp8_forms(backend) {
            dtypes(backend, |[input, output], layout| {
                for (rows, dim) in ROWS.into_iter().zip(WIDTHS) {
                    let x = Slab::normal(backend, random, &[rows, dim], input, layout, 3.0);
                    let (weight, values) = imported(backend, random, &[dim], output, 1.0);
                    let out = Slab::poison(backend, &[rows, dim], output, layout);
                    let out = ActivationSlab::new(backend, out, fp8, layout);
                    backend.rms_norm(&x.view, &weight, EPS, &out.activation);
                    settle(backend, "rms_norm");
                    let want = naive::rms_norm(&x.host, &values, EPS);
                    let tolerance = Tolerance::rounded_once(output);
                    assert_close("rms_norm", &out.dense.read(backend), &want, tolerance);
                    assert_quantized(backend, &out);
                    x.assert_unchanged(backend);
                }
            });
        }
    });
}

/// [`Backend::rms_norm`] of rows that are tiny (epsilon counts), zero and huge.
pub fn rms_norm_range<B: Backend>(backend: &B) {
    let dim = 40;
    let row = |scale: f64| (0..dim).map(move |i| scale * (f64::from(i) - 19.5));
    let values: Vec<f64> = row(1e-5).chain(row(0.0)).chain(row(1e15)).collect();
    let shape = [3, dim as usize];
    let x = Slab::floats(backend, &shape, DType::F32, Layout::Gaps, &values);
    let weight = Slab::floats(backend, &[dim as usize], DType::F32, Layout::Dense, &vec![1.0; dim as usize]);
    let out = Slab::poison(backend, &shape, DType::F32, Layout::Gaps);
    let activation = crate::Activation::dense(out.view.clone());
    backend.rms_norm(&x.view, &weight.view, EPS, &activation);
    settle(backend, "rms_norm");
    let want = naive::rms_norm(&x.host, &weight.host, EPS);
    assert_close("rms_norm", &out.read(backend), &want, Tolerance::rounded_once(DType::F32));
}

/// [`Backend::quantize`]: blocks of zeros, of tiny values and with an outlier; a last block that is short.
pub fn quantize<B: Backend>(backend: &B) {
    seeded("quantize", |random| {
        for fp8 in fp8_forms(backend) {
            for dtype in backend.capabilities().activation_dtypes {
                for (layout, cols) in LAYOUTS.into_iter().zip([300, 128]) {
                    let rows = 5;
                    let mut values = random.normals(rows * cols, 2.0);
                    values[..cols].fill(0.0);
                    values[cols..2 * cols].iter_mut().for_each(|v| *v *= 1e-6);
                    values[3 * cols] = 1e4;
                    // Rounded up, this scale is itself; a hair more is the next power of two.
                    values[4 * cols..].fill(0.0);
                    values[4 * cols] = 448.0 * 0.25;
                    let dense = Slab::floats(backend, &[rows, cols], dtype, layout, &values);
                    let x = ActivationSlab::new(backend, dense, fp8, layout);
                    backend.quantize(&x.activation);
                    settle(backend, "quantize");
                    x.dense.assert_unchanged(backend);
                    assert_quantized(backend, &x);
                }
            }
        }
    });
}

/// [`Backend::silu_mul`], its FP8 form included, and where `exp` overflows.
pub fn silu_mul<B: Backend>(backend: &B) {
    seeded("silu_mul", |random| {
        for fp8 in fp8_forms(backend) {
            dtypes(backend, |[input, output], layout| {
                for (rows, width) in ROWS.into_iter().zip(WIDTHS) {
                    let mut values = random.normals(rows * 2 * width, 2.0);
                    values[0] = if random.below(2) == 0 { 200.0 } else { -200.0 };
                    let x = Slab::floats(backend, &[rows, 2 * width], input, layout, &values);
                    let out = Slab::poison(backend, &[rows, width], output, layout);
                    let out = ActivationSlab::new(backend, out, fp8, layout);
                    backend.silu_mul(&x.view, &out.activation);
                    settle(backend, "silu_mul");
                    let want = naive::silu_mul(&x.host, width);
                    let tolerance = Tolerance::rounded_once(output);
                    assert_close("silu_mul", &out.dense.read(backend), &want, tolerance);
                    assert_quantized(backend, &out);
                    x.assert_unchanged(backend);
                }
            });
        }
    });
}

/// [`Backend::add`].
pub fn add<B: Backend>(backend: &B) {
    seeded("add", |random| {
        dtypes(backend, |[input, output], layout| {
            for (rows, dim) in ROWS.into_iter().zip(WIDTHS) {
                let residual = Slab::normal(backend, random, &[rows, dim], output, layout, 1.0);
                let x = Slab::normal(backend, random, &[rows, dim], input, layout, 1.0);
                backend.add(&residual.view, &x.view);
                settle(backend, "add");
                let want: Vec<f64> = residual.host.iter().zip(&x.host).map(|(a, b)| a + b).collect();
                assert_close("add", &residual.read(backend), &want, Tolerance::rounded_once(output));
                x.assert_unchanged(backend);
            }
        });
    });
}

/// [`Backend::gather_rows`]: rows in any order, some of them twice; bit for bit.
pub fn gather_rows<B: Backend>(backend: &B) {
    seeded("gather_rows", |random| {
        for dtype in backend.capabilities().activation_dtypes {
            for (layout, (rows, dim)) in LAYOUTS.into_iter().cycle().zip(ROWS.into_iter().zip(WIDTHS)) {
                check_gather_rows(backend, random, dtype, layout, [rows, dim]);
            }
        }
    });
}

fn check_gather_rows<B: Backend>(
    backend: &B,
    random: &mut Random,
    dtype: DType,
    layout: Layout,
    [rows, dim]: [usize; 2],
) {
    let x = Slab::normal(backend, random, &[rows, dim], dtype, layout, 1.0);
    let picks: Vec<u32> = (0..rows + 2).map(|_| random.below(rows) as u32).collect();
    let rows = Slab::ids(backend, &[picks.len()], &picks);
    let out = Slab::poison(backend, &[picks.len(), dim], dtype, layout);
    backend.gather_rows(&x.view, &rows.view, &out.view);
    settle(backend, "gather_rows");
    let want: Vec<f64> =
        picks.iter().flat_map(|&row| x.host[row as usize * dim..][..dim].iter().copied()).collect();
    assert_eq!(out.read(backend), want, "gather_rows");
    x.assert_unchanged(backend);
}
