//! `/v1/messages` and `/v1/messages/count_tokens` as the document describes them. Must not know how fields are read.

use super::chat::{BUDGET, EFFORT, REASONING, TEMPLATE, THINKING};
use super::schema::Type::{Any, Bool, Either, Int, Items, List, Object as Free, Of, OneOf, Ref, Text};
use super::schema::{Field, Object, Type, defaults, may, must, nullable};
use super::shared::{COUNT, FORMAT, IGNORED, OUTPUT, SAMPLING, SCHEMA, STRUCTURE};
use super::{Access, Body, Endpoint};

/// The endpoints.
pub(crate) const ENDPOINTS: &[Endpoint] = &[
    Endpoint {
        method: "post",
        path: "/v1/messages",
        tag: "Generation",
        summary: "Reply to messages",
        doc: "Anthropic's Messages over the same engine. Thinking comes as blocks in front of the text. Fields of the chat \
              endpoint that Anthropic does not have mean what they mean there.",
        access: Access::Key,
        parameters: &[],
        query: &[],
        request: Some("MessagesRequest"),
        example: r#"{"model": "any", "max_tokens": 128, "messages": [{"role": "user", "content": "how many rs are in strawberry"}]}"#,
        reply: Body::JsonOrNamedEvents("MessagesReply", "MessagesEvent"),
        errors: super::GENERATING,
        refusal: "MessagesError",
    },
    Endpoint {
        method: "post",
        path: "/v1/messages/count_tokens",
        tag: "Tokens",
        summary: "Count the tokens of messages",
        doc: "What the same request would read, without generating. The model's context bounds nothing here.",
        access: Access::Key,
        parameters: &[],
        query: &[],
        request: Some("CountTokensRequest"),
        example: r#"{"model": "any", "messages": [{"role": "user", "content": "how many rs are in strawberry"}]}"#,
        reply: Body::Json("CountTokensReply"),
        errors: super::READING,
        refusal: "MessagesError",
    },
];

const TEXT_BLOCKS: Type = List(&Ref("TextBlock"));
const MESSAGE: Type =
    Either(&[Ref("MessagesUserMessage"), Ref("MessagesAssistantMessage"), Ref("MessagesSystemMessage")]);
const OUTPUT_FORMAT: Type = Of(&[must("type", OneOf(&["json_schema"]), ""), must("schema", SCHEMA, "")]);

const PROMPT: &[Field] = &[
    must(
        "messages",
        Items(&MESSAGE, 1, None),
        "The conversation. Neighbours of one role are joined; a last message of the assistant is continued.",
    ),
    may("system", Either(&[Text, TEXT_BLOCKS]), "What stands before it."),
    may("tools", Items(&Ref("MessagesTool"), 0, Some(128)), "Functions that the model may call."),
    may(
        "tool_choice",
        Of(&[
            must(
                "type",
                OneOf(&["auto", "any", "tool", "none"]),
                "As the model likes, always, this one, never.",
            ),
            may("name", Text, "With `type: tool`."),
            may("disable_parallel_tool_use", Bool, "At most one call in one reply."),
        ]),
        "Whether tools are called.",
    ),
    may(
        "thinking",
        Of(&[
            must(
                "type",
                OneOf(&["enabled", "disabled", "adaptive"]),
                "`disabled` closes the thinking at once.",
            ),
            may("budget_tokens", BUDGET, "Most tokens of thinking; then it is ended."),
            may(
                "display",
                OneOf(&["summarized", "omitted"]),
                "`omitted` leaves the thinking out of the reply; it is never summarized.",
            ),
        ]),
        "Whether the model thinks, and how long.",
    ),
    may(
        "output_config",
        Of(&[
            may("effort", EFFORT, "As `reasoning_effort`."),
            may("format", OUTPUT_FORMAT, "The form of the text."),
        ]),
        "How hard the model shall try, and the form of its text.",
    ),
    may("output_format", OUTPUT_FORMAT, "Another name for `output_config.format`."),
];

const GENERATION: &[Field] = &[
    must("max_tokens", Int(1, None), "Most tokens to generate."),
    may(
        "stop_sequences",
        Items(&Text, 0, Some(16)),
        "Texts that end the reply and are not part of it. None may be empty.",
    ),
    defaults("stream", Bool, "false", "Send the reply as server-sent events, ended by `message_stop`."),
];

