//! The CUDA kernels of an engine: chooses the plan of each linear, and compiles every kernel that the programs launch.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mixtral_engine::{Op, Program};
use mixtral_kernels::{
    Arch, Cache, Code, Compiled, Compiler, Defect, Executable, Family, Kernel, KernelImages, Nvrtc, Schedule, Search,
    Sources, batch, needed, select,
};
use mixtral_model::Rank;

use crate::BuildError;

/// What computes an engine's dense linears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenseLinears {
    /// Kernels that are tuned for an architecture.
    Tuned,
    /// Tuned kernels, and cuBLASLt in steps of many tokens. The bits of a row then depend on the other rows.
    CublasLt,
    /// Kernels that run anywhere.
    Portable,
}

/// Which kernels an engine gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelOptions {
    /// The architectures, at least one.
    pub archs: Vec<Arch>,
    /// What computes the dense linears.
    pub dense_linears: DenseLinears,
    /// Whether experts may have kernels that are tuned for an architecture.
    pub tuned_experts: bool,
    /// How many kernels are compiled at a time.
    pub workers: usize,
    /// Where NVRTC is looked for.
    pub nvrtc: Search,
    /// Where compiled kernels are kept between builds.
    pub cache: Option<PathBuf>,
}

/// The kernels of all ranks.
#[derive(Clone, Debug)]
pub struct Kernels {
    /// What they are compiled to.
    pub codes: BTreeSet<Code>,
    /// The images of each rank, one for every kind of code.
    pub ranks: Vec<Vec<KernelImages>>,
    /// The schedules of each rank, one for every family of these kinds of code.
    pub schedules: Vec<BTreeMap<Family, Schedule>>,
    /// How many had to be compiled.
    pub compiled: usize,
    /// How many were found in the cache.
    pub from_cache: usize,
    /// How long compiling took, including the loading of NVRTC.
    pub took: Duration,
    /// Things that are wrong but do not change results.
    pub warnings: Vec<String>,
}

impl Kernels {
    /// The images that a rank's engine file holds of them, by name.
    #[must_use]
    pub fn images(&self, rank: Rank) -> BTreeMap<String, Vec<u8>> {
        let images = self.ranks[rank.0].iter().map(|images| (images.code.image_name(), images.to_bytes()));
        let schedules = self.schedules[rank.0].iter();
        let texts =
            schedules.map(|(family, schedule)| (family.schedule_name().to_owned(), schedule.to_text().into_bytes()));
        images.chain(texts).collect()
    }
}

impl KernelOptions {
    /// The kinds of code to compile to. Without tuned kernels, these are portable kernels for the same machines.
    #[must_use]
    pub fn codes(&self) -> BTreeSet<Code> {
        let is_tuned = self.tuned_linears() || self.tuned_experts;
        let archs: Vec<Arch> =
            self.archs.iter().map(|arch| if is_tuned { *arch } else { Arch { specific: false, ..*arch } }).collect();
        needed::codes(&archs)
    }

    fn tuned_linears(&self) -> bool {
        self.dense_linears != DenseLinears::Portable
    }

    /// Gives every linear its ladder, with plans for the fastest of the architectures. The other architectures choose a
    /// plan of their own where they cannot use a rung's.
    pub fn fill_ladders(&self, program: &mut Program) {
        let best = self.codes().into_iter().map(Code::family).max().unwrap_or(Family::Portable);
        let family = |tuned| if tuned { best } else { Family::Portable };
        let cublaslt = self.dense_linears == DenseLinears::CublasLt;
        let ladders: Vec<_> = program
            .ops
            .iter()
            .map(|op| {
                let tuned = if matches!(op, Op::Linear { .. }) { self.tuned_linears() } else { self.tuned_experts };
                select::ladder(program, op, family(tuned), cublaslt)
            })
            .collect();
        for (op, rungs) in program.ops.iter_mut().zip(ladders) {
            if let Op::Linear { ladder, .. } | Op::ExpertGateUp { ladder, .. } | Op::ExpertDown { ladder, .. } = op {
                *ladder = rungs;
            }
        }
    }

