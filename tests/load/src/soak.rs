//! The soak: many mixed requests at once, for long, while clients leave at random moments; afterwards nothing may be left
//! behind, and memory may not have grown.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::ProgressBar;
use tokio::sync::Notify;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{sleep, timeout};

use crate::client::{Connection, Metrics, get};
use crate::http::{Body, Head};
use crate::report::{Bound, Report};
use crate::server::Server;
use crate::sse::{Frames, Tally, check_whole};
use crate::workload::{Rng, Spec, filling_request, soak_request};

const PHASE: &str = "soak";
/// Tokens of prompt and reply together that the server must be started with. What the running batch could hold of them
/// is the size of its KV cache, and a long run begins by touching all of that.
pub(crate) const CONTEXT_TOKENS: u32 = 512;
/// How long what still runs at the end may take.
const END_TIMEOUT: Duration = Duration::from_mins(2);
/// How long the server may take to give back what the last clients left behind.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Runs from this length on are for measuring memory.
const LONG: Duration = Duration::from_mins(1);
const RSS_INTERVAL: Duration = Duration::from_millis(250);
/// One stream of so many is read as JSON event by event.
const DEEP_EVERY: u64 = 16;

/// How long, how many, how often.
pub(crate) struct Soak {
    pub(crate) length: Duration,
    pub(crate) streams: usize,
    /// Seats in the running batch.
    pub(crate) max_num_seqs: usize,
    pub(crate) disconnects: u64,
    pub(crate) seed: u64,
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Idle,
    Sending,
    /// Nothing of the reply has come.
    Unanswered,
    /// The reply has begun, without text.
    Opened,
    /// Text has come.
    Text,
}

/// One of the streams.
struct Slot {
    stage: Cell<Stage>,
    leaving: Cell<bool>,
    leave: Notify,
}

#[derive(Default)]
struct Counts {
    finished: u64,
    /// Clients that left, by what they had seen.
    left: BTreeMap<&'static str, u64>,
    refused: u64,
    server_errors: u64,
    other_statuses: u64,
    broken: u64,
    wrong: u64,
    samples: Vec<String>,
}

impl Counts {
    fn sample(&mut self, text: String) {
        const MOST: usize = 5;
        if self.samples.len() < MOST {
            self.samples.push(text);
        }
    }

    fn left(&self) -> u64 {
        self.left.values().sum()
    }

    /// A client left when its request was so far.
    fn leave(&mut self, stage: Stage) {
        let seen = match stage {
            Stage::Idle | Stage::Sending => "while connecting or sending",
            Stage::Unanswered => "before the first byte",
            Stage::Opened => "before the first text",
            Stage::Text => "after some text",
        };
        *self.left.entry(seen).or_default() += 1;
    }

    fn blame(&mut self, answer: Answer) {
        let (count, why) = match answer {
            Answer::Good => return,
            Answer::Wrong(why) => (&mut self.wrong, why),
            Answer::Status(status, body) => {
                let count = match status {
                    429 => &mut self.refused,
                    500.. => &mut self.server_errors,
                    _ => &mut self.other_statuses,
                };
                (count, format!("{status}: {}", String::from_utf8_lossy(&body)))
            }
        };
        *count += 1;
        self.sample(why);
    }

    fn break_off(&mut self, error: &anyhow::Error) {
        self.broken += 1;
        self.sample(format!("{error:#}"));
    }

    fn tell(&self, wanted_disconnects: u64, report: &mut Report) {
        report.figure(PHASE, "replies finished and checked", self.finished as f64, "", Bound::AtLeast(1.0));
        let least = Bound::AtLeast(wanted_disconnects as f64);
        report.figure(PHASE, "clients that left", self.left() as f64, "", least);
        for (when, left) in &self.left {
            report.figure(PHASE, format!("  {when}"), *left as f64, "", Bound::None);
        }
        for (name, count) in [
            ("replies malformed or miscounted", self.wrong),
            ("connections the server broke or refused", self.broken),
            ("replies 5xx", self.server_errors),
            ("replies 429", self.refused),
            ("other replies than 200", self.other_statuses),
        ] {
            report.figure(PHASE, name, count as f64, "", Bound::Exactly(0.0));
        }
        for sample in &self.samples {
            report.remark(format!("soak: {sample}"));
        }
    }
}

struct Shared {
    address: SocketAddr,
    slots: Vec<Slot>,
    stopping: Cell<bool>,
    counts: RefCell<Counts>,
}

/// What came of a request that was not left.
enum Answer {
    Good,
    Status(u16, Vec<u8>),
    Wrong(String),
}

