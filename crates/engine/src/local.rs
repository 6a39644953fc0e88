//! Ranks that are threads of this process and meet in host memory.

use std::sync::Arc;

use r1_backend::{Backend, Communicator};
use r1_comm::Local;
use r1_core::Rank;
use r1_model::{DeepSeek, ModelError, ModelOptions};
use r1_weights::{Checkpoint, ModelConfig};

use crate::RankLoader;

/// A checkpoint and a device for each rank.
pub struct LocalRanks<B: Backend> {
    /// One per rank, at least one.
    pub devices: Vec<Arc<B>>,
    /// Every rank reads its shard from it.
    pub checkpoint: Arc<Checkpoint>,
    /// What its config.json says.
    pub config: ModelConfig,
    /// How every rank runs; rank and world size are set for each.
    pub options: ModelOptions,
}

impl<B: Backend> RankLoader<B> for LocalRanks<B> {
    fn connect(&self) -> Vec<Arc<dyn Communicator<B>>> {
        let elements = self.options.max_collective_elements(&self.config);
        let ranks = Local::group(self.devices.len(), elements).into_iter();
        ranks.map(|rank| Arc::new(rank) as Arc<dyn Communicator<B>>).collect()
    }

    fn load(
        &self,
        rank: Rank,
        comm: Arc<dyn Communicator<B>>,
        progress: &mut dyn FnMut(f32),
    ) -> Result<DeepSeek<B>, ModelError> {
        let options = ModelOptions { rank, world_size: self.devices.len(), ..self.options.clone() };
        DeepSeek::load(self.devices[rank.0].clone(), comm, &self.checkpoint, &self.config, options, progress)
    }
}
