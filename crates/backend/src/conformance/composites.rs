//! Checks that a backend's composites give what their default bodies give, and that a captured step repeats itself.

use std::collections::HashSet;
use std::sync::Mutex;

use r1_core::DType;

use super::dense::fp8_forms;
use super::moe::mlp;
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close};
use super::settle;
use super::slab::{ActivationSlab, Format, LAYOUTS, Layout, Slab, imported, weight};
use crate::{
    Activation, Backend, CommError, Communicator, GroupScore, Groups, HostSlice, HostSliceMut, MlpScratch,
    MoeScratch, MoeWeights, QkvScratch, QkvWeights, QueryProjection, Routing, ScoreFunction, Tensor,
    composite,
};

const EPS: f32 = 1e-6;

/// Formats of weight that models mix with activations of `dtype`: those in groups where the backend takes them everywhere.
fn formats<B: Backend>(backend: &B, dtype: DType) -> Vec<Format> {
    let taken = backend.capabilities().expert_formats;
    let mut formats = vec![Format::Dense(dtype), Format::Fp8([100, 70])];
    let grouped = [Format::Int8 { group: 32, offset: 20 }, Format::Int4 { group: 32 }];
    formats.extend(grouped.into_iter().filter(|format| taken.contains(&format.kind())));
    formats
}

/// Between a fused body and the default one; FP8 activations may fall on neighbouring codes.
fn tolerance(dtype: DType, fp8: Option<bool>) -> Tolerance {
    if fp8.is_some() { Tolerance::fp8_between() } else { Tolerance::rounded_between(dtype) }
}

/// Runs `check` for all activation types, formats, FP8 forms and a few numbers of rows.
fn cases<B: Backend>(
    backend: &B,
    check_name: &'static str,
    mut check: impl FnMut(&mut Random, DType, Format, Option<bool>, usize),
) {
    seeded(check_name, |random| {
        for dtype in backend.capabilities().activation_dtypes {
            for format in formats(backend, dtype) {
                for fp8 in fp8_forms(backend) {
                    for rows in [1, 5, 40] {
                        check(random, dtype, format, fp8, rows);
                    }
                }
            }
        }
    });
}

/// A quantised input.
fn input<B: Backend>(
    backend: &B,
    random: &mut Random,
    shape: &[usize; 2],
    dtype: DType,
    fp8: Option<bool>,
) -> ActivationSlab<B> {
    let dense = Slab::normal(backend, random, shape, dtype, Layout::Dense, 1.0);
    let x = ActivationSlab::new(backend, dense, fp8, Layout::Dense);
    backend.quantize(&x.activation);
    x
}

/// Both forms of an output, poisoned.
fn output<B: Backend>(backend: &B, shape: &[usize; 2], dtype: DType, fp8: Option<bool>) -> ActivationSlab<B> {
    let dense = Slab::poison(backend, shape, dtype, Layout::Dense);
    ActivationSlab::new(backend, dense, fp8, Layout::Dense)
}

/// A group of ranks that hold the same, so that a sum over two is twice this rank's value.
struct Twins {
    ranks: usize,
    reduced: Mutex<HashSet<usize>>,
}

impl<B: Backend> Communicator<B> for Twins {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        self.ranks
    }
    fn all_reduce(&self, backend: &B, x: &Tensor<B>) {
        let mut values = vec![0.0; x.num_elements()];
        backend.download(x, HostSliceMut::F32(&mut values)).expect("download");
        for value in &mut values {
            *value *= self.ranks as f32;
        }
        backend.upload(HostSlice::F32(&values), x);
        self.reduced.lock().expect("no panic holds this lock").insert(values.len());
    }
    fn all_gather(&self, _: &B, _: &Tensor<B>, _: &Tensor<B>) {
        unreachable!("all_reduce_add_norm gathers nothing")
    }
    fn all_gather_last(&self, _: &B, _: &Tensor<B>, _: &Tensor<B>) {
        unreachable!("all_reduce_add_norm gathers nothing")
    }
    fn reduce_scatter(&self, _: &B, _: &Tensor<B>, _: &Tensor<B>) {
        unreachable!("all_reduce_add_norm keeps the whole sum")
    }
    fn all_to_all(&self, _: &B, _: &Tensor<B>, _: &Tensor<B>) {
        unreachable!("all_reduce_add_norm exchanges nothing")
    }
    fn broadcast(&self, _: &B, _: &Tensor<B>, _: usize) {
        unreachable!("all_reduce_add_norm has no root")
    }
    fn send(&self, _: &B, _: &Tensor<B>, _: usize) {
        unreachable!("all_reduce_add_norm sends nothing to one rank")
    }
    fn recv(&self, _: &B, _: &Tensor<B>, _: usize) {
        unreachable!("all_reduce_add_norm receives nothing from one rank")
    }
    fn check(&self) -> Result<(), CommError> {
        Ok(())
    }
}

