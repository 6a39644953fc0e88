//! From the process's arguments to [`Cli`]: other spellings of flags, and those of a `--config` file.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process;

use anyhow::{Result, anyhow, bail};
use clap::{ArgMatches, CommandFactory, FromArgMatches};

use crate::args::Cli;
use crate::config_file;

/// What the exit code of a wrong command line is; clap's own.
const USAGE: i32 = 2;

/// The arguments of this process; ends it where they are wrong or ask for help.
pub(crate) fn parse() -> Cli {
    match read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => match error.downcast::<clap::Error>() {
            Ok(error) => error.exit(),
            Err(error) => {
                eprintln!("error: {error:#}");
                process::exit(USAGE);
            }
        },
    }
}

/// Reads a command line, the program's name first.
pub(crate) fn read(typed: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Cli> {
    let typed = spelled(typed);
    let mut command = Cli::command();
    let matches = command.try_get_matches_from_mut(&typed)?;
    // The file's flags go before the command line's own.
    let (definition, given, at) = match matches.subcommand() {
        None => (&command, &matches, 1),
        Some(("serve", given)) => (command.find_subcommand("serve").expect("it was found"), given, 2),
        Some(_) => return Ok(Cli::from_arg_matches(&matches)?),
    };
    let Some(path) = given.get_one::<PathBuf>("config") else {
        check_names(given)?;
        return Ok(Cli::from_arg_matches(&matches)?);
    };
    let added = config_file::arguments(path, definition, given)?;
    let (before, behind) = typed.split_at(at);
    let line = before.iter().chain(&added).chain(behind);
    // The command line itself was read without errors.
    let of_file = |error: clap::Error| {
        let error = error.to_string();
        anyhow!("{}: {}", path.display(), error.strip_prefix("error: ").unwrap_or(&error).trim_end())
    };
    let matches = Cli::command().try_get_matches_from(line).map_err(of_file)?;
    check_names(matches.subcommand().map_or(&matches, |(_, given)| given))?;
    Cli::from_arg_matches(&matches).map_err(of_file)
}

/// A model behind the names it is served by would be taken for one of them.
fn check_names(given: &ArgMatches) -> Result<()> {
    let named = given.contains_id("model") || given.contains_id("model_positional");
    for names in given.get_occurrences::<String>("served_model_name").into_iter().flatten() {
        let names: Vec<&str> = names.map(String::as_str).collect();
        if names.len() > 1 && !named {
            bail!(
                "--served-model-name takes every name that follows it ({}), and no model is named; put the model before it \
                 or use --model",
                names.join(", ")
            );
        }
    }
    Ok(())
}

/// Flags as they are defined: `--max_model_len` and `-tp`, which vLLM's command line takes too, with dashes.
fn spelled(typed: impl IntoIterator<Item = impl Into<OsString>>) -> Vec<OsString> {
    let mut verbatim = false;
    let spell = |arg: OsString| {
        verbatim |= arg == "--";
        let Some(text) = arg.to_str().filter(|text| !verbatim && text.starts_with('-')) else { return arg };
        let (flag, value) = match text.split_once('=') {
            Some((flag, value)) => (flag, Some(value)),
            None => (text, None),
        };
        let flag = match flag {
            "-tp" | "-pp" | "-dp" | "-ep" => format!("-{flag}"),
            flag if flag.starts_with("--") => flag.replace('_', "-"),
            _ => return arg,
        };
        value.map_or(flag.clone(), |value| format!("{flag}={value}")).into()
    };
    typed.into_iter().map(Into::into).map(spell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_behind_its_names_is_missed() {
        for line in [&["--served-model-name", "a", "b"][..], &["serve", "--served-model-name", "a", "b"]] {
            let error = read(["r1-serve"].iter().chain(line)).unwrap_err().to_string();
            assert!(error.contains("(a, b)") && error.contains("--model"), "{error}");
        }
        for line in
            [&["m", "--served-model-name", "a", "b"][..], &["--served-model-name=a", "--served-model-name=b"]]
        {
            let args = read(["r1-serve"].iter().chain(line)).unwrap().serve;
            assert_eq!(args.served_model_name, ["a", "b"]);
        }
    }

    #[test]
    fn underscores_and_short_words_are_spelled_as_flags() {
        let line = ["r1-serve", "my_model", "--max_model_len=7", "-tp", "2", "--served_model_name", "a_b"];
        let args = read(line).unwrap().serve;
        assert_eq!(
            (args.model.model(), args.model.max_model_len, args.model.tp),
            (Some("my_model"), Some(7), 2)
        );
        assert_eq!(args.served_model_name, ["a_b"]);
        let spelled = spelled(["r1-serve", "-tp=4", "--a_b=c_d", "--", "--a_b"]);
        assert_eq!(spelled, ["r1-serve", "--tp=4", "--a-b=c_d", "--", "--a_b"]);
    }
}
