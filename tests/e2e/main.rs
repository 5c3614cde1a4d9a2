//! The command line as a user types it: the three stages on the example model, every kind of output, and the errors for
//! inputs that cannot work.

#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod beams;
mod chat;
mod command_line;
mod damage;
mod diff;
mod disks;
mod drivers;
mod engines;
mod eval;
mod faults;
mod filesystems;
mod generate;
mod goldens;
mod kernels;
mod kills;
mod layouts;
mod mapped;
mod older;
mod placement;
mod quantized;
mod refusals;
mod requests;
mod serve;
mod serve_answers;
mod served;
mod sessions;
mod sources;
mod stages;
mod text;
mod tool;
mod windows;
