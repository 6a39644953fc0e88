//! The system calls behind [`numa`](super): affinity and memory policies of Linux, which its C library does not wrap. Elsewhere
//! they are refused. Knows no topology.

#[cfg(target_os = "linux")]
pub(super) use linux::*;
#[cfg(not(target_os = "linux"))]
pub(super) use other::*;

#[cfg(target_os = "linux")]
mod linux {
    use std::ffi::{c_int, c_long, c_ulong};
    use std::io;
    use std::ptr::{self, NonNull};

    use crate::numa::MAX_IDS;

    /// Words of the masks that the system writes.
    const WORDS: usize = MAX_IDS / c_ulong::BITS as usize;

    /// Where a thread's, or a range's, pages go. Its nodes are bits.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub(crate) struct Policy {
        pub(crate) mode: c_int,
        pub(crate) nodes: Vec<c_ulong>,
    }

    impl Policy {
        pub(crate) fn interleave(nodes: Vec<c_ulong>) -> Self {
            Self { mode: libc::MPOL_INTERLEAVE, nodes }
        }

        /// What the system takes as the mask's size: it reads one bit less.
        fn max_node(&self) -> usize {
            self.nodes.len() * c_ulong::BITS as usize + 1
        }
    }

    fn done(status: c_long) -> io::Result<()> {
        if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// CPUs that the calling thread may run on.
    pub(crate) fn allowed_cpus() -> io::Result<Vec<usize>> {
        let mut words: Vec<c_ulong> = vec![0; WORDS];
        // SAFETY: the system writes at most the size that it is told.
        done(unsafe {
            libc::syscall(libc::SYS_sched_getaffinity, 0, size_of_val(&words[..]), words.as_mut_ptr())
        })?;
        let bits = c_ulong::BITS as usize;
        Ok((0..words.len() * bits).filter(|cpu| words[cpu / bits] >> (cpu % bits) & 1 == 1).collect())
    }

    pub(crate) fn bind_thread(cpus: &[c_ulong]) -> io::Result<()> {
        // SAFETY: the system reads the size that it is told.
        done(unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(cpus), cpus.as_ptr()) })
    }

    /// The calling thread's policy; `None`: the system's default.
    pub(crate) fn policy() -> io::Result<Option<Policy>> {
        let policy = ask(ptr::null())?;
        Ok((policy.mode != libc::MPOL_DEFAULT).then_some(policy))
    }

    /// The policy of the page at `address`.
    #[cfg(test)]
    pub(crate) fn policy_at(address: *const u8) -> io::Result<Policy> {
        ask(address)
    }

    fn ask(address: *const u8) -> io::Result<Policy> {
        /// The policy of an address, not of the thread.
        const MPOL_F_ADDR: c_int = 1 << 1;
        let flags = if address.is_null() { 0 } else { MPOL_F_ADDR };
        let mut policy = Policy { mode: 0, nodes: vec![0; WORDS] };
        let max_node = policy.max_node();
        // SAFETY: the system writes a mode, and no more bits than the mask has.
        done(unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut policy.mode,
                policy.nodes.as_mut_ptr(),
                max_node,
                address,
                flags,
            )
        })?;
        let used = policy.nodes.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        policy.nodes.truncate(used);
        Ok(policy)
    }

    /// Sets the calling thread's policy.
    pub(crate) fn set_policy(policy: Option<&Policy>) -> io::Result<()> {
        let (mode, nodes, max_node) = match policy {
            None => (libc::MPOL_DEFAULT, ptr::null(), 0),
            // A mode without nodes takes no mask.
            Some(policy) if policy.nodes.is_empty() => (policy.mode, ptr::null(), 0),
            Some(policy) => (policy.mode, policy.nodes.as_ptr(), policy.max_node()),
        };
        // SAFETY: the system reads no more bits than the mask has.
        done(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, nodes, max_node) })
    }

    /// Gives a range its policy.
    ///
    /// # Safety
    /// The range is a mapping of this process, from its first page on.
    pub(crate) unsafe fn bind_range(start: NonNull<u8>, len: usize, policy: &Policy) -> io::Result<()> {
        // SAFETY: the range is a mapping, whose contents the call does not change; the system reads no more bits than the mask has.
        done(unsafe {
            libc::syscall(
                libc::SYS_mbind,
                start.as_ptr(),
                len,
                policy.mode,
                policy.nodes.as_ptr(),
                policy.max_node(),
                0,
            )
        })
    }

    /// Tries the policy on a page of its own.
    pub(crate) fn probe(policy: &Policy) -> io::Result<()> {
        const LEN: usize = 1;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping touches no memory that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), LEN, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(start.cast::<u8>()).expect("a mapping is not at zero");
        // SAFETY: the range is the new mapping.
        let bound = unsafe { bind_range(page, LEN, policy) };
        // SAFETY: mapped above with this length, and nobody else knows it.
        unsafe { libc::munmap(start, LEN) };
        bound
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use std::ffi::c_ulong;
    use std::io;
    use std::ptr::NonNull;

    /// Nothing makes one use of it here.
    pub(crate) struct Policy;

    impl Policy {
        pub(crate) fn interleave(_nodes: Vec<c_ulong>) -> Self {
            Self
        }
    }

    fn refused<T>() -> io::Result<T> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "memory is placed on nodes on Linux alone"))
    }

    pub(crate) fn allowed_cpus() -> io::Result<Vec<usize>> {
        refused()
    }

    pub(crate) fn bind_thread(_cpus: &[c_ulong]) -> io::Result<()> {
        refused()
    }

    pub(crate) fn policy() -> io::Result<Option<Policy>> {
        refused()
    }

    pub(crate) fn set_policy(_policy: Option<&Policy>) -> io::Result<()> {
        refused()
    }

    /// # Safety
    /// None is needed: nothing is done.
    pub(crate) unsafe fn bind_range(_start: NonNull<u8>, _len: usize, _policy: &Policy) -> io::Result<()> {
        refused()
    }

    pub(crate) fn probe(_policy: &Policy) -> io::Result<()> {
        refused()
    }
}
