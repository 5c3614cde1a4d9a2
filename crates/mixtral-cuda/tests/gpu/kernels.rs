//! Kernels for the GPU of this machine.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mixtral_cuda::{Device, devices};
use mixtral_engine::Program;
use mixtral_kernels::nvrtc::{Form, Output, Unit};
use mixtral_kernels::{
    Arch, Cache, Code, Compiled, Compiler, Executable, Family, Kernel, KernelImages, Nvrtc, Schedule, Search, Sources,
    Target, Work, compile_all,
};

use crate::other_build;

/// A GPU and a compiler. One test has them at a time, because a fault in one test would make all others fail.
pub(crate) struct Machine {
    pub(crate) device: Device,
    compiler: Compiler,
    _alone: MutexGuard<'static, ()>,
}

impl Machine {
    /// `None` if one of them is missing, which is printed.
    pub(crate) fn find() -> Option<Machine> {
        static GPU: Mutex<()> = Mutex::new(());
        let alone = GPU.lock().unwrap_or_else(PoisonError::into_inner);
        let device = match devices() {
            Ok(devices) => devices.into_iter().next()?,
            Err(error) => {
                println!("no GPU: skipped ({error})");
                return None;
            }
        };
        match Nvrtc::load(&Search::from_environment()) {
            Ok(nvrtc) => Some(Machine { device, compiler: Compiler::new(nvrtc, Sources::embedded()), _alone: alone }),
            Err(error) => {
                println!("no NVRTC: skipped ({error})");
                None
            }
        }
    }

    /// What kernels are compiled to for this GPU: the portable ones, and Hopper's own on Hopper.
    pub(crate) fn codes(&self) -> Vec<Code> {
        let own = Arch { capability: self.device.capability, specific: false };
        let hopper = (own.capability == 90).then_some(Code::Sass(Arch::SM_90A));
        let codes: Vec<Code> = [Code::Sass(own)].into_iter().chain(hopper).collect();
        assert_eq!(codes[0].family(), Family::Portable);
        codes
    }

    /// All kernels that the programs need and that compile, and the errors of the others.
    pub(crate) fn compile(&self, code: Code, programs: &[&Program]) -> (Library, Vec<String>) {
        let mut failures = Vec::new();
        let mut wanted = BTreeSet::new();
        for program in programs {
            // A program that has no kernels is skipped here; it fails when it is loaded.
            if let Ok(schedule) = Schedule::new(program, Target { family: code.family() }) {
                wanted.extend(schedule.kernels().into_iter().cloned());
            }
        }
        let wanted: Vec<Kernel> = wanted.into_iter().collect();
        let cache = Cache::folder_from_environment().map(Cache::new);
        let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let work = || {
            while let Some(kernel) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                // Each kernel is compiled on its own, so that one that does not compile fails only its own cases.
                let batch = compile_all(&self.compiler, &[(kernel.clone(), code)], 1, cache.as_ref(), &|_| ());
                done.lock().unwrap().push((kernel.clone(), batch));
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
        let mut kernels = BTreeMap::new();
        for (kernel, batch) in done.into_inner().unwrap() {
            match batch {
                Ok(batch) => {
                    let compiled = batch.kernels.into_iter().next().expect("the kernel asked for").2;
                    for defect in compiled.defects.iter().filter(|d| d.is_fatal()) {
                        failures.push(format!("{} for {code}: {defect}", kernel.symbol));
                    }
                    kernels.insert(kernel, compiled);
                }
                Err(error) => failures.push(error.to_string()),
            }
        }
        println!("{} of {} kernels compiled for {code}", kernels.len(), wanted.len());
        (Library { code, kernels }, failures)
    }
}

impl Machine {
    /// The schedule and kernels that an engine of another build of `mixtral` holds for a program.
    pub(crate) fn of_another_build(&self, code: Code, program: &Program) -> Executable {
        let schedule = Schedule::new(program, Target { family: code.family() }).unwrap();
        let schedule = other_build::lowered(schedule);
        let compiler = Compiler::new(Nvrtc::load(&Search::from_environment()).unwrap(), other_build::sources());
        let work: Vec<_> = schedule.kernels().into_iter().map(|kernel| (kernel.clone(), code)).collect();
        let cache = Cache::folder_from_environment().map(Cache::new);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let batch = compile_all(&compiler, &work, threads, cache.as_ref(), &|_| ()).unwrap();
        let images = KernelImages::new(code, batch.kernels.iter().map(|(kernel, _, compiled)| (kernel, compiled)));
        // Read back from its text, as it is from an engine.
        let schedule = Schedule::parse(&schedule.to_text(), program).unwrap();
        Executable { schedule, images }
    }

    /// A kernel that stops the GPU, with the parameters of the program's kernel whose name begins like that.
    pub(crate) fn trap(&self, code: Code, program: &Program, name: &str) -> Compiled {
        let schedule = Schedule::new(program, Target { family: code.family() }).unwrap();
        let launches = schedule.regimes.iter().flat_map(|(_, works)| works).filter_map(|work| match work {
            Work::Launch(launch) => Some(launch),
            Work::Product(_) => None,
        });
        let trapped = launches.into_iter().find(|launch| launch.kernel.symbol.starts_with(name)).unwrap();
        let kinds = trapped.args.iter().map(|named| if named.arg.size() == 4 { "int" } else { "unsigned long long" });
        let text = format!(
            "template <int N>\n__global__ void trap({}) {{ asm volatile(\"trap;\"); }}\n",
            kinds.collect::<Vec<_>>().join(", ")
        );
        let unit = Unit { name: "trap.cu", text: &text, headers: &[], expression: "trap<0>" };
        let options = ["--std=c++17".to_owned(), format!("--gpu-architecture={code}")];
        let output = self.compiler.nvrtc().compile(&unit, Form::Cubin, &options).unwrap();
        let Output { image, entry, log } = output;
        Compiled { image, entry, resources: None, defects: vec![], log }
    }
}

/// Compiled kernels.
#[derive(Clone)]
pub(crate) struct Library {
    code: Code,
    kernels: BTreeMap<Kernel, Compiled>,
}

impl Library {
    /// The library with `other` in place of the kernels whose symbols begin with `symbol`.
    pub(crate) fn with(&self, symbol: &str, other: &Compiled) -> Library {
        let mut library = self.clone();
        let replaced = library.kernels.iter_mut().filter(|(kernel, _)| kernel.symbol.starts_with(symbol));
        assert!(replaced.map(|(_, compiled)| *compiled = other.clone()).count() > 0, "no kernel `{symbol}`");
        library
    }

    /// The schedule and kernels that a GPU runs for a program, read back as from an engine. Or the error, if the
    /// program has no kernels.
    pub(crate) fn executable(&self, program: &Program) -> Result<Executable, String> {
        let schedule = Schedule::new(program, Target { family: self.code.family() }).map_err(|e| e.to_string())?;
        let schedule = Schedule::parse(&schedule.to_text(), program).map_err(|e| e.to_string())?;
        let found = schedule.kernels().into_iter().filter_map(|kernel| self.kernels.get_key_value(kernel));
        let images = KernelImages::new(self.code, found);
        Ok(Executable { schedule, images })
    }
}
