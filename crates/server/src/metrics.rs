//! Prometheus metrics under vLLM's and SGLang's names, so that existing dashboards work. What the engine counts is read
//! when metrics are asked for; what only the HTTP side sees is recorded as it happens.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use r1_engine::Stats;

/// Seconds to the first token: from a cached short prompt to a long one behind a queue.
const FIRST_TOKEN_BUCKETS_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Seconds between two tokens: from a GPU's step to a CPU's.
const INTER_TOKEN_BUCKETS_S: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0];
/// Seconds of a whole request or of its time in the queue.
const REQUEST_BUCKETS_S: &[f64] = &[
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];

const HISTOGRAMS: [(&str, &[f64]); 8] = [
    ("vllm:time_to_first_token_seconds", FIRST_TOKEN_BUCKETS_S),
    ("sglang:time_to_first_token_seconds", FIRST_TOKEN_BUCKETS_S),
    ("vllm:inter_token_latency_seconds", INTER_TOKEN_BUCKETS_S),
    ("sglang:inter_token_latency_seconds", INTER_TOKEN_BUCKETS_S),
    ("vllm:e2e_request_latency_seconds", REQUEST_BUCKETS_S),
    ("sglang:e2e_request_latency_seconds", REQUEST_BUCKETS_S),
    ("vllm:request_queue_time_seconds", REQUEST_BUCKETS_S),
    ("sglang:queue_time_seconds", REQUEST_BUCKETS_S),
];

const META: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

/// One measurement under both names.
struct Both<T> {
    vllm: T,
    sglang: T,
}

impl Both<Histogram> {
    fn record(&self, value: Duration) {
        self.vllm.record(value);
        self.sglang.record(value);
    }
}

impl Both<Gauge> {
    fn set(&self, value: f64) {
        self.vllm.set(value);
        self.sglang.set(value);
    }
}

impl Both<Counter> {
    fn absolute(&self, value: u64) {
        self.vllm.absolute(value);
        self.sglang.absolute(value);
    }
}

/// How a choice ended, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Stop,
    Length,
    Abort,
    Failed,
}

/// Every metric's handle; recording takes no lock.
pub(crate) struct Metrics {
    exporter: PrometheusHandle,
    running: Both<Gauge>,
    waiting: Both<Gauge>,
    kv_usage: Both<Gauge>,
    kv_blocks_used: Gauge,
    kv_blocks_total: Gauge,
    kv_blocks_cached: Gauge,
    kv_tokens_used: Gauge,
    kv_tokens_total: Gauge,
    gen_throughput: Gauge,
    cache_hit_rate: Gauge,
    prompt_tokens: Both<Counter>,
    generation_tokens: Both<Counter>,
    steps: Counter,
    failed_steps: Counter,
    preemptions: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    requests: Counter,
    stopped: Counter,
    length: Counter,
    aborted: Counter,
    failed: Counter,
    first_token: Both<Histogram>,
    inter_token: Both<Histogram>,
    e2e: Both<Histogram>,
    queue: Both<Histogram>,
}

/// Registers metrics one by one.
struct Registrar {
    recorder: PrometheusRecorder,
}

impl Registrar {
    fn counter(&self, name: &'static str, help: &'static str) -> Counter {
        self.recorder.describe_counter(name.into(), None, help.into());
        self.recorder.register_counter(&Key::from_name(name), &META)
    }

    fn finished(&self, reason: &'static str) -> Counter {
        let name = "vllm:request_success_total";
        self.recorder.describe_counter(name.into(), None, "Choices that ended, by reason.".into());
        self.recorder.register_counter(&Key::from_parts(name, &[("finished_reason", reason)]), &META)
    }

    fn gauge(&self, name: &'static str, help: &'static str) -> Gauge {
        self.recorder.describe_gauge(name.into(), None, help.into());
        self.recorder.register_gauge(&Key::from_name(name), &META)
    }

    fn histogram(&self, name: &'static str, help: &'static str) -> Histogram {
        self.recorder.describe_histogram(name.into(), None, help.into());
        self.recorder.register_histogram(&Key::from_name(name), &META)
    }

    fn both<T>(
        &self,
        register: fn(&Self, &'static str, &'static str) -> T,
        vllm: &'static str,
        sglang: &'static str,
        help: &'static str,
    ) -> Both<T> {
        Both { vllm: register(self, vllm, help), sglang: register(self, sglang, help) }
    }
}

