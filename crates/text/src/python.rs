//! Python's spelling of values: `str`, `repr` and `json.dumps`. Knows nothing of templates.

use std::fmt::{self, Write};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

use crate::control::ControlTokens;

/// Values nested deeper are refused: whoever writes one down, level by level, needs a stack that deep. JSON that is read
/// is never deeper than 128; a template could nest its own lists without end.
const MAX_DEPTH: usize = 256;

/// Most values and bytes in the text of one value: a list that holds itself twice over, 40 times, is small in memory and
/// endless on paper.
const MAX_VALUES: usize = 1_000_000;
const MAX_TEXT_BYTES: usize = 64 << 20;

/// Widest indent: the number is the template's, the spaces are ours.
const MAX_INDENT: usize = 1000;

/// Writes to a string, which cannot fail.
pub(crate) fn push(out: &mut String, text: fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a String takes all text");
}

/// An invalid value holds the error that made it so.
pub(crate) fn check(value: &Value) -> Result<(), Error> {
    if value.kind() == ValueKind::Invalid {
        return Err(Error::new(ErrorKind::InvalidOperation, value.to_string()));
    }
    Ok(())
}

/// How much of a value's text is still to be had.
struct Room {
    values: usize,
}

impl Room {
    fn new() -> Self {
        Self { values: MAX_VALUES }
    }

    /// Takes room for one value, `depth` levels down, behind `out`.
    fn take(&mut self, out: &str, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            let what = format!("a value is nested deeper than {MAX_DEPTH}");
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
        if self.values == 0 || out.len() > MAX_TEXT_BYTES {
            let what = format!("a value has more than {MAX_VALUES} parts or {MAX_TEXT_BYTES} bytes of text");
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
        self.values -= 1;
        Ok(())
    }
}

/// `str(value)`; undefined prints as nothing.
pub(crate) fn to_python_str(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::String => out.push_str(value.as_str().unwrap_or_default()),
        _ => write_repr(&mut out, value, &mut Room::new(), 0)?,
    }
    Ok(out)
}

/// `repr(value)`.
fn write_repr(out: &mut String, value: &Value, room: &mut Room, depth: usize) -> Result<(), Error> {
    room.take(out, depth)?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::String => write_str_repr(out, value.as_str().unwrap_or_default()),
        ValueKind::Number if !value.is_integer() => out.push_str(&float_repr(value, "nan", "inf")),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter().into_iter().flatten().collect();
            let (open, close) = match (value.is_tuple(), items.len()) {
                (false, _) => ("[", "]"),
                (true, 1) => ("(", ",)"),
                (true, _) => ("(", ")"),
            };
            out.push_str(open);
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(out, item, room, depth + 1)?;
            }
            out.push_str(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(out, &key, room, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key).unwrap_or_default(), room, depth + 1)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

