//! A program cut short: its first layers, and what comes after the last.

use crate::{Op, Program};

/// A program that cannot be cut so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CutError {
    /// Not so many layers.
    #[error("{wanted} layers of a program of {found}; ask for 1 to {found}")]
    Layers {
        /// The layers asked for.
        wanted: usize,
        /// Those that there are.
        found: usize,
    },
    /// Layers that are not alike.
    #[error("the program cannot be cut after layer {layer}: {problem}")]
    Unlike {
        /// The last layer that was to be kept.
        layer: usize,
        /// What is missing.
        problem: &'static str,
    },
}

impl Program {
    /// The program of a model that has only the first `layers` layers of this one: the same operations, buffers and weights
    /// before the cut, then those behind the last layer, which read what the last layer left wrote. Kernels chosen for
    /// this program are those of the shorter one.
    ///
    /// # Errors
    /// If there are not so many layers, or the layers are not alike.
    pub fn first_layers(&self, layers: usize) -> Result<Program, CutError> {
        let found = self.kv.num_layers;
        if layers == 0 || layers > found {
            return Err(CutError::Layers { wanted: layers, found });
        }
        if layers == found {
            return Ok(self.clone());
        }
        let unlike = |problem| CutError::Unlike { layer: layers - 1, problem };
        let attends = |wanted: usize| {
            self.ops.iter().position(|op| matches!(op, Op::Attention { layer, .. } if *layer == wanted))
        };
        let no_attention = || unlike("a layer has no attention");
        let (last, kept) =
            (attends(found - 1).ok_or_else(no_attention)?, attends(layers - 1).ok_or_else(no_attention)?);
        let behind = self.ops.iter().position(|op| matches!(op, Op::GatherRows { .. }));
        let behind =
            behind.filter(|&at| at > last).ok_or_else(|| unlike("no rows are gathered behind the last layer"))?;
        // What the last layer does from its attention on, this one does too.
        let cut = kept + (behind - last);
        let pairs = self.ops[kept..cut].iter().zip(&self.ops[last..behind]);
        if cut > last || !pairs.into_iter().all(|(a, b)| a.name() == b.name()) {
            return Err(unlike("it does other operations than the last one"));
        }
        let mut ops = self.ops[..cut].to_vec();
        ops.extend_from_slice(&self.ops[behind..]);
        // What is gathered is the same output of the operation before.
        match &mut ops[cut] {
            Op::GatherRows { input, .. } => {
                let output = self.ops[behind - 1].writes().iter().position(|out| out == input);
                let here = output.and_then(|output| self.ops[cut - 1].writes().get(output).copied());
                *input = here.ok_or_else(|| unlike("what is gathered is not what the last layer wrote"))?.to_owned();
            }
            _ => return Err(unlike("no rows are gathered behind the last layer")),
        }
        let mut program = self.clone();
        program.buffers.retain(|b| ops.iter().any(|op| op.writes().contains(&b.name.as_str())));
        program.weights.retain(|w| ops.iter().any(|op| op.weights().contains(&w.name.as_str())));
        program.ops = ops;
        (program.num_layers, program.kv.num_layers) = (layers, layers);
        program.plan_arena();
        Ok(program)
    }
}
