//! One file per family of operations: geometry and arguments of its kernels.

pub(crate) mod absorb;
pub(crate) mod attend;
pub(crate) mod attention;
pub(crate) mod expanded;
pub(crate) mod experts;
pub(crate) mod fused;
pub(crate) mod gqa;
pub(crate) mod linear;
pub(crate) mod linear_norm;
pub(crate) mod logprobs;
pub(crate) mod norm;
pub(crate) mod per_head;
pub(crate) mod rope;
pub(crate) mod route;
pub(crate) mod rows;
pub(crate) mod sample;
pub(crate) mod widen;
