//! What a run's replies come to: rates, percentiles, a table and the same as JSON. Must not know how replies came.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Map, Value, json};

/// A reply that came to its end.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Reply {
    /// From sending to the first text.
    pub(super) first: Duration,
    /// Between one piece of text and the next.
    pub(super) gaps: Vec<Duration>,
    /// From sending to the last event of the reply.
    pub(super) latency: Duration,
    /// Tokens of the prompt, as the server counts them; `None` where it does not say.
    pub(super) input_tokens: Option<u64>,
    /// Tokens generated, likewise.
    pub(super) output_tokens: Option<u64>,
    /// Tokens that its prompt was made for.
    pub(super) asked_input_tokens: u64,
    /// Tokens that were asked for.
    pub(super) asked_output_tokens: u64,
}

impl Reply {
    /// Tokens that were generated; where the server does not count, pieces of text, which are at most as many.
    fn generated(&self) -> u64 {
        self.output_tokens.unwrap_or(self.gaps.len() as u64 + 1)
    }

    /// Time per token after the first; none where there is only one.
    fn per_token(&self) -> Option<Duration> {
        let rest = u32::try_from(self.generated()).unwrap_or(u32::MAX).checked_sub(1).filter(|&n| n > 0)?;
        Some(self.latency.saturating_sub(self.first) / rest)
    }
}

/// All of a run.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// From the first request to the end of the last reply.
    pub(super) duration: Duration,
    pub(super) replies: Vec<Reply>,
    /// Why requests failed, in the order in which they did.
    pub(super) failures: Vec<String>,
}

/// A kind of latency: its key, its name.
const LATENCIES: [(&str, &str); 4] = [
    ("ttft", "time to first token (TTFT)"),
    ("tpot", "time per output token after the first (TPOT)"),
    ("itl", "inter-token latency (ITL)"),
    ("e2e_latency", "end-to-end latency (E2E)"),
];

impl Report {
    /// Sorted milliseconds of each of [`LATENCIES`].
    fn latencies(&self) -> [Vec<f64>; 4] {
        let sorted = |latencies: &mut dyn Iterator<Item = Duration>| {
            let mut ms: Vec<f64> = latencies.map(|latency| latency.as_secs_f64() * 1e3).collect();
            ms.sort_by(f64::total_cmp);
            ms
        };
        let replies = || self.replies.iter();
        [
            sorted(&mut replies().map(|reply| reply.first)),
            sorted(&mut replies().filter_map(Reply::per_token)),
            sorted(&mut replies().flat_map(|reply| reply.gaps.iter().copied())),
            sorted(&mut replies().map(|reply| reply.latency)),
        ]
    }

    fn totals(&self) -> (u64, u64) {
        let input = self.replies.iter().filter_map(|reply| reply.input_tokens).sum();
        (input, self.replies.iter().map(Reply::generated).sum())
    }

    /// What was asked of the requests that succeeded.
    fn asked(&self) -> (u64, u64) {
        let replies = || self.replies.iter();
        (
            replies().map(|reply| reply.asked_input_tokens).sum(),
            replies().map(|reply| reply.asked_output_tokens).sum(),
        )
    }

    fn uncounted(&self) -> usize {
        let lacks = |reply: &&Reply| reply.input_tokens.is_none() || reply.output_tokens.is_none();
        self.replies.iter().filter(lacks).count()
    }

    /// Requests in flight, on average.
    fn concurrency(&self) -> f64 {
        let busy: f64 = self.replies.iter().map(|reply| reply.latency.as_secs_f64()).sum();
        busy / self.seconds()
    }

    fn seconds(&self) -> f64 {
        self.duration.as_secs_f64().max(1e-9)
    }

    /// Names and values of the figures that are not latencies.
    fn figures(&self) -> [(&'static str, &'static str, f64); 6] {
        let (input, output) = self.totals();
        let rate = |count: f64| count / self.seconds();
        [
            ("duration", "duration (s)", self.duration.as_secs_f64()),
            ("request_throughput", "requests per second", rate(self.replies.len() as f64)),
            ("input_throughput", "input tokens per second", rate(input as f64)),
            ("output_throughput", "output tokens per second", rate(output as f64)),
            ("total_token_throughput", "tokens per second, both", rate((input + output) as f64)),
            ("concurrency", "requests in flight, mean", self.concurrency()),
        ]
    }

