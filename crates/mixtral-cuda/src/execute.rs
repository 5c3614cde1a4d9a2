#![allow(unsafe_code)]
//! A schedule's launches, with everything resolved that is known when a program is loaded: functions, pointers, tensor
//! maps. Only the number of CTAs is left to each step.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use mixtral_engine::KvScale;
use mixtral_kernels::{
    Arg, ExchangeArg, Grid, Kernel, KernelImages, Launch, ProbeArg, Product, Regime, Schedule, StepBlock, TensorMap,
    Work,
};
use mixtral_model::ElemType;

use crate::CudaError;
use crate::driver::{
    Config, Context, CublasLt, DeviceMemory, Event, Function, Graph, Module, Param, ProductOperands, ProductShape,
    Stream, encode,
};
use crate::exchange::Words;
use crate::remote::{Transfer, What};

/// Where everything lies on the device.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    /// Of each buffer.
    pub(crate) buffers: Vec<u64>,
    /// Of each weight.
    pub(crate) weights: Vec<u64>,
    /// Of each layer's keys and values.
    pub(crate) cache: Vec<[u64; 2]>,
    /// The scales of each layer's keys and values in an fp8 cache.
    pub(crate) kv_scales: Vec<KvScale>,
    /// How many rows of `head_dim` elements a layer's keys have, and its values.
    pub(crate) cache_rows: u64,
    /// Of the step block.
    pub(crate) step: u64,
    pub(crate) block: StepBlock,
    /// Of the scratch memory.
    pub(crate) scratch: u64,
    /// Of the memory in which matrices wait to be packed while the program is loaded.
    pub(crate) staging: u64,
    /// Addresses of the memory between ranks, if there is any.
    pub(crate) exchange: Option<Words>,
    /// Of the experts' counters, and how many counters a layer has, if tokens are counted.
    pub(crate) counts: Option<(u64, usize)>,
}

impl Addresses {
    /// The address that a parameter points at, or its value.
    fn word(&self, arg: &Arg) -> Option<u64> {
        Some(match arg {
            Arg::Buffer(index) => *self.buffers.get(*index)?,
            Arg::Weight { index, offset } => self.weights.get(*index)? + *offset as u64,
            Arg::Keys(layer) => self.cache.get(*layer)?[0],
            Arg::Values(layer) => self.cache.get(*layer)?[1],
            Arg::Step(array) => self.step + self.block.offset(*array) as u64,
            Arg::Scratch(offset) => self.scratch + *offset as u64,
            Arg::ExpertCounts(layer) => self.counts.map_or(0, |(start, experts)| start + 8 * (layer * experts) as u64),
            Arg::Exchange(what) => self.exchange?.word(*what),
            Arg::Ordinal(before) => *before as u64,
            Arg::I32(value) => u64::from(value.cast_unsigned()),
            Arg::U64(value) => *value,
            Arg::F32(value) => u64::from(value.to_bits()),
            Arg::KeyScale { layer, times } => u64::from((times * self.kv_scales.get(*layer)?.key).to_bits()),
            Arg::ValueScale(layer) => u64::from(self.kv_scales.get(*layer)?.value.to_bits()),
            Arg::Staged(offset) => self.staging + *offset as u64,
            Arg::TensorMap(_) | Arg::Piece(_) | Arg::Pack(_) | Arg::Probe(_) => return None,
        })
    }

    /// As [`Addresses::word`], with an error that names the kernel `symbol`.
    fn known(&self, symbol: &str, arg: &Arg) -> Result<u64, CudaError> {
        self.word(arg).ok_or_else(|| launch_error(symbol, format!("{arg:?} is not in the program")))
    }

    fn param(&self, symbol: &str, arg: &Arg) -> Result<Param, CudaError> {
        match arg {
            Arg::TensorMap(map) => Ok(Param::Map(encode(&self.cut(map), self.known(symbol, &map.base)?)?)),
            arg => Ok(Param::Word(self.known(symbol, arg)?)),
        }
    }

