//! Whatever a conversation holds, and whatever a chat template says: a prompt or an error. Of a prompt, the tokens spell
//! the text. Shared by the fuzz target and the replay of its corpus.
//!
//! Input: sections between `U+001E` bytes: flags (`g` for a generation prompt, `c` to continue the last message), the
//! template (`@n` is the n-th published one), messages, tools, further variables. Messages that are no JSON array are
//! one user's words.

use std::sync::OnceLock;

use r1_text::{ChatInput, ChatTemplate, ControlText, ControlTokens, TextError, Tokenizer};
use serde_json::{Value, json};

/// Templates are asked for by their place here: `@0` to `@4`.
const PUBLISHED: [&str; 5] = [
    include_str!("../../crates/text/testdata/templates/tiny-r1.jinja"),
    include_str!("../../crates/text/testdata/templates/deepseek-ai-DeepSeek-V3.jinja"),
    include_str!("../../crates/text/testdata/templates/deepseek-ai-DeepSeek-V3.1.jinja"),
    include_str!("../../crates/text/testdata/templates/deepseek-ai-DeepSeek-V3.2.jinja"),
    include_str!("../../crates/text/testdata/templates/deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja"),
];

/// Longer prompts are not encoded: that takes ten times as long as rendering them.
const ENCODED_BYTES: usize = 256;

pub(crate) fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut sections = text.split('\u{1e}');
    let mut next = || sections.next().unwrap_or_default();
    let (flags, template, messages, tools, kwargs) = (next(), next(), next(), next(), next());

    let published = template.strip_prefix('@').and_then(|n| n.parse::<usize>().ok());
    let compiled;
    let template = match published.and_then(|n| published_templates().get(n)) {
        Some(template) => template,
        None => match compile(template, tokenizer().control_tokens()) {
            Ok(template) => {
                compiled = template;
                &compiled
            }
            Err(TextError::Template { .. }) => return,
            Err(other) => panic!("compiling gave {other}"),
        },
    };
    let messages = match serde_json::from_str(messages) {
        Ok(Value::Array(messages)) => messages,
        _ => vec![json!({"role": "user", "content": messages})],
    };
    let input = ChatInput {
        messages,
        tools: serde_json::from_str(tools).ok(),
        add_generation_prompt: flags.contains('g'),
        continue_final_message: flags.contains('c'),
        kwargs: serde_json::from_str(kwargs).unwrap_or_default(),
    };
    if let Ok(prompt) = template.render(&input) {
        let text = prompt.text();
        if text.len() <= ENCODED_BYTES {
            let tokens = tokenizer().encode_prompt(&prompt, usize::MAX).expect("a short text has tokens");
            assert_eq!(tokenizer().decode(&tokens, ControlText::Show), text);
        }
    }
}

fn compile<'s>(source: &'s str, control: &ControlTokens) -> Result<ChatTemplate<'s>, TextError> {
    let [bos, eos] = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"];
    ChatTemplate::new(source, Some(bos), Some(eos), control.clone())
}

fn published_templates() -> &'static [ChatTemplate<'static>; 5] {
    static TEMPLATES: OnceLock<[ChatTemplate<'static>; 5]> = OnceLock::new();
    let control = tokenizer().control_tokens();
    TEMPLATES.get_or_init(|| PUBLISHED.map(|source| compile(source, control).expect("it is published")))
}

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let json = include_bytes!("../../crates/cli/model/tokenizer.json");
        let config = include_bytes!("../../crates/cli/model/tokenizer_config.json");
        Tokenizer::from_bytes(json, Some(config)).expect("it is served")
    })
}
