//! One matrix per head. Kernels: `kernels/per_head.cu`, `kernels/gemm.cu`.

use r1_backend::{HeadForm, HeadWeight, Tensor, shape};

use super::linear::{Operand, gemm};
use crate::Gpu;

pub(crate) fn per_head(gpu: &Gpu, x: &Tensor<Gpu>, w: &HeadWeight<Gpu>, out: &Tensor<Gpu>) {
    shape::per_head(x, w, out);
    gemm(gpu, &operand(x, w), &[(&w.weight, out.clone())]);
}

/// What the matrices of `w` meet.
pub(super) fn operand<'a>(x: &Tensor<Gpu>, w: &HeadWeight<Gpu>) -> Operand<'a> {
    Operand {
        x: x.clone(),
        scales: None,
        rows_per_head: w.rows_per_head,
        first_row: w.rows.start,
        transposed: w.form == HeadForm::RowsIn,
    }
}
