//! A single file as the result of a command: it appears whole or not at all, and replaces nothing but a file of its kind. It
//! refuses to know kinds.

use std::path::{Path, PathBuf};

use super::Error;
use super::run_dir::Unfinished;

/// Its name until it is whole.
pub(super) const UNFINISHED: &str = "unfinished.safetensors";

/// A place that a file can be written to.
pub(super) struct OutputFile {
    path: PathBuf,
    /// Whether a file is of the kind that may be replaced.
    is_own: fn(&Path) -> bool,
    filling: Unfinished,
}

impl OutputFile {
    /// Makes sure that a file can be written at `path`, and begins it.
    ///
    /// # Errors
    /// Where something stands there that is not of the kind that may be replaced, or the folder takes no files.
    pub(super) fn open(path: &Path, is_own: fn(&Path) -> bool) -> Result<Self, Error> {
        refuse_occupied(path, is_own)?;
        let parent = path.parent().filter(|_| path.file_name().is_some());
        let no_file = || std::io::Error::other("expected the path of a file to write");
        let failed = |source| Error::Write { path: path.to_owned(), source };
        let parent = parent.ok_or_else(no_file).map_err(failed)?;
        let filling = Unfinished::new(parent).map_err(failed)?;
        Ok(Self { path: path.to_owned(), is_own, filling })
    }

    /// Writes the file by `fill`, which gets a path of its own, and puts it in its place.
    ///
    /// # Errors
    /// Where it cannot be written, or something else stands there by now.
    pub(super) fn write(self, fill: impl FnOnce(&Path) -> Result<(), Error>) -> Result<(), Error> {
        let file = self.filling.path().join(UNFINISHED);
        fill(&file)?;
        let failed = |source: std::io::Error| Error::Write { path: self.path.clone(), source };
        std::fs::File::open(&file).and_then(|file| file.sync_all()).map_err(failed)?;
        refuse_occupied(&self.path, self.is_own)?;
        std::fs::rename(&file, &self.path).map_err(failed)
    }
}

/// An error where something stands at `path` that is not of this kind.
fn refuse_occupied(path: &Path, is_own: fn(&Path) -> bool) -> Result<(), Error> {
    let is_folder = path.to_string_lossy().ends_with(std::path::is_separator);
    let found = match std::fs::metadata(path) {
        _ if is_folder => "the name of a folder",
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::Write { path: path.to_owned(), source }),
        Ok(metadata) if metadata.is_file() && is_own(path) => return Ok(()),
        Ok(metadata) if metadata.is_file() => "another file",
        Ok(metadata) if metadata.is_dir() => "a folder",
        Ok(_) => "something else",
    };
    Err(Error::OutputOccupied { path: path.to_owned(), found })
}