/// [`Backend::add_rms_norm`] and [`Backend::all_reduce_add_norm`].
pub fn add_rms_norm<B: Backend>(backend: &B) {
    seeded("add_rms_norm", |random| {
        for dtype in backend.capabilities().activation_dtypes {
            for fp8 in fp8_forms(backend) {
                for (rows, layout) in [1, 5, 40].into_iter().zip(LAYOUTS.into_iter().cycle()) {
                    for reduced in [false, true] {
                        check_add_rms_norm(backend, random, dtype, fp8, [rows, 136], layout, reduced);
                    }
                }
            }
        }
    });
}

fn check_add_rms_norm<B: Backend>(
    backend: &B,
    random: &mut Random,
    dtype: DType,
    fp8: Option<bool>,
    shape: [usize; 2],
    layout: Layout,
    reduced: bool,
) {
    let (weight, _) = imported(backend, random, &shape[1..], dtype, 1.0);
    let residual = random.normals(shape[0] * shape[1], 1.0);
    let x = random.normals(shape[0] * shape[1], 1.0);
    let run = |default: bool| {
        let residual = Slab::floats(backend, &shape, dtype, layout, &residual);
        let x = Slab::floats(backend, &shape, dtype, layout, &x);
        let out = output(backend, &shape, dtype, fp8);
        let twins = Twins { ranks: 2, reduced: Mutex::default() };
        let (r, x, o) = (&residual.view, &x.view, &out.activation);
        match (reduced, default) {
            (false, true) => composite::add_rms_norm(backend, r, x, &weight, EPS, o),
            (false, false) => backend.add_rms_norm(r, x, &weight, EPS, o),
            (true, true) => composite::all_reduce_add_norm(backend, &twins, r, x, &weight, EPS, o),
            (true, false) => backend.all_reduce_add_norm(&twins, r, x, &weight, EPS, o),
        }
        settle(backend, "add_rms_norm");
        let sums = twins.reduced.into_inner().expect("no panic holds this lock");
        assert_eq!(sums.is_empty(), !reduced, "all_reduce_add_norm: sums over the ranks");
        (residual.read(backend), out.dense.read(backend), out.dequantized(backend).unwrap_or_default())
    };
    let (own, default) = (run(false), run(true));
    assert_close("add_rms_norm: residual", &own.0, &default.0, Tolerance::rounded_once(dtype));
    assert_close("add_rms_norm: out", &own.1, &default.1, Tolerance::rounded_between(dtype));
    assert_close("add_rms_norm: FP8 out", &own.2, &default.2, Tolerance::fp8_between());
}

