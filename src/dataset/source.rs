//! Opens a data file by its extension and finds tensors in it by name. The only place that knows all formats.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use tch::Tensor;

use super::array::{Array, Extent};
use super::dtype::Dtype;
use super::error::{Error, Place, listed, one_line};
use super::images::{self, Folder};
use super::npz::Npz;
use super::rows::Rows;
use super::safetensors::Safetensors;
use super::{labels, npy, transform};
use crate::config::Transform;
use crate::names::did_you_mean;

const SUPPORTED: &str = "a .safetensors, .npz or .npy file, or a folder of images";

/// An open data set.
#[derive(Debug)]
pub(super) enum Source {
    Safetensors(Safetensors),
    Npz(Npz),
    /// A single array, called by the file's name without its extension.
    Npy(Place, Extent),
    Folder(Folder),
}

/// One tensor of a data set.
#[derive(Debug)]
pub(super) enum Column {
    Array(Array),
    Images(Folder),
    /// Class index of each image of a folder.
    Labels(Place, Vec<i64>),
}

impl Source {
    /// Opens `path`, a file that the extension tells the format of, or a folder.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        if path.is_dir() {
            return Folder::open(path).map(Self::Folder);
        }
        if !path.metadata().map_err(Error::io(path))?.is_file() {
            // Opening a pipe would wait for its writer.
            let (expected, found) = (SUPPORTED.to_owned(), "a pipe or device".to_owned());
            return Err(Error::Format { path: path.to_owned(), expected, found });
        }
        let file = File::open(path).map_err(Error::io(path))?;
        let head = head(path, &file)?;
        let extension = path.extension().map(|text| text.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        let expected = match extension.as_str() {
            "safetensors" => Content::Safetensors,
            "npz" => Content::Zip,
            "npy" => Content::Npy,
            _ => return Err(wrong_format(path, SUPPORTED, Content::of(&head))),
        };
        let found = Content::of(&head);
        if found != expected {
            return Err(wrong_format(path, expected.text(), found));
        }
        match expected {
            Content::Safetensors => Safetensors::open(path, file).map(Self::Safetensors),
            Content::Zip => Npz::open(path, &file).map(Self::Npz),
            _ => {
                let length = file.metadata().map_err(Error::io(path))?.len();
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                let place = Place { path: path.to_owned(), tensor: name };
                Ok(Self::Npy(place, Extent { file: file.into(), start: 0, length }))
            }
        }
    }

    /// The tensor `name` of the data at `path`.
    ///
    /// # Errors
    /// There is none of that name; its bytes cannot be what the header says.
    pub(super) fn column(&self, path: &Path, name: &str) -> Result<Column, Error> {
        let place = Place { path: path.to_owned(), tensor: name.to_owned() };
        let found = match self {
            Self::Safetensors(file) => file.array(place.clone())?.map(Column::Array),
            Self::Npz(archive) => archive.array(place.clone())?.map(Column::Array),
            Self::Npy(only, bytes) if only.tensor == name => {
                Some(Column::Array(npy::array(place.clone(), bytes.clone())?))
            }
            Self::Folder(folder) if name == "images" => Some(Column::Images(folder.clone())),
            Self::Folder(folder) if name == "labels" && labels::available(folder) => {
                Some(Column::Labels(place.clone(), labels::read(folder)?))
            }
            Self::Npy(..) | Self::Folder(_) => None,
        };
        found.ok_or_else(|| {
            let names = self.names();
            let did_you_mean = did_you_mean(name, names.iter().map(String::as_str));
            Error::Missing { place, did_you_mean, available: listed(names.iter().map(String::as_str)) }
        })
    }

    fn names(&self) -> Vec<String> {
        match self {
            Self::Safetensors(file) => file.names(),
            Self::Npz(archive) => archive.names(),
            Self::Npy(only, _) => vec![only.tensor.clone()],
            Self::Folder(folder) => {
                let names = if labels::available(folder) { &["images", "labels"][..] } else { &["images"] };
                names.iter().map(|&name| name.to_owned()).collect()
            }
        }
    }
}

