//! What chat and completions both take and give. Must not know how fields are read.

use super::schema::Type::{
    Above, Any, Bool, Either, Int, Items, List, Map, Number, Object as Free, Of, OneOf, OrNull, Ref, Text,
};
use super::schema::{Field, Object, Type, defaults, may, must, nullable};

/// A token's id.
pub(crate) const TOKEN_ID: Type = Int(0, Some(u32::MAX as i64));
const TOKEN_IDS: Type = List(&TOKEN_ID);
pub(crate) const TEXTS: Type = List(&Text);
/// Any 64-bit integer, signed or not; a schema's bounds are signed.
const SEED: Type = Int(i64::MIN, None);
/// As an object or as its text; true and false are schemas too.
pub(crate) const SCHEMA: Type = Either(&[Free, Text, Bool]);

/// Model and sampling.
pub(crate) const SAMPLING: &[Field] = &[
    may(
        "model",
        Text,
        "A served name. Any name means the one model, unless the server runs with --strict-model-name.",
    ),
    defaults(
        "min_tokens",
        Int(0, Some(u32::MAX as i64)),
        "0",
        "Stop tokens cannot be drawn before this many tokens.",
    ),
    may("temperature", Number(Some(0.0), Some(2.0)), "0 is greedy. Absent: the model's own default."),
    may(
        "top_p",
        Above(0.0, 1.0),
        "Keeps the smallest set of most likely tokens whose probability reaches this.",
    ),
    may("top_k", Int(-1, None), "Keeps this many most likely tokens; -1 and 0 keep all."),
    may(
        "min_p",
        Number(Some(0.0), Some(1.0)),
        "Drops tokens less likely than this times the most likely one.",
    ),
    may("repetition_penalty", Above(0.0, 2.0), "Above 1: tokens of prompt and reply become less likely."),
    may(
        "presence_penalty",
        Number(Some(-2.0), Some(2.0)),
        "Subtracted once from tokens that the reply holds.",
    ),
    may("frequency_penalty", Number(Some(-2.0), Some(2.0)), "Subtracted per occurrence in the reply."),
    may(
        "logit_bias",
        Map(&Number(Some(-100.0), Some(100.0))),
        "Token ids and what is added to their logits.",
    ),
    may("seed", SEED, "The same seed draws the same random numbers, whatever else runs."),
];

/// How much is generated, where replies may be several.
pub(crate) const CHOICES: &[Field] = &[
    may(
        "max_tokens",
        Int(0, None),
        "Most tokens to generate; what is left of the context where absent. 0 goes with `echo` and `prompt_logprobs`.",
    ),
    defaults("n", Int(1, None), "1", "Choices per prompt."),
    may(
        "best_of",
        Int(1, None),
        "Choices that are generated, of which the `n` most likely ones are given; more than `n` cannot be streamed.",
    ),
];

/// Where a reply ends, what is read of its prompt and how it is scheduled.
pub(crate) const OUTPUT: &[Field] = &[
    may("stop_token_ids", TOKEN_IDS, "Tokens that end the reply."),
    defaults(
        "include_stop_str_in_output",
        Bool,
        "false",
        "Leave the text or token that ended the reply in it.",
    ),
    defaults("ignore_eos", Bool, "false", "Go on after the model's end of sequence."),
    defaults("skip_special_tokens", Bool, "true", "Leave control tokens out of the text."),
    may(
        "truncate_prompt_tokens",
        Int(-1, None),
        "Keep this many of the prompt's last tokens; -1: as many as fit.",
    ),
    may("allowed_token_ids", TOKEN_IDS, "Only these tokens can be drawn."),
    may("bad_words", TEXTS, "Texts that are not generated."),
    defaults("priority", Int(i32::MIN as i64, Some(i32::MAX as i64)), "0", "Lower goes first."),
    may(
        "cache_salt",
        Text,
        "Cached prefixes are shared only with requests of the same salt; up to 256 bytes.",
    ),
];

/// Texts that end a reply.
pub(crate) const STOP: &[Field] = &[may(
    "stop",
    Either(&[Text, Items(&Text, 0, Some(16))]),
    "Texts that end the reply and are not part of it. None may be empty.",
)];

/// What is shown of tokens.
pub(crate) const SHOWN_TOKENS: &[Field] = &[defaults(
    "return_tokens_as_token_ids",
    Bool,
    "false",
    "Show tokens of log-probabilities as `token_id:<id>`.",
)];

/// OpenAI's streams of chunks, and what comes with the reply.
pub(crate) const CHUNKS: &[Field] = &[
    defaults("stream", Bool, "false", "Send the reply as server-sent events, ended by `data: [DONE]`."),
    may("stream_options", Ref("StreamOptions"), "Only read where `stream` is true."),
    may(
        "prompt_logprobs",
        Either(&[Int(0, Some(20)), Bool]),
        "Log-probabilities of the prompt's tokens, with this many rivals of each.",
    ),
];

