//! Checks of the router and the routed experts.

use r1_core::DType;

use super::grouped::meets_int8;
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close, round_to};
use super::slab::{ActivationSlab, FORMATS, Format, LAYOUTS, Layout, Slab, weight};
use super::{naive, settle};
use crate::{Backend, Experts, GroupScore, Groups, MlpWeights, Routing, ScoreFunction, Weight};

/// The published models' ways to route, at sizes of their own.
fn routings() -> Vec<(usize, Routing)> {
    use GroupScore::{Max, TopTwoSum};
    use ScoreFunction::{Sigmoid, Softmax};

    let groups = |n_group, topk_group, score| Some(Groups { n_group, topk_group, score });
    let routing = |score, groups, top_k, norm_topk_prob, routed_scaling_factor| Routing {
        score,
        groups,
        top_k,
        norm_topk_prob,
        routed_scaling_factor,
    };
    vec![
        (7, routing(Softmax, None, 3, false, 1.0)),
        (64, routing(Softmax, None, 6, false, 1.0)),
        (160, routing(Softmax, groups(8, 3, Max), 6, false, 16.0)),
        (256, routing(Sigmoid, groups(8, 4, TopTwoSum), 8, true, 2.5)),
        (384, routing(Sigmoid, groups(1, 1, TopTwoSum), 8, true, 2.827)),
        (6, routing(Sigmoid, groups(6, 2, TopTwoSum), 2, true, 1.0)),
        (12, routing(Softmax, groups(3, 2, TopTwoSum), 8, true, 1.0)),
    ]
}

struct Routed {
    ids: Vec<u32>,
    weights: Vec<f64>,
}

fn run_route<B: Backend>(
    backend: &B,
    random: &mut Random,
    logits: &[f64],
    bias: Option<&[f64]>,
    experts: usize,
    routing: &Routing,
) -> Routed {
    let tokens = logits.len() / experts;
    let logits = Slab::floats(backend, &[tokens, experts], DType::F32, LAYOUTS[random.below(2)], logits);
    let bias = bias.map(|bias| Slab::floats(backend, &[experts], DType::F32, Layout::Dense, bias));
    let ids = Slab::poison(backend, &[tokens, routing.top_k], DType::U32, Layout::Dense);
    let weights = Slab::poison(backend, &[tokens, routing.top_k], DType::F32, LAYOUTS[random.below(2)]);
    backend.route(&logits.view, bias.as_ref().map(|bias| &bias.view), routing, &ids.view, &weights.view);
    settle(backend, "route");
    logits.assert_unchanged(backend);
    Routed { ids: ids.read_ids(backend), weights: weights.read(backend) }
}

fn check_route<B: Backend>(
    backend: &B,
    random: &mut Random,
    logits: &[f64],
    bias: Option<&[f64]>,
    experts: usize,
    routing: &Routing,
) {
    let routed = run_route(backend, random, logits, bias, experts, routing);
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for logits in logits.chunks(experts) {
        let (row_ids, row_weights) = naive::route(logits, bias, routing);
        ids.extend(row_ids);
        weights.extend(row_weights);
    }
    assert_eq!(routed.ids, ids, "route: ids of {experts} experts with {routing:?}");
    assert_close("route: weights", &routed.weights, &weights, Tolerance { relative: 1e-5, of_rms: 1e-7 });
}

/// F32 values, as logits and biases are.
fn f32_normals(random: &mut Random, count: usize, scale: f64) -> Vec<f64> {
    random.normals(count, scale).into_iter().map(|v| f64::from(v as f32)).collect()
}

/// [`Backend::route`] of random logits: every score, grouping and normalisation, with a bias and without.
pub fn route<B: Backend>(backend: &B) {
    seeded("route", |random| {
        for (experts, routing) in routings() {
            for tokens in [1, 3, 17, 64] {
                let logits = f32_normals(random, tokens * experts, 1.5);
                let bias = f32_normals(random, experts, 0.3);
                check_route(backend, random, &logits, None, experts, &routing);
                check_route(backend, random, &logits, Some(&bias), experts, &routing);
            }
        }
    });
}

/// [`Backend::route`] where equal scores must take the lower expert and the lower group, where all biased scores are
/// negative (so that losing groups must be masked with -inf, not 0), and where scores saturate.
pub fn route_ties<B: Backend>(backend: &B) {
    seeded("route_ties", |random| {
        for (experts, routing) in routings() {
            let tokens = 17;
            let equal = vec![0.5; tokens * experts];
            check_route(backend, random, &equal, None, experts, &routing);

            let few_values: Vec<f64> = (0..tokens * experts).map(|_| random.below(4) as f64 - 2.0).collect();
            check_route(backend, random, &few_values, None, experts, &routing);
            let bias = vec![0.125; experts];
            check_route(backend, random, &few_values, Some(&bias), experts, &routing);

            let logits = f32_normals(random, tokens * experts, 1.0);
            let negative: Vec<f64> =
                (0..experts).map(|_| f64::from(random.uniform(-4.0, -2.0) as f32)).collect();
            check_route(backend, random, &logits, Some(&negative), experts, &routing);

            if routing.score == ScoreFunction::Sigmoid {
                let saturated: Vec<f64> =
                    (0..tokens * experts).map(|_| 30.0 + random.below(20) as f64).collect();
                check_route(backend, random, &saturated, None, experts, &routing);
            }
        }
    });
}