    /// Cuts a map of the cache to the rows that the cache has: the schedule cannot know how many those are.
    fn cut(&self, map: &TensorMap) -> TensorMap {
        let mut map = map.clone();
        if let (Arg::Keys(_) | Arg::Values(_), Some(rows)) = (&*map.base, map.dims.last_mut()) {
            *rows = self.cache_rows.min(*rows);
        }
        map
    }
}

fn launch_error(symbol: &str, problem: impl Into<String>) -> CudaError {
    CudaError::Launch { symbol: symbol.to_owned(), problem: problem.into() }
}

/// The kernels of a program, and cuBLASLt. Each is loaded when it is first asked for.
pub(crate) struct Functions<'a> {
    images: &'a KernelImages,
    context: Context,
    /// Ranks that share the GPU.
    sharing: usize,
    loaded: HashMap<Kernel, Function>,
    cublaslt: Option<Arc<CublasLt>>,
}

impl<'a> Functions<'a> {
    pub(crate) fn new(images: &'a KernelImages, context: &Context, sharing: usize) -> Self {
        Functions { images, context: context.clone(), sharing, loaded: HashMap::new(), cublaslt: None }
    }

    /// Multiprocessors for a launch whose CTAs must all run at once. If its CTAs wait for other ranks, it uses only a
    /// part of a shared GPU, so that those ranks' kernels can run.
    fn multiprocessors(&self, launch: &Launch) -> u32 {
        let all = self.context.device().multiprocessors;
        let waits = launch.args.iter().any(|named| named.arg == Arg::Exchange(ExchangeArg::Stop));
        let ranks = u32::try_from(self.sharing).unwrap_or(u32::MAX);
        if waits && ranks > 1 { (all / ranks.saturating_mul(2)).max(1) } else { all }
    }

    /// Loads the kernel or the library that a piece of work runs on.
    pub(crate) fn load(&mut self, work: &Work) -> Result<(), CudaError> {
        match work {
            Work::Launch(launch) => self.get(&launch.kernel).map(drop),
            Work::Product(_) => self.cublaslt().map(drop),
        }
    }

    fn cublaslt(&mut self) -> Result<Arc<CublasLt>, CudaError> {
        if let Some(loaded) = &self.cublaslt {
            return Ok(Arc::clone(loaded));
        }
        Ok(Arc::clone(self.cublaslt.insert(Arc::new(CublasLt::new(&self.context)?))))
    }

    pub(crate) fn get(&mut self, kernel: &Kernel) -> Result<Function, CudaError> {
        if let Some(function) = self.loaded.get(kernel) {
            return Ok(function.clone());
        }
        let (symbol, code) = (&kernel.symbol, self.images.code);
        let missing = || CudaError::MissingKernel { symbol: symbol.clone(), arch: code.to_string() };
        let image = self.images.find(kernel).ok_or_else(missing)?;
        let module = Module::load(&self.context, &image.code)?;
        let function = module.function(symbol, &image.entry, kernel.threads, kernel.shared_bytes)?;
        self.loaded.insert(kernel.clone(), function.clone());
        Ok(function)
    }
}

/// Launches the schedule's probe, which reads all of `memory`, on `ctas` CTAs.
pub(crate) fn read_words(
    probe: &Launch,
    function: &Function,
    stream: &Stream,
    ctas: u32,
    memory: &DeviceMemory,
    out: &DeviceMemory,
) -> Result<(), CudaError> {
    let symbol = &probe.kernel.symbol;
    let word = |arg: &Arg| match arg {
        Arg::Probe(ProbeArg::Data) => Ok(Param::Word(memory.address())),
        Arg::Probe(ProbeArg::Words) => Ok(Param::Word((memory.len() / 16) as u64)),
        Arg::Probe(ProbeArg::Out) => Ok(Param::Word(out.address())),
        other => Err(launch_error(symbol, format!("{other:?} is not of a probe"))),
    };
    let params = probe.args.iter().map(|named| word(&named.arg)).collect::<Result<Vec<_>, _>>()?;
    function.takes(symbol, &sizes(probe))?;
    let (threads, shared_bytes) = (probe.kernel.threads, probe.kernel.shared_bytes);
    let config = Config { grid: ctas, threads, shared_bytes, cluster: 1, overlaps: false };
    // SAFETY: the schedule lists the kernel's parameters in its order. The kernel reads `words` words of 16 bytes and
    // writes one integer. The memory is freed only after the driver has waited for the work that uses it.
    unsafe { function.launch(stream, config, &params) }
}

