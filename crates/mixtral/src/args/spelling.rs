//! Accepts command lines that clap alone would not: flags with underscores, texts that begin like flags, and the old
//! commands' flags and names.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::iter::Peekable;
use std::sync::LazyLock;

use clap::CommandFactory;

use super::old_flags::{self, OldFlag, Takes, Verdict};
use super::{Cli, Usage, usage};

/// Flags that are followed by texts. A text may begin with a hyphen.
const TEXTS: &[&str] = &["--input-text", "--stop-words", "--bad-words", "--system-prompt"];

/// Put before a text that begins with a hyphen, so that clap does not take it for a flag. No argument of a process can
/// contain this character.
const MARK: char = '\0';

/// Parses a text: removes its mark, if it has one.
pub fn text(value: &str) -> Result<String, std::convert::Infallible> {
    Ok(value.strip_prefix(MARK).unwrap_or(value).to_owned())
}

/// A command line that clap can parse, and the old flags that were left out of it.
#[derive(Debug, Default)]
pub struct Line {
    /// The arguments for clap.
    pub args: Vec<OsString>,
    /// What was left out.
    pub left_out: Vec<&'static OldFlag>,
}

/// Reads a command line.
///
/// # Errors
/// An old flag that cannot be honoured.
pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Line, Usage> {
    let mut args = args.into_iter();
    let mut line = Line { args: args.next().into_iter().collect(), ..Line::default() };
    let args: Vec<OsString> = args.collect();
    let program = args.iter().filter_map(|a| a.to_str()).find(|a| !a.starts_with('-')).unwrap_or_default().to_owned();
    let is_quantize = program == "quantize";
    let known = flags_of(if is_quantize { "convert" } else { &program });
    let (mut in_texts, mut has_model) = (false, false);
    let mut args = args.into_iter().peekable();
    while let Some(arg) = args.next() {
        let Some(typed) = arg.to_str() else {
            line.args.push(arg);
            continue;
        };
        if is_quantize && typed == "quantize" {
            // The old program's default. If the user names a directory, that flag comes later and counts.
            line.args.extend(["convert".into(), "--output-dir=exported_model".into()]);
            continue;
        }
        if typed == "--" {
            line.args.push(arg);
            line.args.extend(args);
            break;
        }
        let (name, value) = split(typed);
        let old = old_flags::find(&program, &name).filter(|old| old.verdict != Verdict::Works);
        if let Some(old) = old {
            in_texts = false;
            let values = match value {
                Some(value) => vec![value.to_owned()],
                None => values(old.takes, &mut args),
            };
            if values.is_empty() && matches!(old.takes, Takes::Value | Takes::Values) {
                usage!("{name} takes a value, and none follows it");
            }
            old.judge(&values).map_err(Usage)?;
            if !line.left_out.iter().any(|other| other.flag == old.flag) {
                line.left_out.push(old);
            }
        } else if is_flag(typed, &name, in_texts, &known) {
            in_texts = TEXTS.contains(&name.as_str());
            has_model |= name == "--model-dir";
            line.args.push(value.map_or(name.clone(), |value| format!("{name}={value}")).into());
        } else if in_texts && typed.starts_with('-') {
            line.args.push(format!("{MARK}{typed}").into());
        } else {
            line.args.push(arg);
        }
    }
    if is_quantize && !has_model && !line.args.iter().any(|arg| arg == "--help" || arg == "-h") {
        usage!("quantize needs a model: name its directory with --model-dir");
    }
    Ok(line)
}

/// `--some_flag=value` → `--some-flag` and the value. Anything else than a flag stays as it is.
fn split(typed: &str) -> (String, Option<&str>) {
    let (name, value) = typed.split_once('=').map_or((typed, None), |(name, value)| (name, Some(value)));
    if is_written_as_flag(name) { (name.replace('_', "-"), value) } else { (typed.to_owned(), None) }
}

/// Whether the text is one or two hyphens and a word of letters, digits, hyphens and underscores.
fn is_written_as_flag(name: &str) -> bool {
    let word = name.strip_prefix("--").or_else(|| name.strip_prefix('-')).unwrap_or_default();
    word.starts_with(|c: char| c.is_ascii_alphabetic())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
}

/// Whether an argument is meant as a flag. Where texts are expected, it is one if the subcommand knows it. It is also
/// one if it begins with two hyphens and has no space, so that a flag with a typo is not taken for a prompt.
fn is_flag(typed: &str, name: &str, in_texts: bool, known: &BTreeSet<String>) -> bool {
    if !is_written_as_flag(name) {
        return false;
    }
    known.contains(name) || !in_texts || name.starts_with("--") && !typed.contains(char::is_whitespace)
}

/// Takes the values that follow a flag, by the rules of Python's argparse.
fn values(takes: Takes, args: &mut Peekable<impl Iterator<Item = OsString>>) -> Vec<String> {
    let at_most = match takes {
        Takes::Nothing => 0,
        Takes::Value | Takes::ValueOrNothing => 1,
        Takes::Values => usize::MAX,
    };
    let is_value = |arg: &OsString| {
        let text = arg.to_string_lossy();
        !text.starts_with('-') || text == "-" || text.parse::<f64>().is_ok() || text.contains(' ')
    };
    let mut values = Vec::new();
    while values.len() < at_most
        && let Some(value) = args.next_if(is_value)
    {
        values.push(value.to_string_lossy().into_owned());
    }
    values
}

/// All flags that a subcommand knows: `--long`, `-s`, and their aliases.
fn flags_of(program: &str) -> BTreeSet<String> {
    // Tests read many lines, and building all commands takes a millisecond.
    static BUILT: LazyLock<clap::Command> = LazyLock::new(|| {
        let mut cli = Cli::command();
        cli.build();
        cli
    });
    let Some(command) = BUILT.find_subcommand(program) else { return BTreeSet::new() };
    let of = |arg: &clap::Arg| {
        let long = arg.get_long_and_visible_aliases().unwrap_or_default().into_iter();
        let aliases = arg.get_all_aliases().unwrap_or_default();
        let long = long.chain(aliases).map(|name| format!("--{name}")).collect::<Vec<_>>();
        long.into_iter().chain(arg.get_short().map(|short| format!("-{short}"))).collect::<Vec<_>>()
    };
    command.get_arguments().flat_map(of).collect()
}
