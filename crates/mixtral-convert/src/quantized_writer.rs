//! Writes a weight that is quantized on the way, some rows at a time.

use std::ops::Range;

use mixtral_checkpoint::names::part_name;
use mixtral_checkpoint::{Progress, RankWriter, TensorWriter};
use mixtral_model::{PartKind, Quantization};

use crate::error::ConvertError;
use crate::number::narrow;
use crate::quantize::{Loss, quantize_row};

/// The tensors of a quantized weight in a rank's file.
pub(crate) struct QuantizedWriter<'a> {
    quantization: Quantization,
    values: TensorWriter<'a>,
    scales: TensorWriter<'a>,
    progress: &'a dyn Progress,
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

    /// Quantizes the next rows, and writes their columns `taken`. `rows` are rows of `cols` elements, which begin at a border of
    /// groups: whole rows, if a row has one scale.
    pub(crate) fn write(&mut self, rows: &[f32], cols: usize, taken: &Range<usize>) -> Result<Loss, ConvertError> {
        let (mut integers, mut scales, mut loss) = (Vec::new(), Vec::new(), Loss::default());
        for row in rows.chunks_exact(cols) {
            loss.add(quantize_row(row, taken.clone(), self.quantization, &mut integers, &mut scales));
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
