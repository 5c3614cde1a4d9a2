//! Writes a weight that is quantized on the way, some rows at a time.

use std::ops::Range;

use mixtral_checkpoint::names::part_name;
use mixtral_checkpoint::{Progress, RankWriter, TensorWriter};
use mixtral_model::{PartKind, Quantization};

use crate::error::ConvertError;
use crate::feedback::Block;
use crate::number::narrow;
use crate::quantize::{Loss, quantize_row};

/// The tensors of a quantized weight in a rank's file.
pub(crate) struct QuantizedWriter<'a> {
    quantization: Quantization,
    values: TensorWriter<'a>,
    scales: TensorWriter<'a>,
    progress: &'a dyn Progress,
}

/// Rows that are quantized together, or columns of them.
pub(crate) struct Rows<'a> {
    /// Their elements.
    pub(crate) values: &'a [f32],
    /// Elements of a row. They begin at a border of groups, and at a block of the feedback: whole rows, if a row has one scale.
    pub(crate) cols: usize,
    /// The columns of them that are written.
    pub(crate) taken: Range<usize>,
    /// The blocks of these columns, where there are statistics of them.
    pub(crate) feedback: Option<&'a [Block]>,
}

impl<'a> QuantizedWriter<'a> {
    /// The weight `name` of a rank's file, without rows.
    pub(crate) fn new(
        rank: &'a RankWriter,
        name: &str,
        quantization: Quantization,
        progress: &'a dyn Progress,
    ) -> QuantizedWriter<'a> {
        let part = |kind| rank.tensor(&part_name(name, kind));
        QuantizedWriter { quantization, values: part(PartKind::Values), scales: part(PartKind::Scales), progress }
    }

    /// Quantizes the next rows and writes them.
    pub(crate) fn write(&mut self, Rows { values, cols, taken, feedback }: Rows<'_>) -> Result<Loss, ConvertError> {
        let (mut integers, mut scales, mut loss) = (Vec::new(), Vec::new(), Loss::default());
        for row in values.chunks_exact(cols) {
            let taken = taken.clone();
            loss.add(quantize_row(row, taken, self.quantization, feedback, &mut integers, &mut scales));
        }
        let scales = narrow(self.quantization.scale, &scales);
        self.values.write(&integers)?;
        self.scales.write(&scales)?;
        self.progress.advance((integers.len() + scales.len()) as u64);
        Ok(loss)
    }

    /// Ends the weight, which has all its rows.
    pub(crate) fn finish(self) -> Result<(), ConvertError> {
        self.values.finish()?;
        Ok(self.scales.finish()?)
    }
}
