//! What this machine can do at most, measured with the backend's own threads and instructions: bytes read from memory, by the
//! kind of pages they lie in, and multiply-adds between registers. Benches print kernels beside it. Knows no operations.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::Cpu;
#[cfg(target_arch = "x86_64")]
use crate::Isa;
use crate::buffer::{Pages, Region, advise_pages};
use crate::numa::Interleave;
use crate::simd::{Kernel, Simd};

/// Bytes that a task reads: long enough that handing tasks out costs nothing beside it.
const READ_TASK_BYTES: usize = 4 << 20;
/// Bytes ahead of the loads that the reading loop asks for.
const READ_AHEAD_BYTES: usize = 2048;
/// Independent sums of both loops: more than latency times throughput of an addition or a multiply-add on any core so far.
const CHAINS: usize = 12;
/// Multiply-adds in a row per task.
const COMPUTE_ROUNDS: u32 = 1 << 17;
/// Tasks per thread and pass.
const COMPUTE_TASKS: usize = 16;
/// Empty jobs per pass.
const EMPTY_JOBS: u32 = 10_000;
/// Longer than threads spin for.
const PAUSE: Duration = Duration::from_millis(3);
/// Passes, of which the best counts.
const PASSES: usize = 7;

/// Where bytes lie that are read.
#[derive(Clone, Copy, Debug)]
pub enum ReadFrom<'a> {
    /// Memory of the process.
    Memory(Pages),
    /// A mapping of a file whose bytes are in the page cache: as many of the file's first bytes as are asked for, each four of
    /// which are 1.0 as an F32.
    File(&'a File, Pages),
}

/// How fast memory is read.
#[derive(Clone, Copy, Debug)]
pub struct ReadCeiling {
    /// Bytes per second by all threads together.
    pub bytes_per_s: f64,
    /// The part of the memory that huge pages map; `None` where the system does not say.
    pub huge_share: Option<f64>,
}

/// How fast registers are multiplied and added.
#[derive(Clone, Copy, Debug)]
pub struct ComputeCeiling {
    /// The multiply-add that is meant.
    pub instruction: &'static str,
    /// Multiplications and additions per second by all threads together.
    pub flops_per_s: f64,
}

/// What an operation pays for running on all threads: handing the job out and waiting until every thread is done.
#[derive(Clone, Copy, Debug)]
pub struct BarrierCost {
    /// Right after another operation, while the threads still spin.
    pub spinning: Duration,
    /// After a pause, when they sleep: the median.
    pub parked: Duration,
}

impl Cpu {
    /// Times jobs of one task per thread, which ends when all threads have come.
    pub fn barrier_cost(&self) -> BarrierCost {
        let mut engine = self.engine();
        let mut jobs = |count: u32| {
            let start = Instant::now();
            for _ in 0..count {
                let come = AtomicUsize::new(0);
                engine.pool.run(self.threads(), &|_, _| {
                    come.fetch_add(1, Ordering::AcqRel);
                    while come.load(Ordering::Acquire) < self.threads() {
                        std::hint::spin_loop();
                    }
                });
            }
            start.elapsed() / count
        };
        let spinning = (0..PASSES).map(|_| jobs(EMPTY_JOBS)).min().unwrap_or_default();
        let mut parked: Vec<_> = (0..PASSES * PASSES)
            .map(|_| {
                std::thread::sleep(PAUSE);
                jobs(1)
            })
            .collect();
        parked.sort();
        BarrierCost { spinning, parked: parked[parked.len() / 2] }
    }

