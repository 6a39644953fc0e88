//! OpenAI's Responses API over the chat endpoint's machinery: its routes, and how a request comes to its reply. `item` is
//! what conversations are made of, `request` reads, `render` writes, `store` keeps. Must not know how a reply is made.
//!
//! What was stored is seen with the API key that it was made with, and gone when the server ends.

mod item;
mod render;
mod request;
mod store;

use std::borrow::Cow;
use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde_json::{Value, json};

use self::item::Item;
use self::render::{Head, Keep, ResponseRender};
use self::request::{Asked, Known};
pub(crate) use self::store::Store;
use self::store::{Owner, Stored};
use crate::access::RequestLog;
use crate::app::{App, unix_s};
use crate::convert::{Job, Names, chat_run};
use crate::error::{ApiError, shown};
use crate::fields::Fields;
use crate::routes::generate;

const NAMES: Names = Names { prompt: "input", logprobs: "top_logprobs" };
const MAX_LISTED: usize = 100;
const DEFAULT_LISTED: usize = 20;

/// Adds the endpoint's routes under a prefix.
pub(crate) fn routes(router: Router<Arc<App>>, at: &str) -> Router<Arc<App>> {
    router
        .route(&format!("{at}/responses"), post(create))
        .route(&format!("{at}/responses/{{id}}"), get(retrieve).delete(delete))
        .route(&format!("{at}/responses/{{id}}/input_items"), get(list_inputs))
        .route(&format!("{at}/responses/{{id}}/cancel"), post(cancel))
}

async fn create(
    State(app): State<Arc<App>>,
    Extension(log): Extension<Arc<RequestLog>>,
    request: Request,
) -> Result<Response, ApiError> {
    let owner = owner(&app, request.headers());
    generate(app, log, request, move |app, _, body| convert(app, owner, body)).await
}

async fn retrieve(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    for (name, value) in query(&uri) {
        if name == "stream" && value == "true" {
            return Err(ApiError::not_supported("stream", "a stored response is read whole; leave it out"));
        }
    }
    Ok(json_response(stored(&app, &headers, &id)?.json.clone()))
}

async fn delete(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    if !app.responses.remove(owner(&app, &headers), &id) {
        return Err(unknown_response(&id));
    }
    Ok(json_response(json!({ "id": id, "object": "response", "deleted": true }).to_string()))
}

async fn cancel(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    stored(&app, &headers, &id)?;
    // Whoever waits for a reply cancels it by leaving.
    Err(ApiError::bad_request(
        "Cannot cancel a synchronous response: only background ones can be, and none are run here.",
    ))
}

async fn list_inputs(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (mut limit, mut ascending, mut after) = (DEFAULT_LISTED, false, None);
    for (name, value) in query(&uri) {
        match name.as_ref() {
            "limit" => {
                let read = value.parse().ok().filter(|limit| (1..=MAX_LISTED).contains(limit));
                let problem =
                    format!("is {:?}; it must be a whole number from 1 to {MAX_LISTED}", shown(&value));
                limit = read.ok_or_else(|| ApiError::bad_field("limit", problem))?;
            }
            "order" => {
                ascending = match value.as_ref() {
                    "asc" => true,
                    "desc" => false,
                    _ => return Err(ApiError::bad_field("order", "must be \"asc\" or \"desc\"")),
                }
            }
            "after" => after = Some(value),
            // Nothing that can be included is left out.
            _ => {}
        }
    }
    let stored = stored(&app, &headers, &id)?;
    let chain = stored.segment.chain();
    let before = chain[..chain.len() - 1].iter().flat_map(|segment| segment.items());
    let mut items: Vec<&Item> = before.chain(stored.segment.inputs()).collect();
    if !ascending {
        items.reverse();
    }
    if let Some(after) = after {
        let at = items.iter().position(|item| item.id == after);
        let at = at
            .ok_or_else(|| ApiError::bad_field("after", format!("no item has the id {:?}", shown(&after))))?;
        items.drain(..=at);
    }
    let has_more = items.len() > limit;
    items.truncate(limit);
    let id_of = |item: Option<&&Item>| item.map(|item| item.id.clone());
    let list = json!({
        "object": "list", "data": items.iter().map(|item| item.json()).collect::<Vec<Value>>(),
        "first_id": id_of(items.first()), "last_id": id_of(items.last()), "has_more": has_more,
    });
    Ok(json_response(list.to_string()))
}

