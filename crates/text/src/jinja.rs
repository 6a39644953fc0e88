//! What chat templates expect of Python's jinja2 beyond minijinja: transformers' settings and functions, and methods of
//! Python's strings. Knows nothing of messages.
//!
//! Known differences from jinja2: iterating over `none` yields nothing where Python raises; `'…' % values` is an error; a
//! number beyond 64 bits is a float; `dict.items` without parentheses is the key `items`, not the method.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, StringInput, Tuple, Value, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, filters};
use minijinja_contrib::pycompat;

use crate::control::{ControlTokens, unguard};
use crate::python::{JsonStyle, to_json, to_python_str};
use crate::strftime::strftime;

/// Instructions that rendering `num_messages` may take. V3.2's template looks through all messages for every tool output,
/// some 10 instructions each time, charges included 15; a core runs about 10 million a second, which the cap turns into a time limit.
pub(crate) fn fuel(num_messages: usize) -> u64 {
    let per_pair = (num_messages as u64).saturating_pow(2).saturating_mul(60);
    per_pair.saturating_add(2_000_000).min(100_000_000)
}

/// `raise_exception`'s text, carried through the engine unchanged.
#[derive(Debug)]
pub(crate) struct Raised(pub(crate) String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// transformers' settings of jinja2's syntax.
pub(crate) fn syntax() -> SyntaxConfig {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().expect("default delimiters")
}

/// An environment set up as transformers sets up jinja2. There is no loader, so a template reaches nothing outside its
/// variables; [`fuel`] bounds its steps, [`meter`](crate::meter) what they make. Printing is the meter's.
pub(crate) fn environment(control: ControlTokens) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_syntax(syntax());
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(python_method);
    env.add_filter("tojson", |value: &Value, extra: Rest<Value>, options: Kwargs| {
        if extra.is_empty() {
            return to_json(value, &JsonStyle::from_options(&options)?);
        }
        Err(Error::new(ErrorKind::TooManyArguments, "tojson takes keyword arguments only"))
    });
    env.add_filter("trim", |s: &str, chars: Option<&str>| strip(s, chars, true, true).to_owned());
    for name in ["length", "count"] {
        env.add_filter(name, |value: &Value| match value.len() {
            Some(len) => Ok(len),
            None if value.is_undefined() => Ok(0),
            None => Err(Error::new(ErrorKind::InvalidOperation, format!("{} has no length", value.kind()))),
        });
    }
    env.add_filter("string", |value: &Value| to_python_str(value));
    add_bounded_filters(&mut env);
    env.add_filter("from_json", move |text: &str| from_json(&control, text));
    env.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        let message = to_python_str(message)?;
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    env.add_function("strftime_now", |format: &str| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        strftime(format, now).map_err(|e| Error::new(ErrorKind::InvalidOperation, e))
    });
    env
}

/// What a template may ask for by number where the engine gives whatever it is asked for: spaces, slots, digits.
const MAX_COUNT: usize = 10_000;

fn check_count(what: &str, count: usize) -> Result<(), Error> {
    if count <= MAX_COUNT {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidOperation, format!("{what} {count} is more than {MAX_COUNT}")))
}

/// The engine's filters that take a count, with [`MAX_COUNT`]: one instruction's worth of fuel must not buy more memory
/// than there is.
fn add_bounded_filters(env: &mut Environment<'static>) {
    env.add_filter(
        "indent",
        |text: StringInput<'_>,
         width: Option<usize>,
         first: Option<bool>,
         blank: Option<bool>,
         options: Kwargs| {
            let count = width.or(options.get("width")?).unwrap_or(4);
            check_count("indent", count)?;
            check_bytes(text.as_str().matches('\n').count().saturating_mul(count))?;
            filters::indent(text, width, first, blank, options)
        },
    );
    env.add_filter("slice", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        check_count("slice", count)?;
        filters::slice(state, value, count, fill)
    });
    env.add_filter("batch", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        check_count("batch", count)?;
        filters::batch(state, value, count, fill)
    });
    env.add_filter("format", |state: &mut State, format: &Value, args: Rest<ValueOrKwargs>| {
        let values = args.iter().map(|arg| Value::clone(arg));
        check_format(format.as_str().unwrap_or_default(), '%', values)?;
        filters::format(state, format, args)
    });
    env.add_filter(
        "replace",
        |state: &mut State, text: StringInput<'_>, from: StringInput<'_>, to: StringInput<'_>| {
            check_replace(text.as_str(), from.as_str(), to.as_str())?;
            filters::replace(state, text, from, to)
        },
    );
    env.add_filter(
        "join",
        |state: &mut State,
         list: &Value,
         joiner: Option<StringInput<'_>>,
         attribute: Option<&str>,
         options: Kwargs| {
            let given = options.get::<Option<&str>>("d")?.unwrap_or_default();
            check_join(list, joiner.as_ref().map_or(given, StringInput::as_str))?;
            filters::join(state, list, joiner, attribute, options)
        },
    );
    // Writes a value down however deep and often it holds itself.
    env.remove_filter("pprint");
}

