//! The directory of a sweep: what it is a sweep of, and a file for each row that is done. Every file appears whole or not at
//! all, so that a process may end at any moment and another one go on.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::report::{SiteReport, SweepRow, Versions};

/// What the directory is a sweep of; its presence marks the directory as one.
const MARK: &str = "sweep.json";
/// Folder of the rows.
const ROWS: &str = "rows";
/// Begins the names of files that are being written.
const UNFINISHED: &str = ".unfinished-";

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// There is something else in its place.
    #[error("{path}: expected nothing or a sweep of tsquant, found {found}; choose another output.dir or move it", path = path.display())]
    Occupied {
        /// The place.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// It holds rows of something else.
    #[error("{path}: expected an unfinished sweep of this experiment, found one of another: {difference}; choose another output.dir or remove it", path = path.display())]
    Another {
        /// The directory.
        path: PathBuf,
        /// What differs.
        difference: String,
    },
    /// Another process is at it.
    #[error("{path}: another process runs this sweep", path = path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// The system says no.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// What a sweep is of: where any of it differs, finished rows are of no use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Key {
    pub(super) versions: Versions,
    pub(super) device: String,
    pub(super) rows: Vec<RowKey>,
}

/// What one row is of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct RowKey {
    pub(super) name: String,
    /// What is known of a row that can be run; such a one alone can be done.
    pub(super) plan: Option<PlanKey>,
}

/// What a row can be run with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct PlanKey {
    /// SHA-256 of the resolved plan.
    pub(super) plan: String,
    /// SHA-256 of the model, the calibration and the evaluation data.
    pub(super) files: [Option<String>; 3],
}

impl Key {
    /// Takes from the key before what this one does not know: a row that cannot be run now may have been done.
    fn keep_known(&mut self, before: Self) {
        for (row, before) in self.rows.iter_mut().zip(before.rows) {
            row.plan = row.plan.take().or(before.plan);
        }
    }

    /// The first thing that differs, in words.
    fn difference(&self, found: &Self) -> Option<String> {
        let differ = |what: &str, expected: &str, found: &str| {
            (expected != found).then(|| format!("{what} is {expected}, was {found}"))
        };
        let versions = [
            ("tsquant", &self.versions.tsquant, &found.versions.tsquant),
            ("torch", &self.versions.torch, &found.versions.torch),
            ("the device", &self.device, &found.device),
        ];
        if let Some(difference) = versions.iter().find_map(|(what, expected, found)| differ(what, expected, found)) {
            return Some(difference);
        }
        if self.rows.len() != found.rows.len() {
            return differ("the number of rows", &self.rows.len().to_string(), &found.rows.len().to_string());
        }
        self.rows.iter().zip(&found.rows).enumerate().find_map(|(index, (expected, found))| {
            let row = format!("row {} (`{}`)", index + 1, expected.name);
            if let Some(difference) = differ("a name", &format!("`{}`", expected.name), &format!("`{}`", found.name)) {
                return Some(difference);
            }
            // A row that could not be run, or cannot now, was not done or is not.
            let (expected, found) = (expected.plan.as_ref()?, found.plan.as_ref()?);
            let what = ["the model file", "the calibration data", "the evaluation data"];
            let files = what.iter().zip(expected.files.iter().zip(&found.files));
            let mut files = files.filter(|(_, (expected, found))| expected != found);
            files
                .next()
                .map(|(what, _)| format!("{what} of {row} has changed"))
                .or_else(|| (expected.plan != found.plan).then(|| format!("the settings of {row} have changed")))
        })
    }
}

/// The directory of a sweep, held by this process.
pub(super) struct Journal {
    dir: PathBuf,
    /// Of the directory itself, held as long as it is open.
    _lock: File,
}

