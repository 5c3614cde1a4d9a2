//! Compiles many kernels, several at a time, except those that are in the cache.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::ThreadPoolBuilder;
use rayon::prelude::*;

use crate::compile::{Code, CompileError, Compiled, Compiler};
use crate::{Cache, Kernel};

/// What came of a batch.
#[derive(Debug)]
pub struct Batch {
    /// Every kernel that was asked for, in the order asked.
    pub kernels: Vec<(Kernel, Code, Compiled)>,
    /// How many of them came from the cache.
    pub from_cache: usize,
    /// What went wrong with the cache, if anything did.
    pub cache_warning: Option<String>,
}

/// Stack of a compiling thread. It is large because the compiler's recursion follows the nesting of templates.
const STACK_BYTES: usize = 32 << 20;

/// Compiles kernels on `workers` threads. After each kernel, its thread calls `progress` with the number of kernels
/// that are done.
///
/// # Errors
/// The error of a kernel that cannot be compiled. The kernels that remain are then not compiled.
pub fn compile_all(
    compiler: &Compiler,
    work: &[(Kernel, Code)],
    workers: usize,
    cache: Option<&Cache>,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Batch, CompileError> {
    let (done, from_cache) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let one = |(kernel, code): &(Kernel, Code)| {
        let digest = compiler.digest(kernel, *code)?;
        let output = match cache.and_then(|cache| cache.get(&digest)) {
            Some(output) => {
                from_cache.fetch_add(1, Ordering::Relaxed);
                output
            }
            None => {
                let output = compiler.output(kernel, *code)?;
                if let Some(cache) = cache {
                    cache.put(&digest, &output);
                }
                output
            }
        };
        let compiled = compiler.examine(kernel, *code, output)?;
        progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        Ok((kernel.clone(), *code, compiled))
    };
    let pool = ThreadPoolBuilder::new()
        .num_threads(workers.max(1))
        .stack_size(STACK_BYTES)
        .build()
        .map_err(|e| CompileError::Threads(e.to_string()))?;
    // A kernel takes from milliseconds to seconds, so threads take kernels one by one.
    let kernels = pool.install(|| work.par_iter().with_max_len(1).map(one).collect::<Result<_, CompileError>>())?;
    let from_cache = from_cache.into_inner();
    Ok(Batch { kernels, from_cache, cache_warning: cache.and_then(Cache::warning) })
}
