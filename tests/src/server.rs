//! The served binary: starts it on a free port, talks HTTP to it, stops it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const START_TIMEOUT: Duration = Duration::from_mins(1);

/// A running `r1-serve`; killed when dropped.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

/// An HTTP reply.
#[derive(Debug)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Headers, as they came.
    pub head: String,
    /// The body, chunks joined.
    pub body: String,
}

impl Server {
    /// Starts `binary` with `args` on a free port and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn start(binary: &str, args: &[&str]) -> Self {
        Self::start_unready(binary, args).until_ready()
    }

    /// The same, with what it says of itself in a file.
    ///
    /// # Panics
    /// When it does not become ready, or the file cannot be written.
    pub fn start_with_log(binary: &str, args: &[&str], log: &Path) -> Self {
        let log = File::create(log).expect("a log file");
        Self::spawn(binary, args, log.into()).until_ready()
    }

    fn until_ready(self) -> Self {
        let since = Instant::now();
        while self.get("/health").is_none_or(|reply| reply.status != 200) {
            assert!(since.elapsed() < START_TIMEOUT, "the server is not ready");
            std::thread::sleep(Duration::from_millis(20));
        }
        self
    }

    /// Starts `binary` and does not wait.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_unready(binary: &str, args: &[&str]) -> Self {
        Self::spawn(binary, args, Stdio::null())
    }

    fn spawn(binary: &str, args: &[&str], log: Stdio) -> Self {
        // Another process may take the port in between; then the server says so and the test fails by name.
        let address =
            TcpListener::bind("127.0.0.1:0").and_then(|probe| probe.local_addr()).expect("a free port");
        let child = Command::new(binary)
            .args(args)
            .args(["--port", &address.port().to_string()])
            .env_remove("R1_API_KEY")
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        Self { child, address }
    }

    /// Sends a request and gives the open connection.
    pub fn open(&self, method: &str, path: &str, body: &str) -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(START_TIMEOUT))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        Ok(stream)
    }

    /// `GET path`; `None` when nobody answers.
    pub fn get(&self, path: &str) -> Option<Reply> {
        read_reply(self.open("GET", path, "").ok()?)
    }

    /// `POST path` with a JSON body.
    ///
    /// # Panics
    /// When nobody answers.
    pub fn post(&self, path: &str, body: &str) -> Reply {
        let stream = self.open("POST", path, body).expect("the server answers");
        read_reply(stream).expect("a whole reply")
    }

    /// A value of `/metrics`.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn metric(&self, name: &str) -> f64 {
        let metrics = self.get("/metrics").expect("metrics").body;
        let line = metrics.lines().find(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ') || rest.starts_with('{'))
        });
        let line = line.unwrap_or_else(|| panic!("no metric {name} in\n{metrics}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    }

    /// The process.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads a reply to its end and joins its chunks.
fn read_reply(stream: TcpStream) -> Option<Reply> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line == "\r\n" {
            break;
        }
        head += &line;
    }
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let mut body = Vec::new();
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).ok()?;
            let size = usize::from_str_radix(size.trim(), 16).ok()?;
            let from = body.len();
            body.resize(from + size, 0);
            reader.read_exact(&mut body[from..]).ok()?;
            reader.read_line(&mut String::new()).ok()?;
            if size == 0 {
                break;
            }
        }
    } else {
        reader.read_to_end(&mut body).ok()?;
    }
    Some(Reply { status, head, body: String::from_utf8(body).ok()? })
}
