use mixtral_engine::Op;

use super::{Context, LowerError};
use crate::Launch;

pub(super) fn lower(_context: &Context<'_>, op: &Op) -> Result<Vec<Launch>, LowerError> {
    Err(LowerError::Unsupported { op: op.name(), reason: "not written yet".to_owned() })
}
