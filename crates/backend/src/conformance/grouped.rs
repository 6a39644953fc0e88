//! Checks of linears and experts over weights in groups along K: int8 and int4. A backend whose capabilities lack a format
//! must refuse it.

use r1_core::DType;

use super::dense::{ROWS, fp8_forms};
use super::matrix::check_per_head;
use super::moe::check_experts;
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close};
use super::shapes::refuses;
use super::slab::{ActivationSlab, Format, LAYOUTS, Slab, weight};
use super::{naive, settle};
use crate::{
    Activation, Backend, Experts, HeadForm, HeadWeight, Int4Group, MlpWeights, Weight, WeightFormat,
};

const fn int8(group: usize, offset: usize) -> Format {
    Format::Int8 { group, offset }
}

const fn int4(group: usize) -> Format {
    Format::Int4 { group }
}

/// N, K and the format: one element, groups that end short and begin inside, one that the whole row fits in, more of them
/// than one tile holds.
const INT8: [([usize; 2], Format); 11] = [
    ([1, 1], int8(32, 0)),
    ([5, 33], int8(32, 31)),
    ([37, 70], int8(128, 100)),
    ([131, 264], int8(128, 0)),
    ([64, 128], int8(256, 127)),
    ([150, 1040], int8(128, 40)),
    ([7, 2309], int8(64, 5)),
    ([33, 301], int8(10, 3)),
    // Whole blocks of int8 activations: a cut one, groups of two, more of them than a vector of scales.
    ([21, 300], int8(128, 0)),
    ([10, 1100], int8(256, 0)),
    ([13, 4200], int8(128, 0)),
];

/// As `INT8`: one word, groups that end short, more groups than one tile holds, and AWQ's own.
const INT4: [([usize; 2], Format); 10] = [
    ([1, 8], int4(8)),
    ([5, 40], int4(16)),
    ([37, 72], int4(64)),
    ([131, 264], int4(128)),
    ([64, 128], int4(256)),
    ([150, 1032], int4(128)),
    ([9, 2304], int4(24)),
    ([21, 296], int4(128)),
    ([10, 1096], int4(256)),
    ([13, 4200], int4(128)),
];

fn takes<B: Backend>(backend: &B, format: WeightFormat) -> bool {
    backend.capabilities().weight_formats.contains(&format)
}

/// Whether the weight meets activations that the backend quantized to int8.
pub(super) fn meets_int8<B: Backend>(backend: &B, w: &Weight<B>) -> bool {
    backend.capabilities().int8_activations && w.takes_int8_activations()
}

/// [`Backend::linear`] with int8 weights, which meet the dense form of an activation, as it is or quantized to int8. A row is what it is alone, bit for bit
/// where the backend says that it ignores the batch.
pub fn linear_int8<B: Backend>(backend: &B) {
    linear(backend, "linear_int8", &INT8);
}

/// As [`linear_int8`], of int4 weights.
pub fn linear_int4<B: Backend>(backend: &B) {
    linear(backend, "linear_int4", &INT4);
}

/// Heads, rows of each, K; groups that end short and begin inside, and more outputs than are widened at once.
const PER_HEAD: [([usize; 3], usize, usize); 5] = [
    ([1, 3, 5], 32, 0),
    ([3, 24, 33], 10, 3),
    ([5, 48, 136], 128, 0),
    ([2, 130, 300], 128, 40),
    ([2, 7, 512], 128, 0),
];

/// [`Backend::per_head`] with int8 weights, where the backend has them.
pub fn per_head_int8<B: Backend>(backend: &B) {
    if !takes(backend, WeightFormat::Int8Group) {
        return;
    }
    seeded("per_head_int8", |random| {
        for dtype in backend.capabilities().activation_dtypes {
            for form in [HeadForm::RowsIn, HeadForm::RowsOut] {
                for (sizes, group, offset) in PER_HEAD {
                    for tokens in [1, 4, 19] {
                        check_per_head(backend, random, int8(group, offset), dtype, form, tokens, sizes);
                    }
                }
            }
        }
    });
}

