//! Unpacks the 32-bit words in which libraries store quantized linears.
//!
//! Every function fills rows `rows`, bytes `cols` of a part of a linear (values, zeros) as the checkpoint has it. `words`
//! is the rectangle of stored words that [`Words::rectangle`] names, row-major, little-endian.

use std::ops::Range;

use mixtral_model::Bits;

/// Bytes of a word.
pub const WORD: usize = 4;

/// How the bytes of a part lie in a stored matrix of words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Words {
    /// Byte `(r, c)` is byte `c % 4` of word `(c / 4, r)`: along the inputs, eight nibbles a word, the lowest first.
    Turned,
    /// Nibble `c` of row `r` is in word `(c, r / 8)`, at the place of [`AWQ_ORDER`] that holds `r % 8`.
    TurnedNibbles,
    /// Byte `(r, c)` is a nibble of word `(c, r / 8)`, plus one: the first version of GPTQ stores zeros less one. The
    /// nibble's place is that of `order` that holds `r % 8`. One is added to all nibbles of a word as to one number,
    /// because the library subtracts so.
    Nibbles {
        /// Which of eight rows is in each place, the lowest first.
        order: [u8; 8],
        /// Whether one was subtracted.
        less_one: bool,
    },
    /// Byte `(r, c)` is the field `r % n` of the word `(r / n, c)`, where `n` fields of this size make a word.
    Fields(Bits),
}

/// Which of eight neighbouring rows AutoAWQ stores in each nibble of a word, the lowest first.
pub const AWQ_ORDER: [u8; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Eight neighbouring rows in their order.
pub const ORDER: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

impl Words {
    /// The stored rows and columns that hold rows `rows`, bytes `cols` of the part.
    #[must_use]
    pub fn rectangle(self, rows: &Range<usize>, cols: &Range<usize>) -> (Range<usize>, Range<usize>) {
        let around = |range: &Range<usize>, n: usize| range.start / n..range.end.div_ceil(n);
        match self {
            Words::Turned => (around(cols, WORD), rows.clone()),
            // A byte holds two of the nibbles, and eight are turned at a time.
            Words::TurnedNibbles => (8 * (cols.start / WORD)..8 * cols.end.div_ceil(WORD), around(rows, 8)),
            Words::Nibbles { .. } => (cols.clone(), around(rows, 8)),
            Words::Fields(bits) => (around(rows, WORD * bits.per_byte()), cols.clone()),
        }
    }

    /// Writes rows `rows`, bytes `cols` of the part to `out`.
    ///
    /// # Panics
    /// If `words` or `out` have another size.
    pub fn unpack(self, words: &[u8], rows: Range<usize>, cols: Range<usize>, out: &mut [u8]) {
        let (stored_rows, stored_cols) = self.rectangle(&rows, &cols);
        assert_eq!(words.len(), stored_rows.len() * stored_cols.len() * WORD);
        assert_eq!(out.len(), rows.len() * cols.len());
        let (words, width) = (words.as_chunks().0, stored_cols.len());
        let word = |row: usize, col: usize| u32::from_le_bytes(words[row * width + col]);
        match self {
            Words::Turned => {
                let mut strips = Strips { cols, out };
                for first in (0..stored_rows.len()).step_by(STRIP) {
                    for row in 0..rows.len() {
                        strips.put(row, first, (first..stored_rows.len()).map(|stored| word(stored, row)));
                    }
                }
            }
            Words::TurnedNibbles => {
                let mut strips = Strips { cols, out };
                for first in (0..stored_rows.len() / 8).step_by(STRIP) {
                    for block in 0..width {
                        let mut turned = [[0; STRIP]; 8];
                        let count = STRIP.min(stored_rows.len() / 8 - first);
                        for at in 0..count {
                            let eight = turn(std::array::from_fn(|k| word(8 * (first + at) + k, block)));
                            turned.iter_mut().zip(eight).for_each(|(row, word)| row[at] = word);
                        }
                        for (row, turned) in AWQ_ORDER.iter().zip(turned) {
                            let row = 8 * (stored_cols.start + block) + usize::from(*row);
                            if rows.contains(&row) {
                                strips.put(row - rows.start, first, turned.into_iter().take(count));
                            }
                        }
                    }
                }
            }
            Words::Nibbles { order, less_one } => {
                for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
                    let place = order.iter().position(|&r| usize::from(r) == row % 8).expect("eight rows have places");
                    for (col, out) in out.iter_mut().enumerate() {
                        let one = if less_one { 0x1111_1111 } else { 0 };
                        let word = word(col, row / 8 - stored_cols.start).wrapping_add(one);
                        *out = (word >> (4 * place)).to_le_bytes()[0] & 15;
                    }
                }
            }
            Words::Fields(bits) => {
                let in_word = WORD * bits.per_byte();
                for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
                    for (col, out) in out.iter_mut().enumerate() {
                        let word = word(row / in_word - stored_rows.start, col);
                        *out = (word >> (32 / in_word * (row % in_word))).to_le_bytes()[0] & bits.max();
                    }
                }
            }
        }
    }
}

/// Words of a row that are written at a time. So few stored rows are read together that their pages stay at hand.
const STRIP: usize = 16;

/// Rows of bytes `cols` that are written in strips of words.
struct Strips<'a> {
    cols: Range<usize>,
    out: &'a mut [u8],
}

