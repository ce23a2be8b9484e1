//! A run directory appears whole or not at all: it is filled under a temporary name beside its place and renamed.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

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

/// A run directory that is being filled; gone again if it is dropped before [`RunDir::keep`].
pub(super) struct RunDir {
    target: PathBuf,
    filling: TempDir,
    /// Parents that did not exist before, outermost first.
    made: Vec<PathBuf>,
    kept: bool,
}

impl RunDir {
    /// Makes sure that `target` may be written and starts to fill it.
    pub(super) fn open(target: &Path) -> Result<Self, RunDirError> {
        refuse_occupied(target)?;
        let parent = target.parent().unwrap_or(Path::new("/"));
        let made: Vec<_> = parent.ancestors().take_while(|folder| !folder.exists()).map(Path::to_owned).collect();
        std::fs::create_dir_all(parent).map_err(RunDirError::io(parent))?;
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let filling = tempfile::Builder::new()
            .prefix(&format!(".{name}."))
            .tempdir_in(parent)
            .map_err(RunDirError::io(parent))?;
        let made = made.into_iter().rev().collect();
        Ok(Self { target: target.to_owned(), filling, made, kept: false })
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

    /// Puts the directory in its place, instead of an earlier run if there is one.
    pub(super) fn keep(mut self) -> Result<PathBuf, RunDirError> {
        refuse_occupied(&self.target)?;
        let (target, filled) = (self.target.clone(), self.filling.path().to_owned());
        open_to_readers(&filled).map_err(RunDirError::io(&filled))?;
        let mut earlier = filled.clone().into_os_string();
        earlier.push(".earlier");
        let earlier = PathBuf::from(earlier);
        let replaces = target.exists();
        if replaces {
            std::fs::rename(&target, &earlier).map_err(RunDirError::io(&target))?;
        }
        if let Err(error) = std::fs::rename(&filled, &target) {
            if replaces {
                // Best effort: the error that is told is the first one.
                let _ = std::fs::rename(&earlier, &target);
            }
            return Err(RunDirError::Io { path: target, source: error });
        }
        self.kept = true;
        if replaces {
            // The run is in its place; that an old one cannot be deleted does not undo it.
            let _ = std::fs::remove_dir_all(&earlier);
        }
        Ok(target)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Nothing half-written stays, nor a parent that only this run needed. Errors cannot be told from here.
        let _ = std::fs::remove_dir_all(self.filling.path());
        for folder in self.made.iter().rev() {
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Temporary folders are closed to other users; a run directory is an ordinary one.
#[cfg(unix)]
fn open_to_readers(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn open_to_readers(_path: &Path) -> std::io::Result<()> {
    Ok(())
}

/// An error unless there is nothing in the place of a run directory, or an earlier run of ours.
pub(super) fn refuse_occupied(target: &Path) -> Result<(), RunDirError> {
    let found = match std::fs::symlink_metadata(target) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(RunDirError::Io { path: target.to_owned(), source: error }),
        Ok(metadata) if !metadata.is_dir() => "a file",
        Ok(_) if is_ours(target) => return Ok(()),
        Ok(_) => "a directory that no run of tsquant made",
    };
    Err(RunDirError::Occupied { path: target.to_owned(), found })
}

/// True for a directory with a report of ours, or an empty one.
fn is_ours(target: &Path) -> bool {
    let has_report = std::fs::read(target.join(MARK)).is_ok_and(|bytes| {
        serde_json::from_slice::<serde_json::Value>(&bytes)
            .is_ok_and(|report| report["versions"]["tsquant"].is_string())
    });
    has_report || std::fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{"versions": {"tsquant": "0.1.0"}}"#;

    #[test]
    fn a_kept_run_replaces_an_earlier_one() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("deep/er/run");
        for text in ["first", "second"] {
            let run = RunDir::open(&target).unwrap();
            run.write("report.json", REPORT).unwrap();
            run.write("text", text).unwrap();
            run.keep().unwrap();
            assert_eq!(std::fs::read_to_string(target.join("text")).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(target.parent().unwrap()).unwrap().count(), 1, "nothing else is left beside it");
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
}
