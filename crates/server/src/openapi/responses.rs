//! `/v1/responses` as the document describes it once it is served. Must not know how fields are read.

use super::chat::EFFORT;
use super::schema::Type::{
    Above, Any, Bool, Either, Int, List, Number, Object as Free, Of, OneOf, Ref, Text,
};
use super::schema::{Object, defaults, may, must, nullable};
use super::shared::{COUNT, UNUSED};
use super::{Access, Body, Endpoint};

/// Whether the router has these endpoints.
pub(crate) const SERVED: bool = false;

/// The endpoints.
pub(crate) const ENDPOINTS: &[Endpoint] = &[Endpoint {
    method: "post",
    path: "/v1/responses",
    tag: "Generation",
    summary: "Reply to an input",
    doc: "OpenAI's Responses over the same engine.",
    access: Access::Key,
    parameters: &[],
    request: Some("ResponsesRequest"),
    example: r#"{"model": "any", "input": "how many rs are in strawberry", "max_output_tokens": 256}"#,
    reply: Body::JsonOrEvents("ResponsesReply", "ResponsesEvent"),
    errors: super::GENERATING,
}];

/// Objects of its requests and replies.
pub(crate) const OBJECTS: &[Object] = &[
    Object {
        name: "ResponsesRequest",
        doc: "An input, and how to go on. Unknown fields are ignored; null means absent.",
        fields: &[&[
            may("model", Text, "A served name."),
            must(
                "input",
                Either(&[Text, List(&Ref("ResponsesItem"))]),
                "A text, or items of a conversation.",
            ),
            may("instructions", Text, "A system message before the input."),
            may(
                "max_output_tokens",
                Int(1, None),
                "Most tokens to generate; what is left of the context where absent.",
            ),
            may("temperature", Number(Some(0.0), Some(2.0)), "0 is greedy. Absent: the model's own default."),
            may("top_p", Above(0.0, 1.0), "Keeps the smallest set of tokens whose probability reaches this."),
            may("top_logprobs", Int(0, Some(20)), "Rivals of each token whose log-probabilities are given."),
            defaults("stream", Bool, "false", "Send the reply as server-sent events."),
            may("tools", List(&Ref("ResponsesTool")), "Functions that the model may call."),
            may(
                "tool_choice",
                Either(&[
                    OneOf(&["none", "auto", "required"]),
                    Of(&[must("type", OneOf(&["function"]), ""), must("name", Text, "")]),
                ]),
                "Whether tools are called: never, as the model likes, always, or this one.",
            ),
            may("parallel_tool_calls", Bool, "Whether one reply may call several tools."),
            may(
                "reasoning",
                Of(&[
                    may("effort", EFFORT, "How long the model may think."),
                    may(
                        "summary",
                        OneOf(&["auto", "concise", "detailed"]),
                        "Accepted; the thinking is given whole.",
                    ),
                ]),
                "Bounds of the thinking.",
            ),
            may(
                "text",
                Of(&[may(
                    "format",
                    Of(&[
                        must("type", OneOf(&["text", "json_object", "json_schema"]), ""),
                        may("name", Text, ""),
                        may("schema", Free, "A JSON Schema."),
                        may("strict", Bool, ""),
                    ]),
                    "",
                )]),
                "The form of the text behind the reasoning.",
            ),
            may("previous_response_id", Text, "A stored response to go on from."),
            may("store", Bool, "Whether the response can be gone on from."),
            may("truncation", OneOf(&["auto", "disabled"]), ""),
            may("include", List(&Text), "Further parts of the reply."),
            may("background", Bool, ""),
            may("user", Any, UNUSED),
            may("metadata", Any, "Given back."),
        ]],
    },
    Object {
        name: "ResponsesItem",
        doc: "A message, a call, a call's output or a reasoning.",
        fields: &[&[
            defaults(
                "type",
                OneOf(&["message", "function_call", "function_call_output", "reasoning", "item_reference"]),
                "\"message\"",
                "",
            ),
            may("role", OneOf(&["system", "developer", "user", "assistant"]), "Of a message."),
            may("content", Either(&[Text, List(&Free)]), "Of a message."),
            may("call_id", Text, "Of a call and its output."),
            may("name", Text, "Of a call."),
            may("arguments", Text, "Of a call, as JSON text."),
            may("output", Either(&[Text, List(&Free)]), "Of a call's output."),
        ]],
    },
    Object {
        name: "ResponsesTool",
        doc: "A function that the model may call.",
        fields: &[&[
            must("type", OneOf(&["function"]), ""),
            must("name", Text, ""),
            may("description", Text, "What it does, for the model."),
            may("parameters", Free, "JSON Schema of its arguments."),
            may("strict", Bool, "Hold the arguments to the schema."),
        ]],
    },
    Object {
        name: "ResponsesReply",
        doc: "The whole reply.",
        fields: &[&[
            must("id", Text, ""),
            must("object", OneOf(&["response"]), ""),
            must("created_at", COUNT, "Unix seconds."),
            must("status", OneOf(&["completed", "incomplete", "failed", "in_progress"]), ""),
            must("model", Text, ""),
            must("output", List(&Free), "Reasoning, messages and calls."),
            may("incomplete_details", Of(&[may("reason", Text, "")]), ""),
            nullable(
                "usage",
                Of(&[
                    must("input_tokens", COUNT, ""),
                    must("input_tokens_details", Of(&[must("cached_tokens", COUNT, "")]), ""),
                    must("output_tokens", COUNT, ""),
                    must("output_tokens_details", Of(&[must("reasoning_tokens", COUNT, "")]), ""),
                    must("total_tokens", COUNT, ""),
                ]),
                "",
            ),
        ]],
    },
    Object {
        name: "ResponsesEvent",
        doc: "One event of a stream.",
        fields: &[&[
            must("type", Text, "As `response.output_text.delta`."),
            must("sequence_number", COUNT, ""),
        ]],
    },
];
