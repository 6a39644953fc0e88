//! The choice of experts. Kernels: `kernels/route.cu`.

use r1_backend::{GroupScore, Routing, ScoreFunction, Tensor, shape};

use super::experts::SortArgs;
use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, Geometry, ptr, stride};

/// Experts that the kernels have room for.
pub(super) const MAX_EXPERTS: usize = 512;
/// `sizeof(moe::SortShared)`.
pub(super) const SORT_SHARED_BYTES: usize = 4 * (4 * MAX_EXPERTS + 2);
const SHARED_BYTES: usize = 4 * 4 * MAX_EXPERTS + SORT_SHARED_BYTES + 4;

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
    sort_counter: DevicePtr,
    sort: SortArgs,
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
    route_and_sort(gpu, logits, bias, routing, ids, weights, None);
}

/// As [`route`]; then the pairs are sorted in the same launch.
///
/// # Panics
/// With more than [`MAX_EXPERTS`] experts.
pub(super) fn route_and_sort(
    gpu: &Gpu,
    logits: &Tensor<Gpu>,
    bias: Option<&Tensor<Gpu>>,
    routing: &Routing,
    ids: &Tensor<Gpu>,
    weights: &Tensor<Gpu>,
    sort: Option<SortArgs>,
) {
    shape::route(logits, bias, routing, ids, weights);
    let num_experts = logits.dim(1);
    assert!(
        num_experts <= MAX_EXPERTS,
        "route: {num_experts} experts, the kernel chooses among {MAX_EXPERTS}"
    );
    // Where every group may be used there is nothing to mask.
    let groups = routing.groups.filter(|groups| groups.topk_group < groups.n_group);
    let args = RouteArgs {
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
        sort_counter: if sort.is_some() { gpu.counters() } else { DevicePtr::default() },
        sort: sort.unwrap_or_default(),
    };
    let geometry = Geometry { grid: [logits.dim(0), 1, 1], warps: 1, shared_bytes: SHARED_BYTES };
    gpu.launch("moe_route", geometry, &args);
}