    /// The table.
    pub(super) fn table(&self) -> String {
        let mut table = String::new();
        let mut line = |name: &str, value: &dyn std::fmt::Display| {
            writeln!(table, "{name:<46}{value:>14}").expect("a string has room");
        };
        let (input, output) = self.totals();
        line("successful requests", &self.replies.len());
        line("failed requests", &self.failures.len());
        line("input tokens", &input);
        line("output tokens", &output);
        for (_, name, value) in self.figures() {
            line(name, &format!("{value:.2}"));
        }
        writeln!(table, "\n{:<46}{:>14}{:>12}{:>12}{:>12}", "ms", "mean", "median", "p90", "p99")
            .expect("a string has room");
        for ((_, name), ms) in LATENCIES.iter().zip(self.latencies()) {
            let [mean, median, p90, p99] =
                summary(&ms).map(|ms| ms.map_or("-".into(), |ms| format!("{ms:.2}")));
            writeln!(table, "{name:<46}{mean:>14}{median:>12}{p90:>12}{p99:>12}").expect("a string has room");
        }
        for note in self.notes() {
            writeln!(table, "\nnote: {note}").expect("a string has room");
        }
        table
    }

    /// What would mislead if it were not said.
    fn notes(&self) -> Vec<String> {
        let ((input, output), (asked_input, asked_output)) = (self.totals(), self.asked());
        let mut notes = Vec::new();
        if let Some(first) = self.failures.first() {
            notes.push(format!("{} requests failed; the first: {first}", self.failures.len()));
        }
        match self.uncounted() {
            0 => {
                if input != asked_input {
                    notes.push(format!("prompts were made for {asked_input} tokens, and the server counted {input}"));
                }
                if output != asked_output {
                    notes.push(format!("{asked_output} tokens were asked for, and {output} generated"));
                }
            }
            lacking => notes.push(format!(
                "{lacking} replies came without usage: their input tokens are missing above, and their output tokens are \
                 pieces of text, of which one can hold several tokens"
            )),
        }
        notes
    }

    /// The JSON of it, latencies in milliseconds; null where nothing was measured.
    pub(super) fn json(&self) -> Map<String, Value> {
        let ((input, output), (asked_input, asked_output)) = (self.totals(), self.asked());
        let mut json = Map::new();
        let mut set = |key: &str, value: Value| json.insert(key.to_owned(), value);
        set("completed", json!(self.replies.len()));
        set("failed", json!(self.failures.len()));
        set("first_failure", json!(self.failures.first()));
        set("total_input_tokens", json!(input));
        set("total_output_tokens", json!(output));
        set("asked_input_tokens", json!(asked_input));
        set("asked_output_tokens", json!(asked_output));
        set("replies_without_usage", json!(self.uncounted()));
        for (key, _, value) in self.figures() {
            set(key, json!(value));
        }
        for ((key, _), ms) in LATENCIES.iter().zip(self.latencies()) {
            for (statistic, value) in ["mean", "median", "p90", "p99"].iter().zip(summary(&ms)) {
                set(&format!("{statistic}_{key}_ms"), json!(value));
            }
        }
        json
    }
}

/// Mean, median, 90th and 99th percentile of sorted values.
fn summary(sorted: &[f64]) -> [Option<f64>; 4] {
    let mean = (!sorted.is_empty()).then(|| sorted.iter().sum::<f64>() / sorted.len() as f64);
    [mean, percentile(sorted, 50.0), percentile(sorted, 90.0), percentile(sorted, 99.0)]
}

