//! What has to be compiled for a program to run on given architectures.

use std::collections::{BTreeMap, BTreeSet};

use mixtral_engine::Program;

use crate::compile::Code;
use crate::{Arch, Family, Kernel, LowerError, Schedule, Target};

/// The kinds of code that an engine for `archs` holds: machine code for each, and portable assembly for architectures
/// to come.
#[must_use]
pub fn codes(archs: &[Arch]) -> BTreeSet<Code> {
    archs.iter().map(|arch| Code::Sass(*arch)).chain([Code::Ptx(Arch::BASE)]).collect()
}

/// The schedules of a program, one for each family that `codes` belong to.
///
/// # Errors
/// An operation that has no kernel.
pub fn schedules(program: &Program, codes: &BTreeSet<Code>) -> Result<BTreeMap<Family, Schedule>, LowerError> {
    let families: BTreeSet<Family> = codes.iter().map(|code| code.family()).collect();
    families.into_iter().map(|family| Ok((family, Schedule::new(program, Target { family })?))).collect()
}

/// The kernels to compile: for each of `codes`, those that the schedule of its family launches.
#[must_use]
pub fn kernels(schedules: &BTreeMap<Family, Schedule>, codes: &BTreeSet<Code>) -> BTreeSet<(Kernel, Code)> {
    let of = |code: &Code| {
        let kernels = schedules.get(&code.family()).map(Schedule::kernels).unwrap_or_default();
        kernels.into_iter().map(|kernel| (kernel.clone(), *code)).collect::<Vec<_>>()
    };
    codes.iter().flat_map(of).collect()
}