    /// Compiles the kernels of all programs. A kernel that several programs share is compiled once. Calls `progress`
    /// with the number of compiled kernels and the number of all kernels.
    ///
    /// # Errors
    /// If an operation has no kernel, if there is no compiler, or if a kernel is refused or has a fatal defect.
    pub fn compile(
        &self,
        programs: &[Program],
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Kernels, BuildError> {
        let begun = Instant::now();
        let codes = self.codes();
        let of_rank = |program: &Program| {
            let rank = Rank(program.rank);
            needed::schedules(program, &codes).map_err(|source| BuildError::Lower { rank, source })
        };
        let schedules = programs.iter().map(of_rank).collect::<Result<Vec<_>, _>>()?;
        let needs: Vec<_> = schedules.iter().map(|schedules| needed::kernels(schedules, &codes)).collect();
        let work: Vec<(Kernel, Code)> = needs.iter().flatten().collect::<BTreeSet<_>>().into_iter().cloned().collect();
        let Batch { found, from_cache, warnings } = self.batch(&work, progress)?;
        let images = |needed: &BTreeSet<(Kernel, Code)>, code: Code| {
            let own = needed.iter().filter(|(_, of)| *of == code);
            KernelImages::new(code, own.filter_map(|key| Some((&key.0, found.get(key)?))))
        };
        let ranks = needs.iter().map(|needed| codes.iter().map(|code| images(needed, *code)).collect()).collect();
        let (compiled, took) = (work.len() - from_cache, begun.elapsed());
        Ok(Kernels { codes, ranks, schedules, compiled, from_cache, took, warnings })
    }

    /// What a GPU of this machine runs by a schedule: kernels that it has already, and those of the schedule that are missing,
    /// which are compiled to the same kind of code.
    ///
    /// # Errors
    /// If there is no compiler, or if a kernel is refused or has a fatal defect.
    pub fn executable(&self, schedule: Schedule, mut images: KernelImages) -> Result<Executable, BuildError> {
        let missing = schedule.kernels().into_iter().filter(|kernel| images.find(kernel).is_none());
        let work: Vec<(Kernel, Code)> = missing.map(|kernel| (kernel.clone(), images.code)).collect();
        if !work.is_empty() {
            let Batch { found, .. } = self.batch(&work, &|_, _| ())?;
            images.add(KernelImages::new(images.code, found.iter().map(|((kernel, _), compiled)| (kernel, compiled))));
        }
        Ok(Executable { schedule, images })
    }

    /// Compiles kernels, or finds them in the cache.
    fn batch(&self, work: &[(Kernel, Code)], progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Batch, BuildError> {
        let nvrtc = Nvrtc::load(&self.nvrtc).map_err(mixtral_kernels::CompileError::from)?;
        let compiler = Compiler::new(nvrtc, Sources::embedded());
        let cache = self.cache.clone().map(Cache::new);
        let batch =
            batch::compile_all(&compiler, work, self.workers, cache.as_ref(), &|done| progress(done, work.len()))?;
        let mut warnings: Vec<String> = batch.cache_warning.into_iter().collect();
        let mut unfit = Vec::new();
        let mut found = BTreeMap::new();
        for (kernel, code, compiled) in batch.kernels {
            let (fatal, other): (Vec<_>, Vec<_>) = compiled.defects.iter().partition(|defect| defect.is_fatal());
            let say = |defect: &Defect| format!("{} for {code}: {defect}", kernel.symbol);
            unfit.extend(fatal.into_iter().map(say));
            warnings.extend(other.into_iter().map(say));
            found.insert((kernel, code), compiled);
        }
        if !unfit.is_empty() {
            return Err(BuildError::Unfit { kernels: unfit });
        }
        Ok(Batch { found, from_cache: batch.from_cache, warnings })
    }
}

/// Compiled kernels, none of which has a fatal defect.
struct Batch {
    found: BTreeMap<(Kernel, Code), Compiled>,
    from_cache: usize,
    warnings: Vec<String>,
}
