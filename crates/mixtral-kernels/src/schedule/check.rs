//! What a schedule may ask for. A schedule that was read from a file passes through [`Schedule::check`] before a
//! backend sees it, so a backend can index by its numbers and use its addresses.

use mixtral_engine::Program;
use mixtral_model::WeightFormat;

use super::text::ScheduleError;
use super::{Regime, Schedule};
use crate::lower::dummy::fills_of;
use crate::step_block::{ALIGN, Place};
use crate::{Arg, Exchange, Grid, Launch, Product, TensorMap, Work};

/// The most parameters of a kernel.
pub const MAX_ARGS: usize = 32;
/// The most threads of a CTA.
const MAX_THREADS: u32 = 1024;
/// The most bytes of shared memory that a CTA can have on any architecture.
const MAX_SHARED: u32 = 227 << 10;
/// The most CTAs of a cluster that a kernel can have without asking the driver for more.
const MAX_CLUSTER: u32 = 8;
/// The most CTAs of a launch.
const MAX_GRID: u64 = (1 << 31) - 1;
/// The most dimensions of a tensor map.
const MAX_RANK: usize = 5;
/// The most bytes of one allocation. Sums of a few of these cannot overflow.
const MAX_BYTES: usize = 1 << 48;

impl Schedule {
    /// Checks that every index is one of the program's, that every launch is one that a driver accepts, and that every
    /// address lies within its memory, as far as the schedule tells how much memory is accessed there.
    ///
    /// # Errors
    /// The first rule that the schedule breaks.
    pub fn check(&self, program: &Program) -> Result<(), ScheduleError> {
        let outside = |place: String| move |problem| ScheduleError::Outside { place, problem };
        self.check_block().map_err(outside("(step block)".to_owned()))?;
        if self.scratch_bytes > MAX_BYTES {
            return Err(outside("(workspaces)".to_owned())(format!("{} bytes", self.scratch_bytes)));
        }
        self.check_exchange(program).map_err(outside("(memory between ranks)".to_owned()))?;
        self.check_regimes(program).map_err(outside("(regimes)".to_owned()))?;
        let has_exchange = self.exchange.is_some();
        let weight_bytes = (0..program.weights.len()).map(|index| self.weight_bytes(program, index)).collect();
        let scope = Scope { program, weight_bytes, scratch_bytes: self.scratch_bytes, has_exchange };
        self.check_packs(program, &scope)?;
        for (_, fill) in &self.fills {
            let place = || format!("fills weights by `{}`", fill.kernel.symbol);
            scope.launch(fill, Regime { max_tokens: 0, decodes: false }, Of::Fill).map_err(|p| outside(place())(p))?;
        }
        for weight in program.weights.iter().filter(|weight| !weight.pieces.is_empty()) {
            if !fills_of(weight).into_iter().all(|needed| self.fills.iter().any(|(fill, _)| *fill == needed)) {
                return Err(ScheduleError::Missing("fill"));
            }
        }
        let place = || format!("probes by `{}`", self.probe.kernel.symbol);
        let none = Regime { max_tokens: 0, decodes: false };
        scope.launch(&self.probe, none, Of::Probe).map_err(|p| outside(place())(p))?;
        for (regime, works) in &self.regimes {
            let mut before = 0;
            for work in works {
                let place = || {
                    let what = work.kernel().map_or("cuBLASLt", |kernel| &kernel.symbol);
                    let kind = if regime.decodes { "decodes" } else { "tokens" };
                    format!("for steps of up to {} {kind}, operation {}, `{what}`", regime.max_tokens, work.op())
                };
                let checked = match work {
                    _ if work.op() >= program.ops.len() => {
                        Err(format!("the program has {} operations", program.ops.len()))
                    }
                    _ if work.op() < before => Err(format!("it comes after operation {before}")),
                    Work::Launch(launch) => scope.launch(launch, *regime, Of::Step),
                    Work::Product(product) => scope.product(product, *regime),
                };
                checked.map_err(|problem| outside(place())(problem))?;
                before = work.op();
            }
        }
        Ok(())
    }

