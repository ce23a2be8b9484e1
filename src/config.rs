//! An experiment as typed in YAML ([`Experiment`]) and the checked [`Plan`] that it resolves into.
//!
//! Strict: a key or value that is unknown or impossible is an error that names file or flag, line, column
//! and the key's full path. Plain data: it opens the YAML alone, and refuses to know what models and data files hold.

mod accuracy;
mod decode;
mod device;
mod document;
mod error;
mod flags;
mod hessian;
mod inputs;
mod keys;
mod mixed_precision;
mod overrides;
mod plan;
mod reduce_range;
mod resolve;
mod schema;
mod sweep;
mod write;

use std::io::Read;
use std::path::{Path, PathBuf};

pub use device::DevicePlan;
pub use error::{Error, Origin, Place, Problem, Spot};
pub use flags::Typed;
pub use hessian::MOST_PROBES;
pub use keys::Method;
pub use overrides::{At, Fields, LayerPattern, Located, OpName, Override, Overrides, SiteOverride};
pub use plan::{
    ActivationPlan, BiasCorrection, BudgetPlan, ComparisonPlan, Constant, DataPlan, Distribution, EnginePlan,
    EvaluationPlan, Format, HessianPlan, HessianRequest, InputSource, InputsPlan, Int8Plan, Layout, Limit, Metric,
    MixedPlan, OutputPlan, Plan, Rounding, Transform, WeightPlan,
};
pub use reduce_range::ReduceRange;
pub use schema::json_schema;
pub use sweep::{Combination, Emit, Sweep};

use document::{MAX_DEPTH, Node, Value};

/// Bytes beyond which a file is no experiment.
const MAX_BYTES: u64 = 1 << 20;

/// An experiment as typed: one YAML file, and the settings of the command line laid over it.
///
/// Nothing about its keys is checked before [`resolve`](Self::resolve), so that a setting can replace a value of the
/// file that is impossible.
#[derive(Debug, Clone, PartialEq)]
pub struct Experiment {
    file: PathBuf,
    root: Node,
}

