//! The kernel that measures how fast a device reads its memory.

use super::{named, portable};
use crate::{Arg, Grid, Launch, ProbeArg};

/// The launch of `probe::read<8>`, by any number of CTAs.
pub(super) fn read() -> Launch {
    Launch {
        kernel: portable("probe/read.cuh", "probe::read<8>".to_owned(), 512),
        grid: Grid::Persistent { per_sm: 1, items: None },
        cluster: 1,
        args: named([
            ("data", Arg::Probe(ProbeArg::Data)),
            ("count", Arg::Probe(ProbeArg::Words)),
            ("out", Arg::Probe(ProbeArg::Out)),
        ]),
        op: 0,
        overlaps: false,
    }
}
