//! The kernel plans of linears, dense and by expert. A rung of a ladder names one. Rows are output features (the M side
//! of the tensor cores' products), columns are tokens.

use std::fmt;
use std::str::FromStr;

/// Token counts at which kernels change. At 704 fp8's experts go from one tile of 192 tokens to two of 144.
pub const RUNGS: [usize; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 704];

/// The last rung. Steps of more tokens are not captured as graphs.
pub const LAST_RUNG: usize = RUNGS[RUNGS.len() - 1];

/// How a linear is computed for token counts up to a rung's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinearPlan {
    /// Plain multiply-add in f32, for any type and shape.
    Simt,
    /// cp.async and mma.sync, in tiles of `rows` by `cols`.
    Mma {
        /// Rows of a tile: a multiple of 16.
        rows: u32,
        /// Columns of a tile: a multiple of 8.
        cols: u32,
    },
    /// TMA and wgmma: `warpgroups` consumers, each with `per_warpgroup` blocks of 64 rows.
    Wgmma {
        /// Rows that a tile loads and stores: at most 64 · warpgroups · per_warpgroup.
        rows: u32,
        /// The most columns of a tile. A tile of fewer tokens uses narrower instructions.
        cols: u32,
        /// Elements of K in a stage: a multiple of 64.
        depth: u32,
        /// Stages of the ring.
        stages: u32,
        /// Consumer warpgroups.
        warpgroups: u32,
        /// CTAs of a cluster, which share a tile of tokens: a power of two.
        cluster: u32,
        /// Whether a CTA takes its next tile when it becomes free. Else its tiles are fixed beforehand.
        dynamic: bool,
    },
    /// Bulk copies and mma.sync, for few tokens and packed weights: each warp streams weights through a ring of its own.
    Stream(Stream),
    /// cp.async and mma.sync, for few tokens: each warp streams strips of 16 rows through a ring of its own.
    Strip(Strip),
    /// cuBLASLt's product, with the algorithm that cuBLASLt chooses at run time. Used only where the user asked for it,
    /// because with it a row's bits depend on the other rows.
    CublasLt,
}

/// The numbers of [`LinearPlan::Strip`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Strip {
    /// Warps of a CTA.
    pub warps: u32,
    /// The most columns of a tile.
    pub cols: u32,
    /// Stages of a warp's ring.
    pub stages: u32,
}

/// The numbers of [`LinearPlan::Stream`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream {
    /// The most columns of a tile.
    pub cols: u32,
    /// The most tokens in shared memory: of one tile, or of several that lie one behind the other.
    pub rows: u32,
    /// Warps that multiply.
    pub warps: u32,
    /// Warps that share a slab of 16 rows along K.
    pub split: u32,
    /// Blocks of 128 elements of K in a stage of a warp's ring.
    pub blocks: u32,
    /// Stages of a warp's ring.
    pub stages: u32,
    /// Blocks of each warp's part of K in a stage of tokens.
    pub token_blocks: u32,
    /// Stages of tokens.
    pub token_stages: u32,
}

/// A text that is not a plan's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a kernel plan; this engine is of another version, build it again")]
pub struct PlanError(pub String);

impl fmt::Display for LinearPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LinearPlan::Simt => write!(f, "simt"),
            LinearPlan::Mma { rows, cols } => write!(f, "mma:{rows}x{cols}"),
            LinearPlan::Wgmma { rows, cols, depth, stages, warpgroups, cluster, dynamic } => {
                write!(f, "wgmma:{rows}x{cols}:k{depth}:s{stages}:w{warpgroups}:c{cluster}")?;
                if *dynamic { write!(f, ":dynamic") } else { Ok(()) }
            }
            LinearPlan::Stream(Stream { cols, rows, warps, split, blocks, stages, token_blocks, token_stages }) => {
                write!(f, "stream:{rows}x{cols}:w{warps}:p{split}:b{blocks}:s{stages}:t{token_blocks}x{token_stages}")
            }
            LinearPlan::Strip(Strip { warps, cols, stages }) => write!(f, "strip:16x{cols}:w{warps}:s{stages}"),
            LinearPlan::CublasLt => write!(f, "cublaslt"),
        }
    }
}

