//! A run directory appears whole or not at all: it is filled under a temporary name beside its place and renamed.

mod place;
mod unfinished;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use place::{place, put_back};
pub(super) use unfinished::Unfinished;

/// A file that marks a directory as a run of ours.
const MARK: &str = "report.json";

/// Why a run directory cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// There is something else in its place.
    #[error("{path}: expected nothing or an earlier run of tsquant, found {found}; choose another output.dir or move it", path = path.display())]
    Occupied {
        /// The place.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// What it would be in is no folder.
    #[error("{path}: expected a folder for the run directory, found {found}; choose another output.dir", path = path.display())]
    NoFolder {
        /// What should be a folder.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// Something came in its place while the run took that, and cannot go back.
    #[error("{path}: cannot put back what stood there, which is in {now} now: {source}", path = path.display(), now = now.display())]
    NotPutBack {
        /// The place.
        path: PathBuf,
        /// Where that is instead.
        now: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The system says no.
    #[error("{path}: cannot write the run directory: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl RunDirError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// Removes what the unfinished runs of this process have written; for a process that is about to end by a signal.
pub fn abandon_unfinished_runs() {
    unfinished::abandon();
}

/// A run directory that is being filled; gone again if it is dropped before [`RunDir::keep`].
pub(super) struct RunDir {
    target: PathBuf,
    filling: Unfinished,
}

impl RunDir {
    /// Makes sure that `target` may be written and starts to fill it.
    pub(super) fn open(target: &Path) -> Result<Self, RunDirError> {
        nearest_folder(target)?;
        refuse_occupied(target)?;
        let parent = target.parent().unwrap_or(Path::new("/"));
        let filling = Unfinished::new(parent).map_err(RunDirError::io(parent))?;
        Ok(Self { target: target.to_owned(), filling })
    }

    /// Where files go until the run is kept.
    pub(super) fn path(&self) -> &Path {
        self.filling.path()
    }

    /// Writes one text file.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<(), RunDirError> {
        let path = self.path().join(name);
        std::fs::write(&path, text).map_err(RunDirError::io(&path))
    }

    /// Puts the directory in its place, instead of an earlier run if there is one, which is deleted then.
    pub(super) fn keep(self) -> Result<PathBuf, RunDirError> {
        let (target, filled) = (self.target, self.filling.path());
        flush(filled)?;
        // What stood there gets the name of an unfinished run, which another run may remove: not before it was looked at.
        let undisturbed = unfinished::lock_parent(&target);
        let mut uninterrupted = unfinished::hold();
        refuse_occupied(&target)?;
        let earlier = place(filled, &target).map_err(RunDirError::io(&target))?;
        // It may have come after the look at it.
        if let Some(earlier) = &earlier
            && let Err(error) = refuse_occupied(earlier)
        {
            return Err(give_back(earlier, &self.filling, &target, &mut uninterrupted).err().unwrap_or(match error {
                RunDirError::Occupied { found, .. } => RunDirError::Occupied { path: target, found },
                other => other,
            }));
        }
        drop((undisturbed, uninterrupted));
        if let Some(earlier) = earlier.filter(|earlier| earlier != filled) {
            // The run is in its place; that an old one cannot be deleted does not undo it.
            let _ = earlier.parent().map(std::fs::remove_dir_all);
        }
        Ok(target)
    }
}

/// [Puts back](put_back) what is not ours. Where that fails it may stand where the run was filled: that stays then.
fn give_back(
    earlier: &Path,
    filling: &Unfinished,
    target: &Path,
    held: &mut unfinished::Held,
) -> Result<(), RunDirError> {
    put_back(earlier, filling.path(), target).map_err(|source| {
        filling.leave(held);
        RunDirError::NotPutBack { path: target.to_owned(), now: earlier.to_owned(), source }
    })
}

/// Hands all files to the disk: some systems tell only then that it is full.
fn flush(folder: &Path) -> Result<(), RunDirError> {
    for entry in std::fs::read_dir(folder).map_err(RunDirError::io(folder))? {
        let path = entry.map_err(RunDirError::io(folder))?.path();
        std::fs::File::open(&path).and_then(|file| file.sync_all()).map_err(RunDirError::io(&path))?;
    }
    Ok(())
}

/// An error unless a run directory could be made at `target`: it must not be [occupied](refuse_occupied), and its folder, or
/// the nearest one that exists, must take files. Nothing is left there, and nothing is to be seen meanwhile.
pub(super) fn check(target: &Path) -> Result<(), RunDirError> {
    let nearest = nearest_folder(target)?;
    refuse_occupied(target)?;
    // A file without a name, where the system has such files.
    tempfile::tempfile_in(nearest).map(drop).map_err(RunDirError::io(nearest))
}

/// The folder around `target`, or the nearest one that exists.
fn nearest_folder(target: &Path) -> Result<&Path, RunDirError> {
    let exists = |path: &&Path| path.symlink_metadata().is_ok();
    let nearest = target.ancestors().skip(1).find(exists).unwrap_or(Path::new("/"));
    let found = match std::fs::metadata(nearest) {
        Ok(metadata) if metadata.is_dir() => return Ok(nearest),
        Ok(_) => "a file",
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "a symbolic link to nothing",
        Err(source) => return Err(RunDirError::Io { path: nearest.to_owned(), source }),
    };
    Err(RunDirError::NoFolder { path: nearest.to_owned(), found })
}

/// An error unless there is nothing in the place of a run directory, or an earlier run of ours.
fn refuse_occupied(target: &Path) -> Result<(), RunDirError> {
    let found = match std::fs::symlink_metadata(target) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(RunDirError::Io { path: target.to_owned(), source: error }),
        Ok(metadata) if metadata.is_symlink() => "a symbolic link",
        Ok(metadata) if !metadata.is_dir() => "a file",
        Ok(metadata) if is_mounted(target, &metadata).map_err(RunDirError::io(target))? => "a mount point",
        Ok(_) => match foreign(target).map_err(RunDirError::io(target))? {
            None => return Ok(()),
            Some(found) => found,
        },
    };
    Err(RunDirError::Occupied { path: target.to_owned(), found })
}

/// Whether the directory is one that no rename can move: another file system than its folder is on.
fn is_mounted(target: &Path, metadata: &std::fs::Metadata) -> std::io::Result<bool> {
    let around = target.parent().unwrap_or(Path::new("/"));
    Ok(std::fs::metadata(around)?.dev() != metadata.dev())
}

/// What keeps a directory from being replaced; nothing does if it is empty or holds the files of a run and no others.
fn foreign(target: &Path) -> std::io::Result<Option<&'static str>> {
    let has_others = holds_others(target, is_of_a_run)?;
    if std::fs::read_dir(target)?.next().is_none() {
        return Ok(None);
    }
    let report = std::fs::read(target.join(MARK)).ok();
    let report = report.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    let is_run = report.is_some_and(|report| report["versions"]["tsquant"].is_string() && report["sites"].is_array());
    Ok(match (is_run, has_others) {
        (false, _) => Some("a directory that no run of tsquant made"),
        (true, true) => Some("an earlier run with other files in it"),
        (true, false) => None,
    })
}

