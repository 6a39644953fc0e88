//! `/v1/chat/completions` as the document describes it. Must not know how fields are read.

use super::schema::Type::{Bool, Either, Int, Items, List, Number, Object as Free, Of, OneOf, Ref, Text};
use super::schema::{Field, Object, Type, defaults, may, must, nullable};
use super::shared::{
    CHOICES, CHUNKS, COUNT, ENDING, FORMAT, IGNORED, OUTPUT, PROMPT_LOGPROBS, SAMPLING, SHOWN_TOKENS, STOP,
    STRUCTURE,
};
use super::{Access, Body, Endpoint};

/// The endpoint.
pub(crate) const ENDPOINTS: &[Endpoint] = &[Endpoint {
    method: "post",
    path: "/v1/chat/completions",
    tag: "Generation",
    summary: "Reply to a conversation",
    doc: "OpenAI's chat completions, with the extensions of vLLM, SGLang and DeepSeek's platform. Reasoning is given as \
          `reasoning_content` and as `reasoning`.",
    access: Access::Key,
    parameters: &[],
    query: &[],
    request: Some("ChatRequest"),
    example: r#"{"model": "any", "messages": [{"role": "user", "content": "how many rs are in strawberry"}], "max_tokens": 128}"#,
    reply: Body::JsonOrEvents("ChatReply", "ChatChunk"),
    errors: super::GENERATING,
    refusal: "Error",
}];

const MESSAGES: Type = Items(&Ref("ChatMessage"), 1, None);

/// What a conversation is made of, for every endpoint that takes one.
pub(crate) const CONVERSATION: &[Field] = &[
    may("tools", Items(&Ref("Tool"), 0, Some(128)), "Functions that the model may call."),
    defaults("add_generation_prompt", Bool, "true", "End the prompt where the assistant's reply begins."),
    defaults("continue_final_message", Bool, "false", "Continue the last message instead of replying to it."),
    TEMPLATE[0],
    defaults(
        "add_special_tokens",
        Bool,
        "false",
        "The chat template places the special tokens; true is refused.",
    ),
];

/// How hard the model shall think.
pub(crate) const EFFORT: Type = OneOf(&["none", "minimal", "low", "medium", "high", "xhigh", "max"]);

/// Tokens of thinking.
pub(crate) const BUDGET: Type = Int(0, Some(u32::MAX as i64));

/// How long the model thinks and whether that is shown.
pub(crate) const THINKING: &[Field] = &[
    may(
        "reasoning_effort",
        EFFORT,
        "How many tokens the model may think; `none` closes the thinking at once.",
    ),
    may("enable_thinking", Bool, "Whether the model thinks (Qwen)."),
    may("thinking_budget", BUDGET, "Most tokens of thinking; then it is ended."),
    may("thinking_token_budget", BUDGET, "Another name for `thinking_budget`."),
    defaults("include_reasoning", Bool, "true", "Whether the reply shows the thinking."),
];

/// DeepSeek's and Anthropic's switch.
pub(crate) const THINKING_SWITCH: &[Field] = &[may(
    "thinking",
    Either(&[Ref("Thinking"), Bool]),
    "Whether the model thinks, and how long (DeepSeek, Anthropic).",
)];

/// The same in one object, as OpenRouter has it.
pub(crate) const REASONING: &[Field] =
    &[may("reasoning", Ref("Reasoning"), "Bounds of the thinking, in one object.")];

/// Whether calls may be several.
pub(crate) const PARALLEL: &[Field] =
    &[may("parallel_tool_calls", Bool, "Whether one reply may call several tools.")];

/// What the chat template is told.
pub(crate) const TEMPLATE: &[Field] = &[may(
    "chat_template_kwargs",
    Free,
    "Variables of the chat template, as `thinking` and `enable_thinking`.",
)];

const CHAT: &[Field] = &[
    must("messages", MESSAGES, "The conversation."),
    may("max_completion_tokens", Int(0, None), "OpenAI's newer name for `max_tokens`."),
    defaults("logprobs", Bool, "false", "Give the log-probability of every generated token."),
    may("top_logprobs", Int(0, Some(20)), "And this many rivals of each; needs `logprobs`."),
    may(
        "tool_choice",
        Either(&[OneOf(&["none", "auto", "required", "any"]), Ref("NamedToolChoice")]),
        "Whether tools are called: never, as the model likes, always, or this one.",
    ),
    defaults("echo", Bool, "false", "Begin the reply with the text that it continues."),
    defaults("separate_reasoning", Bool, "true", "Whether thinking is kept out of `content`."),
];

