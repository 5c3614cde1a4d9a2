//! Sessions over a backend that computes nothing and checks everything: one step at a time, and several under way.
#![allow(unreachable_pub, reason = "a test has no outside")]

mod beams;
mod cache;
mod harness;
mod mock;
mod outputs;
mod ranks;
mod steps;
mod text;
