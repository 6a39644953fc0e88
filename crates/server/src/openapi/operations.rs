//! The other endpoints as the document describes them: models, tokens, health, facts. Must not know how they answer.

use super::schema::Type::{Bool, Either, List, Number, Object as Free, OneOf, Ref, Text};
use super::schema::{Field, Object, Type, defaults, may, must, nullable};
use super::shared::{COUNT, TOKEN_ID};
use super::{Access, Body, Endpoint, READING, chat};

const fn get(
    path: &'static str,
    tag: &'static str,
    access: Access,
    reply: Body,
    summary: &'static str,
    doc: &'static str,
) -> Endpoint {
    Endpoint {
        method: "get",
        path,
        tag,
        summary,
        doc,
        access,
        parameters: &[],
        query: &[],
        request: None,
        example: "",
        reply,
        errors: &[],
        refusal: "Error",
    }
}

const HEALTH: Body = Body::Health("Health");
const OPEN: Access = Access::Open;
const KEY: Access = Access::Key;
const PING: &str = "As /health, for whoever asks under this name.";

/// The endpoints.
pub(crate) const ENDPOINTS: &[Endpoint] = &[
    get("/v1/models", "Models", KEY, Body::Json("ModelList"), "List the served names", ""),
    Endpoint {
        parameters: &[must("id", Text, "A served name; slashes in it may stand as they are.")],
        errors: &[404],
        ..get("/v1/models/{id}", "Models", KEY, Body::Json("ModelCard"), "Look up a served name", "")
    },
    Endpoint {
        method: "post",
        path: "/tokenize",
        tag: "Tokens",
        summary: "Text or a conversation to token ids",
        doc: "One of `prompt`, `messages` and `content`. A list of prompts gives lists. The model's context bounds nothing here; \
              more than 262,144 tokens in one request (or the context, where it is longer) are refused.",
        access: KEY,
        parameters: &[],
        query: &[],
        request: Some("TokenizeRequest"),
        example: r#"{"prompt": "how many rs are in strawberry", "return_token_strs": true}"#,
        reply: Body::Json("TokenizeReply"),
        errors: READING,
        refusal: "Error",
    },
    Endpoint {
        method: "post",
        path: "/detokenize",
        tag: "Tokens",
        summary: "Token ids to text",
        doc: "The text stands under the names that vLLM (`prompt`), SGLang (`text`) and llama-server (`content`) give it.",
        access: KEY,
        parameters: &[],
        query: &[],
        request: Some("DetokenizeRequest"),
        example: r#"{"tokens": [5, 6, 7]}"#,
        reply: Body::Json("DetokenizeReply"),
        errors: READING,
        refusal: "Error",
    },
    get(
        "/health",
        "Health",
        OPEN,
        HEALTH,
        "Whether requests can be served",
        "503 while the model loads, when the engine is stuck or has failed, and while the server drains.",
    ),
    get("/ping", "Health", OPEN, HEALTH, "The same", PING),
    Endpoint { method: "post", ..get("/ping", "Health", OPEN, HEALTH, "The same", PING) },
    get(
        "/health_generate",
        "Health",
        OPEN,
        HEALTH,
        "Whether a token comes out",
        "Generates one token, or sees that others get some; 503 when none comes within 20 s. Probes that come together share one.",
    ),
    get(
        "/metrics",
        "Server",
        OPEN,
        Body::Text("text/plain"),
        "Prometheus metrics",
        "In vLLM's and SGLang's vocabulary.",
    ),
    get("/version", "Server", OPEN, Body::Json("Version"), "The server's version", ""),
    get(
        "/get_model_info",
        "Server",
        KEY,
        Body::Json("ModelInfo"),
        "Facts about the model",
        "In SGLang's words.",
    ),
    get(
        "/model_info",
        "Server",
        KEY,
        Body::Json("ModelInfo"),
        "Facts about the model",
        "As /get_model_info.",
    ),
    get(
        "/get_server_info",
        "Server",
        KEY,
        Body::Json("ServerInfo"),
        "Facts about the server",
        "In SGLang's words; what is configured stands under the names of the flags.",
    ),
    get(
        "/server_info",
        "Server",
        KEY,
        Body::Json("ServerInfo"),
        "Facts about the server",
        "As /get_server_info.",
    ),
    FLUSH,
    Endpoint { method: "post", ..FLUSH },
    get(
        "/",
        "Server",
        OPEN,
        Body::Text("text/html"),
        "A page to chat with the model",
        "At the root and at --root-path.",
    ),
    get("/openapi.json", "Server", OPEN, Body::Json("OpenApi"), "This document", ""),
    get("/docs", "Server", OPEN, Body::Text("text/html"), "This document as a page", ""),
];

const FLUSH: Endpoint = Endpoint {
    errors: &[503],
    ..get(
        "/flush_cache",
        "Server",
        Access::Admin,
        Body::Json("FlushReply"),
        "Forget the prefix cache",
        "Running generations keep their blocks.",
    )
};

const TEXTS: Type = Either(&[Text, List(&Text)]);

