//! How the ranks of one host find rank 0: by a notice with its port and a secret, in a file that only its user can
//! read. The file exists only while the ranks assemble.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::Pid;

use crate::world::host_name;

const FIRST_LINE: &str = "mixtral rendezvous 1";

/// A notice has about 200 bytes.
const MAX_BYTES: u64 = 4096;

/// What rank 0 publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    /// Rank 0's process, and when it started. The start tells it from a later process with the same id.
    pub(crate) pid: u32,
    started: u64,
    /// The host and its network, in case several hosts or containers share the folder.
    pub(crate) machine: String,
    /// Where rank 0 listens, on the loopback.
    pub(crate) port: u16,
    pub(crate) secret: [u8; 32],
}

/// What a rank finds where the notice should be.
#[derive(Debug)]
pub(crate) enum Found {
    /// Rank 0 has not published a notice yet, or the notice was left behind by a process that is gone.
    Nothing,
    /// The notice of a live process.
    Notice(Notice),
    /// Something that is not a notice of this user.
    Foreign(&'static str),
}

/// Why a notice cannot be published.
#[derive(Debug)]
pub(crate) enum NotPublished {
    /// This live process has published a notice for a job of the same name.
    Busy(u32),
    Foreign(&'static str),
    Io(io::Error),
}

/// A published notice, removed when dropped.
#[derive(Debug)]
pub(crate) struct Published(PathBuf);

impl Drop for Published {
    fn drop(&mut self) {
        // The file may be gone already.
        let _ = fs::remove_file(&self.0);
    }
}

/// Where the notice of a job is.
pub(crate) fn path(directory: &Path, job: &str) -> PathBuf {
    let user = rustix::process::getuid().as_raw();
    let plain = job.len() <= 64 && job.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    let job = if plain { job.to_owned() } else { blake3::hash(job.as_bytes()).to_hex()[..32].to_owned() };
    directory.join(format!("mixtral-{user}-{job}.rendezvous"))
}

/// This host and its network, in the form of [`Notice::machine`].
pub(crate) fn machine() -> String {
    let network = fs::read_link("/proc/self/ns/net").unwrap_or_default();
    format!("{} {}", host_name().replace(char::is_whitespace, "_"), network.display()).trim().to_owned()
}

impl Notice {
    pub(crate) fn new(port: u16, secret: [u8; 32]) -> Self {
        let pid = std::process::id();
        Self { pid, started: started(pid).unwrap_or(0), machine: machine(), port, secret }
    }

    /// Puts the notice at `path`, and replaces one that was left behind.
    pub(crate) fn publish(&self, path: &Path) -> Result<Published, NotPublished> {
        let mut draft = path.as_os_str().to_owned();
        draft.push(format!(".{}", self.pid));
        let draft = Published(draft.into());
        // A draft with this process id can only be one that was left behind.
        let _ = fs::remove_file(&draft.0);
        self.write(&draft.0).map_err(NotPublished::Io)?;
        for _ in 0..8 {
            // A link fails if another process was faster; a rename would not.
            match fs::hard_link(&draft.0, path) {
                Ok(()) => return Ok(Published(path.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(NotPublished::Io(error)),
            }
            match find(path).map_err(NotPublished::Io)? {
                Found::Notice(notice) => return Err(NotPublished::Busy(notice.pid)),
                Found::Foreign(what) => return Err(NotPublished::Foreign(what)),
                Found::Nothing => match fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(NotPublished::Io(error)),
                    _ => {}
                },
            }
        }
        Err(NotPublished::Foreign("made again and again by another process"))
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(self.to_text().as_bytes())
    }

    fn to_text(&self) -> String {
        let secret = blake3::Hash::from_bytes(self.secret).to_hex();
        let Self { pid, started, machine, port, .. } = self;
        format!("{FIRST_LINE}\npid {pid}\nstarted {started}\nmachine {machine}\nport {port}\nsecret {secret}\n")
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let mut value = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        value(FIRST_LINE.split_once(' ')?.0).filter(|rest| FIRST_LINE.ends_with(rest))?;
        let notice = Self {
            pid: value("pid")?.parse().ok()?,
            started: value("started")?.parse().ok()?,
            machine: value("machine")?.to_owned(),
            port: value("port")?.parse().ok()?,
            secret: *blake3::Hash::from_hex(value("secret")?).ok()?.as_bytes(),
        };
        // Only the exact form counts, so a half-written or edited notice is refused.
        (notice.to_text() == text).then_some(notice)
    }

    /// Whether the process that published it no longer runs. Nothing is known about a process of another machine, so
    /// its notice is never stale.
    fn is_stale(&self) -> bool {
        self.machine == machine() && !is_alive(self.pid, self.started)
    }
}

/// Looks for a notice.
pub(crate) fn find(path: &Path) -> io::Result<Found> {
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).unwrap_or(0);
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(error),
    };
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Ok(Found::Foreign("not a plain file"));
    }
    if meta.uid() != rustix::process::getuid().as_raw() {
        return Ok(Found::Foreign("another user's"));
    }
    if meta.mode() & 0o077 != 0 {
        return Ok(Found::Foreign("readable by other users"));
    }
    Ok(match read(file).ok().as_deref().and_then(Notice::parse) {
        None => Found::Foreign("not a rendezvous file"),
        Some(notice) if notice.is_stale() => Found::Nothing,
        Some(notice) => Found::Notice(notice),
    })
}

