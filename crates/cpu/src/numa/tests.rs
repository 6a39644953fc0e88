//! Made-up machines in folders, and the calls on this one.

use super::*;
use crate::{Cpu, CpuOptions};

/// A machine: each node's number, list of CPUs and whether it has memory.
fn machine(nodes: &[(usize, &str, bool)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a folder");
    let with_memory: Vec<String> =
        nodes.iter().filter(|(.., memory)| *memory).map(|(id, ..)| id.to_string()).collect();
    let write = |path: &str, text: &str| fs::write(root.path().join(path), text).expect("room");
    write("has_memory", &format!("{}\n", with_memory.join(",")));
    write("online", "0\n");
    fs::create_dir(root.path().join("power")).expect("a folder");
    for (id, cpus, _) in nodes {
        fs::create_dir(root.path().join(format!("node{id}"))).expect("a folder");
        write(&format!("node{id}/cpulist"), &format!("{cpus}\n"));
    }
    root
}

fn read(nodes: &[(usize, &str, bool)], cpus: &str) -> Result<NumaNodes, CpuError> {
    let cpus = parse_list(cpus).expect("a list");
    NumaNodes::read(machine(nodes).path(), &Allowed { cpus, memory_nodes: None })
}

fn node(id: usize, cpus: &str) -> NumaNode {
    NumaNode { id, cpus: parse_list(cpus).expect("a list") }
}

#[test]
fn lists_are_ranges_and_numbers() {
    let check = |text: &str, expected: Option<&[usize]>| {
        assert_eq!(parse_list(text).as_deref(), expected, "{text:?}");
    };
    check("0-3\n", Some(&[0, 1, 2, 3]));
    check("0-1,8,10-11\n", Some(&[0, 1, 8, 10, 11]));
    check("7", Some(&[7]));
    check("\n", Some(&[]));
    check("", Some(&[]));
    for malformed in ["3-1", "a", "1,", "1-", "-1", "0-99999999999", "1 2"] {
        check(malformed, None);
    }
}

#[test]
fn nodes_are_read_with_holes_and_cut_to_what_is_allowed() {
    let two = [(0, "0-3,8-11", true), (1, "4-7,12-15", true)];
    let nodes = read(&two, "0-15").expect("two nodes");
    assert_eq!(nodes.nodes(), [node(0, "0-3,8-11"), node(1, "4-7,12-15")]);
    assert_eq!(nodes.memory_nodes(), [0, 1]);
    // Numbers with holes, in the order of numbers and not of names.
    let nodes = read(&[(10, "4-5", true), (2, "0-1", true), (0, "2-3", true)], "0-7").expect("three");
    assert_eq!(nodes.nodes(), [node(0, "2-3"), node(2, "0-1"), node(10, "4-5")]);
    // A mask that leaves part of both, and one that cuts a node away: its memory is far then.
    let nodes = read(&two, "0-4").expect("two nodes");
    assert_eq!(nodes.nodes(), [node(0, "0-3"), node(1, "4")]);
    let nodes = read(&two, "5-6").expect("one node");
    assert_eq!((nodes.nodes(), nodes.memory_nodes()), (&[node(1, "5-6")][..], &[1][..]));
    // A control group that forbids a node's memory.
    let allowed = Allowed { cpus: (0..16).collect(), memory_nodes: Some(vec![1]) };
    let nodes = NumaNodes::read(machine(&two).path(), &allowed).expect("two nodes");
    assert_eq!((nodes.nodes().len(), nodes.memory_nodes()), (2, &[1][..]));
}

#[test]
fn memory_without_cpus_is_left_out_and_cpus_without_memory_are_used() {
    let nodes = read(&[(0, "0-3", true), (1, "4-7", true), (2, "", true)], "0-7").expect("two nodes");
    assert_eq!((nodes.nodes().len(), nodes.memory_nodes()), (2, &[0, 1][..]));
    let nodes = read(&[(0, "0-3", true), (1, "4-7", false)], "0-7").expect("two nodes");
    assert_eq!((nodes.nodes().len(), nodes.memory_nodes()), (2, &[0][..]));
    // No memory is near: all there is.
    let nodes = read(&[(0, "0-3", false), (1, "", true), (2, "", true)], "0-7").expect("one node");
    assert_eq!((nodes.nodes().len(), nodes.memory_nodes()), (1, &[1, 2][..]));
}

#[test]
fn an_undescribed_machine_is_one_node_and_a_bad_description_is_named() {
    let allowed = Allowed { cpus: vec![0, 3], memory_nodes: None };
    let root = tempfile::tempdir().expect("a folder");
    let nodes = NumaNodes::read(&root.path().join("absent"), &allowed).expect("one node");
    assert_eq!((nodes.nodes(), nodes.memory_nodes()), (&[node(0, "0,3")][..], &[0][..]));
    // A folder without nodes, and one whose nodes are others' alone.
    for error in [NumaNodes::read(root.path(), &allowed), read(&[(0, "4-7", true)], "0-3")] {
        assert!(matches!(error, Err(CpuError::NumaNoNode { .. })), "{error:?}");
    }
    let error = read(&[(0, "zero", true)], "0-3").expect_err("no list").to_string();
    assert!(error.contains("node0/cpulist is no list of numbers: \"zero\\n\""), "{error}");
    // Kernels of old have no such file; every node counts as having memory.
    let root = machine(&[(0, "0", true), (1, "3", true)]);
    fs::remove_file(root.path().join("has_memory")).expect("it was there");
    assert_eq!(NumaNodes::read(root.path(), &allowed).expect("two nodes").memory_nodes(), [0, 1]);
}

#[test]
fn threads_are_spread_in_proportion_to_cpus() {
    let check = |nodes: &[(usize, &str, bool)], cpus: &str, expected: &[usize]| {
        let nodes = read(nodes, cpus).expect("nodes");
        let spread: Vec<usize> = nodes.spread().take(expected.len()).collect();
        assert_eq!(spread, expected, "{nodes:?}");
    };
    let two = [(0, "0-3", true), (1, "4-7", true)];
    // Fewer threads than CPUs, as many, and more.
    check(&two, "0-7", &[0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]);
    check(&two, "0-3", &[0, 0, 0, 0, 0, 0]);
    check(&two, "0-4", &[0, 0, 0, 0, 1, 0, 0, 0, 0, 1]);
    check(&[(0, "0-3", true), (1, "4-5", true), (7, "8-9", false)], "0-15", &[0, 0, 1, 2, 0, 0, 1, 2]);
    let nodes = read(&[(0, "0-63", true), (3, "64-95", true)], "0-127").expect("nodes");
    for threads in 0..300 {
        let on = |node| nodes.spread().take(threads).filter(|at| *at == node).count();
        assert!(on(0).abs_diff(2 * on(1)) <= 2, "{threads} threads: {} and {}", on(0), on(1));
    }
    assert_eq!(
        nodes.describe(96),
        "NUMA nodes (node 0: threads 64, CPUs 64; node 3: threads 32, CPUs 32), memory on nodes 0, 3"
    );
    assert_eq!(
        read(&two, "1").expect("one").describe(2),
        "one NUMA node (node 0: threads 2, CPUs 1), memory on node 0"
    );
}

#[test]
fn refusals_say_what_they_mean() {
    let text = |errno| {
        CpuError::NumaRefused { call: "mbind", source: io::Error::from_raw_os_error(errno) }.to_string()
    };
    assert!(text(libc::EPERM).contains("mbind") && text(libc::EPERM).contains("--cap-add SYS_NICE"));
    assert!(text(libc::ENOSYS).ends_with("; the kernel is built without NUMA"), "{}", text(libc::ENOSYS));
    assert!(text(libc::EINVAL).contains("Invalid argument"));
}

#[cfg(target_os = "linux")]
mod on_this_machine {
    use r1_backend::{Backend, HostBytes, HostTensor};
    use r1_core::DType;

    use super::super::system::{self, Policy};
    use super::*;
    use crate::WeightMemory;
    use crate::buffer::{Pages, Region};

    /// This machine's nodes and the means to interleave over them; `None` where the system refuses that, and says why.
    fn interleave() -> Option<(NumaNodes, Interleave)> {
        let nodes = NumaNodes::of_this_process().expect("this machine has nodes");
        match Interleave::new(&nodes) {
            Ok(interleave) => Some((nodes, interleave)),
            Err(error) => {
                let CpuError::NumaRefused { source, .. } = &error else { panic!("{error}") };
                let kinds = [io::ErrorKind::PermissionDenied, io::ErrorKind::Unsupported];
                assert!(kinds.contains(&source.kind()), "{error}");
                None
            }
        }
    }

    #[test]
    fn large_memory_is_interleaved_before_it_is_touched() {
        let Some((nodes, interleave)) = interleave() else { return };
        let expected = Policy::interleave(mask(nodes.memory_nodes()));
        let at = |numa| {
            let region = Region::zeroed(5 << 20, Pages::Huge, numa).expect("room");
            let last = region.start.as_ptr().wrapping_add((5 << 20) - 1);
            [region.start.as_ptr(), last].map(|at| system::policy_at(at).expect("a policy"))
        };
        assert_eq!(at(Some(&interleave)), [expected.clone(), expected.clone()]);
        assert!(at(None).iter().all(|policy| *policy != expected));
    }

    #[test]
    fn a_thread_reads_files_under_the_policy_and_has_its_own_again() {
        let Some((nodes, interleave)) = interleave() else { return };
        let before = system::policy().expect("a policy");
        let inside = interleave.reading(|| system::policy().expect("a policy"));
        assert_eq!(inside, Some(Policy::interleave(mask(nodes.memory_nodes()))));
        assert_eq!(system::policy().expect("a policy"), before);
        let caught = std::panic::catch_unwind(|| {
            interleave_in_panic(&interleave);
        });
        assert!(caught.is_err() && system::policy().expect("a policy") == before);
    }

    fn interleave_in_panic(interleave: &Interleave) {
        interleave.reading(|| panic!("a reader's own"));
    }

    #[test]
    fn a_node_that_is_not_there_is_refused() {
        let nodes = NumaNodes { nodes: vec![node(900, "0")], memory: vec![900] };
        let error = Interleave::new(&nodes).err().expect("no such node");
        assert!(matches!(error, CpuError::NumaRefused { call: "mbind", .. }), "{error}");
    }

    #[test]
    fn threads_are_bound_before_they_work() {
        if interleave().is_none() {
            return;
        }
        let nodes = NumaNodes::of_this_process().expect("nodes");
        let before = system::allowed_cpus().expect("CPUs");
        let cpu = Cpu::on_nodes(CpuOptions { threads: Some(3), isa: None }, &nodes, 0).expect("a backend");
        let of_nodes: Vec<&[usize]> = nodes.nodes().iter().map(|node| &node.cpus[..]).collect();
        cpu.engine().pool.run(64, &|_, _| {
            let cpus = system::allowed_cpus().expect("CPUs");
            let is_worker = std::thread::current().name().is_some_and(|name| name.starts_with("cpu-"));
            if is_worker {
                assert!(of_nodes.contains(&&cpus[..]), "{cpus:?}");
            } else {
                assert_eq!(cpus, before);
            }
        });
        let plural = nodes.nodes().len();
        let said =
            if plural == 1 { "on one NUMA node".to_owned() } else { format!("on {plural} NUMA nodes") };
        assert!(cpu.describe().contains(&said), "{}", cpu.describe());
        // CPUs that do not exist cannot be had.
        let absent = NumaNodes { nodes: vec![node(0, "30000")], memory: nodes.memory };
        let error = Cpu::on_nodes(CpuOptions { threads: Some(3), isa: None }, &absent, 0).err();
        assert!(matches!(error, Some(CpuError::Spawn { .. })), "{error:?}");
    }

    struct Asked(std::sync::Mutex<Option<Policy>>, Vec<u8>);

    impl HostBytes for Asked {
        fn bytes(&self) -> &[u8] {
            &self.1
        }

        fn will_read(&self, _range: std::ops::Range<usize>) {
            *self.0.lock().expect("nobody panics") = system::policy().expect("a policy");
        }
    }

    #[test]
    fn weights_are_read_and_copied_interleaved_and_are_the_same() {
        let Some((nodes, _)) = interleave() else { return };
        let expected = Policy::interleave(mask(nodes.memory_nodes()));
        let bytes: Vec<u8> = (0..3 << 20).map(|i| (i % 251) as u8).collect();
        let asked = std::sync::Arc::new(Asked(None.into(), bytes.clone()));
        let host = HostTensor::new(asked.clone(), 0..bytes.len(), &[3, 1 << 20], DType::I8);
        let options = CpuOptions { threads: Some(2), isa: None };
        for memory in [WeightMemory::InPlace, WeightMemory::HugePages] {
            let cpu = Cpu::on_nodes(options, &nodes, 0).expect("a backend").with_weights(memory);
            let tensor = cpu.import_matrix(&host).expect("room");
            let guard = tensor.buffer().read().expect("free");
            // SAFETY: the guard allows reading `len` bytes.
            let got = unsafe { std::slice::from_raw_parts(guard.ptr, guard.len) };
            assert!(got == bytes, "{memory:?}");
            match memory {
                WeightMemory::InPlace => {
                    assert_eq!(asked.0.lock().expect("nobody panics").as_ref(), Some(&expected));
                }
                WeightMemory::HugePages => {
                    assert_eq!(system::policy_at(guard.ptr).expect("a policy"), expected);
                }
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_placement() {
        let Some((nodes, _)) = interleave() else { return };
        let options = CpuOptions { threads: Some(3), isa: None };
        let compute = |cpu: &Cpu| {
            let (tokens, inputs, outputs) = (5, 96, 700);
            let values = |len: usize, seed: usize| -> Vec<f32> {
                (0..len).map(|i| ((i * 2_654_435_761 + seed) % 1009) as f32 / 500.0 - 1.0).collect()
            };
            let import = |shape: [usize; 2], seed| {
                cpu.import(&HostTensor::from_f32(&values(shape[0] * shape[1], seed), &shape)).expect("room")
            };
            let w = r1_backend::Weight::Dense { data: import([outputs, inputs], 3) };
            let out = cpu.alloc(&[tokens, outputs], DType::F32).expect("room");
            cpu.linear(&r1_backend::Activation::dense(import([tokens, inputs], 8)), &w, &out);
            let mut got = vec![0.0_f32; tokens * outputs];
            cpu.download(&out, r1_backend::HostSliceMut::F32(&mut got)).expect("downloads");
            got
        };
        let bound = Cpu::on_nodes(options, &nodes, 0).expect("a backend");
        let free = Cpu::new(options).expect("a backend");
        let (bound, free) = (compute(&bound), compute(&free));
        assert!(free.iter().any(|x| *x != 0.0));
        assert!(bound.iter().zip(&free).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}