impl Journal {
    /// Begins a sweep, or goes on with the one that is there.
    ///
    /// # Errors
    /// Where there is something else, another sweep, or another process at work.
    pub(super) fn open(dir: &Path, key: &Key) -> Result<Self, JournalError> {
        refuse_other(dir)?;
        std::fs::create_dir_all(dir).map_err(io(dir))?;
        let lock = File::open(dir).map_err(io(dir))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::Busy { path: dir.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(JournalError::Io { path: dir.to_owned(), source }),
        }
        let (mark, rows) = (dir.join(MARK), dir.join(ROWS));
        let mut key = key.clone();
        if mark.exists() {
            let text = std::fs::read_to_string(&mark).map_err(io(&mark))?;
            let difference = match serde_json::from_str::<Key>(&text) {
                Ok(found) => {
                    let difference = key.difference(&found);
                    key.keep_known(found);
                    difference
                }
                Err(error) => Some(format!("{MARK} cannot be read: {error}")),
            };
            if let Some(difference) = difference {
                return Err(JournalError::Another { path: dir.to_owned(), difference });
            }
        } else {
            refuse_occupied(dir)?;
        }
        // Anew each time: rows that could not be run before may be now.
        write_whole(&mark, &to_json(&key, &mark)?)?;
        std::fs::create_dir_all(&rows).map_err(io(&rows))?;
        for folder in [dir, rows.as_path()] {
            remove_unfinished(folder).map_err(io(folder))?;
        }
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    /// The rows that are done; those that failed are tried again.
    ///
    /// # Errors
    /// Where one that is there cannot be read.
    pub(super) fn done(&self, count: usize) -> Result<Vec<Option<SweepRow>>, JournalError> {
        let read = |index: usize| {
            let path = self.row(index);
            let text = match std::fs::read_to_string(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                text => text.map_err(io(&path))?,
            };
            let row: SweepRow = serde_json::from_str(&text).map_err(|error| io(&path)(std::io::Error::other(error)))?;
            Ok(Some(row).filter(|row| row.gave.is_some()))
        };
        (0..count).map(read).collect()
    }

    /// Writes a row and what was chosen for it.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(super) fn write(&self, index: usize, row: &SweepRow, sites: &[SiteReport]) -> Result<(), JournalError> {
        #[derive(Serialize)]
        struct Whole<'a> {
            #[serde(flatten)]
            row: &'a SweepRow,
            sites: &'a [SiteReport],
        }
        let path = self.row(index);
        write_whole(&path, &to_json(&Whole { row, sites }, &path)?)
    }

    /// Writes a file of results.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(super) fn write_results(&self, name: &str, text: &str) -> Result<(), JournalError> {
        write_whole(&self.dir.join(name), text)
    }

    /// The run directory of a row whose model is written.
    pub(super) fn model_dir(&self, index: usize) -> PathBuf {
        self.dir.join("models").join(format!("{:04}", index + 1))
    }

    fn row(&self, index: usize) -> PathBuf {
        self.dir.join(ROWS).join(format!("{:04}.json", index + 1))
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io { path: path.clone(), source }
}

fn to_json(value: &impl Serialize, path: &Path) -> Result<String, JournalError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| io(path)(std::io::Error::other(error)))?;
    Ok(text + "\n")
}

fn write_whole(path: &Path, text: &str) -> Result<(), JournalError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let write = || {
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        let kept = file.persist(path).map_err(|error| error.error)?;
        // As other files have it, not for the owner alone.
        use std::os::unix::fs::PermissionsExt;
        kept.set_permissions(std::fs::Permissions::from_mode(0o644))
    };
    write().map_err(io(path))
}