fn linear<B: Backend>(backend: &B, name: &'static str, cases: &[([usize; 2], Format)]) {
    if !takes(backend, cases[0].1.kind()) {
        return;
    }
    let capabilities = backend.capabilities();
    seeded(name, |random| {
        for &input in &capabilities.activation_dtypes {
            for output in [DType::F32, input] {
                for fp8 in fp8_forms(backend) {
                    for (rows, &(size, format)) in ROWS.into_iter().cycle().zip(cases) {
                        check(backend, random, rows, size, format, [input, output], fp8);
                    }
                }
            }
        }
    });
}

fn check<B: Backend>(
    backend: &B,
    random: &mut Random,
    rows: usize,
    [n, k]: [usize; 2],
    format: Format,
    [input, output]: [DType; 2],
    fp8: Option<bool>,
) {
    let layout = LAYOUTS[random.below(2)];
    let dense = Slab::normal(backend, random, &[rows, k], input, layout, 1.0);
    let x = ActivationSlab::new(backend, dense, fp8, layout);
    let (w, values) = weight(backend, random, [n, k], format);
    assert_eq!((w.out_features(), w.in_features(), w.format()), (n, k, format.kind()));
    let out = Slab::poison(backend, &[rows, n], output, layout);
    backend.linear(&x.activation, &w, &out.view);
    settle(backend, "linear");
    let met =
        if meets_int8(backend, &w) { naive::int8_round_trip(&x.dense.host, k) } else { x.dense.host.clone() };
    let want = naive::linear(&met, &values, k);
    let what = format!("linear [{rows}, {k}] {input} (FP8 form: {fp8:?}) × [{n}, {k}] {format:?} → {output}");
    let (found, tolerance) = (out.read(backend), Tolerance::rounded_once(output));
    assert_close(&what, &found, &want, tolerance);
    x.dense.assert_unchanged(backend);

    let row = random.below(rows);
    let one = Slab::poison(backend, &[1, n], output, layout);
    backend.linear(&x.activation.rows(row..row + 1), &w, &one.view);
    settle(backend, "linear");
    let (one, of_all) = (one.read(backend), &found[row * n..][..n]);
    if backend.capabilities().batch_invariant {
        assert_eq!(one, of_all, "{what}: row {row} alone");
    } else {
        assert_close(&format!("{what}: row {row} alone"), &one, of_all, tolerance);
    }
}

/// [`Backend::experts`] over int8 weights, where the backend has them.
pub fn experts_int8<B: Backend>(backend: &B) {
    let formats = [int8(128, 0), int8(32, 20), int8(24, 7)];
    experts(backend, "experts_int8", &formats, &[(1, [33, 5]), (3, [136, 70]), (40, [264, 130])]);
}

/// As [`experts_int8`], of int4 weights.
pub fn experts_int4<B: Backend>(backend: &B) {
    let formats = [int4(128), int4(32), int4(8)];
    experts(backend, "experts_int4", &formats, &[(1, [40, 8]), (3, [136, 72]), (40, [264, 136])]);
}

fn experts<B: Backend>(backend: &B, name: &'static str, formats: &[Format], cases: &[(usize, [usize; 2])]) {
    if !backend.capabilities().expert_formats.contains(&formats[0].kind()) {
        return;
    }
    seeded(name, |random| {
        for dtype in backend.capabilities().activation_dtypes {
            for &format in formats {
                for &(tokens, sizes) in cases {
                    for fp8 in fp8_forms(backend) {
                        check_experts(backend, random, dtype, format, tokens, sizes, fp8);
                    }
                }
            }
        }
    });
}