/// Bytes of each parameter of a launch.
fn sizes(launch: &Launch) -> Vec<usize> {
    launch.args.iter().map(|named| named.arg.size()).collect()
}

/// Bytes of workspace for [`multiply_squares`].
pub(crate) const WORKSPACE: usize = mixtral_kernels::scratch::PRODUCT_WORKSPACE;

/// Multiplies two `[side, side]` bf16 matrices into a third. `memory` holds the three and a workspace, one behind the
/// other.
pub(crate) fn multiply_squares(
    cublaslt: &CublasLt,
    stream: &Stream,
    side: usize,
    memory: &DeviceMemory,
) -> Result<(), CudaError> {
    let each = side * side * 2;
    if memory.len() < 3 * each + WORKSPACE {
        return Err(CudaError::Unsupported(format!("{} bytes for matrices of {side} rows", memory.len())));
    }
    let (rows, tokens, depth, workspace) = (side, side, side, WORKSPACE);
    let shape = ProductShape { rows, tokens, depth, dtype: ElemType::Bf16, out: ElemType::Bf16, workspace };
    let [weight, tokens, out, workspace] = [0, 1, 2, 3].map(|i| memory.address() + (i * each) as u64);
    // SAFETY: three matrices and the workspace lie within the memory. It is freed only after the driver has waited for
    // the work that uses it.
    unsafe { cublaslt.multiply(stream, shape, ProductOperands { weight, tokens, out, workspace }) }
}

/// What grids depend on in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) tokens: usize,
    pub(crate) logits: usize,
}

/// CTAs of a launch; 0 if the step has nothing for it to do.
fn ctas(grid: Grid, cluster: u32, shape: Shape, multiprocessors: u32) -> u32 {
    let count = |n: usize, per: u32, times: u32| {
        u32::try_from(n.div_ceil(per.max(1) as usize)).unwrap_or(u32::MAX).saturating_mul(times)
    };
    let cluster = cluster.max(1);
    match grid {
        Grid::Fixed(n) => n,
        Grid::Tokens { per, times } => count(shape.tokens, per, times),
        Grid::Logits { per, times } => count(shape.logits, per, times),
        // All CTAs of a persistent kernel run at once, so only whole clusters count.
        Grid::Persistent { per_sm, items } => {
            let most = multiprocessors.saturating_mul(per_sm) / cluster * cluster;
            items.map_or(most, |items| items.div_ceil(cluster).saturating_mul(cluster).min(most))
        }
    }
}

/// One launch, resolved.
struct PreparedLaunch {
    symbol: String,
    function: Function,
    grid: Grid,
    multiprocessors: u32,
    config: Config,
    params: Box<[Param]>,
    /// The parameter that holds the bytes of a rank's part, if NCCL carries the parts.
    carried: Option<(usize, Arc<Transfer>)>,
}

/// The halves of a launch between which NCCL carries rows: `exchange::LEAVES` and `exchange::FINDS`.
const HALVES: [u64; 2] = [1, 2];

impl PreparedLaunch {
    fn new(launch: &Launch, functions: &mut Functions<'_>, addresses: &Addresses) -> Result<Self, CudaError> {
        let symbol = &launch.kernel.symbol;
        let function = functions.get(&launch.kernel)?;
        function.takes(symbol, &sizes(launch))?;
        Ok(PreparedLaunch {
            symbol: symbol.clone(),
            function,
            grid: launch.grid,
            multiprocessors: functions.multiprocessors(launch),
            config: Config {
                grid: 0,
                threads: launch.kernel.threads,
                shared_bytes: launch.kernel.shared_bytes,
                cluster: launch.cluster.max(1),
                overlaps: launch.overlaps,
            },
            params: launch.args.iter().map(|named| addresses.param(symbol, &named.arg)).collect::<Result<_, _>>()?,
            carried: None,
        })
    }

