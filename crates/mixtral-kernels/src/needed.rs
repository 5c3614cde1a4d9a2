//! What has to be compiled for a program to run on given architectures.

use std::collections::BTreeSet;

use mixtral_engine::Program;

use crate::compile::Code;
use crate::{Arch, Kernel, LowerError, Schedule, Target, lower};

/// What engines for `archs` hold code of: those, and portable assembly for architectures to come.
#[must_use]
pub fn codes(archs: &[Arch]) -> BTreeSet<Code> {
    archs.iter().map(|arch| Code::Sass(*arch)).chain([Code::Ptx(Arch::BASE)]).collect()
}

/// The kernels that `program` launches, that fill its weights if they are dummies, and that measure the device; for each of
/// `codes`.
///
/// # Errors
/// An operation that has no kernel.
pub fn kernels(program: &Program, codes: &BTreeSet<Code>) -> Result<BTreeSet<(Kernel, Code)>, LowerError> {
    let mut needed = BTreeSet::new();
    for code in codes {
        let schedule = Schedule::new(program, Target { family: code.family() })?;
        let own = schedule.kernels().into_iter().cloned();
        let others = lower::dummy::kernels(program).into_iter().chain([lower::probe::read()]);
        needed.extend(own.chain(others).map(|kernel| (kernel, *code)));
    }
    Ok(needed)
}
