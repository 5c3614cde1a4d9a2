//! Ranks as processes: this test binary starts itself, one process a rank.

mod death;
mod hosts;
mod job;
mod start;
mod worker;
