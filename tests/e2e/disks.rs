//! Disks that are full or read-only. They are real ones: small file systems in memory, in a mount namespace.

use std::path::Path;
use std::process::Command;

use crate::kills::small_model;
use crate::tool::{binary, fast_dir, mixtral_in};

/// The command that runs a script with the right to mount, whether or not the user is root. `None`, and a printed
/// reason, if the machine does not allow this.
fn mounter() -> Option<Vec<&'static str>> {
    let ways = [vec!["unshare", "--map-root-user", "--mount"], vec!["unshare", "--mount"]];
    let can = |way: &Vec<&str>| {
        let mut try_it = Command::new(way[0]);
        try_it.args(&way[1..]).args(["sh", "-c", "mount -t tmpfs none /mnt 2>&1"]);
        try_it.output().is_ok_and(|out| out.status.success())
    };
    let found = ways.into_iter().find(can);
    if found.is_none() {
        println!("skipped: full and read-only disks, which need a namespace that may mount (root, or user namespaces)");
        eprintln!("skipped: full and read-only disks");
    }
    found
}

/// Runs `line` with its output in `disk/out`, on a tmpfs mounted with `options`. Returns what it printed, its exit code
/// and the files that are left on the disk. After a success, the last is the output of `mixtral verify` instead.
fn on_disk(mounter: &[&str], at: &Path, options: &str, line: &str) -> (String, i32, String) {
    let script = r#"
        mount -t tmpfs -o "$1" none disk || exit 99
        shift
        "$@" > said 2>&1; echo "code $?"
        ls -A disk | sed 's/^/left /'
        "$1" verify disk/out 2>&1 | sed 's/^/verify /'
    "#;
    let mut command = Command::new(mounter[0]);
    command.args(&mounter[1..]).args(["sh", "-c", script, "sh", options]).arg(binary());
    let out = command.args(line.split_whitespace()).current_dir(at).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let lines = |prefix: &str| text.lines().filter_map(|l| l.strip_prefix(prefix)).collect::<Vec<_>>().join("\n");
    let code = lines("code ").parse().unwrap_or_else(|_| panic!("{text}{}", String::from_utf8_lossy(&out.stderr)));
    let said = std::fs::read_to_string(at.join("said")).unwrap();
    let left = if code == 0 { lines("verify ") } else { lines("left ") };
    (said, code, left)
}

fn lines(at: &Path) -> [String; 2] {
    small_model(at);
    std::fs::create_dir(at.join("disk")).unwrap();
    mixtral_in(at, "convert --model_dir model --tp_size 2 --output_dir checkpoint", &[]).ok();
    [
        "convert --model_dir model --tp_size 2 --output_dir disk/out".to_owned(),
        // The engine goes onto another disk, so that the weights are copied.
        "build --checkpoint_dir checkpoint --output_dir disk/out".to_owned(),
    ]
}

#[test]
fn a_full_disk_is_an_error_that_leaves_nothing() {
    let Some(mounter) = mounter() else { return };
    let dir = fast_dir();
    for line in lines(dir.path()) {
        let (mut full, mut done) = (0, 0);
        // The disk grows by a page each time, from almost no room to enough room. So the disk gets full at every point
        // of the work.
        for kib in (4..).step_by(4) {
            let (said, code, left) = on_disk(&mounter, dir.path(), &format!("size={kib}k"), &line);
            if code == 0 {
                assert!(left.contains("as they were written"), "{kib} KiB: {left}");
                done += 1;
                if done == 3 {
                    break;
                }
                continue;
            }
            assert_eq!(code, 1, "{kib} KiB: {said}");
            assert!(said.contains("free some space, or choose another --output-dir"), "{kib} KiB: {said}");
            assert_eq!(left, "", "{kib} KiB: {said}");
            full += 1;
        }
        println!("{line}: {full} sizes of a disk too small");
        assert!(full > 20, "{full} sizes were too small");
    }
}

#[test]
fn a_read_only_disk_is_an_error() {
    let Some(mounter) = mounter() else { return };
    let dir = fast_dir();
    for line in lines(dir.path()) {
        let (said, code, left) = on_disk(&mounter, dir.path(), "ro", &line);
        assert_eq!((code, left.as_str()), (1, ""), "{said}");
        assert!(said.contains("choose an --output-dir you may write"), "{said}");
    }
}
