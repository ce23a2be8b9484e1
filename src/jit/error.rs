//! What can go wrong with a TorchScript file.

use std::path::{Path, PathBuf};

use super::visit::BoxError;

/// Errors of loading, cleaning, running and writing models. Each message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is something else.
    #[error("{path}: expected a TorchScript file, found {found}; {advice}", path = path.display())]
    NotTorchScript {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What to do.
        advice: &'static str,
    },
    /// libtorch refuses the file.
    #[error("{path}: libtorch cannot load this TorchScript file: {message}", path = path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// libtorch's reason.
        message: String,
    },
    /// There is no `forward` to quantize.
    #[error("{path}: expected a method `forward`, found {found}", path = path.display())]
    NoForward {
        /// The file.
        path: PathBuf,
        /// The methods that there are.
        found: String,
    },
    /// `freeze_module` fails.
    #[error("the model cannot be frozen: {message}")]
    Freeze {
        /// libtorch's reason.
        message: String,
    },
    /// A step of the clean-up fails.
    #[error("clean-up step {step}: {message}")]
    Step {
        /// The step's name.
        step: &'static str,
        /// libtorch's reason.
        message: String,
    },
    /// A step of the clean-up changes what the model computes.
    #[error(
        "clean-up step {step} changes output{output} by {difference:.3e} of its largest magnitude, more than {limit:.0e}"
    )]
    Drift {
        /// The step's name.
        step: &'static str,
        /// Path of the output, with a space in front, or empty.
        output: String,
        /// Relative to the largest magnitude of that output.
        difference: f64,
        /// What is allowed.
        limit: f64,
    },
    /// An argument that `forward` does not take, or not so.
    #[error("{0}")]
    Argument(String),
    /// The model fails while it runs.
    #[error("the model fails while it runs on {inputs}: {message}")]
    Run {
        /// The arguments' shapes.
        inputs: String,
        /// libtorch's reason.
        message: String,
    },
    /// Gradients cannot be taken.
    #[error("the gradients of the model cannot be taken on {inputs}: {message}")]
    Backward {
        /// The arguments' shapes.
        inputs: String,
        /// libtorch's reason.
        message: String,
    },
    /// The visit of a tapped value failed.
    #[error("{0}")]
    Visit(BoxError),
    /// `forward` returns something that is no tensor, number, tuple, list or dict.
    #[error("expected tensors, or tuples, lists and dicts of them, as the model's output, found {found}")]
    Output {
        /// Its TorchScript type.
        found: String,
    },
    /// A text file in the archive cannot be read.
    #[error("{path}: cannot read `{name}` in the archive: {message}", path = path.display())]
    ExtraFile {
        /// The archive.
        path: PathBuf,
        /// The file in it.
        name: String,
        /// Why.
        message: String,
    },
    /// The emitted model cannot be written.
    #[error("{path}: cannot write the emitted model: {message}", path = path.display())]
    Emit {
        /// The file.
        path: PathBuf,
        /// libtorch's reason.
        message: String,
    },
    /// libtorch fails where it should not.
    #[error("libtorch: {0}")]
    Libtorch(String),
}

impl Error {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(super) fn output(found: &str) -> Self {
        Self::Output { found: found.to_owned() }
    }
}

impl From<cxx::Exception> for Error {
    fn from(exception: cxx::Exception) -> Self {
        Self::Libtorch(one_line(exception.what()))
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Libtorch(one_line(&error.to_string()))
    }
}

/// The line of a libtorch message that says what is wrong: after an interpreter's traceback the last one, else the first.
pub(crate) fn one_line(message: &str) -> String {
    let mut lines = message.lines().map(str::trim).filter(|line| !line.is_empty());
    if message.contains("Traceback of TorchScript") {
        return lines.next_back().unwrap_or_default().trim_start_matches("RuntimeError: ").to_owned();
    }
    lines.next().unwrap_or_default().to_owned()
}
