//! Class indices for a folder of images, out of `labels.csv` or the names of its sub-folders. Reads no image.
//!
//! `labels.csv` has two columns, the image's path below the folder and its class index, `cats/1.png,0`; a first line
//! `file,label` is taken for a header. It must have a line for each image and may have more. Without it, an image's class is
//! the sub-folder of the root that it lies in: where all names are whole numbers, that number, else the place of the
//! name in sorted order.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use super::error::Error;
use super::images::Folder;

const CSV: &str = "labels.csv";

/// Whether the folder says anything about classes.
pub(super) fn available(folder: &Folder) -> bool {
    folder.root().join(CSV).is_file() || !folder.sub_folders().is_empty()
}

/// The class index of each image, in the order of the images.
pub(super) fn read(folder: &Folder) -> Result<Vec<i64>, Error> {
    let csv = folder.root().join(CSV);
    if csv.is_file() { from_csv(folder, &csv) } else { from_sub_folders(folder) }
}

fn from_csv(folder: &Folder, csv: &Path) -> Result<Vec<i64>, Error> {
    let labels = parse(csv)?;
    let label = |file: &PathBuf| {
        let missing =
            || Error::damaged(csv, format_args!("expected a line for each image, found none for {}", file.display()));
        labels.get(file).copied().ok_or_else(missing)
    };
    folder.files().iter().map(label).collect()
}

fn parse(csv: &Path) -> Result<HashMap<PathBuf, i64>, Error> {
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .trim(csv::Trim::All)
        .from_path(csv)
        .map_err(|error| Error::damaged(csv, error))?;
    let mut labels = HashMap::new();
    for (index, record) in reader.records().enumerate() {
        let record = record.map_err(|error| Error::damaged(csv, error))?;
        let line = record.position().map_or(index as u64 + 1, csv::Position::line);
        let mut fields = record.iter();
        let (Some(file), Some(label), None) = (fields.next(), fields.next(), fields.next()) else {
            let message = format!("line {line}: expected two columns, file,label, found {}", record.len());
            return Err(Error::damaged(csv, message));
        };
        if index == 0 && file.eq_ignore_ascii_case("file") && label.eq_ignore_ascii_case("label") {
            continue;
        }
        let label = label.parse().ok().filter(|&label: &i64| label >= 0).ok_or_else(|| {
            Error::damaged(csv, format_args!("line {line}: expected a class index of 0 or more, found `{label}`"))
        })?;
        let file: PathBuf =
            Path::new(file).components().filter(|component| !matches!(component, Component::CurDir)).collect();
        if let Some(other) = labels.insert(file.clone(), label)
            && other != label
        {
            let message = format!("line {line}: expected one label for {}, found {other} and {label}", file.display());
            return Err(Error::damaged(csv, message));
        }
    }
    Ok(labels)
}

fn from_sub_folders(folder: &Folder) -> Result<Vec<i64>, Error> {
    let names = folder.sub_folders();
    let numbers: Option<Vec<i64>> = names.iter().map(|name| number(name)).collect();
    let indices = numbers.unwrap_or_else(|| (0..names.len() as i64).collect());
    let by_name: HashMap<&str, i64> = names.iter().map(String::as_str).zip(indices).collect();
    let label = |file: &PathBuf| {
        let first = file.components().next().and_then(|component| component.as_os_str().to_str());
        first.and_then(|name| by_name.get(name).copied()).ok_or_else(|| {
            let path = folder.root().join(file);
            Error::damaged(
                &path,
                format_args!(
                    "expected each image in the sub-folder of its class, or {CSV}; found this one beside them"
                ),
            )
        })
    };
    folder.files().iter().map(label).collect()
}

fn number(name: &str) -> Option<i64> {
    name.bytes().all(|byte| byte.is_ascii_digit()).then(|| name.parse().ok()).flatten()
}
