//! Tensor-parallel ranks and pipeline stages compute what one rank does, each from its own part of the checkpoint.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::thread;

use r1_backend::{Backend, Communicator};
use r1_comm::Local;
use r1_cpu::{Cpu, CpuOptions};
use r1_model::MlaForm;
use r1_reference::Reference;
use r1_tests::{Feed, Gap, Golden, Load, teacher_force, teacher_force_stages};

/// The cuts of `toy_ragged_fp8` fall inside FP8 scale blocks.
fn ranks_match<B: Backend>(make: impl Fn() -> B + Sync, name: &str, world: usize) {
    let golden = Golden::open(name);
    let (ids, expected) = (golden.input_ids(), golden.logits("logits"));
    for form in [MlaForm::Absorbed, MlaForm::Expanded] {
        let ranks = Local::group(world, 1 << 20);
        let results: Vec<_> = thread::scope(|scope| {
            let (make, golden, ids) = (&make, &golden, &ids);
            let run = |comm: Local| {
                let comm: Arc<dyn Communicator<B>> = Arc::new(comm);
                let model = Load::f32(form).open_rank(Arc::new(make()), comm.clone(), &golden.dir);
                let logits =
                    teacher_force(&model, &[Feed { tokens: ids, chunk: 9 }, Feed { tokens: ids, chunk: 1 }]);
                comm.check().expect("every collective completed");
                (model.weight_bytes(), logits)
            };
            let threads: Vec<_> = ranks.into_iter().map(|comm| scope.spawn(move || run(comm))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a rank ends")).collect()
        });
        let whole = Load::f32(form).open(Arc::new(make()), &golden.dir).weight_bytes();
        for (weight_bytes, logits) in &results {
            assert!(*weight_bytes < whole, "{name}: a rank holds {weight_bytes} of {whole} bytes");
            for logits in logits {
                let gap = Gap::between(logits, &expected, expected.len() / ids.len());
                assert!(
                    gap.max_abs < 2e-4 && gap.argmax_agree == 1.0,
                    "{name} {form:?} world {world}: {gap:?}"
                );
            }
            assert_eq!(logits, &results[0].1, "every rank has the same bits");
        }
    }
}

#[test]
fn cpu_ranks_match() {
    let make = || Cpu::new(CpuOptions { threads: Some(1), isa: None }).expect("a CPU");
    ranks_match(make, "toy_v3_f32", 2);
    ranks_match(make, "toy_v3_bf16", 4);
    ranks_match(make, "toy_v3_fp8", 2);
    ranks_match(make, "toy_ragged_fp8", 2);
}

#[test]
fn reference_ranks_match() {
    ranks_match(Reference::new, "toy_v3_f32", 2);
    ranks_match(Reference::new, "toy_ragged_fp8", 2);
}

/// Layers cut into stages give the bits of the whole.
#[test]
fn stages_match() {
    let golden = Golden::open("toy_v3_f32");
    let ids = golden.input_ids();
    let feeds = [Feed { tokens: &ids, chunk: 9 }, Feed { tokens: &ids, chunk: 1 }];
    let backend = Arc::new(Cpu::new(CpuOptions { threads: Some(2), isa: None }).expect("a CPU"));
    let load = Load::f32(MlaForm::Auto);
    let whole = load.open(backend.clone(), &golden.dir);
    let last = whole.config().num_hidden_layers;
    assert!(last >= 3, "three stages need three layers");
    let stages = [[0, 1], [1, 2], [2, last]].map(|layers| {
        let load = Load { layers: Some(layers), ..load };
        load.open(backend.clone(), &golden.dir)
    });
    assert_eq!(teacher_force_stages(&stages.each_ref(), &feeds), teacher_force(&whole, &feeds));
}