    /// Reads `size_bytes` from there several times with all threads; the best pass counts. An error where there is no such
    /// memory, or where the file is shorter than that.
    ///
    /// # Panics
    /// When `size_bytes` is no multiple of 4 MiB, or the file holds something else than ones.
    pub fn read_ceiling(&self, from: ReadFrom<'_>, size_bytes: usize) -> io::Result<ReadCeiling> {
        assert!(
            size_bytes > 0 && size_bytes.is_multiple_of(READ_TASK_BYTES),
            "{size_bytes} bytes are no tasks"
        );
        let no_room =
            || io::Error::new(io::ErrorKind::OutOfMemory, format!("no room for {size_bytes} bytes"));
        let memory = match from {
            ReadFrom::Memory(pages) => {
                Ones::new(size_bytes, pages, self.numa.as_ref()).ok_or_else(no_room)?
            }
            ReadFrom::File(file, pages) => Ones::map(file, size_bytes, pages)?,
        };
        let right = AtomicBool::new(true);
        let mut engine = self.engine();
        let mut pass = || {
            let start = Instant::now();
            engine.pool.run(size_bytes / READ_TASK_BYTES, &|task, _| {
                let mut sum = 0.0;
                self.isa.run(Read { floats: memory.part(task), sum: &mut sum });
                if sum != (READ_TASK_BYTES / 4) as f32 {
                    right.store(false, Ordering::Relaxed);
                }
            });
            size_bytes as f64 / start.elapsed().as_secs_f64()
        };
        // The first pass finds a file's pages.
        pass();
        let bytes_per_s = (0..PASSES).map(|_| pass()).fold(0.0, f64::max);
        assert!(right.into_inner(), "what was read is not what was written");
        Ok(ReadCeiling { bytes_per_s, huge_share: memory.huge_share() })
    }

    /// The multiply-adds that the backend's kernels are made of, best first: F32's, and before it the dot product of BF16 pairs
    /// where the machine has that.
    pub fn compute_ceilings(&self) -> Vec<ComputeCeiling> {
        let mut ceilings = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if !matches!(self.isa(), Isa::Avx2 | Isa::Portable) && is_x86_feature_detected!("avx512bf16") {
            // SAFETY: the line above found the instructions.
            let flops_per_s = self.measure_flops(|| unsafe { bf16_pairs() });
            ceilings.push(ComputeCeiling { instruction: "vdpbf16ps", flops_per_s });
        }
        let flops_per_s = self.measure_flops(|| {
            let mut flops = 0;
            self.isa.run(MultiplyAdd { flops: &mut flops });
            flops
        });
        ceilings.push(ComputeCeiling { instruction: "F32 multiply-add", flops_per_s });
        ceilings
    }

    /// `task` gives the operations that it did.
    fn measure_flops(&self, task: impl Fn() -> u64 + Sync) -> f64 {
        let num_tasks = COMPUTE_TASKS * self.threads();
        let mut engine = self.engine();
        let mut pass = || {
            let done = std::sync::atomic::AtomicU64::new(0);
            let start = Instant::now();
            engine.pool.run(num_tasks, &|_, _| {
                done.fetch_add(task(), Ordering::Relaxed);
            });
            done.into_inner() as f64 / start.elapsed().as_secs_f64()
        };
        (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
    }
}

/// Sums floats.
struct Read<'a> {
    floats: &'a [f32],
    sum: &'a mut f32,
}

impl Kernel for Read<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        const UNROLL: usize = 8;
        let mut sums = [s.zero(); UNROLL];
        let chunks = self.floats.chunks_exact(UNROLL * S::LANES);
        assert!(chunks.remainder().is_empty(), "a task is whole vectors");
        for chunk in chunks {
            for i in 0..UNROLL {
                let at = chunk.as_ptr().wrapping_add(i * S::LANES);
                s.prefetch(at.wrapping_byte_add(READ_AHEAD_BYTES).cast());
                // SAFETY: the chunk has `UNROLL` vectors.
                sums[i] = s.add(sums[i], unsafe { s.load(at) });
            }
        }
        let mut total = sums[0];
        for i in 1..UNROLL {
            total = s.add(total, sums[i]);
        }
        *self.sum = s.sum(total);
    }
}

/// x = x / 2 + 1 in several chains, which ends at 2.
struct MultiplyAdd<'a> {
    flops: &'a mut u64,
}

impl Kernel for MultiplyAdd<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (half, one) = (s.splat(std::hint::black_box(0.5)), s.splat(std::hint::black_box(1.0)));
        let mut x = [s.zero(); CHAINS];
        for _ in 0..COMPUTE_ROUNDS {
            for i in 0..CHAINS {
                x[i] = s.fma(x[i], half, one);
            }
        }
        for x in x {
            assert!(s.sum(x) == 2.0 * S::LANES as f32, "a multiply-add was left out");
        }
        *self.flops = 2 * COMPUTE_ROUNDS as u64 * (CHAINS * S::LANES) as u64;
    }
}

