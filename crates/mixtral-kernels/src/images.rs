//! Compiled kernels as an engine holds them. There is one image for each kind of code that kernels are compiled to,
//! named like `kernels.sm_90a` and `kernels.compute_80`. Its bytes are the length of an index (64 bits, little-endian),
//! the index (JSON), and the kernels' code one after the other.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::compile::{Code, Compiled};
use crate::resources::Resources;
use crate::{Arch, Family, Kernel};

/// How the names of these images begin.
const PREFIX: &str = "kernels.";

/// A kernel of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelImage {
    /// The kernel's name expression.
    pub symbol: String,
    /// The mangled name of its entry in the code.
    pub entry: String,
    /// Threads of a CTA.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// The resources that it takes; unknown for PTX.
    pub resources: Option<Resources>,
    /// A cubin, or PTX with its closing zero byte.
    pub code: Vec<u8>,
}

/// All kernels of an engine that are compiled to the same kind of code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelImages {
    /// What they are compiled to.
    pub code: Code,
    /// By symbol.
    kernels: BTreeMap<String, KernelImage>,
}

/// An image that does not hold kernels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine's `{name}` is damaged: {detail}; build the engine again")]
pub struct ImagesError {
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub detail: String,
}

/// A row of the index.
#[derive(Serialize, Deserialize)]
struct Row {
    symbol: String,
    entry: String,
    threads: u32,
    shared_bytes: u32,
    /// Bytes from the end of the index.
    offset: usize,
    len: usize,
    resources: Option<Resources>,
}

impl Code {
    /// The name of the image of kernels compiled to it.
    #[must_use]
    pub fn image_name(self) -> String {
        format!("{PREFIX}{self}")
    }

    /// The kind of code that the image with this name holds, if it is an image of kernels.
    #[must_use]
    pub fn of_image(name: &str) -> Option<Code> {
        name.strip_prefix(PREFIX)?.parse().ok()
    }

    /// The family of the kernels that are compiled to it.
    #[must_use]
    pub fn family(self) -> Family {
        match self {
            Code::Sass(arch) => arch.family(),
            Code::Ptx(_) => Family::Portable,
        }
    }

    /// The best of `codes` for a device of this compute capability (90 for 9.0): machine code that runs on its
    /// architecture, of the highest version; else assembly.
    #[must_use]
    pub fn best(codes: impl IntoIterator<Item = Code>, capability: u32) -> Option<Code> {
        let rank = |code: &Code| match *code {
            Code::Sass(Arch { capability: built, specific }) => {
                let runs =
                    if specific { built == capability } else { built / 10 == capability / 10 && built <= capability };
                runs.then_some((2, built, specific))
            }
            Code::Ptx(Arch { capability: built, .. }) => (built <= capability).then_some((1, built, false)),
        };
        codes.into_iter().filter_map(|code| Some((rank(&code)?, code))).max().map(|(_, code)| code)
    }
}

