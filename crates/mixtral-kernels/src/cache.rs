//! Compiled kernels, found by the digest of everything they depend on, in a folder that any number of processes can
//! share.
//!
//! An entry is one file: a BLAKE3 hash of what follows, the length of a name, the name of the kernel's entry, the
//! length of the log, the log, the image. An entry that does not match its hash is ignored. If an entry cannot be
//! written, the kernel is not cached and the cache warns once.

use std::env;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::nvrtc::Output;

/// The environment variable that names the folder of the cache.
pub const CACHE_VARIABLE: &str = "MIXTRAL_KERNEL_CACHE";

/// A folder of compiled kernels.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    /// The first thing that went wrong; later ones are not recorded.
    warning: Mutex<Option<String>>,
}

impl Cache {
    /// A cache in `folder`, which is created when the first entry is written.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        Cache { folder, warning: Mutex::new(None) }
    }

    /// The folder that the environment names: `MIXTRAL_KERNEL_CACHE`, else `mixtral/kernels` in `XDG_CACHE_HOME` or
    /// `~/.cache`.
    #[must_use]
    pub fn folder_from_environment() -> Option<PathBuf> {
        let path = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let caches = || path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
        path(CACHE_VARIABLE).or_else(|| Some(caches()?.join("mixtral/kernels")))
    }

    /// What went wrong, if anything did. Compiled kernels are right all the same.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        self.warning.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// The entry of a digest, if there is one that is whole.
    #[must_use]
    pub fn get(&self, digest: &str) -> Option<Output> {
        let path = self.path(digest);
        let bytes = fs::read(&path).ok()?;
        let output = decode(&bytes);
        if output.is_none() {
            self.warn(format!("{} is damaged; it is compiled again", path.display()));
        }
        output
    }

    /// Keeps an entry.
    pub fn put(&self, digest: &str, output: &Output) {
        if let Err(error) = self.write(digest, output) {
            let folder = self.folder.display();
            self.warn(format!(
                "compiled kernels cannot be kept in {folder}: {error}; name another folder with {CACHE_VARIABLE}"
            ));
        }
    }

    /// Writes an entry under another name first and renames it then, so that a reader sees a whole entry or none.
    fn write(&self, digest: &str, output: &Output) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(&encode(output))?;
        file.persist(self.path(digest)).map_err(|e| e.error)?;
        Ok(())
    }

    fn path(&self, digest: &str) -> PathBuf {
        Path::new(&self.folder).join(format!("{digest}.kernel"))
    }

    fn warn(&self, text: String) {
        self.warning.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(text);
    }
}

fn encode(output: &Output) -> Vec<u8> {
    let mut body = Vec::new();
    for text in [&output.entry, &output.log] {
        body.extend((text.len() as u64).to_le_bytes());
        body.extend(text.as_bytes());
    }
    body.extend(&output.image);
    [blake3::hash(&body).as_bytes().as_slice(), &body].concat()
}

fn decode(bytes: &[u8]) -> Option<Output> {
    let (hash, body) = bytes.split_first_chunk::<32>()?;
    if blake3::hash(body).as_bytes() != hash {
        return None;
    }
    let (entry, rest) = text(body)?;
    let (log, image) = text(rest)?;
    Some(Output { image: image.to_vec(), entry, log })
}

/// Reads a text behind its length. Returns the bytes that follow it as well.
fn text(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<8>()?;
    let (text, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    Some((String::from_utf8(text.to_vec()).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> Output {
        Output { image: vec![0, 1, 2, 255], entry: "_Z1k".to_owned(), log: "said\nmuch".to_owned() }
    }

    #[test]
    fn an_entry_is_read_back_and_a_damaged_one_is_none() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let cache = Cache::new(folder.path().join("a/b"));
        assert_eq!(cache.get("x"), None);
        cache.put("x", &output());
        assert_eq!(cache.get("x"), Some(output()));
        assert_eq!((cache.get("y"), cache.warning()), (None, None));

        let bytes = encode(&output());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(decode(&damaged), None, "byte {at}");
            assert_eq!(decode(&bytes[..at]), None, "cut at {at}");
        }
        fs::write(cache.path("x"), &bytes[1..]).expect("writable");
        assert_eq!(cache.get("x"), None);
        let warning = cache.warning().expect("it says so");
        assert!(warning.contains("x.kernel is damaged"), "{warning}");
        cache.put("x", &output());
        assert_eq!(cache.get("x"), Some(output()));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_a_warning() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let file = folder.path().join("file");
        fs::write(&file, "").expect("writable");
        // Neither path fails because of permissions, since root has all of them.
        for path in [file.join("cache"), PathBuf::from("/proc/mixtral-kernels")] {
            let cache = Cache::new(path.clone());
            cache.put("x", &output());
            let warning = cache.warning().expect("it says so");
            assert!(warning.contains(&path.display().to_string()) && warning.contains(CACHE_VARIABLE), "{warning}");
            assert_eq!(cache.get("x"), None);
        }
    }
}