impl Strips<'_> {
    /// Writes up to [`STRIP`] words to a row, from the `first` of those that have bytes of the row on.
    fn put(&mut self, row: usize, first: usize, words: impl Iterator<Item = u32>) {
        let mut strip = [0; STRIP * WORD];
        let mut end = 0;
        for (bytes, word) in strip.as_chunks_mut::<WORD>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
            end += WORD;
        }
        // Bytes of the first and the last word may be outside of the row.
        let start = self.cols.start / WORD * WORD + first * WORD;
        let end = (start + end).min(self.cols.end);
        let begin = start.max(self.cols.start);
        let at = row * self.cols.len() + begin - self.cols.start;
        self.out[at..at + end - begin].copy_from_slice(&strip[begin - start..end - start]);
    }
}

/// Turns eight words of eight nibbles: nibble `i` of word `j` becomes nibble `j` of word `i`.
fn turn(mut words: [u32; 8]) -> [u32; 8] {
    // Swaps squares of 4 × 4 nibbles across the diagonal, then of 2 × 2 within them, then single nibbles.
    for (half, shift, low) in [(4, 16, 0x0000_ffffu32), (2, 8, 0x00ff_00ff), (1, 4, 0x0f0f_0f0f)] {
        for j in (0..8).filter(|j| j & half == 0) {
            let swapped = ((words[j] >> shift) ^ words[j + half]) & low;
            words[j + half] ^= swapped;
            words[j] ^= swapped << shift;
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A stored matrix, and the part that it stands for by the sentence at each variant, one element at a time.
    fn element(layout: Words, stored: &[u32], width: usize, r: usize, c: usize) -> u8 {
        let nibble = |word: u32, place: usize| ((word >> (4 * place)) & 15) as u8;
        let place = |order: [u8; 8]| order.iter().position(|&row| usize::from(row) == r % 8).unwrap();
        match layout {
            Words::Turned => stored[c / 4 * width + r].to_le_bytes()[c % 4],
            Words::TurnedNibbles => {
                let at = |k: usize| nibble(stored[k * width + r / 8], place(AWQ_ORDER));
                at(2 * c) | at(2 * c + 1) << 4
            }
            Words::Nibbles { order, less_one } => {
                let word = stored[c * width + r / 8];
                nibble(if less_one { word.wrapping_add(0x1111_1111) } else { word }, place(order))
            }
            Words::Fields(Bits::Four) => nibble(stored[r / 8 * width + c], r % 8),
            Words::Fields(Bits::Eight) => stored[r / 4 * width + c].to_le_bytes()[r % 4],
        }
    }

    proptest! {
        #[test]
        fn any_rectangle_is_unpacked_as_its_layout_says(
            layout in prop::sample::select(vec![
                Words::Turned,
                Words::TurnedNibbles,
                Words::Nibbles { order: AWQ_ORDER, less_one: false },
                Words::Nibbles { order: ORDER, less_one: true },
                Words::Fields(Bits::Four),
                Words::Fields(Bits::Eight),
            ]),
            (blocks, words) in (1usize..5, 1usize..5),
            (top, bottom, left, right) in (0usize..9, 0usize..9, 0usize..9, 0usize..9),
            seed in any::<u32>(),
        ) {
            // A part of `8 · blocks` rows and `4 · words` bytes a row.
            let (rows, cols) = (8 * blocks, WORD * words);
            let (height, width) = match layout {
                Words::Turned => (words, rows),
                Words::TurnedNibbles => (8 * words, blocks),
                Words::Nibbles { .. } => (cols, blocks),
                Words::Fields(bits) => (rows / (WORD * bits.per_byte()), cols),
            };
            let hash = |i: u32| (i ^ seed).wrapping_mul(0x9e37_79b9).rotate_left(i % 31) ^ seed;
            let stored: Vec<u32> = (0..u32::try_from(height * width).unwrap()).map(hash).collect();
            let wanted_rows = top.min(rows - 1)..(rows - bottom.min(rows - 1)).max(top.min(rows - 1) + 1);
            let wanted_cols = left.min(cols - 1)..(cols - right.min(cols - 1)).max(left.min(cols - 1) + 1);
            let (read_rows, read_cols) = layout.rectangle(&wanted_rows, &wanted_cols);
            let read: Vec<u8> = read_rows
                .flat_map(|row| read_cols.clone().map(move |col| (row, col)))
                .flat_map(|(row, col)| stored[row * width + col].to_le_bytes())
                .collect();
            let mut out = vec![0; wanted_rows.len() * wanted_cols.len()];
            layout.unpack(&read, wanted_rows.clone(), wanted_cols.clone(), &mut out);
            let expected: Vec<u8> = wanted_rows
                .flat_map(|r| wanted_cols.clone().map(move |c| (r, c)))
                .map(|(r, c)| element(layout, &stored, width, r, c))
                .collect();
            prop_assert_eq!(out, expected);
        }
    }

    #[test]
    fn zeros_less_one_carry_from_nibble_to_nibble() {
        // Zeros 0, 1, 8, 15, 0, 0, 3, 9, less one as one number.
        let stored = 0x9300_f810u32.wrapping_sub(0x1111_1111);
        let mut zeros = [0; 8];
        let layout = Words::Nibbles { order: ORDER, less_one: true };
        layout.unpack(&stored.to_le_bytes(), 0..8, 0..1, &mut zeros);
        assert_eq!(zeros, [0, 1, 8, 15, 0, 0, 3, 9]);
    }
}
