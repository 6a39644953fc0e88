//! Checks of linears over int4 weights. A backend whose capabilities lack the format must refuse it.

use r1_core::DType;

use super::dense::{ROWS, fp8_forms};
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close, round_to, to_bytes};
use super::shapes::refuses;
use super::slab::{ActivationSlab, LAYOUTS, Slab, host_tensor};
use super::{naive, settle};
use crate::{
    Activation, Backend, Experts, HeadForm, HeadWeight, Int4Group, MlpWeights, Weight, WeightFormat,
};

/// N, K and the group: one word, groups that end short, more groups than one tile holds, and AWQ's own.
const SIZES: [[usize; 3]; 7] =
    [[1, 8, 8], [5, 40, 16], [37, 72, 64], [131, 264, 128], [64, 128, 256], [150, 1032, 128], [9, 2304, 24]];

fn has_int4<B: Backend>(backend: &B) -> bool {
    backend.capabilities().weight_formats.contains(&WeightFormat::Int4Group)
}

/// A weight and its values, `[N, K]` with variance about 1 / K.
fn weight<B: Backend>(backend: &B, random: &mut Random, [n, k, group]: [usize; 3]) -> (Weight<B>, Vec<f64>) {
    let groups = k.div_ceil(group);
    let words: Vec<u32> = (0..n * k / 8).map(|_| random.next() as u32).collect();
    let zeros: Vec<f64> = (0..n * groups).map(|_| random.below(17) as f64).collect();
    let spread = 1.0 / (k as f64).sqrt() / 6.0;
    let scales: Vec<f64> =
        (0..n * groups).map(|_| round_to(DType::F16, spread * random.uniform(0.25, 2.0))).collect();
    let value = |i: usize| {
        let (row, col) = (i / k, i % k);
        let code = words[i / 8] >> (4 * (col % 8)) & 15;
        let group = row * groups + col / group;
        (f64::from(code) - zeros[group]) * scales[group]
    };
    let values = (0..n * k).map(value).collect();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let codes = host_tensor(&bytes, &[n, k / 8], DType::U32, random.below(2));
    let per_group = |values: &[f64]| {
        let host = host_tensor(&to_bytes(DType::F16, values), &[n, groups], DType::F16, 0);
        backend.import(&host).expect("import")
    };
    let weight = Int4Group {
        codes: backend.import_matrix(&codes).expect("import_matrix"),
        zeros: per_group(&zeros),
        scales: per_group(&scales),
        group,
    };
    (Weight::Int4Group(weight), values)
}

/// [`Backend::linear`] with int4 weights, which meet the dense form of an activation. A row is what it is alone, bit for bit
/// where the backend says that it ignores the batch.
pub fn linear_int4<B: Backend>(backend: &B) {
    if !has_int4(backend) {
        return;
    }
    let capabilities = backend.capabilities();
    seeded("linear_int4", |random| {
        for &input in &capabilities.activation_dtypes {
            for output in [DType::F32, input] {
                for fp8 in fp8_forms(backend) {
                    for (rows, size) in ROWS.into_iter().cycle().zip(SIZES) {
                        check(backend, random, rows, size, [input, output], fp8);
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
    size: [usize; 3],
    [input, output]: [DType; 2],
    fp8: Option<bool>,
) {
    let [n, k, _] = size;
    let layout = LAYOUTS[random.below(2)];
    let dense = Slab::normal(backend, random, &[rows, k], input, layout, 1.0);
    let x = ActivationSlab::new(backend, dense, fp8, layout);
    let (w, values) = weight(backend, random, size);
    assert_eq!((w.out_features(), w.in_features()), (n, k));
    let out = Slab::poison(backend, &[rows, n], output, layout);
    backend.linear(&x.activation, &w, &out.view);
    settle(backend, "linear");
    let want = naive::linear(&x.dense.host, &values, k);
    let what = format!("linear [{rows}, {k}] {input} (FP8 form: {fp8:?}) × int4 {size:?} → {output}");
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

/// Wrong shapes are refused, and int4 weights where nothing takes them.
pub(super) fn shape_panics<B: Backend>(backend: &B, random: &mut Random) {
    let f = |shape: &[usize]| backend.alloc(shape, DType::F32).expect("alloc");
    let (w, _) = weight(backend, random, [4, 24, 16]);
    let x = Activation::dense(f(&[2, 24]));
    let Weight::Int4Group(parts) = &w else { unreachable!("weight() makes int4 weights") };
    if has_int4(backend) {
        let with = |zeros: [usize; 2], group| {
            let zeros = backend.alloc(&zeros, DType::F16).expect("alloc");
            Weight::Int4Group(Int4Group { zeros, group, ..parts.clone() })
        };
        refuses("linear: w has shape", || {
            backend.linear(&Activation::dense(f(&[2, 16])), &w, &f(&[2, 4]));
        });
        refuses("linear: w.zeros", || backend.linear(&x, &with([4, 3], 16), &f(&[2, 4])));
        refuses("linear: w.group", || backend.linear(&x, &with([4, 2], 12), &f(&[2, 4])));
    } else {
        refuses("linear: w", || backend.linear(&x, &w, &f(&[2, 4])));
    }
    refuses("per_head: w is an int4 weight", || {
        let head = HeadWeight { weight: w.clone(), rows_per_head: 2, rows: 0..2, form: HeadForm::RowsIn };
        backend.per_head(&f(&[3, 2, 2]), &head, &f(&[3, 2, 24]));
    });
    let local = vec![MlpWeights { gate: w.clone(), up: w.clone(), down: w.clone() }];
    match Experts::new(backend, local, 0, 2) {
        // A backend that looks at experts when they are put together refuses them there.
        Err(refused) => assert!(refused.to_string().contains("int4"), "experts: {refused}"),
        Ok(experts) => refuses("experts: gate is an int4 weight", || {
            let ids = backend.alloc(&[2, 1], DType::U32).expect("alloc");
            backend.experts(&x, &ids, &f(&[2, 1]), &experts, &f(&[2, 24]));
        }),
    }
}
