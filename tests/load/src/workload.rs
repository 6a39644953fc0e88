//! Requests from a seed: the same seed asks the same things in the same order. Must not know when they are sent.

use std::io::Write;
use std::net::SocketAddr;

use crate::http::write_head;

/// Random numbers that a seed repeats (SplitMix64).
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// At least `from`, below `to`.
    pub(crate) fn range(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from)
    }

    /// True so many times in a hundred.
    pub(crate) fn percent(&mut self, share: u64) -> bool {
        self.next() % 100 < share
    }

    /// A generator of its own.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }
}

/// What a request asked for, as far as its reply is judged by it.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "switches of the API, each independent of the others")]
pub(crate) struct Spec {
    pub(crate) stream: bool,
    pub(crate) n: usize,
    pub(crate) max_tokens: u32,
    /// Nothing but `max_tokens` can end it.
    pub(crate) runs_to_its_limit: bool,
    pub(crate) include_usage: bool,
    pub(crate) logprobs: bool,
}

const QUESTIONS: [&str; 8] = [
    "how many rs are in strawberry",
    "how many es are in nevertheless",
    "How many times does the letter o occur in \\\"onomatopoeia\\\"?",
    "Why is the sky blue, and why is it red in the evening?",
    "Schreibe ein Gedicht über das Zählen großer Bäume.",
    "count the ls in parallel, then in hello",
    "2 + 2 = ?",
    "请用一句话介绍你自己",
];

const SENTENCES: [&str; 4] = [
    "The quick brown fox jumps over the lazy dog. ",
    "A queue that is full says so at once. ",
    "Every block that is taken is given back. ",
    "Streams end with a reason and a last line. ",
];

/// Writes a random request of the soak into `out`, head and body.
pub(crate) fn soak_request(rng: &mut Rng, address: SocketAddr, out: &mut Vec<u8>) -> Spec {
    let chat = rng.percent(60);
    let stream = rng.percent(85);
    let runs_to_its_limit = rng.percent(25);
    let long = runs_to_its_limit && rng.percent(30);
    let max_tokens = if long { rng.range(100, 220) } else { rng.range(4, 64) } as u32;
    let n = if rng.percent(10) { 2 } else { 1 };
    let logprobs = rng.percent(10);
    let include_usage = stream && rng.percent(50);
    let mut body = Vec::with_capacity(1024);
    body.extend_from_slice(b"{\"model\":\"tiny-r1\",");
    write_prompt(rng, chat, &mut body);
    let mut field = |text: std::fmt::Arguments| body.write_fmt(text).expect("a Vec takes everything");
    field(format_args!("\"max_tokens\":{max_tokens},\"n\":{n},\"stream\":{stream}"));
    if include_usage {
        field(format_args!(",\"stream_options\":{{\"include_usage\":true}}"));
    }
    if runs_to_its_limit {
        field(format_args!(",\"ignore_eos\":true"));
    }
    if logprobs {
        field(format_args!(
            "{}",
            if chat { ",\"logprobs\":true,\"top_logprobs\":2" } else { ",\"logprobs\":2" }
        ));
    }
    match rng.range(0, 5) {
        0 => field(format_args!(",\"temperature\":0")),
        1 => field(format_args!(",\"temperature\":0.6,\"top_p\":0.95,\"seed\":{}", rng.range(0, 1 << 40))),
        2 => field(format_args!(",\"temperature\":1.2,\"top_k\":20,\"min_p\":0.02")),
        3 => field(format_args!(
            ",\"repetition_penalty\":1.1,\"presence_penalty\":0.4,\"frequency_penalty\":0.2"
        )),
        _ => {}
    }
    if !runs_to_its_limit && rng.percent(15) {
        field(format_args!(",\"stop\":[\"count\",\"\\n\\n\"]"));
    }
    body.push(b'}');
    finish(out, address, chat, &body);
    Spec { stream, n, max_tokens, runs_to_its_limit, include_usage, logprobs }
}

