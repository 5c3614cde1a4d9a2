//! Newtypes for the indices that are easy to confuse.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A decoder layer, counted over the whole model (not over one pipeline stage).
    LayerIdx(usize)
);
id!(
    /// An expert, counted over the whole model (not over one expert-parallel rank).
    ExpertId(usize)
);
id!(
    /// A process of the job: `pp_rank · tp_size + tp_rank`.
    Rank(usize)
);
id!(
    /// A block of the paged KV pool.
    BlockId(u32)
);
id!(
    /// A vocabulary entry.
    TokenId(u32)
);