    /// One of the halves of a launch.
    fn half(
        launch: &Launch,
        half: u64,
        transfer: &Arc<Transfer>,
        functions: &mut Functions<'_>,
        addresses: &Addresses,
    ) -> Result<Self, CudaError> {
        let place = |name| launch.args.iter().position(|named| named.name == name);
        let (Some(capacity), Some(at)) = (place("capacity"), place("half")) else {
            return Err(CudaError::Unsupported(format!(
                "kernel `{}` was built when ranks had to map each other's memory; build the engine's kernels again with `mixtral build --from-engine DIR`",
                launch.kernel.symbol
            )));
        };
        let mut prepared = PreparedLaunch::new(launch, functions, addresses)?;
        prepared.params[at] = Param::Word(half);
        prepared.carried = Some((capacity, Arc::clone(transfer)));
        Ok(prepared)
    }

    /// Launches it for a step. Launches nothing and returns `false` if the step has nothing for it to do.
    fn launch(&self, stream: &Stream, shape: Shape, overlaps: bool) -> Result<bool, CudaError> {
        let grid = ctas(self.grid, self.config.cluster, shape, self.multiprocessors);
        if grid == 0 {
            return Ok(false);
        }
        if !grid.is_multiple_of(self.config.cluster) {
            let problem = format!("{grid} CTAs in clusters of {}", self.config.cluster);
            return Err(launch_error(&self.symbol, problem));
        }
        let config = Config { grid, overlaps: overlaps && self.config.overlaps, ..self.config };
        let mut own = None;
        if let Some((capacity, transfer)) = &self.carried {
            let params = own.insert(self.params.clone());
            params[*capacity] = Param::Word(transfer.bytes(shape.tokens, shape.logits) as u64);
        }
        let params = own.as_ref().unwrap_or(&self.params);
        // SAFETY: the schedule was stored with the kernel and lists its parameters in its order. The schedule passed
        // its check, so they point into the backend's allocations. The backend frees those after the stream is idle.
        unsafe { self.function.launch(stream, config, params) }.map_err(|error| match error {
            CudaError::Call { code: 1, .. } => launch_error(
                &self.symbol,
                format!("the driver refuses {config:?} with {} parameters: {error}", self.params.len()),
            ),
            other => other,
        })?;
        Ok(true)
    }
}

/// A product with everything resolved except the number of tokens.
struct PreparedProduct {
    cublaslt: Arc<CublasLt>,
    shape: ProductShape,
    operands: ProductOperands,
}

impl PreparedProduct {
    fn new(product: &Product, functions: &mut Functions<'_>, addresses: &Addresses) -> Result<Self, CudaError> {
        let address = |arg| addresses.known("cublasLtMatmul", arg);
        let (place, workspace) = &product.workspace;
        Ok(PreparedProduct {
            cublaslt: functions.cublaslt()?,
            shape: ProductShape {
                rows: product.rows,
                tokens: 0,
                depth: product.depth,
                dtype: product.dtype,
                out: product.out_type,
                workspace: *workspace,
            },
            operands: ProductOperands {
                weight: address(&product.weight)?,
                tokens: address(&product.tokens)?,
                out: address(&product.out)?,
                workspace: address(place)?,
            },
        })
    }

    /// Multiplies a step's tokens. Returns `false` if the step has none.
    fn launch(&self, stream: &Stream, shape: Shape) -> Result<bool, CudaError> {
        if shape.tokens == 0 {
            return Ok(false);
        }
        let product = ProductShape { tokens: shape.tokens, ..self.shape };
        // SAFETY: the schedule passed its check, so operands with as many tokens as any step has lie in the backend's
        // allocations. The backend frees those after the stream is idle.
        unsafe { self.cublaslt.multiply(stream, product, self.operands) }?;
        Ok(true)
    }
}

