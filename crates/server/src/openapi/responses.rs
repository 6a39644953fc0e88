//! `/v1/responses` as the document describes it. Must not know how fields are read.

use super::chat::{BUDGET, EFFORT, PARALLEL, TEMPLATE, THINKING, THINKING_SWITCH};
use super::schema::Type::{
    Any, Bool, Either, Int, Items, List, Map, Number, Object as Free, Of, OneOf, Ref, Text,
};
use super::schema::{Field, Object, Type, defaults, may, must, nullable};
use super::shared::{COUNT, OUTPUT, SAMPLING, SHOWN_TOKENS, STOP, STRUCTURE, UNUSED};
use super::{Access, Body, Endpoint};

const TAG: &str = "Responses";
const ID: &[Field] = &[must("id", Text, "A stored response's, which was made with the same API key.")];

const fn stored(
    method: &'static str,
    path: &'static str,
    reply: Body,
    summary: &'static str,
    doc: &'static str,
) -> Endpoint {
    Endpoint {
        method,
        path,
        tag: TAG,
        summary,
        doc,
        access: Access::Key,
        parameters: ID,
        query: &[],
        request: None,
        example: "",
        reply,
        errors: &[404],
        refusal: "Error",
    }
}

/// The endpoints.
pub(crate) const ENDPOINTS: &[Endpoint] = &[
    Endpoint {
        method: "post",
        path: "/v1/responses",
        tag: TAG,
        summary: "Reply to an input",
        doc: "OpenAI's Responses over the same engine. Fields of the chat endpoint that this one does not have at OpenAI's mean \
              what they mean there.",
        access: Access::Key,
        parameters: &[],
        query: &[],
        request: Some("ResponsesRequest"),
        example: r#"{"model": "any", "input": "how many rs are in strawberry", "max_output_tokens": 128}"#,
        reply: Body::JsonOrNamedEvents("ResponsesReply", "ResponsesEvent"),
        errors: super::GENERATING,
        refusal: "Error",
    },
    stored("get", "/v1/responses/{id}", Body::Json("ResponsesReply"), "Read a stored response again", ""),
    stored(
        "delete",
        "/v1/responses/{id}",
        Body::Json("ResponsesDeleted"),
        "Forget a response",
        "Those that continue it stay.",
    ),
    Endpoint {
        query: &[
            defaults("limit", Int(1, Some(100)), "20", "Most items to list."),
            defaults("order", OneOf(&["asc", "desc"]), "\"desc\"", "The oldest or the newest first."),
            may("after", Text, "The id of the item behind which the list begins."),
        ],
        errors: &[400, 404],
        ..stored(
            "get",
            "/v1/responses/{id}/input_items",
            Body::Json("ResponsesItemList"),
            "List what a response answered",
            "The items of its request and of the conversation that it continues.",
        )
    },
    Endpoint {
        errors: &[400, 404],
        ..stored(
            "post",
            "/v1/responses/{id}/cancel",
            Body::Never,
            "Cancel a response",
            "Always refused: only responses in the background could be cancelled, and none are run. Whoever waits for a reply \
             cancels it by leaving.",
        )
    },
];

const LOGPROBS: &str = "message.output_text.logprobs";
const CHOICE: Type = Either(&[
    OneOf(&["none", "auto", "required"]),
    Of(&[must("type", OneOf(&["function"]), ""), must("name", Text, "")]),
]);
const SUMMARY: Type = OneOf(&["auto", "concise", "detailed"]);
const VERBOSITY: Type = OneOf(&["low", "medium", "high"]);

