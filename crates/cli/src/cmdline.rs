//! From words to a command: flags that come from a file, and what can be made of the flags' description: completions and
//! manual pages.
//!
//! A file's keys are the names of `realm run`'s flags, taken from the one description of them: there is no second list.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, Args, CommandFactory as _, FromArgMatches as _};

use crate::args::Cli;

/// Flags that are no keys: a file names no file, and the rest is for programs.
const NO_KEYS: &[&str] = &["config", "help", "ready-fd", "events-fd", "verdict-fd"];

/// `realm completions`.
#[derive(Args, Debug, Clone)]
#[command(after_help = "For bash: realm completions bash >/etc/bash_completion.d/realm")]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: clap_complete::Shell,
}

/// `realm man`.
#[derive(Args, Debug, Clone)]
pub(crate) struct ManArgs {
    /// The command whose page to print [default: the one about all]
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
    /// Write all pages into DIRECTORY instead: realm.1, realm-run.1 and so on
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "command")]
    out: Option<PathBuf>,
}

/// The command that this process was started with.
pub(crate) fn parse() -> Result<Cli> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let words = with_file(words)?;
    let matches = Cli::command().get_matches_from(words);
    Cli::from_arg_matches(&matches).map_err(|error| error.exit())
}

/// Puts the flags of the file that `--config` names between `run` and the flags that are there.
fn with_file(mut words: Vec<OsString>) -> Result<Vec<OsString>> {
    // What cannot be parsed is reported by whoever parses it next.
    let Ok(matches) = Cli::command().try_get_matches_from(&words) else { return Ok(words) };
    let Some(run) = matches.subcommand_matches("run") else { return Ok(words) };
    let Some(path) = run.get_one::<PathBuf>("config") else { return Ok(words) };
    let given = |flag: &Arg| run.value_source(flag.get_id().as_str()) == Some(ValueSource::CommandLine);
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let more = flags(&text, given).with_context(|| format!("{} cannot be used", path.display()))?;
    let place = words.iter().position(|word| word == "run").map_or(1, |place| place + 1);
    words.splice(place..place, more.into_iter().map(OsString::from));
    Ok(words)
}

/// The flags that a file says and that `given` does not know already.
fn flags(text: &str, given: impl Fn(&Arg) -> bool) -> Result<Vec<String>> {
    let table: toml::Table = text.parse()?;
    let command = Cli::command();
    let known = keys(&command);
    let mut words = Vec::new();
    for (key, value) in &table {
        let Some(flag) = known.iter().find(|flag| flag.get_long() == Some(key)) else {
            bail!("`{key}` is no flag of `realm run`");
        };
        if given(flag) {
            continue;
        }
        match (flag.get_action(), value) {
            (ArgAction::SetTrue, toml::Value::Boolean(true)) => words.push(format!("--{key}")),
            (ArgAction::SetTrue, toml::Value::Boolean(false)) => {}
            (ArgAction::SetTrue, _) => bail!("`{key}` is true or false"),
            (ArgAction::Append, toml::Value::Array(values)) => {
                for value in values {
                    words.push(format!("--{key}={}", scalar(key, value)?));
                }
            }
            (_, value) => words.push(format!("--{key}={}", scalar(key, value)?)),
        }
    }
    Ok(words)
}

/// The flags of `realm run` that are keys.
fn keys(command: &clap::Command) -> Vec<&Arg> {
    let run = command.find_subcommand("run").map(clap::Command::get_arguments);
    let is_key = |flag: &&Arg| flag.get_long().is_some_and(|name| !NO_KEYS.contains(&name));
    run.into_iter().flatten().filter(is_key).collect()
}

fn scalar(key: &str, value: &toml::Value) -> Result<String> {
    Ok(match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        _ => bail!("`{key}` is a text or a number"),
    })
}

/// Prints a shell's completions.
pub(crate) fn completions(args: &CompletionsArgs) -> Result<u8> {
    clap_complete::generate(args.shell, &mut Cli::command(), "realm", &mut std::io::stdout());
    Ok(0)
}

/// Prints a manual page, or writes all.
pub(crate) fn man(args: &ManArgs) -> Result<u8> {
    let mut command = Cli::command();
    command.build();
    match (&args.out, &args.command) {
        (Some(directory), _) => {
            std::fs::create_dir_all(directory)?;
            pages(&command, directory)?;
        }
        (None, None) => clap_mangen::Man::new(command).render(&mut std::io::stdout())?,
        (None, Some(name)) => {
            let found =
                command.find_subcommand(name).with_context(|| format!("there is no command {name}"))?;
            clap_mangen::Man::new(found.clone()).render(&mut std::io::stdout())?;
        }
    }
    Ok(0)
}