/// Whether `folder` holds anything but files with such names.
fn holds_others(folder: &Path, is_own: impl Fn(&str) -> bool) -> std::io::Result<bool> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if !is_own(&entry.file_name().to_string_lossy()) || entry.file_type()?.is_dir() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a run writes a file of this name.
fn is_of_a_run(name: &str) -> bool {
    name == MARK
        || name == "experiment.yaml"
        || name == super::kept::scores::FILE
        || (name.starts_with("quantized") && name.ends_with(".pt"))
}

/// Whether an unfinished run may have a file of this name: one of a run, a single file that is the result, or what either is
/// written as at first.
fn is_unfinished(name: &str) -> bool {
    is_of_a_run(name) || name == super::output_file::UNFINISHED || name.starts_with(".tmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{"versions": {"tsquant": "0.1.0"}, "sites": []}"#;

    #[test]
    fn a_kept_run_replaces_an_earlier_one() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("deep/er/run");
        for text in ["first", "second"] {
            let run = RunDir::open(&target).unwrap();
            run.write("report.json", REPORT).unwrap();
            run.write("quantized.pt", text).unwrap();
            run.keep().unwrap();
            assert_eq!(std::fs::read_to_string(target.join("quantized.pt")).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(target.parent().unwrap()).unwrap().count(), 1, "nothing else is left beside it");
    }

    #[test]
    fn a_check_leaves_nothing_and_refuses_what_cannot_be_written() {
        let folder = tempfile::tempdir().unwrap();
        assert!(check(&folder.path().join("a/b/run")).is_ok());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        std::fs::write(folder.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("nowhere", folder.path().join("link")).unwrap();
        for (around, found) in [("file", "a file"), ("link", "a symbolic link to nothing")] {
            for below in ["run", "a/run"] {
                let target = folder.path().join(around).join(below);
                for error in [check(&target).unwrap_err(), RunDir::open(&target).err().unwrap()] {
                    let error = error.to_string();
                    assert!(
                        error.contains(&format!("{around}: expected a folder")) && error.contains(found),
                        "{error}"
                    );
                }
            }
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_mount_point_is_refused() {
        for error in [check(Path::new("/proc")).unwrap_err(), RunDir::open(Path::new("/proc")).err().unwrap()] {
            assert!(error.to_string().contains("found a mount point"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_put_back_stays_and_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("run");
        let run = RunDir::open(&target).unwrap();
        let filled = run.path().to_owned();
        std::fs::create_dir(&target).unwrap();
        std::fs::write(target.join("cat.png"), "meow").unwrap();
        // As `keep` does, up to the moment in which the run in its place goes away.
        let earlier = place(&filled, &target).unwrap().unwrap();
        std::fs::remove_dir_all(&target).unwrap();
        let error = give_back(&earlier, &run.filling, &target, &mut unfinished::hold()).unwrap_err().to_string();
        assert!(error.contains(&format!("which is in {} now", earlier.display())), "{error}");
        drop(run);
        assert!(earlier.join("cat.png").exists());
        // Nor does the next run take it for one that was left.
        drop(RunDir::open(&target).unwrap());
        assert!(earlier.join("cat.png").exists());
    }

    #[test]
    fn a_run_is_kept_under_the_lock_of_the_folder_around_it() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("run");
        let run = RunDir::open(&target).unwrap();
        run.write("report.json", REPORT).unwrap();
        let lock = unfinished::lock_parent(&target).unwrap();
        std::thread::scope(|scope| {
            let kept = scope.spawn(|| run.keep().unwrap());
            std::thread::sleep(std::time::Duration::from_millis(100));
            // A signal does not wait for the lock.
            drop(unfinished::hold());
            assert!(!target.exists() && !kept.is_finished());
            drop(lock);
        });
        assert!(target.join("report.json").exists());
    }

    #[test]
    fn a_lock_of_something_else_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("run");
        let _lock = unfinished::lock_parent(&target).unwrap();
        let run = RunDir::open(&target).unwrap();
        run.write("report.json", REPORT).unwrap();
        run.keep().unwrap();
        assert!(target.join("report.json").exists());
    }

    #[test]
    fn a_dropped_run_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::open(&folder.path().join("a/b/run")).unwrap();
        run.write("text", "half").unwrap();
        drop(run);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_ours_is_refused_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("photos");
        std::fs::create_dir(&target).unwrap();
        std::fs::write(target.join("cat.png"), "meow").unwrap();
        let error = RunDir::open(&target).err().unwrap().to_string();
        assert!(error.contains("found a directory that no run of tsquant made"), "{error}");
        assert!(RunDir::open(&target.join("cat.png")).err().unwrap().to_string().contains("found a file"));
        assert_eq!(std::fs::read_to_string(target.join("cat.png")).unwrap(), "meow");
    }

    #[test]
    fn a_run_with_other_files_in_it_is_refused_and_so_is_a_report_of_something_else() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("run");
        let run = RunDir::open(&target).unwrap();
        run.write("report.json", REPORT).unwrap();
        run.keep().unwrap();
        std::fs::write(target.join("notes.txt"), "mine").unwrap();
        let error = RunDir::open(&target).err().unwrap().to_string();
        assert!(error.contains("found an earlier run with other files in it"), "{error}");
        assert_eq!(std::fs::read_to_string(target.join("notes.txt")).unwrap(), "mine");
        std::fs::remove_file(target.join("notes.txt")).unwrap();
        assert!(RunDir::open(&target).is_ok());
        // What `evaluate --json` prints, in a folder of the user's own.
        std::fs::write(target.join("report.json"), r#"{"versions": {"tsquant": "0.1.0"}}"#).unwrap();
        assert!(RunDir::open(&target).err().unwrap().to_string().contains("no run of tsquant made"));
    }
}