const REQUEST: &[Field] = &[
    must("input", Either(&[Text, List(&ITEM)]), "A text, or items of a conversation."),
    may("instructions", Text, "A system message before the conversation; it is not part of what is stored."),
    may("previous_response_id", Text, "A stored response to go on from."),
    may(
        "store",
        Bool,
        "Whether the response can be read again and gone on from; true unless the server stores none.",
    ),
    may(
        "max_output_tokens",
        Int(1, None),
        "Most tokens to generate; what is left of the context where absent.",
    ),
    defaults("stream", Bool, "false", "Send the reply as server-sent events."),
    may("stream_options", Free, UNUSED),
    may("tools", Items(&Ref("ResponsesTool"), 0, Some(128)), "Functions that the model may call."),
    may("tool_choice", CHOICE, "Whether tools are called: never, as the model likes, always, or this one."),
    may(
        "max_tool_calls",
        Int(0, Some(u32::MAX as i64)),
        "Given back; it bounds tools that a server runs, of which there are none.",
    ),
    may(
        "reasoning",
        Of(&[
            may("effort", EFFORT, "As `reasoning_effort`."),
            may("summary", SUMMARY, "Given back; the thinking is given whole."),
            may("generate_summary", SUMMARY, "Another name for `summary`."),
            may("max_tokens", BUDGET, "As `thinking_budget`."),
            may("enabled", Bool, "Whether the model thinks."),
            may("exclude", Bool, "Leave the thinking out of the reply."),
        ]),
        "Bounds of the thinking.",
    ),
    may(
        "text",
        Of(&[
            may(
                "format",
                Of(&[
                    must("type", OneOf(&["text", "json_object", "json_schema"]), ""),
                    may(
                        "name",
                        Text,
                        "With `type: json_schema`: up to 64 letters, digits, underscores and dashes.",
                    ),
                    may("description", Text, "Given back."),
                    may("schema", Free, "With `type: json_schema`: a JSON Schema."),
                    may("strict", Bool, "Schemas are always held to."),
                ]),
                "Text, any JSON object, or JSON of a schema.",
            ),
            may("verbosity", VERBOSITY, "Given back."),
        ]),
        "The form of the text behind the reasoning.",
    ),
    may(
        "include",
        List(&OneOf(&[LOGPROBS, "reasoning.encrypted_content"])),
        "Further parts of the reply. Reasoning is given in plain text, so there is nothing encrypted.",
    ),
    may(
        "top_logprobs",
        Int(0, Some(20)),
        "Rivals of each token whose log-probabilities are given; needs `include: [\"message.output_text.logprobs\"]`.",
    ),
    may(
        "metadata",
        Map(&Text),
        "Given back. Up to 16 pairs of a key of up to 64 characters and a text of up to 512.",
    ),
    may("user", Text, "Given back."),
    may("safety_identifier", Text, "Given back."),
    may("prompt_cache_key", Text, "Given back."),
    may("service_tier", Text, UNUSED),
];

const ITEM: Type = Either(&[
    Ref("ResponsesMessage"),
    Ref("ResponsesCall"),
    Ref("ResponsesCallOutput"),
    Ref("ResponsesReasoning"),
    Ref("ResponsesReference"),
]);
const SHOWN_ITEM: Type = Either(&[
    Ref("ResponsesShownMessage"),
    Ref("ResponsesShownCall"),
    Ref("ResponsesShownCallOutput"),
    Ref("ResponsesShownReasoning"),
]);
const OUTPUT_ITEM: Type =
    Either(&[Ref("ResponsesShownMessage"), Ref("ResponsesShownCall"), Ref("ResponsesShownReasoning")]);

const ROLE: Type = OneOf(&["system", "developer", "user", "assistant"]);
const PARTS: Type = List(&Either(&[Ref("ResponsesText"), Ref("ResponsesRefusal")]));

/// What a client may say of any item.
const SENT: &[Field] = &[may("id", Text, "Up to 256 printable ASCII characters; made up where absent.")];
/// What the server says of any item.
const SHOWN: &[Field] =
    &[must("id", Text, ""), must("status", OneOf(&["in_progress", "completed", "incomplete"]), "")];
