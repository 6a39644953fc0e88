//! The one test suite that every backend runs, the oracle included: each operation against plain F64 loops, on
//! seeded random inputs of ragged sizes, in views of poisoned memory.
//!
//! A backend lists the suite as its own tests, with an expression that gives a reference to it, and one that gives a
//! reference to the oracle, with which a whole decoder layer is compared:
//!
//! ```text
//! r1_backend::conformance_tests!(&MyBackend::new(), oracle: &Reference::new());
//! ```
//!
//! Panics where a backend is wrong, with the operation, the sizes and the seed. Knows no backend.

mod attention;
mod attention_properties;
mod composites;
mod decoder_layer;
mod dense;
mod gqa;
mod grouped;
mod matrix;
mod memory;
mod mla_composites;
mod moe;
mod naive;
mod padding;
mod paged;
mod random;
mod rounding;
mod sampling;
mod sampling_oracle;
mod shapes;
mod slab;

pub use attention::{gather_latent, mla_attention, mla_attention_expanded, mla_attention_range, rope_cache};
pub use attention_properties::{absorbed_equals_expanded, batch_equals_alone, chunked_equals_whole};
pub use composites::{add_rms_norm, capture, linear_add_norm, mla_qkv, mlp_composite, moe_layer};
pub use decoder_layer::decoder_layer;
pub use dense::{add, embed, feed_tokens, gather_rows, quantize, rms_norm, rms_norm_range, silu_mul};
pub use gqa::{gqa_attention, gqa_batch_equals_alone, rope_cache_gqa};
pub use grouped::{experts_int4, experts_int8, linear_int4, linear_int8, per_head_int8};
pub use matrix::{linear, linear_fp8_activations, per_head};
pub use memory::{alloc_is_zeroed, alloc_refuses, import, read_back, traffic_honours_views, upload_rounds};
pub use mla_composites::{mla_absorb, mla_attend};
pub use moe::{experts, route, route_not_finite, route_ties};
pub use padding::padding;
pub use sampling::{
    logprobs, sample, sample_distribution, sample_edges, sample_ignores_batch, sample_penalties,
    sample_single,
};
pub use shapes::shape_panics;

use crate::Backend;

/// Waits for what was enqueued; nothing of it may have failed.
#[track_caller]
fn settle<B: Backend>(backend: &B, op: &str) {
    if let Err(error) = backend.flush().wait() {
        panic!("{op} failed: {error}");
    }
}

/// One `#[test]` per check of the [suite](crate::conformance), on the backend that `$backend` gives a reference to. The
/// oracle itself has no `oracle`.
#[macro_export]
macro_rules! conformance_tests {
    ($backend:expr, oracle: $oracle:expr) => {
        $crate::conformance_tests!($backend);

        #[test]
        fn decoder_layer() {
            $crate::conformance::decoder_layer($backend, $oracle);
        }
    };
    ($backend:expr) => {
        $crate::conformance_tests! { @each $backend;
            alloc_is_zeroed alloc_refuses import upload_rounds traffic_honours_views read_back
            feed_tokens embed rms_norm rms_norm_range quantize silu_mul add gather_rows
            linear linear_fp8_activations linear_int8 linear_int4 per_head per_head_int8
            rope_cache mla_attention mla_attention_range gather_latent mla_attention_expanded
            absorbed_equals_expanded batch_equals_alone chunked_equals_whole padding
            rope_cache_gqa gqa_attention gqa_batch_equals_alone
            route route_ties route_not_finite experts experts_int8 experts_int4
            sample sample_single sample_penalties sample_edges sample_ignores_batch sample_distribution logprobs
            add_rms_norm linear_add_norm mla_qkv mla_absorb mla_attend mlp_composite moe_layer capture
            shape_panics
        }
    };
    (@each $backend:expr; $($check:ident)*) => {
        $(
            #[test]
            fn $check() {
                $crate::conformance::$check($backend);
            }
        )*
    };
}
