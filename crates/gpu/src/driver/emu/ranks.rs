//! Collectives of emulated devices: each rank's stream meets the others' in host memory.

use std::ptr;
use std::sync::Arc;

use r1_backend::CommError;
use r1_comm::{Local, Staging};
use r1_core::DType;

use super::Emu;
use super::stream::Command;
use crate::driver::{Collective, CollectiveArgs, Collectives, DevicePtr, Driver, DriverError};
use crate::host;

/// One rank's end.
pub(crate) struct EmuRank {
    device: Arc<Emu>,
    local: Arc<Local>,
}

impl EmuRank {
    /// A group with one rank per device; `max_elements` is the largest tensor that is summed or gathered.
    pub(crate) fn group(devices: Vec<Arc<Emu>>, max_elements: usize) -> Vec<Self> {
        let ranks = Local::group(devices.len(), max_elements).into_iter().map(Arc::new);
        devices.into_iter().zip(ranks).map(|(device, local)| Self { device, local }).collect()
    }
}

fn lay_out(args: CollectiveArgs, staging: &mut Staging) {
    let size = args.dtype.size_bytes();
    // SAFETY: a dense range of this device's memory; its stream, which runs this, has run what wrote it.
    let bytes = unsafe { std::slice::from_raw_parts(args.x.0 as *const u8, args.elements * size) };
    staging.floats.clear();
    staging.ids.clear();
    if args.dtype == DType::U32 {
        staging.ids.extend(bytes.as_chunks().0.iter().map(|&id| u32::from_le_bytes(id)));
    } else {
        staging.floats.resize(args.elements, 0.0);
        host::widen(args.dtype, bytes, &mut staging.floats);
    }
}

fn take(out: DevicePtr, dtype: DType, staging: &Staging) {
    let mut bytes;
    if dtype == DType::U32 {
        bytes = staging.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    } else {
        bytes = vec![0; staging.floats.len() * dtype.size_bytes()];
        host::narrow(dtype, &staging.floats, &mut bytes, false);
    }
    // SAFETY: a dense range of this device's memory that is as long, and nothing else runs on its stream.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), out.0 as *mut u8, bytes.len()) };
}

impl Collectives for EmuRank {
    fn enqueue(&self, _driver: &dyn Driver, args: CollectiveArgs) -> Result<(), DriverError> {
        let local = self.local.clone();
        let what = match args.what {
            Collective::AllReduce => r1_comm::Collective::AllReduce,
            Collective::AllGather => r1_comm::Collective::AllGather,
            Collective::ReduceScatter => r1_comm::Collective::ReduceScatter,
            Collective::AllToAll => r1_comm::Collective::AllToAll,
            Collective::Broadcast { root } => r1_comm::Collective::Broadcast { root },
            Collective::Send { to } => r1_comm::Collective::Send { to },
            Collective::Recv { from } => r1_comm::Collective::Recv { from },
        };
        self.device.enqueue(Command::Host(Arc::new(move || {
            local.exchange(
                what,
                args.elements,
                |staging| {
                    lay_out(args, staging);
                    Ok(())
                },
                |staging| {
                    take(args.out, args.dtype, staging);
                    Ok(())
                },
            );
            // A failure of the group is told by `failure`; the step goes on and its result is thrown away.
            Ok(())
        })));
        Ok(())
    }

    fn failure(&self) -> Result<(), CommError> {
        self.local.failure()
    }

    fn leave(&self) {
        self.local.leave();
    }
}
