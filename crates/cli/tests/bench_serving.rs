//! `bench serving` against the served binary, and against servers that answer wrongly.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output};
use std::thread;

use r1_tests::server::Server;
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_r1-serve");

fn bench(url: &str, args: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(["bench", "serving", "--base-url", url]).args(args).env_remove("R1_API_KEY");
    command.output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

#[test]
fn a_server_is_measured_by_ids_by_words_and_in_chats() {
    let server = Server::start(BINARY, &["--max-num-seqs", "8"]);
    let url = format!("http://{}/v1", server.address);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("figures.json");
    let file = file.to_str().expect("a path");
    let common = [
        "--num-prompts",
        "12",
        "--random-input-len",
        "60",
        "--random-output-len",
        "9",
        "--random-range-ratio",
        "0.5",
        "--output-file",
        file,
    ];
    for (form, args, prompts) in [
        ("ids", &["--max-concurrency", "4"][..], "token_ids"),
        ("words", &["--text-prompts", "--request-rate", "200"], "words"),
        ("chats", &["--endpoint", "/v1/chat/completions", "--temperature", "0.6"], "words"),
        ("conversations", &["--dataset-name", "sharegpt-like", "--num-prompts", "3"], "token_ids"),
    ] {
        // The last of a flag that is given twice would be refused, so conversations bring their own number.
        let common = if form == "conversations" { &common[2..] } else { &common[..] };
        let output = bench(&url, &[common, args].concat());
        assert!(output.status.success(), "{form}: {}", text(&output.stderr));
        let json: Value = serde_json::from_slice(&fs::read(file).expect("a file")).expect("JSON");
        let number = |key: &str| json[key].as_f64().unwrap_or_else(|| panic!("{form}: {key} in {json}"));
        assert_eq!((json["prompts"].as_str(), json["failed"].as_u64()), (Some(prompts), Some(0)), "{form}");
        assert_eq!(json["completed"], if form == "conversations" { 3 } else { 12 });
        assert_eq!(json["replies_without_usage"], 0);
        // The model's end of sequence ends nothing.
        assert_eq!(json["total_output_tokens"], json["asked_output_tokens"], "{form}");
        let (asked, counted) = (number("asked_input_tokens"), number("total_input_tokens"));
        match prompts {
            "token_ids" => assert!(asked == counted, "{form}: {asked} {counted}"),
            _ => assert!((counted / asked - 1.0).abs() < 0.15, "{form}: {asked} {counted}"),
        }
        let (ttft, e2e) = (number("median_ttft_ms"), number("median_e2e_latency_ms"));
        assert!(ttft > 0.0 && ttft < e2e, "{form}: {ttft} {e2e}");
        for key in ["output_throughput", "request_throughput", "p99_itl_ms", "p90_tpot_ms", "concurrency"] {
            assert!(number(key) > 0.0, "{form}: {key}");
        }
        let said = text(&output.stdout);
        assert!(said.contains("successful requests") && said.contains("(TTFT)"), "{said}");
    }
    assert!(number_of_requests(&server) >= 39.0);
}

fn number_of_requests(server: &Server) -> f64 {
    let metrics = server.get("/metrics").expect("metrics").body;
    let lines = metrics.lines().filter(|line| line.starts_with("vllm:request_success_total"));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[test]
fn failures_are_counted_and_shown() {
    let server = Server::start(BINARY, &["--max-model-len", "64"]);
    let url = format!("http://{}", server.address);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("figures.json");
    // Some of the lengths do not fit the context; which of them is a matter of the seed.
    let args = [
        "--num-prompts",
        "20",
        "--random-input-len",
        "100",
        "--random-output-len",
        "2",
        "--random-range-ratio",
        "0.1",
        "--warmup-requests",
        "0",
        "--output-file",
        file.to_str().expect("a path"),
    ];
    let output = bench(&url, &args);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said} {}", text(&output.stderr));
    let json: Value = serde_json::from_slice(&fs::read(file).expect("a file")).expect("JSON");
    let (completed, failed) =
        (json["completed"].as_u64().expect("a number"), json["failed"].as_u64().expect("a number"));
    assert!(completed > 0 && failed > 0 && completed + failed == 20, "{json}");
    assert!(said.contains("requests failed; the first: the server answered 400"), "{said}");

    let output = bench(&url, &["--num-prompts", "3", "--random-input-len", "100", "--warmup-requests", "0"]);
    assert!(!output.status.success(), "all failed");
    assert!(
        text(&output.stdout).contains("failed requests")
            && text(&output.stderr).contains("all 3 requests failed")
    );
    let output = bench(&url, &["--num-prompts", "3", "--random-input-len", "100"]);
    assert!(!output.status.success() && text(&output.stderr).contains("the warm-up request failed"));
}

#[test]
fn wrong_flags_are_sentences() {
    for (args, needle) in [
        (&["--endpoint", "/v1/embeddings"][..], "--endpoint /v1/embeddings"),
        (&["--endpoint", "/v1/chat/completions", "--tokenizer-free", "--model", "m"], "--tokenizer-free"),
        (&["--request-rate", "0"], "--request-rate"),
        (&["--random-range-ratio", "2"], "--random-range-ratio"),
        (&["--num-prompts", "0"], "--num-prompts"),
        (&["--port", "1"], "--port"),
        (&[], "no server answers"),
    ] {
        // A port where nobody listens: it was free a moment ago.
        let free = TcpListener::bind("127.0.0.1:0").and_then(|probe| probe.local_addr()).expect("a port");
        let output = bench(&format!("http://{free}"), args);
        assert!(
            !output.status.success() && text(&output.stderr).contains(needle),
            "{args:?}: {}",
            text(&output.stderr)
        );
    }
}

/// A server that counts nothing and breaks off every other stream.
#[test]
fn a_stream_that_breaks_off_is_a_failure_and_missing_usage_is_said() {
    const EVENTS: &str =
        "data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: {\"choices\":[{\"text\":\"b\"}]}\n\n";
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        for (i, stream) in listener.incoming().enumerate() {
            let mut stream = stream.expect("a connection");
            // The whole request, as a server that closes before it has read it resets the connection.
            let (mut request, mut part) = (String::new(), [0; 4096]);
            while !(request.contains("ignore_eos")
                && (request.ends_with('}') || request.ends_with("0\r\n\r\n")))
            {
                let len = stream.read(&mut part).expect("a request");
                request += text(&part[..len]);
            }
            let end = if i % 2 == 0 { "data: [DONE]\n\n" } else { "" };
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";
            write!(stream, "{head}{EVENTS}{end}").expect("it is read");
        }
    });
    let args = [
        "--model",
        "m",
        "--tokenizer-free",
        "--vocab-size",
        "9",
        "--num-prompts",
        "4",
        "--random-input-len",
        "3",
        "--warmup-requests",
        "0",
        "--max-concurrency",
        "1",
    ];
    let output = bench(&format!("http://{address}"), &args);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said} {}", text(&output.stderr));
    assert!(said.contains("2 requests failed; the first: the server broke off before the end"), "{said}");
    assert!(said.contains("2 replies came without usage"), "{said}");
}
