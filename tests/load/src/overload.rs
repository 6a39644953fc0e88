//! The overload: a server that is full to the last place, then three times its queue on top every second. Who is refused
//! must know at once, and who was admitted must not notice.
//!
//! Windows without and with the excess take turns (A B B A), so that a machine or a context that changes over the phase
//! changes both alike.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use serde_json::Value;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{sleep, sleep_until};

use crate::client::{Connection, Metrics};
use crate::histogram::Histogram;
use crate::http::Body;
use crate::report::{Bound, Report};
use crate::server::{CpuTime, Server};
use crate::sse::{Frames, Tally};
use crate::workload::{Rng, steady_request};

const PHASE: &str = "overload";
/// Offered on top per second, in sizes of the queue.
const EXCESS: usize = 3;
/// Windows of each kind.
const WINDOWS: u32 = 4;
/// How long the server may take to be full.
const FILL_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two windows, so that what one left is not measured in the next.
const PAUSE: Duration = Duration::from_millis(100);
/// From the last byte of a refused request to the last byte of its reply.
const REFUSAL_MS: f64 = 50.0;
/// Growth of the 99th percentile of the admitted ones' time per token.
const SLOWDOWN: f64 = 1.2;
/// A few seconds hold a hundred steps, whose 99th percentile is one or two of them: whatever else the machine did then.
/// Short runs show that refusing costs no multiple in the middle, and leave the tails to long ones.
const SHORT: Duration = Duration::from_secs(10);
const SHORT_SLOWDOWN: f64 = 2.0;
const SHORT_REFUSAL_MS: f64 = 50.0;

/// How full, how long.
pub(crate) struct Overload {
    /// Measured time without the excess, and again with it.
    pub(crate) half: Duration,
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    /// Excess requests at the same moment.
    pub(crate) burst: usize,
    pub(crate) seed: u64,
}

/// What is measured at the moment.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Window {
    number: u32,
    excess: bool,
}

/// Measurements of one kind of window.
struct Half {
    gaps: Histogram,
    /// How late the client's own timers are: its share of every time above.
    lag: Histogram,
    measured: Duration,
    server: Vec<(String, f64)>,
    client: f64,
}

impl Half {
    fn new() -> Self {
        let (gaps, lag) = (Histogram::new(), Histogram::new());
        Self { gaps, lag, measured: Duration::ZERO, server: Vec::new(), client: 0.0 }
    }

    fn add_cpu(&mut self, shares: Vec<(String, f64)>, client: f64) {
        for (name, share) in shares {
            match self.server.iter_mut().find(|known| known.0 == name) {
                Some(known) => known.1 += share / f64::from(WINDOWS),
                None => self.server.push((name, share / f64::from(WINDOWS))),
            }
        }
        self.client += client / f64::from(WINDOWS);
    }
}

#[derive(Default)]
struct Refusals {
    sent: u64,
    refused: u64,
    /// Admitted though every place was taken.
    admitted: u64,
    /// Admitted into a place that an ended stream had just left.
    slipped_in: u64,
    other_statuses: u64,
    no_retry_after: u64,
    no_error_object: u64,
    broken: u64,
    samples: Vec<String>,
}

struct Shared {
    address: SocketAddr,
    capacity: usize,
    window: Cell<Option<Window>>,
    halves: RefCell<[Half; 2]>,
    latency: RefCell<Histogram>,
    refusals: RefCell<Refusals>,
    /// Streams that were accepted and have not ended, and when they were last fewer than there are places.
    admitted: Cell<usize>,
    last_short: Cell<Instant>,
    /// Excess requests under way.
    open: Cell<usize>,
    wrong_streams: Cell<u64>,
}

impl Shared {
    fn sample(&self, text: String) {
        const MOST: usize = 5;
        let samples = &mut self.refusals.borrow_mut().samples;
        if samples.len() < MOST {
            samples.push(text);
        }
    }
}

