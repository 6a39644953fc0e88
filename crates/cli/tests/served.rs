//! The binary as a newcomer and an operator meet it.
#![forbid(unsafe_code)]

use std::fs;
use std::io::Read;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use r1_tests::server::Server;
use serde_json::{Value, json};

const BINARY: &str = env!("CARGO_BIN_EXE_r1-serve");
const QUESTION: &str = "how many rs are in strawberry";

fn chat(body: &Value) -> String {
    let mut request = json!({"messages": [{"role": "user", "content": QUESTION}], "temperature": 0});
    request.as_object_mut().expect("an object").extend(body.as_object().expect("an object").clone());
    request.to_string()
}

#[test]
fn the_bundled_model_counts_the_rs() {
    let server = Server::start(BINARY, &[]);
    counts_the_rs(&server);

    let asked = Command::new(BINARY)
        .args(["chat", "--temperature", "0", "--url", &format!("http://{}", server.address), QUESTION])
        .output()
        .expect("the client runs");
    let said = String::from_utf8(asked.stdout).expect("text");
    assert!(asked.status.success() && said.contains("So I count 3.") && said.contains("**3**"), "{said}");
}

/// On emulated GPUs, in what GPUs run by default; the log says where memory went and what was captured.
#[test]
fn emulated_gpus_count_the_rs() {
    for (tp, ranks) in [("1", 1), ("2", 2)] {
        let log = tempfile::NamedTempFile::new().expect("a file");
        let args = ["--device", "emu", "--tp", tp, "--max-num-seqs", "5"];
        let server = Server::start_with_log(BINARY, &args, log.path());
        counts_the_rs(&server);
        leaves_nothing(&server);
        let said = fs::read_to_string(log.path()).expect("a log");
        for rank in 0..ranks {
            let plan = format!("rank {rank} of {ranks} uses memory, in GiB: weights ");
            assert!(said.contains(&plan), "{said}");
        }
        assert!(said.contains("captured decode steps of [1, 2, 4, 5] sequences in "), "{said}");
    }
}

/// Soon no request runs and no block is held.
fn leaves_nothing(server: &Server) {
    let since = Instant::now();
    let names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"];
    while names.iter().any(|name| server.metric(name) > 0.0) {
        assert!(since.elapsed() < Duration::from_secs(5), "{:?}", names.map(|name| server.metric(name)));
        thread::sleep(Duration::from_millis(20));
    }
}

/// Asks for a whole reply and for a stream.
fn counts_the_rs(server: &Server) {
    let whole = server.post("/v1/chat/completions", &chat(&json!({})));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole: Value = serde_json::from_str(&whole.body).expect("JSON");
    let message = &whole["choices"][0]["message"];
    assert!(message["content"].as_str().expect("content").contains("**3**"), "{message}");
    assert!(message["reasoning_content"].as_str().expect("reasoning").contains("So I count 3."), "{message}");

    let stream = server.post("/v1/chat/completions", &chat(&json!({"stream": true})));
    assert_eq!(stream.status, 200, "{}", stream.body);
    let (mut content, mut reasoning) = (String::new(), String::new());
    let mut events = stream.body.lines().filter_map(|line| line.strip_prefix("data: ")).peekable();
    while let Some(event) = events.next_if(|event| *event != "[DONE]") {
        let event: Value = serde_json::from_str(event).expect("JSON");
        let delta = &event["choices"][0]["delta"];
        content += delta["content"].as_str().unwrap_or_default();
        reasoning += delta["reasoning_content"].as_str().unwrap_or_default();
    }
    assert_eq!(events.next(), Some("[DONE]"));
    assert_eq!(Some(content.as_str()), message["content"].as_str());
    assert_eq!(Some(reasoning.as_str()), message["reasoning_content"].as_str());
}

#[test]
fn an_fp8_cache_answers_as_well() {
    for name in ["fp8", "fp8_e4m3"] {
        let server = Server::start(BINARY, &["--kv-cache-dtype", name]);
        let reply = server.post("/v1/chat/completions", &chat(&json!({})));
        assert_eq!(reply.status, 200, "{}", reply.body);
        let reply: Value = serde_json::from_str(&reply.body).expect("JSON");
        let content = reply["choices"][0]["message"]["content"].as_str().expect("content");
        assert!(content.contains("**3**"), "{content}");
    }
}

