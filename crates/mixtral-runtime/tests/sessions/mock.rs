//! A backend that computes nothing, and checks every step that it is asked to compute.
//!
//! A slot of its cache holds a digest of the token there and of all tokens before it, as the keys of a causal model
//! depend on all of them. Logits are numbers drawn from the last token's digest. So a token depends on its sequence and
//! on how it is drawn, and on nothing else. A step that reads slots which another sequence wrote, or which nobody
//! wrote, is found.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mixtral_engine::sampling::sample;
use mixtral_engine::score::score;
use mixtral_engine::{
    Backend, BackendError, BlockMove, BlockPlace, DeviceIdle, KvLayout, Launched, Limits, NonFinite, Op, Program,
    RandomKey, StepInputs, StepOutputs,
};
use mixtral_model::{BlockId, DType, TokenId};
use mixtral_runtime::Executor;

/// Entries of the vocabulary.
pub const VOCAB: usize = 32;

/// The steps that a mock got, in order.
pub type Steps = Arc<Mutex<Vec<StepInputs<'static>>>>;

/// The backend.
pub struct Mock {
    program: Program,
    /// What each slot holds: the digest of the tokens before its own, and with its own.
    cache: Vec<Option<[u64; 2]>>,
    /// The same of blocks in the host's memory.
    host: HashMap<u32, Vec<Option<[u64; 2]>>>,
    /// The steps that it got.
    pub steps: Steps,
    /// The step that fails.
    pub fails_at: Option<usize>,
    /// The step whose logits are not finite.
    pub non_finite_at: Option<usize>,
    /// Whether it pretends to compute beside the host.
    pub ahead: bool,
    /// The steps that it pretends to compute.
    under_way: VecDeque<StepOutputs>,
    /// The tokens that the last step drew.
    drawn: Vec<TokenId>,
    /// The token counts that it returns for its experts.
    pub expert_counts: Vec<Vec<u64>>,
}

impl Mock {
    /// A mock of an engine with these limits and this many blocks of cache.
    pub fn new(limits: Limits, kv_blocks: usize) -> Self {
        let name = || "heads".to_owned();
        let attention =
            Op::Attention { query: name(), num_heads: 1, window: None, fp8_context: false, layer: 0, out: name() };
        let program = Program {
            rank: 0,
            world_size: 1,
            tp_size: 1,
            dtype: DType::F32,
            vocab_size: VOCAB,
            num_layers: 1,
            num_experts: 0,
            top_k: 0,
            limits,
            kv: KvLayout {
                num_layers: 1,
                num_kv_heads: 1,
                head_dim: 1,
                dtype: DType::F32,
                format: mixtral_model::CacheFormat::Plain,
            },
            kv_scales: Vec::new(),
            arena_bytes: 0,
            buffers: vec![],
            weights: vec![],
            ops: vec![attention],
        };
        let cache = vec![None; kv_blocks * limits.block_size];
        Mock {
            program,
            cache,
            host: HashMap::new(),
            steps: Steps::default(),
            fails_at: None,
            non_finite_at: None,
            ahead: false,
            under_way: VecDeque::new(),
            drawn: Vec::new(),
            expert_counts: vec![vec![3, 4], vec![5, 6]],
        }
    }

    fn carry_out(&mut self, step: usize, moves: &[BlockMove]) {
        let size = self.program.limits.block_size;
        for BlockMove { from, to } in moves {
            let slots = |block: BlockId| block.0 as usize * size..(block.0 as usize + 1) * size;
            let contents = match from {
                BlockPlace::Cache(block) => self.cache[slots(*block)].to_vec(),
                BlockPlace::Host(number) => self
                    .host
                    .get(number)
                    .unwrap_or_else(|| panic!("step {step}: nothing is in the host's block {number}"))
                    .clone(),
            };
            match to {
                BlockPlace::Cache(block) => self.cache[slots(*block)].copy_from_slice(&contents),
                BlockPlace::Host(number) => drop(self.host.insert(*number, contents)),
            }
        }
    }

    /// The digest of all tokens of a sequence that are in the cache.
    fn read(&self, step: usize, sequence: &Part<'_>) -> u64 {
        (0..sequence.positions.start).fold(0, |before, position| {
            let slot = sequence.slot(position, self.program.limits.block_size);
            match self.cache[slot] {
                Some([expected, digest]) if expected == before => digest,
                Some(_) => panic!("step {step}: slot {slot}, read at position {position}, is another sequence's"),
                None => panic!("step {step}: slot {slot}, read at position {position}, was never written"),
            }
        })
    }
}

