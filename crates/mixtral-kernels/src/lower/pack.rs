//! Packing of quantized weights, which happens once, when an engine is loaded.

use mixtral_engine::Program;

use super::{named, type_name};
use crate::weight::{Packing, WeightRows};
use crate::{Arg, Family, Grid, Kernel, Launch, NamedArg, Pack, PackArg};

/// The packs of a program: a launch for each kind of quantized weight, with the weights of that kind.
pub(super) fn packs(program: &Program) -> Vec<Pack> {
    let mut packs: Vec<Pack> = Vec::new();
    for index in 0..program.weights.len() {
        let Some((packing, launch)) = Packing::of(program, index).and_then(|p| Some((p, launch(&p)?))) else {
            continue;
        };
        match packs.iter_mut().find(|pack| pack.launch == launch) {
            Some(pack) => pack.weights.push(index),
            None => packs.push(Pack { weights: vec![index], bytes: packing.bytes(), launch }),
        }
    }
    packs
}

/// The launch that packs a matrix; `None` if the weight stays as it is.
fn launch(packing: &Packing) -> Option<Launch> {
    let WeightRows::Quantized(_, quantization) = packing.format else { return None };
    let symbol = format!(
        "weight::pack<{}, {}, {}, {}, {}>",
        packing.symbol(0),
        type_name(quantization.scale),
        packing.rows,
        packing.cols,
        packing.interleaved
    );
    let family = Family::Portable;
    Some(Launch {
        kernel: Kernel { header: "weight/pack.cuh".into(), symbol, threads: 256, shared_bytes: 0, family },
        grid: Grid::Persistent { per_sm: 8, items: None },
        cluster: 1,
        args: named([
            ("values", Arg::Pack(PackArg::Values)),
            ("scales", Arg::Pack(PackArg::Scales)),
            ("zeros", Arg::Pack(PackArg::Zeros)),
            ("out", Arg::Pack(PackArg::Out)),
            ("expert", Arg::Pack(PackArg::Expert)),
        ]),
        op: 0,
        overlaps: false,
    })
}

impl Pack {
    /// The launch that packs matrix `expert` of weight `index`. Its integers, scales and zeros lie at the offsets `parts`
    /// of the memory in which weights wait.
    #[must_use]
    pub fn of_matrix(&self, index: usize, expert: usize, parts: [usize; 3]) -> Launch {
        let value = |what| match what {
            PackArg::Values => Arg::Staged(parts[0]),
            PackArg::Scales => Arg::Staged(parts[1]),
            PackArg::Zeros => Arg::Staged(parts[2]),
            PackArg::Out => Arg::Weight { index, offset: 0 },
            PackArg::Expert => super::int(expert),
        };
        let of_matrix = |named: &NamedArg| match &named.arg {
            Arg::Pack(what) => NamedArg { name: named.name.clone(), arg: value(*what) },
            _ => named.clone(),
        };
        Launch { args: self.launch.args.iter().map(of_matrix).collect(), ..self.launch.clone() }
    }
}