/// Runs the phase; gives the median time per token of a full batch.
pub(crate) async fn run(
    server: &Server,
    overload: &Overload,
    bar: &ProgressBar,
    report: &mut Report,
) -> Result<Duration> {
    let shared = Rc::new(Shared {
        address: server.address,
        capacity: overload.running + overload.waiting,
        window: Cell::new(None),
        halves: RefCell::new([Half::new(), Half::new()]),
        latency: RefCell::new(Histogram::new()),
        refusals: RefCell::default(),
        admitted: Cell::new(0),
        last_short: Cell::new(Instant::now()),
        open: Cell::new(0),
        wrong_streams: Cell::new(0),
    });
    let mut rng = Rng::new(overload.seed);
    let local = LocalSet::new();
    local
        .run_until(async {
            for _ in 0..shared.capacity {
                spawn_local(fill(shared.clone(), rng.fork()));
            }
            spawn_local(watch_lag(shared.clone()));
            await_full(server, overload).await?;
            sleep(overload.half / 10).await;
            let began = Instant::now();
            for number in 0..2 * WINDOWS {
                let excess = matches!(number % 4, 1 | 2);
                window(server, overload, &shared, Window { number, excess }, rng.fork()).await?;
                bar.set_position(began.elapsed().as_secs());
            }
            anyhow::Ok(())
        })
        .await?;
    // The streams end with their tasks.
    drop(local);
    tell(&shared, overload, report);
    let halves = shared.halves.borrow();
    Ok(halves[0].gaps.quantile(0.5))
}

async fn await_full(server: &Server, overload: &Overload) -> Result<()> {
    let since = Instant::now();
    let wanted = (overload.running as f64, overload.waiting as f64);
    loop {
        let (running, waiting, _) = Metrics::read(server.address).await?.load()?;
        if (running, waiting) == wanted {
            return Ok(());
        }
        if since.elapsed() > FILL_TIMEOUT {
            bail!("{running} run and {waiting} wait, not {} and {}", wanted.0, wanted.1);
        }
        sleep(Duration::from_millis(50)).await;
    }
}

async fn window(
    server: &Server,
    overload: &Overload,
    shared: &Rc<Shared>,
    window: Window,
    rng: Rng,
) -> Result<()> {
    let own = std::process::id();
    let length = overload.half / WINDOWS;
    let before = (CpuTime::of(server.pid())?, CpuTime::of(own)?);
    let began = Instant::now();
    shared.window.set(Some(window));
    if window.excess {
        knock(shared, overload, length, rng).await;
    } else {
        sleep(length).await;
    }
    shared.window.set(None);
    let measured = began.elapsed();
    let after = (CpuTime::of(server.pid())?, CpuTime::of(own)?);
    let client = after.1.since(&before.1, measured).iter().map(|(_, share)| share).sum();
    {
        let half = &mut shared.halves.borrow_mut()[usize::from(window.excess)];
        half.measured += measured;
        half.add_cpu(after.0.since(&before.0, measured), client);
    }
    while shared.open.get() > 0 {
        sleep(Duration::from_millis(5)).await;
    }
    sleep(PAUSE).await;
    Ok(())
}

