//! Questions with several answers, of which the model finds one the likeliest.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use mixtral_runtime::Tokenizer;
use serde::{Deserialize, Serialize};

use super::score::Sequence;
use crate::run::prompt_files::text_lines;
use crate::run::report::{f, ratio};
use crate::say;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// What stands before each of the choices.
    pub context: String,
    /// The continuations.
    pub choices: Vec<String>,
    /// The right one, from 0.
    pub answer: usize,
}

/// Reads questions, one a line. Empty lines are left out.
pub fn read(path: &Path) -> Result<Vec<Question>> {
    let mut questions = Vec::new();
    for (at, line) in text_lines(path)?.iter().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("{}: line {}", path.display(), at + 1);
        let question: Question = serde_json::from_str(line)
            .with_context(|| format!("{}: expected an object with context, choices and answer", place()))?;
        if question.answer >= question.choices.len() {
            bail!("{}: answer is {}, but there are {} choices", place(), question.answer, question.choices.len());
        }
        questions.push(question);
    }
    if questions.is_empty() {
        bail!("{} has no question", path.display());
    }
    Ok(questions)
}

/// The sequences of all choices, question by question. Those longer than `limit` are cut on the left.
pub fn sequences(questions: &[Question], tokenizer: &Tokenizer, special: bool, limit: usize) -> Result<Vec<Sequence>> {
    let mut sequences = Vec::new();
    let mut cut = 0;
    for (number, Question { context, choices, .. }) in questions.iter().enumerate() {
        // Tokens carry the space before a word, so a space at the context's end belongs to the choices. What of the context
        // becomes a token together with a choice belongs to it too.
        let alone = tokenizer.encode(context.trim_end(), special)?;
        for choice in choices {
            let mut ids = tokenizer.encode(&format!("{context}{choice}"), special)?;
            let before = ids.iter().zip(&alone).take_while(|(id, other)| id == other).count();
            let scored = ids.len() - before;
            if scored == 0 || before == 0 || scored >= limit {
                bail!(
                    "question {}: of the choice `{choice}`, {scored} tokens follow {before} of the context; the context needs at least one, and the choice from 1 to {}",
                    number + 1,
                    limit.saturating_sub(1)
                );
            }
            cut += usize::from(ids.len() > limit);
            ids.drain(..ids.len().saturating_sub(limit));
            sequences.push(Sequence { ids, scored });
        }
    }
    if cut > 0 {
        say::warning(format_args!(
            "{cut} of {} contexts were cut on the left, since sequences have at most {limit} tokens",
            sequences.len()
        ));
    }
    Ok(sequences)
}

/// How many questions were answered.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Accuracy {
    /// Part of the questions whose right answer has the highest log-probability.
    pub accuracy: f64,
    /// The same, with log-probabilities divided by the choices' numbers of characters.
    pub accuracy_normalized: f64,
    /// Questions.
    pub questions: usize,
    /// The log-probability of each choice of each question, in nats.
    pub logprobs: Vec<Vec<f64>>,
}

impl Accuracy {
    /// Of questions whose choices have these log-probabilities, in order.
    pub fn new(questions: &[Question], sums: &[f64]) -> Accuracy {
        let mut rest = sums;
        let mut logprobs = Vec::new();
        let (mut right, mut right_normalized) = (0, 0);
        for Question { choices, answer, .. } in questions {
            let (mine, others) = rest.split_at(choices.len());
            rest = others;
            let normalized: Vec<f64> =
                mine.iter().zip(choices).map(|(sum, choice)| ratio(*sum, f(choice.chars().count()))).collect();
            right += usize::from(likeliest(mine) == Some(*answer));
            right_normalized += usize::from(likeliest(&normalized) == Some(*answer));
            logprobs.push(mine.to_vec());
        }
        let part = |right: usize| ratio(f(right), f(questions.len()));
        let (accuracy, accuracy_normalized) = (part(right), part(right_normalized));
        Accuracy { accuracy, accuracy_normalized, questions: questions.len(), logprobs }
    }
}

/// The first of the highest values.
fn likeliest(values: &[f64]) -> Option<usize> {
    (0..values.len()).rev().max_by(|&a, &b| values[a].total_cmp(&values[b]))
}

impl fmt::Display for Accuracy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Accuracy { accuracy, accuracy_normalized, questions, .. } = self;
        let (plain, normalized) = (100.0 * accuracy, 100.0 * accuracy_normalized);
        write!(f, "accuracy {plain:.2} % ({normalized:.2} % normalized by length) of {questions} questions")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_choice_counts_with_and_without_its_length() {
        let question = |choices: &[&str], answer| Question {
            context: String::new(),
            choices: choices.iter().map(|c| (*c).to_owned()).collect(),
            answer,
        };
        let questions = [question(&["ab", "abcdefgh"], 1), question(&["x", "y", "z"], 0)];
        let found = Accuracy::new(&questions, &[-2.0, -4.0, -1.0, -1.0, -3.0]);
        assert_eq!((found.accuracy, found.accuracy_normalized, found.questions), (0.5, 1.0, 2));
        assert_eq!(found.logprobs, [vec![-2.0, -4.0], vec![-1.0, -1.0, -3.0]]);
    }
}
