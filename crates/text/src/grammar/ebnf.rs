//! GBNF, EBNF as llama.cpp and xgrammar write it, turned into Lark.
//!
//! GBNF reads characters, Lark reads terminals. What does not recurse becomes one terminal, so that within it every way to
//! split the text counts, as in GBNF; terminals meet only at rules that recurse.

use std::collections::HashMap;
use std::fmt::Write;
use std::iter::Peekable;
use std::str::CharIndices;

use super::answer::quoted;
use super::error::Fault;
use super::lark::{MAX_BYTES, MAX_REPEAT};

/// Deepest group in group.
const MAX_DEPTH: usize = 20;
/// Most rules.
const MAX_RULES: usize = 500;
/// Largest terminal made of a grammar: rules that do not recurse are written out where they are used.
const MAX_TERMINAL_BYTES: usize = 256 << 10;
/// Most bytes written for a grammar, terminals that turn out to be there already included.
const MAX_WRITTEN_BYTES: usize = 1 << 20;

/// What a rule is made of.
#[derive(Clone, Debug, PartialEq)]
enum Node {
    Text(String),
    /// A character class as a regex.
    Class(String),
    Rule(usize),
    Sequence(Vec<Node>),
    Choice(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

#[derive(Default)]
struct Rule {
    name: String,
    body: Option<Node>,
    /// Line of its definition, or of its first use while it has none.
    line: usize,
}

/// Whether a grammar is GBNF rather than Lark.
pub(super) fn is_gbnf(text: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim_start();
        let name = line.len() - line.trim_start_matches(is_name_char).len();
        name > 0 && line[name..].trim_start().starts_with("::=")
    })
}

/// The same grammar in Lark.
pub(super) fn to_lark(text: &str) -> Result<String, Fault> {
    if text.len() > MAX_BYTES {
        let reason = format!("the grammar is larger than the {} KiB that are supported", MAX_BYTES >> 10);
        return Err(Fault::new(reason));
    }
    let mut rules = Parser::new(text).rules()?;
    let Some(root) = rules.iter().position(|rule| rule.name == "root") else {
        return Err(Fault::new("there is no rule `root ::= …`, at which a grammar begins"));
    };
    for rule in &rules {
        if rule.body.is_none() {
            return Err(at_line(rule.line, format!("there is no rule `{}`", rule.name)));
        }
    }
    for (i, rule) in rules.iter_mut().enumerate() {
        let body = rule.body.take().expect("checked above");
        rule.body = Some(without_tail_recursion(i, body));
    }
    check_ends(&rules)?;
    Writer::new(&rules).write(root)
}

fn at_line(line: usize, reason: impl Into<String>) -> Fault {
    Fault::at(format!("line {line}"), reason)
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

struct Parser<'t> {
    text: &'t str,
    chars: Peekable<CharIndices<'t>>,
    line: usize,
    rules: Vec<Rule>,
    by_name: HashMap<String, usize>,
}

impl<'t> Parser<'t> {
    fn new(text: &'t str) -> Self {
        Self {
            text,
            chars: text.char_indices().peekable(),
            line: 1,
            rules: Vec::new(),
            by_name: HashMap::new(),
        }
    }

    fn fault(&self, reason: impl Into<String>) -> Fault {
        at_line(self.line, reason)
    }

    fn peek(&mut self) -> Option<char> {
        self.chars.peek().map(|&(_, c)| c)
    }

    fn next(&mut self) -> Option<char> {
        let (_, c) = self.chars.next()?;
        self.line += usize::from(c == '\n');
        Some(c)
    }

    fn skip(&mut self, chars: usize) {
        for _ in 0..chars {
            self.next();
        }
    }