impl Backend for Mock {
    fn step(&mut self, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        inputs.check(&self.program, self.kv_blocks(), self.drawn.len())?;
        let step = {
            let mut steps = self.steps.lock().unwrap();
            steps.push(StepInputs::unpack(&inputs.pack()).unwrap());
            steps.len() - 1
        };
        if self.fails_at == Some(step) {
            return Err(BackendError::Other(format!("the mock fails at step {step}")));
        }
        let inputs = &StepInputs { token_ids: inputs.known_ids(&self.drawn).into_owned(), ..inputs.clone() };
        self.carry_out(step, &inputs.moves);
        let (mut digests, mut written) = (Vec::new(), HashSet::new());
        for sequence in parts(inputs) {
            let mut digest = self.read(step, &sequence);
            for (&id, position) in sequence.token_ids.iter().zip(sequence.positions.clone()) {
                let slot = sequence.slot(position, self.program.limits.block_size);
                assert!(written.insert(slot), "step {step}: slot {slot} is written twice");
                let before = digest;
                digest = follow(before, TokenId(id.try_into().unwrap()));
                self.cache[slot] = Some([before, digest]);
                digests.push(digest);
            }
        }
        let rows: Vec<u64> = inputs.logits_indices.iter().map(|&at| digests[usize::try_from(at).unwrap()]).collect();
        let mut tokens = Vec::new();
        for request in &inputs.samples {
            let expected = rows[request.row];
            assert!(
                request.tokens.is_empty() || digest_of(&request.tokens) == expected,
                "step {step}: a draw after other tokens than those of its row"
            );
            tokens.push(sample(&mut logits(expected), request));
        }
        let all: Vec<Vec<f32>> = rows.into_iter().map(logits).collect();
        let scored = |request| score(request, inputs, |row| &all[row], &tokens).unwrap();
        let scores = inputs.scores.iter().map(scored).collect();
        let logits = if inputs.return_logits { all.concat() } else { Vec::new() };
        self.drawn.clone_from(&tokens);
        let wrong = |row| NonFinite { row, token: 0, value: f32::NAN, dtype: DType::F32 };
        let non_finite =
            if self.non_finite_at == Some(step) { (0..all.len()).map(wrong).collect() } else { Vec::new() };
        Ok(StepOutputs { tokens, scores, logits, non_finite })
    }

    fn runs_ahead(&self) -> bool {
        self.ahead
    }

    fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<Launched, BackendError> {
        assert!(self.under_way.len() < 2, "more than two steps are under way");
        let outputs = self.step(inputs)?;
        if !self.ahead {
            return Ok(Launched::Done(outputs));
        }
        self.under_way.push_back(outputs);
        Ok(Launched::UnderWay)
    }

    fn collect(&mut self) -> Result<StepOutputs, BackendError> {
        Ok(self.under_way.pop_front().expect("a step is under way"))
    }

    fn kv_blocks(&self) -> usize {
        self.cache.len() / self.program.limits.block_size
    }

    fn expert_counts(&self) -> Vec<Vec<u64>> {
        self.expert_counts.clone()
    }

    /// A second for each step.
    fn op_times(&self) -> Vec<Duration> {
        vec![Duration::from_secs(self.steps.lock().unwrap().len() as u64)]
    }
}

/// An executor of one mock whose steps stay under way.
pub struct Pipeline {
    mock: Mock,
    depth: usize,
    under_way: VecDeque<(StepInputs<'static>, Result<StepOutputs, BackendError>)>,
}

impl Pipeline {
    /// The most steps that can be under way.
    pub fn new(mock: Mock, depth: usize) -> Self {
        Pipeline { mock, depth, under_way: VecDeque::new() }
    }
}

impl Executor for Pipeline {
    fn depth(&self) -> usize {
        self.depth
    }

    fn runs_ahead(&self) -> bool {
        self.mock.ahead
    }

