//! Tensor-parallel ranks and pipeline stages compute what one rank does, each from its own part of the checkpoint.
#![forbid(unsafe_code)]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use r1_backend::{Backend, CommError, Communicator};
use r1_comm::Local;
use r1_core::DType;
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::{Connect, connect_in_host_memory};
use r1_gpu::Gpu;
use r1_model::{DeepSeek, MlaForm, StepError};
use r1_reference::Reference;
use r1_tests::{
    Faulty, Feed, Feeder, Fuse, Gap, Golden, Load, emulated, teacher_force, teacher_force_stages,
};
use r1_weights::{Checkpoint, HostLinear, ModelConfig, Partition};

/// A device and its end of the group.
type Placed<B> = (Arc<B>, Arc<dyn Communicator<B>>);

/// Ranks that meet in host memory.
fn in_host_memory<B: Backend>(make: impl Fn() -> B) -> impl Fn(usize) -> Vec<Placed<B>> {
    move |world| {
        let ranks = Local::group(world, 1 << 20).into_iter();
        ranks.map(|rank| (Arc::new(make()), Arc::new(rank) as Arc<dyn Communicator<B>>)).collect()
    }
}

/// Emulated GPUs with collectives on their own streams.
fn emulated_ranks(world: usize) -> Vec<Placed<Gpu>> {
    let devices = emulated(world);
    let group = Gpu::connect(&devices, 1 << 20).expect("a group");
    devices.into_iter().zip(group).collect()
}

fn ranks_match<B: Backend>(place: impl Fn(usize) -> Vec<Placed<B>>, name: &str, world: usize, load: Load) {
    let golden = Golden::open(name);
    let (ids, expected) = (golden.input_ids(), golden.logits("logits"));
    for form in [MlaForm::Absorbed, MlaForm::Expanded] {
        let load = Load { form, ..load };
        let results: Vec<_> = thread::scope(|scope| {
            let (golden, ids) = (&golden, &ids);
            let run = |(device, comm): Placed<B>| {
                let model = load.open_rank(device, comm.clone(), &golden.dir);
                let logits =
                    teacher_force(&model, &[Feed { tokens: ids, chunk: 9 }, Feed { tokens: ids, chunk: 1 }]);
                comm.check().expect("every collective completed");
                (model.weight_bytes(), logits)
            };
            let threads: Vec<_> =
                place(world).into_iter().map(|placed| scope.spawn(move || run(placed))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a rank ends")).collect()
        });
        let whole = load.open(place(1).remove(0).0, &golden.dir).weight_bytes();
        for (weight_bytes, logits) in &results {
            let limit = if world == 2 { whole * 2 / 3 } else { whole / 2 };
            assert!(*weight_bytes < limit, "{name}: a rank of {world} holds {weight_bytes} of {whole} bytes");
            for logits in logits {
                let gap = Gap::between(logits, &expected, expected.len() / ids.len());
                let close = match load.dtype {
                    DType::F32 => gap.max_abs < 2e-4 && gap.argmax_agree == 1.0,
                    _ => gap.mean_abs < 2.0 * golden.fact("/gaps/bf16/mean_abs"),
                };
                assert!(close, "{name} {load:?} world {world}: {gap:?}");
            }
            assert_eq!(logits, &results[0].1, "every rank has the same bits");
        }
    }
}

#[test]
fn cpu_ranks_match() {
    let make = || Cpu::new(CpuOptions { threads: Some(1), isa: None }).expect("a CPU");
    let load = Load::f32(MlaForm::Auto);
    ranks_match(in_host_memory(make), "toy_v3_f32", 2, load);
    ranks_match(in_host_memory(make), "toy_v3_bf16", 4, load);
    ranks_match(in_host_memory(make), "toy_v2_lite", 4, load);
    ranks_match(in_host_memory(make), "toy_v3_fp8", 2, load);
    ranks_match(in_host_memory(make), "toy_v3_fp8", 4, load);
    ranks_match(in_host_memory(make), "toy_ragged_fp8", 2, load);
}

#[test]
fn reference_ranks_match() {
    let load = Load::f32(MlaForm::Auto);
    ranks_match(in_host_memory(Reference::new), "toy_v3_f32", 2, load);
    ranks_match(in_host_memory(Reference::new), "toy_ragged_fp8", 2, load);
    ranks_match(in_host_memory(Reference::new), "toy_v3_fp8", 4, load);
}

/// 128 tokens of vocabulary divide among 2 and 4.
#[test]
fn emulated_ranks_match() {
    let load = Load::f32(MlaForm::Auto);
    ranks_match(emulated_ranks, "toy_v2_lite", 2, load);
    ranks_match(emulated_ranks, "toy_ragged_fp8", 2, load);
    ranks_match(emulated_ranks, "toy_v3_fp8", 4, load);
    ranks_match(emulated_ranks, "toy_v3_fp8", 2, Load { dtype: DType::BF16, ..load });
}

/// So that the tests above say something of shards that begin inside an FP8 scale block, in rows and in columns.
#[test]
fn cuts_fall_inside_scale_blocks() {
    for (name, world) in [("toy_ragged_fp8", 2), ("toy_v3_fp8", 4)] {
        let dir = Golden::open(name).dir;
        let config = ModelConfig::open(&dir).expect("config.json");
        let checkpoint = Checkpoint::open(&dir).expect("weights");
        let (hidden, width) = (config.hidden_size, config.intermediate_size);
        let cut = |linear: &str, n, k, partition| {
            let prefix = format!("model.layers.0.mlp.{linear}");
            match checkpoint.linear(&prefix, n, k, config.quantization.as_ref(), partition) {
                Ok(HostLinear::Fp8Block { offset, .. }) => offset,
                other => panic!("{name}: {prefix} is {other:?}"),
            }
        };
        let rank = 1;
        assert_eq!(cut("gate_proj", width, hidden, Partition::Column { rank, world }), [width / world, 0]);
        assert_eq!(cut("down_proj", hidden, width, Partition::Row { rank, world }), [0, width / world]);
        assert!(width / world % 128 != 0, "{name}");
    }
}

/// Every tensor lies on one rank, but for those that all need whole.
#[test]
fn ranks_hold_their_shards_only() {
    let backend = Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).expect("a CPU"));
    for (name, world) in [("toy_v3_f32", 2), ("toy_v3_f32", 4), ("toy_v2_lite", 4)] {
        let dir = Golden::open(name).dir;
        let checkpoint = Checkpoint::open(&dir).expect("weights");
        let replicated = ["norm.weight", ".mlp.gate.", ".q_a_proj.", ".kv_a_proj_with_mqa."];
        let (mut shared, mut cut) = (0, 0);
        for tensor in checkpoint.names() {
            let size = checkpoint.info(tensor).expect("it has the name").size_bytes;
            *if replicated.iter().any(|part| tensor.contains(part)) { &mut shared } else { &mut cut } += size;
        }
        for comm in Local::group(world, 0) {
            let model = Load::f32(MlaForm::Auto).open_rank(backend.clone(), Arc::new(comm), &dir);
            assert_eq!(model.weight_bytes(), shared + cut / world, "{name}, {world} ranks");
        }
    }
}

