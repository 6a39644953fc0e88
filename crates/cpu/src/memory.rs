//! How much memory the machine still has. Linux lends memory that it does not have and kills later, so the backend asks first.

use std::fs;

/// Bytes that can still be used: the kernel's estimate, what the control group leaves, or what the limit of the address space
/// (`ulimit -v`) leaves, whichever is least.
/// `None` where the system does not say.
pub(crate) fn available_bytes() -> Option<usize> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    machine.into_iter().chain(cgroup_left()).chain(address_space_left()).min()
}

fn mem_available(meminfo: &str) -> Option<usize> {
    kib_of(meminfo, "MemAvailable:")
}

/// In bytes, the line `name    123 kB`.
fn kib_of(text: &str, name: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// What control group v2 leaves to this one. Page cache counts as used there but is given back on demand.
fn cgroup_left() -> Option<usize> {
    let file = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let max = file("memory.max")?.trim().parse::<usize>().ok()?;
    let current = file("memory.current")?.trim().parse::<usize>().ok()?;
    let reclaimable = file("memory.stat").and_then(|stat| {
        stat.lines().find_map(|line| line.strip_prefix("inactive_file "))?.trim().parse::<usize>().ok()
    });
    Some(max.saturating_sub(current.saturating_sub(reclaimable.unwrap_or(0))))
}

/// What the limit of this process's address space leaves; `None` without one.
fn address_space_left() -> Option<usize> {
    let limit = address_space_limit(&fs::read_to_string("/proc/self/limits").ok()?)?;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    Some(limit.saturating_sub(kib_of(&status, "VmSize:")?))
}

/// The soft limit, which is the one that counts.
fn address_space_limit(limits: &str) -> Option<usize> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_space_limits_are_read_in_bytes() {
        let text = "Limit  Soft Limit  Hard Limit  Units\nMax address space  614400000  unlimited  bytes\n";
        assert_eq!(address_space_limit(text), Some(614_400_000));
        assert_eq!(address_space_limit("Max address space  unlimited  unlimited  bytes\n"), None);
        assert_eq!(kib_of("Name:\tx\nVmSize:\t    3892 kB\n", "VmSize:"), Some(3892 * 1024));
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24610000 kB\nMemFree:  5 kB\nMemAvailable:   23000001 kB\n";
        assert_eq!(mem_available(text), Some(23_000_001 * 1024));
        assert_eq!(mem_available("MemTotal: 1 kB\n"), None);
    }
}
