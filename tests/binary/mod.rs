//! The built binary as its users meet it: run in a fresh directory, judged by what it prints, returns and leaves behind.

// Each test file uses a part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// What one run of the binary said.
#[derive(Debug)]
pub(crate) struct Ran {
    /// The exit code; `None` after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Of a run that has to succeed.
    pub(crate) fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// The one line `error: …` of a run that has to fail with `code`, without its `error: `.
    pub(crate) fn refused(&self, code: i32) -> &str {
        let line = self.error_line();
        assert_eq!(self.code, Some(code), "{line}");
        line
    }

    /// The one line `error: …` that is all of standard error, without its `error: `.
    pub(crate) fn error_line(&self) -> &str {
        assert!(matches!(self.code, Some(1 | 2)), "a crash or a success: {self:?}");
        for sign in ["panicked", "backtrace", "RUST_BACKTRACE", "terminate called", ".rs:", "frame #"] {
            assert!(!self.stderr.contains(sign), "{sign} in {}", self.stderr);
        }
        let lines: Vec<&str> = self.stderr.lines().collect();
        let [line] = lines[..] else { panic!("expected one line, found {lines:#?}") };
        line.strip_prefix("error: ").unwrap_or_else(|| panic!("expected `error: …`, found {line}"))
    }
}

/// Runs the binary in `folder`.
pub(crate) fn tsquant<I: AsRef<std::ffi::OsStr>>(folder: &Path, arguments: impl IntoIterator<Item = I>) -> Ran {
    ran(in_folder(folder, BINARY).args(arguments))
}

/// The built binary.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_tsquant");

/// A program to be run in `folder`, the built binary or one that starts it. Backtraces are asked for, so that one which
/// reaches a user is seen here.
pub(crate) fn in_folder(folder: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    // Tests run side by side: threads that wait for each other by spinning would only steal from the next test.
    command.current_dir(folder).env("RUST_BACKTRACE", "1").env("OMP_NUM_THREADS", "1");
    command
}

/// Runs it to its end.
pub(crate) fn ran(command: &mut Command) -> Ran {
    let output = command.output().expect("the built binary runs");
    let text = |bytes| String::from_utf8(bytes).expect("the binary prints UTF-8");
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A path in the repository.
pub(crate) fn shipped(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A model of `models/test`.
pub(crate) fn test_model(name: &str) -> PathBuf {
    shipped(&format!("models/test/{name}.pt"))
}

/// The data of a model of `models/test`.
pub(crate) fn test_data(name: &str) -> PathBuf {
    shipped(&format!("models/test/{name}.safetensors"))
}

/// The text of a small experiment: `inputs` in YAML, written to `run` in the working directory.
pub(crate) fn experiment(model: &Path, data: &Path, inputs: &str) -> String {
    // Any JSON text is a YAML text.
    let quoted = |path: &Path| serde_json::to_string(path).expect("a path in UTF-8");
    format!(
        "model: {{path: {}}}\n\
         calibration: {{data: {}, inputs: {inputs}}}\n\
         quantization: {{weights_error_method: NOCLIPPING, activation_error_method: NOCLIPPING}}\n\
         output: {{dir: run}}\n",
        quoted(model),
        quoted(data)
    )
}

/// A fresh directory, gone when dropped.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file and returns its path.
    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs_err::write(&path, bytes).expect("a writable directory");
        path
    }

    /// The relative paths of all files and folders, hidden ones too, in order.
    pub(crate) fn listing(&self) -> Vec<String> {
        listing(self.path())
    }

    /// Runs `quantize e.yaml --quiet` on this text, with settings laid over it.
    pub(crate) fn quantize(&self, yaml: &str, settings: &[&str]) -> Ran {
        self.write("e.yaml", yaml);
        let settings = settings.iter().flat_map(|setting| ["--set", setting]);
        tsquant(self.path(), ["quantize", "e.yaml", "--quiet"].into_iter().chain(settings))
    }

    /// The error line of `quantize e.yaml --quiet`, which has to fail with `code` and to leave the directory as it was.
    pub(crate) fn refuses(&self, code: i32, yaml: &str, settings: &[&str]) -> String {
        self.write("e.yaml", yaml);
        let before = self.listing();
        let ran = self.quantize(yaml, settings);
        let line = ran.refused(code).to_owned();
        assert_eq!(ran.stdout, "", "{line}");
        assert_eq!(self.listing(), before, "{line}");
        line
    }

    /// The report of the run in the folder `run`, which has to be as its schema says.
    pub(crate) fn report(&self, run: &str) -> serde_json::Value {
        let text = fs_err::read_to_string(self.path().join(run).join("report.json")).expect("a report");
        let report = serde_json::from_str(&text).expect("a report in JSON");
        let schema = fs_err::read_to_string(shipped("docs/report.schema.json")).expect("the schema of reports");
        assert_eq!(misfits(&serde_json::from_str(&schema).expect("a schema in JSON"), &report), [""; 0]);
        report
    }
}

/// Where a value is not as a JSON schema says, and why.
pub(crate) fn misfits(schema: &serde_json::Value, value: &serde_json::Value) -> Vec<String> {
    let validator = jsonschema::validator_for(schema).expect("a valid schema");
    validator.iter_errors(value).map(|error| format!("{}: {error}", error.instance_path())).collect()
}

/// The relative paths of all files and folders below `folder`, in order.
pub(crate) fn listing(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(inner) = open.pop() {
        for entry in fs_err::read_dir(&inner).expect("a readable directory") {
            let path = entry.expect("a readable entry").path();
            let name = path.strip_prefix(folder).expect("a path below the folder");
            names.push(name.to_str().expect("a name in UTF-8").to_owned());
            if path.is_dir() {
                open.push(path);
            }
        }
    }
    names.sort();
    names
}

/// The bytes of a safetensors file that holds one tensor of float32.
pub(crate) fn floats(name: &str, shape: &[usize], values: &[f32]) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    safetensors_file(&[(name, Dtype::F32, shape, &bytes)])
}

/// The bytes of a safetensors file: name, element type, shape and little-endian bytes of each tensor.
pub(crate) fn safetensors_file(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Vec<u8> {
    let views = tensors.iter().map(|&(name, dtype, shape, bytes)| {
        (name, TensorView::new(dtype, shape.to_vec(), bytes).expect("as many bytes as the shape has"))
    });
    safetensors::serialize(views, None).expect("a small header")
}