    fn rest(&mut self) -> &'t str {
        let at = self.chars.peek().map_or(self.text.len(), |&(at, _)| at);
        &self.text[at..]
    }

    /// Passes white space and comments, and line breaks where a rule may go on over them.
    fn space(&mut self, over_lines: bool) {
        while let Some(c) = self.peek() {
            match c {
                '#' => {
                    while self.peek().is_some_and(|c| c != '\n') {
                        self.next();
                    }
                }
                '\n' | '\r' if !over_lines => break,
                c if c.is_whitespace() => {
                    self.next();
                }
                _ => break,
            }
        }
    }

    fn rules(mut self) -> Result<Vec<Rule>, Fault> {
        self.space(true);
        while self.peek().is_some() {
            let name = self.name()?;
            let line = self.line;
            self.space(false);
            if !self.rest().starts_with("::=") {
                return Err(self.fault(format!("expected `::=` behind the rule's name `{name}`")));
            }
            self.skip(3);
            let rule = self.rule(name)?;
            self.space(true);
            let body = self.choice(0)?;
            if let Some(c) = self.peek().filter(|&c| !is_name_char(c) && c != '\n' && c != '\r') {
                return Err(self.fault(format!("did not expect {c:?}")));
            }
            let name = &self.rules[rule].name;
            if self.rules[rule].body.is_some() {
                return Err(at_line(line, format!("the rule `{name}` is defined twice")));
            }
            self.rules[rule].body = Some(body);
            self.rules[rule].line = line;
            self.space(true);
        }
        Ok(self.rules)
    }

    fn name(&mut self) -> Result<String, Fault> {
        let mut name = String::new();
        while let Some(c) = self.peek().filter(|&c| is_name_char(c)) {
            name.push(c);
            self.next();
        }
        if name.is_empty() {
            let found = self.peek().map_or("the end".into(), |c| format!("{c:?}"));
            return Err(self.fault(format!("expected the name of a rule, found {found}")));
        }
        Ok(name)
    }

    fn rule(&mut self, name: String) -> Result<usize, Fault> {
        if let Some(&rule) = self.by_name.get(&name) {
            return Ok(rule);
        }
        if self.rules.len() == MAX_RULES {
            return Err(self.fault(format!("more than {MAX_RULES} rules")));
        }
        let rule = self.rules.len();
        self.rules.push(Rule { name: name.clone(), body: None, line: self.line });
        self.by_name.insert(name, rule);
        Ok(rule)
    }

    /// `a b | c`
    fn choice(&mut self, depth: usize) -> Result<Node, Fault> {
        if depth > MAX_DEPTH {
            return Err(self.fault(format!("groups nest deeper than {MAX_DEPTH}")));
        }
        let mut options = vec![self.sequence(depth)?];
        loop {
            // An option may begin on the next line with its `|`.
            let mut ahead = self.chars.clone().map(|(_, c)| c).skip_while(|c| c.is_whitespace());
            if ahead.next() != Some('|') && self.peek() != Some('|') {
                self.space(depth > 0);
                if self.peek() != Some('|') {
                    break;
                }
            }
            self.space(true);
            self.next();
            self.space(true);
            options.push(self.sequence(depth)?);
        }
        Ok(if options.len() == 1 { options.remove(0) } else { Node::Choice(options) })
    }

    fn sequence(&mut self, depth: usize) -> Result<Node, Fault> {
        let mut parts = Vec::new();
        loop {
            self.space(depth > 0);
            let Some(c) = self.peek() else { break };
            let atom = match c {
                '"' => self.string()?,
                '[' => self.class()?,
                '(' => {
                    self.next();
                    let inner = self.choice(depth + 1)?;
                    self.space(true);
                    if self.next() != Some(')') {
                        return Err(self.fault("a group does not end: expected `)`"));
                    }
                    inner
                }
                '.' => {
                    self.next();
                    Node::Class("(?s:.)".into())
                }
                '<' => return Err(self.fault("`<…>` names a control token; a grammar describes text only")),
                c if is_name_char(c) => {
                    // The next rule's definition, not a part of this one.
                    let rest = self.rest().trim_start_matches(is_name_char);
                    if rest.trim_start_matches([' ', '\t']).starts_with("::=") {
                        break;
                    }
                    let name = self.name()?;
                    Node::Rule(self.rule(name)?)
                }
                _ => break,
            };
            parts.push(self.repeated(atom)?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Node::Sequence(parts) })
    }

    fn repeated(&mut self, mut atom: Node) -> Result<Node, Fault> {
        loop {
            let (min, max) = match self.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => {
                    let body: String =
                        self.chars.clone().map(|(_, c)| c).skip(1).take_while(|&c| c != '}').collect();
                    let (min, max) = body.split_once(',').unwrap_or((&body, &body));
                    let number = |digits: &str| digits.trim().parse::<u32>().ok();
                    let min_count = if min.trim().is_empty() { Some(0) } else { number(min) };
                    let max_count = if max.trim().is_empty() { Some(None) } else { number(max).map(Some) };
                    let (Some(min), Some(max)) = (min_count, max_count) else {
                        return Err(self
                            .fault(format!("{{{body}}} is no repetition: write {{m}}, {{m,}} or {{m,n}}")));
                    };
                    if u64::from(max.unwrap_or(min).max(min)) > MAX_REPEAT {
                        let reason = format!("{{{body}}}: at most {MAX_REPEAT} repetitions are supported");
                        return Err(self.fault(reason));
                    }
                    if max.is_some_and(|max| max < min) {
                        return Err(self.fault(format!("{{{body}}}: the most is less than the least")));
                    }
                    self.skip(body.chars().count() + 1);
                    (min, max)
                }
                _ => return Ok(atom),
            };
            self.next();
            atom = match max {
                Some(0) => Node::Sequence(Vec::new()),
                max => Node::Repeat(Box::new(atom), min, max),
            };
        }
    }

    fn string(&mut self) -> Result<Node, Fault> {
        self.next();
        let mut text = String::new();
        loop {
            match self.next() {
                Some('"') => return Ok(Node::Text(text)),
                Some('\\') => text.push(self.escape()?),
                Some('\n') | None => return Err(self.fault("a string does not end")),
                Some(c) => text.push(c),
            }
        }
    }

    fn class(&mut self) -> Result<Node, Fault> {
        self.next();
        let negated = self.peek() == Some('^');
        if negated {
            self.next();
        }
        let mut members = String::new();
        let mut empty = true;
        loop {
            let first = match self.next() {
                Some(']') => break,
                Some('\\') => self.escape()?,
                Some(c) if c != '\n' => c,
                _ => return Err(self.fault("a character class does not end")),
            };
            empty = false;
            member(&mut members, first);
            let is_range =
                self.peek() == Some('-') && self.rest()[1..].chars().next().is_some_and(|c| c != ']');
            if is_range {
                self.next();
                let last = match self.next() {
                    Some('\\') => self.escape()?,
                    Some(c) if c != '\n' => c,
                    _ => return Err(self.fault("a character class does not end")),
                };
                if last < first {
                    return Err(self.fault(format!("the range {first:?}-{last:?} runs backwards")));
                }
                members.push('-');
                member(&mut members, last);
            }
        }
        match (empty, negated) {
            (true, true) => Ok(Node::Class("(?s:.)".into())),
            (true, false) => Err(self.fault("a character class is empty")),
            (false, _) => Ok(Node::Class(format!("[{}{members}]", if negated { "^" } else { "" }))),
        }
    }

    /// The character behind a backslash.
    fn escape(&mut self) -> Result<char, Fault> {
        let c = self.next().ok_or_else(|| self.fault("a backslash ends the grammar"))?;
        let digits = match c {
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            c if c.is_ascii_punctuation() => return Ok(c),
            c => return Err(self.fault(format!("there is no escape \\{c}"))),
        };
        let hex: String = self.chars.clone().map(|(_, c)| c).take(digits).collect();
        self.skip(digits);
        let code = u32::from_str_radix(&hex, 16).ok().filter(|_| hex.len() == digits);
        code.and_then(char::from_u32).ok_or_else(|| self.fault(format!("\\{c}{hex} is no character")))
    }
}