const CALL: &[Field] = &[
    must("type", OneOf(&["function_call"]), ""),
    must("call_id", Text, "What its output names."),
    must("name", Text, "The function."),
    must("arguments", Text, "JSON, as the model wrote it."),
];
const CALL_OUTPUT: &[Field] = &[
    must("type", OneOf(&["function_call_output"]), ""),
    must("call_id", Text, "A call that stands before it."),
    must("output", Either(&[Text, PARTS]), ""),
];

/// Objects of its requests and replies.
pub(crate) const OBJECTS: &[Object] = &[
    Object {
        name: "ResponsesRequest",
        doc: "An input, and how to go on. Unknown fields are ignored; null means absent.",
        fields: &[
            REQUEST,
            PARALLEL,
            THINKING,
            THINKING_SWITCH,
            TEMPLATE,
            SAMPLING,
            STOP,
            OUTPUT,
            SHOWN_TOKENS,
            STRUCTURE,
        ],
    },
    Object {
        name: "ResponsesMessage",
        doc: "A message.",
        fields: &[
            &[
                defaults("type", OneOf(&["message"]), "\"message\"", ""),
                must("role", ROLE, ""),
                must("content", Either(&[Text, PARTS]), "Text; several parts are joined by line breaks."),
            ],
            SENT,
        ],
    },
    Object { name: "ResponsesCall", doc: "A call of the model's.", fields: &[CALL, SENT] },
    Object { name: "ResponsesCallOutput", doc: "What a call gave.", fields: &[CALL_OUTPUT, SENT] },
    Object {
        name: "ResponsesReasoning",
        doc: "What the model thought.",
        fields: &[
            &[
                must("type", OneOf(&["reasoning"]), ""),
                may("content", PARTS, ""),
                may("summary", Any, "Not looked at: it is not what was thought."),
            ],
            SENT,
        ],
    },
    Object {
        name: "ResponsesReference",
        doc: "An item of a stored response.",
        fields: &[&[
            defaults("type", OneOf(&["item_reference"]), "\"item_reference\"", ""),
            must("id", Text, "The item's."),
        ]],
    },
    Object {
        name: "ResponsesText",
        doc: "A piece of a message. This server reads text.",
        fields: &[&[
            must("type", OneOf(&["input_text", "output_text", "text", "reasoning_text"]), ""),
            must("text", Text, ""),
        ]],
    },
    Object {
        name: "ResponsesRefusal",
        doc: "A piece of a message in which an assistant refuses.",
        fields: &[&[must("type", OneOf(&["refusal"]), ""), must("refusal", Text, "")]],
    },
    Object {
        name: "ResponsesTool",
        doc: "A function that the model may call.",
        fields: &[&[
            must("type", OneOf(&["function"]), ""),
            must("name", Text, "Up to 64 letters, digits, underscores, dashes and dots."),
            may("description", Text, "What it does, for the model."),
            may("parameters", Free, "JSON Schema of its arguments."),
            may("strict", Bool, "Hold the arguments to the schema."),
        ]],
    },
    Object { name: "ResponsesReply", doc: "A whole response.", fields: &[REPLY, REPEATED] },
    Object {
        name: "ResponsesShownMessage",
        doc: "A message as the server shows it.",
        fields: &[
            SHOWN,
            &[
                must("type", OneOf(&["message"]), ""),
                must("role", ROLE, ""),
                must("content", List(&Ref("ResponsesShownText")), ""),
            ],
        ],
    },
    Object {
        name: "ResponsesShownText",
        doc: "A text of a message: `output_text` of an assistant's, `input_text` of others'.",
        fields: &[&[
            must("type", OneOf(&["input_text", "output_text"]), ""),
            must("text", Text, ""),
            may("annotations", List(&Free), "Of `output_text`: always empty."),
            may(
                "logprobs",
                List(&Ref("TokenLogprob")),
                "Of `output_text`: one entry per token where they were asked for.",
            ),
        ]],
    },
    Object { name: "ResponsesShownCall", doc: "A call as the server shows it.", fields: &[SHOWN, CALL] },
    Object {
        name: "ResponsesShownCallOutput",
        doc: "What a call gave as the server shows it.",
        fields: &[SHOWN, CALL_OUTPUT],
    },
    Object {
        name: "ResponsesShownReasoning",
        doc: "What the model thought as the server shows it.",
        fields: &[
            SHOWN,
            &[
                must("type", OneOf(&["reasoning"]), ""),
                must("content", List(&Ref("ResponsesText")), "The thinking itself."),
                must("summary", List(&Free), "Always empty."),
                nullable("encrypted_content", Text, "Always null."),
            ],
        ],
    },
    Object {
        name: "ResponsesItemList",
        doc: "Items of a conversation.",
        fields: &[&[
            must("object", OneOf(&["list"]), ""),
            must("data", List(&SHOWN_ITEM), ""),
            nullable("first_id", Text, ""),
            nullable("last_id", Text, "What `after` takes for the next page."),
            must("has_more", Bool, ""),
        ]],
    },
    Object {
        name: "ResponsesDeleted",
        doc: "A response is forgotten.",
        fields: &[&[
            must("id", Text, ""),
            must("object", OneOf(&["response"]), ""),
            must("deleted", Bool, ""),
        ]],
    },
    Object {
        name: "ResponsesEvent",
        doc: "One event of a stream; the other fields depend on its type. The last one is `response.completed`, \
              `response.incomplete` or `response.failed` and holds the whole response.",
        fields: &[&[
            must("type", Text, "As `response.output_text.delta`."),
            must("sequence_number", COUNT, "Counts the events."),
        ]],
    },
];

