//! The server as a process: starts it, looks at its memory and its time on the processors, stops it. Must not know HTTP.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

const START_TIMEOUT: Duration = Duration::from_mins(1);
/// Linux counts a process's time in hundredths of a second for everybody who reads `/proc`.
const TICK: Duration = Duration::from_millis(10);

/// A running `r1-serve`; killed when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    log: PathBuf,
}

impl Server {
    /// Starts `binary` with the bundled model on a free port and waits until it says that it is ready.
    pub(crate) fn start(binary: &Path, args: &[String]) -> Result<Self> {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let log = std::env::temp_dir().join(format!("r1-load-{}-{number}.log", std::process::id()));
        let stderr = fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut child = Command::new(binary)
            .args(["--port", "0"])
            .args(args)
            // Its errors are looked for in its log, as lines of text.
            .args(["--log-format", "text"])
            .env_remove("RUST_LOG")
            .env_remove("R1_API_KEY")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        let stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let (said, address) = mpsc::channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let address = line.trim().strip_prefix("http://").and_then(|rest| rest.strip_suffix("/v1"));
                if let Some(address) = address {
                    let _ = said.send(address.to_owned());
                }
            }
        });
        let mut server = Self { child, address: SocketAddr::from(([127, 0, 0, 1], 0)), log };
        let said = address.recv_timeout(START_TIMEOUT);
        let Ok(address) = said else {
            bail!("{} did not say where it listens; its log:\n{}", binary.display(), server.log());
        };
        server.address = address.parse().with_context(|| format!("the address {address:?}"))?;
        Ok(server)
    }

    /// What it logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Errors that it logged.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let log = self.log();
        let loud = log.lines().filter(|line| line.contains(" ERROR ") || line.contains("panicked"));
        loud.map(str::to_owned).collect()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory.
    pub(crate) fn rss_bytes(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).context("resident memory")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().context("VmRSS")?;
        Ok(kib * 1024)
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) -> Result<()> {
        let status =
            Command::new("kill").args(["-TERM", &self.pid().to_string()]).status().context("kill")?;
        if !status.success() {
            bail!("kill -TERM {} failed: {status}", self.pid());
        }
        Ok(())
    }

    /// How it ended; `None` when it has not within `patience`.
    pub(crate) async fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let since = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if since.elapsed() > patience {
                return Ok(None);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.log);
    }
}

/// Time on the processors since a process began, by the names of its threads without their numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct CpuTime(BTreeMap<String, Duration>);

impl CpuTime {
    /// Of the threads that still live.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let mut times: BTreeMap<String, Duration> = BTreeMap::new();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            // A thread may end meanwhile.
            let Ok(stat) = fs::read_to_string(task?.path().join("stat")) else { continue };
            if let Some((name, time)) = parse_stat(&stat) {
                *times
                    .entry(name.trim_end_matches(|c: char| c == '-' || c.is_ascii_digit()).to_owned())
                    .or_default() += time;
            }
        }
        Ok(Self(times))
    }

    /// What each kind of thread used per second between two moments that far apart, the busiest first.
    pub(crate) fn since(&self, earlier: &Self, apart: Duration) -> Vec<(String, f64)> {
        let share = |(name, time): (&String, &Duration)| {
            let before = earlier.0.get(name).copied().unwrap_or_default();
            (name.clone(), time.saturating_sub(before).as_secs_f64() / apart.as_secs_f64())
        };
        let mut shares: Vec<_> = self.0.iter().map(share).collect();
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        shares
    }
}

/// Name and time of a thread: the name stands in brackets and may hold anything; user and system time are fields 14, 15.
fn parse_stat(stat: &str) -> Option<(&str, Duration)> {
    let name = &stat[stat.find('(')? + 1..stat.rfind(')')?];
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some((name, TICK * user + TICK * system))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_name_may_hold_anything() {
        let stat = "42 (cpu (1) x) S 1 2 3 0 -1 4194304 5 0 0 0 150 50 0 0 20 0 9 0 1 2";
        assert_eq!(parse_stat(stat), Some(("cpu (1) x", Duration::from_secs(2))));
        assert_eq!(parse_stat("nothing"), None);
    }

    #[test]
    fn shares_are_differences() {
        let time = |ms| CpuTime(BTreeMap::from([("cpu".to_owned(), Duration::from_millis(ms))]));
        assert_eq!(time(3000).since(&time(1000), Duration::from_secs(4)), [("cpu".to_owned(), 0.5)]);
    }
}
