//! What can go wrong with a data set.

use std::fmt;
use std::path::{Path, PathBuf};

/// A tensor of a data file, as errors name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file or folder.
    pub path: PathBuf,
    /// The tensor's name in it.
    pub tensor: String,
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: tensor `{}`", self.path.display(), one_line(&self.tensor))
    }
}

/// Errors of opening and reading data. Each message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file or folder cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is something else than its name says, or nothing that can be read.
    #[error("{path}: expected {expected}, found {found}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The file is damaged, or written by something unusual.
    #[error("{path}: {message}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A tensor that the file does not have.
    #[error("{place} is missing{did_you_mean}; there are {available}")]
    Missing {
        /// The tensor asked for.
        place: Place,
        /// The nearest name as a question, or empty.
        did_you_mean: String,
        /// The names that there are.
        available: String,
    },
    /// A tensor has the wrong type, shape, layout or values.
    #[error("{place}: expected {expected}, found {found}")]
    Tensor {
        /// The tensor.
        place: Place,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Two tensors have different numbers of rows.
    #[error("{place}: expected {expected} rows, as tensor `{other}` has, found {found}")]
    Rows {
        /// The tensor.
        place: Place,
        /// Rows of the other tensor.
        expected: usize,
        /// The other tensor.
        other: String,
        /// Rows of this tensor.
        found: usize,
    },
    /// More rows are asked for than there are.
    #[error("{path}: expected at least {samples} rows, as `samples` says, found {rows}", path = path.display())]
    TooFew {
        /// The file.
        path: PathBuf,
        /// Rows asked for.
        samples: usize,
        /// Rows that there are.
        rows: usize,
    },
    /// All inputs are constants.
    #[error("{path}: expected at least one input that is a tensor of this data, found constants only", path = path.display())]
    OnlyConstants {
        /// The file.
        path: PathBuf,
    },
    /// A part of the transform does not fit the tensor.
    #[error("{place}: `{option}` expects {expected}, found {found}")]
    Transform {
        /// The tensor.
        place: Place,
        /// Key in `transform`.
        option: &'static str,
        /// What the key needs.
        expected: String,
        /// What there is.
        found: String,
    },
    /// Images of different sizes in one batch.
    #[error(
        "{path}: expected {expected}, the height and width of {other} in the same batch, found {found}; \
         `resize` and `crop` together bring all to one size",
        path = path.display(), other = other.display()
    )]
    ImageSizes {
        /// The image.
        path: PathBuf,
        /// Height x width of the other image.
        expected: String,
        /// The first image of the batch.
        other: PathBuf,
        /// Height x width of this image.
        found: String,
    },
    /// libtorch refuses an operation on a tensor.
    #[error("{place}: libtorch: {message}")]
    Libtorch {
        /// The tensor.
        place: Place,
        /// libtorch's reason.
        message: String,
    },
}

impl Error {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(super) fn damaged(path: &Path, message: impl fmt::Display) -> Self {
        Self::Damaged { path: path.to_owned(), message: one_line(&message.to_string()) }
    }

    pub(super) fn tensor(place: &Place, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Tensor { place: place.clone(), expected: expected.into(), found: found.into() }
    }

    pub(super) fn libtorch(place: &Place) -> impl Fn(tch::TchError) -> Self {
        move |error| Self::Libtorch { place: place.clone(), message: first_line(&error.to_string()) }
    }
}

/// Names as a list for an error, in backquotes, at most twenty.
pub(super) fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 20;
    let names: Vec<String> = names.into_iter().map(|name| format!("`{}`", one_line(name))).collect();
    match names.len() {
        0 => "none".to_owned(),
        count if count > SHOWN => format!("{} and {} more", names[..SHOWN].join(", "), count - SHOWN),
        _ => names.join(", "),
    }
}

/// `[3, 224, 224]`
pub(super) fn shape_text(shape: &[usize]) -> String {
    format!("{shape:?}")
}

/// Text of a file for an error: line breaks and other control characters become spaces.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

/// libtorch adds a stack trace after its first line.
fn first_line(message: &str) -> String {
    message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned()
}