/// [`Backend::linear_add_norm`], of one rank and of two.
pub fn linear_add_norm<B: Backend>(backend: &B) {
    cases(backend, "linear_add_norm", |random, dtype, format, fp8, rows| {
        let (from, dim) = (format.width(70), 136);
        let x = input(backend, random, &[rows, from], dtype, fp8);
        let (w, _) = weight(backend, random, [dim, from], format);
        let (norm, _) = imported(backend, random, &[dim], dtype, 1.0);
        let residual = random.normals(rows * dim, 1.0);
        let run = |ranks: usize, default: bool| {
            let residual = Slab::floats(backend, &[rows, dim], dtype, Layout::Dense, &residual);
            let block_out = Slab::poison(backend, &[rows, dim], dtype, Layout::Dense);
            let out = output(backend, &[rows, dim], dtype, fp8);
            let twins = Twins { ranks, reduced: Mutex::default() };
            let (x, b, r, o) = (&x.activation, &block_out.view, &residual.view, &out.activation);
            if default {
                composite::linear_add_norm(backend, &twins, x, &w, b, r, &norm, EPS, o);
            } else {
                backend.linear_add_norm(&twins, x, &w, b, r, &norm, EPS, o);
            }
            settle(backend, "linear_add_norm");
            let sums = twins.reduced.into_inner().expect("no panic holds this lock");
            assert!(ranks == 1 || !sums.is_empty(), "linear_add_norm: sums over the ranks");
            (residual.read(backend), out.dense.read(backend), out.dequantized(backend).unwrap_or_default())
        };
        for ranks in [1, 2] {
            let (own, default) = (run(ranks, false), run(ranks, true));
            assert_close("linear_add_norm: residual", &own.0, &default.0, tolerance(dtype, fp8));
            assert_close("linear_add_norm: out", &own.1, &default.1, tolerance(dtype, fp8));
            assert_close("linear_add_norm: FP8 out", &own.2, &default.2, Tolerance::fp8_between());
        }
    });
}

/// [`Backend::mla_qkv`], with one query matrix and with two.
pub fn mla_qkv<B: Backend>(backend: &B) {
    cases(backend, "mla_qkv", |random, dtype, format, fp8, rows| {
        let (dim, low_rank, q_width, kv_width) = (136, 40, 66, 42);
        let x = input(backend, random, &[rows, dim], dtype, fp8);
        let (kv_a, _) = weight(backend, random, [kv_width, dim], format);
        let (direct, _) = weight(backend, random, [q_width, dim], format);
        let (a, _) = weight(backend, random, [low_rank, dim], format);
        let (norm, _) = imported(backend, random, &[low_rank], dtype, 1.0);
        let (b, _) = weight(backend, random, [q_width, low_rank], format);
        for q in [QueryProjection::Direct(direct), QueryProjection::LowRank { a, norm, b }] {
            let w = QkvWeights { q, kv_a: kv_a.clone(), eps: EPS };
            let run = |default: bool| {
                let q_a = Slab::poison(backend, &[rows, low_rank], dtype, Layout::Dense);
                let normed = output(backend, &[rows, low_rank], dtype, fp8);
                let scratch = QkvScratch { q_a: q_a.view.clone(), q_a_normed: normed.activation };
                let q = Slab::poison(backend, &[rows, q_width], dtype, Layout::Dense);
                let kv_a = Slab::poison(backend, &[rows, kv_width], dtype, Layout::Dense);
                if default {
                    composite::mla_qkv(backend, &x.activation, &w, &scratch, &q.view, &kv_a.view);
                } else {
                    backend.mla_qkv(&x.activation, &w, &scratch, &q.view, &kv_a.view);
                }
                settle(backend, "mla_qkv");
                (q.read(backend), kv_a.read(backend))
            };
            let (own, default) = (run(false), run(true));
            assert_close("mla_qkv: q", &own.0, &default.0, tolerance(dtype, fp8));
            assert_close("mla_qkv: kv_a", &own.1, &default.1, Tolerance::rounded_once(dtype));
        }
    });
}

/// Space for an MLP of `width`.
fn mlp_scratch<B: Backend>(
    backend: &B,
    [rows, width]: [usize; 2],
    dtype: DType,
    fp8: Option<bool>,
) -> MlpScratch<B> {
    MlpScratch {
        gate_up: Slab::poison(backend, &[rows, 2 * width], dtype, Layout::Dense).view,
        hidden: output(backend, &[rows, width], dtype, fp8).activation,
    }
}

/// [`Backend::mlp`].
pub fn mlp_composite<B: Backend>(backend: &B) {
    cases(backend, "mlp_composite", |random, dtype, format, fp8, rows| {
        let (dim, width) = (136, format.width(70));
        let x = input(backend, random, &[rows, dim], dtype, fp8);
        let (w, _) = mlp(backend, random, [dim, width], format);
        let run = |default: bool| {
            let scratch = mlp_scratch(backend, [rows, width], dtype, fp8);
            let out = Slab::poison(backend, &[rows, dim], dtype, Layout::Dense);
            if default {
                composite::mlp(backend, &x.activation, &w, &scratch, &out.view);
            } else {
                backend.mlp(&x.activation, &w, &scratch, &out.view);
            }
            settle(backend, "mlp");
            out.read(backend)
        };
        assert_close("mlp", &run(false), &run(true), tolerance(dtype, fp8));
    });
}

