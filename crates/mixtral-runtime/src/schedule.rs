//! Plans which sequences compute how many tokens in the next step, and gives them blocks for that.
//!
//! First come, first served. Decodes go first, with one token each. The rest of the step's token budget goes to
//! prompts, in chunks if need be. A sequence takes a block when its tokens reach it. Whether there will be one is decided
//! when it joins, by the [`Policy`].
//!
//! A step may be planned while the step before is under way. Then it computes tokens that the step before draws: their
//! values are not known yet, but their positions are. A sequence whose next draw depends on such a value sits out.
//! Whether a sequence has ended is not known either. If it has, its token in the planned step is thrown away; its blocks
//! stay its own until that step is done.

use std::collections::VecDeque;

use mixtral_engine::{BlockMove, BlockPlace, Limits, PIPELINE_PROMPT_TOKENS, ScoreRequest, Scored, StepInputs};
use mixtral_model::{BlockId, TokenId};

use crate::beams::Continuation;
use crate::blocks::BlockPool;
use crate::prefix::Content;
use crate::request::{Request, RequestId};
use crate::sequence::Sequence;

/// When a sequence may join, by the blocks of the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// When all blocks that it and the running ones may ever need are there. No sequence waits once it runs.
    #[default]
    GuaranteedNoEvict,
    /// When there are blocks for its prompt. If blocks run out, the youngest sequence's go to the host's memory, and come
    /// back as they were when there is room. A beam search's blocks stay.
    MaxUtilization,
}

/// How a session uses the cache and the steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// When a sequence may join.
    pub policy: Policy,
    /// Whether a prompt uses the blocks of another prompt with the same beginning.
    pub block_reuse: bool,
    /// With [`Policy::MaxUtilization`], the most blocks that may be in the host's memory.
    pub host_blocks: usize,
    /// The most tokens of prompts in a step that has decodes too; all that fit if it is absent. In a pipeline, no step has more than
    /// [`PIPELINE_PROMPT_TOKENS`].
    pub max_prefill_tokens: Option<usize>,
    /// Whether a step is launched before the tokens of the step before are known, if the executor can do that. It changes
    /// when tokens come, and no token.
    pub overlap: bool,
}

impl Default for SessionOptions {
    /// Nothing is shared, swapped or bounded. Steps overlap.
    fn default() -> Self {
        SessionOptions {
            policy: Policy::default(),
            block_reuse: false,
            host_blocks: 0,
            max_prefill_tokens: None,
            overlap: true,
        }
    }
}

/// A sequence's part in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Index of the sequence among the running ones.
    pub sequence: usize,
    /// How many tokens are computed.
    pub num_tokens: usize,
    /// Position behind the last of them.
    pub end: usize,
    /// Whether these are tokens of the prompt.
    pub is_prompt: bool,
    /// First of its rows of logits.
    pub first_logits_row: usize,
    /// How many rows of logits it has.
    pub num_logits: usize,
    /// Which of the step's samples is its next token, if it draws one.
    pub sample: Option<usize>,
}

/// What the schedule has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Tokens of prompts that were looked for in the cache.
    pub prompt_tokens: u64,
    /// Those of them that were found.
    pub cached_tokens: u64,
    /// Blocks that went to the host's memory.
    pub swapped_out: u64,
    /// Blocks that came back.
    pub swapped_in: u64,
    /// Blocks copied because two beams came to differ in them.
    pub copied: u64,
}

/// The sequences of a session, and their blocks.
pub struct Schedule {
    limits: Limits,
    options: SessionOptions,
    pool: BlockPool,
    host: HostPool,
    /// The sequences that wait, in order: ascending by id.
    pub queue: VecDeque<Sequence>,
    /// The others, in the order in which they joined: ascending by id, and a request's beams one behind the other.
    pub running: Vec<Sequence>,
    /// Copies of blocks that the next step begins with.
    moves: Vec<BlockMove>,
    /// What was done so far.
    pub counters: Counters,
}

