//! Flags that describe something which a directory already describes. A flag that repeats what the directory says
//! changes nothing, and the user is warned about it. A flag that contradicts the directory is refused, since no flag
//! can change the directory.

use std::fmt::Display;

use super::{Usage, usage};

/// What a flag says, and what the directory says.
pub struct Described {
    flag: &'static str,
    given: String,
    found: String,
    agrees: bool,
}

impl Described {
    /// A flag for which the caller decides whether it agrees: comparing the two values would not do.
    pub fn new(flag: &'static str, given: impl Display, found: impl Display, agrees: bool) -> Described {
        Described { flag, given: given.to_string(), found: found.to_string(), agrees }
    }
}

/// A flag's value and the value that the directory has under `key`, if the flag was given.
pub fn described<T: PartialEq + Display>(
    flag: &'static str,
    given: Option<T>,
    key: &str,
    found: T,
) -> Option<Described> {
    let given = given?;
    Some(Described::new(flag, &given, format_args!("{key} {found}"), given == found))
}

/// The warning for flags that agree with what `place` says. If a flag does not agree, the error ends with `advice`:
/// what the user can do.
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