/// A head that is the embedding's table: one shard of it serves both, held once.
#[test]
fn tied_heads_are_cut_with_their_table() {
    let golden = Golden::open("toy_v3_f32");
    let dir = tempfile::tempdir().expect("a folder");
    let config = fs::read_to_string(golden.dir.join("config.json")).expect("config.json");
    let mut config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    config["tie_word_embeddings"] = true.into();
    fs::write(dir.path().join("config.json"), config.to_string()).expect("a file");
    fs::copy(golden.dir.join("model.safetensors"), dir.path().join("model.safetensors")).expect("a copy");
    let make = || Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).expect("a CPU"));
    let (load, ids) = (Load::f32(MlaForm::Absorbed), golden.input_ids());
    let feeds = [Feed { tokens: &ids, chunk: 9 }];
    let one = load.open(make(), dir.path());
    let expected = &teacher_force(&one, &feeds)[0];
    let ranks: Vec<_> = thread::scope(|scope| {
        let run = |comm| {
            let model = load.open_rank(make(), Arc::new(comm), dir.path());
            let table = model.config().vocab_size * model.config().hidden_size * 4;
            (teacher_force(&model, &feeds).remove(0), model.weight_bytes(), table)
        };
        let threads: Vec<_> =
            Local::group(2, 1 << 20).into_iter().map(|comm| scope.spawn(move || run(comm))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank ends")).collect()
    });
    let untied = load.open(make(), &golden.dir);
    for (logits, weight_bytes, table) in &ranks {
        let gap = Gap::between(logits, expected, one.config().vocab_size);
        assert!(gap.max_abs < 2e-4 && gap.argmax_agree == 1.0, "{gap:?}");
        assert_eq!(one.weight_bytes() + table, untied.weight_bytes());
        assert!(*weight_bytes < one.weight_bytes() * 2 / 3);
    }
    assert!(Gap::between(expected, &golden.logits("logits"), one.config().vocab_size).max_abs > 0.1);
}

