//! One matrix per head. Kernels: `kernels/per_head.cu`, `kernels/gemm.cu`.

use r1_backend::{HeadForm, HeadWeight, Tensor, Weight, shape};

use super::linear::{Operand, gemm};
use crate::Gpu;

pub(crate) fn per_head(gpu: &Gpu, x: &Tensor<Gpu>, w: &HeadWeight<Gpu>, out: &Tensor<Gpu>) {
    shape::per_head(x, w, out);
    gemm(gpu, &operand(x, w), &[(&w.weight, out.clone())]);
}

/// What the matrices of `w` meet.
///
/// # Panics
/// When the weight is int8: the capabilities say that there are no such kernels.
pub(super) fn operand<'a>(x: &Tensor<Gpu>, w: &HeadWeight<Gpu>) -> Operand<'a> {
    assert!(
        !matches!(w.weight, Weight::Int8Group { .. }),
        "per_head: w is {:?}, which a GPU does not take",
        w.weight.format()
    );
    Operand {
        x: x.clone(),
        scales: None,
        rows_per_head: w.rows_per_head,
        first_row: w.rows.start,
        transposed: w.form == HeadForm::RowsIn,
    }
}
