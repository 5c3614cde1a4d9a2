use mixtral_engine::Op;

use super::{Context, LowerError};
use crate::Launch;

pub(super) fn lower(_context: &Context<'_>, op: &Op) -> Result<Vec<Launch>, LowerError> {
    Err(LowerError::Unsupported { op: op.name(), reason: "not written yet".to_owned() })
}

/// RMSNorm, the router's linear and the routing as one kernel.
pub(super) fn norm_router_route(_context: &Context<'_>, _ops: &[Op]) -> Result<Option<Vec<Launch>>, LowerError> {
    Ok(None)
}

/// Copies tokens into the order by expert.
pub(super) fn permute(_context: &Context<'_>, op: &Op) -> Result<Launch, LowerError> {
    Err(LowerError::Unsupported { op: op.name(), reason: "not written yet".to_owned() })
}
