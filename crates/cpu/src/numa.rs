//! NUMA: which nodes this process may use, how threads are spread over them, and memory that is interleaved over them.
//! Knows no tensors.

mod system;

use std::ffi::c_ulong;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::ptr::NonNull;

use crate::CpuError;

/// Where Linux describes the nodes.
const ROOT: &str = "/sys/devices/system/node";
/// Linux numbers neither CPUs nor nodes so high, and takes no longer mask.
const MAX_IDS: usize = 1 << 15;

/// What a process may use of a machine.
#[derive(Clone, Debug)]
pub struct Allowed {
    /// CPUs that its threads may run on.
    pub cpus: Vec<usize>,
    /// Nodes that its memory may lie on; `None`: all.
    pub memory_nodes: Option<Vec<usize>>,
}

/// A node with CPUs that this process may run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaNode {
    /// The system's number.
    pub id: usize,
    /// Those of its CPUs that the process may run on; not empty.
    pub cpus: Vec<usize>,
}

/// The nodes that a process runs on, at least one, and those that its memory is interleaved over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaNodes {
    nodes: Vec<NumaNode>,
    memory: Vec<usize>,
}

impl NumaNodes {
    /// Those of this process. One, where the system describes none.
    ///
    /// # Errors
    /// [`CpuError::NumaUnsupported`] where this is not Linux, [`CpuError::NumaUnreadable`], [`CpuError::NumaMalformed`] and
    /// [`CpuError::NumaNoNode`] where its description is not what Linux writes, and [`CpuError::NumaRefused`].
    pub fn of_this_process() -> Result<Self, CpuError> {
        if cfg!(not(target_os = "linux")) {
            return Err(CpuError::NumaUnsupported);
        }
        let cpus = system::allowed_cpus()
            .map_err(|source| CpuError::NumaRefused { call: "sched_getaffinity", source })?;
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:"));
        Self::read(Path::new(ROOT), &Allowed { cpus, memory_nodes: line.and_then(parse_list) })
    }

    /// As the folder `root` describes them, for a process that may use `allowed` of them. One node with all CPUs where there is
    /// no such folder, as in some containers and in kernels without NUMA.
    ///
    /// Memory is interleaved over the nodes that have both CPUs and memory: nodes of memory alone are another kind of it,
    /// slower or smaller.
    ///
    /// # Errors
    /// As for [`NumaNodes::of_this_process`].
    pub fn read(root: &Path, allowed: &Allowed) -> Result<Self, CpuError> {
        let unreadable = |path: &Path, source| CpuError::NumaUnreadable { path: path.to_path_buf(), source };
        let entries = match fs::read_dir(root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let node = NumaNode { id: 0, cpus: allowed.cpus.clone() };
                return Ok(Self { nodes: vec![node], memory: vec![0] });
            }
            Err(source) => return Err(unreadable(root, source)),
        };
        let list = |path: &Path| -> Result<Option<Vec<usize>>, CpuError> {
            match fs::read_to_string(path) {
                Ok(text) => parse_list(&text)
                    .map(Some)
                    .ok_or_else(|| CpuError::NumaMalformed { path: path.to_path_buf(), text }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(unreadable(path, source)),
            }
        };
        let mut ids = Vec::new();
        for entry in entries {
            let name = entry.map_err(|source| unreadable(root, source))?.file_name();
            ids.extend(name.to_str().and_then(|name| name.strip_prefix("node")?.parse::<usize>().ok()));
        }
        ids.sort_unstable();
        let has_memory = list(&root.join("has_memory"))?;
        let is_allowed = |id: &usize| {
            let lists = [&has_memory, &allowed.memory_nodes];
            lists.into_iter().flatten().all(|list| list.contains(id))
        };
        let with_memory: Vec<usize> = ids.iter().copied().filter(is_allowed).collect();
        let mut nodes = Vec::new();
        for id in ids {
            let mut cpus = list(&root.join(format!("node{id}/cpulist")))?.unwrap_or_default();
            cpus.retain(|cpu| allowed.cpus.contains(cpu));
            if !cpus.is_empty() {
                nodes.push(NumaNode { id, cpus });
            }
        }
        if nodes.is_empty() {
            return Err(CpuError::NumaNoNode { root: root.to_path_buf() });
        }
        let near: Vec<usize> =
            with_memory.iter().copied().filter(|id| nodes.iter().any(|node| node.id == *id)).collect();
        let memory = if near.is_empty() { with_memory } else { near };
        Ok(Self { nodes, memory })
    }

    /// The nodes with CPUs, by number.
    pub fn nodes(&self) -> &[NumaNode] {
        &self.nodes
    }

    /// Numbers of the nodes that memory is interleaved over.
    pub fn memory_nodes(&self) -> &[usize] {
        &self.memory
    }

