//! Dummy weights, generated on the device: the bits of [`mixtral_engine::dummy`].

use std::collections::BTreeSet;

use mixtral_engine::{Program, dummy};
use mixtral_model::DType;

use super::type_name;
use crate::{Arg, Family, Grid, Kernel, Launch};

/// `dummy::fill<T>`, which writes a piece of a tensor.
#[must_use]
pub fn kernel(dtype: DType) -> Kernel {
    Kernel {
        header: "dummy/fill.cuh",
        symbol: format!("dummy::fill<{}>", type_name(dtype)),
        threads: 256,
        shared_bytes: 0,
        family: Family::Portable,
    }
}

/// The kernels that fill a program's weights; none if they come from a file.
#[must_use]
pub fn kernels(program: &Program) -> BTreeSet<Kernel> {
    program.weights.iter().filter(|weight| !weight.pieces.is_empty()).map(|weight| kernel(weight.dtype)).collect()
}

/// The launches that fill a program's weights, one a piece. What no piece covers stays as it is, which has to be zero.
/// Parameters, in order: `T* out, u64 key, u64 first, u64 rows, u64 cols, u64 source_cols, float scale, float bias`.
#[must_use]
pub fn launches(program: &Program, seed: u64) -> Vec<Launch> {
    let weights = program.weights.iter().enumerate();
    let pieces = weights.flat_map(|(index, weight)| weight.pieces.iter().map(move |piece| (index, weight, piece)));
    let launch = |(index, weight, piece): (usize, &mixtral_engine::Weight, &mixtral_model::Piece)| {
        let offset = piece.target_row * weight.cols() * weight.dtype.size();
        let first = piece.rows.start as u64 * piece.source_cols as u64 + piece.cols.start as u64;
        // A norm's weights are 1 everywhere.
        let (scale, bias) =
            if dummy::is_norm(&piece.source) { (0.0, 1.0) } else { (dummy::scale(piece.source_cols), 0.0) };
        Launch {
            kernel: kernel(weight.dtype),
            grid: Grid::Persistent { per_sm: 8, items: None },
            cluster: 1,
            args: vec![
                Arg::Weight { index, offset },
                Arg::U64(dummy::key(seed, &piece.source)),
                Arg::U64(first),
                Arg::U64(piece.rows.len() as u64),
                Arg::U64(weight.cols() as u64),
                Arg::U64(piece.source_cols as u64),
                Arg::F32(scale),
                Arg::F32(bias),
            ],
            op: 0,
            overlaps: false,
        }
    };
    pieces.map(launch).collect()
}