#[test]
fn a_vocabulary_that_ranks_do_not_divide_is_refused() {
    let dir = Golden::open("toy_v3_f32").dir;
    let mut config = ModelConfig::open(&dir).expect("config.json");
    config.vocab_size = 127;
    let checkpoint = Checkpoint::open(&dir).expect("weights");
    let comm = Arc::new(Local::group(2, 0).remove(0));
    let options = Load::f32(MlaForm::Auto).options(0, 2);
    let loaded = DeepSeek::load(Arc::new(Reference::new()), comm, &checkpoint, &config, options, &mut |_| {});
    let error = loaded.err().expect("127 rows are odd");
    assert_eq!(
        error.to_string(),
        "vocab_size is 127, which 2 tensor-parallel ranks do not divide evenly; choose another --tp"
    );
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

/// Two ranks of which the second panics in its `fails_at`-th sum, 0 for never; both then meet in a new group, run the step
/// again, and go on to the end. Gives both ranks' logits and how many steps failed on the first.
fn two_ranks<B: Backend>(
    devices: &[Arc<B>],
    connect: &Connect<B>,
    fails_at: usize,
) -> Vec<(Vec<Vec<f32>>, usize)> {
    let golden = Golden::open("toy_v3_f32");
    let ids = golden.input_ids();
    let feeds = [Feed { tokens: &ids, chunk: 5 }, Feed { tokens: &ids, chunk: 1 }];
    let group = || connect(devices, 1 << 20).expect("a group");
    let (first, second) = (group(), group());
    let run = |backend: Arc<B>, first: Arc<dyn Communicator<B>>, second: Arc<dyn Communicator<B>>| {
        let rank = first.rank();
        let fuse = Fuse::new((if rank == 1 { fails_at } else { 0 }).into());
        let comm = Arc::new(Faulty { inner: first, fuse, checks: Fuse::default() });
        let mut model = Load::f32(MlaForm::Absorbed).open_rank(backend, comm, &golden.dir);
        let mut feeder = Feeder::new(&[&model], &feeds);
        let (mut failures, mut second) = (0, Some(second));
        loop {
            match catch_unwind(AssertUnwindSafe(|| feeder.step(&[&model]))) {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return (feeder.logits, failures),
                Ok(Err(error)) => {
                    let gone = CommError::PeerGone { op: "all_reduce", rank: 1 };
                    assert!(rank == 0 && error == StepError::Comm(gone), "rank {rank}: {error}");
                    failures += 1;
                }
                Err(panic) => {
                    assert_eq!(panic.downcast_ref::<&str>(), Some(&"injected"), "rank {rank}");
                    failures += 1;
                }
            }
            if failures > 0
                && let Some(second) = second.take()
            {
                model.leave();
                assert_eq!(model.finish(), Ok(()), "a rank without a group has no failure of one");
                let alone = catch_unwind(AssertUnwindSafe(|| feeder.step(&[&model]))).expect_err("a panic");
                let message = alone
                    .downcast_ref::<String>()
                    .map_or_else(|| (*alone.downcast_ref::<&str>().expect("words")).to_owned(), Clone::clone);
                assert!(message.contains("has left its own"), "{message}");
                model.join(second);
            }
        }
    };
    thread::scope(|scope| {
        let ranks = devices.iter().cloned().zip(first).zip(second);
        let threads: Vec<_> =
            ranks.map(|((device, first), second)| scope.spawn(move || run(device, first, second))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank ends")).collect()
    })
}

fn go_on_in_a_new_group<B: Backend>(
    devices: impl Fn() -> Vec<Arc<B>> + Send + 'static,
    connect: Connect<B>,
    failures: &'static [usize],
) {
    let (done, finished) = mpsc::channel();
    thread::spawn(move || {
        let undisturbed = two_ranks(&devices(), &connect, 0);
        for &fails_at in failures {
            let disturbed = two_ranks(&devices(), &connect, fails_at);
            for ((logits, failures), (expected, none)) in disturbed.iter().zip(&undisturbed) {
                assert_eq!((*failures, *none), (1, 0), "sum {fails_at}");
                assert_eq!(logits, expected, "sum {fails_at}");
            }
        }
        done.send(()).expect("somebody waits");
    });
    finished.recv_timeout(Duration::from_mins(2)).expect("the ranks neither hang nor fail");
}

/// A rank that panics in a step frees the other, and in a new group both give what they would have given. A step of three
/// layers has seven sums: the embedding's, and two for each layer.
#[test]
fn ranks_go_on_in_a_new_group_after_a_panic() {
    let cpu = || Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).expect("a CPU"));
    go_on_in_a_new_group(move || vec![cpu(), cpu()], connect_in_host_memory(), &[1, 8, 11, 14]);
}

#[test]
fn emulated_ranks_go_on_in_a_new_group_after_a_panic() {
    go_on_in_a_new_group(|| emulated(2), Arc::new(Gpu::connect), &[1, 11]);
}
