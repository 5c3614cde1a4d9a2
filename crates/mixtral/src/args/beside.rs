//! Flags beside a directory that already says what they say. One that repeats it changes nothing and is warned about; one that
//! contradicts it is refused, since a directory is not changed by a flag.

use std::fmt::Display;

use super::{Usage, usage};

/// What a flag says, and what is there.
pub struct Described {
    flag: &'static str,
    given: String,
    found: String,
    agrees: bool,
}

impl Described {
    /// A flag whose agreement is not that of equal values.
    pub fn new(flag: &'static str, given: impl Display, found: impl Display, agrees: bool) -> Described {
        Described { flag, given: given.to_string(), found: found.to_string(), agrees }
    }
}

/// A flag's value beside what was found under a key, if it was given.
pub fn described<T: PartialEq + Display>(
    flag: &'static str,
    given: Option<T>,
    key: &str,
    found: T,
) -> Option<Described> {
    let given = given?;
    Some(Described::new(flag, &given, format_args!("{key} {found}"), given == found))
}

/// The warning for flags that agree with what `place` says; `advice` tells those whose flags do not what to do.
///
/// # Errors
/// The first flag that does not agree.
pub fn compare(
    place: &str,
    advice: &str,
    flags: impl IntoIterator<Item = Option<Described>>,
) -> Result<Option<String>, Usage> {
    let mut repeated = Vec::new();
    for Described { flag, given, found, agrees } in flags.into_iter().flatten() {
        if !agrees {
            usage!("{flag} {given}, but {place} says {found}; leave the flag out, or {advice}");
        }
        repeated.push(flag);
    }
    let plural = if repeated.len() == 1 { "changes" } else { "change" };
    Ok((!repeated.is_empty()).then(|| format!("{} {plural} nothing: {place} says the same", repeated.join(", "))))
}
