//! `sweep:` of an experiment: settings of many runs, laid over what is said of all. It refuses to know what a setting means.

use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserializer, IgnoredAny};
use serde::{Deserialize, Serialize, Serializer};

use super::decode::decode;
use super::document::{Key, Node, Value};
use super::error::{Error, Problem};
use super::keys::Keys;
use super::plan::{Metric, Plan};
use super::{Experiment, document};

/// Combinations beyond which a sweep is a slip.
const MOST: usize = 10_000;

/// First names of keys that are the same in all runs of a sweep, because these are measured on one thing and lie in one place.
const SAME_IN_ALL: [&str; 5] = ["output", "evaluation", "device", "allow_tf32", "sweep"];

/// Many runs.
#[derive(Debug)]
pub struct Sweep {
    /// Absolute path of the directory of all.
    pub dir: PathBuf,
    /// In the order of the file; the last key of a grid changes fastest.
    pub combinations: Vec<Combination>,
    /// The keys of a grid that have several values, each with the shortest end that tells it from the others.
    pub axes: Vec<(String, String)>,
    /// What is measured, as the evaluation has it.
    pub metrics: Vec<Metric>,
    /// What the best is the best by; `None` for the first metric of the evaluation.
    pub rank_by: Option<Metric>,
    /// Which of the models are written.
    pub emit: Emit,
}

/// One run of a sweep.
#[derive(Debug)]
pub struct Combination {
    /// As in the file, or what tells it from the others of a grid.
    pub name: String,
    /// Keys and values as `--set` takes them.
    pub settings: Vec<(String, String)>,
    /// The whole plan, or why there is none.
    pub plan: Result<Plan, Error>,
}

/// Which models of a sweep are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Emit {
    /// None.
    None,
    /// The first of the ranking.
    #[default]
    Best,
    /// Each.
    All,
}

/// Many runs over one calibration, for `tsquant experiment`.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SweepKeys {
    /// Lists of values by key, such as `quantization.weights.bits: [8, 4]`: every combination is run.
    grid: Option<Anything>,
    /// Settings by key, under the name of each run.
    runs: Option<Anything>,
    /// The metric that ranks; the first of the evaluation if it is not given.
    rank_by: Option<Metric>,
    /// Which models are written: none, the best, or all.
    emit: Option<Emit>,
}

/// A map that is read as a tree.
#[derive(Debug)]
struct Anything;

impl<'de> Deserialize<'de> for Anything {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self)
    }
}

impl Serialize for Anything {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_unit()
    }
}

impl JsonSchema for Anything {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Settings".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "object" })
    }
}

impl Experiment {
    /// The runs of `sweep`, each of which is this experiment with its settings laid over it. Paths start at `base`.
    ///
    /// # Errors
    /// Without `sweep`, for one that is not of its form, and where the experiment is wrong without any of the settings'
    /// doing. What is wrong with a single combination is told there.
    pub fn resolve_sweep(&self, base: &Path) -> Result<Sweep, Error> {
        let keys = decode::<Keys>(&self.root)?.sweep.unwrap_or_default();
        let Some(sweep) = self.root.field("sweep").filter(|sweep| sweep.value != Value::Null) else {
            let problem = Problem::Missing {
                key: "sweep".to_owned(),
                expected: "`grid` with lists of values by key, or `runs` with settings by name".to_owned(),
            };
            return Err(self.root.place.error(problem));
        };
        let (axes, laid) = match (sweep.field("grid"), sweep.field("runs")) {
            (Some(grid), None) => combine(grid)?,
            (None, Some(runs)) => (Vec::new(), named(runs)?),
            _ => return Err(sweep.invalid("sweep", "expected either `grid` or `runs`")),
        };
        let alone = Self { file: self.file.clone(), root: self.root.without("sweep") };
        let combination = |laid: Laid<'_>| {
            let mut experiment = alone.clone();
            for (key, value) in &laid.settings {
                experiment.lay(Node::nested(&key.split('.').collect::<Vec<_>>(), (*value).clone()));
            }
            let settings = laid.settings.iter().map(|(key, value)| ((*key).to_owned(), value.to_flow())).collect();
            Combination { name: laid.name, settings, plan: experiment.resolve(base) }
        };
        let combinations: Vec<Combination> = laid.into_iter().map(combination).collect();
        let mut plans = combinations.iter().map(|combination| &combination.plan);
        let Some(first) = plans.clone().find_map(|plan| plan.as_ref().ok()) else {
            // Nothing but slips: the first will do.
            let slip = plans.find_map(|plan| plan.as_ref().err().cloned());
            return Err(slip.unwrap_or_else(|| sweep.invalid("sweep", "expected at least one combination, found none")));
        };
        let needs_labels = matches!(keys.rank_by, Some(Metric::Top1 | Metric::Top5));
        for Combination { name, plan, .. } in &combinations {
            let Ok(plan) = plan else { continue };
            if plan.hessian.as_ref().is_some_and(|hessian| hessian.save) {
                return Err(self.error_at("hessian.save", "the scores of a sweep are not kept"));
            }
            if !plan.is_measured_as(first) {
                let reason = format!("expected runs that are measured on the same data, found others for `{name}`");
                return Err(sweep.invalid("sweep", &reason));
            }
            if needs_labels && plan.evaluation.as_ref().is_none_or(|evaluation| evaluation.labels.is_none()) {
                return Err(self.error_at("sweep.rank_by", "expected `evaluation.labels` for it, found none"));
            }
        }
        Ok(Sweep {
            dir: first.output.dir.clone(),
            axes,
            metrics: first.evaluation.as_ref().map(|evaluation| evaluation.metrics.clone()).unwrap_or_default(),
            combinations,
            rank_by: keys.rank_by,
            emit: keys.emit.unwrap_or_default(),
        })
    }
}