const TOKENIZE: &[Field] = &[
    may("model", Text, "As for generation."),
    may("prompt", TEXTS, "A text, or several."),
    may(
        "content",
        TEXTS,
        "llama-server's name for it; without special tokens where the request is silent about them.",
    ),
    may("messages", List(&Ref("ChatMessage")), "A conversation, as chat reads it."),
    may("add_special_tokens", Bool, "Begin with BOS where the tokenizer asks for it; true for `prompt`."),
    defaults("return_token_strs", Bool, "false", "Give the tokens' spellings too."),
];

/// Objects of their requests and replies.
pub(crate) const OBJECTS: &[Object] = &[
    Object {
        name: "ModelList",
        doc: "Every served name.",
        fields: &[&[must("object", OneOf(&["list"]), ""), must("data", List(&Ref("ModelCard")), "")]],
    },
    Object {
        name: "ModelCard",
        doc: "One served name.",
        fields: &[&[
            must("id", Text, ""),
            must("object", OneOf(&["model"]), ""),
            must("created", COUNT, "Unix seconds."),
            must("owned_by", Text, ""),
            must("root", Text, "The first served name."),
            nullable("parent", Text, ""),
            must("max_model_len", COUNT, "Most tokens of prompt and reply together."),
        ]],
    },
    Object {
        name: "TokenizeRequest",
        doc: "A text or a conversation.",
        fields: &[
            TOKENIZE,
            &[chat::CONVERSATION[0], chat::CONVERSATION[1], chat::CONVERSATION[2], chat::CONVERSATION[3]],
        ],
    },
    Object {
        name: "TokenizeReply",
        doc: "Tokens; lists of lists for a list of prompts.",
        fields: &[&[
            must("count", Either(&[COUNT, List(&COUNT)]), ""),
            must("max_model_len", COUNT, "Most tokens of prompt and reply together."),
            must("tokens", Either(&[List(&TOKEN_ID), List(&List(&TOKEN_ID))]), ""),
            nullable(
                "token_strs",
                Either(&[List(&Text), List(&List(&Text))]),
                "As tokenizer.json spells them.",
            ),
        ]],
    },
    Object {
        name: "DetokenizeRequest",
        doc: "Token ids; ids of no token are refused.",
        fields: &[&[
            may("model", Text, "As for generation."),
            must("tokens", Either(&[List(&TOKEN_ID), List(&List(&TOKEN_ID))]), "Ids, or lists of them."),
            defaults("skip_special_tokens", Bool, "false", "Leave control tokens out of the text."),
        ]],
    },
    Object {
        name: "DetokenizeReply",
        doc: "The text, or a list of them.",
        fields: &[&[must("prompt", TEXTS, ""), must("text", TEXTS, ""), must("content", TEXTS, "")]],
    },
    Object {
        name: "Health",
        doc: "Whether requests can be served, and why not.",
        fields: &[&[
            must("status", OneOf(&["ready", "loading", "draining", "stuck", "failed", "stopped"]), ""),
            may("progress", Number(Some(0.0), Some(1.0)), "Of the loading."),
            may("eta_s", COUNT, "Seconds until it is loaded."),
            may("no_step_for_s", COUNT, "Seconds without a step although there is work."),
            may("error", Text, ""),
        ]],
    },
    Object { name: "Version", doc: "The server's version.", fields: &[&[must("version", Text, "")]] },
    Object {
        name: "ModelInfo",
        doc: "What is served.",
        fields: &[&[
            must("model_path", Text, "The first served name."),
            must("tokenizer_path", Text, "The same."),
            must("is_generation", Bool, ""),
            must(
                "preferred_sampling_params",
                Free,
                "What a request that is silent gets; null is OpenAI's default.",
            ),
            must("has_chat_template", Bool, ""),
            must("served_model_names", List(&Text), ""),
            must("max_model_len", COUNT, "Most tokens of prompt and reply together."),
            must("vocab_size", COUNT, ""),
            must("eos_token_ids", List(&TOKEN_ID), ""),
        ]],
    },
    Object {
        name: "ServerInfo",
        doc: "How it is served.",
        fields: &[&[
            must("version", Text, ""),
            must("status", Ref("Health"), ""),
            must("started", COUNT, "Unix seconds."),
            must("served_model_name", List(&Text), ""),
            must("max_model_len", COUNT, ""),
            must("max_num_seqs", COUNT, "Sequences in a batch."),
            must("max_queued_requests", COUNT, ""),
            must("max_total_num_tokens", COUNT, "Tokens that the KV cache holds."),
            must("api_key_required", Bool, ""),
            must("internal_states", List(&Free), "Counters of the engine."),
        ]],
    },
    Object {
        name: "FlushReply",
        doc: "What was forgotten.",
        fields: &[&[must("freed_blocks", COUNT, "Blocks that became free.")]],
    },
    Object {
        name: "OpenApi",
        doc: "An OpenAPI document.",
        fields: &[&[must("openapi", Text, ""), must("info", Free, ""), must("paths", Free, "")]],
    },
];
