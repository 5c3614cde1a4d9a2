//! Dummy weights, generated on the device with the same bits as [`mixtral_engine::dummy`].

use std::collections::BTreeSet;
use std::ops::Range;

use mixtral_engine::{Program, Weight, dummy};
use mixtral_model::{Bits, DType, PartKind, Piece, Quantization, WeightFormat};

use super::{named, type_name};
use crate::weight::part_offsets;
use crate::{Arg, Family, Fill, Grid, Kernel, Launch, NamedArg, PieceArg};

const fn number(bits: Bits) -> u8 {
    match bits {
        Bits::Four => 4,
        Bits::Eight => 8,
    }
}

/// What has to be written into a piece of `weight`, in the order of the weight's parts.
pub(crate) fn fills_of(weight: &Weight) -> Vec<Fill> {
    match weight.format {
        WeightFormat::Plain => vec![Fill::Elements(weight.dtype)],
        WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => vec![Fill::Fp8, Fill::Elements(DType::F32)],
        WeightFormat::Quantized(Quantization { bits, scale, zeros, .. }) => {
            let zeros = zeros.then_some(Fill::Zeros(number(bits)));
            [Fill::Integers(number(bits)), Fill::Scales(scale)].into_iter().chain(zeros).collect()
        }
    }
}

/// The launch that fills a piece.
fn launch(fill: Fill) -> Launch {
    let symbol = match fill {
        Fill::Elements(dtype) => format!("dummy::fill<{}>", type_name(dtype)),
        Fill::Integers(bits) => format!("dummy::fill_integers<{bits}>"),
        Fill::Scales(dtype) => format!("dummy::fill_scales<{}>", type_name(dtype)),
        Fill::Zeros(bits) => format!("dummy::fill_zeros<{bits}>"),
        Fill::Fp8 => "dummy::fill_fp8<e4m3_t>".to_owned(),
    };
    let (header, family) = ("dummy/fill.cuh".into(), Family::Portable);
    let mut args = named([
        ("out", Arg::Piece(PieceArg::Out)),
        ("key", Arg::Piece(PieceArg::Key)),
        ("first", Arg::Piece(PieceArg::First)),
        ("rows", Arg::Piece(PieceArg::Rows)),
        ("cols", Arg::Piece(PieceArg::Cols)),
        ("source_cols", Arg::Piece(PieceArg::SourceCols)),
    ]);
    if matches!(fill, Fill::Elements(_) | Fill::Scales(_) | Fill::Fp8) {
        args.extend(named([("scale", Arg::Piece(PieceArg::Scale))]));
    }
    if matches!(fill, Fill::Elements(_)) {
        args.extend(named([("bias", Arg::Piece(PieceArg::Bias))]));
    }
    Launch {
        kernel: Kernel { header, symbol, threads: 256, shared_bytes: 0, family },
        grid: Grid::Persistent { per_sm: 8, items: None },
        cluster: 1,
        args,
        op: 0,
        overlaps: false,
    }
}

/// The launches that fill a piece of a program's dummy weights, one for everything that has to be written. Empty if the
/// weights come from a file.
pub(super) fn fills(program: &Program) -> Vec<(Fill, Launch)> {
    let dummies = program.weights.iter().filter(|weight| !weight.pieces.is_empty());
    let fills: BTreeSet<Fill> = dummies.flat_map(fills_of).collect();
    fills.into_iter().map(|fill| (fill, launch(fill))).collect()
}

/// The launches that fill the weights of a program that are not packed, one a piece, made from `fills`. Parts of a weight that no piece
/// covers are not written; they have to be zero already.
///
/// # Errors
/// What `fills` has no launch for.
pub fn launches(program: &Program, fills: &[(Fill, Launch)], seed: u64) -> Result<Vec<Launch>, Fill> {
    let mut launches = Vec::new();
    for (index, weight) in program.weights.iter().enumerate() {
        let (fill, size) = match weight.format {
            WeightFormat::Plain => (Fill::Elements(weight.dtype), weight.dtype.size()),
            WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => (Fill::Fp8, 1),
            // Packed weights have launches of their own.
            WeightFormat::Quantized(_) => continue,
        };
        for piece in &weight.pieces {
            let out = Arg::Weight { index, offset: piece.target_row * weight.cols() * size };
            launches.push(of_piece(fills, fill, &Target { weight, piece, rows: piece.rows.clone(), out, seed })?);
        }
        if let (true, Some(piece)) = (weight.format.is_fp8(), weight.pieces.first()) {
            let (starts, _) = part_offsets(weight);
            for (part, offset) in weight.format.parts(weight.dtype, &weight.shape).iter().zip(starts).skip(1) {
                let scale = match part.kind {
                    PartKind::InputScale => dummy::FP8_INPUT_SCALE,
                    _ => dummy::scale_of_fp8(piece.source_cols),
                };
                launches.push(of_scales(fills, Arg::Weight { index, offset }, part.num_bytes() / 4, scale)?);
            }
        }
    }
    Ok(launches)
}

