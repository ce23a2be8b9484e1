//! What a file is, before libtorch is asked to load it: a clear word beats an unpickler's error.

use std::io::{Read, Seek};
use std::path::Path;

use super::Error;

const SAVE_TORCHSCRIPT: &str =
    "save the model with torch.jit.trace(model, example).save(path) or torch.jit.script(model).save(path)";
/// A TorchScript file stores its tensors as they are; its code, packed, unpacks to ten times as much at most.
const MOST_UNPACKED: u128 = 50;
/// What any archive may unpack to, however small it is.
const ALWAYS_UNPACKED: u128 = 1 << 24;
const SAVE_AGAIN: &str = "the file is damaged or only part of it was copied: save or copy it again";

/// Succeeds if the file looks like a TorchScript archive.
pub(super) fn check(path: &Path) -> Result<(), Error> {
    let refuse =
        |found: &str, advice| Err(Error::NotTorchScript { path: path.to_owned(), found: found.to_owned(), advice });
    let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
    if !metadata.is_file() {
        // Opening a pipe would wait for its writer.
        return refuse(if metadata.is_dir() { "a folder" } else { "a pipe or device" }, SAVE_TORCHSCRIPT);
    }
    let mut file = std::fs::File::open(path).map_err(Error::io(path))?;
    let mut start = Vec::new();
    file.by_ref().take(4096).read_to_end(&mut start).map_err(Error::io(path))?;
    if !start.starts_with(b"PK") {
        let (found, advice) = name_other_format(path, &start);
        return refuse(found, advice);
    }
    file.rewind().map_err(Error::io(path))?;
    // The archive starts with the file; a zip inside it must not be taken for it.
    let config = zip::read::Config { archive_offset: zip::read::ArchiveOffset::Known(0) };
    let Ok(mut archive) = zip::ZipArchive::with_config(config, std::io::BufReader::new(file)) else {
        return refuse("a damaged or truncated zip archive", SAVE_AGAIN);
    };
    let Ok(entries) = archive.file_names().map(|name| name.map(String::from)).collect::<Result<Vec<_>, _>>() else {
        return refuse("a damaged zip archive", SAVE_AGAIN);
    };
    match name_archive(&entries) {
        // libtorch would read another one of them than was checked.
        None if archive.has_duplicate_names() => refuse("a zip archive that holds one name twice", SAVE_AGAIN),
        None if is_bomb(&mut archive, metadata.len()) => {
            refuse("a zip archive that unpacks to far more than TorchScript does", SAVE_AGAIN)
        }
        None if has_intact_entries(&mut archive) => Ok(()),
        None => refuse("a damaged TorchScript archive: what it holds does not fit its checksums", SAVE_AGAIN),
        Some((found, advice)) => refuse(found, advice),
    }
}

/// Bytes beyond which an extra file is not read.
const MOST_EXTRA_BYTES: u64 = 1 << 28;

/// The text file `name` that a TorchScript archive holds beside its model; `None` where it has none.
///
/// # Errors
/// Where the archive cannot be read, or the file is no text or larger than 256 MB.
pub fn extra_file(path: &Path, name: &str) -> Result<Option<String>, Error> {
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    let damaged = |message: String| Error::ExtraFile { path: path.to_owned(), name: name.to_owned(), message };
    let mut archive =
        zip::ZipArchive::new(std::io::BufReader::new(file)).map_err(|error| damaged(error.to_string()))?;
    let is_wanted = |entry: &str| {
        let inside = entry.split_once('/').and_then(|(_, inside)| inside.strip_prefix("extra/"));
        inside == Some(name)
    };
    let names: Result<Vec<_>, _> = archive.file_names().map(|entry| entry.map(String::from)).collect();
    let names = names.map_err(|error| damaged(error.to_string()))?;
    let Some(entry) = names.iter().find(|entry| is_wanted(entry)) else { return Ok(None) };
    let entry = archive.by_name(entry).map_err(|error| damaged(error.to_string()))?;
    let mut text = String::new();
    let read = entry.take(MOST_EXTRA_BYTES + 1).read_to_string(&mut text);
    let length = read.map_err(|error| damaged(error.to_string()))?;
    if length as u64 > MOST_EXTRA_BYTES {
        return Err(damaged(format!("expected at most {MOST_EXTRA_BYTES} bytes, found more")));
    }
    Ok(Some(text))
}

/// Whether loading would take far more memory than the file has bytes.
fn is_bomb<R: Read + Seek>(archive: &mut zip::ZipArchive<R>, bytes: u64) -> bool {
    let sizes = (0..archive.len()).map(|index| archive.by_index_raw(index).map_or(0, |entry| u128::from(entry.size())));
    sizes.sum::<u128>() > ALWAYS_UNPACKED + u128::from(bytes) * MOST_UNPACKED
}

/// Reads everything once: libtorch itself does not look at the checksums.
fn has_intact_entries<R: Read + Seek>(archive: &mut zip::ZipArchive<R>) -> bool {
    (0..archive.len()).all(|index| {
        archive.by_index(index).is_ok_and(|entry| {
            let size = entry.size();
            // One more byte than the directory says: finds an entry that holds more, and reaches the checksum.
            let mut entry = entry.take(size.saturating_add(1));
            std::io::copy(&mut entry, &mut std::io::sink()).is_ok_and(|read| read == size)
        })
    })
}

/// `None` for TorchScript, else what the archive is.
fn name_archive(entries: &[String]) -> Option<(&'static str, &'static str)> {
    let has = |end: &str| entries.iter().any(|entry| entry.ends_with(end));
    let has_code = entries.iter().any(|entry| entry.contains("/code/"));
    if has("/constants.pkl") && has_code {
        return None;
    }
    Some(if has("/models/model.json") || has("serialized_exported_program.json") || has("/archive_format") {
        ("a program saved by torch.export (.pt2)", SAVE_TORCHSCRIPT)
    } else if has("/data.pkl") {
        ("a pickle saved by torch.save (a state_dict or an eager model)", SAVE_TORCHSCRIPT)
    } else if has(".npy") {
        ("a NumPy archive (.npz)", SAVE_TORCHSCRIPT)
    } else {
        ("a zip archive without TorchScript code", SAVE_TORCHSCRIPT)
    })
}

fn name_other_format(path: &Path, start: &[u8]) -> (&'static str, &'static str) {
    let extension = path.extension().and_then(std::ffi::OsStr::to_str).unwrap_or_default().to_lowercase();
    let is_safetensors = start.get(8) == Some(&b'{') && start.get(4..8) == Some(&[0; 4]);
    let found = match start {
        [] => return ("an empty file", SAVE_AGAIN),
        [0x80, 2..=5, ..] => "a pickle saved by torch.save in its old format (a state_dict or an eager model)",
        _ if is_safetensors => "a safetensors file, which holds tensors without code",
        [0x08, ..] if extension == "onnx" || start.windows(4).any(|window| window == b"onnx") => "an ONNX model",
        _ if extension == "onnx" => "an ONNX model",
        _ if start.starts_with(b"\x89HDF") => "an HDF5 file",
        _ if start.starts_with(b"\x93NUMPY") => "a NumPy array",
        _ => return ("something that is no zip archive", SAVE_TORCHSCRIPT),
    };
    (found, SAVE_TORCHSCRIPT)
}
