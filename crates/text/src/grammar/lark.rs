//! A client's Lark grammar before it is compiled: its size, its repetitions, and what it must not reach. Knows the
//! tokens of Lark only; the compiler parses it.

use super::error::Fault;
use super::regex;

/// Largest grammar, in bytes.
pub(super) const MAX_BYTES: usize = 64 << 10;
/// Most lines that define something: rules are compiled by recursion.
const MAX_RULES: usize = 1_000;
/// Largest count of one repetition.
pub(super) const MAX_REPEAT: u64 = 1_000;
/// Deepest group in group.
const MAX_DEPTH: usize = 60;
/// Most `&` and `~` of a grammar: each can multiply the states of its terminal.
const MAX_SET_OPERATORS: usize = 4;

/// Refuses a grammar that is too large, or reaches beyond text.
pub(super) fn check(text: &str) -> Result<(), Fault> {
    if text.len() > MAX_BYTES {
        return Err(Fault::new(format!(
            "the grammar is larger than the {} KiB that are supported",
            MAX_BYTES >> 10
        )));
    }
    if !text.lines().any(|line| line.trim_start_matches(['?', '!']).trim_start().starts_with("start")) {
        return Err(Fault::new(
            "a Lark grammar begins at the rule `start: …`, a GBNF grammar at `root ::= …`",
        ));
    }
    let mut rules = 0;
    let mut at = 0;
    let mut line = 1;
    let mut depth: usize = 0;
    let mut set_operators = 0;
    // Whether the definition being read has a set operator.
    let mut is_set = false;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let place = || format!("line {line}");
        let len = match c {
            '\n' => {
                line += 1;
                1
            }
            '#' => line_len(rest),
            '/' if rest.starts_with("//") => line_len(rest),
            '"' => delimited(rest, '"').ok_or_else(|| Fault::at(place(), "a string does not end"))?,
            '/' => {
                let len = delimited(rest, '/').ok_or_else(|| Fault::at(place(), "a regex does not end"))?;
                regex::check(&rest[1..len - 1]).map_err(|f| Fault::at(place(), f.reason))?;
                len
            }
            '%' => {
                let word: &str =
                    rest[1..].split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or("");
                if !["import", "ignore"].contains(&word) {
                    let reason = format!("`%{word}` is not supported in a request's grammar");
                    return Err(Fault::at(place(), reason));
                }
                1 + word.len()
            }
            '@' => return Err(Fault::at(place(), "`@` names another grammar; a request has only one")),
            '<' => {
                return Err(Fault::at(place(), "`<…>` names a control token; a grammar describes text only"));
            }
            ':' => {
                rules += 1;
                is_set = false;
                if rules > MAX_RULES {
                    return Err(Fault::at(place(), format!("more than {MAX_RULES} rules")));
                }
                1
            }
            '0'..='9' => {
                let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
                let before = text[..at].trim_end().chars().next_back();
                let is_name =
                    text[..at].chars().next_back().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
                let count: u64 = rest[..digits].parse().unwrap_or(u64::MAX);
                if !is_name && matches!(before, Some('{' | ',' | '~' | '.')) && count > MAX_REPEAT {
                    let reason = format!("{count} repetitions; at most {MAX_REPEAT} are supported");
                    return Err(Fault::at(place(), reason));
                }
                digits
            }
            '(' | '[' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err(Fault::at(place(), format!("groups nest deeper than {MAX_DEPTH}")));
                }
                1
            }
            ')' | ']' => {
                depth = depth.saturating_sub(1);
                1
            }
            // Lark's own repetition, `x ~ 3`, is not the complement.
            '~' if rest[1..].trim_start().starts_with(|c: char| c.is_ascii_digit()) => 1,
            '&' | '~' => {
                set_operators += 1;
                if std::mem::replace(&mut is_set, true) || set_operators > MAX_SET_OPERATORS {
                    let reason = format!(
                        "one `&` or `~` in a terminal and {MAX_SET_OPERATORS} in a grammar are supported: write the rest as a regex"
                    );
                    return Err(Fault::at(place(), reason));
                }
                1
            }
            c => c.len_utf8(),
        };
        at += len;
    }
    Ok(())
}

fn line_len(text: &str) -> usize {
    text.find('\n').unwrap_or(text.len())
}

/// Bytes of a string or regex with both its delimiters; it ends on its line.
fn delimited(text: &str, end: char) -> Option<usize> {
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        match c {
            '\n' => return None,
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == end => return Some(i + 1),
            _ => {}
        }
    }
    None
}
