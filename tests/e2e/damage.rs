//! Directories that are damaged in one place: every file is cut short or made longer at every edge of its sections, and
//! a bit is flipped in each section. Loading or `verify` finds every damage. Loading alone finds damaged headers and
//! configurations.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use mixtral_checkpoint::{Checkpoint, Header};
use mixtral_engine::{EngineDir, WeightsKind};

use crate::kills::{contents, small_model};
use crate::tool::{fast_dir, mixtral_in};

/// A part of a file.
#[derive(Debug)]
struct Section {
    name: String,
    bytes: Range<usize>,
    /// Whether loading reads it.
    is_header: bool,
}

/// The sections of a file. A safetensors file has its header's length, its header and its tensors.
fn sections(path: &Path) -> Vec<Section> {
    let len = usize::try_from(fs::metadata(path).unwrap().len()).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    if !(name.ends_with(".safetensors") || name.ends_with(".engine")) {
        return vec![Section { name: "all".to_owned(), bytes: 0..len, is_header: name == "config.json" }];
    }
    let header = Header::read(&fs::File::open(path).unwrap(), path).unwrap();
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let mut sections = vec![
        Section { name: "the length".to_owned(), bytes: 0..8, is_header: true },
        Section { name: "the header".to_owned(), bytes: 8..at(header.data_start), is_header: true },
    ];
    for t in &header.tensors {
        // Loading an engine reads the whole program.
        let is_header = t.name == "program";
        sections.push(Section { name: t.name.clone(), bytes: at(t.start)..at(t.end), is_header });
    }
    assert_eq!(sections.last().unwrap().bytes.end, len, "sections cover the file");
    sections
}

fn loads_checkpoint(dir: &Path) -> Result<Checkpoint, String> {
    let checkpoint = Checkpoint::open(dir).map_err(|e| e.to_string())?;
    if checkpoint.has_weights() {
        for rank in checkpoint.config().mapping.ranks() {
            checkpoint.rank(rank).map_err(|e| e.to_string())?;
        }
    }
    Ok(checkpoint)
}

fn loads_engine(dir: &Path) -> Result<EngineDir, String> {
    let engine = EngineDir::open(dir).map_err(|e| e.to_string())?;
    for rank in engine.config().mapping.ranks() {
        engine.program(rank).map_err(|e| e.to_string())?;
        if engine.config().weights == WeightsKind::File {
            engine.weight_file(rank).map_err(|e| e.to_string())?;
        }
    }
    Ok(engine)
}

/// The errors of loading and of verifying; `None` where no damage is found.
fn findings(dir: &Path, is_engine: bool) -> (Option<String>, Option<String>) {
    let verified = if is_engine {
        match loads_engine(dir) {
            Err(error) => return (Some(error), None),
            Ok(engine) => engine.verify(1, &()).map_err(|e| e.to_string()),
        }
    } else {
        match loads_checkpoint(dir) {
            Err(error) => return (Some(error), None),
            Ok(checkpoint) => checkpoint.verify(1, &()).map_err(|e| e.to_string()),
        }
    };
    match verified {
        Err(error) => (None, Some(error)),
        Ok(verified) => (None, verified.problems.first().map(ToString::to_string)),
    }
}

/// Replaces the file by a new one with `bytes`, since the file may be a hard link.
fn replace(path: &Path, bytes: &[u8]) {
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

/// How many damages were tried on one directory.
#[derive(Debug, Default)]
struct Tried {
    flips: usize,
    cuts: usize,
}

fn damage_everything(dir: &Path, is_engine: bool) -> Tried {
    assert_eq!(findings(dir, is_engine), (None, None), "{} is good", dir.display());
    let mut tried = Tried::default();
    for (name, whole) in contents(dir) {
        let path: PathBuf = dir.join(&name);
        let sections = sections(&path);
        for Section { name: section, bytes, is_header } in &sections {
            // Flips every byte of sections that loading reads. Of other sections it flips the first byte, the last and
            // some between.
            let step = if *is_header { 1 } else { (bytes.len() / 4).max(1) };
            for at in bytes.clone().step_by(step).chain(bytes.clone().last()) {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << (at % 8);
                replace(&path, &flipped);
                let (load, verify) = findings(dir, is_engine);
                let place = format!("{name}, {section}: bit {} of byte {at}", at % 8);
                assert!(load.is_some() || verify.is_some(), "{place} is not found");
                // A config in which the name of the seal is damaged loads like a config of another tool.
                assert!(!is_header || load.is_some() || name == "config.json", "{place} is found by verify alone");
                if !is_header && section != "all" {
                    let found = verify.unwrap_or_default();
                    assert!(found.contains(&format!("tensor `{section}`")), "{place} is not named: {found}");
                }
                tried.flips += 1;
            }
        }
        let edges = sections.iter().flat_map(|s| [s.bytes.start, s.bytes.end]);
        let mut cuts: Vec<usize> = edges.flat_map(|edge| [edge.saturating_sub(1), edge, edge + 1]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        for cut in cuts.into_iter().filter(|cut| *cut != whole.len()) {
            let mut bytes = whole.clone();
            bytes.resize(cut, b' ');
            replace(&path, &bytes);
            let (load, verify) = findings(dir, is_engine);
            assert!(load.is_some() || verify.is_some(), "{name} of {} bytes cut to {cut} is not found", whole.len());
            let loaded = name.ends_with(".safetensors") || name.ends_with(".engine") || name == "config.json";
            assert!(!loaded || load.is_some(), "{name} of {} bytes cut to {cut} is found by verify alone", whole.len());
            tried.cuts += 1;
        }
        fs::remove_file(&path).unwrap();
        let (load, verify) = findings(dir, is_engine);
        assert!(load.is_some() || verify.is_some(), "{name} is not missed");
        fs::write(&path, &whole).unwrap();
    }
    assert_eq!(findings(dir, is_engine), (None, None), "{} is mended", dir.display());
    println!("{}: {tried:?}, all found", dir.display());
    tried
}

#[test]
fn no_damage_passes_unseen() {
    let dir = fast_dir();
    let at = dir.path();
    small_model(at);
    for line in [
        "convert --model_dir model --tp_size 2 --output_dir checkpoint",
        "convert --model_dir model --save-config-only --dtype f16 --output_dir config-only",
        "build --checkpoint_dir checkpoint --output_dir engine",
        "build --checkpoint_dir config-only --output_dir dummy",
    ] {
        mixtral_in(at, line, &[]).ok();
    }
    let mut all = Tried::default();
    for (name, is_engine) in [("checkpoint", false), ("config-only", false), ("engine", true), ("dummy", true)] {
        let Tried { flips, cuts } = damage_everything(&at.join(name), is_engine);
        (all.flips, all.cuts) = (all.flips + flips, all.cuts + cuts);
    }
    // A checkpoint that has lost all its weights must not pass for one that never had any: `build` would make random
    // ones.
    for rank in 0..2 {
        fs::remove_file(at.join(format!("checkpoint/rank{rank}.safetensors"))).unwrap();
    }
    assert!(loads_checkpoint(&at.join("checkpoint")).is_err());
    let said = mixtral_in(at, "build --checkpoint_dir checkpoint --output_dir other", &[]);
    assert!(said.code == 1 && said.err.contains("rank0.safetensors is missing"), "{}", said.err);
    println!("in all: {all:?}");
    assert!(all.flips > 1000 && all.cuts > 200, "{all:?}");
}