/// Objects of its requests and replies.
pub(crate) const OBJECTS: &[Object] = &[
    Object {
        name: "ChatRequest",
        doc: "A conversation, and how to go on. Unknown fields are ignored; null means absent.",
        fields: &[
            CHAT,
            CONVERSATION,
            THINKING,
            THINKING_SWITCH,
            REASONING,
            PARALLEL,
            CHOICES,
            SAMPLING,
            STOP,
            OUTPUT,
            SHOWN_TOKENS,
            CHUNKS,
            FORMAT,
            STRUCTURE,
            IGNORED,
        ],
    },
    Object {
        name: "ChatMessage",
        doc: "One message. An assistant's may have calls instead of a content.",
        fields: &[&[
            must("role", OneOf(&["system", "developer", "user", "assistant", "tool"]), ""),
            may(
                "content",
                Either(&[Text, List(&Ref("ContentPart"))]),
                "Text; several parts are joined by line breaks.",
            ),
            may("name", Text, "Name of the tool or of the speaker."),
            may("tool_calls", List(&Ref("ToolCall")), "An assistant's calls."),
            may("tool_call_id", Text, "Which call a tool's message answers."),
            may("reasoning_content", Text, "What an assistant thought, for templates that keep it."),
            may("prefix", Bool, "Of a last assistant message: continue it (DeepSeek)."),
        ]],
    },
    Object {
        name: "ContentPart",
        doc: "A piece of a message. This server reads text.",
        fields: &[&[must("type", OneOf(&["text"]), ""), must("text", Text, "")]],
    },
    Object {
        name: "Tool",
        doc: "A function that the model may call.",
        fields: &[&[
            must("type", OneOf(&["function"]), ""),
            must(
                "function",
                Of(&[
                    must("name", Text, "Up to 64 letters, digits, underscores, dashes and dots."),
                    may("description", Text, "What it does, for the model."),
                    may("parameters", Free, "JSON Schema of its arguments."),
                    may("strict", Bool, "Hold the arguments to the schema."),
                ]),
                "",
            ),
        ]],
    },
    Object {
        name: "ToolCall",
        doc: "A call of a function.",
        fields: &[&[
            may("id", Text, "What its answer names."),
            defaults("type", OneOf(&["function"]), "\"function\"", ""),
            must(
                "function",
                Of(&[
                    must("name", Text, ""),
                    must("arguments", Either(&[Text, Free]), "JSON text; an object is accepted in requests."),
                ]),
                "",
            ),
        ]],
    },
    Object {
        name: "NamedToolChoice",
        doc: "The tool to call.",
        fields: &[&[
            must("type", OneOf(&["function"]), ""),
            must("function", Of(&[must("name", Text, "")]), ""),
        ]],
    },
    Object {
        name: "Thinking",
        doc: "Whether the model thinks.",
        fields: &[&[
            must("type", OneOf(&["enabled", "disabled", "auto", "adaptive"]), ""),
            may("budget_tokens", BUDGET, "As `thinking_budget`."),
        ]],
    },
    Object {
        name: "Reasoning",
        doc: "Bounds of the thinking.",
        fields: &[&[
            may("max_tokens", BUDGET, "As `thinking_budget`."),
            may("enabled", Bool, "Whether the model thinks."),
            may("exclude", Bool, "Leave the thinking out of the reply."),
            may("effort", EFFORT, "As `reasoning_effort`."),
        ]],
    },
    Object {
        name: "ChatReply",
        doc: "The whole reply.",
        fields: &[&[
            must("id", Text, ""),
            must("object", OneOf(&["chat.completion"]), ""),
            must("created", COUNT, "Unix seconds."),
            must("model", Text, ""),
            must("choices", List(&Of(CHOICE)), ""),
            must("usage", Ref("Usage"), ""),
            may("prompt_logprobs", PROMPT_LOGPROBS, "Per token of the prompt; null for the first."),
        ]],
    },
    Object {
        name: "ChatReplyMessage",
        doc: "What the model said.",
        fields: &[&[
            must("role", OneOf(&["assistant"]), ""),
            nullable("content", Text, ""),
            nullable("reasoning_content", Text, "The thinking."),
            nullable("reasoning", Text, "The same."),
            may("tool_calls", List(&Ref("ToolCall")), ""),
        ]],
    },
    Object {
        name: "ChatLogprobs",
        doc: "One entry per generated token.",
        fields: &[&[nullable("content", List(&Ref("TokenLogprob")), "")]],
    },
    Object {
        name: "TokenLogprob",
        doc: "A token and its rivals.",
        fields: &[&[
            must("token", Text, ""),
            must("logprob", Number(None, None), ""),
            nullable("bytes", List(&Int(0, Some(255))), "A token need not be whole characters."),
            may(
                "top_logprobs",
                List(&Of(&[must("token", Text, ""), must("logprob", Number(None, None), "")])),
                "",
            ),
        ]],
    },
    Object {
        name: "ChatChunk",
        doc: "One event of a stream.",
        fields: &[&[
            must("id", Text, ""),
            must("object", OneOf(&["chat.completion.chunk"]), ""),
            must("created", COUNT, "Unix seconds."),
            must("model", Text, ""),
            must("choices", List(&Of(CHUNK_CHOICE)), "Empty in the chunk that tells the usage."),
            may("usage", Ref("Usage"), "Where it was asked for: null until the last chunk."),
        ]],
    },
];

const CHOICE: &[Field] = &[
    must("index", COUNT, ""),
    must("message", Ref("ChatReplyMessage"), ""),
    nullable("logprobs", Ref("ChatLogprobs"), ""),
    ENDING[0],
    ENDING[1],
    ENDING[2],
];

const CHUNK_CHOICE: &[Field] = &[
    must("index", COUNT, ""),
    must(
        "delta",
        Of(&[
            may("role", OneOf(&["assistant"]), "In the first chunk."),
            may("content", Text, ""),
            may("reasoning_content", Text, ""),
            may("reasoning", Text, ""),
            may("tool_calls", List(&Free), "Calls by `index`; arguments come in fragments."),
        ]),
        "What the choice gained.",
    ),
    nullable("logprobs", Ref("ChatLogprobs"), ""),
    ENDING[0],
    ENDING[1],
    ENDING[2],
];