fn write_prompt(rng: &mut Rng, chat: bool, body: &mut Vec<u8>) {
    let mut put = |text: &str| body.extend_from_slice(text.as_bytes());
    let question = QUESTIONS[rng.range(0, QUESTIONS.len() as u64) as usize];
    put(if chat { "\"messages\":[" } else { "\"prompt\":" });
    if chat && rng.percent(30) {
        put("{\"role\":\"system\",\"content\":\"You count letters and say how.\"},");
    }
    if !chat && rng.percent(20) {
        put("[0");
        for _ in 0..rng.range(3, 90) {
            put(&format!(",{}", rng.range(2, 500)));
        }
        put("],");
        return;
    }
    put(if chat { "{\"role\":\"user\",\"content\":\"" } else { "\"" });
    if rng.percent(25) {
        for _ in 0..rng.range(1, 8) {
            put(SENTENCES[rng.range(0, SENTENCES.len() as u64) as usize]);
        }
    }
    put(question);
    put(if chat { "\"}]," } else { "\"," });
}

/// Writes a completion that runs to its limit: what fills the batch and what knocks in vain.
pub(crate) fn steady_request(rng: &mut Rng, max_tokens: u32, address: SocketAddr, out: &mut Vec<u8>) -> Spec {
    let question = QUESTIONS[rng.range(0, QUESTIONS.len() as u64) as usize];
    let body = format!(
        "{{\"model\":\"tiny-r1\",\"prompt\":\"{question}\",\"max_tokens\":{max_tokens},\"ignore_eos\":true,\"stream\":true,\
         \"stream_options\":{{\"include_usage\":true}},\"seed\":{}}}",
        rng.range(0, 1 << 40)
    );
    finish(out, address, false, body.as_bytes());
    Spec { stream: true, n: 1, max_tokens, runs_to_its_limit: true, include_usage: true, logprobs: false }
}

/// Writes a completion of random tokens that takes that many places of the KV cache, `max_tokens` of them one by one.
pub(crate) fn filling_request(
    rng: &mut Rng,
    context: u32,
    max_tokens: u32,
    address: SocketAddr,
    out: &mut Vec<u8>,
) -> Spec {
    let ids: Vec<String> = (max_tokens..context).map(|_| rng.range(2, 500).to_string()).collect();
    let body = format!(
        "{{\"model\":\"tiny-r1\",\"prompt\":[{}],\"max_tokens\":{max_tokens},\"ignore_eos\":true}}",
        ids.join(",")
    );
    finish(out, address, false, body.as_bytes());
    Spec { n: 1, max_tokens, runs_to_its_limit: true, ..Spec::default() }
}

fn finish(out: &mut Vec<u8>, address: SocketAddr, chat: bool, body: &[u8]) {
    out.clear();
    let path = if chat { "/v1/chat/completions" } else { "/v1/completions" };
    write_head(out, "POST", path, address, body.len());
    out.extend_from_slice(body);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::Ipv4Addr;

    use serde_json::Value;

    use super::*;

    #[test]
    fn a_seed_repeats_its_requests_and_they_are_json() {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let (mut first, mut again) = (Rng::new(7), Rng::new(7));
        let (mut a, mut b, mut kinds) = (Vec::new(), Vec::new(), BTreeSet::new());
        for _ in 0..500 {
            let spec = soak_request(&mut first, address, &mut a);
            soak_request(&mut again, address, &mut b);
            assert_eq!(a, b);
            let text = std::str::from_utf8(&a).expect("UTF-8");
            let (head, body) = text.split_once("\r\n\r\n").expect("a head");
            assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
            let json: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"));
            assert_eq!((&json["n"], &json["stream"]), (&spec.n.into(), &spec.stream.into()));
            assert_eq!(json["ignore_eos"] == true, spec.runs_to_its_limit);
            assert_eq!(json["stream_options"]["include_usage"] == true, spec.include_usage);
            kinds.insert((head.contains("chat"), spec.stream, spec.n, spec.logprobs));
        }
        assert!(kinds.len() >= 12, "{kinds:?}");
        filling_request(&mut first, 50, 10, address, &mut a);
        let body = std::str::from_utf8(&a).unwrap().split_once("\r\n\r\n").unwrap().1;
        let json: Value = serde_json::from_str(body).expect("JSON");
        assert_eq!((json["prompt"].as_array().map(Vec::len), &json["max_tokens"]), (Some(40), &10.into()));
        steady_request(&mut first, 9, address, &mut a);
        let body = std::str::from_utf8(&a).unwrap().split_once("\r\n\r\n").unwrap().1;
        assert_eq!(serde_json::from_str::<Value>(body).expect("JSON")["max_tokens"], 9);
    }
}
