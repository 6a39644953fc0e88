//! Ranks that are threads of this process, each with a device of its own.

use std::sync::Arc;

use r1_backend::{Backend, CommError, Communicator};
use r1_comm::Local;
use r1_core::Rank;
use r1_model::{DeepSeek, ModelError, ModelOptions};
use r1_weights::{Checkpoint, ModelConfig};

use crate::RankLoader;

/// Makes a fresh group of the devices, one communicator each in their order. It is also told the number of elements of the
/// largest tensor that they sum or gather.
pub type Connect<B> =
    Arc<dyn Fn(&[Arc<B>], usize) -> Result<Vec<Arc<dyn Communicator<B>>>, CommError> + Send + Sync>;

/// Ranks that meet in host memory: any device can.
pub fn connect_in_host_memory<B: Backend>() -> Connect<B> {
    Arc::new(|devices, max_elements| {
        let ranks = Local::group(devices.len(), max_elements).into_iter();
        Ok(ranks.map(|rank| Arc::new(rank) as Arc<dyn Communicator<B>>).collect())
    })
}

/// A checkpoint and a device for each rank.
pub struct LocalRanks<B: Backend> {
    /// One per rank, at least one.
    pub devices: Vec<Arc<B>>,
    /// How they reach each other.
    pub connect: Connect<B>,
    /// Every rank reads its shard from it.
    pub checkpoint: Arc<Checkpoint>,
    /// What its config.json says.
    pub config: ModelConfig,
    /// How every rank runs; rank and world size are set for each.
    pub options: ModelOptions,
}

impl<B: Backend> LocalRanks<B> {
    /// Ranks that meet in host memory.
    pub fn in_host_memory(
        devices: Vec<Arc<B>>,
        checkpoint: Arc<Checkpoint>,
        config: ModelConfig,
        options: ModelOptions,
    ) -> Self {
        Self { devices, connect: connect_in_host_memory(), checkpoint, config, options }
    }
}

impl<B: Backend> RankLoader<B> for LocalRanks<B> {
    fn connect(&self) -> Result<Vec<Arc<dyn Communicator<B>>>, CommError> {
        (self.connect)(&self.devices, self.options.max_collective_elements(&self.config))
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
