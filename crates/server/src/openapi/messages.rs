//! `/v1/messages` and `/v1/messages/count_tokens` as the document describes them once they are served. Must not know how
//! fields are read.

use super::schema::Type::{
    Above, Any, Bool, Either, Int, Items, List, Number, Object as Free, Of, OneOf, Ref, Text,
};
use super::schema::{Field, Object, defaults, may, must, nullable};
use super::shared::{COUNT, UNUSED};
use super::{Access, Body, Endpoint};

/// Whether the router has these endpoints.
pub(crate) const SERVED: bool = false;

/// The endpoints.
pub(crate) const ENDPOINTS: &[Endpoint] = &[
    Endpoint {
        method: "post",
        path: "/v1/messages",
        tag: "Generation",
        summary: "Reply to messages",
        doc: "Anthropic's Messages over the same engine.",
        access: Access::Key,
        parameters: &[],
        request: Some("MessagesRequest"),
        example: r#"{"model": "any", "max_tokens": 256, "messages": [{"role": "user", "content": "how many rs are in strawberry"}]}"#,
        reply: Body::JsonOrEvents("MessagesReply", "MessagesEvent"),
        errors: super::GENERATING,
    },
    Endpoint {
        method: "post",
        path: "/v1/messages/count_tokens",
        tag: "Tokens",
        summary: "Count the tokens of messages",
        doc: "What the same request would read, without generating.",
        access: Access::Key,
        parameters: &[],
        request: Some("CountTokensRequest"),
        example: r#"{"model": "any", "messages": [{"role": "user", "content": "how many rs are in strawberry"}]}"#,
        reply: Body::Json("CountTokensReply"),
        errors: super::READING,
    },
];

const PROMPT: &[Field] = &[
    may("model", Text, "A served name."),
    must("messages", Items(&Ref("MessagesMessage"), 1, None), "The conversation."),
    may("system", Either(&[Text, List(&Ref("MessagesBlock"))]), "What stands before it."),
    may(
        "tools",
        List(&Of(&[
            must("name", Text, ""),
            may("description", Text, "What it does, for the model."),
            must("input_schema", Free, "JSON Schema of its arguments."),
        ])),
        "Functions that the model may call.",
    ),
    may(
        "tool_choice",
        Of(&[
            must("type", OneOf(&["auto", "any", "tool", "none"]), ""),
            may("name", Text, "With `type: tool`."),
            may("disable_parallel_tool_use", Bool, ""),
        ]),
        "Whether tools are called.",
    ),
    may(
        "thinking",
        Of(&[
            must("type", OneOf(&["enabled", "disabled", "adaptive"]), ""),
            may("budget_tokens", Int(1, None), "Most tokens of thinking; then it is ended."),
        ]),
        "Whether the model thinks.",
    ),
];

const GENERATION: &[Field] = &[
    must("max_tokens", Int(1, None), "Most tokens to generate."),
    may("temperature", Number(Some(0.0), Some(1.0)), "0 is greedy. Absent: the model's own default."),
    may("top_p", Above(0.0, 1.0), "Keeps the smallest set of tokens whose probability reaches this."),
    may("top_k", Int(0, None), "Keeps this many most likely tokens."),
    may("stop_sequences", List(&Text), "Texts that end the reply and are not part of it."),
    defaults("stream", Bool, "false", "Send the reply as server-sent events."),
    may("metadata", Any, UNUSED),
];

/// Objects of their requests and replies.
pub(crate) const OBJECTS: &[Object] = &[
    Object {
        name: "MessagesRequest",
        doc: "A conversation, and how to go on. Unknown fields are ignored; null means absent.",
        fields: &[PROMPT, GENERATION],
    },
    Object { name: "CountTokensRequest", doc: "A conversation.", fields: &[PROMPT] },
    Object { name: "CountTokensReply", doc: "Its length.", fields: &[&[must("input_tokens", COUNT, "")]] },
    Object {
        name: "MessagesMessage",
        doc: "One message.",
        fields: &[&[
            must("role", OneOf(&["user", "assistant"]), ""),
            must("content", Either(&[Text, List(&Ref("MessagesBlock"))]), ""),
        ]],
    },
    Object {
        name: "MessagesBlock",
        doc: "A piece of a message. This server reads text, calls, their results and thinking.",
        fields: &[&[
            must("type", OneOf(&["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]), ""),
            may("text", Text, "Of text."),
            may("thinking", Text, "Of thinking."),
            may("id", Text, "Of a call."),
            may("name", Text, "Of a call."),
            may("input", Free, "Of a call."),
            may("tool_use_id", Text, "Of a call's result."),
            may("content", Any, "Of a call's result: text or blocks."),
            may("is_error", Bool, "Of a call's result."),
        ]],
    },
    Object {
        name: "MessagesReply",
        doc: "The whole reply.",
        fields: &[&[
            must("id", Text, ""),
            must("type", OneOf(&["message"]), ""),
            must("role", OneOf(&["assistant"]), ""),
            must("model", Text, ""),
            must("content", List(&Free), "Thinking, text and calls."),
            nullable("stop_reason", OneOf(&["end_turn", "max_tokens", "stop_sequence", "tool_use"]), ""),
            nullable("stop_sequence", Text, ""),
            must("usage", Of(&[must("input_tokens", COUNT, ""), must("output_tokens", COUNT, "")]), ""),
        ]],
    },
    Object {
        name: "MessagesEvent",
        doc: "One event of a stream.",
        fields: &[&[must("type", Text, "As `content_block_delta`.")]],
    },
];