/// Keys with several values, each with a short name.
type Axes = Vec<(String, String)>;

/// One combination before it is resolved.
struct Laid<'a> {
    name: String,
    settings: Vec<(&'a str, &'a Node)>,
}

/// The keys of a grid with several values, and every combination of its lists.
fn combine(grid: &Node) -> Result<(Axes, Vec<Laid<'_>>), Error> {
    let axes = settings(grid, "sweep.grid")?;
    let mut laid = vec![Vec::new()];
    for (key, node) in axes {
        let Value::List(values) = &node.value else {
            return Err(
                node.invalid(&in_grid(&key.name), &format!("expected a list of values, found {}", node.describe()))
            );
        };
        if values.is_empty() {
            return Err(node.invalid(&in_grid(&key.name), "expected at least one value, found none"));
        }
        if laid.len().saturating_mul(values.len()) > MOST {
            return Err(grid.invalid("sweep.grid", &format!("expected at most {MOST} combinations, found more")));
        }
        let with = |settings: Vec<(_, _)>| {
            values.iter().map(move |value| [&settings[..], &[(key.name.as_str(), value)]].concat())
        };
        laid = laid.into_iter().flat_map(with).collect();
    }
    let varied = axes.iter().zip(short_names(axes)).filter(|((_, list), _)| list.items().len() > 1);
    let varied: Axes = varied.map(|((key, _), short)| (key.name.clone(), short)).collect();
    let name = |settings: &[(&str, &Node)]| {
        let value = |key: &str| settings.iter().find(|(own, _)| *own == key).map(|(_, value)| value.to_flow());
        let parts = varied.iter().filter_map(|(key, short)| Some(format!("{short}={}", value(key)?)));
        let name = parts.collect::<Vec<_>>().join(" ");
        if name.is_empty() { "the only one".to_owned() } else { name }
    };
    let laid = laid.into_iter().map(|settings| Laid { name: name(&settings), settings }).collect();
    Ok((varied, laid))
}

fn in_grid(key: &str) -> String {
    format!("sweep.grid.{key}")
}

/// Combinations under their names.
fn named(runs: &Node) -> Result<Vec<Laid<'_>>, Error> {
    let laid = fields(runs, "sweep.runs")?.iter().map(|(key, run)| {
        let path = document::join("sweep.runs", &key.name);
        let settings = match &run.value {
            // Nothing but what is said of all.
            Value::Null => Vec::new(),
            _ => settings(run, &path)?.iter().map(|(key, value)| (key.name.as_str(), value)).collect(),
        };
        Ok(Laid { name: key.name.clone(), settings })
    });
    laid.collect()
}

/// The fields of the map at `path`.
fn fields<'a>(node: &'a Node, path: &str) -> Result<&'a [(Key, Node)], Error> {
    let Value::Map(fields) = &node.value else {
        return Err(node.invalid(path, &format!("expected a map, found {}", node.describe())));
    };
    if fields.is_empty() {
        return Err(node.invalid(path, "expected at least one key, found none"));
    }
    Ok(fields)
}

/// The settings in the map at `path`, by keys that may differ between runs.
fn settings<'a>(node: &'a Node, path: &str) -> Result<&'a [(Key, Node)], Error> {
    let fields = fields(node, path)?;
    for (key, _) in fields {
        let mut steps = key.name.split('.');
        let first = steps.next().unwrap_or_default();
        let problem = |reason: String| Problem::Invalid { key: document::join(path, &key.name), reason };
        if SAME_IN_ALL.contains(&first) {
            return Err(key.place.error(problem(format!("`{first}` is the same in all runs of a sweep"))));
        }
        if first.is_empty() || steps.any(str::is_empty) || key.name.split('.').count() > document::MAX_DEPTH {
            return Err(key.place.error(problem("expected a key such as `quantization.weights.bits`".to_owned())));
        }
    }
    Ok(fields)
}

/// Of each key the shortest end that tells it from the others.
fn short_names(axes: &[(Key, Node)]) -> Vec<String> {
    let ends = |key: &str, steps: usize| {
        let all: Vec<&str> = key.split('.').collect();
        all[all.len().saturating_sub(steps)..].join(".")
    };
    let name = |(key, _): &(Key, Node)| {
        let is_unique = |steps: &usize| {
            let own = ends(&key.name, *steps);
            axes.iter().filter(|(other, _)| ends(&other.name, *steps) == own).count() == 1
        };
        let steps = (1..document::MAX_DEPTH).find(is_unique).unwrap_or(document::MAX_DEPTH);
        ends(&key.name, steps)
    };
    axes.iter().map(name).collect()
}
