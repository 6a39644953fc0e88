//! The conformance suite under every instruction set that this machine has, with one thread and with several, with weights in
//! place and copied into huge pages, with int8 activations, and a whole decoder layer against the oracle.

use r1_cpu::{Cpu, CpuOptions, Isa};

/// A backend, or the best one where the machine lacks `isa`.
fn cpu(isa: Isa, threads: usize) -> Cpu {
    let isa = isa.is_available().then_some(isa);
    Cpu::new(CpuOptions { threads: Some(threads), isa }).expect("threads start")
}

/// A backend with int8 activations, or the best one where the machine lacks their products.
fn int8_cpu(threads: usize) -> Cpu {
    let cpu = cpu(Isa::Avx512Bf16, threads);
    if cpu.multiplies_int8() { cpu.with_int8_activations().expect("it multiplies them") } else { cpu }
}

mod avx512_bf16 {
    r1_backend::conformance_tests!(&super::cpu(r1_cpu::Isa::Avx512Bf16, 2), oracle: &r1_reference::Reference::new());
}

mod avx512_int8_activations {
    r1_backend::conformance_tests!(&super::int8_cpu(2), oracle: &r1_reference::Reference::new());
}

mod avx512 {
    r1_backend::conformance_tests!(&super::cpu(r1_cpu::Isa::Avx512, 2), oracle: &r1_reference::Reference::new());
}

mod avx2 {
    r1_backend::conformance_tests!(&super::cpu(r1_cpu::Isa::Avx2, 3).with_weights(r1_cpu::WeightMemory::HugePages), oracle: &r1_reference::Reference::new());
}

mod portable {
    r1_backend::conformance_tests!(&super::cpu(r1_cpu::Isa::Portable, 1), oracle: &r1_reference::Reference::new());
}