impl Metrics {
    /// Registers everything, so that every name is there before the first request. `model` labels each sample.
    pub(crate) fn new(model: &str) -> Self {
        let mut builder = PrometheusBuilder::new().add_global_label("model_name", model);
        for (name, buckets) in HISTOGRAMS {
            builder = builder
                .set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
                .expect("the bucket lists are not empty");
        }
        let new = Registrar { recorder: builder.build_recorder() };
        Self {
            exporter: new.recorder.handle(),
            running: new.both(
                Registrar::gauge,
                "vllm:num_requests_running",
                "sglang:num_running_reqs",
                "Sequences in the running batch.",
            ),
            waiting: new.both(
                Registrar::gauge,
                "vllm:num_requests_waiting",
                "sglang:num_queue_reqs",
                "Sequences that wait.",
            ),
            kv_usage: new.both(
                Registrar::gauge,
                "vllm:kv_cache_usage_perc",
                "sglang:token_usage",
                "Share of the KV cache's blocks held by sequences; 1 is all.",
            ),
            kv_blocks_used: new.gauge("r1_kv_blocks_used", "KV cache blocks held by sequences."),
            kv_blocks_total: new.gauge("r1_kv_blocks_total", "KV cache blocks."),
            kv_blocks_cached: new.gauge(
                "r1_kv_blocks_cached",
                "KV cache blocks held by no sequence, but findable by their content.",
            ),
            kv_tokens_used: new.gauge("sglang:num_used_tokens", "Tokens that the held KV cache blocks hold."),
            kv_tokens_total: new.gauge("sglang:max_total_num_tokens", "Tokens that the KV cache holds."),
            gen_throughput: new.gauge("sglang:gen_throughput", "Generated tokens per second."),
            cache_hit_rate: new
                .gauge("sglang:cache_hit_rate", "Share of prompt tokens found in the prefix cache."),
            prompt_tokens: new.both(
                Registrar::counter,
                "vllm:prompt_tokens_total",
                "sglang:prompt_tokens_total",
                "Prompt tokens found in the prefix cache or computed.",
            ),
            generation_tokens: new.both(
                Registrar::counter,
                "vllm:generation_tokens_total",
                "sglang:generation_tokens_total",
                "Tokens generated.",
            ),
            steps: new.counter("r1_steps_total", "Steps run."),
            failed_steps: new.counter("r1_failed_steps_total", "Steps that failed."),
            preemptions: new.counter("vllm:num_preemptions_total", "Sequences that gave up their blocks."),
            prefix_queries: new
                .counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
            prefix_hits: new
                .counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
            requests: new.counter("sglang:num_requests_total", "Choices that ended."),
            stopped: new.finished("stop"),
            length: new.finished("length"),
            aborted: new.finished("abort"),
            failed: new.finished("error"),
            first_token: new.both(
                Registrar::histogram,
                "vllm:time_to_first_token_seconds",
                "sglang:time_to_first_token_seconds",
                "From a request's arrival to its first token.",
            ),
            inter_token: new.both(
                Registrar::histogram,
                "vllm:inter_token_latency_seconds",
                "sglang:inter_token_latency_seconds",
                "Between two tokens of a sequence.",
            ),
            e2e: new.both(
                Registrar::histogram,
                "vllm:e2e_request_latency_seconds",
                "sglang:e2e_request_latency_seconds",
                "From a request's arrival to its end.",
            ),
            queue: new.both(
                Registrar::histogram,
                "vllm:request_queue_time_seconds",
                "sglang:queue_time_seconds",
                "From submission to the first chunk of the prompt.",
            ),
        }
    }

    /// A prompt's first chunk runs.
    pub(crate) fn scheduled(&self, queued: Duration) {
        self.queue.record(queued);
    }

    /// A sequence's first token, so long after its request arrived.
    pub(crate) fn first_token(&self, after: Duration) {
        self.first_token.record(after);
    }

    /// A further token, so long after the one before.
    pub(crate) fn next_token(&self, after: Duration) {
        self.inter_token.record(after);
    }

    /// A choice ended, so long after its request arrived.
    pub(crate) fn ended(&self, how: Ended, after: Duration) {
        let counter = match how {
            Ended::Stop => &self.stopped,
            Ended::Length => &self.length,
            Ended::Abort => &self.aborted,
            Ended::Failed => &self.failed,
        };
        counter.increment(1);
        self.requests.increment(1);
        if matches!(how, Ended::Stop | Ended::Length) {
            self.e2e.record(after);
        }
    }