impl KernelImages {
    /// Collects compiled kernels.
    pub fn new<'a>(code: Code, kernels: impl IntoIterator<Item = (&'a Kernel, &'a Compiled)>) -> Self {
        let images = kernels.into_iter().map(|(kernel, compiled)| KernelImage {
            symbol: kernel.symbol.clone(),
            entry: compiled.entry.clone(),
            threads: kernel.threads,
            shared_bytes: kernel.shared_bytes,
            resources: compiled.resources,
            code: compiled.image.clone(),
        });
        KernelImages { code, kernels: images.map(|image| (image.symbol.clone(), image)).collect() }
    }

    /// Adds kernels that are compiled to the same kind of code. They take the place of those with the same symbol.
    pub fn add(&mut self, more: KernelImages) {
        debug_assert_eq!(self.code, more.code, "one kind of code");
        self.kernels.extend(more.kernels);
    }

    /// The image of a kernel; `None` if the engine does not hold this kernel.
    #[must_use]
    pub fn find(&self, kernel: &Kernel) -> Option<&KernelImage> {
        let launched_alike = |k: &&KernelImage| (k.threads, k.shared_bytes) == (kernel.threads, kernel.shared_bytes);
        self.kernels.get(&kernel.symbol).filter(launched_alike)
    }

    /// All kernels, ordered by symbol.
    pub fn iter(&self) -> impl Iterator<Item = &KernelImage> {
        self.kernels.values()
    }

    /// The bytes of the engine's image.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut end = 0;
        let rows: Vec<Row> = self
            .iter()
            .map(|k| {
                let offset = end;
                end += k.code.len();
                let (symbol, entry) = (k.symbol.clone(), k.entry.clone());
                let (threads, shared_bytes, resources) = (k.threads, k.shared_bytes, k.resources);
                Row { symbol, entry, threads, shared_bytes, offset, len: k.code.len(), resources }
            })
            .collect();
        // Rows hold only numbers and texts, so writing them as JSON cannot fail.
        let index = serde_json::to_vec(&rows).unwrap_or_default();
        let mut bytes = (index.len() as u64).to_le_bytes().to_vec();
        bytes.extend(index);
        self.iter().for_each(|k| bytes.extend(&k.code));
        bytes
    }

    /// Reads an image back.
    ///
    /// # Errors
    /// If the bytes are not such an image, or damaged.
    pub fn from_bytes(code: Code, bytes: &[u8]) -> Result<Self, ImagesError> {
        let damaged = |detail: &str| ImagesError { name: code.image_name(), detail: detail.to_owned() };
        let cut = || damaged("it is too short for its index");
        let (len, rest) = bytes.split_first_chunk::<8>().ok_or_else(cut)?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| cut())?;
        let (index, data) = rest.split_at_checked(len).ok_or_else(cut)?;
        let rows: Vec<Row> = serde_json::from_slice(index).map_err(|e| damaged(&e.to_string()))?;
        let mut kernels = BTreeMap::new();
        for Row { symbol, entry, threads, shared_bytes, offset, len, resources } in rows {
            let code = offset.checked_add(len).and_then(|end| data.get(offset..end));
            let code = code.ok_or_else(|| damaged(&format!("the code of {symbol} is not in it")))?.to_vec();
            let image = KernelImage { symbol, entry, threads, shared_bytes, resources, code };
            kernels.insert(image.symbol.clone(), image);
        }
        Ok(KernelImages { code, kernels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(texts: &[&str]) -> Vec<Code> {
        texts.iter().map(|text| text.parse().expect("known")).collect()
    }

    #[test]
    fn a_device_gets_the_best_code_that_it_runs() {
        let best = |texts: &[&str], capability| Code::best(codes(texts), capability).map(|code| code.to_string());
        let all = ["sm_80", "sm_86", "sm_90", "sm_90a", "compute_80"];
        for (capability, expected) in
            [(80, "sm_80"), (86, "sm_86"), (87, "sm_86"), (89, "sm_86"), (90, "sm_90a"), (100, "compute_80")]
        {
            assert_eq!(best(&all, capability).as_deref(), Some(expected), "{capability}");
        }
        assert_eq!(best(&["sm_90a"], 80), None);
        assert_eq!(best(&["sm_90a"], 100), None, "code for Hopper alone");
        assert_eq!(best(&["sm_80", "compute_80"], 75), None);
    }

    #[test]
    fn images_are_read_back_and_damage_is_an_error() {
        let kernel = |n: u32| Kernel {
            header: "k.cuh".into(),
            symbol: format!("k<{n}>"),
            threads: 128,
            shared_bytes: n,
            family: Family::Portable,
        };
        let compiled = |n: u8| Compiled {
            image: vec![n; usize::from(n)],
            entry: format!("_Z{n}"),
            resources: Some(Resources { registers: 40, static_shared: 0, stack: 0, spills: (0, 0) }),
            defects: vec![],
            log: String::new(),
        };
        let (a, b, x, y) = (kernel(1), kernel(2), compiled(3), compiled(5));
        let code = Code::Sass(Arch::SM_90A);
        let images = KernelImages::new(code, [(&a, &x), (&b, &y)]);
        let bytes = images.to_bytes();
        let read = KernelImages::from_bytes(code, &bytes).expect("whole");
        assert_eq!(read, images);
        let found = read.find(&b).expect("there");
        assert_eq!((found.entry.as_str(), &found.code[..]), ("_Z5", &[5; 5][..]));
        assert_eq!((read.find(&kernel(3)), read.find(&Kernel { threads: 64, ..a })), (None, None));
        assert_eq!(Code::of_image(&code.image_name()), Some(code));
        assert_eq!((Code::of_image("program"), Code::of_image("kernels.x")), (None, None));

        for cut in [0, 7, 8, 50, bytes.len() - 1] {
            let error = KernelImages::from_bytes(code, &bytes[..cut]).expect_err("cut").to_string();
            assert!(error.starts_with("the engine's `kernels.sm_90a` is damaged: "), "{error}");
        }
        let mut long = bytes.clone();
        long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(KernelImages::from_bytes(code, &long).is_err());
    }
}
