//! What a user types, line by line.

use std::io::{BufRead, IsTerminal, StdinLock, stdin};

use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::{ReadlineError, Signal};

/// Standard input: a terminal, whose lines can be edited and called back, or anything else.
pub enum Lines {
    /// A terminal.
    Terminal(Box<DefaultEditor>),
    /// A file or a pipe.
    Plain(StdinLock<'static>),
}

/// What was read.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// A line, without its end.
    Text(String),
    /// Ctrl-C, which gives up the line.
    Interrupted,
    /// The end of the input.
    End,
}

impl Lines {
    /// Standard input, whatever it is.
    pub fn open() -> Result<Lines> {
        if stdin().is_terminal() {
            return Ok(Lines::Terminal(Box::new(DefaultEditor::new().context("cannot read from the terminal")?)));
        }
        Ok(Lines::Plain(stdin().lock()))
    }

    /// Waits for the next line.
    pub fn next(&mut self) -> Result<Line> {
        let failed = "cannot read standard input";
        match self {
            Lines::Terminal(editor) => match editor.readline("> ") {
                Ok(line) => {
                    editor.add_history_entry(&line).context(failed)?;
                    Ok(Line::Text(line))
                }
                Err(ReadlineError::Interrupted | ReadlineError::Signal(Signal::Interrupt)) => Ok(Line::Interrupted),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(error) => Err(error).context(failed),
            },
            Lines::Plain(input) => {
                let mut line = String::new();
                if input.read_line(&mut line).context(failed)? == 0 {
                    return Ok(Line::End);
                }
                Ok(Line::Text(line.trim_end_matches(['\n', '\r']).to_owned()))
            }
        }
    }
}
