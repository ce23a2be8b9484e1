//! SHA-256 of everything that goes into a run.

use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::Error;
use crate::config::Plan;

/// The hash of the plan itself. Two runs that differ in nothing but their place are the same run.
pub(super) fn of_plan(plan: &Plan) -> Result<String, Error> {
    let mut placeless = plan.clone();
    placeless.output.dir = Path::new("/").to_owned();
    Ok(hex(&Sha256::digest(placeless.to_yaml()?.as_bytes())))
}

/// Of a file's bytes; of a folder, the names and bytes of all files in it, in sorted order.
pub(super) fn of_path(path: &Path) -> Result<String, Error> {
    let mut hash = Sha256::new();
    if path.is_dir() {
        for file in files_in(path)? {
            let name = file.strip_prefix(path).unwrap_or(&file);
            hash.update(name.to_string_lossy().as_bytes());
            hash.update([0]);
            hash.update(of_path(&file)?.as_bytes());
        }
    } else {
        if !path.metadata().map_err(read_error(path))?.is_file() {
            // Opening a pipe would wait for its writer, and a device may never end.
            return Err(read_error(path)(std::io::Error::other("expected a file, found a pipe or device")));
        }
        let mut file = std::fs::File::open(path).map_err(read_error(path))?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let count = file.read(&mut buffer).map_err(read_error(path))?;
            if count == 0 {
                break;
            }
            hash.update(&buffer[..count]);
        }
    }
    Ok(hex(&hash.finalize()))
}

fn files_in(folder: &Path) -> Result<Vec<std::path::PathBuf>, Error> {
    let mut files = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).map_err(read_error(&folder))? {
            let entry = entry.map_err(read_error(&folder))?;
            let path = entry.path();
            // Linked folders are not followed: they may lead in circles.
            let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
            match (path.is_dir(), is_link) {
                (true, false) => open.push(path),
                (true, true) => {}
                (false, _) => files.push(path),
            }
        }
    }
    files.sort();
    Ok(files)
}

fn read_error(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Read { path, source }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