/// Keeps one place taken: a stream, and after its end the next.
async fn fill(shared: Rc<Shared>, mut rng: Rng) {
    let (mut request, mut connection) = (Vec::new(), None);
    loop {
        // Long enough that places are seldom free, of different lengths so that they do not end together.
        let max_tokens = rng.range(500, 1500) as u32;
        let spec = steady_request(&mut rng, max_tokens, shared.address, &mut request);
        match fill_once(&shared, &request, &spec, &mut connection).await {
            Ok(true) => {}
            // Somebody took the place meanwhile.
            Ok(false) => sleep(Duration::from_millis(5)).await,
            Err(error) => {
                shared.wrong_streams.set(shared.wrong_streams.get() + 1);
                shared.sample(format!("an admitted stream: {error:#}"));
                connection = None;
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Runs one stream to its end; false when it was refused.
async fn fill_once(
    shared: &Shared,
    request: &[u8],
    spec: &crate::workload::Spec,
    kept: &mut Option<Connection>,
) -> Result<bool> {
    let mut connection = match kept.take() {
        Some(connection) => connection,
        None => Connection::open(shared.address).await?,
    };
    connection.send(request).await?;
    let head = connection.head().await?;
    if head.status == 429 {
        return Ok(false);
    }
    if head.status != 200 {
        bail!("status {}", head.status);
    }
    shared.last_short.set(Instant::now());
    shared.admitted.set(shared.admitted.get() + 1);
    let read = read_stream(shared, &mut connection, Body::new(head.framing), spec).await;
    shared.admitted.set(shared.admitted.get() - 1);
    shared.last_short.set(Instant::now());
    read?;
    *kept = Some(connection);
    Ok(true)
}

async fn read_stream(
    shared: &Shared,
    connection: &mut Connection,
    mut body: Body,
    spec: &crate::workload::Spec,
) -> Result<()> {
    let (mut frames, mut tally) = (Frames::default(), Tally::default());
    let mut last: Option<(Instant, Window)> = None;
    while !body.is_done() {
        let before = tally.texts;
        let take_events =
            &mut |bytes: &[u8]| frames.push(bytes, &mut |event: &[u8]| tally.take(event, false));
        connection.piece(&mut body, take_events).await?;
        let texts = tally.texts - before;
        if texts == 0 {
            continue;
        }
        let now = Instant::now();
        let window = shared.window.get();
        if let (Some((then, same)), Some(window)) = (last, window)
            && same == window
        {
            let gaps = &mut shared.halves.borrow_mut()[usize::from(window.excess)].gaps;
            gaps.record(now - then);
            // Tokens that arrive together were waited for once.
            (1..texts).for_each(|_| gaps.record(Duration::ZERO));
        }
        last = window.map(|window| (now, window));
    }
    tally.check(spec, frames.is_partial()).map_err(|why| anyhow::anyhow!(why))
}

/// Offers the excess in bursts, evenly over the window.
async fn knock(shared: &Rc<Shared>, overload: &Overload, length: Duration, mut rng: Rng) {
    let per_second = (EXCESS * overload.waiting) as f64;
    let apart = Duration::from_secs_f64(overload.burst as f64 / per_second);
    let began = tokio::time::Instant::now();
    let mut next = began;
    while next < began + length {
        sleep_until(next).await;
        for _ in 0..overload.burst {
            spawn_local(knock_once(Open::new(shared.clone()), rng.fork()));
        }
        next += apart;
    }
    sleep_until(began + length).await;
}

/// An excess request under way. One that does not come to its end, for whatever reason, counts as broken.
struct Open {
    shared: Rc<Shared>,
    ended: bool,
}

impl Open {
    fn new(shared: Rc<Shared>) -> Self {
        shared.open.set(shared.open.get() + 1);
        Self { shared, ended: false }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.open.set(self.shared.open.get() - 1);
        if !self.ended {
            self.shared.refusals.borrow_mut().broken += 1;
        }
    }
}

async fn knock_once(mut open: Open, mut rng: Rng) {
    let shared = open.shared.clone();
    shared.refusals.borrow_mut().sent += 1;
    match try_knock(&shared, &mut rng).await {
        Ok(()) => open.ended = true,
        Err(error) => shared.sample(format!("an excess request: {error:#}")),
    }
}

async fn try_knock(shared: &Shared, rng: &mut Rng) -> Result<()> {
    let mut request = Vec::with_capacity(512);
    steady_request(rng, 16, shared.address, &mut request);
    let mut connection = Connection::open(shared.address).await?;
    connection.send(&request).await?;
    let sent = Instant::now();
    let head = connection.head().await?;
    if head.status == 200 {
        drop(connection);
        // That a stream had ended, or could not come back because of this one, may be read a little later.
        sleep(PAUSE).await;
        let was_full = shared.last_short.get() < sent && shared.admitted.get() >= shared.capacity;
        let mut refusals = shared.refusals.borrow_mut();
        let count = if was_full { &mut refusals.admitted } else { &mut refusals.slipped_in };
        *count += 1;
        return Ok(());
    }
    let mut body = Vec::new();
    connection.rest(&head, &mut body).await?;
    let took = sent.elapsed();
    let mut refusals = shared.refusals.borrow_mut();
    if head.status != 429 {
        refusals.other_statuses += 1;
        return Ok(());
    }
    refusals.refused += 1;
    refusals.no_retry_after += u64::from(head.retry_after_s.is_none());
    let error = serde_json::from_slice::<Value>(&body).context("a 429's body")?;
    let error = &error["error"];
    let whole = ["message", "type", "code"].iter().all(|key| error[key].is_string());
    refusals.no_error_object += u64::from(!whole);
    shared.latency.borrow_mut().record(took);
    Ok(())
}

/// Measures how late this process runs what is due.
async fn watch_lag(shared: Rc<Shared>) {
    const TURN: Duration = Duration::from_millis(5);
    loop {
        let due = tokio::time::Instant::now() + TURN;
        sleep_until(due).await;
        if let Some(window) = shared.window.get() {
            shared.halves.borrow_mut()[usize::from(window.excess)].lag.record(due.elapsed());
        }
    }
}

fn tell(shared: &Shared, overload: &Overload, report: &mut Report) {
    let short = overload.half < SHORT;
    let in_short = |most| if short { Bound::Below(most) } else { Bound::None };
    let in_long = |most| if short { Bound::None } else { Bound::Below(most) };
    let halves = shared.halves.borrow();
    let (running, waiting) = (overload.running as f64, overload.waiting as f64);
    report.figure(PHASE, "sequences that run", running, "", Bound::None);
    report.figure(PHASE, "sequences that wait", waiting, "", Bound::None);
    for (half, name) in halves.iter().zip(["full", "overrun"]) {
        let rate = half.gaps.count() as f64 / half.measured.as_secs_f64();
        report.figure(PHASE, format!("{name}: tokens per second"), rate, "", Bound::None);
        for (share, percentile) in [(0.5, "p50"), (0.99, "p99")] {
            report.time(
                PHASE,
                format!("{name}: time per token, {percentile}"),
                half.gaps.quantile(share),
                Bound::None,
            );
        }
        report.time(PHASE, format!("{name}: time per token, mean"), half.gaps.mean(), Bound::None);
        report.time(PHASE, format!("{name}: time per token, max"), half.gaps.max(), Bound::None);
        report.time(PHASE, format!("{name}: client's own lag, p99"), half.lag.quantile(0.99), Bound::None);
        report.figure(PHASE, format!("{name}: processors, this client"), half.client, "", Bound::None);
        for (thread, share) in half.server.iter().take(4) {
            report.figure(PHASE, format!("{name}: processors, server's {thread}"), *share, "", Bound::None);
        }
    }
    let ratio =
        |share| halves[1].gaps.quantile(share).as_secs_f64() / halves[0].gaps.quantile(share).as_secs_f64();
    report.figure(PHASE, "time per token p50, overrun / full", ratio(0.5), "", in_short(SHORT_SLOWDOWN));
    let means = halves[1].gaps.mean().as_secs_f64() / halves[0].gaps.mean().as_secs_f64();
    report.figure(PHASE, "time per token mean, overrun / full", means, "", in_short(SHORT_SLOWDOWN));
    report.figure(PHASE, "time per token p99, overrun / full", ratio(0.99), "", in_long(SLOWDOWN));
    let wrong = shared.wrong_streams.get() as f64;
    report.figure(PHASE, "admitted streams that went wrong", wrong, "", Bound::Exactly(0.0));

    let refusals = shared.refusals.borrow();
    let least = (EXCESS * overload.waiting) as f64;
    report.figure(PHASE, "excess requests sent", refusals.sent as f64, "", Bound::AtLeast(least));
    report.figure(PHASE, "refused with 429", refusals.refused as f64, "", Bound::AtLeast(least));
    report.figure(PHASE, "took a place that had come free", refusals.slipped_in as f64, "", Bound::None);
    for (name, count) in [
        ("admitted though all places were taken", refusals.admitted),
        ("refused with another status", refusals.other_statuses),
        ("refused without Retry-After", refusals.no_retry_after),
        ("refused without an error object", refusals.no_error_object),
        ("excess connections broken or refused", refusals.broken),
    ] {
        report.figure(PHASE, name, count as f64, "", Bound::Exactly(0.0));
    }
    let latency = shared.latency.borrow();
    report.time(PHASE, "time to the 429, p50", latency.quantile(0.5), in_short(SHORT_REFUSAL_MS));
    report.time(PHASE, "time to the 429, p99", latency.quantile(0.99), Bound::None);
    report.time(PHASE, "time to the 429, max", latency.max(), in_long(REFUSAL_MS));
    for sample in &refusals.samples {
        report.remark(format!("overload: {sample}"));
    }
}
