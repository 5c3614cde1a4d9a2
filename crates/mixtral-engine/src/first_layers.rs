//! Cuts a program to its first layers and the operations that follow the last layer.

use crate::{Op, Program};

/// Why a program cannot be cut.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CutError {
    /// The program has fewer layers.
    #[error("{wanted} layers of a program of {found}; ask for 1 to {found}")]
    Layers {
        /// The layers asked for.
        wanted: usize,
        /// The program's layers.
        found: usize,
    },
    /// Layers that are not alike.
    #[error("the program cannot be cut after layer {layer}: {problem}")]
    Unlike {
        /// The last layer to keep.
        layer: usize,
        /// What is missing.
        problem: &'static str,
    },
}

impl Program {
    /// The program of a model that has only the first `layers` layers of this one. It has the same operations, buffers
    /// and weights before the cut, then the operations behind the last layer. These read what the last kept layer
    /// wrote. The shorter program runs on the kernels of this one.
    ///
    /// # Errors
    /// If there are fewer layers, or if the layers are not alike.
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
        // The last kept layer has to do the same operations as the program's last layer, from attention on.
        let cut = kept + (behind - last);
        let pairs = self.ops[kept..cut].iter().zip(&self.ops[last..behind]);
        if cut > last || !pairs.into_iter().all(|(a, b)| a.name() == b.name()) {
            return Err(unlike("it does other operations than the last one"));
        }
        let mut ops = self.ops[..cut].to_vec();
        ops.extend_from_slice(&self.ops[behind..]);
        // The gather reads the same output of the operation before it as in the whole program.
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
        program.kv_scales.truncate(layers);
        (program.num_layers, program.kv.num_layers) = (layers, layers);
        program.plan_arena();
        Ok(program)
    }
}
