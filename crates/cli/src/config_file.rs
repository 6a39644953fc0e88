//! `--config FILE`: flags from a YAML or TOML file, as if they stood on the command line, which wins over them. Must not know
//! what a flag means.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

/// What a key of the file says.
#[derive(Clone, Debug, PartialEq)]
enum Setting {
    Switch(bool),
    /// As it is written, so that a key of digits stays what it is.
    Text(String),
    List(Vec<String>),
}

/// The file's flags as arguments of `definition`, without those that `given` has already.
pub(crate) fn arguments(path: &Path, definition: &Command, given: &ArgMatches) -> Result<Vec<OsString>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let settings = match path.extension().and_then(|extension| extension.to_str()) {
        Some("yaml" | "yml") => yaml(&text),
        Some("toml") => toml(&text),
        _ => bail!("--config {}: its name must end in .yaml, .yml or .toml", path.display()),
    };
    let mut arguments = Vec::new();
    for (key, setting) in settings.with_context(|| path.display().to_string())? {
        let more = argument(definition, given, &key, setting);
        arguments.extend(more.with_context(|| format!("{}: {key}", path.display()))?);
    }
    Ok(arguments.into_iter().map(OsString::from).collect())
}

/// One key of the file as arguments; none where the command line has decided.
fn argument(definition: &Command, given: &ArgMatches, key: &str, setting: Setting) -> Result<Vec<String>> {
    let name = key.trim_start_matches('-').replace('_', "-");
    let Some(arg) = find(definition, &name) else {
        bail!("there is no flag --{name}{}", suggestion(definition, &name));
    };
    if matches!(arg.get_action(), ArgAction::Help | ArgAction::HelpShort | ArgAction::Version)
        || arg.get_id() == "config"
    {
        bail!("--{name} can only stand on the command line");
    }
    if is_decided(definition, given, arg) {
        return Ok(Vec::new());
    }
    let repeatable = matches!(arg.get_action(), ArgAction::Append);
    match (arg.get_action(), setting) {
        (ArgAction::SetTrue, Setting::Switch(true)) => Ok(vec![format!("--{name}")]),
        (ArgAction::SetTrue, Setting::Switch(false)) => {
            // What is on by default has a flag that turns it off.
            let off = format!("no-{name}");
            let Some(no) = find(definition, &off) else { return Ok(Vec::new()) };
            Ok(if is_decided(definition, given, no) { Vec::new() } else { vec![format!("--{off}")] })
        }
        (ArgAction::SetTrue, _) => bail!("it is a switch; its value must be true or false"),
        // The flag itself says what it takes instead.
        (_, Setting::Switch(value)) => Ok(vec![format!("--{name}={value}")]),
        (_, Setting::Text(value)) => Ok(vec![format!("--{name}={value}")]),
        (_, Setting::List(values)) if repeatable => {
            Ok(values.iter().map(|value| format!("--{name}={value}")).collect())
        }
        (_, Setting::List(_)) => bail!("it takes one value, not a list"),
    }
}

fn find<'c>(definition: &'c Command, name: &str) -> Option<&'c Arg> {
    definition.get_arguments().find(|arg| {
        let aliases = arg.get_all_aliases().unwrap_or_default();
        arg.get_long() == Some(name) || aliases.contains(&name)
    })
}

/// Whether the command line has the flag, or one that excludes it.
fn is_decided(definition: &Command, given: &ArgMatches, arg: &Arg) -> bool {
    let excludes = |one: &Arg, other: &Arg| {
        definition.get_arg_conflicts_with(one).iter().any(|found| found.get_id() == other.get_id())
    };
    definition
        .get_arguments()
        .filter(|typed| given.value_source(typed.get_id().as_str()) == Some(ValueSource::CommandLine))
        .any(|typed| typed.get_id() == arg.get_id() || excludes(typed, arg) || excludes(arg, typed))
}

