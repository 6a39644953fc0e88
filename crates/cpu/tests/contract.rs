//! What the backend refuses, and that it goes on working afterwards.

mod support;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use r1_backend::{
    Activation, Backend, BackendError, HostBytes, HostSlice, HostTensor, RowSampling, SamplingBatch, Weight,
};
use r1_core::DType;
use r1_cpu::{Cpu, CpuError, CpuOptions, Isa};
use support::{cpu, ids, read, read_ids, tensor};

/// What `call` panics with.
#[track_caller]
fn panic_of(call: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(call)).expect_err("a panic");
    payload.downcast::<String>().map_or_else(|p| (*p.downcast::<&str>().expect("words")).to_owned(), |s| *s)
}

#[test]
fn overlapping_arguments_are_refused_and_released() {
    let cpu = cpu(None, 2);
    let all = tensor(&cpu, &[1.0; 40], &[4, 10], DType::F32);
    let message = panic_of(|| cpu.add(&all.rows(0..2), &all.rows(2..4)));
    assert!(message.starts_with("add: residual is in use"), "{message}");
    let weight = tensor(&cpu, &[1.0; 10], &[10], DType::F32);
    let message = panic_of(|| cpu.rms_norm(&all, &weight, 1e-6, &Activation::dense(all.clone())));
    assert!(message.starts_with("rms_norm: out is in use"), "{message}");
    // Both were given back.
    cpu.add(&all, &tensor(&cpu, &[2.0; 40], &[4, 10], DType::F32));
    assert_eq!(read(&cpu, &all), vec![3.0; 40]);
}

#[test]
fn imported_tensors_are_read_only() {
    let cpu = cpu(None, 1);
    let weight = cpu.import(&HostTensor::from_f32(&[1.0, 2.0], &[2])).expect("import");
    let message = panic_of(|| cpu.upload(HostSlice::F32(&[0.0, 0.0]), &weight));
    assert_eq!(message, "upload: dst is read-only: it was imported");
    assert_eq!(read(&cpu, &weight), [1.0, 2.0]);
}

/// Bytes that count how many of them were discarded.
struct Counting(Vec<u8>, AtomicUsize);

impl HostBytes for Counting {
    fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn discard(&self, range: Range<usize>) {
        self.1.fetch_add(range.len(), Ordering::Relaxed);
    }
}

#[test]
fn import_copies_only_what_is_misaligned() {
    let cpu = cpu(None, 1);
    let mut bytes = vec![0u8; 64];
    let start = bytes.as_ptr().align_offset(4);
    for misalignment in [0, 1] {
        let at = start + misalignment;
        bytes[at..at + 8].copy_from_slice(&[1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat());
        let owner = Arc::new(Counting(std::mem::take(&mut bytes), AtomicUsize::new(0)));
        let host = HostTensor::new(owner.clone(), at..at + 8, &[2], DType::F32);
        let imported = cpu.import(&host).expect("import");
        assert_eq!(owner.1.load(Ordering::Relaxed), 8 * misalignment, "discarded");
        assert_eq!(read(&cpu, &imported), [1.5, -2.0]);
        drop((host, imported));
        bytes = Arc::into_inner(owner).expect("nobody else keeps it").0;
    }
}

#[test]
fn too_much_memory_is_an_error_with_a_way_out() {
    let cpu = cpu(None, 1);
    for shape in [&[1 << 30, 1 << 20][..], &[usize::MAX, 2]] {
        let error = cpu.alloc(shape, DType::F32).expect_err("too much");
        let BackendError::OutOfMemory { requested_bytes, hint, .. } = &error else { panic!("{error}") };
        assert!(*requested_bytes >= 1 << 50, "{error}");
        assert!(hint.contains("--max-model-len") && hint.contains("--max-num-seqs"), "{error}");
    }
    // Zeroed memory is lent untouched: several tensors that fit one by one must not be lent together.
    let half = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?.trim();
        line.strip_suffix(" kB")?.parse::<usize>().ok().map(|kb| kb * 1024 * 3 / 5)
    });
    if let Some(bytes) = half {
        let first = cpu.alloc(&[bytes], DType::F8E4M3);
        assert!(first.is_err() || cpu.alloc(&[bytes], DType::F8E4M3).is_err());
    }
}