/// The launch that writes `count` times the same f32.
fn of_scales(fills: &[(Fill, Launch)], out: Arg, count: usize, scale: f32) -> Result<Launch, Fill> {
    of_values(fills, Fill::Elements(DType::F32), |what| match what {
        PieceArg::Out => out.clone(),
        PieceArg::Key | PieceArg::First => Arg::U64(0),
        PieceArg::Rows => Arg::U64(1),
        PieceArg::Cols | PieceArg::SourceCols => Arg::U64(count as u64),
        PieceArg::Scale => Arg::F32(0.0),
        PieceArg::Bias => Arg::F32(scale),
    })
}

/// The launches that fill the parts of matrix `expert` of a quantized weight. They begin at the offsets `parts` of the
/// memory in which weights wait to be packed, which has to be zero already.
///
/// # Errors
/// What `fills` has no launch for.
pub fn of_matrix(
    weight: &Weight,
    fills: &[(Fill, Launch)],
    seed: u64,
    expert: Range<usize>,
    parts: [usize; 3],
) -> Result<Vec<Launch>, Fill> {
    let mut launches = Vec::new();
    let tensors = weight.format.parts(weight.dtype, &weight.shape);
    for piece in &weight.pieces {
        // The rows of the piece that are the matrix's.
        let covered = piece.target_row..piece.target_row + piece.rows.len();
        let (start, end) = (covered.start.max(expert.start), covered.end.min(expert.end));
        if start >= end {
            continue;
        }
        let first = piece.rows.start + start - covered.start;
        for ((fill, part), at) in fills_of(weight).into_iter().zip(&tensors).zip(parts) {
            let out = Arg::Staged(at + (start - expert.start) * part.row_bytes());
            launches.push(of_piece(
                fills,
                fill,
                &Target { weight, piece, rows: first..first + end - start, out, seed },
            )?);
        }
    }
    Ok(launches)
}

/// Rows of a piece, and where they are written.
struct Target<'a> {
    weight: &'a Weight,
    piece: &'a Piece,
    /// Rows of the source tensor.
    rows: Range<usize>,
    out: Arg,
    seed: u64,
}

fn of_piece(fills: &[(Fill, Launch)], fill: Fill, target: &Target<'_>) -> Result<Launch, Fill> {
    of_values(fills, fill, |what| target.value(fill, what))
}

/// The launch for `fill` with these values.
fn of_values(fills: &[(Fill, Launch)], fill: Fill, value: impl Fn(PieceArg) -> Arg) -> Result<Launch, Fill> {
    let (_, launch) = fills.iter().find(|(found, _)| *found == fill).ok_or(fill)?;
    let of_piece = |arg: &NamedArg| match &arg.arg {
        Arg::Piece(what) => NamedArg { name: arg.name.clone(), arg: value(*what) },
        _ => arg.clone(),
    };
    Ok(Launch { args: launch.args.iter().map(of_piece).collect(), ..launch.clone() })
}

impl Target<'_> {
    fn value(&self, fill: Fill, what: PieceArg) -> Arg {
        let Target { weight, piece, rows, out, seed } = self;
        let quantization = match weight.format {
            WeightFormat::Quantized(quantization) => Some(quantization),
            WeightFormat::Plain | WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => None,
        };
        // Scales and zeros have a column for each group.
        let grouped = quantization.filter(|_| matches!(fill, Fill::Scales(_) | Fill::Zeros(_)));
        let columns = |cols: usize| grouped.map_or(cols, |q| q.groups(cols)) as u64;
        let source_cols = piece.source_cols;
        match what {
            PieceArg::Out => out.clone(),
            PieceArg::Key => Arg::U64(match fill {
                Fill::Elements(_) | Fill::Integers(_) | Fill::Fp8 => dummy::key(*seed, &piece.source),
                Fill::Scales(_) => dummy::key(*seed, &format!("{}.scales", piece.source)),
                Fill::Zeros(_) => dummy::key(*seed, &format!("{}.zeros", piece.source)),
            }),
            PieceArg::First => {
                let column = grouped.map_or(piece.cols.start, |q| piece.cols.start / q.group_len(source_cols));
                Arg::U64(rows.start as u64 * columns(source_cols) + column as u64)
            }
            PieceArg::Rows => Arg::U64(rows.len() as u64),
            PieceArg::Cols => Arg::U64(columns(weight.cols())),
            PieceArg::SourceCols => Arg::U64(columns(source_cols)),
            // A norm's weights are 1 everywhere.
            PieceArg::Scale => Arg::F32(match quantization {
                Some(quantization) => dummy::scale_of_integers(source_cols, quantization.bits),
                None if dummy::is_norm(&piece.source) => 0.0,
                None => dummy::scale(source_cols),
            }),
            PieceArg::Bias => Arg::F32(if dummy::is_norm(&piece.source) { 1.0 } else { 0.0 }),
        }
    }
}