/// The nearest flag, in words.
fn suggestion(definition: &Command, name: &str) -> String {
    let line = [definition.get_name().to_owned(), format!("--{name}")];
    let error = definition.clone().try_get_matches_from(line).err();
    match error.as_ref().and_then(|error| error.get(ContextKind::SuggestedArg)) {
        Some(ContextValue::String(nearest)) => format!("; a similar one is {nearest}"),
        _ => "; `r1-serve --help` lists those there are".to_owned(),
    }
}

fn yaml(text: &str) -> Result<Vec<(String, Setting)>> {
    // Nothing stands in it, or nothing but comments.
    let kinds: Option<Map<String, Value>> = serde_saphyr::from_str(text)?;
    let Some(kinds) = kinds else { return Ok(Vec::new()) };
    Ok(serde_saphyr::with_deserializer_from_str(text, |yaml| Texts(&kinds).deserialize(yaml))?)
}

/// Reads a YAML mapping again, now that it is known which of its values are scalars: those are read as they are written.
struct Texts<'k>(&'k Map<String, Value>);

impl<'de> DeserializeSeed<'de> for Texts<'_> {
    type Value = Vec<(String, Setting)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Texts<'_> {
    type Value = Vec<(String, Setting)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping from flags to values")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut settings = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let setting = match self.0.get(&key) {
                Some(Value::Bool(_)) => Setting::Switch(map.next_value()?),
                Some(Value::Number(_) | Value::String(_)) => Setting::Text(map.next_value()?),
                Some(Value::Array(values)) if values.iter().all(is_scalar) => {
                    Setting::List(map.next_value()?)
                }
                Some(value @ (Value::Array(_) | Value::Object(_))) => {
                    map.next_value::<IgnoredAny>()?;
                    Setting::Text(value.to_string())
                }
                Some(Value::Null) | None => {
                    return Err(serde::de::Error::custom(format!("{key} has no value")));
                }
            };
            settings.push((key, setting));
        }
        Ok(settings)
    }
}

fn is_scalar(value: &Value) -> bool {
    !matches!(value, Value::Array(_) | Value::Object(_) | Value::Null)
}

fn toml(text: &str) -> Result<Vec<(String, Setting)>> {
    let table: toml::Table = toml::from_str(text)?;
    table
        .into_iter()
        .map(|(key, value)| {
            let setting = match value {
                toml::Value::Boolean(on) => Setting::Switch(on),
                toml::Value::Array(values)
                    if !values.iter().any(|value| value.is_array() || value.is_table()) =>
                {
                    Setting::List(values.iter().map(scalar).collect())
                }
                toml::Value::Array(_) | toml::Value::Table(_) => {
                    let json = serde_json::to_string(&value);
                    Setting::Text(json.map_err(|error| anyhow!("{key}: {error}"))?)
                }
                value => Setting::Text(scalar(&value)),
            };
            Ok((key, setting))
        })
        .collect()
}