/// One piece of a step's work, resolved.
enum Prepared {
    Launch(PreparedLaunch),
    Product(PreparedProduct),
    /// NCCL reads or writes from this address on.
    Transfer(Arc<Transfer>, u64),
}

impl Prepared {
    /// What a piece of work is on this rank. `carried` says what NCCL carries of it.
    fn all(
        work: &Work,
        functions: &mut Functions<'_>,
        addresses: &Addresses,
        carried: &dyn Fn(&Launch) -> Option<Transfer>,
    ) -> Result<Vec<Self>, CudaError> {
        let launch = match work {
            Work::Product(product) => {
                return Ok(vec![Prepared::Product(PreparedProduct::new(product, functions, addresses)?)]);
            }
            Work::Launch(launch) => launch,
        };
        let Some(transfer) = carried(launch).map(Arc::new) else {
            return Ok(vec![Prepared::Launch(PreparedLaunch::new(launch, functions, addresses)?)]);
        };
        let start = match transfer.what {
            What::Gather(inbox) => inbox,
            What::Send(buffer) | What::Recv(buffer) => {
                let at = addresses.known(&launch.kernel.symbol, &Arg::Buffer(buffer))?;
                return Ok(vec![Prepared::Transfer(transfer, at)]);
            }
        };
        let [leaves, finds] = HALVES.map(|half| PreparedLaunch::half(launch, half, &transfer, functions, addresses));
        Ok(vec![Prepared::Launch(leaves?), Prepared::Transfer(transfer, start), Prepared::Launch(finds?)])
    }

    /// Does it for a step. Returns whether there was something to do.
    fn launch(&self, stream: &Stream, shape: Shape, overlaps: bool) -> Result<bool, CudaError> {
        match self {
            Prepared::Launch(launch) => launch.launch(stream, shape, overlaps),
            Prepared::Product(product) => product.launch(stream, shape),
            Prepared::Transfer(transfer, start) => {
                let (by, bytes) = (&transfer.by, transfer.bytes(shape.tokens, shape.logits));
                // SAFETY: an inbox has room for the parts of all ranks of a group, and a buffer for as many rows as a step may
                // have. The backend frees neither before the stream is idle.
                unsafe {
                    match transfer.what {
                        What::Gather(_) => by.all_gather(stream, *start, bytes),
                        What::Send(_) => by.send(stream, *start, bytes),
                        What::Recv(_) => by.recv(stream, *start, bytes),
                    }
                }?;
                Ok(true)
            }
        }
    }
}

/// The work of a step in its order, resolved.
pub(crate) struct WorkList {
    /// Dropped before the connections of its transfers, which live as long as a graph has them.
    graph: Option<Graph>,
    /// Each launch with the first operation that it computes.
    launches: Vec<(usize, Prepared)>,
    /// Operations that cannot be computed without those before them.
    handed_over: Vec<Range<usize>>,
}

impl WorkList {
    pub(crate) fn new(
        work: &[Work],
        functions: &mut Functions<'_>,
        addresses: &Addresses,
        carried: &dyn Fn(&Launch) -> Option<Transfer>,
    ) -> Result<WorkList, CudaError> {
        let mut launches = Vec::with_capacity(work.len());
        for work in work {
            let prepared = Prepared::all(work, functions, addresses, carried)?;
            launches.extend(prepared.into_iter().map(|prepared| (work.op(), prepared)));
        }
        Ok(WorkList { graph: None, launches, handed_over: Schedule::handed_over(work) })
    }

    /// Whether an operation is the first that a launch computes, and needs nothing that is in no buffer.
    pub(crate) fn begins(&self, op: usize) -> bool {
        let is_first = self.launches.iter().any(|(first, _)| *first == op);
        is_first && !self.handed_over.iter().any(|ops| ops.contains(&op))
    }

