//! A model that a device has no room for is refused before a weight of it is read.
#![forbid(unsafe_code)]

use std::sync::Arc;

use r1_backend::Backend;
use r1_comm::Local;
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::Status;
use r1_model::{DeepSeek, MlaForm, ModelError, WeightFormat};
use r1_tests::{Golden, Load, Tiny};
use r1_weights::{Checkpoint, ModelConfig};

fn cpu() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(1), isa: None }).expect("a CPU")
}

/// A device whose part of the machine's memory is nothing.
fn full() -> Arc<Cpu> {
    let full = cpu().sharing_memory(usize::MAX);
    assert_eq!(full.free_bytes(), Some(0));
    Arc::new(full)
}

/// The refusal names the bytes that a rank would have held: what one with room holds once it is loaded.
#[test]
fn the_bytes_of_every_shard_are_known_before_it_is_read() {
    let stages = [None, Some([0, 1]), Some([1, 3])];
    for (name, worlds) in [
        ("toy_v3_f32", &[1, 2, 4][..]),
        ("toy_v3_bf16", &[1, 4]),
        ("toy_v2_lite", &[1, 4]),
        ("toy_v3_fp8", &[1, 2, 4]),
        ("toy_ragged_fp8", &[1, 2]),
    ] {
        let dir = Golden::open(name).dir;
        let (config, checkpoint) = (ModelConfig::open(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
        for &world in worlds {
            for weights in [WeightFormat::AsStored, WeightFormat::WidenToBf16] {
                for layers in stages {
                    let load = Load { weights, layers, ..Load::f32(MlaForm::Absorbed) };
                    for comm in Local::group(world, 0) {
                        let (options, comm) = (load.options(comm_rank(&comm), world), Arc::new(comm));
                        let open = |device| {
                            let options = options.clone();
                            DeepSeek::load(device, comm.clone(), &checkpoint, &config, options, &mut |_| {})
                        };
                        let loaded = open(Arc::new(cpu())).expect("it loads");
                        let refused = open(full()).err().expect("there is no room");
                        let ModelError::TooLarge { weight_bytes, context_bytes, free_bytes: 0, .. } = refused
                        else {
                            panic!("{name}: {refused}")
                        };
                        let case =
                            format!("{name}, rank {} of {world}, {weights:?}, {layers:?}", options.rank);
                        assert_eq!(weight_bytes, loaded.weight_bytes(), "{case}");
                        let context = loaded.kv_bytes_per_token() * options.max_model_len;
                        assert_eq!(context_bytes, context, "{case}");
                    }
                }
            }
        }
    }
}

fn comm_rank(comm: &Local) -> usize {
    r1_backend::Communicator::<Cpu>::rank(comm)
}

#[test]
fn the_refusal_says_what_to_change() {
    let tiny = Tiny::default();
    let (handle, inbox) = tiny.channel();
    let ranks = tiny.ranks_on(vec![full()]);
    r1_engine::spawn(inbox, tiny.engine(), Arc::new(ranks)).join().expect("no panic leaves the thread");
    let Status::Failed(why) = handle.status() else { panic!("{:?}", handle.status()) };
    for part in ["rank 0 of 1", "0.00 GiB are free", "--tp", "--max-model-len 512", "smaller model"] {
        assert!(why.contains(part), "{why}");
    }
}
