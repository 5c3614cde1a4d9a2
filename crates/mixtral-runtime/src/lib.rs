//! Generation: from prompts to streams of tokens, over any backend.
//!
//! Reading order: [`request`] (what is asked for, and what may be refused), [`blocks`] (the
//! pool of KV blocks), [`sequence`] (one request under way), [`text`] (its output as text) with [`stop`] (stop words across
//! tokens), [`schedule`] (who
//! computes what in the next step), [`execute`] and [`ranks`] (by whom it is computed), [`session`] (submit, step,
//! cancel).
#![forbid(unsafe_code)]

pub mod blocks;
pub mod execute;
pub mod ranks;
pub mod request;
pub mod schedule;
pub mod sequence;
pub mod session;
pub mod stop;
pub mod text;

pub use blocks::BlockPool;
pub use execute::{Executor, Local};
pub use mixtral_tokenizer::{BadWords, Tokenizer, TokenizerError};
pub use request::{FinishReason, Refusal, Request, RequestId};
pub use session::{Event, Session, Timing};