impl Schedule {
    /// A schedule without sequences, over a cache of `num_blocks` blocks.
    #[must_use]
    pub fn new(limits: Limits, options: SessionOptions, num_blocks: usize) -> Self {
        Schedule {
            limits,
            options,
            pool: BlockPool::new(num_blocks),
            host: HostPool { limit: options.host_blocks, free: Vec::new(), known: 0 },
            queue: VecDeque::new(),
            running: Vec::new(),
            moves: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// The blocks.
    #[must_use]
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Puts a sequence at the end of the queue.
    pub fn push(&mut self, mut sequence: Sequence) {
        if self.options.block_reuse {
            sequence.contents = Content::of_prompt(&sequence.request.prompt, self.limits.block_size);
        }
        self.queue.push_back(sequence);
    }

    /// The index of a running sequence.
    #[must_use]
    pub fn find(&self, id: RequestId, beam: usize) -> Option<usize> {
        debug_assert!(self.running.is_sorted_by_key(|s| (s.id, s.beam)), "as the field says");
        self.running.binary_search_by_key(&(id, beam), |s| (s.id, s.beam)).ok()
    }

    /// Removes the cancelled sequences that no step under way computes.
    pub fn remove_cancelled(&mut self) {
        for sequence in self.running.extract_if(.., |s| s.cancelled && s.in_flight == 0) {
            self.pool.release(sequence.blocks.into_iter());
            self.host.free.extend(sequence.swapped.into_iter().flatten());
        }
    }

    /// Whether to plan a step while another is under way and draws tokens. Not if all that could decode wait for those
    /// tokens: prompts alone would get steps of their own, and leave the weights to be read twice. Not if blocks are
    /// short: room can only be made by sequences that no step under way computes.
    #[must_use]
    pub fn may_run_ahead(&self) -> bool {
        let running = || self.running.iter().filter(|s| !s.cancelled && s.swapped.is_none());
        let decodes = || running().filter(|s| s.is_decode() && s.num_pending() > 0);
        let new_blocks = decodes().filter(|s| s.num_computed.is_multiple_of(self.limits.block_size)).count();
        new_blocks <= self.pool.num_free() && (decodes().next().is_some() || !running().any(Sequence::waits))
    }

    /// Notes that a step of these chunks was launched.
    pub fn launched(&mut self, chunks: &[Chunk]) {
        for chunk in chunks {
            let sequence = &mut self.running[chunk.sequence];
            sequence.num_computed = chunk.end;
            sequence.in_flight += 1;
            sequence.drawing = chunk.sample.filter(|_| self.options.overlap);
        }
    }

    /// Distributes the next step's tokens among the sequences that have any to compute, and gives them blocks. In the
    /// result decodes come first. With `depth` steps under way at a time, a step takes only its share of the sequences, and
    /// of prompts no more than [`PIPELINE_PROMPT_TOKENS`], so that the other steps have some too.
    #[must_use]
    pub fn plan(&mut self, depth: usize) -> Vec<Chunk> {
        self.swap_in();
        self.admit();
        let mut chunks: Vec<Chunk> = Vec::new();
        let (mut tokens, mut logits, mut samples) = (self.limits.max_num_tokens, 0, 0);
        let share = self.running.iter().filter(|s| s.swapped.is_none()).count().div_ceil(depth);
        let wanted = || (0..self.running.len()).filter(|&i| !self.running[i].cancelled);
        let decodes = wanted().filter(|&i| self.running[i].is_decode());
        let order: Vec<usize> = decodes.chain(wanted().filter(|&i| !self.running[i].is_decode())).collect();
        for sequence in order {
            if chunks.len() == share {
                break;
            }
            let state = &self.running[sequence];
            let is_prompt = !state.is_decode();
            if is_prompt && chunks.last().is_none_or(|last| !last.is_prompt) {
                let beside_decodes = if chunks.is_empty() { None } else { self.options.max_prefill_tokens };
                let in_pipeline = (depth > 1).then_some(PIPELINE_PROMPT_TOKENS);
                tokens = [beside_decodes, in_pipeline].into_iter().flatten().fold(tokens, usize::min);
            }
            let mut num_tokens = state.num_pending().min(tokens);
            // One row of logits for the last token; or one for each token, if all of the prompt's are wanted.
            let all = state.wants_prompt_rows() && is_prompt;
            let room = self.limits.max_num_logits - logits;
            if all {
                num_tokens = num_tokens.min(room);
            }
            // No tokens, because its next one is being drawn, or because the step is full. No row, because it is full.
            let draws = |n: usize, s: &Sequence| n == s.num_pending() && s.request.max_output_len > 0;
            if state.swapped.is_some() || num_tokens == 0 || room == 0 && draws(num_tokens, state) {
                continue;
            }
            let num_tokens = self.grow(sequence, num_tokens, &chunks);
            if num_tokens == 0 {
                continue;
            }
            let state = &self.running[sequence];
            let draws = draws(num_tokens, state);
            let num_logits = if all { num_tokens } else { usize::from(draws) };
            chunks.push(Chunk {
                sequence,
                num_tokens,
                end: state.num_computed + num_tokens,
                is_prompt,
                first_logits_row: logits,
                num_logits,
                sample: draws.then_some(samples),
            });
            tokens -= num_tokens;
            logits += num_logits;
            samples += usize::from(draws);
        }
        chunks
    }

    /// Moves sequences in order from the queue to the running ones, until the next one does not fit.
    fn admit(&mut self) {
        while let Some(next) = self.queue.front() {
            // Those that end with a step under way leave their places to others.
            let go_on = self.running.iter().filter(|s| s.beam == 0 && !s.cancelled && !s.ends());
            let places: usize = go_on.map(|s| s.request.width()).sum();
            if places + next.request.width() > self.limits.max_batch_size || !self.may_join(next) {
                return;
            }
            let found = self.find_prefix();
            let Some(next) = self.queue.front() else { return };
            let needed = self.limits.blocks_for(next.prompt_len()) - found.len();
            let too_few = self.options.policy == Policy::MaxUtilization && needed > self.pool.num_free();
            if too_few || self.is_being_computed(next, found.len()) {
                self.pool.release(found.into_iter());
                return;
            }
            let Some(next) = self.queue.front_mut() else { return };
            next.cached = found.len() * self.limits.block_size;
            next.num_computed = next.cached;
            next.described = found.len();
            next.blocks = found;
            self.counters.cached_tokens += next.cached as u64;
            self.counters.prompt_tokens += next.prompt_len() as u64;
            self.running.extend(self.queue.pop_front());
        }
    }

    /// Whether every running sequence can still get all its blocks if `next` joins.
    fn may_join(&self, next: &Sequence) -> bool {
        let blocks = |beams: Option<bool>| -> usize {
            let all = self.running.iter().filter(|s| s.beam == 0).chain([next]);
            let of = all.filter(|s| beams.is_none_or(|beams| beams == s.request.beams.is_some()));
            of.map(|s| s.request.max_blocks(&self.limits)).sum()
        };
        if blocks(None) <= self.pool.num_blocks() {
            return true;
        }
        // Beams always get theirs, since all other sequences can make room for them, and these fit into the host's
        // memory. So the oldest sequence can always go on. Those whose turn comes back go first.
        self.options.policy == Policy::MaxUtilization
            && self.running.iter().all(|s| s.swapped.is_none())
            && blocks(Some(true)) <= self.pool.num_blocks()
            && blocks(Some(false)) <= self.options.host_blocks
    }

    /// Takes the blocks of the next sequence's prompt that are in the cache.
    fn find_prefix(&mut self) -> Vec<BlockId> {
        let Some(next) = self.queue.front().filter(|next| !next.wants_prompt_rows()) else { return Vec::new() };
        let most = next.most_cached(self.limits.block_size);
        next.contents.iter().take(most).map_while(|content| self.pool.find(content)).collect()
    }

    /// Whether a running sequence computes a block that `next` could use behind those that it has found. Then it is quicker
    /// to wait for that.
    fn is_being_computed(&self, next: &Sequence, found: usize) -> bool {
        let wanted = next.contents.get(found).filter(|_| found < next.most_cached(self.limits.block_size));
        let computes = |s: &Sequence| !s.cancelled && s.described <= found && s.contents.get(found) == wanted;
        wanted.is_some() && !next.wants_prompt_rows() && self.running.iter().any(computes)
    }

    /// Brings back swapped sequences, the oldest first, as long as there is room for one block more than they had.
    fn swap_in(&mut self) {
        for at in 0..self.running.len() {
            let sequence = &self.running[at];
            let Some(kept) = sequence.swapped.as_ref().filter(|_| !sequence.cancelled) else { continue };
            if self.pool.num_free() < (kept.len() + 1).min(sequence.request.max_blocks(&self.limits)) {
                return;
            }
            let numbers = self.running[at].swapped.take().unwrap_or_default();
            self.counters.swapped_in += numbers.len() as u64;
            for &number in &numbers {
                let Some(block) = self.pool.allocate() else { return };
                self.moves.push(BlockMove { from: BlockPlace::Host(number), to: BlockPlace::Cache(block) });
                self.running[at].blocks.push(block);
            }
            self.host.free.extend(numbers);
        }
    }

    /// Gives a sequence blocks for its next `n` tokens, of which it may write. Returns for how many tokens there are some.
    fn grow(&mut self, sequence: usize, n: usize, chunks: &[Chunk]) -> usize {
        let block_size = self.limits.block_size;
        let start = self.running[sequence].num_computed;
        if let Some(&shared) = self.running[sequence].blocks.get(start / block_size)
            && self.pool.holders(shared) > 1
        {
            // Another beam holds the block that it is about to write to.
            let Some(own) = self.take(sequence, chunks) else { return 0 };
            self.moves.push(BlockMove { from: BlockPlace::Cache(shared), to: BlockPlace::Cache(own) });
            self.running[sequence].blocks[start / block_size] = own;
            self.pool.release([shared].into_iter());
            self.counters.copied += 1;
        }
        while self.running[sequence].blocks.len() < self.limits.blocks_for(start + n) {
            let Some(block) = self.take(sequence, chunks) else { break };
            self.running[sequence].blocks.push(block);
        }
        n.min((self.running[sequence].blocks.len() * block_size).saturating_sub(start))
    }

    /// Takes a block for a sequence. If none is free, the youngest sequence without a part in the step makes room: one that
    /// is younger than this one, or any if this one is a beam.
    fn take(&mut self, sequence: usize, chunks: &[Chunk]) -> Option<BlockId> {
        loop {
            if let Some(block) = self.pool.allocate() {
                return Some(block);
            }
            if self.options.policy != Policy::MaxUtilization {
                return None;
            }
            let can_go = |at: usize, s: &Sequence| {
                let idle = s.in_flight == 0 && !chunks.iter().any(|chunk| chunk.sequence == at);
                idle && s.request.beams.is_none() && !s.blocks.is_empty() && s.blocks.len() <= self.host.available()
            };
            let first = if self.running[sequence].request.beams.is_some() { 0 } else { sequence + 1 };
            let mut others = self.running.iter().enumerate().skip(first);
            let (youngest, _) = others.rfind(|&(at, s)| can_go(at, s))?;
            self.swap_out(youngest);
        }
    }

    fn swap_out(&mut self, sequence: usize) {
        let blocks = std::mem::take(&mut self.running[sequence].blocks);
        self.counters.swapped_out += blocks.len() as u64;
        let numbers: Vec<u32> = blocks.iter().map_while(|_| self.host.allocate()).collect();
        for (&block, &number) in blocks.iter().zip(&numbers) {
            self.moves.push(BlockMove { from: BlockPlace::Cache(block), to: BlockPlace::Host(number) });
        }
        self.running[sequence].swapped = Some(numbers);
        self.pool.release(blocks.into_iter());
    }

    /// The step's inputs. The copies that were planned go with them.
    #[must_use]
    pub fn inputs(&mut self, chunks: &[Chunk]) -> StepInputs<'_> {
        let limits = &self.limits;
        let width = limits.max_blocks_per_seq();
        let (seqs, tokens) = (chunks.len(), chunks.iter().map(|chunk| chunk.num_tokens).sum());
        let mut step = StepInputs {
            token_ids: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            slot_mapping: Vec::with_capacity(tokens),
            block_table: Vec::with_capacity(seqs * width),
            seq_lens: Vec::with_capacity(seqs),
            cu_query_lens: Vec::with_capacity(seqs + 1),
            samples: Vec::with_capacity(seqs),
            moves: std::mem::take(&mut self.moves),
            ..StepInputs::default()
        };
        step.cu_query_lens.push(0);
        for chunk in chunks {
            let sequence = &self.running[chunk.sequence];
            step.num_decodes += usize::from(sequence.is_decode());
            for position in chunk.end - chunk.num_tokens..chunk.end {
                let block = sequence.blocks[position / limits.block_size];
                let source = sequence.source(position).expect("a chunk has tokens that are known or being drawn");
                step.token_ids.push(source.number());
                step.positions.push(int(position));
                step.slot_mapping.push(int(block.0 as usize * limits.block_size + position % limits.block_size));
            }
            let filled = limits.blocks_for(chunk.end);
            step.block_table.extend(sequence.blocks[..filled].iter().map(|&BlockId(block)| int(block as usize)));
            step.block_table.extend(std::iter::repeat_n(-1, width - filled));
            step.seq_lens.push(int(chunk.end));
            step.cu_query_lens.push(int(step.token_ids.len()));
            let last = step.token_ids.len();
            step.logits_indices.extend((last - chunk.num_logits..last).map(int));
            if chunk.sample.is_some() {
                step.samples.push(sequence.sample_request(chunk.first_logits_row + chunk.num_logits - 1));
            }
            step.scores.extend(scores(sequence, chunk));
            let Request { generation_logits, context_logits, .. } = sequence.request;
            step.return_logits |= generation_logits && chunk.sample.is_some() || context_logits && chunk.is_prompt;
        }
        step
    }

    /// Notes that a chunk of a sequence's prompt is in the cache up to `end`, so that others may use its blocks.
    pub fn landed(&mut self, sequence: usize, end: usize) {
        let Sequence { blocks, contents, described, .. } = &mut self.running[sequence];
        let full = (end / self.limits.block_size).min(contents.len());
        for at in *described..full {
            self.pool.describe(blocks[at], contents[at]);
        }
        *described = full.max(*described);
    }

    /// The members of a request's beam search, in order.
    pub fn beams(&self, id: RequestId) -> impl Iterator<Item = &Sequence> {
        self.running.iter().filter(move |s| s.id == id)
    }

    /// Replaces a request's beams by their continuations. They share their parents' blocks.
    pub fn continue_beams(&mut self, id: RequestId, next: &[Continuation]) {
        let Some(at) = self.running.iter().position(|s| s.id == id) else { return };
        let parents: Vec<Sequence> = self.running.extract_if(.., |s| s.id == id).collect();
        let child = |(beam, continuation): (usize, &Continuation)| {
            let mut child = parents[continuation.parent].clone();
            child.beam = beam;
            child.tokens.push(continuation.token);
            child.logprobs.push(continuation.logprob);
            child.candidates = None;
            child
        };
        let children: Vec<Sequence> = next.iter().enumerate().map(child).collect();
        children.iter().for_each(|child| self.pool.share(&child.blocks));
        parents.into_iter().for_each(|parent| self.pool.release(parent.blocks.into_iter()));
        self.running.splice(at..at, children);
    }
}

/// What a chunk wants scored, in this order: the prompt's tokens, then the token drawn.
fn scores(sequence: &Sequence, chunk: &Chunk) -> Vec<ScoreRequest> {
    let mut scores = Vec::new();
    let Request { logprobs, prompt_logprobs, beams, end_ids, prompt, .. } = &sequence.request;
    if let (Some(best), true) = (*prompt_logprobs, chunk.is_prompt) {
        let start = chunk.end - chunk.num_tokens;
        // The row of each token is that of the token after it.
        scores.extend(scored_tokens(prompt, start, chunk.end).iter().enumerate().map(|(at, &token)| {
            let row = chunk.first_logits_row + at;
            ScoreRequest { of: Scored::Token { row, token }, best }
        }));
    }
    if let Some(sample) = chunk.sample {
        scores.extend(logprobs.map(|best| ScoreRequest { of: Scored::Draw(sample), best }));
        let candidates = |best| ScoreRequest { of: Scored::Candidates(sample), best };
        scores.extend(beams.map(|beams| candidates(beams.candidates(end_ids.len()))));
    }
    scores
}

/// The tokens of a prompt that the rows of its positions `start..end` score.
#[must_use]
pub fn scored_tokens(prompt: &[TokenId], start: usize, end: usize) -> &[TokenId] {
    &prompt[(start + 1).min(prompt.len())..(end + 1).min(prompt.len())]
}

/// Token ids, positions and slots are below 2^31: the limits' check and the session's refusals ensure that.
fn int(n: usize) -> i32 {
    i32::try_from(n).expect("checked against the limits")
}

/// The numbers of blocks in the host's memory.
struct HostPool {
    limit: usize,
    free: Vec<u32>,
    /// Numbers below this were given out at some time.
    known: u32,
}

impl HostPool {
    fn available(&self) -> usize {
        self.free.len() + self.limit.saturating_sub(self.known as usize)
    }

    fn allocate(&mut self) -> Option<u32> {
        if let Some(number) = self.free.pop() {
            return Some(number);
        }
        let number = self.known;
        ((number as usize) < self.limit).then(|| {
            self.known += 1;
            number
        })
    }
}