/// Reads the body of a request.
fn convert(app: &Arc<App>, owner: Owner, body: &[u8]) -> Result<Job, ApiError> {
    let mut ids = Ids::new()?;
    let known = Known {
        store: &app.responses,
        owner,
        max_bytes: app.config.max_body_bytes,
        max_items: app.engine.info().max_model_len,
    };
    let Asked { chat, items, parent, store, mut echo } = Asked::read(Fields::parse(body)?, &known, &mut ids)?;
    let model = app.reply_name(chat.common.model.as_deref())?;
    let (stream, logprobs) = (chat.common.stream, chat.logprobs);
    let mut run = chat_run(app, &chat, NAMES).map_err(request::in_our_words)?;
    run.rules = run.rules.map(|rules| rules.reworded(request::in_our_words));
    let params = &run.choices[0].request.params;
    for (name, value) in [("temperature", params.temperature), ("top_p", params.top_p)] {
        echo.insert(name.into(), short(value).into());
    }
    let keep = store.then(|| Keep { app: app.clone(), owner, parent, inputs: items });
    let head = Head { id: ids.response(), created_unix_s: unix_s(), model: model.clone(), echo };
    let render = ResponseRender::new(head, ids, keep, logprobs);
    Ok(Job { run, render: Box::new(render), model, stream })
}

/// The number that a client wrote, without the digits that a wider type would add.
fn short(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// Ids of a response and of its items, which nobody can guess.
#[derive(Debug)]
pub(crate) struct Ids {
    base: String,
    num_items: usize,
}

impl Ids {
    fn new() -> Result<Self, ApiError> {
        let random = || {
            getrandom::u64().map_err(|error| {
                ApiError::internal(format!("the system has no randomness for an id: {error}"))
            })
        };
        let base = format!("{:016x}{:016x}{:016x}", random()?, random()?, random()?);
        Ok(Self { base, num_items: 0 })
    }

    fn response(&self) -> String {
        format!("resp_{}", self.base)
    }

    /// The next item's.
    fn next(&mut self, prefix: &str) -> String {
        self.num_items += 1;
        format!("{prefix}_{}{:06x}", self.base, self.num_items)
    }
}

fn owner(app: &App, headers: &HeaderMap) -> Owner {
    app.config.api_keys.holder(headers)
}

fn stored(app: &App, headers: &HeaderMap, id: &str) -> Result<Arc<Stored>, ApiError> {
    app.responses.get(owner(app, headers), id).ok_or_else(|| unknown_response(id))
}

fn unknown_response(id: &str) -> ApiError {
    not_found("id", format!("Response with id {:?} not found.", shown(id)))
}

/// 404 for what a field names.
fn not_found(param: &'static str, message: String) -> ApiError {
    let mut error = ApiError::bad_request(message);
    error.status = StatusCode::NOT_FOUND;
    error.param = Some(param.into());
    error
}

fn json_response(json: String) -> Response {
    const JSON: HeaderValue = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, JSON)], json).into_response()
}

/// Names and values of a URL's query.
fn query(uri: &Uri) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    let pairs = uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(name), decoded(value))
    })
}

/// Percent-encoded text; what is no such encoding stands for itself.
fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return text.into();
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let encoded = digits.filter(|_| byte == b'%').and_then(|digits| u8::from_str_radix(digits, 16).ok());
        rest = if encoded.is_some() { &after[2..] } else { after };
        bytes.push(encoded.unwrap_or(if byte == b'+' { b' ' } else { byte }));
    }
    String::from_utf8_lossy(&bytes).into_owned().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_taken_apart() {
        let uri: Uri = "/x?limit=3&after=a%3Ab+c&include%5B%5D=d&&e&f=%zz%4".parse().unwrap();
        let pairs: Vec<(Cow<'_, str>, Cow<'_, str>)> = query(&uri).collect();
        let expected = [("limit", "3"), ("after", "a:b c"), ("include[]", "d"), ("e", ""), ("f", "%zz%4")];
        assert!(pairs.iter().map(|(n, v)| (n.as_ref(), v.as_ref())).eq(expected), "{pairs:?}");
    }

    #[test]
    fn ids_are_fresh() {
        let (mut a, b) = (Ids::new().unwrap(), Ids::new().unwrap());
        assert_ne!(a.response(), b.response());
        let (first, second) = (a.next("msg"), a.next("msg"));
        assert!(first != second && first.starts_with("msg_"), "{first} {second}");
    }

    #[test]
    fn numbers_stay_short() {
        assert_eq!((short(0.6), short(1.0)), (0.6, 1.0));
    }
}
