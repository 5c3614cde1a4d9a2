//! Bytes that show when something is read or written that should not be.

/// Fills with 0xff: a NaN in every float type, −1 in every integer.
pub fn poison(bytes: &mut [u8]) {
    bytes.fill(0xff);
}

/// A sentinel that no operation writes by chance, different at every position of a cache line.
#[must_use]
pub fn sentinel(len: usize) -> Vec<u8> {
    (0..=255u8).cycle().map(|i| i.wrapping_mul(167).wrapping_add(13)).take(len).collect()
}
