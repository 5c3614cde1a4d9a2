//! Where compiled kernels come from.

use mixtral_kernels::Kernel;

/// A compiled kernel.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// A cubin, or PTX. Kernels may share one; it is loaded once.
    pub bytes: &'a [u8],
    /// The kernel's name in it.
    pub entry: &'a str,
}

/// The compiled kernels of one architecture.
pub trait Images {
    /// The image of a kernel, if there is one.
    fn find(&self, kernel: &Kernel) -> Option<Image<'_>>;
}