/// What a process that was killed has left.
fn remove_unfinished(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// An error where something stands that is no folder.
fn refuse_other(dir: &Path) -> Result<(), JournalError> {
    match std::fs::symlink_metadata(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(JournalError::Io { path: dir.to_owned(), source }),
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(JournalError::Occupied { path: dir.to_owned(), found: "a file" }),
    }
}

/// An error for a folder with anything in it but what a killed process left.
fn refuse_occupied(dir: &Path) -> Result<(), JournalError> {
    let is_own = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with(UNFINISHED);
    let mut entries = std::fs::read_dir(dir).map_err(io(dir))?;
    if entries.any(|entry| !entry.is_ok_and(is_own)) {
        return Err(JournalError::Occupied { path: dir.to_owned(), found: "other files" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(plan: &str) -> Key {
        let versions = Versions { tsquant: "1".to_owned(), torch: "2".to_owned() };
        let plan = PlanKey { plan: plan.to_owned(), files: [Some("m".to_owned()), None, None] };
        let row = |name: &str| RowKey { name: name.to_owned(), plan: Some(plan.clone()) };
        Key { versions, device: "cpu".to_owned(), rows: vec![row("a"), row("b")] }
    }

    fn row(number: usize, error: Option<&str>) -> SweepRow {
        let quantized = serde_json::json!({ "agreement": 0.5, "not_finite": 0, "rows": 3 });
        let gave = serde_json::json!({ "float": {}, "quantized": quantized, "weight_bytes": 1, "search_s": 0.0, "evaluate_s": 0.0 });
        SweepRow {
            number,
            name: "a".to_owned(),
            settings: Vec::new(),
            command: String::new(),
            gave: error.is_none().then(|| serde_json::from_value(gave).unwrap()),
            error: error.map(str::to_owned),
            is_on_pareto_front: false,
        }
    }

    #[test]
    fn rows_that_are_done_are_there_again_and_failed_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("a/sweep");
        let journal = Journal::open(&dir, &key("p")).unwrap();
        journal.write(0, &row(1, None), &[]).unwrap();
        journal.write(1, &row(2, Some("no")), &[]).unwrap();
        std::fs::write(dir.join("rows/.unfinished-x"), "half").unwrap();
        drop(journal);
        let journal = Journal::open(&dir, &key("p")).unwrap();
        assert_eq!(journal.done(2).unwrap(), [Some(row(1, None)), None]);
        assert!(!dir.join("rows/.unfinished-x").exists());
    }

    #[test]
    fn another_sweep_is_refused_with_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("sweep");
        drop(Journal::open(&dir, &key("p")).unwrap());
        let refused = |key: &Key| Journal::open(&dir, key).err().unwrap().to_string();
        let mut other = key("p");
        other.rows[1].plan.as_mut().unwrap().files[0] = Some("n".to_owned());
        assert!(refused(&other).contains("the model file of row 2 (`b`) has changed"), "{}", refused(&other));
        assert!(refused(&key("q")).contains("the settings of row 1 (`a`) have changed"));
        other.rows.pop();
        assert!(refused(&other).contains("the number of rows is 1, was 2"));
        other.device = "cuda:0".to_owned();
        assert!(refused(&other).contains("the device is cuda:0, was cpu"));
    }

    /// As long as a row cannot be run nothing is known of it; from then on it is.
    #[test]
    fn a_row_that_could_not_be_run_may_be_mended() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("sweep");
        let mut broken = key("p");
        broken.rows[1].plan = None;
        drop(Journal::open(&dir, &broken).unwrap());
        drop(Journal::open(&dir, &key("p")).unwrap());
        assert!(Journal::open(&dir, &key("q")).is_err());
    }

    #[test]
    fn what_is_not_a_sweep_stays() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cat.png"), "meow").unwrap();
        let refused = |path: &Path| Journal::open(path, &key("p")).err().unwrap().to_string();
        assert!(refused(folder.path()).contains("found other files"));
        assert!(refused(&folder.path().join("cat.png")).contains("found a file"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn two_processes_do_not_share_one() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("sweep");
        let _held = Journal::open(&dir, &key("p")).unwrap();
        assert!(matches!(Journal::open(&dir, &key("p")), Err(JournalError::Busy { .. })));
    }
}