impl Column {
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Array(array) => array.rows(),
            Self::Images(folder) => folder.files().len(),
            Self::Labels(_, labels) => labels.len(),
        }
    }

    pub(super) fn place(&self) -> Place {
        match self {
            Self::Array(array) => array.place().clone(),
            Self::Images(folder) => images::place(folder.root()),
            Self::Labels(place, _) => place.clone(),
        }
    }

    /// Refuses what no model takes, and a transform that does not fit.
    pub(super) fn check_input(&self, transform: &Transform) -> Result<(), Error> {
        match self {
            Self::Array(array) => {
                array.input_kind()?;
                transform::check(array.place(), array.dtype(), array.shape(), transform)
            }
            Self::Images(folder) => transform::check_channels(&images::place(folder.root()), 3, transform),
            Self::Labels(..) => Ok(()),
        }
    }

    /// The rows at `positions` of the chosen `rows` as a model takes them.
    pub(super) fn read(&self, rows: &Rows, positions: Range<usize>, transform: &Transform) -> Result<Tensor, Error> {
        match self {
            Self::Array(array) => {
                transform::apply(array.place(), array.read(rows, positions)?, array.dtype(), transform)
            }
            Self::Images(folder) => {
                let images = folder.read(rows, positions, transform)?;
                transform::normalize(&images::place(folder.root()), images, transform)
            }
            Self::Labels(place, labels) => class_indices(place, labels, rows, positions),
        }
    }

    /// Class indices of all chosen rows: int64, (N), (N, K), (N, T) or (N, T, K).
    pub(super) fn labels(&self, rows: &Rows) -> Result<Tensor, Error> {
        match self {
            Self::Array(array) => array.labels(rows),
            Self::Images(folder) => {
                let place = images::place(folder.root());
                Err(Error::tensor(&place, "class indices as integers", format!("{} images", Dtype::U8.name())))
            }
            Self::Labels(place, labels) => class_indices(place, labels, rows, 0..rows.len()),
        }
    }
}

fn class_indices(place: &Place, labels: &[i64], rows: &Rows, positions: Range<usize>) -> Result<Tensor, Error> {
    let chosen: Vec<i64> = rows.at(positions).filter_map(|row| labels.get(row).copied()).collect();
    Tensor::f_from_slice(&chosen).map_err(Error::libtorch(place))
}

/// The first bytes of a file, fewer where it is shorter.
fn head(path: &Path, file: &File) -> Result<Vec<u8>, Error> {
    let mut head = Vec::new();
    file.take(16).read_to_end(&mut head).map_err(Error::io(path))?;
    Ok(head)
}

fn wrong_format(path: &Path, expected: &str, found: Content) -> Error {
    Error::Format { path: path.to_owned(), expected: one_line(expected), found: found.text().to_owned() }
}

/// What a file is by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Empty,
    Safetensors,
    Zip,
    Npy,
    Png,
    Jpeg,
    Webp,
    Hdf5,
    Gzip,
    Pickle,
    Unknown,
}

impl Content {
    fn of(head: &[u8]) -> Self {
        match head {
            [] => Self::Empty,
            [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => Self::Zip,
            [0x89, b'P', b'N', b'G', ..] => Self::Png,
            [0x89, b'H', b'D', b'F', ..] => Self::Hdf5,
            [0xff, 0xd8, 0xff, ..] => Self::Jpeg,
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Self::Webp,
            [0x1f, 0x8b, ..] => Self::Gzip,
            // The length of the header, then the header, which the format says begins with a brace.
            [_, _, _, _, _, _, _, _, b'{', ..] => Self::Safetensors,
            [0x80, 2..=5, ..] => Self::Pickle,
            _ if head.starts_with(npy::MAGIC) => Self::Npy,
            _ => Self::Unknown,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Empty => "an empty file",
            Self::Safetensors => "safetensors data",
            Self::Zip => "a zip archive, as .npz is",
            Self::Npy => ".npy data",
            Self::Png => "a png image",
            Self::Jpeg => "a jpeg image",
            Self::Webp => "a webp image",
            Self::Hdf5 => "HDF5 data",
            Self::Gzip => "gzip-compressed data",
            Self::Pickle => "a Python pickle",
            Self::Unknown => "something else",
        }
    }
}
