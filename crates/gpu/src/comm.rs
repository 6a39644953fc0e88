//! Ranks on GPUs: collectives enqueued on each device's own stream, so that they are captured with the step.

use std::sync::Arc;

use r1_backend::{CommError, Communicator, Tensor};
use r1_core::DType;

use crate::Gpu;
#[cfg(feature = "cuda")]
use crate::driver::cuda::Cuda;
#[cfg(any(feature = "cuda", feature = "rocm"))]
use crate::driver::device::Device;
use crate::driver::emu::{Emu, EmuRank};
#[cfg(feature = "rocm")]
use crate::driver::hip::Hip;
#[cfg(any(feature = "cuda", feature = "rocm"))]
use crate::driver::nccl::NcclRank;
use crate::driver::{Alone, Collective, CollectiveArgs, Collectives, DevicePtr, Driver, DriverError};
use crate::launch::ptr;
use crate::ops;

/// One rank of a group of GPUs. Dropping it takes the rank out of the group: whoever waits for it gets
/// [`CommError::PeerGone`] from `check`.
pub struct Ranks {
    rank: usize,
    world_size: usize,
    collectives: Box<dyn Collectives>,
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.collectives.leave();
    }
}

impl Gpu {
    /// A group of these devices, one communicator per device in order; `max_elements` is the largest tensor that is summed or
    /// gathered. Devices of different kinds make no group.
    pub fn group(devices: &[Arc<Self>], max_elements: usize) -> Result<Vec<Ranks>, DriverError> {
        if devices.len() == 1 {
            return Ok(ranks(vec![Alone]));
        }
        if let Some(emulated) = of_kind::<Emu>(devices) {
            return Ok(ranks(EmuRank::group(emulated, max_elements)));
        }
        #[cfg(feature = "cuda")]
        if let Some(cuda) = of_kind::<Device<Cuda>>(devices) {
            return Ok(ranks(NcclRank::group(cuda)?));
        }
        #[cfg(feature = "rocm")]
        if let Some(hip) = of_kind::<Device<Hip>>(devices) {
            return Ok(ranks(NcclRank::group(hip)?));
        }
        let why = "these devices cannot exchange data; take --tp 1, or devices of one kind".into();
        Err(DriverError::Unusable { why })
    }
}

/// What connects devices in messages.
const TRANSPORT: &str = "GPU collectives";

impl Gpu {
    /// [`group`](Gpu::group) as communicators, for who starts ranks.
    pub fn connect(
        devices: &[Arc<Self>],
        max_elements: usize,
    ) -> Result<Vec<Arc<dyn Communicator<Self>>>, CommError> {
        let group = Self::group(devices, max_elements);
        let group =
            group.map_err(|error| CommError::Connect { transport: TRANSPORT, why: error.to_string() })?;
        Ok(group.into_iter().map(|rank| Arc::new(rank) as Arc<dyn Communicator<Self>>).collect())
    }
}

/// The drivers of all devices, where they are of that kind.
fn of_kind<D: Driver>(devices: &[Arc<Gpu>]) -> Option<Vec<Arc<D>>> {
    devices.iter().map(|gpu| gpu.driver.clone().as_any().downcast().ok()).collect()
}

fn ranks<C: Collectives + 'static>(ends: Vec<C>) -> Vec<Ranks> {
    let world_size = ends.len();
    let rank = |(rank, end)| Ranks { rank, world_size, collectives: Box::new(end) };
    ends.into_iter().enumerate().map(rank).collect()
}

impl Ranks {
    fn enqueue(&self, gpu: &Gpu, op: &'static str, args: CollectiveArgs) {
        gpu.settle_weights();
        gpu.note(op, self.collectives.enqueue(&*gpu.driver, args));
    }

    /// A collective of dense tensors.
    #[track_caller]
    fn run(
        &self,
        gpu: &Gpu,
        op: &'static str,
        what: Collective,
        x: &Tensor<Gpu>,
        out: &Tensor<Gpu>,
        times: [usize; 2],
    ) {
        assert!(x.is_contiguous() && out.is_contiguous(), "{op}: tensors with gaps: {x:?}, {out:?}");
        assert!(
            x.dtype() == out.dtype() && x.num_elements() * times[0] == out.num_elements() * times[1],
            "{op}: x is {x:?} and out {out:?}, with {} ranks",
            self.world_size
        );
        if self.world_size == 1 {
            return copy(gpu, op, x, out);
        }
        let args =
            CollectiveArgs { what, x: ptr(x), out: ptr(out), elements: x.num_elements(), dtype: x.dtype() };
        self.enqueue(gpu, op, args);
    }
}

