//! Bytes that show when something was read or written by mistake.

/// Fills with 0xff, which is a NaN in every float type and −1 in every integer type.
pub fn poison(bytes: &mut [u8]) {
    bytes.fill(0xff);
}

/// Bytes that no operation writes by chance, different at every position of a cache line.
#[must_use]
pub fn sentinel(len: usize) -> Vec<u8> {
    (0..=255u8).cycle().map(|i| i.wrapping_mul(167).wrapping_add(13)).take(len).collect()
}