/// Wrong shapes are refused, and weights of these formats where nothing takes them.
pub(super) fn shape_panics<B: Backend>(backend: &B, random: &mut Random) {
    let f = |shape: &[usize]| backend.alloc(shape, DType::F32).expect("alloc");
    let (w8, _) = weight(backend, random, [4, 24], int8(16, 4));
    let Weight::Int8Group { data, scales, .. } = &w8 else { unreachable!("weight() makes int8 weights") };
    let (w4, _) = weight(backend, random, [4, 24], int4(16));
    let Weight::Int4Group(parts) = &w4 else { unreachable!("weight() makes int4 weights") };
    let x = Activation::dense(f(&[2, 24]));
    for (w, format) in [(&w8, int8(16, 4)), (&w4, int4(16))] {
        if takes(backend, w.format()) {
            refuses("linear: w has shape", || {
                backend.linear(&Activation::dense(f(&[2, 16])), w, &f(&[2, 4]));
            });
        } else {
            refuses("linear: w", || backend.linear(&x, w, &f(&[2, 4])));
        }
        let head = |k: usize| {
            let head = HeadWeight { weight: w.clone(), rows_per_head: 2, rows: 0..2, form: HeadForm::RowsIn };
            backend.per_head(&f(&[3, 2, 2]), &head, &f(&[3, 2, k]));
        };
        if w.format() == WeightFormat::Int8Group && takes(backend, w.format()) {
            refuses("per_head: out has shape", || head(16));
        } else {
            refuses("per_head: w is Int", || head(24));
        }
        experts_refused(backend, random, format);
    }
    if takes(backend, WeightFormat::Int8Group) {
        let with = |scales: &[usize], group, offset| Weight::Int8Group {
            data: data.clone(),
            scales: f(scales),
            group,
            offset,
        };
        refuses("linear: w.scales", || backend.linear(&x, &with(&[4, 3], 16, 4), &f(&[2, 4])));
        refuses("linear: w has offset", || backend.linear(&x, &with(&[4, 3], 16, 16), &f(&[2, 4])));
        refuses("linear: w has dtype", || {
            let w = Weight::Int8Group { data: f(&[4, 24]), scales: scales.clone(), group: 16, offset: 4 };
            backend.linear(&x, &w, &f(&[2, 4]));
        });
    }
    if takes(backend, WeightFormat::Int4Group) {
        let with = |zeros: [usize; 2], group| {
            let zeros = backend.alloc(&zeros, DType::F16).expect("alloc");
            Weight::Int4Group(Int4Group { zeros, group, ..parts.clone() })
        };
        refuses("linear: w.zeros", || backend.linear(&x, &with([4, 3], 16), &f(&[2, 4])));
        refuses("linear: w.group", || backend.linear(&x, &with([4, 2], 12), &f(&[2, 4])));
    }
}

/// Experts of the wrong shape, and of a format that the backend lacks.
fn experts_refused<B: Backend>(backend: &B, random: &mut Random, format: Format) {
    let f = |shape: &[usize]| backend.alloc(shape, DType::F32).expect("alloc");
    let mut w = |size| weight(backend, random, size, format).0;
    let square = w([24, 24]);
    let one = || MlpWeights { gate: square.clone(), up: square.clone(), down: square.clone() };
    let (narrow, wide) = (w([24, 16]), w([24, 32]));
    // Whether the backend has the format or not: within an expert, then between experts.
    refuses("experts: down has shape", || {
        let local = vec![MlpWeights { down: narrow.clone(), ..one() }];
        let _ = Experts::new(backend, local, 0, 2);
    });
    refuses("experts: gate has shape", || {
        let other = MlpWeights { gate: wide.clone(), up: wide.clone(), down: w([32, 24]) };
        let _ = Experts::new(backend, vec![one(), other], 0, 2);
    });
    let format = square.format();
    let is_taken = backend.capabilities().expert_formats.contains(&format);
    match Experts::new(backend, vec![one()], 0, 2) {
        // A backend that looks at experts when they are put together refuses them there.
        Err(refused) => {
            assert!(!is_taken && refused.to_string().contains("int"), "experts: {refused}");
        }
        Ok(experts) => {
            let run = |d: usize| {
                let ids = backend.alloc(&[2, 1], DType::U32).expect("alloc");
                let x = Activation::dense(f(&[2, d]));
                backend.experts(&x, &ids, &f(&[2, 1]), &experts, &f(&[2, d]));
            };
            if is_taken {
                refuses("experts: gate has shape", || run(16));
            } else {
                refuses("experts: gate is ", || run(24));
            }
        }
    }
}