/// Objects of their requests and replies.
pub(crate) const OBJECTS: &[Object] = &[
    Object {
        name: "MessagesRequest",
        doc: "A conversation, and how to go on. Unknown fields are ignored; null means absent.",
        fields: &[
            PROMPT, GENERATION, THINKING, REASONING, TEMPLATE, SAMPLING, OUTPUT, FORMAT, STRUCTURE, IGNORED,
        ],
    },
    Object {
        name: "CountTokensRequest",
        doc: "A conversation. What belongs to generating is accepted as well.",
        fields: &[&[may("model", Text, "As for generation.")], PROMPT, THINKING, REASONING, TEMPLATE],
    },
    Object {
        name: "CountTokensReply",
        doc: "The prompt's length.",
        fields: &[&[must("input_tokens", COUNT, "")]],
    },
    Object {
        name: "MessagesUserMessage",
        doc: "What the user says, or what calls brought.",
        fields: &[&[
            must("role", OneOf(&["user"]), ""),
            must("content", Either(&[Text, List(&Either(&[Ref("TextBlock"), Ref("ToolResultBlock")]))]), ""),
        ]],
    },
    Object {
        name: "MessagesAssistantMessage",
        doc: "What the assistant said.",
        fields: &[&[
            must("role", OneOf(&["assistant"]), ""),
            must(
                "content",
                Either(&[
                    Text,
                    List(&Either(&[
                        Ref("TextBlock"),
                        Ref("ThinkingBlock"),
                        Ref("RedactedThinkingBlock"),
                        Ref("ToolUseBlock"),
                    ])),
                ]),
                "",
            ),
        ]],
    },
    Object {
        name: "MessagesSystemMessage",
        doc: "Directions in the middle of a conversation.",
        fields: &[&[must("role", OneOf(&["system"]), ""), must("content", Either(&[Text, TEXT_BLOCKS]), "")]],
    },
    Object {
        name: "TextBlock",
        doc: "Text, of any role.",
        fields: &[&[must("type", OneOf(&["text"]), ""), must("text", Text, "")]],
    },
    Object {
        name: "ThinkingBlock",
        doc: "What the assistant thought.",
        fields: &[&[
            must("type", OneOf(&["thinking"]), ""),
            must("thinking", Text, ""),
            may("signature", Any, "Not looked at; empty in replies."),
        ]],
    },
    Object {
        name: "RedactedThinkingBlock",
        doc: "What an assistant of somebody else's thought; left out.",
        fields: &[&[must("type", OneOf(&["redacted_thinking"]), "")]],
    },
    Object {
        name: "ToolUseBlock",
        doc: "A call of the assistant's. The user's next message holds its result.",
        fields: &[&[
            must("type", OneOf(&["tool_use"]), ""),
            must("id", Text, "What its result names."),
            must("name", Text, "The tool."),
            must("input", Free, "The arguments."),
        ]],
    },
    Object {
        name: "ToolResultBlock",
        doc: "What a call brought, in a message of the user.",
        fields: &[&[
            must("type", OneOf(&["tool_result"]), ""),
            must("tool_use_id", Text, "The call, of the message before."),
            may("content", Either(&[Text, TEXT_BLOCKS]), ""),
            may("is_error", Bool, "The call failed."),
        ]],
    },
    Object {
        name: "MessagesTool",
        doc: "A function that the model may call.",
        fields: &[&[
            defaults("type", OneOf(&["custom"]), "\"custom\"", "Tools of Anthropic's are not run here."),
            must("name", Text, "Up to 64 letters, digits, underscores, dashes and dots."),
            may("description", Text, "What it does, for the model."),
            must("input_schema", Free, "JSON Schema of its arguments."),
            may("strict", Bool, "Hold the arguments to the schema."),
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
            must(
                "content",
                List(&Either(&[Ref("ThinkingBlock"), Ref("TextBlock"), Ref("ToolUseBlock")])),
                "A call whose arguments are no JSON object is given as text.",
            ),
            must(
                "stop_reason",
                OneOf(&["end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn"]),
                "`pause_turn`: the generation was ended early; send the reply back to go on.",
            ),
            nullable("stop_sequence", Text, "The one that ended the reply."),
            must(
                "usage",
                Of(&[
                    must("input_tokens", COUNT, "Of the prompt, without those that were cached."),
                    must("cache_creation_input_tokens", COUNT, "Always 0."),
                    must("cache_read_input_tokens", COUNT, "Found in the prefix cache."),
                    must("output_tokens", COUNT, ""),
                    must(
                        "output_tokens_details",
                        Of(&[must("thinking_tokens", COUNT, "Spent on thinking.")]),
                        "",
                    ),
                ]),
                "",
            ),
        ]],
    },
    Object {
        name: "MessagesEvent",
        doc: "One event of a stream; the other fields depend on its type.",
        fields: &[&[must(
            "type",
            OneOf(&[
                "message_start",
                "ping",
                "content_block_start",
                "content_block_delta",
                "content_block_stop",
                "message_delta",
                "message_stop",
                "error",
            ]),
            "",
        )]],
    },
    Object {
        name: "MessagesError",
        doc: "What is wrong and the way out.",
        fields: &[&[
            must("type", OneOf(&["error"]), ""),
            must(
                "error",
                Of(&[
                    must(
                        "type",
                        OneOf(&[
                            "invalid_request_error",
                            "authentication_error",
                            "permission_error",
                            "not_found_error",
                            "timeout_error",
                            "request_too_large",
                            "rate_limit_error",
                            "overloaded_error",
                            "api_error",
                        ]),
                        "",
                    ),
                    must("message", Text, "What is wrong with a field begins with its name."),
                ]),
                "",
            ),
            nullable("request_id", Text, "As in the header `request-id`."),
        ]],
    },
];