/// Adds the products of BF16 pairs in several chains; gives the operations that took.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_pairs() -> u64 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_reduce_add_ps, _mm512_set1_epi16, _mm512_setzero_ps,
    };
    const LANES: usize = 16;
    // 2^-9, so that every sum is a small multiple of 2^-17 and exact.
    let factor: i16 = std::hint::black_box(0x3b00);
    // SAFETY: both are 64 bytes without a meaning of their own.
    let factor = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(factor)) };
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..COMPUTE_ROUNDS {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, factor, factor);
        }
    }
    for sum in sums {
        let expected = LANES as f32 * COMPUTE_ROUNDS as f32 / (1 << 17) as f32;
        assert!(_mm512_reduce_add_ps(sum) == expected, "a multiply-add was left out");
    }
    2 * COMPUTE_ROUNDS as u64 * (CHAINS * 2 * LANES) as u64
}

/// Memory full of 1.0.
enum Ones {
    Own { region: Region, len: usize },
    File { start: NonNull<u8>, len: usize },
}

// SAFETY: nobody writes after `new` or `map`.
unsafe impl Sync for Ones {}

impl Ones {
    fn new(len: usize, pages: Pages, numa: Option<&Interleave>) -> Option<Self> {
        let region = Region::zeroed(len, pages, numa)?;
        // SAFETY: the region is ours, starts on a page and has that many floats.
        unsafe { std::slice::from_raw_parts_mut(region.start.as_ptr().cast::<f32>(), len / 4) }.fill(1.0);
        Some(Self::Own { region, len })
    }

    #[cfg(unix)]
    fn map(file: &File, len: usize, pages: Pages) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        if file.metadata()?.len() < len as u64 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("the file has no {len} bytes")));
        }
        // SAFETY: a fresh mapping touches no memory that exists; the file is open.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).expect("a mapping is not at zero");
        // SAFETY: the range is the new mapping.
        unsafe { advise_pages(start, len, pages) };
        Ok(Self::File { start, len })
    }

    #[cfg(not(unix))]
    fn map(_file: &File, _len: usize, _pages: Pages) -> io::Result<Self> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "files are mapped on Unix alone"))
    }

    fn memory(&self) -> (NonNull<u8>, usize) {
        match self {
            Self::Own { region, len } => (region.start, *len),
            Self::File { start, len } => (*start, *len),
        }
    }

    /// The floats of a task.
    fn part(&self, task: usize) -> &[f32] {
        let (start, len) = self.memory();
        assert!((task + 1) * READ_TASK_BYTES <= len, "task {task} lies outside");
        // SAFETY: inside the memory, which starts on a page, is written by nobody and lives as long as `self`.
        unsafe {
            let start = start.as_ptr().add(task * READ_TASK_BYTES);
            std::slice::from_raw_parts(start.cast(), READ_TASK_BYTES / 4)
        }
    }

    /// What /proc/self/smaps says of the mapping that the memory begins in.
    fn huge_share(&self) -> Option<f64> {
        let (start, _) = self.memory();
        huge_share(&std::fs::read_to_string("/proc/self/smaps").ok()?, start.addr().get())
    }
}

impl Drop for Ones {
    fn drop(&mut self) {
        match self {
            Self::Own { .. } => {}
            #[cfg(unix)]
            Self::File { start, len } => {
                // SAFETY: mapped with this length, and no slice outlives `self`.
                unsafe { libc::munmap(start.as_ptr().cast(), *len) };
            }
            #[cfg(not(unix))]
            Self::File { .. } => unreachable!("files are mapped on Unix alone"),
        }
    }
}

