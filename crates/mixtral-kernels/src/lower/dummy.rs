//! Dummy weights, generated on the device with the same bits as [`mixtral_engine::dummy`].

use std::collections::BTreeSet;

use mixtral_engine::{Program, Weight, dummy};
use mixtral_model::{DType, Piece};

use super::{named, type_name};
use crate::{Arg, Family, Grid, Kernel, Launch, NamedArg, PieceArg};

/// `dummy::fill<T>`, which writes a piece of a tensor.
fn kernel(dtype: DType) -> Kernel {
    Kernel {
        header: "dummy/fill.cuh".into(),
        symbol: format!("dummy::fill<{}>", type_name(dtype)),
        threads: 256,
        shared_bytes: 0,
        family: Family::Portable,
    }
}

/// The launch that fills a piece, one for each data type of a program's dummy weights. Empty if the weights come from a
/// file.
pub(super) fn fills(program: &Program) -> Vec<(DType, Launch)> {
    let dtypes: BTreeSet<DType> =
        program.weights.iter().filter(|weight| !weight.pieces.is_empty()).map(|weight| weight.dtype).collect();
    let launch = |dtype| Launch {
        kernel: kernel(dtype),
        grid: Grid::Persistent { per_sm: 8, items: None },
        cluster: 1,
        args: named([
            ("out", Arg::Piece(PieceArg::Out)),
            ("key", Arg::Piece(PieceArg::Key)),
            ("first", Arg::Piece(PieceArg::First)),
            ("rows", Arg::Piece(PieceArg::Rows)),
            ("cols", Arg::Piece(PieceArg::Cols)),
            ("source_cols", Arg::Piece(PieceArg::SourceCols)),
            ("scale", Arg::Piece(PieceArg::Scale)),
            ("bias", Arg::Piece(PieceArg::Bias)),
        ]),
        op: 0,
        overlaps: false,
    };
    dtypes.into_iter().map(|dtype| (dtype, launch(dtype))).collect()
}

/// The launches that fill a program's weights, one a piece, made from `fills`. Parts of a weight that no piece covers
/// are not written; they have to be zero already.
///
/// # Errors
/// The data type of a dummy weight for which `fills` has no launch.
pub fn launches(program: &Program, fills: &[(DType, Launch)], seed: u64) -> Result<Vec<Launch>, DType> {
    let mut launches = Vec::new();
    for (index, weight) in program.weights.iter().enumerate() {
        for piece in &weight.pieces {
            let (_, fill) = fills.iter().find(|(dtype, _)| *dtype == weight.dtype).ok_or(weight.dtype)?;
            let of_piece = |arg: &NamedArg| match &arg.arg {
                Arg::Piece(what) => NamedArg { name: arg.name.clone(), arg: value(*what, index, weight, piece, seed) },
                _ => arg.clone(),
            };
            launches.push(Launch { args: fill.args.iter().map(of_piece).collect(), ..fill.clone() });
        }
    }
    Ok(launches)
}

fn value(what: PieceArg, index: usize, weight: &Weight, piece: &Piece, seed: u64) -> Arg {
    // A norm's weights are 1 everywhere.
    let is_norm = dummy::is_norm(&piece.source);
    match what {
        PieceArg::Out => Arg::Weight { index, offset: piece.target_row * weight.cols() * weight.dtype.size() },
        PieceArg::Key => Arg::U64(dummy::key(seed, &piece.source)),
        PieceArg::First => Arg::U64(piece.rows.start as u64 * piece.source_cols as u64 + piece.cols.start as u64),
        PieceArg::Rows => Arg::U64(piece.rows.len() as u64),
        PieceArg::Cols => Arg::U64(weight.cols() as u64),
        PieceArg::SourceCols => Arg::U64(piece.source_cols as u64),
        PieceArg::Scale => Arg::F32(if is_norm { 0.0 } else { dummy::scale(piece.source_cols) }),
        PieceArg::Bias => Arg::F32(if is_norm { 1.0 } else { 0.0 }),
    }
}
