//! Generation: from prompts to streams of tokens, over any backend.
//!
//! Reading order: [`request`] (what is asked for, and what may be refused), [`blocks`] (the pool of KV blocks) with
//! [`prefix`] (what blocks contain), [`sequence`] (one request under way, or one of its beams), [`text`] (its output as
//! text) with [`stop`] (stop words across tokens), [`schedule`] (who computes what in the next step, and with which
//! blocks), [`execute`] and [`ranks`] (by whom it is computed), [`beams`] (a beam search), [`session`] (submit, step,
//! cancel).
#![forbid(unsafe_code)]

pub mod beams;
pub mod blocks;
pub mod execute;
pub mod ngrams;
pub mod prefix;
pub mod ranks;
pub mod request;
pub mod schedule;
pub mod sequence;
pub mod session;
pub mod stop;
pub mod text;

pub use blocks::BlockPool;
pub use execute::{Executor, Local};
pub use mixtral_engine::SamplingParams;
pub use mixtral_tokenizer::{BadWords, Tokenizer, TokenizerError};
pub use request::{
    Beams, Constraint, EarlyStopping, FinishReason, Hypothesis, Refusal, Request, RequestError, RequestId,
    TokenLogprobs,
};
pub use schedule::{Policy, SessionOptions};
pub use session::{Event, Session, SessionStats, Timing};
