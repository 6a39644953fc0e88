//! `/v1/completions` as the document describes it. Must not know how fields are read.

use super::schema::Type::{Bool, Either, Int, List, Number, Of, OneOf, OrNull, Ref, Text};
use super::schema::{Field, Object, Type, defaults, may, must, nullable};
use super::shared::{
    CHOICES, CHUNKS, COUNT, ENDING, FORMAT, IGNORED, OUTPUT, PROMPT_LOGPROBS, SAMPLING, SHOWN_TOKENS, STOP,
    STRUCTURE, TOKEN_ID, TOP_LOGPROBS,
};
use super::{Access, Body, Endpoint};

/// The endpoint.
pub(crate) const ENDPOINTS: &[Endpoint] = &[Endpoint {
    method: "post",
    path: "/v1/completions",
    tag: "Generation",
    summary: "Continue a text",
    doc: "OpenAI's completions: the prompt is read as it stands, without a chat template.",
    access: Access::Key,
    parameters: &[],
    query: &[],
    request: Some("CompletionRequest"),
    example: r#"{"model": "any", "prompt": "San Francisco is a", "max_tokens": 16}"#,
    reply: Body::JsonOrEvents("CompletionReply", "CompletionReply"),
    errors: super::GENERATING,
    refusal: "Error",
}];

const PROMPT: Type = Either(&[Text, List(&Text), List(&TOKEN_ID), List(&List(&TOKEN_ID))]);

const COMPLETION: &[Field] = &[
    must("prompt", PROMPT, "A text, texts, token ids, or lists of them; each prompt gets its own choices."),
    defaults("echo", Bool, "false", "Begin the reply with the prompt."),
    may("suffix", Text, "What follows the text that is to be filled in."),
    may(
        "logprobs",
        Int(0, Some(20)),
        "Log-probabilities of the generated tokens, with this many rivals of each.",
    ),
    defaults(
        "add_special_tokens",
        Bool,
        "true",
        "Begin the prompt with BOS where the tokenizer asks for it.",
    ),
];

/// Objects of its requests and replies.
pub(crate) const OBJECTS: &[Object] = &[
    Object {
        name: "CompletionRequest",
        doc: "Prompts, and how to continue them. Unknown fields are ignored; null means absent.",
        fields: &[
            COMPLETION,
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
        name: "CompletionReply",
        doc: "The whole reply, or one event of a stream.",
        fields: &[&[
            must("id", Text, ""),
            must("object", OneOf(&["text_completion"]), ""),
            must("created", COUNT, "Unix seconds."),
            must("model", Text, ""),
            must("choices", List(&Of(CHOICE)), ""),
            may("usage", Ref("Usage"), ""),
        ]],
    },
    Object {
        name: "CompletionLogprobs",
        doc: "Four lists of one length, one entry per token.",
        fields: &[&[
            must("tokens", List(&Text), ""),
            must("token_logprobs", List(&OrNull(&Number(None, None))), ""),
            nullable("top_logprobs", TOP_LOGPROBS, ""),
            must("text_offset", List(&COUNT), "Where each token begins in `text`, in characters."),
        ]],
    },
];

const CHOICE: &[Field] = &[
    must("index", COUNT, ""),
    must("text", Text, ""),
    nullable("logprobs", Ref("CompletionLogprobs"), ""),
    may("prompt_logprobs", PROMPT_LOGPROBS, "Per token of the prompt; null for the first."),
    ENDING[0],
    ENDING[1],
    ENDING[2],
];