    /// Every quantized weight is packed by exactly one launch, and no other weight is.
    fn check_packs(&self, program: &Program, scope: &Scope<'_>) -> Result<(), ScheduleError> {
        let mut packed = vec![0; program.weights.len()];
        for pack in &self.packs {
            let outside = |problem| ScheduleError::Outside {
                place: format!("packs weights by `{}`", pack.launch.kernel.symbol),
                problem,
            };
            scope.launch(&pack.launch, Regime { max_tokens: 0, decodes: false }, Of::Pack).map_err(outside)?;
            if pack.bytes > MAX_BYTES {
                return Err(outside(format!("{} bytes", pack.bytes)));
            }
            for &index in &pack.weights {
                let count = packed
                    .get_mut(index)
                    .ok_or_else(|| outside(format!("weight {index} of {}", program.weights.len())))?;
                *count += 1;
            }
        }
        for (weight, &count) in program.weights.iter().zip(&packed) {
            let needed = usize::from(matches!(weight.format, WeightFormat::Quantized(_)));
            if count != needed {
                let problem =
                    format!("weight `{}` ({}) is packed {count} times, expected {needed}", weight.name, weight.format);
                return Err(ScheduleError::Outside { place: "(packs)".to_owned(), problem });
            }
        }
        Ok(())
    }

    /// The arrays lie in the block, in order and without overlap.
    fn check_block(&self) -> Result<(), String> {
        let mut end = 0;
        for Place { array, offset, bytes } in &self.block.places {
            if *offset < end || !offset.is_multiple_of(ALIGN) || *bytes > MAX_BYTES {
                return Err(format!("{array:?} is {bytes} bytes at byte {offset}, behind byte {end}"));
            }
            end = offset.checked_add(*bytes).ok_or("its end overflows")?;
        }
        if self.block.bytes < end || self.block.bytes > MAX_BYTES {
            return Err(format!("{} bytes, and its arrays end at byte {end}", self.block.bytes));
        }
        Ok(())
    }

    /// Checks that there is memory between ranks if the program exchanges rows with others, and that it is large enough
    /// for them.
    fn check_exchange(&self, program: &Program) -> Result<(), String> {
        let (found, needed) = match (self.exchange, Exchange::new(program)) {
            (None, None) => return Ok(()),
            (Some(found), Some(needed)) => (found, needed),
            (found, _) => {
                let is = |is: bool| if is { "has some" } else { "has none" };
                return Err(format!("the schedule {}, the program {}", is(found.is_some()), is(found.is_none())));
            }
        };
        let sizes = [
            ("slots", found.slots, needed.slots),
            ("bytes of a part", found.part_bytes, needed.part_bytes),
            ("slots between stages", found.stage_slots, needed.stage_slots),
            ("bytes between stages", found.stage_bytes, needed.stage_bytes),
        ];
        if let Some((what, found, needed)) = sizes.into_iter().find(|(_, found, needed)| found < needed) {
            return Err(format!("{found} {what}, at least {needed}"));
        }
        if found.inbox_bytes(program.tp_size) > MAX_BYTES || found.stage_inbox_bytes() > MAX_BYTES {
            return Err(format!("{found:?} for {} ranks", program.tp_size));
        }
        Ok(())
    }

    /// Regimes ascend by tokens, and the last one takes every step that the program takes.
    fn check_regimes(&self, program: &Program) -> Result<(), String> {
        let limits = program.limits;
        for decodes in [true, false] {
            let tokens = self.regimes.iter().map(|(regime, _)| *regime).filter(|r| r.decodes == decodes);
            let tokens: Vec<usize> = tokens.map(|regime| regime.max_tokens).collect();
            if !tokens.is_sorted_by(|a, b| a < b) || tokens.first() == Some(&0) {
                return Err(format!("those of {tokens:?} tokens do not ascend"));
            }
            let most = match decodes {
                true => limits.max_batch_size.min(limits.max_num_logits).min(limits.max_num_tokens),
                false => limits.max_num_tokens,
            };
            if tokens.last().is_some_and(|&last| last > most) || !decodes && tokens.last() != Some(&most) {
                return Err(format!("those of {tokens:?} tokens, for steps of up to {most}"));
            }
        }
        Ok(())
    }
}

