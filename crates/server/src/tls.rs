//! The bytes under a connection, plain or TLS, and when the client last took some of them. Must not know HTTP beyond what
//! tells a client that it speaks to the wrong port.

use std::fmt;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, InconsistentKeys};
use tokio_rustls::server::TlsStream;

use crate::config::ConfigError;

/// What every TLS handshake begins with: a record of that type.
const HANDSHAKE: u8 = 0x16;
/// In order of preference.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// A certificate and its key, ready for connections.
#[derive(Clone)]
pub struct Tls(Arc<rustls::ServerConfig>);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// Reads PEM files: a certificate, followed by those that vouch for it, and its private key, which may stand in the same
    /// file. TLS 1.2 and 1.3 are spoken, and HTTP/2 and HTTP/1.1 offered.
    pub fn open(certificate: &Path, key: &Path) -> Result<Self, ConfigError> {
        let chain = read_chain(certificate)?;
        let private = read_key(key)?;
        let provider = Arc::new(ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider's own versions");
        let config = builder.with_no_client_auth().with_single_cert(chain, private);
        let mut config = config.map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                ConfigError::KeyMismatch { certificate: certificate.to_owned(), key: key.to_owned() }
            }
            rustls::Error::InvalidCertificate(why) => {
                ConfigError::Certificate { path: certificate.to_owned(), reason: format!("{why:?}") }
            }
            error => ConfigError::PrivateKey { path: key.to_owned(), reason: error.to_string() },
        })?;
        config.alpn_protocols = PROTOCOLS.iter().map(|name| name.to_vec()).collect();
        Ok(Self(Arc::new(config)))
    }

    /// Shakes hands, within `limit`. A client that speaks plain HTTP is told apart; `None` where there is nobody to talk to.
    pub(crate) async fn accept(&self, stream: TcpStream, limit: Duration) -> Option<Accepted> {
        let shaking = async {
            let mut first = [0];
            if stream.peek(&mut first).await? == 1 && first[0] != HANDSHAKE && first[0].is_ascii_uppercase() {
                return Ok(Accepted::PlainHttp(Stream::plain(stream)));
            }
            let stream = TlsAcceptor::from(self.0.clone()).accept(Wire::new(stream)).await?;
            Ok::<_, io::Error>(Accepted::Secure(Stream::Tls(Box::new(stream))))
        };
        match timeout(limit, shaking).await {
            Ok(Ok(accepted)) => Some(accepted),
            Ok(Err(error)) => {
                tracing::debug!(%error, "a TLS handshake failed");
                None
            }
            Err(_) => {
                tracing::debug!(limit_s = limit.as_secs_f64(), "a TLS handshake did not end");
                None
            }
        }
    }
}

/// What came of a handshake.
pub(crate) enum Accepted {
    Secure(Stream),
    /// The client began a plain request; nothing of it was read.
    PlainHttp(Stream),
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    std::fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let bad = |reason: String| ConfigError::Certificate { path: path.to_owned(), reason };
    let chain = CertificateDer::pem_slice_iter(&read(path)?).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| bad(error.to_string()))?;
    if chain.is_empty() {
        return Err(bad("it has no PEM block BEGIN CERTIFICATE".into()));
    }
    Ok(chain)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, ConfigError> {
    let pem = read(path)?;
    let holds = |marker: &[u8]| pem.windows(marker.len()).any(|at| at == marker);
    if holds(b"BEGIN ENCRYPTED PRIVATE KEY") || holds(b"Proc-Type: 4,ENCRYPTED") {
        return Err(ConfigError::EncryptedKey { path: path.to_owned() });
    }
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
        let reason = match error {
            rustls::pki_types::pem::Error::NoItemsFound => "it has no PEM block BEGIN PRIVATE KEY".into(),
            error => error.to_string(),
        };
        ConfigError::PrivateKey { path: path.to_owned(), reason }
    })
}

/// A TCP connection that notes when its client takes bytes. It stands under TLS, which takes more from the server than it has
/// handed to the client.
pub(crate) struct Wire {
    tcp: TcpStream,
    /// Since when the client takes no bytes of those that wait.
    unread_since: Option<Instant>,
    /// When it last took some.
    taken_at: Instant,
}

impl Wire {
    fn new(tcp: TcpStream) -> Self {
        Self { tcp, unread_since: None, taken_at: Instant::now() }
    }

    fn note_write<T>(&mut self, written: Poll<T>) -> Poll<T> {
        if written.is_ready() {
            self.unread_since = None;
            self.taken_at = Instant::now();
        } else {
            self.unread_since.get_or_insert_with(Instant::now);
        }
        written
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tcp).poll_write(cx, buf);
        self.note_write(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs);
        self.note_write(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// What a connection reads and writes.
pub(crate) enum Stream {
    Plain(Wire),
    Tls(Box<TlsStream<Wire>>),
}

impl Stream {
    pub(crate) fn plain(tcp: TcpStream) -> Self {
        Self::Plain(Wire::new(tcp))
    }

    fn wire(&self) -> &Wire {
        match self {
            Self::Plain(wire) => wire,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }

    /// Since when the client takes no bytes of those that wait for it.
    pub(crate) fn unread_since(&self) -> Option<Instant> {
        self.wire().unread_since
    }

    /// When the client last took bytes.
    pub(crate) fn taken_at(&self) -> Instant {
        self.wire().taken_at
    }
}

/// Calls a method of whichever stream it is.
macro_rules! either {
    ($stream:expr, $method:ident($($argument:expr),*)) => {
        match $stream.get_mut() {
            Self::Plain(wire) => Pin::new(wire).$method($($argument),*),
            Self::Tls(stream) => Pin::new(stream).$method($($argument),*),
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(wire) => wire.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, poll_shutdown(cx))
    }
}
