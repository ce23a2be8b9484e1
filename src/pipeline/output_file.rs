//! A single file as the result of a command: it appears whole or not at all, and replaces nothing but a file of its kind.

use std::path::{Path, PathBuf};

use super::kept::statistics;
use super::run_dir::Unfinished;
use super::{Error, RunDirError};

/// An error where something stands at `path` that is no file of statistics.
pub(super) fn check(path: &Path) -> Result<(), Error> {
    let found = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::Write { path: path.to_owned(), source }),
        Ok(metadata) if metadata.is_file() && statistics::is_one(path) => return Ok(()),
        Ok(metadata) if metadata.is_file() => "another file",
        Ok(metadata) if metadata.is_dir() => "a folder",
        Ok(_) => "something else",
    };
    Err(Error::OutputOccupied { path: path.to_owned(), found })
}

/// Writes the file by `fill`, under a name of its own first.
///
/// # Errors
/// Where it cannot be written, or something else stands there.
pub(super) fn write(path: &Path, fill: impl FnOnce(&Path) -> Result<(), Error>) -> Result<(), Error> {
    let parent = path.parent().map_or(PathBuf::from("/"), Path::to_owned);
    let failed = |source: std::io::Error| Error::Write { path: path.to_owned(), source };
    let filling = Unfinished::new(&parent).map_err(|source| RunDirError::Io { path: parent.clone(), source })?;
    let file = filling.path().join(path.file_name().unwrap_or_default());
    fill(&file)?;
    std::fs::File::open(&file).and_then(|file| file.sync_all()).map_err(failed)?;
    check(path)?;
    std::fs::rename(&file, path).map_err(failed)
}