    /// Prometheus' text format.
    pub(crate) fn render(&self, stats: &Stats) -> String {
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let (used, total) = (stats.kv_blocks_used as f64, stats.kv_blocks_total as f64);
        let block = stats.kv_block_size_tokens as f64;
        self.running.set(stats.running as f64);
        self.waiting.set(stats.waiting as f64);
        self.kv_usage.set(share(used, total));
        self.kv_blocks_used.set(used);
        self.kv_blocks_total.set(total);
        self.kv_blocks_cached.set(stats.kv_blocks_cached as f64);
        self.kv_tokens_used.set(used * block);
        self.kv_tokens_total.set(total * block);
        self.gen_throughput.set(stats.gen_throughput_tokens_per_s);
        let (queries, hits) = (stats.prefix_cache_query_tokens_total, stats.prefix_cache_hit_tokens_total);
        self.cache_hit_rate.set(share(hits as f64, queries as f64));
        self.prefix_queries.absolute(queries);
        self.prefix_hits.absolute(hits);
        self.prompt_tokens.absolute(stats.prompt_tokens_total);
        self.generation_tokens.absolute(stats.generation_tokens_total);
        self.steps.absolute(stats.steps_total);
        self.failed_steps.absolute(stats.failed_steps_total);
        self.preemptions.absolute(stats.preemptions_total);
        self.exporter.render()
    }

    /// Folds recorded samples into their buckets; without it they pile up until somebody asks for the metrics.
    pub(crate) fn upkeep(&self) {
        self.exporter.run_upkeep();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_vocabularies_keep_their_colons_and_their_buckets() {
        let metrics = Metrics::new("m");
        metrics.scheduled(Duration::from_millis(200));
        metrics.first_token(Duration::from_millis(30));
        metrics.next_token(Duration::from_millis(20));
        metrics.ended(Ended::Stop, Duration::from_secs(1));
        let stats = Stats {
            running: 2,
            waiting: 3,
            kv_blocks_total: 8,
            kv_blocks_used: 2,
            kv_block_size_tokens: 16,
            prompt_tokens_total: 21,
            generation_tokens_total: 34,
            kv_blocks_cached: 5,
            prefix_cache_query_tokens_total: 8,
            prefix_cache_hit_tokens_total: 2,
            gen_throughput_tokens_per_s: 5.5,
            ..Stats::default()
        };
        let text = metrics.render(&stats);
        for line in [
            r#"vllm:num_requests_running{model_name="m"} 2"#,
            r#"sglang:num_running_reqs{model_name="m"} 2"#,
            r#"vllm:num_requests_waiting{model_name="m"} 3"#,
            r#"sglang:num_queue_reqs{model_name="m"} 3"#,
            r#"vllm:kv_cache_usage_perc{model_name="m"} 0.25"#,
            r#"sglang:token_usage{model_name="m"} 0.25"#,
            r#"sglang:num_used_tokens{model_name="m"} 32"#,
            r#"r1_kv_blocks_used{model_name="m"} 2"#,
            r#"r1_kv_blocks_total{model_name="m"} 8"#,
            r#"vllm:prompt_tokens_total{model_name="m"} 21"#,
            r#"vllm:generation_tokens_total{model_name="m"} 34"#,
            r#"sglang:gen_throughput{model_name="m"} 5.5"#,
            r#"sglang:cache_hit_rate{model_name="m"} 0.25"#,
            r#"vllm:prefix_cache_queries_total{model_name="m"} 8"#,
            r#"vllm:prefix_cache_hits_total{model_name="m"} 2"#,
            r#"vllm:request_success_total{model_name="m",finished_reason="stop"} 1"#,
            r#"vllm:request_success_total{model_name="m",finished_reason="length"} 0"#,
            r#"vllm:time_to_first_token_seconds_bucket{model_name="m",le="0.02"} 0"#,
            r#"vllm:time_to_first_token_seconds_bucket{model_name="m",le="0.04"} 1"#,
            r#"sglang:time_to_first_token_seconds_count{model_name="m"} 1"#,
            r#"vllm:inter_token_latency_seconds_bucket{model_name="m",le="0.025"} 1"#,
            r#"vllm:e2e_request_latency_seconds_bucket{model_name="m",le="1"} 1"#,
            r#"vllm:request_queue_time_seconds_bucket{model_name="m",le="0.3"} 1"#,
            r#"sglang:queue_time_seconds_count{model_name="m"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line} in\n{text}");
        }
    }
}
