//! The API's description: `/openapi.json`, made of tables of endpoints and fields, and `/docs`, a page that renders it. Tests
//! compare the tables with the router and with what requests are refused for. Must not know how fields are read.

mod chat;
mod completion;
mod messages;
mod operations;
mod responses;
mod schema;
mod shared;

use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderName, HeaderValue, header};
use axum::routing::get;
use serde_json::{Map, Value, json};

use crate::app::App;
use crate::page::sha256_base64;
use schema::{Field, Object};

/// Who may call an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Open,
    /// Whoever has a key, or anybody where the server has none.
    Key,
    /// Whoever has an administrator's key; where the server has none, the endpoint is not there.
    Admin,
}

/// What a good answer holds.
#[derive(Clone, Copy, Debug)]
enum Body {
    Json(&'static str),
    /// The whole reply, or events of chunks where `stream` is true.
    JsonOrEvents(&'static str, &'static str),
    /// The whole reply, or events that are named by their type where `stream` is true.
    JsonOrNamedEvents(&'static str, &'static str),
    /// The same object with 200 and with 503.
    Health(&'static str),
    /// A text of this media type.
    Text(&'static str),
    /// It is always refused.
    Never,
}

/// One method of one path.
#[derive(Clone, Copy, Debug)]
struct Endpoint {
    method: &'static str,
    path: &'static str,
    tag: &'static str,
    summary: &'static str,
    doc: &'static str,
    access: Access,
    /// Of the path.
    parameters: &'static [Field],
    /// What may stand behind the path.
    query: &'static [Field],
    /// A named object.
    request: Option<&'static str>,
    /// A request that is answered with 200.
    example: &'static str,
    reply: Body,
    /// Statuses beside the ones that every endpoint has.
    errors: &'static [u16],
    /// The named object that a refusal holds.
    refusal: &'static str,
}

/// How a request that is read can fail.
const READING: &[u16] = &[400, 404, 408, 413, 429, 503];
/// How a request that generates can fail.
const GENERATING: &[u16] = &[400, 404, 408, 413, 429, 500, 503];

fn endpoints() -> Vec<Endpoint> {
    [chat::ENDPOINTS, completion::ENDPOINTS, responses::ENDPOINTS, messages::ENDPOINTS, operations::ENDPOINTS]
        .concat()
}

fn objects() -> Vec<Object> {
    [
        chat::OBJECTS,
        completion::OBJECTS,
        responses::OBJECTS,
        messages::OBJECTS,
        shared::OBJECTS,
        operations::OBJECTS,
    ]
    .concat()
}

fn explain(status: u16) -> &'static str {
    match status {
        400 => "The request cannot be honoured; where a field is to blame, the error names it.",
        401 => "The API key is missing or wrong.",
        404 => "There is no such model, or nothing with the id that the request names.",
        408 => "The request took too long.",
        413 => "The body is over --max-body-bytes.",
        429 => "Too many requests wait; `Retry-After` says when to come back.",
        431 => "The headers are over 32 KiB.",
        500 => "The server's fault.",
        _ => "The model is loading, or the server drains; `Retry-After` says when to come back.",
    }
}

fn json_body(schema: &str) -> Value {
    json!({"schema": {"$ref": format!("#/components/schemas/{schema}")}})
}

fn json_or_events(whole: &str, events: &str) -> Value {
    json!({
        "application/json": json_body(whole),
        "text/event-stream": {"schema": {"type": "string", "description": events}},
    })
}

impl Endpoint {
    fn operation(&self, keys: bool) -> Value {
        let mut operation = json!({
            "tags": [self.tag],
            "operationId": format!("{}{}", self.method, self.path.replace(['/', '{', '}', '.'], "_")),
            "summary": self.summary,
        });
        if !self.doc.is_empty() {
            operation["description"] = json!(self.doc);
        }
        let parameters = self.parameters();
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        if let Some(request) = self.request {
            let mut content = json_body(request);
            content["example"] = serde_json::from_str(self.example).expect("tables hold JSON");
            operation["requestBody"] = json!({"required": true, "content": {"application/json": content}});
        }
        operation["responses"] = self.responses(keys).into();
        operation["security"] = match self.access {
            Access::Key if keys => json!([{"key": []}]),
            Access::Key | Access::Open => json!([]),
            Access::Admin => json!([{"admin_key": []}]),
        };
        operation
    }

    fn parameters(&self) -> Vec<Value> {
        let in_path = self.parameters.iter().map(|field| {
            let mut schema = field.schema_in_url();
            // An empty one is another path.
            schema["minLength"] = json!(1);
            json!({"name": field.name, "in": "path", "required": true, "schema": schema})
        });
        let in_query = self.query.iter().map(
            |field| json!({"name": field.name, "in": "query", "required": false, "schema": field.schema_in_url()}),
        );
        in_path.chain(in_query).collect()
    }

    fn responses(&self, keys: bool) -> Map<String, Value> {
        let mut responses = Map::new();
        let content = match self.reply {
            Body::Json(schema) | Body::Health(schema) => json!({"application/json": json_body(schema)}),
            Body::JsonOrEvents(whole, chunk) => json_or_events(
                whole,
                &format!("With `stream: true`: lines `data: ` with a {chunk} each, then `data: [DONE]`."),
            ),
            Body::JsonOrNamedEvents(whole, event) => json_or_events(
                whole,
                &format!(
                    "With `stream: true`: lines `event: ` with a type and `data: ` with a {event} of it."
                ),
            ),
            Body::Text(kind) => json!({kind: {"schema": {"type": "string"}}}),
            Body::Never => Value::Null,
        };
        if !content.is_null() {
            responses.insert("200".into(), json!({"description": "The answer.", "content": content}));
        }
        let mut errors = self.errors.to_vec();
        errors.push(431);
        if self.access == Access::Admin || keys && self.access == Access::Key {
            errors.push(401);
        }
        errors.sort_unstable();
        for status in errors {
            let content = json!({"application/json": json_body(self.refusal)});
            responses.insert(status.to_string(), json!({"description": explain(status), "content": content}));
        }
        if let Body::Health(schema) = self.reply {
            let content = json!({"application/json": json_body(schema)});
            responses.insert(
                "503".into(),
                json!({"description": "Not now; the body says why.", "content": content}),
            );
        }
        responses
    }
}

/// The document of a server.
pub(crate) fn document(app: &App) -> Bytes {
    let keys = !app.config.api_keys.is_empty();
    let mut paths: Map<String, Value> = Map::new();
    let admin = !app.config.admin_keys.is_empty();
    for endpoint in endpoints().iter().filter(|endpoint| admin || endpoint.access != Access::Admin) {
        let at = paths.entry(endpoint.path).or_insert_with(|| json!({}));
        at[endpoint.method] = endpoint.operation(keys);
    }
    let schemas: Map<String, Value> =
        objects().iter().map(|object| (object.name.to_owned(), object.schema())).collect();
    let root = app.config.root_path.trim_matches('/');
    let document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": format!("r1-serve: {}", app.model.names[0]),
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Every path answers with `/v1` before it and without. Unknown fields of a request are ignored; a known \
                            field with a bad value is a 400 that names it.",
        },
        "servers": [{"url": format!("/{root}")}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "--api-key"},
                "admin_key": {"type": "http", "scheme": "bearer", "description": "--admin-api-key"},
            },
        },
    });
    serde_json::to_vec(&document).expect("it holds strings and numbers").into()
}

/// The page: no asset from elsewhere, no call to elsewhere.
const PAGE: &str = include_str!("docs.html");
/// Lets nothing run but the page's own script and style.
static PAGE_POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let hash = |tag: &str| {
        let text =
            PAGE.split_once(&format!("<{tag}>")).and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")));
        sha256_base64(text.expect("the page has its script and its style").0.as_bytes())
    };
    let (script, style) = (hash("script"), hash("style"));
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:; \
         connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    HeaderValue::try_from(policy).expect("the policy is ASCII")
});
const NO_SNIFF: (HeaderName, HeaderValue) =
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));

/// The document and its page, at a prefix.
pub(crate) fn routes(document: &Bytes, at: &str) -> Router<Arc<App>> {
    let document = document.clone();
    let get_document = move || {
        let document = document.clone();
        async move { ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], document) }
    };
    let html = (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    let get_page =
        || async { ([html, (header::CONTENT_SECURITY_POLICY, PAGE_POLICY.clone()), NO_SNIFF], PAGE) };
    Router::new()
        .without_v07_checks()
        .route(&format!("{at}/openapi.json"), get(get_document))
        .route(&format!("{at}/docs"), get(get_page))
}
