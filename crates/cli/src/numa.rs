//! `--numa`: which nodes the CPU backend's threads and memory are placed on, and what is said about it.

use anyhow::{Context, Result};
use clap::ValueEnum;
use r1_cpu::numa::{NumaNodes, has_memory_policy};
use r1_cpu::{Cpu, CpuError, CpuOptions, WeightMemory};

use crate::log::Said;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Numa {
    /// interleave, where the process may run on more than one node and no memory policy (numactl) is set; else off.
    #[default]
    Auto,
    /// Threads and memory lie where the system puts them.
    Off,
    /// Memory is interleaved over the nodes page by page, and threads are bound to nodes in proportion to their CPUs.
    Interleave,
}

const WAY_OUT: &str = "--numa interleave; --numa off leaves threads and memory to the system";

/// A CPU for each rank, of so many threads each, and what there is to say, where weights are to lie there.
pub(crate) fn open_cpus(
    asked: Numa,
    ranks: usize,
    threads: Option<usize>,
    weights: WeightMemory,
) -> Result<(Vec<Cpu>, Option<Said>)> {
    let options = CpuOptions { threads, isa: None };
    let placed = |nodes: &NumaNodes| -> Result<Vec<Cpu>, CpuError> {
        let mut cpus = Vec::new();
        for _ in 0..ranks {
            let first_thread = cpus.iter().map(Cpu::threads).sum();
            cpus.push(Cpu::on_nodes(options, nodes, first_thread)?);
        }
        Ok(cpus)
    };
    let (nodes, said) = match asked {
        Numa::Off => (None, None),
        Numa::Interleave => (Some(NumaNodes::of_this_process().context(WAY_OUT)?), None),
        Numa::Auto => automatic(NumaNodes::of_this_process(), has_memory_policy),
    };
    let (cpus, said) = match nodes.map(|nodes| (placed(&nodes), nodes)) {
        None => ((0..ranks).map(|_| Cpu::new(options)).collect::<Result<_, _>>()?, said),
        Some((Ok(cpus), nodes)) => {
            let said = placement(&nodes, cpus.iter().map(Cpu::threads).sum(), weights);
            (cpus, Some(Said::Note(said)))
        }
        Some((Err(error), _)) if asked == Numa::Auto => {
            let cpus = (0..ranks).map(|_| Cpu::new(options)).collect::<Result<_, _>>()?;
            (cpus, Some(not_placed(&error)))
        }
        Some((Err(error), _)) => return Err(error).context(WAY_OUT),
    };
    Ok((cpus, said))
}

/// What auto comes to on a machine.
fn automatic(
    nodes: Result<NumaNodes, CpuError>,
    has_policy: impl FnOnce() -> Result<bool, CpuError>,
) -> (Option<NumaNodes>, Option<Said>) {
    match nodes {
        Ok(nodes) if nodes.nodes().len() == 1 => (None, None),
        Ok(nodes) => match has_policy() {
            Ok(true) => {
                let note =
                    "--numa auto leaves threads and memory alone: the process has a memory policy already";
                (None, Some(Said::Note(note.to_owned())))
            }
            Ok(false) => (Some(nodes), None),
            Err(error) => (None, Some(not_placed(&error))),
        },
        Err(CpuError::NumaUnsupported) => (None, None),
        Err(error) => (None, Some(not_placed(&error))),
    }
}

fn not_placed(error: &CpuError) -> Said {
    Said::Warning(format!(
        "--numa auto leaves threads and memory where the system puts them, which on a machine of several nodes can cost half \
         its memory bandwidth: {error}"
    ))
}

fn placement(nodes: &NumaNodes, threads: usize, weights: WeightMemory) -> String {
    let described = nodes.describe(threads);
    if nodes.memory_nodes().len() > 1 && weights == WeightMemory::InPlace {
        format!(
            "{described}; weights that the page cache holds already lie where it put them (--weight-memory huge-pages copies \
             them interleaved)"
        )
    } else {
        described
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use r1_backend::Backend;
    use r1_cpu::numa::Allowed;

    use super::*;

    fn machine(cpulists: &[&str]) -> NumaNodes {
        let root = tempfile::tempdir().unwrap();
        for (id, cpus) in cpulists.iter().enumerate() {
            std::fs::create_dir(root.path().join(format!("node{id}"))).unwrap();
            std::fs::write(root.path().join(format!("node{id}/cpulist")), cpus).unwrap();
        }
        NumaNodes::read(root.path(), &Allowed { cpus: (0..64).collect(), memory_nodes: None }).unwrap()
    }

    fn refused() -> CpuError {
        CpuError::NumaRefused { call: "get_mempolicy", source: Error::from(ErrorKind::PermissionDenied) }
    }

    #[test]
    fn auto_places_on_several_nodes_alone() {
        let two = || machine(&["0-3", "4-7"]);
        assert_eq!(automatic(Ok(machine(&["0-3"])), || unreachable!("nobody asks")), (None, None));
        assert_eq!(automatic(Ok(two()), || Ok(false)), (Some(two()), None));
        assert_eq!(automatic(Err(CpuError::NumaUnsupported), || Ok(false)), (None, None));
        let (nodes, said) = automatic(Ok(two()), || Ok(true));
        assert!(
            nodes.is_none()
                && matches!(said, Some(Said::Note(note)) if note.contains("memory policy already"))
        );
        for (nodes, said) in
            [automatic(Ok(two()), || Err(refused())), automatic(Err(refused()), || Ok(false))]
        {
            let Some(Said::Warning(text)) = said else { panic!("{said:?}") };
            assert!(nodes.is_none() && text.contains("get_mempolicy") && text.contains("SYS_NICE"), "{text}");
        }
    }

    #[test]
    fn what_is_said_of_weights_in_place_is_said_where_it_matters() {
        let two = machine(&["0-3", "4-7"]);
        let said = placement(&two, 6, WeightMemory::InPlace);
        assert!(said.starts_with(
            "NUMA nodes (node 0: threads 3, CPUs 4; node 1: threads 3, CPUs 4), memory on nodes 0, 1; "
        ));
        assert!(said.contains("--weight-memory huge-pages"), "{said}");
        assert!(!placement(&two, 6, WeightMemory::HugePages).contains("page cache"));
        assert!(!placement(&machine(&["0-3"]), 6, WeightMemory::InPlace).contains("page cache"));
    }

    #[test]
    fn ranks_get_their_threads_and_what_was_asked_for() {
        let (cpus, said) = open_cpus(Numa::Off, 2, Some(2), WeightMemory::InPlace).unwrap();
        assert_eq!((cpus.len(), cpus[1].threads(), said), (2, 2, None));
        assert!(!cpus[0].describe().contains("NUMA"));
        match open_cpus(Numa::Interleave, 2, Some(2), WeightMemory::InPlace) {
            Ok((cpus, said)) => {
                assert!(
                    cpus.iter().all(|cpu| cpu.describe().contains("NUMA node")),
                    "{}",
                    cpus[0].describe()
                );
                let Some(Said::Note(said)) = said else { panic!("{said:?}") };
                assert!(said.contains("threads "), "{said}");
            }
            // Not Linux, or a container without the capability.
            Err(error) => assert!(format!("{error:#}").contains("--numa off"), "{error:#}"),
        }
    }
}
