//! Arrays of a `.npz` archive. Entries stored as they are stay in the archive; a compressed one is unpacked once to an
//! anonymous temporary file, which the system removes when it is closed. Checksums of compressed entries are checked,
//! those of stored entries are not: that would read the whole file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zip::read::ZipFile;
use zip::{CompressionMethod, ZipArchive};

use super::array::{Array, Extent};
use super::error::{Error, Place};
use super::npy;

/// Bytes that a compressed entry may unpack to whatever its size is, so that a mask of ones is no bomb.
const UNPACKED: u64 = 1 << 30;
/// How many times its own size a larger one may unpack to; no data of measurements comes near.
const RATIO: u64 = 100;

/// A `.npz` archive and where its arrays are.
#[derive(Debug)]
pub(super) struct Npz {
    path: PathBuf,
    /// Index in the archive by array name.
    entries: BTreeMap<String, usize>,
}

impl Npz {
    /// Reads the archive's directory; entries that are no `.npy` are left out.
    pub(super) fn open(path: &Path, file: &File) -> Result<Self, Error> {
        let archive = archive(path, file)?;
        if archive.has_duplicate_names() {
            return Err(Error::damaged(path, "expected distinct names in the archive, found one twice"));
        }
        let mut entries = BTreeMap::new();
        for index in 0..archive.len() {
            if let Some(Ok(name)) = archive.name_for_index(index)
                && let Some(name) = name.strip_suffix(".npy")
            {
                entries.insert(name.to_owned(), index);
            }
        }
        Ok(Self { path: path.to_owned(), entries })
    }

    /// Names in alphabetic order.
    pub(super) fn names(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }

    /// The array at `place`, if there is one.
    pub(super) fn array(&self, place: Place) -> Result<Option<Array>, Error> {
        let Some(&index) = self.entries.get(&place.tensor) else { return Ok(None) };
        let file = File::open(&self.path).map_err(Error::io(&self.path))?;
        let extent = {
            let mut archive = archive(&self.path, &file)?;
            let entry = archive
                .by_index(index)
                .map_err(|error| Error::tensor(&place, "a readable entry", error.to_string()))?;
            match entry.compression() {
                CompressionMethod::Stored => stored(&place, &entry)?,
                _ => return npy::array(place.clone(), unpack(&place, entry)?).map(Some),
            }
        };
        let (start, length) = extent;
        npy::array(place, Extent { file: Arc::new(file), start, length }).map(Some)
    }
}

fn archive<'a>(path: &Path, file: &'a File) -> Result<ZipArchive<BufReader<&'a File>>, Error> {
    ZipArchive::new(BufReader::new(file))
        .map_err(|error| Error::damaged(path, format_args!("the archive is damaged or truncated: {error}")))
}

/// First byte and length of an entry that is stored as it is.
fn stored<R: Read>(place: &Place, entry: &ZipFile<'_, R>) -> Result<(u64, u64), Error> {
    let (size, stored) = (entry.size(), entry.compressed_size());
    match entry.data_start() {
        Some(start) if size == stored => Ok((start, size)),
        _ => Err(Error::tensor(place, format!("a stored entry of {size} bytes"), format!("{stored} bytes"))),
    }
}

fn unpack<R: Read>(place: &Place, entry: ZipFile<'_, R>) -> Result<Extent, Error> {
    let failed = |error: std::io::Error| {
        let folder = std::env::temp_dir();
        let message = format!("cannot unpack `{}` to {}: {error}", place.tensor, folder.display());
        Error::damaged(&place.path, message)
    };
    let (size, compressed) = (entry.size(), entry.compressed_size());
    let most = compressed.saturating_mul(RATIO).max(UNPACKED);
    if size > most {
        let expected = format!("at most {most} bytes unpacked from {compressed} compressed ones");
        return Err(Error::tensor(place, expected, format!("{size}, as a zip bomb has")));
    }
    let mut file = tempfile::tempfile().map_err(failed)?;
    // One more byte than the directory says: finds an entry that holds more, and reaches the checksum.
    let length = std::io::copy(&mut entry.take(size.saturating_add(1)), &mut file).map_err(failed)?;
    if length != size {
        return Err(Error::tensor(place, format!("{size} bytes in the archive"), format!("{length} unpacked")));
    }
    Ok(Extent { file: Arc::new(file), start: 0, length })
}
