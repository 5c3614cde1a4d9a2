//! Architectures that kernels are compiled for.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The set of kernels that a program is lowered to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Kernels with cp.async and mma.sync, for any shape, from compute capability 8.0 up.
    Portable,
    /// Kernels with TMA and wgmma where the shape allows them, and portable kernels for the rest. For sm_90a only.
    Hopper,
}

/// An architecture, by its compute capability. `sm_90a` is Hopper with its own instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch {
    /// Major and minor version as one number: 80, 86, 90 …
    pub capability: u32,
    /// Whether code may use instructions that only this architecture has (the suffix `a`).
    pub specific: bool,
}

/// The compute capabilities that [`Arch`] has names for.
const KNOWN: [u32; 8] = [80, 86, 87, 89, 90, 100, 103, 120];

impl Arch {
    /// The architecture whose PTX every engine also holds the portable kernels as.
    pub const BASE: Arch = Arch { capability: 80, specific: false };
    /// Hopper.
    pub const SM_90A: Arch = Arch { capability: 90, specific: true };

    /// The fastest family that it can run.
    #[must_use]
    pub fn family(self) -> Family {
        if self == Arch::SM_90A { Family::Hopper } else { Family::Portable }
    }

    /// The architecture to build for, so that kernels run fast on a device of this compute capability (90 for 9.0).
    /// `None` if no kernels run on the device.
    #[must_use]
    pub fn native(capability: u32) -> Option<Arch> {
        match capability {
            90 => Some(Arch::SM_90A),
            _ if KNOWN.contains(&capability) => Some(Arch { capability, specific: false }),
            // Unknown here, but newer than the base: the driver compiles the base's PTX for it.
            _ => (capability >= Arch::BASE.capability).then_some(Arch::BASE),
        }
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
        let known = KNOWN.contains(&capability) && (!specific || capability == 90);
        if known { Ok(arch) } else { Err(error()) }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.capability, if self.specific { "a" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_devices_have_one() {
        for name in ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_120"] {
            assert_eq!(name.parse::<Arch>().map(|arch| arch.to_string()), Ok(name.to_owned()));
        }
        for name in ["sm_75", "sm_80a", "80", "sm_", "compute_80", "sm_90aa"] {
            assert_eq!(name.parse::<Arch>(), Err(ArchError(name.to_owned())));
        }
        let native = |capability| Arch::native(capability).map(|arch| arch.to_string());
        for (capability, expected) in
            [(75, None), (80, Some("sm_80")), (88, Some("sm_80")), (89, Some("sm_89")), (90, Some("sm_90a"))]
        {
            assert_eq!(native(capability).as_deref(), expected);
        }
    }
}
