//! Ranks as processes: this test binary starts itself, once for each rank.

mod death;
mod hosts;
mod job;
mod start;
mod worker;