/// Most bytes that one filter or method may make where its output is a product of its inputs.
const MAX_MADE_BYTES: usize = 32 << 20;

fn check_bytes(bytes: usize) -> Result<(), Error> {
    if bytes <= MAX_MADE_BYTES {
        return Ok(());
    }
    let what = format!("one filter or method would make more than {MAX_MADE_BYTES} bytes");
    Err(Error::new(ErrorKind::InvalidOperation, what))
}

fn check_replace(text: &str, from: &str, to: &str) -> Result<(), Error> {
    // Most replacements shorten, or there are few: only then does it pay to count.
    let most = text.len() + 1;
    if most.saturating_mul(to.len()) <= MAX_MADE_BYTES {
        return Ok(());
    }
    check_bytes(text.matches(from).count().saturating_mul(to.len()))
}

fn check_join(list: &Value, joiner: &str) -> Result<(), Error> {
    check_bytes(list.len().unwrap_or(0).saturating_mul(joiner.len()))
}

/// Widths and precisions of `'…'|format` and `'…'.format`, which stand behind `open`: no more than [`MAX_COUNT`], and none
/// from an argument; and that not too much comes of writing every argument at every place.
fn check_format(format: &str, open: char, args: impl Iterator<Item = Value>) -> Result<(), Error> {
    let arg_bytes: usize = args.map(|arg| text_bytes(&arg)).fold(0, usize::saturating_add);
    check_bytes(format.matches(open).count().saturating_mul(arg_bytes))?;
    for spec in format.split(open).skip(1) {
        let in_spec = |c: char| open == '{' && c != '}' || c.is_ascii_digit() || "#-+ .*".contains(c);
        let spec = spec.split(|c| !in_spec(c)).next().unwrap_or_default();
        if open == '%' && spec.contains('*') {
            return Err(Error::new(ErrorKind::InvalidOperation, "a width from an argument is not supported"));
        }
        for digits in spec.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty()) {
            check_count("the width", digits.parse().unwrap_or(usize::MAX))?;
        }
    }
    Ok(())
}

/// About as many bytes as a value takes written down.
fn text_bytes(value: &Value) -> usize {
    match to_python_str(value) {
        Ok(text) => text.len(),
        Err(_) => usize::MAX,
    }
}

/// Python's `str.isspace` for one character.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip<'s>(s: &'s str, chars: Option<&str>, left: bool, right: bool) -> &'s str {
    let drop = |c: char| chars.map_or_else(|| is_space(c), |set| set.contains(c));
    let s = if left { s.trim_start_matches(drop) } else { s };
    if right { s.trim_end_matches(drop) } else { s }
}

/// Methods of Python's types. What is not here is left to minijinja's own set.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(s) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, method, args);
    };
    match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Ok(Value::from(strip(s, chars, method != "rstrip", method != "lstrip")))
        }
        "format" => {
            check_format(s, '{', args.iter().cloned())?;
            pycompat::unknown_method_callback(state, value, method, args)
        }
        "replace" => {
            if let [from, to, ..] = args {
                check_replace(s, from.as_str().unwrap_or_default(), to.as_str().unwrap_or_default())?;
            }
            pycompat::unknown_method_callback(state, value, method, args)
        }
        "join" => {
            args.first().map_or(Ok(()), |list| check_join(list, s))?;
            pycompat::unknown_method_callback(state, value, method, args)
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(s.strip_prefix(prefix).unwrap_or(s)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(s.strip_suffix(suffix).unwrap_or(s)))
        }
        "rsplit" => {
            let (separator, limit): (&str, Option<i64>) = from_args(args)?;
            let mut parts: Vec<&str> = match limit.and_then(|n| usize::try_from(n).ok()) {
                Some(n) => s.rsplitn(n + 1, separator).collect(),
                None => s.rsplit(separator).collect(),
            };
            parts.reverse();
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, separator, after) = match method {
                "partition" => s.split_once(separator).map_or((s, "", ""), |(a, b)| (a, separator, b)),
                _ => s.rsplit_once(separator).map_or(("", "", s), |(a, b)| (a, separator, b)),
            };
            Ok(Value::from(Tuple::from([before, separator, after].map(Value::from))))
        }
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// `json.loads`, for templates that take a call's arguments apart. An escape in the JSON can spell a control token, so
/// what comes out is guarded anew.
fn from_json(control: &ControlTokens, text: &str) -> Result<Value, Error> {
    let parsed: serde_json::Value = serde_json::from_str(&unguard(text))
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("from_json: {e}")))?;
    Ok(Value::from(Serde(control.guard_json(&parsed))))
}