    /// Launches the work of `ops` one by one. The first launch waits for everything that is in the stream. So does a
    /// launch behind a library's product or transfer: a kernel may only overlap a kernel that itself waits before it ends,
    /// and nobody knows whether the library's kernels do. What the library does waits for its predecessor as well.
    pub(crate) fn run(
        &self,
        stream: &Stream,
        shape: Shape,
        ops: &Range<usize>,
        overlaps: bool,
    ) -> Result<(), CudaError> {
        stream.context().bind()?;
        let mut behind_a_kernel = false;
        for (_, launch) in self.launches.iter().filter(|(op, _)| ops.contains(op)) {
            if launch.launch(stream, shape, overlaps && behind_a_kernel)? {
                behind_a_kernel = matches!(launch, Prepared::Launch(_));
            }
        }
        Ok(())
    }

    /// As [`WorkList::run`], but one operation after another. The timer has the time of each once the stream is idle.
    pub(crate) fn run_timed(
        &self,
        stream: &Stream,
        shape: Shape,
        ops: &Range<usize>,
        timer: &mut Timer,
    ) -> Result<(), CudaError> {
        stream.context().bind()?;
        timer.begin(stream)?;
        let all: Vec<&(usize, Prepared)> = self.launches.iter().filter(|(op, _)| ops.contains(op)).collect();
        for group in all.chunk_by(|a, b| a.0 == b.0) {
            for (_, launch) in group {
                launch.launch(stream, shape, false)?;
            }
            timer.mark(stream, group[0].0)?;
        }
        Ok(())
    }

    /// Whether no library has a part in it. A graph has a library's part in the size of the regime's fullest step.
    pub(crate) fn is_of_kernels(&self) -> bool {
        self.launches.iter().all(|(_, launch)| matches!(launch, Prepared::Launch(_)))
    }

    /// Captures all launches for a step of `regime`'s size. No step has more than `max_logits` rows of logits.
    pub(crate) fn capture(
        &mut self,
        stream: &Stream,
        regime: Regime,
        max_logits: usize,
        overlaps: bool,
    ) -> Result<(), CudaError> {
        let shape = Shape { tokens: regime.max_tokens, logits: regime.max_tokens.min(max_logits) };
        self.graph = Some(Graph::capture(stream, || self.run(stream, shape, &(0..usize::MAX), overlaps))?);
        Ok(())
    }

    /// Replays the graph, if there is one.
    pub(crate) fn replay(&mut self, stream: &Stream) -> Result<bool, CudaError> {
        let Some(graph) = &mut self.graph else { return Ok(false) };
        // SAFETY: the backend drops its work lists before its memory.
        unsafe { graph.launch(stream)? };
        Ok(true)
    }
}

/// Time by operation.
pub(crate) struct Timer {
    events: Vec<Event>,
    /// The operation that ends at each event but the first.
    marks: Vec<usize>,
    /// Time of each operation so far.
    pub(crate) times: Vec<Duration>,
}

impl Timer {
    pub(crate) fn new(context: &Context, num_ops: usize) -> Result<Timer, CudaError> {
        let events = (0..=num_ops).map(|_| Event::new(context, true)).collect::<Result<_, _>>()?;
        Ok(Timer { events, marks: Vec::new(), times: vec![Duration::ZERO; num_ops] })
    }

    fn begin(&mut self, stream: &Stream) -> Result<(), CudaError> {
        self.marks.clear();
        self.events[0].record(stream)
    }

    fn mark(&mut self, stream: &Stream, op: usize) -> Result<(), CudaError> {
        self.marks.push(op);
        let event = self.events.get(self.marks.len());
        event.map_or(Ok(()), |event| event.record(stream))
    }