/// The percentile of sorted values, interpolated between neighbours as numpy's default does.
fn percentile(sorted: &[f64], percent: f64) -> Option<f64> {
    let at = percent / 100.0 * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(below + (above - below) * at.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// numpy.percentile([1..=10], [50, 90, 99]) and of other lists.
    #[test]
    fn percentiles_are_numpys() {
        let ten: Vec<f64> = (1..=10).map(f64::from).collect();
        let close = |found: Option<f64>, expected: f64| (found.unwrap() - expected).abs() < 1e-12;
        assert!(close(percentile(&ten, 50.0), 5.5));
        assert!(close(percentile(&ten, 90.0), 9.1));
        assert!(close(percentile(&ten, 99.0), 9.91));
        assert!(close(percentile(&ten, 100.0), 10.0));
        assert!(close(percentile(&[2.0, 4.0, 10.0], 90.0), 8.8));
        assert_eq!(percentile(&[3.0], 99.0), Some(3.0));
        assert_eq!(percentile(&[], 50.0), None);
        assert_eq!(summary(&[]), [None; 4]);
    }

    fn report() -> Report {
        let reply = |first, gaps: &[u64], latency, output_tokens| Reply {
            first: ms(first),
            gaps: gaps.iter().map(|&gap| ms(gap)).collect(),
            latency: ms(latency),
            input_tokens: Some(10),
            output_tokens: Some(output_tokens),
            asked_input_tokens: 10,
            asked_output_tokens: output_tokens,
        };
        Report {
            duration: ms(2000),
            // Two tokens in one piece of text in the second; one token in the third.
            replies: vec![reply(100, &[10, 30], 140, 3), reply(200, &[40], 240, 3), reply(300, &[], 300, 1)],
            failures: vec!["no room".into(), "again".into()],
        }
    }

    #[test]
    fn figures_are_those_of_the_replies() {
        let json = report().json();
        let number = |key: &str| json[key].as_f64().unwrap_or_else(|| panic!("{key}"));
        for (key, expected) in [
            ("completed", 3.0),
            ("failed", 2.0),
            ("total_input_tokens", 30.0),
            ("total_output_tokens", 7.0),
            ("duration", 2.0),
            ("request_throughput", 1.5),
            ("input_throughput", 15.0),
            ("output_throughput", 3.5),
            ("total_token_throughput", 18.5),
            ("concurrency", 0.34),
            ("mean_ttft_ms", 200.0),
            ("median_ttft_ms", 200.0),
            ("p90_ttft_ms", 280.0),
            ("p99_ttft_ms", 298.0),
            // (140 - 100) / 2 and (240 - 200) / 2; a reply of one token has none.
            ("mean_tpot_ms", 20.0),
            ("p99_tpot_ms", 20.0),
            ("mean_itl_ms", 80.0 / 3.0),
            ("median_itl_ms", 30.0),
            ("p90_itl_ms", 38.0),
            ("mean_e2e_latency_ms", 680.0 / 3.0),
            ("median_e2e_latency_ms", 240.0),
        ] {
            assert!((number(key) - expected).abs() < 1e-9, "{key}: {} is not {expected}", number(key));
        }
        assert_eq!(json["first_failure"], "no room");
        assert_eq!(json["replies_without_usage"], 0);
    }

    #[test]
    fn the_table_hides_no_failure() {
        let table = report().table();
        for needle in [
            "successful requests                                        3\n",
            "failed requests                                            2\n",
            "output tokens per second                                3.50\n",
            "time to first token (TTFT)                            200.00      200.00      280.00      298.00\n",
            "note: 2 requests failed; the first: no room\n",
        ] {
            assert!(table.contains(needle), "{table}");
        }
        assert!(!table.contains("asked for"), "{table}");
    }

    #[test]
    fn what_the_server_does_not_count_is_said() {
        let mut report = report();
        report.replies[1].output_tokens = None;
        report.replies[1].input_tokens = None;
        assert_eq!(report.totals(), (20, 6), "two pieces of text stand for three tokens");
        assert!(report.table().contains("1 replies came without usage"), "{}", report.table());
        assert_eq!(report.json()["replies_without_usage"], 1);
    }

    #[test]
    fn lengths_that_differ_from_what_was_asked_are_said() {
        let mut report = report();
        report.replies[0].asked_input_tokens = 13;
        report.replies[2].asked_output_tokens = 3;
        let table = report.table();
        assert!(table.contains("made for 33 tokens, and the server counted 30"), "{table}");
        assert!(table.contains("9 tokens were asked for, and 7 generated"), "{table}");
    }

    #[test]
    fn a_run_without_replies_is_no_division_by_zero() {
        let report = Report { replies: Vec::new(), duration: Duration::ZERO, ..report() };
        assert_eq!(report.json()["mean_ttft_ms"], Value::Null);
        assert!(report.table().contains("(TTFT)                                 -"), "{}", report.table());
    }
}
