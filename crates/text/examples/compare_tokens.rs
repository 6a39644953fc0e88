//! Compares encoding with another implementation's, by any tokenizer.json:
//! `compare_tokens TOKENIZER_JSON TOKENS_JSON`, the latter `{"strings": […], "ids": [[…], …]}` as
//! tools/templates/make_tokenizer.py writes it. Prints what differs and how long each long string took.

use std::time::Instant;

use r1_text::{ControlText, Tokenizer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, tokenizer, tokens] = arguments.as_slice() else {
        return Err("usage: compare_tokens TOKENIZER_JSON TOKENS_JSON".into());
    };
    let start = Instant::now();
    let tokenizer = Tokenizer::from_bytes(&std::fs::read(tokenizer)?, None)?;
    println!("loaded in {:.2} s, {} tokens", start.elapsed().as_secs_f64(), tokenizer.vocab_size());
    let expected: serde_json::Value = serde_json::from_slice(&std::fs::read(tokens)?)?;
    let strings: Vec<String> = serde_json::from_value(expected["strings"].clone())?;
    let ids: Vec<Vec<u32>> = serde_json::from_value(expected["ids"].clone())?;
    let mut different = 0;
    for (text, ids) in strings.iter().zip(&ids) {
        let start = Instant::now();
        let ours = tokenizer.encode(text)?;
        let seconds = start.elapsed().as_secs_f64();
        let head: String = text.chars().take(20).collect();
        if text.len() > 10_000 {
            println!("{} bytes {head:?}: {} tokens in {seconds:.2} s", text.len(), ours.len());
        }
        let same = ours.iter().map(|t| t.0).eq(ids.iter().copied());
        if !same || tokenizer.decode(&ours, ControlText::Show) != *text {
            different += 1;
            println!(
                "differs: {} bytes {head:?}: {} tokens here, {} there",
                text.len(),
                ours.len(),
                ids.len()
            );
        }
    }
    println!("{} strings, {different} differ", strings.len());
    Ok(())
}
