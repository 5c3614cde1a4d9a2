//! The resources that a compiled kernel takes, and its defects, both read from the assembler's log.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Arch, Kernel};

/// The resources of a multiprocessor that one kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of statically declared shared memory of a CTA.
    pub static_shared: u32,
    /// Bytes of local memory of a thread: indexed arrays, and spilled registers.
    pub stack: u32,
    /// Bytes of spilled registers that are written, and that are read.
    pub spills: (u32, u32),
}

/// Something that makes a kernel slow, or impossible to launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Defect {
    /// The kernel needs more registers than it has.
    Spills {
        /// Bytes stored.
        stores: u32,
        /// Bytes loaded.
        loads: u32,
    },
    /// A warning of the compiler.
    Warning(String),
    /// The assembler serialised wgmma, or ignored setmaxnreg.
    Serialised(String),
    /// The kernel needs more registers or shared memory than the architecture gives a CTA.
    Unlaunchable(String),
}

impl Defect {
    /// Whether an engine may not hold a kernel with this defect.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(self, Defect::Serialised(_) | Defect::Unlaunchable(_))
    }
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Defect::Spills { stores, loads } => write!(f, "spills: {stores} bytes stored, {loads} loaded"),
            Defect::Warning(text) | Defect::Serialised(text) | Defect::Unlaunchable(text) => f.write_str(text),
        }
    }
}

impl Resources {
    /// Reads the log of `-Xptxas -v` for one kernel. Device functions that were not inlined count towards its stack and
    /// spills.
    #[must_use]
    pub fn from_log(log: &str) -> Option<Self> {
        let used =
            log.lines().find_map(|line| line.split("Used ").nth(1).filter(|rest| rest.contains(" registers")))?;
        let in_used = |what: &str| before(used, what).unwrap_or(0);
        let functions: Vec<&str> = log.lines().filter(|line| line.contains("bytes stack frame")).collect();
        let sum = |what: &str| functions.iter().filter_map(|line| before(line, what)).sum();
        if functions.is_empty() {
            return None;
        }
        Some(Resources {
            registers: before(used, " registers")?,
            static_shared: in_used(" bytes smem"),
            stack: sum(" bytes stack frame"),
            spills: (sum(" bytes spill stores"), sum(" bytes spill loads")),
        })
    }
}

/// The number that ends where `what` begins.
fn before(line: &str, what: &str) -> Option<u32> {
    let head = &line[..line.find(what)?];
    head.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Registers of a multiprocessor. All architectures from sm_80 on have the same.
const REGISTERS: u32 = 64 * 1024;

/// The defects of a kernel compiled for `arch`.
#[must_use]
pub fn defects(kernel: &Kernel, arch: Arch, resources: &Resources, log: &str) -> Vec<Defect> {
    let mut defects = warnings(log);
    let (stores, loads) = resources.spills;
    if stores > 0 || loads > 0 {
        defects.push(Defect::Spills { stores, loads });
    }
    // A warp gets registers in steps of eight a thread.
    let registers = resources.registers.next_multiple_of(8) * kernel.threads.next_multiple_of(32);
    if registers > REGISTERS {
        defects.push(Defect::Unlaunchable(format!(
            "{} threads of {} registers are more than the {REGISTERS} of {arch}; give it __launch_bounds__({})",
            kernel.threads, resources.registers, kernel.threads
        )));
    }
    let (shared, most) = (resources.static_shared + kernel.shared_bytes, arch.max_shared_bytes());
    if shared > most {
        defects.push(Defect::Unlaunchable(format!(
            "{shared} bytes of shared memory ({} static) are more than the {most} of a CTA on {arch}",
            resources.static_shared
        )));
    }
    defects
}

/// The warnings of compiler and assembler. The assembler reports a serialised wgmma, and a setmaxnreg that it ignores,
/// as a "potential performance loss".
#[must_use]
pub fn warnings(log: &str) -> Vec<Defect> {
    let mut defects = Vec::new();
    for line in log.lines().map(str::trim_end) {
        if line.contains("Potential Performance Loss") {
            defects.push(Defect::Serialised(
                line.split("info").last().unwrap_or(line).trim_matches([' ', ':']).to_owned(),
            ));
        } else if line.contains(": warning") || line.contains("ptxas warning") || line.contains("; warning") {
            defects.push(Defect::Warning(line.to_owned()));
        }
    }
    defects
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Family;

    const GOOD: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kILi8EEvPfi' for 'sm_80'
ptxas info    : Function properties for _Z1kILi8EEvPfi
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 364 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 6.538 ms";

    const BAD: &str = "\
mixtral.cu(3): warning #177-D: variable \"unused\" was declared but never referenced
    int unused;
        ^
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
ptxas info    : (C7519) warpgroup.arrive is injected in around line 78 by compiler to allow use of registers in GMMA
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to something
ptxas info    : Compiling entry function '_Z1kPfi' for 'sm_90a'
ptxas info    : Function properties for _Z1kPfi
ptxas         .     4400 bytes stack frame, 8928 bytes spill stores, 8976 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 4400 bytes cumulative stack size, 60000 bytes smem
ptxas info    : Function properties for _Z3foof
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads";

    fn kernel() -> Kernel {
        let symbol = "k<8>".to_owned();
        Kernel { header: "k.cuh".into(), symbol, threads: 384, shared_bytes: 200_000, family: Family::Hopper }
    }

    #[test]
    fn resources_are_read_from_the_log() {
        let good = Resources { registers: 40, static_shared: 128, stack: 0, spills: (0, 0) };
        assert_eq!(Resources::from_log(GOOD), Some(good));
        let bad = Resources { registers: 255, static_shared: 60_000, stack: 4408, spills: (8932, 8980) };
        assert_eq!(Resources::from_log(BAD), Some(bad));
        assert_eq!(Resources::from_log(""), None);
        assert_eq!(Resources::from_log(&GOOD.replace("stack frame", "frame of stack")), None, "no word of spills");
    }

    #[test]
    fn every_kind_of_defect_is_seen() {
        let of = |log| defects(&kernel(), Arch::SM_90A, &Resources::from_log(log).expect("complete"), log);
        assert_eq!(of(GOOD), []);
        let texts: Vec<_> = of(BAD).iter().map(|d| (d.is_fatal(), d.to_string())).collect();
        let expected = [
            (false, "mixtral.cu(3): warning #177-D: variable \"unused\" was declared but never referenced"),
            (
                true,
                "(C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.",
            ),
            (true, "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to something"),
            (false, "spills: 8932 bytes stored, 8980 loaded"),
            (true, "384 threads of 255 registers are more than the 65536 of sm_90a; give it __launch_bounds__(384)"),
            (true, "260000 bytes of shared memory (60000 static) are more than the 232448 of a CTA on sm_90a"),
        ];
        assert_eq!(texts, expected.map(|(fatal, text)| (fatal, text.to_owned())));
    }
}
