//! The old commands' flags that this program does not have. Flags that change nothing are taken out of a command line;
//! flags that cannot be honoured are refused with the reason. The list is a table in the documentation.

use std::sync::OnceLock;

/// The document that lists every flag of the old commands. People read it, and so does [`table`].
const TABLE: &str = include_str!("../../../../docs/old-flags.md");

/// How many values follow a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// None.
    Nothing,
    /// One.
    Value,
    /// One or none.
    ValueOrNothing,
    /// One or more.
    Values,
}

/// What becomes of a flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is a flag of this program.
    Works,
    /// It is left out, since it changes nothing.
    Accepted,
    /// It is left out with these values, and refused with any other.
    Only(Vec<&'static str>),
    /// It is refused.
    Refused,
}

/// A row of the table.
#[derive(Clone, Debug)]
pub struct OldFlag {
    /// The subcommand that stands for the old program.
    pub program: &'static str,
    /// The flag with its hyphens: `--moe-tp-mode`.
    pub flag: String,
    /// What follows it.
    pub takes: Takes,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Why, and what to do.
    pub why: &'static str,
}

/// All flags, in the order of the documentation.
pub fn table() -> &'static [OldFlag] {
    static ROWS: OnceLock<Vec<OldFlag>> = OnceLock::new();
    ROWS.get_or_init(|| TABLE.lines().filter_map(row).collect())
}

/// The row that a line of the document is, if it is one.
fn row(line: &'static str) -> Option<OldFlag> {
    let cells: Vec<&str> = line.strip_prefix('|')?.strip_suffix('|')?.split('|').map(str::trim).collect();
    let [program, flag, _, takes, verdict, why] = cells[..] else { return None };
    let takes = match takes {
        "nothing" => Takes::Nothing,
        "value" => Takes::Value,
        "value?" => Takes::ValueOrNothing,
        "values" => Takes::Values,
        _ => return None,
    };
    let verdict = match verdict {
        "works" => Verdict::Works,
        "accepted" => Verdict::Accepted,
        "refused" => Verdict::Refused,
        only => Verdict::Only(only.strip_prefix("only ")?.split(", ").collect()),
    };
    Some(OldFlag { program, flag: flag.replace('_', "-"), takes, verdict, why })
}

/// The row of a program's flag.
pub fn find(program: &str, flag: &str) -> Option<&'static OldFlag> {
    table().iter().find(|row| row.program == program && row.flag == flag)
}

impl OldFlag {
    /// Checks that the flag, with the values that were given, may be left out.
    ///
    /// # Errors
    /// Why it may not, and what the user can do.
    pub fn judge(&self, values: &[String]) -> Result<(), String> {
        let may = match &self.verdict {
            Verdict::Works | Verdict::Accepted => true,
            Verdict::Refused => false,
            Verdict::Only(allowed) => {
                !values.is_empty() && values.iter().all(|value| allowed.iter().any(|a| is_same(a, value)))
            }
        };
        if may {
            return Ok(());
        }
        let shown: String = values.iter().map(|value| format!(" {value}")).collect();
        Err(format!("{}{shown}: {}", self.flag, self.why))
    }
}

/// Equal as texts, or as numbers: `1` is `1.0`.
fn is_same(allowed: &str, value: &str) -> bool {
    let number = |text: &str| text.parse::<f64>().ok();
    allowed == value || number(allowed).is_some_and(|n| number(value) == Some(n))
}
