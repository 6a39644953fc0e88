//! How much memory the machine still has. Linux lends memory that it does not have and kills later, so the backend asks first.

use std::fs;

/// Bytes that can still be used: the kernel's estimate, or what the control group leaves, whichever is less.
/// `None` where the system does not say.
pub(crate) fn available_bytes() -> Option<usize> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let group = cgroup_left();
    machine.into_iter().chain(group).min()
}

fn mem_available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24610000 kB\nMemFree:  5 kB\nMemAvailable:   23000001 kB\n";
        assert_eq!(mem_available(text), Some(23_000_001 * 1024));
        assert_eq!(mem_available("MemTotal: 1 kB\n"), None);
    }
}
