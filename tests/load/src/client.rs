//! One connection and what is said over it. Must not know why a request is sent or what a good reply is.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::http::{Body, Head, parse_head, write_head};

const BUFFER_BYTES: usize = 16 << 10;
/// Longest silence of the server before a request counts as hung.
const SILENCE: Duration = Duration::from_mins(1);

/// A connection to the server.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Box<[u8]>,
    /// How much of the buffer was received and not used.
    filled: usize,
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await.context("connecting")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; BUFFER_BYTES].into_boxed_slice(), filled: 0 })
    }

    pub(crate) async fn send(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            self.stream.writable().await?;
            match self.stream.try_write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("sending a request"),
            }
        }
        Ok(())
    }

    /// Receives into the rest of the buffer; gives how many bytes came, none at the end.
    async fn receive(&mut self) -> io::Result<usize> {
        loop {
            self.stream.readable().await?;
            match self.stream.try_read(&mut self.buffer[self.filled..]) {
                Ok(received) => {
                    self.filled += received;
                    return Ok(received);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn receive_some(&mut self) -> Result<()> {
        match timeout(SILENCE, self.receive()).await {
            Ok(Ok(0)) => bail!("the server closed the connection within a reply"),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error).context("receiving a reply"),
            Err(_) => bail!("the server said nothing for {} s", SILENCE.as_secs()),
        }
    }

    fn consume(&mut self, used: usize) {
        self.buffer.copy_within(used..self.filled, 0);
        self.filled -= used;
    }

    /// The head of the next reply.
    pub(crate) async fn head(&mut self) -> Result<Head> {
        loop {
            if let Some((head, used)) =
                parse_head(&self.buffer[..self.filled]).map_err(|bad| anyhow::anyhow!(bad.0))?
            {
                self.consume(used);
                return Ok(head);
            }
            if self.filled == self.buffer.len() {
                bail!("a reply's head is over {BUFFER_BYTES} bytes");
            }
            self.receive_some().await?;
        }
    }

    /// Hands what has come of the body to `sink`, after waiting for something to come.
    pub(crate) async fn piece(&mut self, body: &mut Body, sink: &mut impl FnMut(&[u8])) -> Result<()> {
        if self.filled == 0 {
            self.receive_some().await?;
        }
        let used = body.push(&self.buffer[..self.filled], sink).map_err(|bad| anyhow::anyhow!(bad.0))?;
        self.consume(used);
        Ok(())
    }

    /// The rest of a reply whose head was read.
    pub(crate) async fn rest(&mut self, head: &Head, out: &mut Vec<u8>) -> Result<()> {
        let mut body = Body::new(head.framing);
        while !body.is_done() {
            self.piece(&mut body, &mut |bytes: &[u8]| out.extend_from_slice(bytes)).await?;
        }
        Ok(())
    }
}

/// `GET path` over a connection of its own.
pub(crate) async fn get(address: SocketAddr, path: &str) -> Result<(Head, String)> {
    let mut connection = Connection::open(address).await?;
    let mut request = Vec::new();
    write_head(&mut request, "GET", path, address, 0);
    connection.send(&request).await?;
    let head = connection.head().await?;
    let mut body = Vec::new();
    connection.rest(&head, &mut body).await?;
    Ok((head, String::from_utf8(body)?))
}

/// What the server's metrics say.
pub(crate) struct Metrics(String);

impl Metrics {
    pub(crate) async fn read(address: SocketAddr) -> Result<Self> {
        let (head, text) = get(address, "/metrics").await?;
        if head.status != 200 {
            bail!("/metrics answers {}", head.status);
        }
        Ok(Self(text))
    }

    /// The value of the metric of that name.
    pub(crate) fn value(&self, name: &str) -> Result<f64> {
        let line = self.0.lines().find(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ') || rest.starts_with('{'))
        });
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        value.with_context(|| format!("/metrics has no {name}"))
    }

    /// Running, waiting, and the share of the KV cache that sequences hold.
    pub(crate) fn load(&self) -> Result<(f64, f64, f64)> {
        Ok((
            self.value("vllm:num_requests_running")?,
            self.value("vllm:num_requests_waiting")?,
            self.value("vllm:kv_cache_usage_perc")?,
        ))
    }
}
