//! Whatever a reply's JSON holds: its server-sent events, read by the standard's rules, are the same JSON. Shared by the
//! fuzz target and the replay of its corpus. The reader here knows the standard and nothing of the writer.

use serde_json::{Value, json};

/// `frames` makes the body of a stream of payloads; lines of the input are payloads, as JSON where they are that.
pub(crate) fn run(data: &[u8], frames: impl Fn(&[Value]) -> Vec<u8>) {
    let text = String::from_utf8_lossy(data);
    let payloads: Vec<Value> = text
        .split('\u{1e}')
        .map(|part| {
            let as_text = || json!({"choices": [{"index": 0, "delta": {"content": part}}]});
            serde_json::from_str(part).unwrap_or_else(|_| as_text())
        })
        .collect();
    let body = frames(&payloads);
    let mut events = read_events(std::str::from_utf8(&body).expect("event streams are UTF-8"));
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    assert_eq!(events.len(), payloads.len());
    for (event, payload) in events.iter().zip(&payloads) {
        assert_eq!(*event, payload.to_string());
    }
}

/// The data of every event, by the HTML standard's rules for `text/event-stream`.
fn read_events(stream: &str) -> Vec<String> {
    let stream = stream.strip_prefix('\u{feff}').unwrap_or(stream);
    let mut events = Vec::new();
    let mut data: Option<String> = None;
    let mut rest = stream;
    while let Some(end) = rest.find(['\r', '\n']) {
        let line = &rest[..end];
        let width = if rest[end..].starts_with("\r\n") { 2 } else { 1 };
        rest = &rest[end + width..];
        if line.is_empty() {
            events.extend(data.take());
            continue;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => match &mut data {
                Some(lines) => {
                    lines.push('\n');
                    lines.push_str(value);
                }
                None => data = Some(value.to_owned()),
            },
            // A comment.
            "" => {}
            other => panic!("field {other:?} of an event is not one that replies use"),
        }
    }
    assert!(rest.is_empty() && data.is_none(), "the stream ends inside an event");
    events
}
