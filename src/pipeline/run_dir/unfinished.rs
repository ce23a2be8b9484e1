//! Hidden folders of unfinished runs: made and locked here, removed when their run fails or is interrupted, and by the next
//! run beside them where their process was killed. Knows nothing of what is written into them.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Signs at the end of a folder's name that tell it from others.
const RANDOM: usize = 6;

/// The unfinished runs of this process.
static UNFINISHED: Mutex<Vec<Traces>> = Mutex::new(Vec::new());

/// What a run has made so far.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Traces {
    folder: PathBuf,
    /// Parents that did not exist before, outermost first.
    parents: Vec<PathBuf>,
}

impl Traces {
    /// Errors cannot be told from here.
    fn remove(&self) {
        // A file that another thread makes meanwhile is one more try.
        for _ in 0..50 {
            match std::fs::remove_dir_all(&self.folder) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        remove_parents(&self.parents);
    }
}

/// Those that hold nothing else.
fn remove_parents(parents: &[PathBuf]) {
    for parent in parents.iter().rev() {
        let _ = std::fs::remove_dir(parent);
    }
}

/// A locked folder under a name of its own; gone again when dropped.
#[derive(Debug)]
pub(super) struct Unfinished {
    traces: Traces,
    /// The system gives the lock back when the process ends, however it ends. Locking the folder itself leaves no file in it.
    _lock: File,
}

impl Unfinished {
    /// Makes `parent` where it is missing, removes what killed runs have left in it, and makes a folder there.
    pub(super) fn new(parent: &Path) -> io::Result<Self> {
        let mut unfinished = lock();
        let mut parents: Vec<_> =
            parent.ancestors().take_while(|folder| !folder.exists()).map(Path::to_owned).collect();
        parents.reverse();
        match std::fs::create_dir_all(parent).and_then(|()| make(parent, &prefix())) {
            Ok((folder, lock)) => {
                let traces = Traces { folder, parents };
                unfinished.push(traces.clone());
                Ok(Self { traces, _lock: lock })
            }
            Err(error) => {
                remove_parents(&parents);
                Err(error)
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.traces.folder
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let mut unfinished = lock();
        self.traces.remove();
        unfinished.retain(|traces| *traces != self.traces);
    }
}

/// Removes all unfinished folders of this process, which is about to end. From now on no run of it can be kept, and one that
/// fails because its folder is gone waits for that end instead of telling about it.
pub(super) fn abandon() {
    let unfinished = lock();
    unfinished.iter().for_each(Traces::remove);
    std::mem::forget(unfinished);
}

/// While this is held, the process is not interrupted between one step and the next.
pub(super) fn hold() -> impl Drop {
    lock()
}

fn lock() -> MutexGuard<'static, Vec<Traces>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names begin with the host's, since only there a lock tells whether its process lives: some network file systems do not
/// show it to other hosts.
fn prefix() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().replace(['/', '.'], "-");
    format!(".tsquant.{host}.")
}

fn make(parent: &Path, prefix: &str) -> io::Result<(PathBuf, File)> {
    remove_left(parent, prefix);
    loop {
        let folder = tempfile::Builder::new().prefix(prefix).rand_bytes(RANDOM).tempdir_in(parent)?;
        let lock = File::open(folder.path());
        if let Ok(lock) = &lock {
            // Where folders cannot be locked no other run can lock this one either, and leaves it alone.
            let _ = lock.lock();
        }
        // Before it was locked, another run may have removed it as one that was left.
        let found = folder.path().symlink_metadata();
        match (lock, found) {
            (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => {}
            (lock, found) => {
                let (lock, found) = (lock?, found?);
                if is_same(&found, &lock.metadata()?) {
                    return Ok((folder.keep(), lock));
                }
            }
        }
        // Not ours any more.
        let _ = folder.keep();
    }
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Removes the folders of runs whose process is gone, as far as possible.
fn remove_left(parent: &Path, prefix: &str) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if !is_ours(&entry.file_name(), prefix) || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        // Held until the folder is gone.
        if let Ok(lock) = File::open(entry.path())
            && lock.try_lock().is_ok()
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn is_ours(name: &OsStr, prefix: &str) -> bool {
    let random = name.to_str().and_then(|name| name.strip_prefix(prefix));
    random.is_some_and(|random| random.len() == RANDOM && random.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(folder: &Path) -> usize {
        std::fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn what_a_killed_run_left_is_removed_and_what_lives_or_is_foreign_stays() {
        let folder = tempfile::tempdir().unwrap();
        let name = |end: &str| folder.path().join(format!("{}{end}", prefix()));
        let left = name("aZ0bY9");
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join("quantized.pt"), "half").unwrap();
        let foreign = [name("aZ0bY9x"), name("aZ0-Y9"), folder.path().join(".tsquant.elsewhere.aZ0bY9")];
        foreign.iter().for_each(|path| std::fs::create_dir(path).unwrap());
        std::fs::write(name("file00"), "").unwrap();
        std::os::unix::fs::symlink(&foreign[0], name("link00")).unwrap();

        let living = Unfinished::new(folder.path()).unwrap();
        assert!(!left.exists());
        let other = Unfinished::new(folder.path()).unwrap();
        assert!(living.path().is_dir() && other.path().is_dir() && foreign.iter().all(|path| path.is_dir()));
        assert_eq!(count(folder.path()), 7);
        drop((living, other));
        assert_eq!(count(folder.path()), 5);
    }

    #[test]
    fn many_at_once_never_remove_one_another() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let (made, _lock) = make(folder.path(), &prefix()).unwrap();
                        std::fs::write(made.join("file"), "text").unwrap();
                        std::thread::yield_now();
                        std::fs::remove_dir_all(made).unwrap();
                    }
                });
            }
        });
        assert_eq!(count(folder.path()), 0);
    }
}
