//! The drain: a server that is told to stop lets its streams end, takes nothing new, says so, and exits well.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::sleep;

use crate::client::{Connection, Metrics, get};
use crate::http::Body;
use crate::report::{Bound, Report};
use crate::server::Server;
use crate::sse::{Frames, Tally};
use crate::workload::{Rng, steady_request};

const PHASE: &str = "drain";
/// How long the streams shall go on after the signal.
const REST: Duration = Duration::from_secs(2);
/// How long readiness may take to turn.
const TURN_MS: f64 = 1000.0;
/// The server's default for what runs at SIGTERM.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How much runs.
pub(crate) struct Drain {
    pub(crate) streams: usize,
    /// Of a full batch.
    pub(crate) time_per_token: Duration,
    pub(crate) seed: u64,
}

/// Streams by what became of them.
#[derive(Default)]
struct Streams {
    begun: Cell<usize>,
    ended: Cell<usize>,
    good: Cell<usize>,
}

fn count(cell: &Cell<usize>) {
    cell.set(cell.get() + 1);
}

/// Runs the phase; the server is gone after it.
pub(crate) async fn run(server: &mut Server, drain: &Drain, report: &mut Report) -> Result<()> {
    await_idle(server.address).await?;
    let local = LocalSet::new();
    local.run_until(drive(server, drain, report)).await
}

/// Clients that left before may not be gone yet.
async fn await_idle(address: SocketAddr) -> Result<()> {
    let since = Instant::now();
    loop {
        let load = Metrics::read(address).await?.load()?;
        if load == (0.0, 0.0, 0.0) {
            return Ok(());
        }
        if since.elapsed() > IDLE_TIMEOUT {
            bail!("running, waiting, KV usage are {load:?} long after the last client left");
        }
        sleep(Duration::from_millis(20)).await;
    }
}

async fn drive(server: &mut Server, drain: &Drain, report: &mut Report) -> Result<()> {
    let address = server.address;
    let per_token = drain.time_per_token.max(Duration::from_micros(100));
    let max_tokens = (REST.as_secs_f64() / per_token.as_secs_f64()).clamp(50.0, 2000.0) as u32;
    let streams = Rc::new(Streams::default());
    let mut rng = Rng::new(drain.seed);
    let tasks: Vec<_> = (0..drain.streams)
        .map(|_| spawn_local(stream(address, max_tokens, streams.clone(), rng.fork())))
        .collect();
    let since = Instant::now();
    while streams.begun.get() < drain.streams && since.elapsed() < IDLE_TIMEOUT {
        sleep(Duration::from_millis(5)).await;
    }
    let under_way = streams.begun.get() - streams.ended.get();
    let all = drain.streams as f64;
    report.figure(PHASE, "streams under way at SIGTERM", under_way as f64, "", Bound::Exactly(all));

    server.terminate()?;
    let signalled = Instant::now();
    let turned = loop {
        match get(address, "/health").await {
            Ok((head, _)) if head.status == 503 => break true,
            Ok(_) if signalled.elapsed() < SHUTDOWN_TIMEOUT => sleep(Duration::from_millis(2)).await,
            _ => break false,
        }
    };
    report.figure(PHASE, "/health turned to 503", f64::from(u8::from(turned)), "", Bound::Exactly(1.0));
    report.time(PHASE, "time until it did", signalled.elapsed(), Bound::Below(TURN_MS));
    let (status, retry_after) = ask(address, &mut rng).await.unwrap_or((0, false));
    report.figure(PHASE, "status of a new request", f64::from(status), "", Bound::Exactly(503.0));
    report.figure(PHASE, "it has Retry-After", f64::from(u8::from(retry_after)), "", Bound::Exactly(1.0));
    let left = drain.streams - streams.ended.get();
    report.figure(PHASE, "streams under way then", left as f64, "", Bound::AtLeast(1.0));

    for task in tasks {
        match task.await? {
            Ok(()) => count(&streams.good),
            Err(error) => report.remark(format!("drain: {error:#}")),
        }
    }
    report.figure(
        PHASE,
        "streams that ended as they should",
        streams.good.get() as f64,
        "",
        Bound::Exactly(all),
    );
    let ended = server.wait(SHUTDOWN_TIMEOUT).await?;
    let took = signalled.elapsed();
    let code = ended.and_then(|status| status.code()).map_or(f64::NAN, f64::from);
    report.figure(PHASE, "exit code", code, "", Bound::Exactly(0.0));
    let most = SHUTDOWN_TIMEOUT.as_secs_f64() * 1e3;
    report.time(PHASE, "from SIGTERM to the exit", took, Bound::Below(most));
    Ok(())
}

async fn stream(address: SocketAddr, max_tokens: u32, streams: Rc<Streams>, mut rng: Rng) -> Result<()> {
    let mut request = Vec::new();
    let spec = steady_request(&mut rng, max_tokens, address, &mut request);
    let read = async {
        let mut connection = Connection::open(address).await?;
        connection.send(&request).await?;
        let head = connection.head().await?;
        count(&streams.begun);
        if head.status != 200 {
            bail!("a stream got {}", head.status);
        }
        let (mut body, mut frames, mut tally) =
            (Body::new(head.framing), Frames::default(), Tally::default());
        while !body.is_done() {
            let take_events =
                &mut |bytes: &[u8]| frames.push(bytes, &mut |event: &[u8]| tally.take(event, true));
            connection.piece(&mut body, take_events).await?;
        }
        tally.check(&spec, frames.is_partial()).map_err(|why| anyhow::anyhow!(why))
    };
    let read = read.await;
    count(&streams.ended);
    read
}

/// What somebody gets who asks now.
async fn ask(address: SocketAddr, rng: &mut Rng) -> Result<(u16, bool)> {
    let mut request = Vec::new();
    steady_request(rng, 4, address, &mut request);
    let mut connection = Connection::open(address).await?;
    connection.send(&request).await?;
    let head = connection.head().await?;
    Ok((head.status, head.retry_after_s.is_some()))
}
