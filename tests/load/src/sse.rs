//! Server-sent events cut out of a body, and what a stream of completions must look like. Must not know sockets.

use serde_json::Value;

use crate::http::find;
use crate::workload::Spec;

/// Cuts a body into events, however it was split on its way.
#[derive(Default)]
pub(crate) struct Frames {
    /// The beginning of an event whose end is missing.
    partial: Vec<u8>,
}

impl Frames {
    /// Hands each event that is now complete to `sink`, without the empty line that ends it.
    pub(crate) fn push(&mut self, mut bytes: &[u8], sink: &mut impl FnMut(&[u8])) {
        while !self.partial.is_empty() {
            // The end may lie across the seam, so the last byte held is looked at again.
            let from = self.partial.len() - 1;
            let end = if self.partial[from] == b'\n' && bytes.first() == Some(&b'\n') {
                1
            } else if let Some(at) = find(bytes, b"\n\n") {
                at + 2
            } else {
                self.partial.extend_from_slice(bytes);
                return;
            };
            self.partial.extend_from_slice(&bytes[..end]);
            sink(&self.partial[..self.partial.len() - 2]);
            self.partial.clear();
            bytes = &bytes[end..];
        }
        while let Some(end) = find(bytes, b"\n\n") {
            sink(&bytes[..end]);
            bytes = &bytes[end + 2..];
        }
        self.partial.extend_from_slice(bytes);
    }

    /// Whether an event is incomplete.
    pub(crate) fn is_partial(&self) -> bool {
        !self.partial.is_empty()
    }
}

/// What was seen of one stream.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Events with text.
    pub(crate) texts: u64,
    /// Tokens that log-probabilities were given for.
    logprobs: u64,
    finished: usize,
    finished_by_length: usize,
    usage: Option<Value>,
    done: bool,
    /// The first thing that was wrong.
    problem: Option<String>,
}