/// A character in a regex class.
fn member(class: &mut String, c: char) {
    let _ = match c {
        c if c.is_ascii_alphanumeric() => write!(class, "{c}"),
        c => write!(class, "\\x{{{:X}}}", u32::from(c)),
    };
}

/// `ws ::= ([ \t] ws)?` is `ws ::= [ \t]*`: recursion at the end of a rule is a repetition.
fn without_tail_recursion(rule: usize, body: Node) -> Node {
    let mut options = Vec::new();
    match &body {
        Node::Choice(list) => options.extend(list.iter().cloned()),
        Node::Repeat(inner, 0, Some(1)) => {
            options.push((**inner).clone());
            options.push(Node::Sequence(Vec::new()));
        }
        other => options.push(other.clone()),
    }
    // One level of optional groups inside: `( a ws | b )?`.
    let mut flat = Vec::new();
    for option in options {
        match option {
            Node::Choice(list) => flat.extend(list),
            other => flat.push(other),
        }
    }
    let (mut again, mut last) = (Vec::new(), Vec::new());
    for option in flat {
        match option {
            Node::Sequence(mut parts) if parts.last() == Some(&Node::Rule(rule)) => {
                parts.pop();
                again.push(Node::Sequence(parts));
            }
            other => last.push(other),
        }
    }
    let nullable = again.iter().any(|node| node == &Node::Sequence(Vec::new()));
    if again.is_empty()
        || last.is_empty()
        || nullable
        || again.iter().chain(&last).any(|node| uses(node, rule))
    {
        return body;
    }
    Node::Sequence(vec![Node::Repeat(Box::new(Node::Choice(again)), 0, None), Node::Choice(last)])
}

