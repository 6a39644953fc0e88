//! Shapes of an int4 weight.

use r1_core::DType;

use super::Check;
use crate::{Backend, Int4Group};

impl Check {
    #[track_caller]
    pub(super) fn int4<B: Backend>(self, arg: &str, w: &Int4Group<B>, letters: &[&'static str; 2]) -> Self {
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
