//! The choice of experts. Kernels: `kernels/route.cu`.

use r1_backend::{Activation, GroupScore, MoeScratch, MoeWeights, Routing, ScoreFunction, Tensor, shape};

use super::experts::SortArgs;
use super::linear::{FewRows, Form, GemmArgs, Kind, Operand, SHORT_ROWS};
use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, Geometry, ptr, stride};

/// Experts that the kernels have room for.
pub(super) const MAX_EXPERTS: usize = 512;
/// `sizeof(moe::SortShared)`.
pub(super) const SORT_SHARED_BYTES: usize = 4 * (4 * MAX_EXPERTS + 2);
/// `sizeof(route::Choice)`.
const CHOICE_BYTES: usize = 4 * 4 * MAX_EXPERTS;

#[derive(Clone, Copy)]
#[repr(C)]
struct RouteArgs {
    logits: DevicePtr,
    bias: DevicePtr,
    ids: DevicePtr,
    weights: DevicePtr,
    logits_stride: i64,
    ids_stride: i64,
    weights_stride: i64,
    num_tokens: u32,
    num_experts: u32,
    top_k: u32,
    n_group: u32,
    topk_group: u32,
    is_softmax: u32,
    is_top_two: u32,
    is_normed: u32,
    scaling_factor: f32,
}

// SAFETY: the twin of route::Args.
unsafe impl Args for RouteArgs {}

pub(crate) fn route(
    gpu: &Gpu,
    logits: &Tensor<Gpu>,
    bias: Option<&Tensor<Gpu>>,
    routing: &Routing,
    ids: &Tensor<Gpu>,
    weights: &Tensor<Gpu>,
) {
    let geometry = Geometry { grid: [logits.dim(0), 1, 1], warps: 1, shared_bytes: CHOICE_BYTES };
    gpu.launch("moe_route", geometry, &route_args(logits, bias, routing, ids, weights));
}

/// # Panics
/// With more than [`MAX_EXPERTS`] experts.
fn route_args(
    logits: &Tensor<Gpu>,
    bias: Option<&Tensor<Gpu>>,
    routing: &Routing,
    ids: &Tensor<Gpu>,
    weights: &Tensor<Gpu>,
) -> RouteArgs {
    shape::route(logits, bias, routing, ids, weights);
    let num_experts = logits.dim(1);
    assert!(
        num_experts <= MAX_EXPERTS,
        "route: {num_experts} experts, the kernel chooses among {MAX_EXPERTS}"
    );
    // Where every group may be used there is nothing to mask.
    let groups = routing.groups.filter(|groups| groups.topk_group < groups.n_group);
    RouteArgs {
        logits: ptr(logits),
        bias: bias.map_or(DevicePtr::default(), ptr),
        ids: ptr(ids),
        weights: ptr(weights),
        logits_stride: stride(logits, 0),
        ids_stride: stride(ids, 0),
        weights_stride: stride(weights, 0),
        num_tokens: logits.dim(0) as u32,
        num_experts: num_experts as u32,
        top_k: routing.top_k as u32,
        n_group: groups.map_or(0, |groups| groups.n_group as u32),
        topk_group: groups.map_or(0, |groups| groups.topk_group as u32),
        is_softmax: u32::from(routing.score == ScoreFunction::Softmax),
        is_top_two: u32::from(groups.is_some_and(|groups| groups.score == GroupScore::TopTwoSum)),
        is_normed: u32::from(routing.norm_topk_prob),
        scaling_factor: routing.routed_scaling_factor,
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RouterArgs {
    gemm: GemmArgs,
    route: RouteArgs,
    sort: SortArgs,
    counters: DevicePtr,
    finishers: u32,
}

// SAFETY: the twin of route::RouterArgs.
unsafe impl Args for RouterArgs {}

/// The router's matrix, [`route`] and the sort of the pairs in one launch; false, and nothing is done, where the matrix wants a kernel of its
/// own. `x` `[T, D]`.
pub(super) fn router(
    gpu: &Gpu,
    x: &Activation<Gpu>,
    w: &MoeWeights<Gpu>,
    scratch: &MoeScratch<Gpu>,
    sort: SortArgs,
) -> bool {
    const CHOOSERS: usize = 2;
    const FLAG_BYTES: usize = 16;
    let logits = &scratch.logits;
    shape::linear(x, &w.router, logits);
    let out = logits.split_last(&[1, logits.dim(1)]);
    // Few columns: every range of k needs a block of its own, however many rows there are.
    let Some(product) = FewRows::new(gpu, &Operand::of_linear(x, &w.router), &[(&w.router, out)], true)
    else {
        return false;
    };
    let kernel = match (product.kind, product.form) {
        (Kind::Bf16, Form::Short) => "moe_router_bf16",
        (_, Form::Numbers) => "moe_router_simt",
        _ => return false,
    };
    if product.grid[1] >= product.num_counters {
        return false;
    }
    let args = RouterArgs {
        route: route_args(logits, w.bias.as_ref(), &w.routing, &scratch.ids, &scratch.weights),
        sort,
        counters: product.counters,
        finishers: product.finishers(gpu, product.grid[0], SHORT_ROWS / CHOOSERS),
        gemm: product.args,
    };
    let (warps, own_bytes) = if product.form == Form::Numbers { (4, 4) } else { (2, 16) };
    let union_bytes = product.shared_bytes.max(CHOOSERS * CHOICE_BYTES).max(SORT_SHARED_BYTES);
    let shared_bytes = (union_bytes + FLAG_BYTES).next_multiple_of(own_bytes);
    gpu.launch(kernel, Geometry { grid: product.grid, warps, shared_bytes }, &args);
    true
}