impl FromStr for LinearPlan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let error = || PlanError(text.to_owned());
        let mut words = text.split(':');
        let kind = words.next().ok_or_else(error)?;
        let tile = |word: Option<&str>| -> Result<(u32, u32), PlanError> {
            let (rows, cols) = word.and_then(|w| w.split_once('x')).ok_or_else(error)?;
            Ok((rows.parse().map_err(|_| error())?, cols.parse().map_err(|_| error())?))
        };
        let number = |word: Option<&str>, prefix: char| -> Result<u32, PlanError> {
            word.and_then(|w| w.strip_prefix(prefix)).and_then(|w| w.parse().ok()).ok_or_else(error)
        };
        let plan = match kind {
            "simt" => LinearPlan::Simt,
            "mma" => {
                let (rows, cols) = tile(words.next())?;
                LinearPlan::Mma { rows, cols }
            }
            "wgmma" => {
                let (rows, cols) = tile(words.next())?;
                let (depth, stages) = (number(words.next(), 'k')?, number(words.next(), 's')?);
                let (warpgroups, cluster) = (number(words.next(), 'w')?, number(words.next(), 'c')?);
                let dynamic = words.clone().next() == Some("dynamic");
                if dynamic {
                    words.next();
                }
                LinearPlan::Wgmma { rows, cols, depth, stages, warpgroups, cluster, dynamic }
            }
            "stream" => {
                let (rows, cols) = tile(words.next())?;
                let (warps, split) = (number(words.next(), 'w')?, number(words.next(), 'p')?);
                let (blocks, stages) = (number(words.next(), 'b')?, number(words.next(), 's')?);
                let (token_blocks, token_stages) = tile(words.next().and_then(|w| w.strip_prefix('t')))?;
                LinearPlan::Stream(Stream { cols, rows, warps, split, blocks, stages, token_blocks, token_stages })
            }
            "strip" => {
                let (16, cols) = tile(words.next())? else { return Err(error()) };
                let (warps, stages) = (number(words.next(), 'w')?, number(words.next(), 's')?);
                LinearPlan::Strip(Strip { warps, cols, stages })
            }
            "cublaslt" => LinearPlan::CublasLt,
            _ => return Err(error()),
        };
        if words.next().is_some() { Err(error()) } else { Ok(plan) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_back() {
        let plans = [
            LinearPlan::Simt,
            LinearPlan::Mma { rows: 64, cols: 32 },
            LinearPlan::Strip(Strip { warps: 3, cols: 8, stages: 10 }),
            LinearPlan::Wgmma { rows: 48, cols: 8, depth: 128, stages: 5, warpgroups: 1, cluster: 1, dynamic: false },
            LinearPlan::Wgmma { rows: 128, cols: 256, depth: 64, stages: 4, warpgroups: 2, cluster: 2, dynamic: true },
            LinearPlan::Stream(Stream {
                cols: 1,
                rows: 2,
                warps: 14,
                split: 7,
                blocks: 4,
                stages: 3,
                token_blocks: 16,
                token_stages: 1,
            }),
            LinearPlan::CublasLt,
        ];
        for plan in plans {
            let text = plan.to_string();
            assert_eq!(text.parse(), Ok(plan));
            // It stands in a program's text, where spaces separate operands.
            assert!(!text.contains(' '), "{text}");
        }
        for text in [
            "",
            "mma",
            "mma:64",
            "simt:3",
            "cublaslt:1",
            "stream:8x8:w15:p1:b4:s2",
            "stream:8x8:w15:p1:b4:s2:t4",
            "wgmma:64x8:k128:s5",
            "wgmma:64x8:k128:s5:w1",
            "wgmma:64x8:k128:s5:w1:c1:x",
        ] {
            assert!(text.parse::<LinearPlan>().is_err(), "{text}");
        }
    }
}
