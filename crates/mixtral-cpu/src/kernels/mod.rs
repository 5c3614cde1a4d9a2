//! The kernels, one operation a file. A kernel takes slices and knows no names. A fused operation calls the functions
//! of its parts.

pub(crate) mod attention;
pub(crate) mod collective;
pub(crate) mod combine;
pub(crate) mod elementwise;
pub(crate) mod embed;
pub(crate) mod experts;
pub(crate) mod kv;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod routing;
pub(crate) mod sample;
pub(crate) mod workers;