/// What is left of a collective for one rank.
fn copy(gpu: &Gpu, op: &'static str, x: &Tensor<Gpu>, out: &Tensor<Gpu>) {
    if ptr(x) != ptr(out) {
        gpu.note(op, gpu.driver.copy(ptr(x), ptr(out), x.num_elements() * x.dtype().size_bytes()));
    }
}

#[track_caller]
fn assert_floats(op: &str, x: &Tensor<Gpu>) {
    assert!(x.dtype() != DType::U32, "{op}: x has dtype U32, and only floats are summed");
}

impl Communicator<Gpu> for Ranks {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce(&self, gpu: &Gpu, x: &Tensor<Gpu>) {
        assert_floats("all_reduce", x);
        self.run(gpu, "all_reduce", Collective::AllReduce, x, x, [1, 1]);
    }

    fn all_gather(&self, gpu: &Gpu, x: &Tensor<Gpu>, out: &Tensor<Gpu>) {
        self.run(gpu, "all_gather", Collective::AllGather, x, out, [self.world_size, 1]);
    }

    /// Gathered rank by rank into scratch memory, as many rows at a time as fit, and put together there.
    fn all_gather_last(&self, gpu: &Gpu, x: &Tensor<Gpu>, out: &Tensor<Gpu>) {
        const OP: &str = "all_gather_last";
        let (rows, n) = (x.dim(0), x.dim(1));
        assert!(
            out.shape() == [rows, self.world_size * n] && x.dtype() == out.dtype() && x.is_contiguous(),
            "{OP}: x is {x:?} and out {out:?}, with {} ranks",
            self.world_size
        );
        assert_floats(OP, x);
        let row_bytes = self.world_size * n * x.dtype().size_bytes();
        let most = (gpu.scratch_bytes() / row_bytes.max(1)).max(1);
        for start in (0..rows).step_by(most) {
            let part = start..rows.min(start + most);
            let (x, out) = (x.rows(part.clone()), out.rows(part.clone()));
            let gathered: DevicePtr = gpu.scratch(part.len() * row_bytes);
            let elements = x.num_elements();
            let args = CollectiveArgs {
                what: Collective::AllGather,
                x: ptr(&x),
                out: gathered,
                elements,
                dtype: x.dtype(),
            };
            if self.world_size == 1 {
                let size_bytes = elements * x.dtype().size_bytes();
                gpu.note(OP, gpu.driver.copy(args.x, args.out, size_bytes));
            } else {
                self.enqueue(gpu, OP, args);
            }
            ops::rows::interleave(gpu, gathered, [self.world_size, n], &out);
        }
    }

    fn reduce_scatter(&self, gpu: &Gpu, x: &Tensor<Gpu>, out: &Tensor<Gpu>) {
        assert_floats("reduce_scatter", x);
        self.run(gpu, "reduce_scatter", Collective::ReduceScatter, x, out, [1, self.world_size]);
    }

    fn all_to_all(&self, gpu: &Gpu, x: &Tensor<Gpu>, out: &Tensor<Gpu>) {
        self.run(gpu, "all_to_all", Collective::AllToAll, x, out, [1, 1]);
    }

    fn broadcast(&self, gpu: &Gpu, x: &Tensor<Gpu>, root: usize) {
        assert!(root < self.world_size, "broadcast: root {root} of {}", self.world_size);
        self.run(gpu, "broadcast", Collective::Broadcast { root }, x, x, [1, 1]);
    }

    fn send(&self, gpu: &Gpu, x: &Tensor<Gpu>, to: usize) {
        assert!(
            to < self.world_size && to != self.rank,
            "send: rank {to} of {} from {}",
            self.world_size,
            self.rank
        );
        self.run(gpu, "send", Collective::Send { to }, x, x, [1, 1]);
    }

    fn recv(&self, gpu: &Gpu, x: &Tensor<Gpu>, from: usize) {
        assert!(
            from < self.world_size && from != self.rank,
            "recv: rank {from} of {} from {}",
            self.world_size,
            self.rank
        );
        self.run(gpu, "recv", Collective::Recv { from }, x, x, [1, 1]);
    }

    fn check(&self) -> Result<(), CommError> {
        self.collectives.failure()
    }
}
