//! HTTP/1.1 as bytes: a request's head, a reply's head, bodies by length or in chunks. Works on whatever pieces arrive and
//! must not know sockets.

use std::io::Write;
use std::net::SocketAddr;

/// What a client cannot accept.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) String);

/// Appends the head of a request with a body of that many bytes.
pub(crate) fn write_head(out: &mut Vec<u8>, method: &str, path: &str, address: SocketAddr, body_len: usize) {
    write!(
        out,
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {body_len}\r\n\r\n"
    )
    .expect("a Vec takes everything");
}

/// A reply's head, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) framing: Framing,
    pub(crate) event_stream: bool,
    pub(crate) keep_alive: bool,
    pub(crate) retry_after_s: Option<u64>,
}

/// How the end of a body is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length(u64),
    Chunked,
}

/// The head at the beginning of `bytes` and its length; `None` while it is not complete.
pub(crate) fn parse_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, Malformed> {
    let Some(end) = find(bytes, b"\r\n\r\n") else {
        return Ok(None);
    };
    let text =
        std::str::from_utf8(&bytes[..end]).map_err(|_| Malformed("a head that is not UTF-8".into()))?;
    let mut lines = text.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let status = status_line
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3)?.parse().ok())
        .ok_or_else(|| Malformed(format!("status line {status_line:?}")))?;
    let (mut framing, mut event_stream, mut keep_alive, mut retry_after_s) = (None, false, true, None);
    for line in lines {
        let (name, value) = line.split_once(':').ok_or_else(|| Malformed(format!("header {line:?}")))?;
        let value = value.trim();
        let is = |wanted: &str| name.eq_ignore_ascii_case(wanted);
        if is("content-length") {
            let length = value.parse().map_err(|_| Malformed(format!("header {line:?}")))?;
            framing = Some(Framing::Length(length));
        } else if is("transfer-encoding") && value.eq_ignore_ascii_case("chunked") {
            framing = Some(Framing::Chunked);
        } else if is("content-type") {
            event_stream = value.starts_with("text/event-stream");
        } else if is("connection") {
            keep_alive = !value.eq_ignore_ascii_case("close");
        } else if is("retry-after") {
            retry_after_s = value.parse().ok();
        }
    }
    let framing = framing.ok_or_else(|| Malformed(format!("a reply of unknown length:\n{text}")))?;
    Ok(Some((Head { status, framing, event_stream, keep_alive, retry_after_s }, end + 4)))
}

/// Where `needle` begins.
pub(crate) fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    let (&first, rest) = needle.split_first()?;
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|byte| *byte == first) {
        let after = from + at + 1;
        if bytes[after..].starts_with(rest) {
            return Some(after - 1);
        }
        from = after;
    }
    None
}

/// Takes a body out of its framing, piece by piece.
#[derive(Debug)]
pub(crate) struct Body {
    state: State,
}

#[derive(Debug)]
enum State {
    /// This many bytes of the body are missing.
    Length(u64),
    /// In a chunk's size line: its value so far, whether a digit was seen, whether an extension is skipped.
    Size {
        value: u64,
        digits: u32,
        extension: bool,
    },
    /// In a chunk's bytes.
    Chunk(u64),
    /// Behind a chunk's bytes: this much of the line break was seen.
    ChunkEnd(usize),
    /// Behind the last chunk: length of the trailer line so far.
    Trailer(usize),
    Done,
}

impl State {
    const NEW_SIZE: Self = Self::Size { value: 0, digits: 0, extension: false };
}