fn write_str_repr(out: &mut String, s: &str) {
    let quote = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in s.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            '\0'..='\x1f' | '\x7f'..='\u{a0}' | '\u{ad}' => push(out, format_args!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// Python's shortest spelling of a float, with an exponent below 1e-4 and from 1e16 on.
fn float_repr(value: &Value, nan: &str, infinity: &str) -> String {
    let x = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    if x.is_nan() {
        return nan.to_owned();
    }
    if x.is_infinite() {
        return format!("{}{infinity}", if x < 0.0 { "-" } else { "" });
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').expect("{:e} writes an exponent");
    let exponent: i32 = exponent.parse().expect("{:e} writes an integer exponent");
    if (-4..16).contains(&exponent) {
        return format!("{x:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// How `json.dumps` was asked to write.
pub(crate) struct JsonStyle {
    ensure_ascii: bool,
    /// What one level is indented by; `None` keeps everything on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

impl JsonStyle {
    /// Keyword arguments of transformers' `tojson`.
    pub(crate) fn from_options(options: &Kwargs) -> Result<Self, Error> {
        let given = |name| Ok::<_, Error>(options.get::<Option<Value>>(name)?.filter(|v| !v.is_none()));
        let indent = match given("indent")? {
            Some(width) => match (width.as_usize(), width.as_str()) {
                (Some(n), _) if n > MAX_INDENT => {
                    let what = format!("indent {n} is more than {MAX_INDENT}");
                    return Err(Error::new(ErrorKind::InvalidOperation, what));
                }
                (Some(n), _) => Some(" ".repeat(n)),
                (None, Some(text)) => Some(text.to_owned()),
                _ => return Err(Error::new(ErrorKind::InvalidOperation, "indent is a number or a string")),
            },
            None => None,
        };
        let item = if indent.is_some() { "," } else { ", " };
        let (item_separator, key_separator) = match given("separators")? {
            Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
            None => (item.to_owned(), ": ".to_owned()),
        };
        let flag = |name| Ok::<_, Error>(options.get::<Option<bool>>(name)?.unwrap_or(false));
        let style = Self {
            ensure_ascii: flag("ensure_ascii")?,
            sort_keys: flag("sort_keys")?,
            indent,
            item_separator,
            key_separator,
        };
        options.assert_all_used()?;
        Ok(style)
    }
}

impl Default for JsonStyle {
    /// `json.dumps(value, ensure_ascii=False)`.
    fn default() -> Self {
        let [item_separator, key_separator] = [", ", ": "].map(str::to_owned);
        Self { ensure_ascii: false, indent: None, item_separator, key_separator, sort_keys: false }
    }
}

/// `json.dumps(value)`.
pub(crate) fn to_json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    write_json(&mut out, value, style, &mut Room::new(), 0)?;
    Ok(out)
}

fn write_json(
    out: &mut String,
    value: &Value,
    style: &JsonStyle,
    room: &mut Room,
    depth: usize,
) -> Result<(), Error> {
    room.take(out, depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
        ValueKind::Number => out.push_str(&float_repr(value, "NaN", "Infinity")),
        ValueKind::String => write_json_str(out, value.as_str().unwrap_or_default(), style),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_json_items(out, "[]", items.len(), style, depth, |out, i| {
                write_json(out, &items[i], style, room, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            write_json_items(out, "{}", keys.len(), style, depth, |out, i| {
                write_json_key(out, &keys[i], style, room, depth + 1)?;
                out.push_str(&style.key_separator);
                write_json(out, &value.get_item(&keys[i])?, style, room, depth + 1)
            })?;
        }
        kind => {
            check(value)?;
            let what = format!("an object of type {kind} is not JSON serializable");
            return Err(Error::new(ErrorKind::BadSerialization, what));
        }
    }
    Ok(())
}

fn write_json_items(
    out: &mut String,
    brackets: &str,
    len: usize,
    style: &JsonStyle,
    depth: usize,
    mut write: impl FnMut(&mut String, usize) -> Result<(), Error>,
) -> Result<(), Error> {
    let (open, close) = brackets.split_at(1);
    out.push_str(open);
    let new_line = |out: &mut String, depth| {
        if let Some(indent) = style.indent.as_deref().filter(|_| len > 0) {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    for i in 0..len {
        out.push_str(if i > 0 { &style.item_separator } else { "" });
        new_line(out, depth + 1);
        write(out, i)?;
    }
    new_line(out, depth);
    out.push_str(close);
    Ok(())
}

fn write_json_key(
    out: &mut String,
    key: &Value,
    style: &JsonStyle,
    room: &mut Room,
    depth: usize,
) -> Result<(), Error> {
    if key.kind() == ValueKind::String {
        return write_json(out, key, style, room, depth);
    }
    let mut text = String::new();
    write_json(&mut text, key, style, room, depth)?;
    push(out, format_args!("\"{text}\""));
    Ok(())
}

fn write_json_str(out: &mut String, s: &str, style: &JsonStyle) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            '\0'..='\x1f' => push(out, format_args!("\\u{:04x}", c as u32)),
            // The guard must outlive the escape: it is what keeps `<think>`, ASCII itself, from being a token.
            c if style.ensure_ascii && c > '~' && !ControlTokens::is_guard(c) => {
                let mut units = [0; 2];
                out.extend(c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