/// Of what is resident of the mapping around `address`, the part in huge pages.
fn huge_share(smaps: &str, address: usize) -> Option<f64> {
    let holds = |line: &str| {
        let (from, to) = line.split_whitespace().next()?.split_once('-')?;
        let (from, to) = (usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?);
        Some((from..to).contains(&address))
    };
    let lines = smaps.lines().skip_while(|line| holds(line) != Some(true)).skip(1);
    let fields: Vec<&str> = lines.take_while(|line| holds(line).is_none()).collect();
    let kib = |name: &str| {
        let line = fields.iter().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()
    };
    let huge =
        kib("AnonHugePages:")? + kib("ShmemPmdMapped:").unwrap_or(0.0) + kib("FilePmdMapped:").unwrap_or(0.0);
    kib("Rss:").filter(|rss| *rss > 0.0).map(|rss| huge / rss)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::{CpuOptions, Isa};

    fn cpus() -> impl Iterator<Item = Cpu> {
        let isas = Isa::ALL.into_iter().filter(|isa| isa.is_available());
        isas.map(|isa| Cpu::new(CpuOptions { threads: Some(2), isa: Some(isa) }).expect("a CPU backend"))
    }

    #[test]
    fn what_is_read_and_multiplied_is_checked_and_takes_time() {
        let path = std::env::temp_dir().join(format!("r1-ceiling-{}", std::process::id()));
        let mut file = File::create_new(&path).expect("a file");
        let ones: Vec<u8> =
            std::iter::repeat_n(1.0_f32.to_le_bytes(), READ_TASK_BYTES / 4).flatten().collect();
        file.write_all(&ones).expect("room");
        let file = File::open(&path).expect("the file again");
        std::fs::remove_file(&path).expect("removed");
        for cpu in cpus() {
            for from in [
                ReadFrom::Memory(Pages::Huge),
                ReadFrom::Memory(Pages::Small),
                ReadFrom::File(&file, Pages::Any),
                ReadFrom::File(&file, Pages::Small),
            ] {
                let ceiling = cpu.read_ceiling(from, READ_TASK_BYTES).expect("memory");
                assert!(ceiling.bytes_per_s > 0.0 && ceiling.bytes_per_s.is_finite(), "{ceiling:?}");
                assert!(ceiling.huge_share.is_none_or(|share| (0.0..=1.0).contains(&share)), "{ceiling:?}");
            }
            let error = cpu
                .read_ceiling(ReadFrom::File(&file, Pages::Any), 2 * READ_TASK_BYTES)
                .expect_err("too short");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            let BarrierCost { spinning, parked } = cpu.barrier_cost();
            assert!(spinning > Duration::ZERO && parked > Duration::ZERO);
            let ceilings = cpu.compute_ceilings();
            assert!(
                ceilings.iter().all(|c| c.flops_per_s > 0.0 && c.flops_per_s.is_finite()),
                "{ceilings:?}"
            );
        }
    }

    #[test]
    #[should_panic(expected = "not what was written")]
    fn other_bytes_are_noticed() {
        let path = std::env::temp_dir().join(format!("r1-ceiling-zeros-{}", std::process::id()));
        let file = File::create_new(&path).expect("a file");
        file.set_len(READ_TASK_BYTES as u64).expect("room");
        let file = File::open(&path).expect("the file again");
        std::fs::remove_file(&path).expect("removed");
        let cpu = cpus().next().expect("portable code runs everywhere");
        drop(cpu.read_ceiling(ReadFrom::File(&file, Pages::Any), READ_TASK_BYTES));
    }

    #[test]
    fn huge_pages_are_counted_for_the_right_mapping() {
        let smaps = "1000-3000 rw-p 00000000 00:00 0\nRss: 8 kB\nAnonHugePages: 0 kB\nVmFlags: rd\n\
                     3000-9000 r--s 00000000 fe:00 7 /a-b c\nRss:   100 kB\nAnonHugePages:   0 kB\nFilePmdMapped:   50 kB\n";
        assert_eq!(huge_share(smaps, 0x1000), Some(0.0));
        assert_eq!(huge_share(smaps, 0x3000), Some(0.5));
        assert_eq!(huge_share(smaps, 0x8fff), Some(0.5));
        assert_eq!(huge_share(smaps, 0x9000), None);
    }
}
