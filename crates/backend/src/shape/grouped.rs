//! Shapes of weights in groups along K.

use r1_core::DType;

use super::Check;
use crate::{Backend, Int4Group, Tensor, Weight};

impl Check {
    /// A weight of any format.
    #[track_caller]
    pub(super) fn any_weight<B: Backend>(
        self,
        arg: &str,
        w: &Weight<B>,
        letters: &[&'static str; 2],
    ) -> Self {
        match w {
            Weight::Dense { .. } | Weight::Fp8Block { .. } | Weight::Int8Group { .. } => {
                self.weight(arg, w, letters)
            }
            Weight::Int4Group(w) => self.int4(arg, w, letters),
        }
    }

    #[track_caller]
    pub(super) fn int8<B: Backend>(
        self,
        arg: &str,
        [data, scales]: [&Tensor<B>; 2],
        [group, offset]: [usize; 2],
        letters: &[&'static str; 2],
    ) -> Self {
        let op = self.op;
        assert!(offset < group, "{op}: {arg} has offset {offset} in groups of {group}");
        let check = self.arg(arg, data, letters, &[DType::I8]);
        let want = [data.dim(0), (data.dim(1) + offset).div_ceil(group)];
        assert!(
            scales.shape() == want && scales.dtype() == DType::F32,
            "{op}: {arg}.scales has shape {:?} {}, expected {want:?} F32",
            scales.shape(),
            scales.dtype()
        );
        check
    }

    #[track_caller]
    fn int4<B: Backend>(self, arg: &str, w: &Int4Group<B>, letters: &[&'static str; 2]) -> Self {
        let op = self.op;
        let Int4Group { codes, zeros, scales, group } = w;
        assert!(
            codes.dtype() == DType::U32 && codes.shape().len() == 2,
            "{op}: {arg}.codes has shape {:?} {}, expected [N, K / 8] U32",
            codes.shape(),
            codes.dtype()
        );
        assert!(*group > 0 && group.is_multiple_of(8), "{op}: {arg}.group is {group}, no multiple of 8");
        let want = [w.out_features(), w.in_features().div_ceil(*group)];
        for (name, t) in [("zeros", zeros), ("scales", scales)] {
            assert!(
                t.shape() == want && t.dtype() == DType::F16,
                "{op}: {arg}.{name} has shape {:?} {}, expected {want:?} F16",
                t.shape(),
                t.dtype()
            );
        }
        self.shape(arg, &[w.out_features(), w.in_features()], letters)
    }
}
