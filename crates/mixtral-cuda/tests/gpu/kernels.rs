//! Kernels for the GPU of this machine.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mixtral_cuda::{Device, devices};
use mixtral_engine::Program;
use mixtral_kernels::nvrtc::{Form, Output, Unit};
use mixtral_kernels::{
    Arch, Cache, Code, Compiled, Compiler, Family, Kernel, KernelImages, Nvrtc, Search, Sources, compile_all, needed,
};

/// A GPU and a compiler. One test has them at a time: a fault of one would be told by all others.
pub(crate) struct Machine {
    pub(crate) device: Device,
    compiler: Compiler,
    _alone: MutexGuard<'static, ()>,
}

impl Machine {
    /// `None`, and a word about it, without either.
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

    /// All kernels that the programs need and that compile, and what became of the others.
    pub(crate) fn compile(&self, code: Code, programs: &[&Program]) -> (Library, Vec<String>) {
        let mut failures = Vec::new();
        let mut wanted = BTreeSet::new();
        for program in programs {
            // A program that has no kernels fails when it is loaded.
            if let Ok(kernels) = needed::kernels(program, &BTreeSet::from([code])) {
                wanted.extend(kernels.into_iter().map(|(kernel, _)| kernel));
            }
        }
        let wanted: Vec<Kernel> = wanted.into_iter().collect();
        let cache = Cache::folder_from_environment().map(Cache::new);
        let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let work = || {
            while let Some(kernel) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                // One at a time: a kernel that does not compile costs its own cases only.
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
    /// A kernel that stops the GPU.
    pub(crate) fn trap(&self, code: Code) -> Compiled {
        let text = "template <int N>\n__global__ void trap() { asm volatile(\"trap;\"); }\n";
        let unit = Unit { name: "trap.cu", text, headers: &[], expression: "trap<0>" };
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
    /// The library with another kernel in place of those whose symbols begin so.
    pub(crate) fn with(&self, symbol: &str, other: &Compiled) -> Library {
        let mut library = self.clone();
        let replaced = library.kernels.iter_mut().filter(|(kernel, _)| kernel.symbol.starts_with(symbol));
        assert!(replaced.map(|(_, compiled)| *compiled = other.clone()).count() > 0, "no kernel `{symbol}`");
        library
    }

    /// Those of a program, as an engine holds them.
    pub(crate) fn images(&self, program: &Program) -> KernelImages {
        let wanted = needed::kernels(program, &BTreeSet::from([self.code])).unwrap_or_default();
        let found = wanted.iter().filter_map(|(kernel, _)| self.kernels.get_key_value(kernel));
        KernelImages::new(self.code, found)
    }
}
