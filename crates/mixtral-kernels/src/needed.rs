//! What has to be compiled for a program to run on given architectures.

use std::collections::BTreeSet;

use mixtral_engine::Program;

use crate::compile::Code;
use crate::{Arch, Kernel, LowerError, Schedule, Target};

/// What engines for `archs` hold code of: those, and portable assembly for architectures to come.
#[must_use]
pub fn codes(archs: &[Arch]) -> BTreeSet<Code> {
    archs.iter().map(|arch| Code::Sass(*arch)).chain([Code::Ptx(Arch::BASE)]).collect()
}

/// The kernels that `program` launches, for each of `codes`.
///
/// # Errors
/// An operation that has no kernel.
pub fn kernels(program: &Program, codes: &BTreeSet<Code>) -> Result<BTreeSet<(Kernel, Code)>, LowerError> {
    let mut needed = BTreeSet::new();
    for code in codes {
        let schedule = Schedule::new(program, Target { family: code.family() })?;
        needed.extend(schedule.kernels().into_iter().map(|kernel| (kernel.clone(), *code)));
    }
    Ok(needed)
}
