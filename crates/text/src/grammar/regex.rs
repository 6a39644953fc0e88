//! How large a regular expression is, before anything is built of it. Knows its shape only; whether it is a valid one is
//! for the compiler to say.

use super::error::Fault;

/// Longest expression, in bytes.
const MAX_BYTES: usize = 16 << 10;
/// Most characters, classes and groups after counted repetitions are written out.
const MAX_EXPANDED: u64 = 20_000;
/// Most that counted repetitions inside one another may multiply to.
const MAX_REPEATS: u64 = 2_000;
/// Deepest group in group.
const MAX_DEPTH: usize = 60;

/// What has been read of one group.
#[derive(Clone, Copy, Default)]
struct Level {
    /// Size of everything before the last atom.
    size: u64,
    /// Size of the last atom, which a quantifier would multiply.
    last: u64,
    /// The largest product of repetitions in the last atom.
    last_repeats: u64,
    /// The same of everything before it.
    repeats: u64,
}

impl Level {
    fn push(&mut self, size: u64, repeats: u64) {
        self.size = self.size.saturating_add(self.last);
        self.repeats = self.repeats.max(self.last_repeats);
        self.last = size;
        self.last_repeats = repeats;
    }

    fn total(self) -> (u64, u64) {
        (self.size.saturating_add(self.last), self.repeats.max(self.last_repeats).max(1))
    }
}

/// Refuses an expression that would be too large.
pub(super) fn check(regex: &str) -> Result<(), Fault> {
    measure(regex).map(|_| ())
}

/// Characters, classes and groups of an expression with its repetitions written out; of one that is refused, the most.
pub(super) fn size(regex: &str) -> u64 {
    measure(regex).unwrap_or(MAX_EXPANDED)
}

fn measure(regex: &str) -> Result<u64, Fault> {
    if regex.len() > MAX_BYTES {
        return Err(Fault::new(format!(
            "the regex has {} bytes; at most {MAX_BYTES} are supported",
            regex.len()
        )));
    }
    if regex.contains("?P<stop>") || regex.contains("?<stop>") {
        return Err(Fault::new("a group cannot be named `stop`; choose another name"));
    }
    let chars: Vec<char> = regex.chars().collect();
    let mut levels = vec![Level::default()];
    let mut at = 0;
    while at < chars.len() {
        let depth = levels.len();
        let level = levels.last_mut().expect("the outermost level stays");
        let place = || format!("character {}", at + 1);
        match chars[at] {
            '\\' => {
                level.push(1, 1);
                at += escape_len(&chars[at..]);
                continue;
            }
            '[' => {
                level.push(1, 1);
                at += class_len(&chars[at..]);
                continue;
            }
            '(' => {
                if depth > MAX_DEPTH {
                    return Err(Fault::at(place(), format!("groups nest deeper than {MAX_DEPTH}")));
                }
                levels.push(Level::default());
            }
            ')' if depth > 1 => {
                let (size, repeats) = levels.pop().expect("just counted").total();
                levels.last_mut().expect("just counted").push(size.saturating_add(1), repeats);
            }
            '{' => {
                if let Some((times, len)) = counted(&chars[at..]) {
                    level.last = level.last.max(1).saturating_mul(times.max(1));
                    level.last_repeats = level.last_repeats.max(1).saturating_mul(times.max(1));
                    if level.last_repeats > MAX_REPEATS {
                        return Err(Fault::at(
                            place(),
                            format!(
                                "repetitions multiply to {}; at most {MAX_REPEATS} are supported",
                                level.last_repeats
                            ),
                        ));
                    }
                    at += len;
                    continue;
                }
                level.push(1, 1);
            }
            '*' | '+' | '?' | '|' => {}
            _ => level.push(1, 1),
        }
        let size = levels.iter().map(|l| l.total().0).fold(0, u64::saturating_add);
        if size > MAX_EXPANDED {
            return Err(Fault::at(
                format!("character {}", at + 1),
                format!(
                    "with its repetitions written out the regex is larger than {MAX_EXPANDED} characters"
                ),
            ));
        }
        at += 1;
    }
    let size = levels.iter().map(|l| l.total().0).fold(0, u64::saturating_add);
    if size > MAX_EXPANDED {
        let reason =
            format!("with its repetitions written out the regex is larger than {MAX_EXPANDED} characters");
        return Err(Fault::new(reason));
    }
    Ok(size)
}

/// Characters of the escape that begins here: `\n`, `\p{Greek}`, `\x{1F600}`.
fn escape_len(chars: &[char]) -> usize {
    let braced =
        matches!(chars.get(1), Some('p' | 'P' | 'x' | 'u' | 'U' | 'b')) && chars.get(2) == Some(&'{');
    if !braced {
        return 2;
    }
    chars.iter().position(|&c| c == '}').map_or(chars.len(), |end| end + 1)
}

/// Characters of the class that begins here.
fn class_len(chars: &[char]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 1,
            '[' => {
                depth += 1;
                // A `]` right behind the opening is a member.
                let body = at + 1 + usize::from(chars.get(at + 1) == Some(&'^'));
                if chars.get(body) == Some(&']') {
                    at = body;
                }
            }
            ']' => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            _ => {}
        }
        at += 1;
    }
    chars.len()
}

/// `{m}`, `{m,}` or `{m,n}`: the larger count, and the characters it takes.
fn counted(chars: &[char]) -> Option<(u64, usize)> {
    let end = chars.iter().take(48).position(|&c| c == '}')?;
    let body: String = chars[1..end].iter().filter(|c| !c.is_whitespace()).collect();
    let (min, max) = body.split_once(',').unwrap_or((&body, &body));
    let number = |digits: &str| {
        let valid = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        valid.then(|| digits.parse().unwrap_or(u64::MAX))
    };
    let min = if min.is_empty() { 0 } else { number(min)? };
    let max = if max.is_empty() { min } else { number(max)? };
    Some((min.max(max), end + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_expressions_pass() {
        for regex in [
            "",
            r"\d{3}-\d{4}",
            r"[\w.]{1,64}@[a-z]{1,63}\.[a-z]{2,6}",
            "((((a*)*)*)*)*",
            r"\p{Greek}{1,100}",
            r"[^]\]]{5}",
            "{not a count}",
            "(a{1,30}){1,60}",
            ")a(",
        ] {
            assert_eq!(check(regex), Ok(()), "{regex}");
        }
    }

    #[test]
    fn bombs_are_refused_where_they_are() {
        for (regex, place) in [
            ("(a{1,1000}){1,1000}", Some("character 12")),
            ("(a|b|ab){50}{50}", Some("character 13")),
            ("x{99999999999999999999}", Some("character 2")),
            ("((a{30}b{2}){30}){30}", Some("character 18")),
            ("(abcdefghijklmnopqrstuvw){1000}", None),
        ] {
            let fault = check(regex).expect_err(regex);
            assert_eq!(fault.place.as_deref(), place, "{regex}: {}", fault.reason);
        }
        assert!(check(&"(".repeat(100)).is_err());
        assert!(check(&"a".repeat(20_000)).is_err());
    }
}