/// Runs the phase.
pub(crate) async fn run(server: &Server, soak: &Soak, bar: &ProgressBar, report: &mut Report) -> Result<()> {
    let mut rng = Rng::new(soak.seed);
    let slot = || Slot { stage: Cell::new(Stage::Idle), leaving: Cell::new(false), leave: Notify::new() };
    let shared = Rc::new(Shared {
        address: server.address,
        slots: (0..soak.streams).map(|_| slot()).collect(),
        stopping: Cell::new(false),
        counts: RefCell::default(),
    });
    let local = LocalSet::new();
    if soak.length >= LONG {
        local.run_until(touch_kv_cache(server.address, soak.max_num_seqs, rng.fork())).await?;
    }
    let started = Instant::now();
    let mut rss = Vec::new();
    let (hung, panicked) = local
        .run_until(async {
            let workers: Vec<_> =
                (0..soak.streams).map(|index| spawn_local(work(shared.clone(), index, rng.fork()))).collect();
            let pacer = spawn_local(disconnect(shared.clone(), soak.length, soak.disconnects, rng.fork()));
            while started.elapsed() < soak.length {
                rss.push((started.elapsed(), server.rss_bytes()?));
                bar.set_message(format!("{} clients left", shared.counts.borrow().left()));
                bar.set_position(started.elapsed().as_secs());
                sleep(RSS_INTERVAL).await;
            }
            shared.stopping.set(true);
            let end = Instant::now() + END_TIMEOUT;
            let (mut hung, mut panicked) = (0_u64, 0_u64);
            for task in workers.into_iter().chain([pacer]) {
                let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
                match timeout(left, task).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => panicked += 1,
                    Err(_) => hung += 1,
                }
            }
            anyhow::Ok((hung, panicked))
        })
        .await?;
    let ran = started.elapsed();
    drop(local);

    report.figure(PHASE, "streams at once", soak.streams as f64, "", Bound::None);
    shared.counts.borrow().tell(soak.disconnects, report);
    report.figure(PHASE, "streams that hung", hung as f64, "", Bound::Exactly(0.0));
    report.figure(PHASE, "clients that panicked", panicked as f64, "", Bound::Exactly(0.0));
    settle(server, ran, report).await?;
    memory(soak.length, &rss, report);
    Ok(())
}

/// Fills the KV cache once, so that no page of it is touched for the first time later and taken for a leak: as many
/// sequences as can run, each as long as can be, all there at the same time.
async fn touch_kv_cache(address: SocketAddr, sequences: usize, mut rng: Rng) -> Result<()> {
    /// More steps than it takes until the last prompt is in.
    const TOKENS: u32 = 96;
    let fill = |mut rng: Rng| async move {
        let mut request = Vec::new();
        let spec = filling_request(&mut rng, CONTEXT_TOKENS, TOKENS, address, &mut request);
        let mut connection = Connection::open(address).await?;
        connection.send(&request).await?;
        let head = connection.head().await?;
        let mut body = Vec::new();
        connection.rest(&head, &mut body).await?;
        check_whole(&spec, &body).map_err(|why| anyhow::anyhow!("filling the KV cache: {why}"))
    };
    let tasks: Vec<_> = (0..sequences).map(|_| spawn_local(fill(rng.fork()))).collect();
    for task in tasks {
        task.await??;
    }
    Ok(())
}

/// What the server holds once nobody asks for anything.
async fn settle(server: &Server, ran: Duration, report: &mut Report) -> Result<()> {
    let since = Instant::now();
    let metrics = loop {
        let metrics = Metrics::read(server.address).await?;
        if metrics.load()? == (0.0, 0.0, 0.0) || since.elapsed() > SETTLE_TIMEOUT {
            break metrics;
        }
        sleep(Duration::from_millis(20)).await;
    };
    let (running, waiting, kv_usage) = metrics.load()?;
    report.figure(PHASE, "sequences still running", running, "", Bound::Exactly(0.0));
    report.figure(PHASE, "sequences still waiting", waiting, "", Bound::Exactly(0.0));
    report.figure(PHASE, "share of the KV cache still held", kv_usage, "", Bound::Exactly(0.0));
    report.figure(
        PHASE,
        "steps that failed",
        metrics.value("r1_failed_steps_total")?,
        "",
        Bound::Exactly(0.0),
    );
    let (health, _) = get(server.address, "/health").await?;
    report.figure(PHASE, "/health", f64::from(health.status), "", Bound::Exactly(200.0));
    let tokens = metrics.value("vllm:generation_tokens_total")?;
    report.figure(PHASE, "tokens generated per second", tokens / ran.as_secs_f64(), "", Bound::None);
    report.figure(PHASE, "preemptions", metrics.value("vllm:num_preemptions_total")?, "", Bound::None);
    Ok(())
}