/// Fields that nobody looks at.
pub(crate) const IGNORED: &[Field] = &[
    may("user", Any, UNUSED),
    may("metadata", Any, UNUSED),
    may("store", Any, UNUSED),
    may("service_tier", Any, UNUSED),
    may("safety_identifier", Any, UNUSED),
    may("prompt_cache_key", Any, UNUSED),
    may("verbosity", Any, UNUSED),
];

/// Of fields that change nothing here.
pub(crate) const UNUSED: &str = "Accepted and not used.";

/// OpenAI's field for the form that the text has.
pub(crate) const FORMAT: &[Field] =
    &[may("response_format", Ref("ResponseFormat"), "Text, any JSON object, or JSON of a schema.")];

/// What form the text has, in the words of others. Reasoning comes before it and is free.
pub(crate) const STRUCTURE: &[Field] = &[
    may("structured_outputs", Ref("StructuredOutputs"), "vLLM's form of the same; one of its fields."),
    may("guided_json", SCHEMA, "A JSON Schema."),
    may("guided_regex", Text, "A regular expression for the whole text."),
    may("guided_choice", TEXTS, "The text is one of these."),
    may("guided_grammar", Text, "A grammar in EBNF."),
    may("guided_json_object", Bool, "Any JSON object."),
    may("json_schema", SCHEMA, "SGLang's and llama-server's name for `guided_json`."),
    may("regex", Text, "SGLang's name for `guided_regex`."),
    may("ebnf", Text, "SGLang's name for `guided_grammar`."),
    may("grammar", Text, "llama-server's name for `guided_grammar`."),
    may("guided_decoding_backend", Any, UNUSED),
    may("guided_whitespace_pattern", Any, UNUSED),
];

/// Objects of both endpoints' requests and replies, and the error that all share.
pub(crate) const OBJECTS: &[Object] = &[
    Object {
        name: "StreamOptions",
        doc: "What a stream holds beside the reply.",
        fields: &[&[defaults(
            "include_usage",
            Bool,
            "false",
            "A last chunk without choices tells the usage.",
        )]],
    },
    Object {
        name: "ResponseFormat",
        doc: "The form of the text behind the reasoning.",
        fields: &[&[
            must("type", OneOf(&["text", "json_object", "json_schema"]), ""),
            may(
                "json_schema",
                Of(&[
                    may("name", Text, ""),
                    may("description", Text, ""),
                    may("schema", SCHEMA, "A JSON Schema; it must be there."),
                    may("strict", Bool, "Schemas are always held to."),
                ]),
                "With `type: json_schema`.",
            ),
            may("schema", SCHEMA, "With `type: json_object`: what the object must be (llama-server)."),
        ]],
    },
    Object {
        name: "StructuredOutputs",
        doc: "The form of the text; one field.",
        fields: &[&[
            may("json", SCHEMA, "A JSON Schema."),
            may("json_object", Bool, "Any JSON object."),
            may("regex", Text, "A regular expression for the whole text."),
            may("choice", TEXTS, "The text is one of these."),
            may("grammar", Text, "A grammar in EBNF."),
        ]],
    },
    Object {
        name: "Usage",
        doc: "Tokens read and written.",
        fields: &[&[
            must("prompt_tokens", COUNT, ""),
            must("completion_tokens", COUNT, ""),
            must("total_tokens", COUNT, ""),
            must(
                "prompt_tokens_details",
                Of(&[must("cached_tokens", COUNT, "Found in the prefix cache.")]),
                "",
            ),
            must(
                "completion_tokens_details",
                Of(&[must("reasoning_tokens", COUNT, "Spent on thinking.")]),
                "",
            ),
            must("prompt_cache_hit_tokens", COUNT, "DeepSeek's name for `cached_tokens`."),
            must("prompt_cache_miss_tokens", COUNT, "The prompt's other tokens."),
        ]],
    },
    Object {
        name: "Error",
        doc: "What is wrong and the way out.",
        fields: &[&[must(
            "error",
            Of(&[
                must("message", Text, ""),
                must("type", Text, "The class of error."),
                nullable("param", Text, "The field that is wrong."),
                nullable("code", Text, "A name for programs."),
            ]),
            "",
        )]],
    },
];

/// A number of things.
pub(crate) const COUNT: Type = Int(0, None);
/// What ended a reply: a stop string, a token's id, or neither.
const MATCHED: Type = Either(&[Text, TOKEN_ID]);

/// How a choice ended.
pub(crate) const ENDING: &[Field] = &[
    nullable("finish_reason", OneOf(&["stop", "length", "tool_calls", "abort"]), ""),
    may("stop_reason", MATCHED, "What of the request ended the reply (vLLM)."),
    may("matched_stop", MATCHED, "What ended the reply, the end of sequence too (SGLang)."),
];

/// A token's log-probability by its text.
pub(crate) const TOP_LOGPROBS: Type = List(&OrNull(&Map(&Number(None, None))));

/// Per token of a prompt, its own and its rivals' by id.
pub(crate) const PROMPT_LOGPROBS: Type = List(&OrNull(&Map(&Of(&[
    must("logprob", Number(None, None), ""),
    nullable("rank", Int(1, None), "Known of the most likely ones."),
    must("decoded_token", Text, ""),
]))));
