//! How a model is spread over workers.

/// Sizes of the parallel groups, as the command line gave them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Tensor parallelism: ranks that share every layer.
    pub tp: usize,
    /// Pipeline parallelism: stages of consecutive layers.
    pub pp: usize,
    /// Data parallelism: replicas of attention.
    pub dp: usize,
    /// Expert parallelism: ranks that share the experts of a layer.
    pub ep: usize,
}

/// A topology that cannot be laid out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTopology {
    /// A group of size 0.
    #[error("{group} is 0; it must be at least 1")]
    Zero {
        /// Name of the group.
        group: &'static str,
    },
}

impl Topology {
    /// One worker.
    pub const SINGLE: Self = Self { tp: 1, pp: 1, dp: 1, ep: 1 };

    /// Checks that every group has at least one member.
    pub fn validate(self) -> Result<Self, InvalidTopology> {
        for (group, size) in [("tp", self.tp), ("pp", self.pp), ("dp", self.dp), ("ep", self.ep)] {
            if size == 0 {
                return Err(InvalidTopology::Zero { group });
            }
        }
        Ok(self)
    }
}

impl Default for Topology {
    fn default() -> Self {
        Self::SINGLE
    }
}