/// Sixteen clients stream for 20 seconds and leave at random moments; afterwards nothing is left behind.
#[test]
fn sixteen_streams_with_disconnects_leave_nothing_behind() {
    let server = Server::start(BINARY, &["--max-num-seqs", "12"]);
    let stop = AtomicBool::new(false);
    let (finished, left) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for client in 0..16_u64 {
            let (server, stop, finished, left) = (&server, &stop, &finished, &left);
            scope.spawn(move || {
                let mut state = client + 1;
                while !stop.load(Ordering::Relaxed) {
                    // A linear congruential sequence: which clients leave, and after how many bytes.
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let body = chat(&json!({"stream": true, "temperature": 0.6, "seed": state >> 33}));
                    let mut stream =
                        server.open("POST", "/v1/chat/completions", &body).expect("a connection");
                    let patience = if state >> 63 == 1 { 12 + (state >> 40) % 20_000 } else { u64::MAX };
                    let mut text = Vec::new();
                    stream.by_ref().take(patience).read_to_end(&mut text).expect("a reply");
                    let text = String::from_utf8_lossy(&text);
                    assert!(text.is_empty() || text.starts_with("HTTP/1.1 200"), "{text}");
                    assert!(!text.contains("\"error\""), "{text}");
                    if text.contains("data: [DONE]") {
                        finished.fetch_add(1, Ordering::Relaxed);
                    } else {
                        assert!(patience < u64::MAX, "a reply broke off: {text}");
                        left.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        thread::sleep(Duration::from_secs(20));
        stop.store(true, Ordering::Relaxed);
    });
    let (finished, left) = (finished.into_inner(), left.into_inner());
    assert!(finished > 16 && left > 16, "{finished} replies finished, {left} clients left");

    leaves_nothing(&server);
    assert_eq!(server.post("/v1/chat/completions", &chat(&json!({}))).status, 200);
}

/// What the binary says when it refuses a command line. One that begins to serve would never end: it is stopped after a minute.
fn failure(args: &[&str]) -> String {
    let [out, said] = [(); 2].map(|()| tempfile::NamedTempFile::new().expect("a file"));
    let mut child = Command::new(BINARY)
        .args(args)
        .stdout(out.reopen().expect("the file"))
        .stderr(said.reopen().expect("the file"))
        .spawn()
        .expect("the binary runs");
    let since = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a status") {
            break status;
        }
        if since.elapsed() > Duration::from_mins(1) {
            child.kill().expect("the process is stopped");
            child.wait().expect("the process ends");
            let printed = [&out, &said].map(|file| fs::read_to_string(file.path()).expect("text"));
            panic!("{args:?} was not refused within a minute:\n{}\n{}", printed[0], printed[1]);
        }
        thread::sleep(Duration::from_millis(20));
    };
    let said = fs::read_to_string(said.path()).expect("text");
    assert!(!status.success(), "{args:?} succeeded: {said}");
    said
}

#[test]
fn wrong_arguments_are_sentences() {
    for (args, needles) in [
        (&["--tp", "8"][..], &["num_attention_heads is 4", "8", "--tp"][..]),
        (&["--max-total-tokens", "100"], &["--max-total-tokens", "128", "4096"]),
        (&["--deterministic", "--device", "reference"], &["--deterministic", "--device cpu"]),
        (&["--enable-dp-attention"], &["--enable-dp-attention", "not supported yet"]),
        (&["--model", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"], &["Llama is not built yet"]),
        (&["--model", "/nowhere/at-all"], &["/nowhere/at-all"]),
        (
            &["--model", "deepseek-ai/DeepSeek-R1", "--download-dir", "/nowhere"],
            &["deepseek-ai/DeepSeek-R1", "hf download"],
        ),
        (&["--max-model-len", "100000"], &["--max-model-len", "4096"]),
        (&["--max-modal-len", "5"], &["--max-model-len"]),
        (&["--dtype", "float16"], &["float16", "bfloat16"]),
        (&["--dtype", "int8"], &["--dtype is float32, bfloat16 or auto", "--quantization int8"]),
        (&["--dtype", "int32"], &["invalid value 'int32'", "float32, bfloat16"]),
        (&["--kv-cache-dtype", "int8"], &["--kv-cache-dtype is auto, float32, bfloat16 or fp8"]),
        (&["--device", "reference", "--numa", "interleave"], &["--numa is for --device cpu"]),
        (
            &["--device", "reference", "--int8-activations", "off"],
            &["--int8-activations is for --device cpu"],
        ),
        (&["--int8-activations", "on"], &["--int8-activations on is for --quantization int8 or int4"]),
        (&["--kv-cache-dtype", "fp8_e5m2"], &["--kv-cache-dtype fp8_e5m2", "take fp8"]),
        (
            &["--dtype", "float32", "--kv-cache-dtype", "bfloat16"],
            &["--kv-cache-dtype bfloat16", "F32 activations", "take --dtype bfloat16", "auto or fp8"],
        ),
    ] {
        let message = failure(args);
        for needle in needles {
            assert!(message.contains(needle), "{args:?}: {message}");
        }
    }
    // What was compiled in fails for another reason, where there is no such GPU.
    let missing = [("cuda", cfg!(feature = "cuda")), ("rocm", cfg!(feature = "rocm"))];
    for (device, _) in missing.into_iter().filter(|(_, is_built)| !is_built) {
        let message = failure(&["--device", device]);
        for needle in [&format!("--device {device}"), &format!("feature `{device}`"), "--features"] {
            assert!(message.contains(needle), "{message}");
        }
    }
}
