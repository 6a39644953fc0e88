//! int8 activations at their edges: inputs that are no numbers, that are all zero or tiny, ties, and machines without the products.

mod support;

use r1_backend::{Activation, Backend, HostTensor, Weight};
use r1_core::DType;
use r1_cpu::{Cpu, CpuError, Isa};
use support::{cpu, every_isa, read, tensor};

const N: usize = 5;
const K: usize = 300;

/// Backends with int8 activations: none where the machine lacks the products.
fn cpus() -> impl Iterator<Item = Cpu> {
    every_isa(2).filter_map(|cpu| cpu.with_int8_activations().ok())
}

/// Row `n` has the code `n + 1` everywhere, and a scale of 1.
fn weight(cpu: &Cpu) -> Weight<Cpu> {
    let codes = (0..N * K).map(|i| (i / K + 1) as u8).collect();
    let data = cpu.import_matrix(&HostTensor::from_vec(codes, &[N, K], DType::I8)).expect("import");
    let scales = tensor(cpu, &[1.0; N * 3], &[N, 3], DType::F32);
    Weight::Int8Group { data, scales, group: 128, offset: 0 }
}

/// Outputs of rows of inputs, the given one among nine others of ones.
fn linear(cpu: &Cpu, x: &[f32; K], dtype: DType) -> Vec<f32> {
    let mut rows = vec![1.0; 10 * K];
    rows[4 * K..][..K].copy_from_slice(x);
    let (x, out) = (tensor(cpu, &rows, &[10, K], dtype), cpu.alloc(&[10, N], DType::F32).expect("room"));
    cpu.linear(&Activation::dense(x), &weight(cpu), &out);
    let mut found = read(cpu, &out);
    let row = found.drain(4 * N..5 * N).collect();
    // Ones are 127 times 1/127, which F32 rounds.
    let ones = |y: &f32, n: usize| (y - ((n + 1) * K) as f32).abs() < 1e-3 * K as f32;
    assert!(found.iter().enumerate().all(|(i, y)| ones(y, i % N)), "{found:?}");
    row
}

#[test]
fn what_is_no_number_stays_none_and_harms_no_other_row() {
    for cpu in cpus() {
        for dtype in [DType::F32, DType::BF16] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [0, 127, 128, K - 1] {
                    let mut x = [0.5; K];
                    x[at] = bad;
                    let found = linear(&cpu, &x, dtype);
                    assert!(found.iter().all(|y| !y.is_finite()), "{dtype} {bad} at {at}: {found:?}");
                }
            }
        }
    }
}

#[test]
fn zeros_and_what_is_next_to_them_are_zero() {
    for cpu in cpus() {
        for tiny in [0.0, -0.0, 1e-40, -1e-35] {
            let found = linear(&cpu, &[tiny; K], DType::F32);
            assert!(found.iter().all(|y| y.abs() < 1e-29), "{tiny}: {found:?}");
        }
    }
}

/// The largest input of a block is 127 steps; halves of a step go to the even one.
#[test]
fn inputs_are_rounded_to_steps_of_their_block() {
    for cpu in cpus() {
        let mut x = [0.0; K];
        for (first, step) in [(0, 1.0), (128, 0.25), (256, 4.0)] {
            x[first] = 127.0 * step;
            x[first + 1] = 2.5 * step;
            x[first + 2] = -3.5 * step;
            x[first + 3] = 0.49 * step;
        }
        let sum = (127.0 + 2.0 - 4.0) * (1.0 + 0.25 + 4.0);
        let want: Vec<f32> = (1..=N).map(|n| n as f32 * sum).collect();
        assert_eq!(linear(&cpu, &x, DType::F32), want);
    }
}

#[test]
fn machines_without_the_products_say_so() {
    for isa in [Isa::Avx512, Isa::Avx2, Isa::Portable].into_iter().filter(|isa| isa.is_available()) {
        let plain = cpu(Some(isa), 1);
        assert!(!plain.multiplies_int8() && !plain.capabilities().int8_activations);
        match plain.with_int8_activations() {
            Err(error @ CpuError::NoInt8Products { .. }) => {
                let said = error.to_string();
                assert!(said.contains("VNNI") && said.contains(&isa.to_string()), "{said}");
            }
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("{isa} has no such products"),
        }
    }
}
