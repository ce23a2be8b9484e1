//! Hidden folders of unfinished runs: made and locked here, removed when their run fails or is interrupted, and by the next
//! run beside them where their process was killed. Knows nothing of what is written into them.

use std::ffi::OsStr;
use std::fs::{File, Metadata, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::place::ASIDE;

/// Signs at the end of a folder's name that tell it from others.
const RANDOM: usize = 6;

/// Tries, ten milliseconds apart, to lock a folder. Runs hold it for moments; whoever holds it longer is something else, such as
/// `flock FOLDER tsquant …`, which must not be waited for.
const TRIES: usize = if cfg!(test) { 60 } else { 300 };

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
pub(in crate::pipeline) struct Unfinished {
    traces: Traces,
    /// The system gives the lock back when the process ends, however it ends. Locking the folder itself leaves no file in it.
    _lock: File,
}

impl Unfinished {
    /// Makes `parent` where it is missing, removes what killed runs have left in it, and makes a folder there.
    pub(in crate::pipeline) fn new(parent: &Path) -> io::Result<Self> {
        // Before the process is kept from being interrupted: that waits. Nothing is left in a parent that is missing.
        if let Some(_undisturbed) = lock_folder(parent) {
            remove_left(parent, &prefix());
        }
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

    pub(in crate::pipeline) fn path(&self) -> &Path {
        &self.traces.folder
    }

    /// Leaves the folder where it is when dropped.
    pub(super) fn leave(&self, held: &mut Held) {
        held.0.retain(|traces| *traces != self.traces);
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let mut unfinished = lock();
        if unfinished.contains(&self.traces) {
            self.traces.remove();
            unfinished.retain(|traces| *traces != self.traces);
        }
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
pub(super) struct Held(MutexGuard<'static, Vec<Traces>>);

/// Not to be called before a lock of a folder that is waited for.
pub(super) fn hold() -> Held {
    Held(lock())
}

/// The folder that `target` is in, locked while it is held: no other run removes or puts back what it finds there. `None` where
/// it cannot be locked.
pub(super) fn lock_parent(target: &Path) -> Option<File> {
    lock_folder(target.parent().unwrap_or(Path::new("/")))
}

fn lock_folder(folder: &Path) -> Option<File> {
    let folder = File::open(folder).ok()?;
    for _ in 0..TRIES {
        match folder.try_lock() {
            Ok(()) => return Some(folder),
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
            Err(TryLockError::Error(_)) => return None,
        }
    }
    None
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
    loop {
        // As open to others as the user's own mask has it: it becomes the run directory.
        let open = Permissions::from_mode(0o777);
        let folder = tempfile::Builder::new().prefix(prefix).rand_bytes(RANDOM).permissions(open).tempdir_in(parent)?;
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

/// Removes the folders of runs whose process is gone, as far as possible, but those that hold what no run writes, and puts
/// earlier runs back that one of them had moved aside. The parent is locked.
fn remove_left(parent: &Path, prefix: &str) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if let Some(run) = name.to_str().and_then(|name| name.strip_suffix(ASIDE)) {
            if is_ours(OsStr::new(run), prefix) {
                put_back_left(parent, &entry.path());
            }
            continue;
        }
        // Held until the folder is gone.
        if is_ours(&name, prefix)
            && let Ok(lock) = File::open(entry.path())
            && lock.try_lock().is_ok()
            // A run that was killed, or could not put back what is not ours, may have left that here.
            && super::holds_others(&entry.path(), super::is_unfinished).is_ok_and(|holds| !holds)
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Puts the runs in `aside` back where their places in `parent` are free; the others were replaced.
fn put_back_left(parent: &Path, aside: &Path) {
    for entry in std::fs::read_dir(aside).into_iter().flatten().flatten() {
        let place = parent.join(entry.file_name());
        // Runs move things aside and look at them while they hold the lock of the parent, if they get it in time: as a rule,
        // only a killed one left this.
        if place.symlink_metadata().is_err() {
            let _ = std::fs::rename(entry.path(), place);
        } else if super::refuse_occupied(&entry.path()).is_ok() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    // Not where something else is in it.
    let _ = std::fs::remove_dir(aside);
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
        let foreign =
            [name("aZ0bY9x"), name("aZ0-Y9"), folder.path().join(".tsquant.elsewhere.aZ0bY9"), name("aZ0bY7")];
        foreign.iter().for_each(|path| std::fs::create_dir(path).unwrap());
        // Under a name of ours, but with what no run writes.
        std::fs::write(foreign[3].join("cat.png"), "meow").unwrap();
        std::fs::write(name("file00"), "").unwrap();
        std::os::unix::fs::symlink(&foreign[0], name("link00")).unwrap();

        let living = Unfinished::new(folder.path()).unwrap();
        assert!(!left.exists());
        let other = Unfinished::new(folder.path()).unwrap();
        assert!(living.path().is_dir() && other.path().is_dir() && foreign.iter().all(|path| path.is_dir()));
        assert_eq!(count(folder.path()), 8);
        drop((living, other));
        assert_eq!(count(folder.path()), 6);
    }

    #[test]
    fn what_a_killed_run_had_moved_aside_is_put_back_or_removed() {
        let folder = tempfile::tempdir().unwrap();
        let report = r#"{"versions": {"tsquant": "0.1.0"}, "sites": []}"#;
        let aside = |random: &str, run: &str| {
            let run = folder.path().join(format!("{}{random}{ASIDE}", prefix())).join(run);
            std::fs::create_dir_all(&run).unwrap();
            std::fs::write(run.join("report.json"), report).unwrap();
            run
        };
        let (killed_between, killed_after, foreign) =
            (aside("aZ0bY9", "one"), aside("aZ0bY8", "two"), aside("aZ0bY7", "two"));
        std::fs::write(foreign.join("cat.png"), "meow").unwrap();
        std::fs::create_dir(folder.path().join("two")).unwrap();
        drop(Unfinished::new(folder.path()).unwrap());
        assert_eq!(std::fs::read_to_string(folder.path().join("one/report.json")).unwrap(), report);
        assert!(!killed_between.exists() && !killed_after.exists() && foreign.join("cat.png").exists());
        // The two runs and what is foreign.
        assert_eq!(count(folder.path()), 3);
    }

    #[test]
    fn nothing_is_removed_while_the_folder_is_locked() {
        let folder = tempfile::tempdir().unwrap();
        // What another run, which holds the lock, has just exchanged with its own folder.
        let exchanged = folder.path().join(format!("{}aZ0bY9", prefix()));
        std::fs::create_dir(&exchanged).unwrap();
        let lock = lock_parent(&folder.path().join("run")).unwrap();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| drop(Unfinished::new(folder.path()).unwrap()));
            std::thread::sleep(Duration::from_millis(100));
            // A signal does not wait for the lock.
            drop(hold());
            assert!(exchanged.exists() && !other.is_finished());
            drop(lock);
        });
        assert!(!exchanged.exists());
    }

    #[test]
    fn many_at_once_never_remove_one_another() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        if let Some(_undisturbed) = lock_folder(folder.path()) {
                            remove_left(folder.path(), &prefix());
                        }
                        let (made, _lock) = make(folder.path(), &prefix()).unwrap();
                        std::fs::write(made.join("quantized.pt"), "text").unwrap();
                        std::thread::yield_now();
                        std::fs::remove_dir_all(made).unwrap();
                    }
                });
            }
        });
        assert_eq!(count(folder.path()), 0);
    }
}