fn uses(node: &Node, rule: usize) -> bool {
    match node {
        Node::Text(_) | Node::Class(_) => false,
        Node::Rule(other) => *other == rule,
        Node::Sequence(list) | Node::Choice(list) => list.iter().any(|n| uses(n, rule)),
        Node::Repeat(inner, ..) => uses(inner, rule),
    }
}

/// Every rule must be able to end.
fn check_ends(rules: &[Rule]) -> Result<(), Fault> {
    fn node_ends(node: &Node, ends: &[bool]) -> bool {
        match node {
            Node::Text(_) | Node::Class(_) => true,
            Node::Rule(rule) => ends[*rule],
            Node::Sequence(list) => list.iter().all(|n| node_ends(n, ends)),
            Node::Choice(list) => list.iter().any(|n| node_ends(n, ends)),
            Node::Repeat(inner, min, _) => *min == 0 || node_ends(inner, ends),
        }
    }
    let mut ends = vec![false; rules.len()];
    loop {
        let before = ends.clone();
        for (i, rule) in rules.iter().enumerate() {
            ends[i] = ends[i] || node_ends(rule.body.as_ref().expect("every rule is defined"), &before);
        }
        if ends == before {
            break;
        }
    }
    match ends.iter().position(|ended| !ended) {
        Some(i) => {
            Err(at_line(rules[i].line, format!("the rule `{}` needs itself without end", rules[i].name)))
        }
        None => Ok(()),
    }
}

/// Writes Lark.
struct Writer<'r> {
    rules: &'r [Rule],
    /// Rules that do not recurse, and use none that does.
    regular: Vec<bool>,
    /// Whether a rule can be empty.
    nullable: Vec<bool>,
    out: String,
    terminals: HashMap<String, usize>,
    /// Bytes written in all.
    written: usize,
}

impl<'r> Writer<'r> {
    fn new(rules: &'r [Rule]) -> Self {
        let body = |i: usize| rules[i].body.as_ref().expect("every rule is defined");
        // A rule is regular once everything it uses is: a cycle never gets there.
        let mut regular = vec![false; rules.len()];
        let mut nullable = vec![false; rules.len()];
        for _ in 0..=rules.len() {
            for i in 0..rules.len() {
                regular[i] = regular[i] || is_regular(body(i), &regular);
                nullable[i] = nullable[i] || is_nullable(body(i), &nullable);
            }
        }
        Self { rules, regular, nullable, out: String::new(), terminals: HashMap::new(), written: 0 }
    }

    fn write(mut self, root: usize) -> Result<String, Fault> {
        let _ = writeln!(self.out, "start: r{root}");
        for i in 0..self.rules.len() {
            if self.regular[i] && i != root {
                continue;
            }
            let body = self.rules[i].body.as_ref().expect("every rule is defined");
            let line = self.rules[i].line;
            let text = self.node(body).map_err(|fault| at_line(line, fault.reason))?;
            self.count(text.len()).map_err(|fault| at_line(line, fault.reason))?;
            let _ = writeln!(self.out, "r{i}: {text}");
        }
        Ok(self.out)
    }

    fn count(&mut self, bytes: usize) -> Result<(), Fault> {
        self.written += bytes;
        if self.written > MAX_WRITTEN_BYTES {
            return Err(Fault::new("the grammar is too large when written out"));
        }
        Ok(())
    }