/// Resident memory a short run may end with. The bundled model's server settles at about 200 MB, wherever it runs.
const SHORT_MB: f64 = 400.0;

/// Growth of resident memory once warm.
///
/// The first third is warm-up. Then the median of the first window is compared with the median of the last, each a
/// twelfth of the phase: 10 s of 120 s. How far a short run's warm-up gets in its third depends on the machine: each page
/// of the KV cache has to be used once, and the allocator's arenas have to find their size. So a short run is held to
/// what a warm server holds at most, which finds gross leaks only.
fn memory(length: Duration, rss: &[(Duration, u64)], report: &mut Report) {
    let long = length >= LONG;
    let window = length / 12;
    let first = median(rss, length / 3, length / 3 + window);
    let last = median(rss, window * 11, length);
    let drift = (last / first - 1.0) * 100.0;
    let in_short = if long { Bound::None } else { Bound::Below(SHORT_MB) };
    let in_long = if long { Bound::Below(1.0) } else { Bound::None };
    report.figure(PHASE, "resident memory after warm-up", first / 1e6, "MB", Bound::None);
    report.figure(PHASE, "resident memory at the end", last / 1e6, "MB", in_short);
    report.figure(PHASE, "growth of resident memory", drift, "%", in_long);
}

/// Not a number when there is no sample, which keeps to no bound.
fn median(samples: &[(Duration, u64)], from: Duration, to: Duration) -> f64 {
    let mut values: Vec<u64> =
        samples.iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, bytes)| *bytes).collect();
    values.sort_unstable();
    values.get(values.len() / 2).map_or(f64::NAN, |bytes| *bytes as f64)
}

/// One stream after another, until the phase ends.
async fn work(shared: Rc<Shared>, index: usize, mut rng: Rng) {
    let slot = &shared.slots[index];
    let (mut kept, mut request) = (None, Vec::new());
    let mut number = index as u64;
    while !shared.stopping.get() {
        let spec = soak_request(&mut rng, shared.address, &mut request);
        number += 1;
        if rng.percent(50) {
            kept = None;
        }
        slot.stage.set(Stage::Sending);
        let outcome = tokio::select! {
            biased;
            () = slot.leave.notified() => None,
            answer = exchange(&shared, slot, kept.take(), &request, &spec, number.is_multiple_of(DEEP_EVERY)) => Some(answer),
        };
        let stage = slot.stage.replace(Stage::Idle);
        slot.leaving.set(false);
        match outcome {
            None => shared.counts.borrow_mut().leave(stage),
            Some(Ok((Answer::Good, connection))) => {
                shared.counts.borrow_mut().finished += 1;
                kept = connection;
            }
            Some(Ok((bad, _))) => {
                shared.counts.borrow_mut().blame(bad);
                pause().await;
            }
            Some(Err(error)) => {
                shared.counts.borrow_mut().break_off(&error);
                pause().await;
            }
        }
    }
}

/// A server that is gone must not be asked a million times.
async fn pause() {
    sleep(Duration::from_millis(100)).await;
}

/// Asks and reads the reply to its end; gives the connection back when it can be used again.
async fn exchange(
    shared: &Shared,
    slot: &Slot,
    kept: Option<Connection>,
    request: &[u8],
    spec: &Spec,
    deep: bool,
) -> Result<(Answer, Option<Connection>)> {
    let mut connection = match kept {
        Some(connection) => connection,
        None => Connection::open(shared.address).await?,
    };
    connection.send(request).await?;
    slot.stage.set(Stage::Unanswered);
    let head = connection.head().await?;
    slot.stage.set(Stage::Opened);
    let answer = if head.status != 200 || !spec.stream {
        let mut body = Vec::new();
        connection.rest(&head, &mut body).await?;
        match head.status {
            200 => check_whole(spec, &body).map_or_else(Answer::Wrong, |()| Answer::Good),
            status => Answer::Status(status, body),
        }
    } else {
        read_stream(slot, &mut connection, &head, spec, deep).await?
    };
    Ok((answer, head.keep_alive.then_some(connection)))
}

