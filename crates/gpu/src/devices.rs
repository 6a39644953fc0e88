//! Which devices there are, and how each is opened. A driver that was not compiled in, that is not installed or that has no
//! device says so.

use std::time::{Duration, Instant};

use crate::driver::DriverError;
use crate::{Gpu, driver};

/// Of a real device; less where it has little memory.
#[cfg(any(feature = "cuda", feature = "rocm"))]
const SCRATCH_BYTES: usize = 512 << 20;

/// What a driver has to offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// `cuda` or `rocm`.
    pub driver: &'static str,
    /// Devices, at least one, or why there are none.
    pub devices: Result<usize, DriverError>,
}

/// Every driver for real GPUs, the preferred one first.
pub fn devices() -> [Found; 2] {
    [("cuda", driver::cuda_devices()), ("rocm", driver::hip_devices())].map(|(driver, count)| {
        let none =
            || DriverError::Unusable { why: format!("the driver of {driver} is installed and shows no GPU") };
        Found { driver, devices: count.and_then(|count| if count == 0 { Err(none()) } else { Ok(count) }) }
    })
}

impl Gpu {
    /// NVIDIA's GPU `ordinal`, of whose memory that fraction is taken. `allow_ptx` lets the driver compile the kernels for a GPU
    /// that they were not compiled for.
    ///
    /// # Errors
    /// Where this build has no such driver, where its library, a new enough version of it or the device is missing, where the
    /// kernels have no code for the device, or where its memory is taken: each says what would help.
    pub fn cuda(ordinal: usize, memory_fraction: f64, allow_ptx: bool) -> Result<Self, DriverError> {
        #[cfg(feature = "cuda")]
        return Self::on(std::sync::Arc::new(driver::cuda::open(ordinal, allow_ptx)?), memory_fraction);
        #[cfg(not(feature = "cuda"))]
        {
            let _ = (ordinal, memory_fraction, allow_ptx);
            driver::cuda_devices().map(|_| unreachable!("there is no such driver"))
        }
    }

    /// AMD's GPU `ordinal`, of whose memory that fraction is taken.
    ///
    /// # Errors
    /// As [`cuda`](Gpu::cuda).
    pub fn rocm(ordinal: usize, memory_fraction: f64) -> Result<Self, DriverError> {
        #[cfg(feature = "rocm")]
        return Self::on(std::sync::Arc::new(driver::hip::open(ordinal)?), memory_fraction);
        #[cfg(not(feature = "rocm"))]
        {
            let _ = (ordinal, memory_fraction);
            driver::hip_devices().map(|_| unreachable!("there is no such driver"))
        }
    }

    /// Bytes per second that the device reads and writes when it only copies `size_bytes`, best of five times: the ceiling of
    /// kernels that move bytes.
    pub fn copy_bytes_per_s(&self, size_bytes: usize) -> Result<f64, DriverError> {
        const RUNS: u32 = 8;
        let room = || self.arena.take(size_bytes);
        let (Some(from), Some(to)) = (room(), room()) else {
            let (free_bytes, total_bytes) = (self.arena.largest_free_bytes(), self.arena.size_bytes());
            return Err(DriverError::OutOfMemory {
                requested_bytes: 2 * size_bytes,
                free_bytes,
                total_bytes,
            });
        };
        let mut best = Duration::MAX;
        for _ in 0..5 {
            self.driver.mark()?.wait()?;
            let start = Instant::now();
            for _ in 0..RUNS {
                self.driver.copy(from.at(), to.at(), size_bytes)?;
            }
            self.driver.mark()?.wait()?;
            best = best.min(start.elapsed() / RUNS);
        }
        Ok(2.0 * size_bytes as f64 / best.as_secs_f64())
    }

    #[cfg(any(feature = "cuda", feature = "rocm"))]
    fn on(driver: std::sync::Arc<dyn driver::Driver>, memory_fraction: f64) -> Result<Self, DriverError> {
        let memory_bytes = driver::device::usable_bytes(driver.info(), memory_fraction)?;
        Self::new(driver, memory_bytes, SCRATCH_BYTES.min(memory_bytes / 16))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether this build has the driver.
    const BUILT: [bool; 2] = [cfg!(feature = "cuda"), cfg!(feature = "rocm")];

    #[test]
    fn every_driver_counts_its_devices_or_says_why_there_are_none() {
        let found = devices();
        assert_eq!(found.each_ref().map(|found| found.driver), ["cuda", "rocm"]);
        for (Found { driver, devices }, is_built) in found.into_iter().zip(BUILT) {
            match devices {
                Ok(count) => assert!(is_built && count > 0, "{driver}: {count}"),
                Err(error) => assert_eq!(
                    !is_built,
                    error.to_string().contains(&format!("feature `{driver}`")),
                    "{error}"
                ),
            }
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_refused() {
        for opened in [Gpu::cuda(1000, 0.5, false), Gpu::rocm(1000, 0.5)] {
            let error = opened.err().expect("no thousand devices");
            assert!(matches!(error, DriverError::Unusable { .. } | DriverError::Call { .. }), "{error}");
        }
    }
}