    /// Adds the times of the step, once the stream is idle.
    pub(crate) fn collect(&mut self) -> Result<(), CudaError> {
        for (&op, events) in self.marks.iter().zip(self.events.windows(2)) {
            self.times[op] += events[0].until(&events[1])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use mixtral_kernels::step_block::Array;
    use mixtral_model::DType;
    use mixtral_testkit::assembly::Assembly;

    use super::*;

    #[test]
    fn grids_follow_the_step() {
        let shape = Shape { tokens: 37, logits: 2 };
        let of = |grid, cluster| ctas(grid, cluster, shape, 132);
        assert_eq!(of(Grid::Fixed(7), 1), 7);
        assert_eq!(of(Grid::Tokens { per: 16, times: 4 }, 1), 12);
        assert_eq!(of(Grid::Logits { per: 1, times: 3 }, 1), 6);
        assert_eq!(of(Grid::Persistent { per_sm: 2, items: None }, 1), 264);
        assert_eq!(of(Grid::Persistent { per_sm: 1, items: Some(128) }, 1), 128);
        assert_eq!(of(Grid::Persistent { per_sm: 1, items: Some(500) }, 1), 132);
        // Whole clusters, even if the multiprocessors are no multiple of a cluster.
        assert_eq!(of(Grid::Persistent { per_sm: 1, items: Some(13) }, 2), 14);
        assert_eq!(ctas(Grid::Persistent { per_sm: 1, items: None }, 4, shape, 114), 112);
        // No rows of logits: nothing to launch.
        assert_eq!(ctas(Grid::Logits { per: 8, times: 5 }, 1, Shape { tokens: 9, logits: 0 }, 132), 0);
    }

    #[test]
    fn parameters_are_addresses_and_bits() {
        let block = StepBlock::new(&Assembly::new(DType::Bf16).program);
        let positions = block.offset(Array::Positions) as u64;
        let addresses = Addresses {
            buffers: vec![0x1000, 0x2000],
            weights: vec![0x10_0000],
            cache: vec![[0x20_0000, 0x30_0000]],
            kv_scales: vec![KvScale { key: 0.5, value: 2.0 }],
            cache_rows: 96,
            step: 0x40_0000,
            block,
            scratch: 0x50_0000,
            staging: 0x70_0000,
            exchange: None,
            counts: Some((0x60_0000, 8)),
        };
        let word = |arg| addresses.word(&arg);
        assert_eq!(word(Arg::Buffer(1)), Some(0x2000));
        assert_eq!(word(Arg::Buffer(2)), None);
        assert_eq!(word(Arg::Weight { index: 0, offset: 0x30 }), Some(0x10_0030));
        assert_eq!(word(Arg::Keys(0)), Some(0x20_0000));
        assert_eq!(word(Arg::Values(0)), Some(0x30_0000));
        assert_eq!(word(Arg::Keys(1)), None);
        assert_eq!(word(Arg::Step(Array::Positions)), Some(0x40_0000 + positions));
        assert_eq!(word(Arg::Scratch(0x80)), Some(0x50_0080));
        assert_eq!(word(Arg::Staged(0x80)), Some(0x70_0080));
        assert_eq!(word(Arg::ExpertCounts(2)), Some(0x60_0000 + 2 * 8 * 8));
        let uncounted = Addresses { counts: None, ..addresses.clone() };
        assert_eq!(uncounted.word(&Arg::ExpertCounts(2)), Some(0));
        assert_eq!(word(Arg::I32(-2)), Some(0xffff_fffe));
        assert_eq!(word(Arg::F32(1.0)), Some(0x3f80_0000));
        assert_eq!(word(Arg::KeyScale { layer: 0, times: 2.0 }), Some(0x3f80_0000));
        assert_eq!(word(Arg::ValueScale(0)), Some(0x4000_0000));
        assert_eq!(word(Arg::ValueScale(1)), None);
        assert_eq!(word(Arg::U64(u64::MAX)), Some(u64::MAX));
        assert!(addresses.param("k", &Arg::Buffer(9)).unwrap_err().to_string().contains("Buffer(9)"));
        // Maps of the cache end where the cache ends. Other maps stay as they are.
        let map = |base| TensorMap {
            base: Box::new(base),
            dtype: ElemType::Bf16,
            dims: vec![128, 1 << 31],
            strides: vec![256],
            tile: vec![64, 64],
            swizzle: 128,
        };
        assert_eq!(addresses.cut(&map(Arg::Values(0))).dims, [128, 96]);
        assert_eq!(addresses.cut(&map(Arg::Buffer(0))).dims, [128, 1 << 31]);
    }
}