    /// Checks one thing more than the mock: of the blocks of a step that is under way, no other sequence reads those that
    /// the step writes, nobody writes any, and none that it writes goes to the host's memory.
    fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<(), BackendError> {
        let most = if self.mock.ahead { 2 } else { self.depth };
        assert!(self.under_way.len() < most, "more than {most} steps are under way");
        let block_size = self.mock.program.limits.block_size;
        let copied: HashSet<i32> = inputs.moves.iter().filter_map(|m| cache_block(m.to)).collect();
        let leaves = |m: &&BlockMove| matches!(m.to, BlockPlace::Host(_));
        let left: HashSet<i32> = inputs.moves.iter().filter(leaves).filter_map(|m| cache_block(m.from)).collect();
        for earlier in self.under_way.iter().flat_map(|(inputs, _)| parts(inputs)) {
            let held: HashSet<i32> = earlier.blocks.iter().copied().filter(|&block| block >= 0).collect();
            let written = earlier.written(block_size);
            assert!(written.is_disjoint(&left), "blocks that a step under way writes go to the host: {left:?}");
            assert!(held.is_disjoint(&copied), "a copy goes to blocks of a step under way: {copied:?}");
            for now in parts(inputs) {
                let reads: HashSet<i32> = now.blocks.iter().copied().collect();
                let clash = !reads.is_disjoint(&written) || !held.is_disjoint(&now.written(block_size));
                let continues = now.blocks[0] == earlier.blocks[0] && now.positions.start >= earlier.positions.end;
                assert!(continues || !clash, "blocks {:?} are still used by a step under way", now.blocks);
            }
        }
        let outputs = self.mock.step(inputs);
        self.under_way.push_back((StepInputs::unpack(&inputs.pack()).unwrap(), outputs));
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutputs, BackendError> {
        self.under_way.pop_front().expect("a step is under way").1
    }

    fn kv_blocks(&self) -> usize {
        self.mock.kv_blocks()
    }

    fn expert_counts(&mut self) -> Result<Vec<Vec<u64>>, BackendError> {
        Ok(self.mock.expert_counts.clone())
    }

    fn op_times(&self) -> Vec<Duration> {
        self.mock.op_times()
    }

    fn device_idle(&self) -> Option<DeviceIdle> {
        None
    }
}

/// A sequence's part in a step.
pub struct Part<'a> {
    /// Its tokens in the step.
    pub token_ids: &'a [i32],
    /// Their positions.
    pub positions: Range<usize>,
    /// Its row of the block table.
    pub blocks: &'a [i32],
}

impl Part<'_> {
    /// The blocks that its tokens go to.
    fn written(&self, block_size: usize) -> HashSet<i32> {
        self.blocks[self.positions.start / block_size..self.positions.end.div_ceil(block_size)]
            .iter()
            .copied()
            .collect()
    }

    fn slot(&self, position: usize, block_size: usize) -> usize {
        usize::try_from(self.blocks[position / block_size]).unwrap() * block_size + position % block_size
    }
}

fn cache_block(place: BlockPlace) -> Option<i32> {
    if let BlockPlace::Cache(block) = place { Some(i32::try_from(block.0).unwrap()) } else { None }
}

/// The parts of a step that was checked.
pub fn parts<'a>(inputs: &'a StepInputs<'_>) -> impl Iterator<Item = Part<'a>> {
    let width = inputs.block_table.len() / inputs.num_seqs().max(1);
    let index = |n: i32| usize::try_from(n).unwrap();
    inputs.cu_query_lens.windows(2).enumerate().map(move |(sequence, edges)| {
        let token_ids = &inputs.token_ids[index(edges[0])..index(edges[1])];
        let end = index(inputs.seq_lens[sequence]);
        Part {
            token_ids,
            positions: end - token_ids.len()..end,
            blocks: &inputs.block_table[sequence * width..][..width],
        }
    })
}

fn follow(digest: u64, token: TokenId) -> u64 {
    RandomKey { seed: digest, prompt: token.0, ..RandomKey::default() }.bits()
}

/// The digest of a sequence.
pub fn digest_of(tokens: &[TokenId]) -> u64 {
    tokens.iter().copied().fold(0, follow)
}

/// The logits after a sequence of this digest, from 0 to 8.
pub fn logits(digest: u64) -> Vec<f32> {
    let number = |id: usize| u16::try_from(follow(digest, TokenId(u32::try_from(id).unwrap())) >> 48).unwrap();
    (0..VOCAB).map(|id| f32::from(number(id)) / 8192.0).collect()
}