fn scalar(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        toml::Value::Boolean(on) => on.to_string(),
        toml::Value::Datetime(moment) => moment.to_string(),
        toml::Value::Array(_) | toml::Value::Table(_) => unreachable!("no scalar"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::args::{Cli, Command, ServeArgs};
    use crate::command_line::read;

    /// The arguments that a file of that kind and a command line make together; the file stands before them.
    fn with(kind: &str, text: &str, line: &[&str]) -> Result<ServeArgs> {
        let mut file = tempfile::Builder::new().suffix(kind).tempfile()?;
        file.write_all(text.as_bytes())?;
        let config = format!("--config={}", file.path().display());
        let Cli { command, serve } = read(["r1-serve"].iter().chain(line).chain([&config.as_str()]))?;
        Ok(match command {
            Some(Command::Serve(args)) => *args,
            Some(_) => panic!("another subcommand"),
            None => serve,
        })
    }

    fn refused(kind: &str, text: &str, needles: &[&str]) {
        let error = format!("{:#}", with(kind, text, &[]).unwrap_err());
        for needle in needles {
            assert!(error.contains(needle), "{text}: {error}");
        }
    }

    const YAML: &str = r#"
# As for vLLM.
model: /models/DeepSeek-R1
max_model_len: 1_000
tensor-parallel-size: 2
gpu-memory-utilization: 0.90
served-model-name: [r1, 0012, 1.10]
api-key: 007
trust-remote-code: true
enforce-eager: false
enable-prefix-caching: false
override-generation-config: {temperature: 0.1, "top_p": 1}
"#;

    const TOML: &str = r#"
model = "/models/DeepSeek-R1"
max_model_len = 1000
tensor-parallel-size = 2
gpu-memory-utilization = 0.9
served-model-name = ["r1", "0012", "1.10"]
api-key = "007"
trust-remote-code = true
enforce-eager = false
enable-prefix-caching = false
[override-generation-config]
temperature = 0.1
top_p = 1
"#;

    #[test]
    fn a_file_says_what_flags_say() {
        let flags = [
            "--model=/models/DeepSeek-R1",
            "--max-model-len=1000",
            "--tensor-parallel-size=2",
            "--gpu-memory-utilization=0.9",
            "--served-model-name=r1",
            "--served-model-name=0012",
            "--served-model-name=1.10",
            "--api-key=007",
            "--trust-remote-code",
            "--no-enable-prefix-caching",
            r#"--override-generation-config={"temperature":0.1,"top_p":1}"#,
        ];
        let said = |args: ServeArgs| format!("{:?}", ServeArgs { config: None, ..args });
        for (kind, text) in [(".yaml", YAML), (".toml", TOML)] {
            for subcommand in [&[][..], &["serve"]] {
                // The underscored number is the file's only.
                let text = text.replace("1_000", "1000");
                let args = with(kind, &text, subcommand).unwrap();
                let typed = read(["r1-serve"].iter().chain(&flags)).unwrap().serve;
                assert_eq!(said(args), said(typed), "{kind}");
            }
        }
    }

    #[test]
    fn the_command_line_wins() {
        let yaml = "model: m\nport: 1\nserved-model-name: [a, b]\nhost: h\nenable-prefix-caching: true\n";
        let args = with(".yaml", yaml, &["--port", "2", "--served-model-name=c"]).unwrap();
        assert_eq!((args.http.port, args.http.host.as_str()), (2, "h"));
        assert_eq!(args.served_model_name, ["c"]);
        assert_eq!(args.model.model(), Some("m"));
        for line in [&["n", "--no-prefix-cache"][..], &["--model-path", "n", "--disable-radix-cache"]] {
            let args = with(".yaml", yaml, line).unwrap();
            assert_eq!((args.model.model(), args.model.no_prefix_cache), (Some("n"), true), "{line:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        refused(".yaml", "max-model-length: 3", &["max-model-length", "--max-model-len"]);
        refused(".yaml", "port: many", &[".yaml", "--port", "many"]);
        refused(".yaml", "enforce-eager: 3", &["enforce-eager", "true or false"]);
        refused(".yaml", "port: [1, 2]", &["port", "one value"]);
        refused(".yaml", "port:", &["port", "no value"]);
        refused(".yaml", "port: 1\nport: 2", &["port"]);
        refused(".yaml", "config: other.yaml", &["config", "command line"]);
        refused(".yaml", "- port", &[".yaml"]);
        refused(".toml", "port = ", &[".toml"]);
        refused(".ini", "port=1", &[".yaml, .yml or .toml"]);
        assert!(with(".yaml", "", &[]).is_ok() && with(".yaml", "# nothing\n", &[]).is_ok());
        let error = format!("{:#}", read(["r1-serve", "--config", "/nowhere.yaml"]).unwrap_err());
        assert!(error.contains("/nowhere.yaml"), "{error}");
    }
}