const REPLY: &[Field] = &[
    must("id", Text, ""),
    must("object", OneOf(&["response"]), ""),
    must("created_at", COUNT, "Unix seconds."),
    nullable("completed_at", COUNT, "Unix seconds; null unless it is completed."),
    must("status", OneOf(&["completed", "incomplete", "failed"]), ""),
    nullable("error", Of(&[must("code", Text, ""), must("message", Text, "")]), "Of a failed one."),
    nullable(
        "incomplete_details",
        Of(&[must("reason", OneOf(&["max_output_tokens"]), "")]),
        "Of an incomplete one.",
    ),
    must("model", Text, ""),
    must("output", List(&OUTPUT_ITEM), "Reasoning, messages and calls."),
    must(
        "usage",
        Of(&[
            must("input_tokens", COUNT, ""),
            must(
                "input_tokens_details",
                Of(&[
                    must("cached_tokens", COUNT, "Found in the prefix cache."),
                    must("cache_write_tokens", COUNT, "The prompt's other tokens."),
                ]),
                "",
            ),
            must("output_tokens", COUNT, ""),
            must("output_tokens_details", Of(&[must("reasoning_tokens", COUNT, "Spent on thinking.")]), ""),
            must("total_tokens", COUNT, ""),
        ]),
        "",
    ),
];

/// Fields of the request as they were understood.
const REPEATED: &[Field] = &[
    must("background", Bool, "Always false."),
    nullable("instructions", Text, ""),
    nullable("max_output_tokens", COUNT, ""),
    nullable("max_tool_calls", COUNT, ""),
    must("metadata", Map(&Text), ""),
    must("parallel_tool_calls", Bool, ""),
    nullable("previous_response_id", Text, ""),
    nullable("prompt_cache_key", Text, ""),
    nullable("safety_identifier", Text, ""),
    nullable("user", Text, ""),
    must("reasoning", Of(&[nullable("effort", EFFORT, ""), nullable("summary", SUMMARY, "")]), ""),
    must("service_tier", OneOf(&["default"]), ""),
    must("store", Bool, ""),
    must("temperature", Number(None, None), ""),
    must("top_p", Number(None, None), ""),
    must("text", Of(&[must("format", Free, ""), must("verbosity", VERBOSITY, "")]), ""),
    must("tool_choice", CHOICE, ""),
    must("tools", List(&Ref("ResponsesTool")), ""),
    must("top_logprobs", COUNT, ""),
    must("truncation", OneOf(&["disabled"]), ""),
];