    /// For each of any number of threads the node that it runs on, an index into [`NumaNodes::nodes`]: each next thread goes
    /// where threads are fewest for the CPUs there.
    pub fn spread(&self) -> impl Iterator<Item = usize> {
        let mut threads = vec![0; self.nodes.len()];
        std::iter::repeat_with(move || {
            // a / b < c / d, as whole numbers.
            let crowded = |&a: &usize, &b: &usize| {
                ((threads[a] + 1) * self.nodes[b].cpus.len())
                    .cmp(&((threads[b] + 1) * self.nodes[a].cpus.len()))
            };
            let node = (0..self.nodes.len()).min_by(crowded).expect("there is a node");
            threads[node] += 1;
            node
        })
    }

    /// One line: the nodes, and how `threads` are spread over them.
    pub fn describe(&self, threads: usize) -> String {
        let mut counts = vec![0; self.nodes.len()];
        self.spread().take(threads).for_each(|node| counts[node] += 1);
        let each: Vec<String> = self
            .nodes
            .iter()
            .zip(counts)
            .map(|(node, count)| format!("node {}: threads {count}, CPUs {}", node.id, node.cpus.len()))
            .collect();
        let nodes = if self.nodes.len() == 1 { "one NUMA node" } else { "NUMA nodes" };
        format!("{nodes} ({}), memory on {}", each.join("; "), Ids(&self.memory))
    }
}

/// Numbers of nodes, as a sentence has them.
struct Ids<'a>(&'a [usize]);

impl fmt::Display for Ids<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(usize::to_string).collect();
        match &names[..] {
            [] => f.write_str("no node"),
            [one] => write!(f, "node {one}"),
            more => write!(f, "nodes {}", more.join(", ")),
        }
    }
}

/// Whether this thread's memory is placed by a policy already, `numactl`'s, say.
///
/// # Errors
/// [`CpuError::NumaRefused`].
pub fn has_memory_policy() -> Result<bool, CpuError> {
    let policy =
        system::policy().map_err(|source| CpuError::NumaRefused { call: "get_mempolicy", source })?;
    Ok(policy.is_some())
}

/// Numbers of a list such as `0-3,8,10-11`; `None` of anything else.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|_| !text.trim().is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MAX_IDS {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// Bits of those numbers, in the words that the system takes.
fn mask(numbers: &[usize]) -> Vec<c_ulong> {
    let bits = c_ulong::BITS as usize;
    let mut words = vec![0; numbers.iter().max().map_or(1, |max| max / bits + 1)];
    for number in numbers {
        words[number / bits] |= 1 << (number % bits);
    }
    words
}

/// Lets the calling thread run on those CPUs alone.
pub(crate) fn bind_thread(cpus: &[usize]) -> io::Result<()> {
    system::bind_thread(&mask(cpus))
}

/// Memory that is interleaved over nodes, page by page.
pub(crate) struct Interleave {
    policy: system::Policy,
    num_nodes: usize,
}

impl Interleave {
    /// Asks the system whether it does that; containers often forbid it.
    pub(crate) fn new(nodes: &NumaNodes) -> Result<Self, CpuError> {
        let policy = system::Policy::interleave(mask(&nodes.memory));
        let refused = |call| move |source| CpuError::NumaRefused { call, source };
        system::probe(&policy).map_err(refused("mbind"))?;
        let before = system::policy().map_err(refused("get_mempolicy"))?;
        system::set_policy(Some(&policy)).map_err(refused("set_mempolicy"))?;
        system::set_policy(before.as_ref()).map_err(refused("set_mempolicy"))?;
        Ok(Self { policy, num_nodes: nodes.nodes.len() })
    }

    pub(crate) fn num_nodes(&self) -> usize {
        self.num_nodes
    }

    /// Interleaves pages that nobody has touched yet.
    ///
    /// # Safety
    /// The range is a mapping of this process, from its first page on.
    pub(crate) unsafe fn bind(&self, start: NonNull<u8>, len: usize) -> io::Result<()> {
        // SAFETY: the caller says so.
        unsafe { system::bind_range(start, len, &self.policy) }
    }

    /// Runs `read`, which brings files into the page cache: pages that are not there yet are interleaved, as
    /// pages of a file go where the thread wants them that reads them first. Those that are there stay.
    pub(crate) fn reading<R>(&self, read: impl FnOnce() -> R) -> R {
        struct Restore(Option<system::Policy>);
        impl Drop for Restore {
            fn drop(&mut self) {
                // What was set a moment ago, and what the system gave as the thread's own, it takes.
                let _taken = system::set_policy(self.0.as_ref());
            }
        }
        let _restore = system::policy().ok().and_then(|before| {
            // `new` has seen that it is allowed; should memory for it lack, pages lie where they would without it.
            system::set_policy(Some(&self.policy)).ok()?;
            Some(Restore(before))
        });
        read()
    }
}

#[cfg(test)]
mod tests;
