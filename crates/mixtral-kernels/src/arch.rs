//! Architectures that kernels are compiled for.

use std::fmt;
use std::str::FromStr;

/// Which kernels a program is lowered to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// cp.async and mma.sync, any shape, compute capability 8.0 and up.
    Portable,
    /// TMA and wgmma where the shape allows them, portable kernels for the rest. sm_90a only.
    Hopper,
}

/// An architecture, by its compute capability. `sm_90a` is Hopper with its own instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch {
    /// Major and minor version as one number: 80, 86, 90 …
    pub capability: u32,
    /// Whether instructions of this architecture alone are used (the suffix `a`).
    pub specific: bool,
}

impl Arch {
    /// The architecture whose PTX the portable kernels are also kept as.
    pub const BASE: Arch = Arch { capability: 80, specific: false };
    /// Hopper.
    pub const SM_90A: Arch = Arch { capability: 90, specific: true };

    /// The fastest family that it runs.
    #[must_use]
    pub fn family(self) -> Family {
        if self == Arch::SM_90A { Family::Hopper } else { Family::Portable }
    }

    /// Bytes of shared memory that a CTA can have.
    #[must_use]
    pub fn max_shared_bytes(self) -> u32 {
        1024 * match self.capability {
            80 | 87 => 163,
            90 | 100 | 103 => 227,
            // 8.6, 8.9 and 12.0.
            _ => 99,
        }
    }
}

/// Not an architecture's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an architecture; expected sm_80, sm_86, sm_89, sm_90, sm_90a, sm_100 or sm_120")]
pub struct ArchError(pub String);

impl FromStr for Arch {
    type Err = ArchError;

    fn from_str(text: &str) -> Result<Self, ArchError> {
        let error = || ArchError(text.to_owned());
        let digits = text.strip_prefix("sm_").ok_or_else(error)?;
        let (digits, specific) = match digits.strip_suffix('a') {
            Some(digits) => (digits, true),
            None => (digits, false),
        };
        let capability = digits.parse().map_err(|_| error())?;
        let arch = Arch { capability, specific };
        let known = [80, 86, 87, 89, 90, 100, 103, 120].contains(&capability) && (!specific || capability == 90);
        if known { Ok(arch) } else { Err(error()) }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.capability, if self.specific { "a" } else { "" })
    }
}