async fn read_stream(
    slot: &Slot,
    connection: &mut Connection,
    head: &Head,
    spec: &Spec,
    deep: bool,
) -> Result<Answer> {
    if !head.event_stream {
        return Ok(Answer::Wrong("a stream that is not text/event-stream".into()));
    }
    let (mut body, mut frames, mut tally) = (Body::new(head.framing), Frames::default(), Tally::default());
    while !body.is_done() {
        let take_events = &mut |bytes: &[u8]| frames.push(bytes, &mut |event: &[u8]| tally.take(event, deep));
        connection.piece(&mut body, take_events).await?;
        if tally.texts > 0 {
            slot.stage.set(Stage::Text);
        }
    }
    Ok(tally.check(spec, frames.is_partial()).map_or_else(Answer::Wrong, |()| Answer::Good))
}

/// Makes clients leave, evenly over the phase: among those that stream, among all, and some of its own that leave within
/// their request or right behind it.
async fn disconnect(shared: Rc<Shared>, length: Duration, disconnects: u64, mut rng: Rng) {
    /// The last ones leave a little before the end, so that a late one does not count as missing.
    const MARGIN: f64 = 0.99;
    let started = Instant::now();
    let mut done = 0;
    let mut own = Vec::new();
    while done < disconnects && !shared.stopping.get() {
        let share = started.elapsed().as_secs_f64() / (length.as_secs_f64() * MARGIN);
        let due = ((disconnects as f64 * share) as u64).min(disconnects);
        while done < due {
            let left = match rng.range(0, 100) {
                kind @ 0..30 => {
                    own.push(spawn_local(leave_early(shared.clone(), kind < 15, rng.fork())));
                    true
                }
                30..65 => signal(&shared, &mut rng, Stage::Text),
                _ => signal(&shared, &mut rng, Stage::Sending),
            };
            if !left {
                break;
            }
            done += 1;
        }
        own.retain(|task| !task.is_finished());
        sleep(Duration::from_millis(5)).await;
    }
    for task in own {
        // Its outcome is counted where it happens; a panic is the pacer's too.
        task.await.expect("a client that leaves early");
    }
}

/// Makes one stream leave that is at least so far; where none of a few guesses is, any that is under way.
fn signal(shared: &Shared, rng: &mut Rng, at_least: Stage) -> bool {
    const GUESSES: usize = 16;
    let count = shared.slots.len() as u64;
    let from = rng.range(0, count) as usize;
    let under_way = |slot: &&Slot| slot.stage.get() != Stage::Idle && !slot.leaving.get();
    let mut guesses = (0..GUESSES).map(|_| &shared.slots[rng.range(0, count) as usize]);
    let fits = guesses.find(|slot| under_way(slot) && slot.stage.get() >= at_least);
    let chosen = fits.or_else(|| shared.slots[from..].iter().chain(&shared.slots[..from]).find(under_way));
    if let Some(slot) = chosen {
        slot.leaving.set(true);
        slot.leave.notify_one();
    }
    chosen.is_some()
}

/// A client that leaves within its request's body, or between its end and the reply.
async fn leave_early(shared: Rc<Shared>, within_body: bool, mut rng: Rng) {
    let mut request = Vec::new();
    soak_request(&mut rng, shared.address, &mut request);
    let head = crate::http::find(&request, b"\r\n\r\n").expect("a request has a head") + 4;
    let end = if within_body { rng.range(head as u64, request.len() as u64) as usize } else { request.len() };
    let sent = async {
        let mut connection = Connection::open(shared.address).await?;
        connection.send(&request[..end]).await?;
        anyhow::Ok(connection)
    };
    let sent = sent.await;
    let mut patience = rng.range(0, 20_000);
    if !within_body {
        patience /= 10;
    }
    sleep(Duration::from_micros(patience)).await;
    let mut counts = shared.counts.borrow_mut();
    match sent {
        Ok(connection) => {
            drop(connection);
            let when = if within_body { "within the body" } else { "right behind the request" };
            *counts.left.entry(when).or_default() += 1;
        }
        Err(error) => counts.break_off(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_measured_between_medians() {
        let sample = |s: u64| {
            let spike = if s.is_multiple_of(7) { 500 } else { 0 };
            (Duration::from_secs(s), 1_000_000 + s * 1000 + spike)
        };
        let rss: Vec<_> = (0..120).map(sample).collect();
        let mut report = Report::default();
        memory(Duration::from_mins(2), &rss, &mut report);
        assert_eq!(report.missed(), 1, "6.7 %: {}", report.table());
        let flat: Vec<_> = rss.iter().map(|(at, _)| (*at, 1_000_000)).collect();
        let mut report = Report::default();
        memory(Duration::from_mins(2), &flat, &mut report);
        assert_eq!(report.missed(), 0);
        memory(Duration::from_mins(2), &[], &mut report);
        assert_eq!(report.missed(), 1, "no samples are no proof");
    }
}
