//! Which plan a linear is computed by, from its shape, type and token count: the tables behind `mixtral build`'s ladders.

use mixtral_engine::{Op, Program, Rung};

use crate::Family;

/// The ladder of an operation of `program`; empty for operations that are no linears.
#[must_use]
pub fn ladder(_program: &Program, _op: &Op, _family: Family) -> Vec<Rung> {
    Vec::new()
}