impl Experiment {
    /// Reads the YAML file at `path`.
    ///
    /// # Errors
    /// A file that cannot be read, is no UTF-8, no YAML, not one document, empty, or has a key twice.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let unreadable =
            |reason: String| Place::whole(Origin::File(file.clone())).error(Problem::Unreadable { reason });
        let mut bytes = Vec::new();
        let opened = std::fs::File::open(&file).map_err(|e| unreadable(e.to_string()))?;
        opened.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| unreadable(e.to_string()))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(unreadable(format!("expected at most {MAX_BYTES} bytes, found more")));
        }
        Self::parse(file, &bytes)
    }

    /// Parses the bytes of `file`, an absolute path.
    fn parse(file: PathBuf, bytes: &[u8]) -> Result<Self, Error> {
        let whole = Place::whole(Origin::File(file.clone()));
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let valid = bytes.get(..error.valid_up_to()).unwrap_or_default();
            let place = Place { spot: Some(end_of(&String::from_utf8_lossy(valid))), ..whole.clone() };
            place.error(Problem::Syntax { reason: "expected UTF-8, found other bytes".to_owned() })
        })?;
        let root = Node::parse(text, &whole.origin)?;
        match root.value {
            Value::Null => Err(whole.error(Problem::Empty)),
            _ => Ok(Self { file, root }),
        }
    }

    /// Lays each `KEY=VALUE` of `settings` over the experiment, the later over the earlier.
    ///
    /// `a.b=V` is the partial document `a: {b: V}`: V is YAML, maps are laid field by field (`inputs` is replaced whole),
    /// and an empty V or `null` brings the default back.
    ///
    /// # Errors
    /// A setting that is not `KEY=VALUE`, or whose VALUE is not YAML; errors name the flag `--set KEY=VALUE`.
    pub fn overlay(mut self, settings: &[String]) -> Result<Self, Error> {
        for setting in settings {
            let place = Place::whole(Origin::Flag(format!("--set {setting}")));
            let refuse = |found: &str| place.error(Problem::NotASetting { found: found.to_owned() });
            let Some((key, value)) = setting.split_once('=') else { return Err(refuse("no `=`")) };
            let path: Vec<&str> = key.trim().split('.').collect();
            if path.iter().any(|name| name.is_empty()) {
                return Err(refuse("an empty name in KEY"));
            }
            if path.len() > MAX_DEPTH {
                return Err(refuse("too many names in KEY"));
            }
            let value = Node::parse(value, &place.origin)?;
            self.lay(Node::nested(&path, value));
        }
        Ok(self)
    }

    /// Replaces the device, as `--device NAME` asks.
    #[must_use]
    pub fn with_device(mut self, name: &str) -> Self {
        let place = Place::whole(Origin::Flag(format!("--device {name}")));
        self.lay(Node::nested(&["device"], Node { place, value: Value::Text(name.to_owned()) }));
        self
    }

    /// Checks everything, fills every default and makes every path absolute; relative ones start at `base`.
    ///
    /// # Errors
    /// The first thing wrong: an unknown or missing key, an impossible value or combination,
    /// a model or data set that is not there.
    pub fn resolve(&self, base: &Path) -> Result<Plan, Error> {
        self.resolve_without("", base)
    }

    /// As [`resolve`](Self::resolve), for a command that can do without the data that `key` names, such as `evaluation.data`: it
    /// need not be there.
    ///
    /// # Errors
    /// As there.
    pub fn resolve_without(&self, key: &str, base: &Path) -> Result<Plan, Error> {
        let base = std::path::absolute(base).unwrap_or_else(|_| base.to_owned());
        let name = self.file.file_stem().unwrap_or_default().to_string_lossy();
        let resolver = resolve::Resolver { root: &self.root, base: &base, name: &name, dispensable: key };
        resolver.plan(decode::decode(&self.root)?)
    }

    /// As [`resolve`](Self::resolve), for a command that compares model files: only data, with inputs, is required.
    ///
    /// # Errors
    /// The first thing wrong, as there; without a float model also labels or metrics that are missing.
    pub fn resolve_comparison(&self, base: &Path) -> Result<ComparisonPlan, Error> {
        let base = std::path::absolute(base).unwrap_or_else(|_| base.to_owned());
        let name = self.file.file_stem().unwrap_or_default().to_string_lossy();
        let resolver = resolve::Resolver { root: &self.root, base: &base, name: &name, dispensable: "" };
        resolver.comparison(decode::decode(&self.root)?)
    }

    /// The data of `calibration`, for a command that looks at a model with it: only data and inputs are required.
    ///
    /// # Errors
    /// The first thing wrong, as those of [`resolve`](Self::resolve).
    pub fn resolve_calibration(&self, base: &Path) -> Result<DataPlan, Error> {
        let base = std::path::absolute(base).unwrap_or_else(|_| base.to_owned());
        let resolver = resolve::Resolver { root: &self.root, base: &base, name: "", dispensable: "" };
        let keys = decode::decode::<keys::Keys>(&self.root)?;
        resolver.calibration(keys.calibration.unwrap_or_default(), keys.seed.unwrap_or(0))
    }

    /// An error about the value of `key`, a full path such as `calibration.inputs[0]`, that only model or data could show:
    /// it names the place where that was typed. What evaluation takes from calibration is looked for there.
    #[must_use]
    pub fn error_at(&self, key: &str, reason: &str) -> Error {
        let inherited = key.strip_prefix("evaluation.").map(|rest| format!("calibration.{rest}"));
        let inherited = inherited.filter(|inherited| !self.root.says(key) && self.root.says(inherited));
        let key = inherited.unwrap_or_else(|| key.to_owned());
        self.root.place_of(&key).error(Problem::Invalid { key, reason: error::printable(reason) })
    }

    fn lay(&mut self, over: Node) {
        self.root.lay(over, &["inputs"]);
    }
}

/// The position just after `text`.
fn end_of(text: &str) -> Spot {
    let last = text.rsplit('\n').next().unwrap_or_default();
    Spot { line: text.matches('\n').count() as u64 + 1, column: last.chars().count() as u64 + 1 }
}

#[cfg(test)]
mod tests;
