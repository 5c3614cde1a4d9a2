//! Embeds `kernels/`: writes a table of its headers for `src/source.rs` to include.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../../kernels");
    let root = root.canonicalize()?;
    let mut headers = Vec::new();
    walk(&root, &mut headers)?;
    headers.sort();
    let mut table = String::from("&[\n");
    for path in &headers {
        let name = path.strip_prefix(&root).expect("found below it").to_string_lossy();
        writeln!(table, "    ({name:?}, include_str!({:?})),", path.to_string_lossy()).expect("memory takes it");
    }
    table += "]\n";
    println!("cargo:rerun-if-changed={}", root.display());
    fs::write(Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("headers.rs"), table)
}

fn walk(folder: &Path, headers: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, headers)?;
        } else if path.extension().is_some_and(|extension| extension == "cuh") {
            headers.push(path);
        }
    }
    Ok(())
}