impl Tally {
    /// Takes one event; `deep` reads its JSON whole, otherwise it is looked through for what is counted.
    ///
    /// The keys that are searched stand in quotes, and quotes inside a JSON string are escaped, so text cannot pass for
    /// them.
    pub(crate) fn take(&mut self, event: &[u8], deep: bool) {
        if event.starts_with(b":") {
            return;
        }
        let wrong = |what: &str| Some(format!("{what}: {}", String::from_utf8_lossy(event)));
        let Some(data) = event.strip_prefix(b"data: ") else {
            self.problem = self.problem.take().or_else(|| wrong("an event without data"));
            return;
        };
        if self.done {
            self.problem = self.problem.take().or_else(|| wrong("an event behind [DONE]"));
        }
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        if !(data.starts_with(b"{") && data.ends_with(b"}")) || data.contains(&b'\n') {
            self.problem = self.problem.take().or_else(|| wrong("an event that is not one line of JSON"));
            return;
        }
        if data.starts_with(br#"{"error""#) {
            self.problem = self.problem.take().or_else(|| wrong("an error in a stream"));
            return;
        }
        let has_text = [&br#""content":""#[..], br#""reasoning_content":""#, br#""text":""#]
            .iter()
            .any(|key| find(data, key).is_some_and(|at| data.get(at + key.len()) != Some(&b'"')));
        self.texts += u64::from(has_text);
        self.logprobs += count_logprobs(data);
        if find(data, br#""finish_reason":""#).is_some() {
            self.finished += 1;
            self.finished_by_length += usize::from(find(data, br#""finish_reason":"length""#).is_some());
        }
        let has_usage = find(data, br#""usage":{"#).is_some();
        if deep || has_usage {
            match serde_json::from_slice::<Value>(data) {
                Ok(mut chunk) if has_usage => self.usage = Some(chunk["usage"].take()),
                Ok(_) => {}
                Err(_) => self.problem = self.problem.take().or_else(|| wrong("an event that is not JSON")),
            }
        }
    }

    /// Judges a stream that has ended.
    pub(crate) fn check(self, spec: &Spec, partial: bool) -> Result<(), String> {
        if let Some(problem) = self.problem {
            return Err(problem);
        }
        if partial || !self.done {
            return Err(format!("a stream ended without [DONE], after {} events with text", self.texts));
        }
        if self.finished != spec.n {
            return Err(format!("{} finish reasons for {} choices", self.finished, spec.n));
        }
        match (spec.include_usage, &self.usage) {
            (true, Some(usage)) => {
                check_usage(spec, usage, self.finished_by_length)?;
                let completion = usage["completion_tokens"].as_u64().unwrap_or(0);
                if spec.logprobs && completion != self.logprobs {
                    return Err(format!("{} tokens have log-probabilities; usage: {usage}", self.logprobs));
                }
                Ok(())
            }
            (true, None) => Err("usage was asked for and did not come".into()),
            (false, Some(_)) => Err("usage came and was not asked for".into()),
            (false, None) => Ok(()),
        }
    }
}

/// Tokens with log-probabilities in one event: chat names each, completions list numbers.
fn count_logprobs(data: &[u8]) -> u64 {
    const EACH: &[u8] = br#""top_logprobs":["#;
    const LIST: &[u8] = br#""token_logprobs":["#;
    if let Some(at) = find(data, LIST) {
        let list = data[at + LIST.len()..].split(|byte| *byte == b']').next().unwrap_or_default();
        return list.split(|byte| *byte == b',').filter(|number| !number.is_empty()).count() as u64;
    }
    let (mut count, mut rest) = (0, data);
    while let Some(at) = find(rest, EACH) {
        count += 1;
        rest = &rest[at + EACH.len()..];
    }
    count
}

/// Judges a reply that was not streamed.
pub(crate) fn check_whole(spec: &Spec, body: &[u8]) -> Result<(), String> {
    let reply: Value =
        serde_json::from_slice(body).map_err(|error| format!("a reply that is not JSON: {error}"))?;
    let choices = reply["choices"].as_array().map_or(&[][..], Vec::as_slice);
    if choices.len() != spec.n || choices.iter().any(|choice| !choice["finish_reason"].is_string()) {
        return Err(format!("not {} finished choices: {reply}", spec.n));
    }
    let by_length = choices.iter().filter(|choice| choice["finish_reason"] == "length").count();
    check_usage(spec, &reply["usage"], by_length)
}

/// Usage must add up, and be exact where every choice ran to its limit.
fn check_usage(spec: &Spec, usage: &Value, by_length: usize) -> Result<(), String> {
    let wrong =
        |what: &str| Err(format!("{what}, with n = {}, max_tokens = {}: {usage}", spec.n, spec.max_tokens));
    let (Some(prompt), Some(completion), Some(total)) = (
        usage["prompt_tokens"].as_u64(),
        usage["completion_tokens"].as_u64(),
        usage["total_tokens"].as_u64(),
    ) else {
        return wrong("usage without its counts");
    };
    let most = spec.n as u64 * u64::from(spec.max_tokens);
    if prompt == 0 || prompt + completion != total || completion == 0 || completion > most {
        return wrong("usage that cannot be");
    }
    if spec.runs_to_its_limit && by_length != spec.n {
        return wrong("ignore_eos did not run to max_tokens");
    }
    if by_length == spec.n && completion != most {
        return wrong("every choice ran to max_tokens, usage says otherwise");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        Spec { n: 1, max_tokens: 2, stream: true, include_usage: true, ..Spec::default() }
    }

    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}],\"usage\":null}\n\n",
        ": ping\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"a \\\"finish_reason\\\":\\\"b\"},\"finish_reason\":null}],\"usage\":null}\n\n",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"length\"}],\"usage\":null}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5}}\n\n",
        "data: [DONE]\n\n",
    );

    fn read(pieces: &[&[u8]]) -> (Tally, Vec<Vec<u8>>, bool) {
        let (mut frames, mut tally, mut events) = (Frames::default(), Tally::default(), Vec::new());
        for piece in pieces {
            frames.push(piece, &mut |event: &[u8]| {
                tally.take(event, true);
                events.push(event.to_vec());
            });
        }
        (tally, events, frames.is_partial())
    }

    #[test]
    fn events_split_anywhere_are_the_same() {
        let wire = STREAM.as_bytes();
        let whole: Vec<Vec<u8>> =
            STREAM.split_terminator("\n\n").map(|event| event.as_bytes().to_vec()).collect();
        for first in 0..=wire.len() {
            let (tally, events, partial) = read(&[&wire[..first], &wire[first..]]);
            assert_eq!(events, whole, "split at {first}");
            assert_eq!((tally.texts, tally.finished), (1, 1));
            assert_eq!(tally.check(&spec(), partial), Ok(()), "split at {first}");
        }
        for size in 1..7 {
            let pieces: Vec<&[u8]> = wire.chunks(size).collect();
            assert_eq!(read(&pieces).1, whole, "pieces of {size}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_stream_is_said() {
        let check = |text: &str, spec: &Spec| {
            let (tally, _, partial) = read(&[text.as_bytes()]);
            tally.check(spec, partial).expect_err("a fault")
        };
        for (from, to, says) in [
            ("data: [DONE]\n\n", "", "without [DONE]"),
            ("[DONE]\n\n", "[DONE]\n", "without [DONE]"),
            ("\"finish_reason\":\"length\"", "\"finish_reason\":null", "0 finish reasons"),
            ("data: {\"choices\":[]", "data: {\"choices\":[}", "not JSON"),
            ("data: {\"choices\":[]", "event: x\ndata: {\"choices\":[]", "without data"),
            (": ping", "data: {\"error\":{}}", "an error"),
            (
                "\"completion_tokens\":2,\"total_tokens\":5",
                "\"completion_tokens\":1,\"total_tokens\":4",
                "otherwise",
            ),
            ("\"total_tokens\":5", "\"total_tokens\":6", "cannot be"),
            ("data: [DONE]", "data: [DONE]\n\ndata: {}", "behind [DONE]"),
        ] {
            let text = STREAM.replace(from, to);
            assert_ne!(text, STREAM, "{from}");
            let said = check(&text, &spec());
            assert!(said.contains(says), "{from} → {to}: {said}");
        }
        assert!(check(STREAM, &Spec { include_usage: false, ..spec() }).contains("not asked for"));
        assert!(check(STREAM, &Spec { logprobs: true, ..spec() }).contains("log-probabilities"));
    }

    #[test]
    fn log_probabilities_are_counted_in_both_shapes() {
        for (data, count) in [
            (r#"{"logprobs":{"token_logprobs":[-0.5,-1e-3],"top_logprobs":[{}]}}"#, 2),
            (r#"{"logprobs":{"token_logprobs":[],"top_logprobs":[]}}"#, 0),
            (r#"{"content":[{"token":"a","top_logprobs":[]},{"token":"b","top_logprobs":[{}]}]}"#, 2),
            (r#"{"logprobs":null}"#, 0),
        ] {
            assert_eq!(count_logprobs(data.as_bytes()), count, "{data}");
        }
    }

    #[test]
    fn plain_replies_are_checked() {
        let reply = r#"{"choices":[{"finish_reason":"length"}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}"#;
        assert_eq!(check_whole(&spec(), reply.as_bytes()), Ok(()));
        for (from, to) in [("\"length\"", "null"), ("2,", "1,"), ("{\"fin", "{},{\"fin"), ("}}", "}")] {
            assert!(check_whole(&spec(), reply.replace(from, to).as_bytes()).is_err(), "{from}");
        }
    }
}