impl Body {
    pub(crate) fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::NEW_SIZE,
        };
        Self { state }
    }

    pub(crate) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Feeds what was received and hands the body's bytes in it to `sink`; gives how many bytes belong to this reply.
    pub(crate) fn push(&mut self, input: &[u8], sink: &mut impl FnMut(&[u8])) -> Result<usize, Malformed> {
        let mut at = 0;
        while at < input.len() && !self.is_done() {
            let rest = &input[at..];
            match &mut self.state {
                State::Length(missing) => {
                    let take = rest.len().min(usize::try_from(*missing).unwrap_or(usize::MAX));
                    sink(&rest[..take]);
                    at += take;
                    *missing -= take as u64;
                    if *missing == 0 {
                        self.state = State::Done;
                    }
                }
                State::Chunk(missing) => {
                    let take = rest.len().min(usize::try_from(*missing).unwrap_or(usize::MAX));
                    sink(&rest[..take]);
                    at += take;
                    *missing -= take as u64;
                    if *missing == 0 {
                        self.state = State::ChunkEnd(0);
                    }
                }
                State::Size { .. } | State::ChunkEnd(_) | State::Trailer(_) => {
                    self.framing_byte(rest[0])?;
                    at += 1;
                }
                State::Done => {}
            }
        }
        Ok(at)
    }

    /// One byte that is not the body's.
    fn framing_byte(&mut self, byte: u8) -> Result<(), Malformed> {
        let bad = |what: &str| Err(Malformed(format!("byte {byte:#04x} {what}")));
        match &mut self.state {
            State::Size { value, digits, extension } => match byte {
                b'\n' if *digits > 0 => {
                    self.state = if *value == 0 { State::Trailer(0) } else { State::Chunk(*value) };
                }
                b'\r' => {}
                b';' if *digits > 0 => *extension = true,
                _ if *extension => {}
                _ => match (byte as char).to_digit(16) {
                    Some(digit) if *digits < 15 => {
                        *value = *value * 16 + u64::from(digit);
                        *digits += 1;
                    }
                    _ => return bad("in a chunk's size"),
                },
            },
            State::ChunkEnd(seen) => match (byte, *seen) {
                (b'\r', 0) => *seen = 1,
                (b'\n', 1) => self.state = State::NEW_SIZE,
                _ => return bad("behind a chunk"),
            },
            State::Trailer(length) => match byte {
                b'\n' if *length == 0 => self.state = State::Done,
                b'\n' => *length = 0,
                b'\r' => {}
                _ => *length += 1,
            },
            State::Length(_) | State::Chunk(_) | State::Done => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(framing: Framing, pieces: &[&[u8]]) -> Result<(Vec<u8>, usize, bool), Malformed> {
        let (mut body, mut text, mut used) = (Body::new(framing), Vec::new(), 0);
        for piece in pieces {
            used += body.push(piece, &mut |bytes: &[u8]| text.extend_from_slice(bytes))?;
        }
        Ok((text, used, body.is_done()))
    }

    #[test]
    fn chunks_split_at_every_byte_give_the_same_body() {
        let wire = b"5\r\nhello\r\n1A;name=value\r\n, abcdefghijklmnopqrstuvwx\r\n0\r\nTrailer: x\r\n\r\nHTTP/1.1 200";
        let length = wire.len() - b"HTTP/1.1 200".len();
        let expected = (b"hello, abcdefghijklmnopqrstuvwx".to_vec(), length, true);
        for first in 0..=wire.len() {
            for second in first..=wire.len() {
                let pieces = [&wire[..first], &wire[first..second], &wire[second..]];
                assert_eq!(decode(Framing::Chunked, &pieces).as_ref(), Ok(&expected), "at {first}, {second}");
            }
        }
        let bytes: Vec<&[u8]> = wire.chunks(1).collect();
        assert_eq!(decode(Framing::Chunked, &bytes), Ok(expected));
        for end in 0..length {
            let (_, used, done) = decode(Framing::Chunked, &[&wire[..end]]).expect("a beginning");
            assert!(!done && used == end, "complete at {end}");
        }
    }

    #[test]
    fn lengths_end_where_they_say() {
        assert_eq!(decode(Framing::Length(3), &[b"a", b"bcd"]), Ok((b"abc".to_vec(), 3, true)));
        assert_eq!(decode(Framing::Length(3), &[b"ab"]), Ok((b"ab".to_vec(), 2, false)));
        assert_eq!(decode(Framing::Length(0), &[b"x"]), Ok((Vec::new(), 0, true)));
    }

    #[test]
    fn broken_chunks_are_refused() {
        for wire in [&b"x\r\n"[..], b"\n", b"2\r\nabc\r\n", b"1\r\na\n", b"1000000000000000\r\n"] {
            assert!(decode(Framing::Chunked, &[wire]).is_err(), "{}", String::from_utf8_lossy(wire));
        }
    }

    #[test]
    fn heads_are_read_when_complete() {
        let wire =
            b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: text/event-stream; x\r\nRetry-After: 2\r\n\
                     Content-Length: 12\r\nconnection: close\r\n\r\n{";
        for end in 0..wire.len() - 1 {
            assert_eq!(parse_head(&wire[..end]), Ok(None), "at {end}");
        }
        let head = Head {
            status: 429,
            framing: Framing::Length(12),
            event_stream: true,
            keep_alive: false,
            retry_after_s: Some(2),
        };
        assert_eq!(parse_head(wire), Ok(Some((head, wire.len() - 1))));
        let (head, _) =
            parse_head(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").unwrap().unwrap();
        assert_eq!((head.framing, head.keep_alive, head.retry_after_s), (Framing::Chunked, true, None));
        for bad in [&b"HTTP/1.1 200 OK\r\n\r\n"[..], b"ICY 200\r\n\r\n", b"HTTP/1.1 200 OK\r\nx\r\n\r\n"] {
            assert!(parse_head(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn needles_are_found() {
        for (text, needle, at) in
            [("aab", "ab", Some(1)), ("aaab", "aab", Some(1)), ("ab", "abc", None), ("", "a", None)]
        {
            assert_eq!(find(text.as_bytes(), needle.as_bytes()), at, "{needle} in {text}");
        }
    }
}
