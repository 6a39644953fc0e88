//! Sends the spans of requests to an OpenTelemetry collector over OTLP/HTTP (protobuf). Must not know what spans mean.

use std::collections::HashMap;
use std::fmt;
use std::future::{Future, ready};
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use opentelemetry::Context;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TracerProvider;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::registry::LookupSpan;

const NAME: &str = "r1-serve";
/// For one batch of spans.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// For the last spans when the server ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// Whose spans are requests'.
const SERVER: &str = "r1_server";

/// The exporter's thread; dropping it sends what is left.
pub(crate) struct Traces {
    provider: SdkTracerProvider,
}

impl Traces {
    /// An exporter to a collector such as `http://localhost:4318/v1/traces`.
    pub(crate) fn open(endpoint: &str) -> Result<Self> {
        let Some(rest) = endpoint.strip_prefix("http://") else {
            bail!(
                "--otlp-traces-endpoint {endpoint} is not supported: spans are sent as OTLP over plain HTTP, as to \
                 http://localhost:4318/v1/traces"
            );
        };
        let endpoint = if rest.trim_end_matches('/').contains('/') {
            endpoint.to_owned()
        } else {
            // The path that OTLP prescribes.
            format!("{}/v1/traces", endpoint.trim_end_matches('/'))
        };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_http_client(Client::new())
            .with_endpoint(&endpoint)
            .build()
            .with_context(|| format!("--otlp-traces-endpoint {endpoint}"))?;
        let resource = Resource::builder().with_service_name(NAME).build();
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Self { provider })
    }

    /// Where spans go in.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: tracing::Subscriber + for<'span> LookupSpan<'span>,
    {
        let layer = tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer(NAME))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false);
        layer.with_filter(filter_fn(|about| about.is_span() && about.target().starts_with(SERVER)))
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!(%error, "the last spans could not be exported");
        }
    }
}

/// Makes `span` a child of the client's span that a `traceparent` header names; one that is no such header changes
/// nothing.
pub(crate) fn adopt(span: &tracing::Span, traceparent: &str) {
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier);
    if let Err(error) = span.set_parent(parent) {
        tracing::debug!(%error, "a client's span could not be adopted");
    }
}

/// The exporter runs on a thread of its own, so its client may block.
struct Client {
    agent: ureq::Agent,
}

impl Client {
    fn new() -> Self {
        let config = ureq::Agent::config_builder().timeout_global(Some(EXPORT_TIMEOUT)).build();
        Self { agent: config.into() }
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, ureq::Error> {
        let response = self.agent.run(request.map(|body| body.to_vec()))?;
        let (parts, mut body) = response.into_parts();
        Ok(Response::from_parts(parts, body.read_to_vec()?.into()))
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl HttpClient for Client {
    fn send_bytes<'client, 'sending>(
        &'client self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'sending>>
    where
        'client: 'sending,
    {
        let sent = self.send(request);
        if let Err(error) = &sent {
            tracing::warn!(%error, "spans could not be exported (--otlp-traces-endpoint)");
        }
        Box::pin(ready(sent.map_err(HttpError::from)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// Answers one request; gives its request line and its body.
    fn collector() -> (String, thread::JoinHandle<(String, Vec<u8>)>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let collecting = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut line, mut len) = (String::new(), 0);
            reader.read_line(&mut line).unwrap();
            loop {
                let mut header = String::new();
                reader.read_line(&mut header).unwrap();
                let header = header.trim().to_ascii_lowercase();
                if let Some(value) = header.strip_prefix("content-length:") {
                    len = value.trim().parse().unwrap();
                }
                if header.is_empty() {
                    break;
                }
            }
            let mut body = vec![0; len];
            reader.read_exact(&mut body).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
            (line, body)
        });
        (address, collecting)
    }

    #[test]
    fn spans_of_the_server_reach_the_collector_under_their_clients_trace() {
        let (address, collecting) = collector();
        let traces = Traces::open(&address).unwrap();
        let subscriber = tracing_subscriber::registry().with(traces.layer());
        tracing::subscriber::with_default(subscriber, || {
            let request = tracing::info_span!(target: "r1_server::access", "request", request_id = "trace-me-7", otel.kind = "server");
            adopt(&request, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
            request.in_scope(|| {
                drop(tracing::info_span!(target: "r1_server::reply", "decode", choice = 0));
                drop(tracing::info_span!(target: "somebody_else", "elsewhere"));
            });
        });
        drop(traces);
        let (line, body) = collecting.join().unwrap();
        assert_eq!(line.trim(), "POST /v1/traces HTTP/1.1");
        let holds = |needle: &[u8]| body.windows(needle.len()).any(|at| at == needle);
        for text in ["r1-serve", "request_id", "trace-me-7", "request", "decode"] {
            assert!(holds(text.as_bytes()), "no {text}");
        }
        assert!(!holds(b"elsewhere"));
        let trace_id =
            [0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c];
        assert!(holds(&trace_id) && holds(&[0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]));
    }

    #[test]
    fn other_protocols_are_refused_by_name() {
        for endpoint in ["grpc://localhost:4317", "https://collector", "localhost:4318"] {
            let error = Traces::open(endpoint).err().unwrap().to_string();
            assert!(error.contains("--otlp-traces-endpoint") && error.contains(endpoint), "{error}");
        }
    }
}