/// What a launch belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Step,
    Fill,
    Pack,
    Probe,
}

/// The memory that work can point at.
struct Scope<'a> {
    program: &'a Program,
    /// Bytes of each weight on the device.
    weight_bytes: Vec<usize>,
    scratch_bytes: usize,
    has_exchange: bool,
}

impl Scope<'_> {
    fn launch(&self, launch: &Launch, regime: Regime, of: Of) -> Result<(), String> {
        let (kernel, cluster) = (&launch.kernel, launch.cluster);
        let within = |what: &str, found: u32, most: u32| match found <= most {
            true => Ok(()),
            false => Err(format!("{found} {what}, at most {most}")),
        };
        if kernel.threads == 0 || !kernel.threads.is_multiple_of(32) {
            return Err(format!("{} threads, expected a multiple of 32", kernel.threads));
        }
        within("threads", kernel.threads, MAX_THREADS)?;
        within("bytes of shared memory", kernel.shared_bytes, MAX_SHARED)?;
        within("CTAs in a cluster", cluster, MAX_CLUSTER)?;
        if !cluster.is_power_of_two() {
            return Err(format!("a cluster of {cluster} CTAs, expected 1, 2, 4 or 8"));
        }
        if launch.args.is_empty() || launch.args.len() > MAX_ARGS {
            return Err(format!("{} parameters, expected 1 to {MAX_ARGS}", launch.args.len()));
        }
        let (tokens, logits) = (regime.max_tokens, self.program.limits.max_num_logits);
        let ctas = |n: usize, per: u32, times: u32| match per {
            0 => Err("a CTA for every 0 rows".to_owned()),
            _ => Ok(n.div_ceil(per as usize) as u64 * u64::from(times)),
        };
        let most = match launch.grid {
            Grid::Fixed(n) => u64::from(n),
            Grid::Tokens { per, times } => ctas(tokens, per, times)?,
            Grid::Logits { per, times } => ctas(logits, per, times)?,
            // No device has more than a thousand multiprocessors.
            Grid::Persistent { per_sm, .. } => u64::from(per_sm) << 10,
        };
        if most > MAX_GRID
            || cluster > 1 && !matches!(launch.grid, Grid::Persistent { .. }) && most % u64::from(cluster) != 0
        {
            return Err(format!("{:?} in clusters of {cluster}", launch.grid));
        }
        for named in &launch.args {
            self.arg(&named.arg, of).map_err(|problem| format!("parameter `{}`: {problem}", named.name))?;
        }
        Ok(())
    }

    fn product(&self, product: &Product, regime: Regime) -> Result<(), String> {
        if regime.decodes {
            return Err("a captured step cannot have a library's product".to_owned());
        }
        let bytes = |what: &str, rows: usize, cols: usize, size: usize, arg: &Arg| {
            let needed = rows as u128 * cols as u128 * size as u128;
            let room = self.room(arg)?.ok_or("it points at no memory of a known size")? as u128;
            if needed > room { Err(format!("{needed} bytes of {what}, where there are {room}")) } else { Ok(()) }
        };
        let Product { rows, depth, .. } = *product;
        let tokens = regime.max_tokens;
        bytes("weights", rows, depth, product.dtype.size(), &product.weight)?;
        bytes("tokens", tokens, depth, product.dtype.size(), &product.tokens)?;
        bytes("outputs", tokens, rows, product.out_type.size(), &product.out)?;
        bytes("workspace", 1, product.workspace.1, 1, &product.workspace.0)
    }

    fn arg(&self, arg: &Arg, of: Of) -> Result<(), String> {
        match arg {
            Arg::Piece(_) if of == Of::Fill => Ok(()),
            Arg::Pack(_) if of == Of::Pack => Ok(()),
            Arg::Probe(_) if of == Of::Probe => Ok(()),
            Arg::Piece(_) | Arg::Pack(_) | Arg::Staged(_) | Arg::Probe(_) => {
                Err("it is not known in a step".to_owned())
            }
            Arg::Exchange(_) if !self.has_exchange => Err("there is no memory between ranks".to_owned()),
            Arg::Exchange(_) | Arg::I32(_) | Arg::U64(_) | Arg::F32(_) => Ok(()),
            Arg::KeyScale { layer, .. } | Arg::ValueScale(layer) => match self.program.kv_scales.len() {
                count if *layer < count => Ok(()),
                count => Err(format!("the scale of cache layer {layer} of {count}")),
            },
            Arg::Ordinal(before) if i32::try_from(*before).is_ok() => Ok(()),
            Arg::Ordinal(before) => Err(format!("{before} collectives before it")),
            Arg::TensorMap(map) => self.map(map),
            pointer => self.room(pointer).map(drop),
        }
    }

    /// Bytes of memory from a pointer on. `None` for the cache and the experts' counters, whose sizes are not the
    /// schedule's, and for arrays of the step block, whose sizes are checked when the schedule is parsed.
    fn room(&self, arg: &Arg) -> Result<Option<usize>, String> {
        let program = self.program;
        let index = |what: &str, index: usize, count: usize| match index < count {
            true => Ok(index),
            false => Err(format!("{what} {index} of {count}")),
        };
        let behind = |what: &str, offset: usize, bytes: usize| match offset < bytes {
            true => Ok(Some(bytes - offset)),
            false => Err(format!("byte {offset} of the {bytes} of {what}")),
        };
        match arg {
            Arg::Buffer(buffer) => {
                let buffer = &program.buffers[index("buffer", *buffer, program.buffers.len())?];
                Ok(Some(program.max_bytes(buffer)))
            }
            Arg::Weight { index: weight, offset } => {
                let index = index("weight", *weight, program.weights.len())?;
                behind(&format!("weight `{}`", program.weights[index].name), *offset, self.weight_bytes[index])
            }
            Arg::Keys(layer) | Arg::Values(layer) => index("cache layer", *layer, program.kv.num_layers).map(|_| None),
            Arg::Scratch(offset) => behind("the workspaces", *offset, self.scratch_bytes),
            Arg::ExpertCounts(layer) => index("layer", *layer, program.num_layers).map(|_| None),
            Arg::Step(_) => Ok(None),
            other => Err(format!("{other:?} is no pointer")),
        }
    }

    /// A map lies within the memory of its base. For the cache only the length of a row is known here. The number of
    /// rows is known when the cache is allocated; then the map is cut to it.
    fn map(&self, map: &TensorMap) -> Result<(), String> {
        let TensorMap { base, dtype, dims, strides, tile, swizzle } = map;
        let rank = dims.len();
        if !(1..=MAX_RANK).contains(&rank) || strides.len() + 1 != rank || tile.len() != rank {
            return Err(format!(
                "a tensor map of {rank} dimensions, {} strides, a box of {}",
                strides.len(),
                tile.len()
            ));
        }
        if !matches!(swizzle, 0 | 32 | 64 | 128)
            || dims.contains(&0)
            || tile.iter().any(|&side| side == 0 || side > 256)
        {
            return Err(format!("a tensor map of {dims:?} in boxes of {tile:?}, swizzled by {swizzle}"));
        }
        let size = dtype.size() as u128;
        let row = u128::from(dims[0]) * size;
        let over = |bytes: u128, room: u128| Err(format!("a tensor map of {bytes} bytes, of {room}"));
        match self.room(base)? {
            Some(room) => {
                let steps = dims[1..].iter().zip(strides);
                let last: u128 = steps.map(|(&n, &stride)| u128::from(n - 1) * u128::from(stride)).sum();
                if last + row > room as u128 { over(last + row, room as u128) } else { Ok(()) }
            }
            None if matches!(**base, Arg::Keys(_) | Arg::Values(_)) => {
                let kv = self.program.kv;
                let head = kv.head_dim as u128 * kv.elem().size() as u128;
                let rows_of_heads = rank == 2 && row == head && u128::from(strides[0]) == head;
                if rows_of_heads { Ok(()) } else { Err(format!("a tensor map of the cache with rows of {row} bytes")) }
            }
            None => Err("a tensor map of memory of an unknown size".to_owned()),
        }
    }
}
