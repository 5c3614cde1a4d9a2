//! Reads a rectangle of a tensor from a file, however its rows are arranged there.
//!
//! Files are read and not mapped, because mapped pages count as resident memory until the system takes them back.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::Located;
use super::quantized::words::{WORD, Words};

/// How a tensor `[rows, columns]` lies in a stored matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Row `i` is the stored row `first + i`.
    Rows {
        /// The stored row of row 0.
        first: usize,
    },
    /// In each head, row `i` of the first half is stored at `2 i`, and row `i` of the second half at
    /// `2 (i − head_dim / 2) + 1`. So the rows of a rotary pair are stored beside each other, while in transformers'
    /// order they are half a head apart.
    Interleaved {
        /// Rows of a head.
        head_dim: usize,
    },
    /// Element `(r, c)` is stored at `(first + c, r)`.
    Transposed {
        /// The stored row of column 0.
        first: usize,
    },
    /// Bytes that are unpacked from a stored matrix of 32-bit words.
    Packed(Words),
    /// Bytes that are stored less 128, as signed ones.
    Signed,
    /// Every element is the f32 with these bytes, which was read when the source was opened.
    Number([u8; 4]),
}

/// Row segments of at least this many bytes are read one by one. Shorter ones are cut out of whole rows.
const MIN_SEGMENT: usize = 4096;

/// When short segments are cut out of whole rows, this many bytes of rows are read at a time.
const CUT_BYTES: usize = 1 << 18;

/// How many stored rows of a transposed tensor are transposed at a time.
const TURN_ROWS: usize = 64;

impl Located {
    /// The best size, in bytes, of the pieces in which the tensor is read. Pieces of a transposed tensor are larger,
    /// because it is read in strips of its stored rows, and these are short if a piece has few rows.
    #[must_use]
    pub fn chunk_bytes(&self) -> usize {
        match self.view {
            View::Rows { .. } | View::Interleaved { .. } | View::Signed | View::Number(_) => 1 << 19,
            View::Transposed { .. } | View::Packed(_) => 1 << 24,
        }
    }

    /// Reads the rectangle `rows` × `cols` of the tensor into `out`, row-major. `scratch` is reused between calls.
    ///
    /// # Errors
    /// What the system said.
    ///
    /// # Panics
    /// If `out` does not have the size of the rectangle.
    pub fn read(
        &self,
        file: &File,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> io::Result<()> {
        assert_eq!(out.len(), rows.len() * cols.len() * self.elem.size());
        match self.view {
            View::Rows { first } => self.read_rows(file, rows.start + first..rows.end + first, cols, out, scratch),
            View::Interleaved { head_dim } => {
                let row_bytes = cols.len() * self.elem.size();
                for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
                    let (head, within, half) = (row / head_dim, row % head_dim, head_dim / 2);
                    let stored = head * head_dim + 2 * (within % half) + within / half;
                    self.read_rows(file, stored..stored + 1, cols.clone(), out, scratch)?;
                }
                Ok(())
            }
            View::Transposed { first } => self.read_turned(file, first, rows, cols, out, scratch),
            View::Packed(layout) => {
                let (stored_rows, stored_cols) = layout.rectangle(&rows, &cols);
                scratch.resize(stored_rows.len() * stored_cols.len() * WORD, 0);
                self.read_rows(file, stored_rows, stored_cols, scratch, &mut Vec::new())?;
                layout.unpack(scratch, rows, cols, out);
                Ok(())
            }
            View::Signed => {
                self.read_rows(file, rows, cols, out, scratch)?;
                out.iter_mut().for_each(|byte| *byte ^= 128);
                Ok(())
            }
            View::Number(bytes) => {
                out.as_chunks_mut().0.fill(bytes);
                Ok(())
            }
        }
    }

    /// Bytes of an element of the stored matrix.
    #[must_use]
    pub fn stored_size(&self) -> usize {
        if matches!(self.view, View::Packed(_)) { WORD } else { self.elem.size() }
    }

    fn offset(&self, row: usize, col: usize) -> u64 {
        self.start + (row as u64 * self.stored_cols as u64 + col as u64) * self.stored_size() as u64
    }

    /// Reads stored rows `rows`, columns `cols`.
    fn read_rows(
        &self,
        file: &File,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> io::Result<()> {
        let size = self.stored_size();
        let segment = cols.len() * size;
        if cols.len() == self.stored_cols {
            return file.read_exact_at(out, self.offset(rows.start, 0));
        }
        if segment >= MIN_SEGMENT {
            for (row, out) in rows.zip(out.chunks_exact_mut(segment)) {
                file.read_exact_at(out, self.offset(row, cols.start))?;
            }
            return Ok(());
        }
        let row_bytes = self.stored_cols * size;
        let at_a_time = (CUT_BYTES / row_bytes).max(1);
        for (start, out) in rows.clone().step_by(at_a_time).zip(out.chunks_mut(at_a_time * segment)) {
            let count = out.len() / segment;
            scratch.resize(count * row_bytes, 0);
            file.read_exact_at(scratch, self.offset(start, 0))?;
            for (row, out) in scratch.chunks_exact(row_bytes).zip(out.chunks_exact_mut(segment)) {
                out.copy_from_slice(&row[cols.start * size..cols.end * size]);
            }
        }
        Ok(())
    }

    fn read_turned(
        &self,
        file: &File,
        first: usize,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> io::Result<()> {
        let size = self.elem.size();
        let (row_bytes, strip_bytes) = (cols.len() * size, rows.len() * size);
        for start in cols.clone().step_by(TURN_ROWS) {
            let strips = TURN_ROWS.min(cols.end - start);
            // A stored row is a column of the tensor. The buffer is taken out of `scratch` during the call, because the
            // call must not use it as well.
            let mut turned = std::mem::take(scratch);
            turned.resize(strips * strip_bytes, 0);
            let stored = first + start..first + start + strips;
            self.read_rows(file, stored, rows.clone(), &mut turned, &mut Vec::new())?;
            let at = (start - cols.start) * size;
            for (row, out) in out.chunks_exact_mut(row_bytes).enumerate() {
                for (strip, out) in turned.chunks_exact(strip_bytes).zip(out[at..].chunks_exact_mut(size)) {
                    out.copy_from_slice(&strip[row * size..(row + 1) * size]);
                }
            }
            *scratch = turned;
        }
        Ok(())
    }
}