/// Removes the notice of a process that died before it could remove the notice itself. A process's connections close a
/// little before it counts as dead, so this looks again for up to `patience`.
pub(crate) fn remove_stale(path: &Path, patience: Duration) {
    let deadline = Instant::now() + patience;
    while path.exists() {
        if matches!(find(path), Ok(Found::Nothing)) {
            let _ = fs::remove_file(path);
        } else if Instant::now() >= deadline {
            return;
        } else {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn read(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

fn is_alive(pid: u32, started_then: u64) -> bool {
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return false };
    // Any other error, such as a missing permission, means that the process exists.
    let there = rustix::process::test_kill_process(id) != Err(rustix::io::Errno::SRCH);
    there && stat(pid).is_none_or(|(state, started)| started == started_then && !matches!(state, "Z" | "X"))
}

fn started(pid: u32) -> Option<u64> {
    stat(pid).map(|(_, started)| started)
}

/// A process's state ("Z" is dead but not yet collected), and when it started, in ticks since the host's start. `None`
/// where the system does not tell.
fn stat(pid: u32) -> Option<(&'static str, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may contain anything. State and start are the third
    // and the 22nd field.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
    let state = match fields.next()? {
        "Z" => "Z",
        "X" => "X",
        _ => "alive",
    };
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn notice() -> Notice {
        Notice::new(4321, [0xAB; 32])
    }

    #[test]
    fn a_notice_is_private_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path(), "job-1");
        assert!(matches!(find(&path).unwrap(), Found::Nothing));
        let published = notice().publish(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(find(&path).unwrap(), Found::Notice(found) if found == notice()));
        // The draft is gone, and a second job of this name is refused.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(matches!(notice().publish(&path), Err(NotPublished::Busy(pid)) if pid == std::process::id()));
        drop(published);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_dead_processs_notice_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path(), "job-1");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        for stale in [
            Notice { pid: child.id(), ..notice() },
            // The id of this process, but an earlier start.
            Notice { started: notice().started + 1, ..notice() },
        ] {
            stale.write(&path).unwrap();
            assert!(matches!(find(&path).unwrap(), Found::Nothing));
            let published = notice().publish(&path).unwrap();
            assert!(matches!(find(&path).unwrap(), Found::Notice(found) if found == notice()));
            drop(published);
            stale.write(&path).unwrap();
            remove_stale(&path, Duration::ZERO);
            assert!(!path.exists());
        }
        // A notice of another machine may be alive.
        let other = Notice { machine: "node9 net:[1]".to_owned(), pid: child.id(), ..notice() };
        other.write(&path).unwrap();
        assert!(matches!(find(&path).unwrap(), Found::Notice(found) if found == other));
    }

    #[test]
    fn what_is_no_notice_of_ours_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let foreign = |path: &Path| match find(path).unwrap() {
            Found::Foreign(what) => what,
            other => panic!("{other:?}"),
        };
        let path = path(folder.path(), "job-1");
        notice().write(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(foreign(&path), "readable by other users");
        assert!(matches!(notice().publish(&path), Err(NotPublished::Foreign("readable by other users"))));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(find(&link).is_err());
        let text = notice().to_text();
        for end in 0..text.len() {
            assert_eq!(Notice::parse(&text[..end]), None, "{end}");
        }
        assert_eq!(Notice::parse(&format!("{text} ")), None);
        assert_eq!(Notice::parse(&text.replace("port 4321", "port 70000")), None);
        assert_eq!(Notice::parse(&text), Some(notice()));
    }

    #[test]
    fn job_names_are_made_fit_for_a_file() {
        let name = |job: &str| path(Path::new("/x"), job).file_name().unwrap().to_string_lossy().into_owned();
        let user = rustix::process::getuid().as_raw();
        assert_eq!(name("slurm-77.2"), format!("mixtral-{user}-slurm-77.2.rendezvous"));
        for odd in ["../../etc/passwd", "a b", &"x".repeat(300)] {
            assert_eq!(name(odd).len(), format!("mixtral-{user}-.rendezvous").len() + 32, "{odd}");
        }
        assert_ne!(name("a b"), name("a c"));
    }
}
