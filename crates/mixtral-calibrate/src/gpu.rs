//! A layer on a GPU. Launches before each linear sum up its rows, so they never leave the device.

use std::sync::Arc;

use mixtral_build::KernelOptions;
use mixtral_convert::{FloatModel, statistics};
use mixtral_cuda::{CudaBackend, CudaOptions, KvBlocks, Loading};
use mixtral_engine::{Inspect, StepInputs};
use mixtral_kernels::lower::observe::{BLOCK, Lists, Observation, Sums};
use mixtral_kernels::{Code, Executable, KernelImages, Schedule};

use crate::cpu::bytes;
use crate::error::CalibrateError;
use crate::layer::{Layer, Place};
use crate::layers::{self, Stage};
use crate::machine::{Gpu, schedule};
use crate::observe::Observed;
use crate::step;
use crate::weights::Tensors;

// Kernels sum up the products that statistics are made of. Their crates do not know each other.
const _: () = assert!(BLOCK == statistics::BLOCK);

pub(crate) struct OnGpu {
    model: Arc<FloatModel>,
    layer: Layer,
    options: CudaOptions,
    executable: Executable,
    /// Where the sums of each place lie.
    sums: Vec<Sums>,
}

struct Loaded<'a> {
    layer: &'a Layer,
    sums: &'a [Sums],
    backend: CudaBackend,
}

impl OnGpu {
    pub(crate) fn new(
        model: &Arc<FloatModel>,
        mut layer: Layer,
        gpu: &Gpu,
        moments: bool,
    ) -> Result<OnGpu, CalibrateError> {
        let code = gpu.code()?;
        let (schedule, sums) = observed(&mut layer, &gpu.kernels, code, moments)?;
        let executable = gpu.kernels.executable(schedule, KernelImages::new(code, None))?;
        // A layer runs a few dozen steps, so it is not worth a graph.
        let options = CudaOptions { graphs: false, ..gpu.options() };
        Ok(OnGpu { model: Arc::clone(model), layer, options, executable, sums })
    }
}

/// The schedule of a layer that sums up what comes to each of its places, and where the sums lie.
fn observed(
    layer: &mut Layer,
    kernels: &KernelOptions,
    code: Code,
    moments: bool,
) -> Result<(Schedule, Vec<Sums>), CalibrateError> {
    let mut schedule = schedule(&mut layer.program, kernels, code)?;
    schedule.keep_largest(false);
    let mut sums = Vec::with_capacity(layer.places.len());
    for Place { what, op, rows, lists, in_order } in &layer.places {
        let products = moments && what.input(0, 0).is_some();
        let lists = lists.as_ref().map(|[offsets, order]| Lists { offsets, order, in_order: *in_order });
        sums.push(schedule.observe(&layer.program, &Observation { op: *op, input: rows, lists, products })?);
    }
    Ok((schedule, sums))
}

impl Stage for OnGpu {
    fn load(&mut self, layer: usize) -> Result<Box<dyn layers::Loaded + '_>, CalibrateError> {
        let program = &self.layer.program;
        let weights = Tensors::of(program, &self.model, self.model.tensors_of_layer(layer)).streamed();
        let loading = Loading::new(program.clone(), &weights, &self.executable, self.options)?;
        let kv_blocks = loading.kv_blocks(KvBlocks::Exactly(step::blocks(&program.limits)))?;
        let backend = loading.finish(kv_blocks, None)?;
        Ok(Box::new(Loaded { layer: &self.layer, sums: &self.sums, backend }))
    }
}

impl layers::Loaded for Loaded<'_> {
    fn step(&mut self, inputs: &StepInputs<'_>, rows: &mut Vec<u8>) -> Result<(), CalibrateError> {
        let first = usize::from(!rows.is_empty());
        if first == 1 {
            self.backend.write_buffer(&self.layer.input, rows)?;
        }
        self.backend.run_ops(first..self.layer.program.ops.len(), inputs)?;
        *rows = bytes(&self.backend, &self.layer.output, inputs)?.1;
        Ok(())
    }

    fn seen(mut self: Box<Self>) -> Result<Vec<Vec<Observed>>, CalibrateError> {
        let mut seen = Vec::with_capacity(self.sums.len());
        for Sums { width, lists, counts, amax, products } in self.sums.iter().copied() {
            let mut words = |start: usize, bytes: usize| self.backend.take_workspace(start..start + bytes);
            let counts = words(counts, 8 * lists)?;
            let amax = words(amax, 4 * lists)?;
            let products = products.map(|start| words(start, 8 * lists * width * BLOCK)).transpose()?;
            let mut of_lists = products.iter().flat_map(|bytes| bytes.chunks_exact(8 * width * BLOCK));
            let found = counts.as_chunks().0.iter().zip(amax.as_chunks().0).map(|(&count, &amax)| {
                let products = of_lists.next().unwrap_or_default().as_chunks().0;
                let products = products.iter().map(|&b| f64::from_le_bytes(b)).collect();
                Observed::from_sums(width, u64::from_le_bytes(count), f32::from_le_bytes(amax), products)
            });
            seen.push(found.collect());
        }
        Ok(seen)
    }
}

#[cfg(test)]
mod tests {
    use mixtral_build::DenseLinears;
    use mixtral_checkpoint::CheckpointConfig;
    use mixtral_kernels::{Arch, Search};
    use mixtral_model::{DType, Mapping, ModelConfig};

    use super::*;

    /// What a layer of Mixtral 8x7B takes on a GPU, with steps of 8 sequences of 512 tokens: the default of the tool.
    #[test]
    fn a_layer_of_mixtral_8x7b_takes_the_memory_that_the_documents_say() {
        let model = ModelConfig { num_layers: 1, ..ModelConfig::mixtral_8x7b(DType::Bf16) };
        let mut layer = Layer::new(&CheckpointConfig::new(model, Mapping::single()), step::limits(8, 512, 512));
        let kernels = KernelOptions {
            archs: vec![Arch::SM_90A],
            dense_linears: DenseLinears::Tuned,
            tuned_experts: true,
            workers: 1,
            nvrtc: Search::default(),
            cache: None,
        };
        let (schedule, sums) = observed(&mut layer, &kernels, Code::Sass(Arch::SM_90A), true).unwrap();
        schedule.check(&layer.program).unwrap();
        assert_eq!(
            sums.iter().map(|sums| sums.width * sums.lists).sum::<usize>(),
            2 * 4096 + 8 * (4096 + 14336) + 2 * 1024
        );
        let program = &layer.program;
        let cache = step::blocks(&program.limits) * program.kv.block_bytes(program.limits.block_size);
        let bytes = [program.weight_bytes(), program.arena_bytes, schedule.scratch_bytes, cache];
        // docs/accuracy.md says 4.2 GB. The driver's context and the kernels come on top; nothing here knows their size.
        assert_eq!(bytes.iter().sum::<usize>().div_ceil(100_000_000), 42, "{bytes:?}");
    }
}
