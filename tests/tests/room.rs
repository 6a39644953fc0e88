//! A model that a device has no room for is refused before a weight of it is read.
#![forbid(unsafe_code)]

use std::sync::Arc;

use r1_backend::{Backend, Communicator};
use r1_comm::Local;
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::Status;
use r1_model::{DeepSeek, MlaForm, ModelError, ModelOptions, WeightFormat};
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
    for (name, worlds) in [
        ("toy_v3_f32", &[1, 2, 4][..]),
        ("toy_v3_bf16", &[1, 4]),
        ("toy_v2_lite", &[1, 4]),
        ("toy_v3_fp8", &[1, 2, 4]),
        ("toy_ragged_fp8", &[1, 2]),
    ] {
        let dir = Golden::open(name).dir;
        let checkpoint = Checkpoint::open(&dir).expect("weights");
        for tie_word_embeddings in [false, true] {
            let config = ModelConfig { tie_word_embeddings, ..ModelConfig::open(&dir).expect("config.json") };
            for &world in worlds {
                let all = [
                    WeightFormat::AsStored,
                    WeightFormat::WidenToBf16,
                    WeightFormat::Int8,
                    WeightFormat::Int4,
                ];
                for weights in all {
                    if weights == WeightFormat::Int4 && world > int4_ranks(name) {
                        continue;
                    }
                    for layers in [None, Some([0, 1]), Some([1, config.num_hidden_layers])] {
                        let load = Load { weights, layers, ..Load::f32(MlaForm::Absorbed) };
                        for comm in Local::group(world, 0) {
                            let options = load.options(comm_rank(&comm), world);
                            let comm: Arc<dyn Communicator<Cpu>> = Arc::new(comm);
                            compare(name, &checkpoint, &config, &options, &comm);
                        }
                    }
                }
            }
        }
    }
}

/// Ranks whose shards of every linear are whole words of int4 codes.
fn int4_ranks(name: &str) -> usize {
    if name == "toy_v3_fp8" { 2 } else { 1 }
}

fn compare(
    name: &str,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    options: &ModelOptions,
    comm: &Arc<dyn Communicator<Cpu>>,
) {
    let open =
        |device| DeepSeek::load(device, comm.clone(), checkpoint, config, options.clone(), &mut |_| {});
    let loaded = open(Arc::new(cpu())).expect("it loads");
    let refused = open(full()).err().expect("there is no room");
    let ModelError::TooLarge { weight_bytes, context_bytes, free_bytes: 0, .. } = refused else {
        panic!("{name}: {refused}")
    };
    let case = format!("{name}, tied {}, {options:?}", config.tie_word_embeddings);
    assert_eq!(weight_bytes, loaded.weight_bytes(), "{case}");
    assert_eq!(context_bytes, loaded.kv_bytes_per_token() * options.max_model_len, "{case}");
}

fn comm_rank(comm: &Local) -> usize {
    Communicator::<Cpu>::rank(comm)
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
