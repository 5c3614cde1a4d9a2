//! `--stop-words` and `--bad-words`: a flag given once counts for all prompts; else it is given once for each prompt,
//! as run.py has it.

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::{Usage, spelling, usage};

const STOP: &str = "stop-words";
const BAD: &str = "bad-words";

/// Lists of texts, one for each time that the flag was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WordLists {
    flag: &'static str,
    lists: Vec<Vec<String>>,
}

impl WordLists {
    /// Whether the flag was not given.
    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// The list of each prompt. It is an error if there are more lists than prompts.
    pub fn for_prompts(&self, prompts: usize) -> Result<Vec<&[String]>, Usage> {
        match &self.lists[..] {
            [] => Ok(vec![&[]; prompts]),
            [all] => Ok(vec![all; prompts]),
            lists if lists.len() == prompts => Ok(lists.iter().map(Vec::as_slice).collect()),
            lists => usage!(
                "--{} was given {} times, and there are {prompts} prompts; give it once with the words for all of them, or once for each prompt",
                self.flag,
                lists.len()
            ),
        }
    }
}

/// The two flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// Texts that end a sequence.
    pub stop: WordLists,
    /// Texts that may not come up.
    pub bad: WordLists,
}

impl clap::Args for Words {
    fn augment_args(command: Command) -> Command {
        let flag = |name: &'static str, heading: &'static str, help: &'static str| {
            let flag = Arg::new(name).long(name).num_args(1..).action(ArgAction::Append).value_name("TEXT");
            flag.value_parser(spelling::text).help_heading(heading).help(help)
        };
        command
            .arg(flag(
                STOP,
                super::run::LENGTHS,
                "Texts that end a sequence; given several times, a list for each prompt",
            ))
            .arg(flag(
                BAD,
                super::sampling::SAMPLING,
                "Texts that may not come up; given several times, a list for each prompt",
            ))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Words {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let lists = |flag: &'static str| {
            let lists = matches.get_occurrences::<String>(flag).into_iter().flatten();
            WordLists { flag, lists: lists.map(|list| list.cloned().collect()).collect() }
        };
        Ok(Words { stop: lists(STOP), bad: lists(BAD) })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