fn pages(command: &clap::Command, directory: &Path) -> Result<()> {
    let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
    for command in std::iter::once(command).chain(shown) {
        let name = command.get_display_name().unwrap_or_else(|| command.get_name());
        if name.ends_with("-help") {
            continue;
        }
        let path = directory.join(format!("{name}.1"));
        let mut file =
            std::fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        clap_mangen::Man::new(command.clone()).render(&mut file)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_description_of_all_flags_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_of_run_is_a_key_and_every_key_a_flag() {
        let command = Cli::command();
        let keys = keys(&command);
        assert!(keys.len() > 30);
        for flag in keys {
            let key = flag.get_long().unwrap();
            let (value, word) = match flag.get_action() {
                ArgAction::SetTrue => ("true".to_owned(), format!("--{key}")),
                ArgAction::Append => ("['a=b']".to_owned(), format!("--{key}=a=b")),
                _ => ("'7'".to_owned(), format!("--{key}=7")),
            };
            assert_eq!(flags(&format!("{key} = {value}"), |_| false).unwrap(), [word], "{key}");
            assert!(flags(&format!("{key} = {value}"), |_| true).unwrap().is_empty());
        }
        for wrong in ["nothing = 1", "config = 'a'", "memory = [1]", "detach = 1", "memory", "[exec]\na = 1"]
        {
            assert!(flags(wrong, |_| false).is_err(), "{wrong}");
        }
    }

    proptest! {
        /// What a file says and what the same words say is the same, whatever the values are.
        #[test]
        fn a_file_and_words_say_the_same(
            picked in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
            texts in proptest::collection::vec(any::<String>(), 8),
            numbers in proptest::collection::vec(any::<i64>(), 8),
        ) {
            let command = Cli::command();
            let keys = keys(&command);
            let mut lines = std::collections::BTreeMap::new();
            for ((flag, text), number) in picked.iter().map(|index| index.get(&keys)).zip(texts).zip(numbers) {
                let key = flag.get_long().unwrap();
                // A text in JSON is one in TOML, but for one character.
                let text = text.replace('\u{7f}', "");
                let quoted = serde_json::to_string(&text).unwrap();
                let (value, words) = match flag.get_action() {
                    ArgAction::SetTrue if number > 0 => ("true".to_owned(), vec![format!("--{key}")]),
                    ArgAction::SetTrue => ("false".to_owned(), vec![]),
                    ArgAction::Append => (
                        format!("[{quoted}, {number}]"),
                        vec![format!("--{key}={text}"), format!("--{key}={number}")],
                    ),
                    _ if number % 2 == 0 => (number.to_string(), vec![format!("--{key}={number}")]),
                    _ => (quoted, vec![format!("--{key}={text}")]),
                };
                lines.insert(key.to_owned(), (format!("{key} = {value}\n"), words));
            }
            let file: String = lines.values().map(|(line, _)| line.as_str()).collect();
            let said = flags(&file, |_| false).unwrap();
            let words = lines.into_values().flat_map(|(_, words)| words);
            prop_assert_eq!(said, words.collect::<Vec<_>>());
        }

        /// Any file is an error, or flags; and whatever flags it gives are parsed or refused.
        #[test]
        fn any_file_is_flags_or_an_error(
            cuts in proptest::collection::vec((any::<prop::sample::Index>(), 0..6usize, "[-=\\[\\]'\"\n#.,a-z0-9\u{e9} ]{0,4}"), 0..12),
        ) {
            let mut text = "memory = 256\ncpus = 2\ndisk = ['a.img', 'b.img,ro']\nexec = \"-v\"\nplain = false\n".to_owned();
            for (at, len, more) in cuts {
                let places: Vec<usize> = text.char_indices().map(|(place, _)| place).chain([text.len()]).collect();
                let at = at.index(places.len());
                let end = (at + len).min(places.len() - 1);
                text.replace_range(places[at]..places[end], &more);
            }
            if let Ok(words) = flags(&text, |_| false) {
                prop_assert!(words.iter().all(|word| word.starts_with("--")));
                let words = ["realm", "run"].map(str::to_owned).into_iter().chain(words);
                let _ = Cli::command().try_get_matches_from(words);
            }
        }
    }

    #[test]
    fn a_file_gives_what_the_words_do_not() {
        let path = std::env::temp_dir().join(format!("realm-config-{}.toml", std::process::id()));
        std::fs::write(
            &path,
            "memory = 256\ncpus = 2\ndisk = ['a.img', 'b.img,ro']\nexec = '-v'\nplain = false\n",
        )
        .unwrap();
        let words = ["realm", "run", "--cpus", "4", "--config", path.to_str().unwrap()];
        let words = with_file(words.map(OsString::from).to_vec()).unwrap();
        let cli = Cli::from_arg_matches(&Cli::command().try_get_matches_from(words).unwrap()).unwrap();
        let crate::args::Command::Run(run) = cli.command else { panic!("another command") };
        assert_eq!(
            (run.memory, run.cpus, run.exec.as_deref(), run.plain),
            (Some(256), Some(4), Some("-v"), false)
        );
        assert_eq!(run.disks.len(), 2);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn pages_and_completions_are_made() {
        let directory = std::env::temp_dir().join(format!("realm-man-{}", std::process::id()));
        man(&ManArgs { command: None, out: Some(directory.clone()) }).unwrap();
        let page = std::fs::read_to_string(directory.join("realm-exec.1")).unwrap();
        assert!(page.contains("realm\\-exec") && page.contains("EXIT") || page.contains("Exit status"));
        assert!(directory.join("realm.1").is_file() && !directory.join("realm-touch.1").exists());
        std::fs::remove_dir_all(directory).unwrap();
        let mut script = Vec::new();
        clap_complete::generate(clap_complete::Shell::Bash, &mut Cli::command(), "realm", &mut script);
        assert!(String::from_utf8(script).unwrap().contains("--personalization"));
    }
}
