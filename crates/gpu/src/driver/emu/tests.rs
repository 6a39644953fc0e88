//! A kernel that fails while it runs, alone and in a captured list.

use std::mem::MaybeUninit;
use std::sync::Arc;

use super::{Emu, EmuOptions};
use crate::driver::{DevicePtr, Driver, DriverError, Launch};

const BYTES: usize = 64;
const KERNEL: &str = "sample_rows";

/// A launch with less shared memory than its kernel uses, which nothing can know before it runs.
fn launch_that_fails(emu: &Emu) {
    let args = vec![MaybeUninit::zeroed(); emu.kernels[KERNEL].args_bytes];
    let launch = Launch { kernel: KERNEL, grid: [1; 3], warps: 1, shared_bytes: 8, args: &args };
    emu.launch(&launch).expect("it is enqueued");
}

fn byte(at: DevicePtr) -> u8 {
    // SAFETY: memory of the device, which has nothing left to do.
    unsafe { *(at.0 as *const u8) }
}

fn settled(emu: &Emu) -> Result<(), DriverError> {
    emu.mark().expect("nothing is captured").wait()
}

/// Both give the failure to the step's own mark, run nothing behind the failure, and run the next step as if nothing had been.
#[test]
fn a_kernel_that_fails_fails_its_step_alone() {
    let emu = Arc::new(Emu::new(EmuOptions { threads: 2, memory_bytes: 1 << 20 }).expect("a device"));
    let at = emu.reserve(BYTES).expect("memory");
    let step = |value: u8, fails: bool| {
        emu.fill(at, BYTES, value).expect("it is enqueued");
        if fails {
            launch_that_fails(&emu);
        }
        emu.fill(at, BYTES, value + 1).expect("it is enqueued");
    };
    let capture = |value: u8, fails: bool| {
        emu.begin_capture().expect("nothing is captured");
        step(value, fails);
        emu.end_capture().expect("it was begun")
    };
    let (broken, sound) = (capture(10, true), capture(20, false));
    assert_eq!((settled(&emu), byte(at)), (Ok(()), 0), "what is captured does not run");
    let runs: [(&dyn Fn(), u8); 2] =
        [(&|| step(40, true), 40), (&|| emu.replay(&broken).expect("it is enqueued"), 10)];
    for (run, before) in runs {
        run();
        let failed = settled(&emu).expect_err("a kernel failed");
        let DriverError::Kernel { kernel, why } = &failed else { panic!("{failed}") };
        assert!(kernel == KERNEL && why.contains("shared memory and was launched with 8"), "{failed}");
        assert_eq!(byte(at), before, "what stands behind the failure does not run");
        emu.replay(&sound).expect("it is enqueued");
        assert_eq!((settled(&emu), byte(at)), (Ok(()), 21));
    }
}