/// [`Backend::moe_layer`].
pub fn moe_layer<B: Backend>(backend: &B) {
    cases(backend, "moe_layer", |random, dtype, format, fp8, rows| {
        let (dim, width, total, top_k) = (136, format.width(70), 8, 3);
        let x = input(backend, random, &[rows, dim], dtype, fp8);
        let (router, _) = weight(backend, random, [total, dim], Format::Dense(dtype));
        let bias = random.normals(total, 0.2);
        let bias = Slab::floats(backend, &[total], DType::F32, Layout::Dense, &bias);
        let local = (0..5).map(|_| mlp(backend, random, [dim, width], format).0).collect();
        let w = MoeWeights {
            router,
            bias: Some(bias.view.clone()),
            routing: Routing {
                score: ScoreFunction::Sigmoid,
                groups: Some(Groups { n_group: 4, topk_group: 2, score: GroupScore::TopTwoSum }),
                top_k,
                norm_topk_prob: true,
                routed_scaling_factor: 2.5,
            },
            experts: crate::Experts::new(backend, local, 1, total).expect("table"),
            shared: mlp(backend, random, [dim, width], format).0,
        };
        let run = |default: bool| {
            let scratch = MoeScratch {
                logits: Slab::poison(backend, &[rows, total], DType::F32, Layout::Dense).view,
                ids: Slab::poison(backend, &[rows, top_k], DType::U32, Layout::Dense).view,
                weights: Slab::poison(backend, &[rows, top_k], DType::F32, Layout::Dense).view,
                shared: mlp_scratch(backend, [rows, width], dtype, fp8),
            };
            let out = Slab::poison(backend, &[rows, dim], dtype, Layout::Dense);
            if default {
                composite::moe_layer(backend, &x.activation, &w, &scratch, &out.view);
            } else {
                backend.moe_layer(&x.activation, &w, &scratch, &out.view);
            }
            settle(backend, "moe_layer");
            out.read(backend)
        };
        assert_close("moe_layer", &run(false), &run(true), tolerance(dtype, fp8));
    });
}

/// [`Backend::capture`]: a captured step does on other values what it does when run, or the backend says that it
/// captures nothing and has not called the step.
pub fn capture<B: Backend>(backend: &B) {
    let dtype = backend.capabilities().activation_dtypes[0];
    let shape = [3, 8];
    let residual = Slab::floats(backend, &shape, dtype, Layout::Dense, &[0.0; 24]);
    let x = Slab::floats(backend, &shape, dtype, Layout::Dense, &[1.0; 24]);
    let out = Slab::poison(backend, &shape, dtype, Layout::Dense);
    let weight = Slab::floats(backend, &[8], DType::F32, Layout::Dense, &[1.0; 8]);
    let activation = Activation::dense(out.view.clone());
    let mut calls = 0;
    let graph = backend
        .capture(&mut || {
            calls += 1;
            backend.add_rms_norm(&residual.view, &x.view, &weight.view, EPS, &activation);
        })
        .expect("capture");
    assert_eq!(graph.is_some(), backend.capabilities().captures, "capture: what the capabilities say");
    let Some(graph) = graph else {
        assert_eq!(calls, 0, "capture: gave no graph but ran the step");
        residual.assert_unchanged(backend);
        return;
    };
    assert_eq!(calls, 1, "capture: records the step once");
    residual.assert_unchanged(backend);
    for round in 1..=3 {
        backend.upload(HostSlice::F32(&[2.0; 24]), &x.view);
        backend.replay(&graph);
        settle(backend, "replay");
        assert_eq!(residual.read(backend), [2.0 * f64::from(round); 24], "replay {round}");
        assert_close("replay", &out.read(backend), &[1.0; 24], Tolerance::rounded_once(dtype));
    }
}
