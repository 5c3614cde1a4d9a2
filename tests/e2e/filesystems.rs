//! File systems that lack something, as Lustre, NFS, CIFS and FUSE may. The preloaded library of `faults.rs` imitates
//! them.

use crate::faults::Faults;
use crate::kills::{contents, small_model};
use crate::tool::{fast_dir, mixtral_in};

/// The operation that may be missing, the errors by which systems report that, and, if it weakens a promise, the
/// warning that the tool prints once.
const MISSING: [(&str, &[&str], Option<&str>); 4] = [
    ("K", &["enosys", "enolck", "ebadf", "eopnotsupp", "einval", "eperm"], Some("has no locks")),
    ("D", &["einval", "enosys", "eopnotsupp", "ebadf", "eacces"], Some("does not write out on demand")),
    ("L", &["eperm", "eopnotsupp", "emlink", "exdev", "enosys", "eacces"], None),
    ("M", &["enodev", "eacces", "einval", "enosys", "eperm"], Some("cannot be mapped")),
];

#[test]
fn what_a_file_system_lacks_is_no_error() {
    let Some(faults) = Faults::new() else { return };
    let dir = fast_dir();
    let at = dir.path();
    small_model(at);
    let lines = [
        "convert --model_dir model --tp_size 2 --output_dir checkpoint",
        "build --checkpoint_dir checkpoint --output_dir engine --max_seq_len 64",
        "run --engine_dir engine --input_file prompt.csv --max_output_len 4 --end_id -1",
        "verify checkpoint",
        "verify engine",
    ];
    std::fs::write(at.join("prompt.csv"), "1,2,3\n").unwrap();
    let outputs: Vec<String> = lines.iter().map(|line| mixtral_in(at, line, &[]).ok()).collect();
    let [checkpoint, engine] = ["checkpoint", "engine"].map(|name| contents(&at.join(name)));
    for (operation, errors, warning) in MISSING {
        for error in errors {
            let mut said_so = 0;
            for (line, expected) in lines.iter().zip(&outputs) {
                let said = faults.run(at, line, &format!("{operation}:{error}:0"));
                assert_eq!(said.code, 0, "{operation} {error}: {line}: {}", said.err);
                let warnings: Vec<&str> = said.err.lines().filter(|l| l.starts_with("warning: ")).collect();
                assert!(warnings.len() <= 1, "{operation} {error}: {line}: {warnings:?}");
                if let [only] = warnings[..] {
                    let fits = warning.is_some_and(|text| only.contains(text));
                    assert!(fits, "{operation} {error}: {line}: {only}");
                    said_so += 1;
                }
                if !line.starts_with("verify") {
                    assert_eq!(&said.out, expected, "{operation} {error}: {line}");
                }
            }
            assert_eq!(said_so > 0, warning.is_some(), "{operation} {error}");
            assert!(contents(&at.join("checkpoint")) == checkpoint, "{operation} {error}");
            assert!(contents(&at.join("engine")) == engine, "{operation} {error}");
        }
    }
    // All of them are missing at once, as with a bucket behind FUSE.
    for line in lines {
        faults.run(at, line, "K:enosys:0,D:enosys:0,L:eopnotsupp:0,M:enodev:0").ok();
    }
}

/// A file system without locks or mappings is accepted; a lock or mapping that fails is an error.
#[test]
fn a_lock_or_a_mapping_that_fails_is_told_from_one_that_is_missing() {
    let Some(faults) = Faults::new() else { return };
    let dir = fast_dir();
    let at = dir.path();
    small_model(at);
    for operation in ["K", "D"] {
        let said = faults.run(at, "convert --model_dir model", &format!("{operation}:eio:0"));
        assert!(said.code == 1 && said.err.contains("Input/output error"), "{operation}: {}", said.err);
        assert!(!at.join("tllm_checkpoint").exists(), "{operation}");
    }
}
