//! `/metrics` as Prometheus reads it.

use std::collections::{BTreeMap, BTreeSet};

use r1_engine::{Handle, Stats, Status};
use r1_server::{ServerConfig, router};

use crate::support::{get, info, model};

/// A sample: its labels without `le`, and its value.
type Samples = BTreeMap<String, Vec<(BTreeMap<String, String>, f64)>>;

/// Reads the text format and holds it to its rules: HELP and TYPE before the first sample of a family, no sample twice,
/// histograms whose buckets grow and end at the count.
fn parse(text: &str) -> Samples {
    let (mut help, mut kinds) = (BTreeSet::new(), BTreeMap::new());
    let (mut samples, mut seen) = (Samples::new(), BTreeSet::new());
    let mut buckets: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, words) = rest.split_once(' ').unwrap_or_else(|| panic!("no help: {line}"));
            assert!(!words.is_empty() && help.insert(name.to_owned()), "{line}");
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{line} twice");
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
        assert!(seen.insert(series.to_owned()), "{series} twice");
        let (name, labels) = series.split_once('{').unwrap_or_else(|| panic!("no model_name: {line}"));
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        assert!(name.chars().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit()), "{line}");
        let mut labels: BTreeMap<String, String> = labels
            .strip_suffix('}')
            .unwrap_or_else(|| panic!("{line}"))
            .split("\",")
            .map(|label| label.split_once("=\"").unwrap_or_else(|| panic!("{line}")))
            .map(|(name, value)| (name.to_owned(), value.trim_end_matches('"').to_owned()))
            .collect();
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let family = family.filter(|family| kinds.get(*family).is_some_and(|kind| kind == "histogram"));
        let family = family.unwrap_or(name);
        assert!(help.contains(family) && kinds.contains_key(family), "{line} before its HELP and TYPE");
        if name.ends_with("_bucket") && family != name {
            let le = labels.remove("le").unwrap_or_else(|| panic!("{line}"));
            let before = buckets.entry(family.to_owned()).or_default();
            assert!(before.last().is_none_or(|last| *last <= value), "{line} holds less than the one before");
            before.push(value);
            assert!(le == "+Inf" || le.parse::<f64>().is_ok(), "{line}");
        }
        samples.entry(name.to_owned()).or_default().push((labels, value));
    }
    assert_eq!(help, kinds.keys().cloned().collect());
    for (family, buckets) in &buckets {
        assert_eq!(buckets.last(), Some(&samples[&format!("{family}_count")][0].1), "{family}");
    }
    samples
}

#[tokio::test]
async fn prometheus_can_read_every_metric_and_finds_those_that_dashboards_ask_for() {
    let (handle, inbox) = Handle::channel(info());
    inbox.set_status(Status::Ready);
    inbox.set_stats(Stats {
        running: 3,
        kv_blocks_total: 10,
        kv_blocks_used: 4,
        kv_blocks_cached: 5,
        kv_block_size_tokens: 64,
        prompt_tokens_total: 100,
        prefix_cache_query_tokens_total: 80,
        prefix_cache_hit_tokens_total: 20,
        generation_tokens_total: 7,
        preemptions_total: 2,
        gen_throughput_tokens_per_s: 12.5,
        ..Stats::default()
    });
    let router = router(ServerConfig::default(), model(), handle);
    let answer = get(&router, "/metrics").await;
    let samples = parse(&answer.text);
    let only = |name: &str| {
        let found = samples.get(name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(found.len(), 1, "{name}");
        assert_eq!(found[0].0["model_name"], "tiny-r1");
        found[0].1
    };
    for (name, value) in [
        ("vllm:num_requests_running", 3.0),
        ("vllm:num_requests_waiting", 0.0),
        ("vllm:kv_cache_usage_perc", 0.4),
        ("vllm:prompt_tokens_total", 100.0),
        ("vllm:generation_tokens_total", 7.0),
        ("vllm:num_preemptions_total", 2.0),
        ("vllm:prefix_cache_queries_total", 80.0),
        ("vllm:prefix_cache_hits_total", 20.0),
        ("sglang:num_running_reqs", 3.0),
        ("sglang:num_queue_reqs", 0.0),
        ("sglang:token_usage", 0.4),
        ("sglang:cache_hit_rate", 0.25),
        ("sglang:gen_throughput", 12.5),
        ("sglang:num_used_tokens", 256.0),
        ("r1_kv_blocks_cached", 5.0),
    ] {
        assert_eq!(only(name), value, "{name}");
    }
    for name in [
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "sglang:time_to_first_token_seconds",
    ] {
        assert_eq!(only(&format!("{name}_count")), 0.0);
        assert!(samples.contains_key(&format!("{name}_sum")), "{name}");
    }
    let reasons: BTreeSet<_> = samples["vllm:request_success_total"]
        .iter()
        .map(|(labels, _)| labels["finished_reason"].as_str())
        .collect();
    assert_eq!(reasons, BTreeSet::from(["abort", "error", "length", "stop"]));
}