/// [`Backend::route`] of NaN and infinite logits, which a broken model makes: the ids must be experts, different ones.
pub fn route_not_finite<B: Backend>(backend: &B) {
    seeded("route_not_finite", |random| {
        for (experts, routing) in routings() {
            let mut logits = f32_normals(random, 4 * experts, 1.0);
            logits[..experts].fill(f64::NAN);
            logits[experts + 1] = f64::NAN;
            logits[2 * experts] = f64::INFINITY;
            logits[3 * experts..].fill(f64::NEG_INFINITY);
            let routed = run_route(backend, random, &logits, None, experts, &routing);
            for ids in routed.ids.chunks(routing.top_k) {
                let distinct = ids.iter().enumerate().all(|(i, id)| !ids[..i].contains(id));
                assert!(
                    distinct && ids.iter().all(|&id| (id as usize) < experts),
                    "route: ids {ids:?} of {experts} experts for logits that are not finite, {routing:?}"
                );
            }
        }
    });
}

/// One gated MLP and its values.
pub(super) fn mlp<B: Backend>(
    backend: &B,
    random: &mut Random,
    [dim, width]: [usize; 2],
    format: Format,
) -> (MlpWeights<B>, naive::Mlp) {
    let (gate, gate_values) = weight(backend, random, [width, dim], format);
    let (up, up_values) = weight(backend, random, [width, dim], format);
    let (down, down_values) = weight(backend, random, [dim, width], format);
    let values = naive::Mlp { gate: gate_values, up: up_values, down: down_values };
    (MlpWeights { gate, up, down }, values)
}

/// [`Backend::experts`] of one rank: it holds some of the experts, some tokens have none of them, one expert has
/// most tokens, and `out` already holds something. With FP8 activations where the backend has them.
pub fn experts<B: Backend>(backend: &B) {
    seeded("experts", |random| {
        for dtype in backend.capabilities().activation_dtypes {
            for format in FORMATS {
                for (tokens, sizes) in [(1, [33, 5]), (3, [136, 70]), (40, [48, 130])] {
                    for fp8 in super::dense::fp8_forms(backend) {
                        check_experts(backend, random, dtype, format, tokens, sizes, fp8);
                    }
                }
            }
        }
    });
}

pub(super) fn check_experts<B: Backend>(
    backend: &B,
    random: &mut Random,
    dtype: DType,
    format: Format,
    tokens: usize,
    sizes: [usize; 2],
    fp8: Option<bool>,
) {
    const FIRST: usize = 2;
    const LOCAL: usize = 4;
    const TOTAL: usize = 9;
    const TOP_K: usize = 3;
    let dim = sizes[0];
    let (local, values): (Vec<_>, Vec<_>) = (0..LOCAL).map(|_| mlp(backend, random, sizes, format)).unzip();
    let experts = Experts::new(backend, local, FIRST, TOTAL).expect("table");

    let ids: Vec<u32> = (0..tokens)
        .flat_map(|token| {
            let mut picks = random.permutation(TOTAL);
            if token % 4 == 0 {
                picks.retain(|&expert| expert != FIRST + 1);
                picks.insert(0, FIRST + 1);
            } else if token % 4 == 1 {
                picks.retain(|expert| !(FIRST..FIRST + LOCAL).contains(expert));
            }
            picks.into_iter().take(TOP_K).map(|expert| expert as u32)
        })
        .collect();
    let weights: Vec<f64> = (0..ids.len()).map(|_| f64::from(random.uniform(0.1, 1.0) as f32)).collect();

    let layout = LAYOUTS[random.below(2)];
    let dense = Slab::normal(backend, random, &[tokens, dim], dtype, layout, 1.0);
    let x = ActivationSlab::new(backend, dense, fp8, layout);
    backend.quantize(&x.activation);
    let ids_slab = Slab::ids(backend, &[tokens, TOP_K], &ids);
    let weights_slab = Slab::floats(backend, &[tokens, TOP_K], DType::F32, Layout::Dense, &weights);
    let out = Slab::normal(backend, random, &[tokens, dim], dtype, layout, 0.5);
    backend.experts(&x.activation, &ids_slab.view, &weights_slab.view, &experts, &out.view);
    settle(backend, "experts");

    let quantised = fp8.filter(|_| matches!(experts.local[0].gate, Weight::Fp8Block { .. }));
    let MlpWeights { gate, down, .. } = &experts.local[0];
    let int8 = [gate, down].map(|w| meets_int8(backend, w));
    let met = match quantised.and_then(|_| x.dequantized(backend)) {
        Some(met) => met,
        None if int8[0] => naive::int8_round_trip(&x.dense.host, dim),
        None => x.dense.host.clone(),
    };
    let mut want = out.host.clone();
    for (pick, (&id, &weight)) in ids.iter().zip(&weights).enumerate() {
        let token = pick / TOP_K;
        let Some(expert) = (id as usize).checked_sub(FIRST).and_then(|local| values.get(local)) else {
            continue;
        };
        let mut hidden = expert.hidden(&met[token * dim..][..dim]);
        if let Some(power_of_two) = quantised {
            hidden = naive::fp8_round_trip(&hidden, power_of_two);
        }
        if int8[1] {
            let rounded: Vec<_> = hidden.iter().map(|&value| round_to(dtype, value)).collect();
            hidden = naive::int8_round_trip(&rounded, hidden.len());
        }
        let y = naive::linear(&hidden, &expert.down, hidden.len());
        want[token * dim..][..dim].iter_mut().zip(y).for_each(|(want, y)| *want += weight * y);
    }
    let tolerance = if quantised.is_some() {
        Tolerance::fp8_between()
    } else if int8[1] {
        // A hidden value may be rounded to the neighbouring code.
        Tolerance::rounded_between(DType::BF16)
    } else {
        Tolerance::rounded_between(dtype)
    };
    let what = format!("experts {dtype} {format:?} T={tokens} {sizes:?} fp8 {fp8:?}");
    assert_close(&what, &out.read(backend), &want, tolerance);
    x.dense.assert_unchanged(backend);
    ids_slab.assert_unchanged(backend);
    weights_slab.assert_unchanged(backend);
}
