//! What can be wrong with an experiment, and where it was typed. It refuses to know how it was found.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One thing wrong with an experiment. Its Display is one readable line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct Error {
    /// The file or flag, with line and column where there are any.
    pub place: Place,
    /// What is wrong there; boxed, since it is large and rare.
    pub problem: Box<Problem>,
}

/// Where something was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file or the flag.
    pub origin: Arc<Origin>,
    /// Line and column in it; `None` means all of it.
    pub spot: Option<Spot>,
}

/// What a setting was typed in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Absolute path of the YAML file.
    File(PathBuf),
    /// A flag of the command line as typed, such as `--set a.b=1`.
    Flag(String),
}

/// A position in a text, both counted from 1, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spot {
    /// Line.
    pub line: u64,
    /// Column.
    pub column: u64,
}

/// What is wrong. Keys are full paths (`calibration.inputs[0]`).
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Problem {
    /// The file could not be read.
    #[error("cannot be read: {reason}")]
    Unreadable {
        /// The operating system's words.
        reason: String,
    },
    /// The text is not one YAML document.
    #[error("not valid YAML: {reason}")]
    Syntax {
        /// The parser's words.
        reason: String,
    },
    /// A document without content.
    #[error("the file is empty, expected an experiment with `model` and `calibration`")]
    Empty,
    /// A document that is not a map.
    #[error("expected an experiment as {expected}, found {found}")]
    NotAnExperiment {
        /// What an experiment is.
        expected: String,
        /// What was typed.
        found: String,
    },
    /// A flag `--set` that is not `KEY=VALUE`.
    #[error("expected KEY=VALUE such as `quantization.weights.bits=4`, found {found}")]
    NotASetting {
        /// What is odd.
        found: String,
    },
    /// A key that does not exist.
    #[error("unknown key `{key}` in {parent}{hint}")]
    UnknownKey {
        /// The key as typed.
        key: String,
        /// Where it stands.
        parent: String,
        /// The nearest valid name, or all of them.
        hint: String,
    },
    /// A name that is none of the names a key accepts.
    #[error("`{key}` must be {expected}, found `{found}`{hint}")]
    UnknownValue {
        /// The key.
        key: String,
        /// The names it accepts.
        expected: String,
        /// The value as typed.
        found: String,
        /// The nearest valid name.
        hint: String,
    },
    /// A key given twice in one map.
    #[error("`{key}` is given twice")]
    Duplicate {
        /// The key.
        key: String,
    },
    /// A value of another kind than the key takes.
    #[error("`{key}` must be {expected}, found {found}")]
    WrongType {
        /// The key.
        key: String,
        /// What it takes.
        expected: String,
        /// What was typed.
        found: String,
    },
    /// A value that is of the right kind and still impossible.
    #[error("`{key}`: {reason}")]
    Invalid {
        /// The key.
        key: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// A required key that is not there.
    #[error("`{key}` is missing, expected {expected}")]
    Missing {
        /// The key.
        key: String,
        /// What it takes.
        expected: String,
    },
    /// The plan cannot be written as YAML.
    #[error("the resolved experiment cannot be written as YAML: {reason}")]
    Unwritable {
        /// The serializer's words.
        reason: String,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&*self.origin, self.spot) {
            (Origin::Flag(flag), _) => f.write_str(&shortened(flag)),
            (Origin::File(path), None) => f.write_str(&printable(&path.to_string_lossy())),
            (Origin::File(path), Some(Spot { line, column })) => {
                write!(f, "{}:{line}:{column}", printable(&path.to_string_lossy()))
            }
        }
    }
}

impl Place {
    /// All of a file or flag.
    pub(super) fn whole(origin: Origin) -> Self {
        Self { origin: Arc::new(origin), spot: None }
    }

    /// An error here.
    pub(super) fn error(&self, problem: Problem) -> Error {
        Error { place: self.clone(), problem: Box::new(problem) }
    }
}

/// `text` on one line: what a terminal would not show as itself is escaped.
pub(super) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' | '\'' | '"' => shown.push(c),
            _ => shown.extend(c.escape_debug()),
        }
    }
    shown
}

/// [`printable`], cut to a length that leaves a message readable.
pub(super) fn shortened(text: &str) -> String {
    cut(text, 80)
}

/// A path on one line, cut where no system takes a longer one.
pub(super) fn path_text(path: &Path) -> String {
    cut(&path.to_string_lossy(), 4096)
}

fn cut(text: &str, longest: usize) -> String {
    match text.char_indices().nth(longest) {
        Some((end, _)) => format!("{}…", printable(text.get(..end).unwrap_or_default())),
        None => printable(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_hostile_text_on_one_short_line() {
        assert_eq!(printable("a'b\"c\\ é\n\u{202e}\u{1b}"), "a'b\"c\\ é\\n\\u{202e}\\u{1b}");
        assert_eq!(shortened(&"é".repeat(80)), "é".repeat(80));
        assert_eq!(shortened(&"é".repeat(81)), format!("{}…", "é".repeat(80)));
    }

    #[test]
    fn names_line_and_column_in_files_alone() {
        let spot = Some(Spot { line: 7, column: 3 });
        let file = Place { origin: Arc::new(Origin::File("/x/a.yaml".into())), spot };
        assert_eq!(file.error(Problem::Empty).to_string().split(": ").next(), Some("/x/a.yaml:7:3"));
        let flag = Place { origin: Arc::new(Origin::Flag("--set seed=x".into())), spot };
        assert_eq!(flag.to_string(), "--set seed=x");
    }
}