    /// A node of a rule that recurses.
    fn node(&mut self, node: &Node) -> Result<String, Fault> {
        if is_regular(node, &self.regular) {
            return self.terminal(node);
        }
        Ok(match node {
            Node::Rule(rule) => format!("r{rule}"),
            Node::Repeat(inner, min, max) => format!("({}){}", self.node(inner)?, times(*min, *max)),
            Node::Choice(list) => {
                let options: Result<Vec<String>, Fault> = list.iter().map(|n| self.node(n)).collect();
                format!("({})", options?.join(" | "))
            }
            Node::Sequence(list) => {
                // Neighbours that do not recurse are one terminal.
                let mut text = String::new();
                let is_one =
                    |a: &Node, b: &Node| is_regular(a, &self.regular) && is_regular(b, &self.regular);
                let runs: Vec<&[Node]> = list.chunk_by(is_one).collect();
                for run in runs {
                    let part = match run {
                        [one] => self.node(one)?,
                        several => self.terminal(&Node::Sequence(several.to_vec()))?,
                    };
                    text.push_str(&part);
                    text.push(' ');
                }
                text
            }
            Node::Text(_) | Node::Class(_) => unreachable!("characters are regular"),
        })
    }

    /// A terminal, defined once; one that can be empty is made optional instead.
    fn terminal(&mut self, node: &Node) -> Result<String, Fault> {
        let mut body = String::new();
        self.regular_text(node, &mut body)?;
        self.count(body.len())?;
        if body.is_empty() || body == "\"\"" {
            return Ok("\"\"".into());
        }
        let nullable = is_nullable(node, &self.nullable);
        let next = self.terminals.len();
        let id = *self.terminals.entry(body.clone()).or_insert(next);
        if id == next {
            let rest = if nullable { " & /(?s:.+)/" } else { "" };
            let _ = writeln!(self.out, "T{id}: ({body}){rest}");
        }
        Ok(if nullable { format!("T{id}?") } else { format!("T{id}") })
    }

    fn regular_text(&self, node: &Node, out: &mut String) -> Result<(), Fault> {
        if out.len() > MAX_TERMINAL_BYTES {
            return Err(Fault::new("the grammar is too large when written out"));
        }
        match node {
            Node::Text(text) => out.push_str(&quoted(text)),
            Node::Class(class) => {
                let _ = write!(out, "/{class}/");
            }
            Node::Rule(rule) => {
                out.push('(');
                self.regular_text(self.rules[*rule].body.as_ref().expect("every rule is defined"), out)?;
                out.push(')');
            }
            Node::Sequence(list) if list.is_empty() => out.push_str("\"\""),
            Node::Sequence(list) => {
                for part in list {
                    self.regular_text(part, out)?;
                    out.push(' ');
                }
            }
            Node::Choice(list) => {
                out.push('(');
                for (i, option) in list.iter().enumerate() {
                    out.push_str(if i > 0 { " | " } else { "" });
                    self.regular_text(option, out)?;
                }
                out.push(')');
            }
            Node::Repeat(inner, min, max) => {
                out.push('(');
                self.regular_text(inner, out)?;
                let _ = write!(out, "){}", times(*min, *max));
            }
        }
        Ok(())
    }
}

fn times(min: u32, max: Option<u32>) -> String {
    match (min, max) {
        (0, None) => "*".into(),
        (1, None) => "+".into(),
        (0, Some(1)) => "?".into(),
        (min, None) => format!("{{{min},}}"),
        (min, Some(max)) => format!("{{{min},{max}}}"),
    }
}

fn is_regular(node: &Node, regular: &[bool]) -> bool {
    match node {
        Node::Text(_) | Node::Class(_) => true,
        Node::Rule(rule) => regular[*rule],
        Node::Sequence(list) | Node::Choice(list) => list.iter().all(|n| is_regular(n, regular)),
        Node::Repeat(inner, ..) => is_regular(inner, regular),
    }
}

fn is_nullable(node: &Node, nullable: &[bool]) -> bool {
    match node {
        Node::Text(text) => text.is_empty(),
        Node::Class(_) => false,
        Node::Rule(rule) => nullable[*rule],
        Node::Sequence(list) => list.iter().all(|n| is_nullable(n, nullable)),
        Node::Choice(list) => list.iter().any(|n| is_nullable(n, nullable)),
        Node::Repeat(inner, min, _) => *min == 0 || is_nullable(inner, nullable),
    }
}