/// In a process of its own, whose address space is limited: what does not fit is an error that says how much is left.
#[cfg(target_os = "linux")]
#[test]
fn a_limited_address_space_is_an_error_with_numbers() {
    const LIMIT_KIB: usize = 1 << 20;
    const INSIDE: &str = "R1_TEST_LIMITED";
    if std::env::var_os(INSIDE).is_none() {
        let status = std::process::Command::new("sh")
            .args(["-c", &format!("ulimit -v {LIMIT_KIB} && exec \"$0\" \"$@\"")])
            .arg(std::env::current_exe().expect("this test"))
            .args(["--exact", "a_limited_address_space_is_an_error_with_numbers"])
            .env(INSIDE, "1")
            .output()
            .expect("sh runs");
        assert!(status.status.success(), "{status:?}");
        assert!(String::from_utf8_lossy(&status.stdout).contains("1 passed"), "{status:?}");
        return;
    }
    let cpu = cpu(None, 1);
    let left = cpu.free_bytes().expect("Linux says");
    assert!(left < LIMIT_KIB * 1024, "{left} bytes");
    let mut kept = Vec::new();
    let error = loop {
        match cpu.alloc(&[64 << 20], DType::F8E4M3) {
            Ok(tensor) => kept.push(tensor),
            Err(error) => break error,
        }
        assert!(kept.len() < 16, "1 GiB holds no more than 16 tensors of 64 MiB");
    };
    assert!(!kept.is_empty(), "{error}");
    let BackendError::OutOfMemory { requested_bytes, hint, .. } = &error else { panic!("{error}") };
    assert_eq!(*requested_bytes, 64 << 20);
    let left: usize = hint.split(' ').next().and_then(|left| left.parse().ok()).expect("a number");
    // Large tensors are laid out in one huge page more than they need.
    assert!(left < 66 << 20, "{error}");
    // The backend lives on, and what is given back can be had again.
    kept.pop();
    cpu.alloc(&[32 << 20], DType::F8E4M3).expect("room again");
}

#[test]
fn fp8_activations_are_the_callers_bug() {
    let cpu = cpu(None, 1);
    assert!(!cpu.capabilities().fp8_activations);
    let x = Activation::alloc(&cpu, 2, 8, DType::F32, Some(false)).expect("room");
    let weight = Weight::Dense { data: tensor(&cpu, &[1.0; 8], &[1, 8], DType::F32) };
    let out = cpu.alloc(&[2, 1], DType::F32).expect("room");
    let message = panic_of(|| cpu.linear(&x, &weight, &out));
    assert!(message.starts_with("linear: x has an FP8 form"), "{message}");
    assert!(panic_of(|| cpu.quantize(&x)).starts_with("quantize: x has an FP8 form"));
    cpu.quantize(&Activation::dense(x.dense.clone()));
}

#[test]
fn options_are_checked() {
    assert!(matches!(Cpu::new(CpuOptions { threads: Some(0), isa: None }), Err(CpuError::NoThreads)));
    for isa in Isa::ALL {
        match Cpu::new(CpuOptions { threads: Some(1), isa: Some(isa) }) {
            Ok(cpu) => assert_eq!(cpu.describe(), format!("cpu: {isa}, 1 thread")),
            Err(error) => {
                assert!(!isa.is_available());
                assert_eq!(error.to_string(), format!("this machine has no {isa} instructions"));
            }
        }
    }
    let cpu = Cpu::new(CpuOptions::default()).expect("the defaults work");
    assert!(cpu.threads() >= 1 && cpu.isa().is_available());
}

/// Ids that point nowhere are found before memory is, and the backend lives on.
#[test]
fn ids_out_of_range_panic_and_the_next_step_works() {
    let cpu = cpu(None, 2);
    let x = tensor(&cpu, &[1.0, 2.0, 3.0, 4.0], &[2, 2], DType::F32);
    let out = cpu.alloc(&[2, 2], DType::F32).expect("room");
    let message = panic_of(|| cpu.gather_rows(&x, &ids(&cpu, &[1, 2], &[2]), &out));
    assert_eq!(message, "gather_rows: row 2 of 2");
    cpu.gather_rows(&x, &ids(&cpu, &[1, 0], &[2]), &out);
    assert_eq!(read(&cpu, &out), [3.0, 4.0, 1.0, 2.0]);
    let (tokens, fed) = (ids(&cpu, &[7, 8], &[2]), ids(&cpu, &[0; 3], &[3]));
    let message = panic_of(|| cpu.feed_tokens(&tokens, &ids(&cpu, &[1, 2, u32::MAX], &[3]), &fed));
    assert_eq!(message, "feed_tokens: row 2 of 2");
    cpu.feed_tokens(&tokens, &ids(&cpu, &[1, u32::MAX, 0], &[3]), &fed);
    assert_eq!(read_ids(&cpu, &fed), [8, 0, 7]);
    let logits = tensor(&cpu, &[0.0; 8], &[1, 8], DType::F32);
    let mut sampling = SamplingBatch { bias: vec![(8, 1.0)], ..SamplingBatch::default() };
    sampling.rows.push(RowSampling { bias: 0..1, ..RowSampling::greedy() });
    let drawn = cpu.alloc(&[1], DType::U32).expect("room");
    assert_eq!(panic_of(|| cpu.sample(&logits, &sampling, &drawn)), "sample: bias for token 8 of 8");
}

#[test]
fn two_threads_may_share_weights() {
    let cpu = cpu(None, 2);
    let weight = Weight::Dense { data: tensor(&cpu, &[0.5; 64 * 32], &[64, 32], DType::BF16) };
    std::thread::scope(|scope| {
        for factor in 1..4 {
            let (cpu, weight) = (&cpu, &weight);
            scope.spawn(move || {
                let x = Activation::dense(tensor(cpu, &[factor as f32; 32], &[1, 32], DType::F32));
                let out = cpu.alloc(&[1, 64], DType::F32).expect("room");
                for _ in 0..200 {
                    cpu.linear(&x, weight, &out);
                    assert_eq!(read(cpu, &out), [16.0 * factor as f32; 64]);
                }
            });
        }
    });
}
