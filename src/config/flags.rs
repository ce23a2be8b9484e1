//! Keys that a command has a flag of its own for, laid over an experiment like the settings of `--set`.
//!
//! It knows how a flag's text becomes a value; which flags there are and what keys mean is for others to know.

use std::path::PathBuf;
use std::sync::Arc;

use super::Experiment;
use super::document::{Key, Node, Value};
use super::error::{Error, Origin, Place, Problem};

/// The value of a flag, as typed.
#[derive(Debug, Clone, Copy)]
pub enum Typed<'a> {
    /// A text that is the value.
    Text(&'a str),
    /// YAML: a number, or a map such as `{scale: 0.5}`.
    Yaml(&'a str),
    /// Names with commas between them.
    Names(&'a str),
    /// The arguments of `forward`, with commas between them: `TENSOR` or `const:VALUE`, or `ARGUMENT=` and one of these for
    /// each.
    Inputs(&'a str),
}

impl Experiment {
    /// An experiment without a file, for a command that can do with flags alone; errors about what is missing name
    /// `command`.
    #[must_use]
    pub fn of_flags(command: &str) -> Self {
        let place = Place::whole(Origin::Flag(command.to_owned()));
        // With its section there, a key that is missing in it is missing in the command, not in some other flag.
        let root = map(&place, vec![("evaluation", map(&place, Vec::new()))]);
        Self { file: PathBuf::new(), root }
    }

    /// Lays the values of flags over the experiment, each a flag, its key and what was typed if it was given.
    ///
    /// # Errors
    /// As those of [`with_flag`](Self::with_flag).
    pub fn with_flags<'a>(
        mut self,
        flags: impl IntoIterator<Item = (&'a str, &'a str, Option<Typed<'a>>)>,
    ) -> Result<Self, Error> {
        for (flag, key, typed) in flags {
            if let Some(typed) = typed {
                self = self.with_flag(flag, key, typed)?;
            }
        }
        Ok(self)
    }

    /// Lays the value of the flag `flag`, `--labels` for instance, over the experiment's at `key`.
    ///
    /// # Errors
    /// A text that is no YAML, arguments that are partly named; errors name the flag as typed.
    pub fn with_flag(mut self, flag: &str, key: &str, typed: Typed<'_>) -> Result<Self, Error> {
        let (Typed::Text(text) | Typed::Yaml(text) | Typed::Names(text) | Typed::Inputs(text)) = typed;
        let place = Place::whole(Origin::Flag(format!("{flag} {text}")));
        let node = match typed {
            Typed::Text(text) => leaf(&place, text),
            Typed::Yaml(text) => Node::parse(text, &place.origin)?,
            Typed::Names(text) => list(&place, text.split(',').map(|name| leaf(&place, name.trim())).collect()),
            Typed::Inputs(text) => inputs(&place, key, text)?,
        };
        let path: Vec<&str> = key.split('.').collect();
        self.lay(Node::nested(&path, node));
        Ok(self)
    }
}

fn leaf(place: &Place, text: &str) -> Node {
    Node { place: place.clone(), value: Value::Text(text.to_owned()) }
}

fn list(place: &Place, items: Vec<Node>) -> Node {
    Node { place: place.clone(), value: Value::List(items) }
}

fn map(place: &Place, fields: Vec<(&str, Node)>) -> Node {
    let key = |name: &str| Key { place: place.clone(), name: name.to_owned() };
    let fields = fields.into_iter().map(|(name, node)| (key(name), node));
    Node { place: place.clone(), value: Value::Map(fields.collect()) }
}

fn inputs(place: &Place, key: &str, text: &str) -> Result<Node, Error> {
    let refuse = |reason: String| place.error(Problem::Invalid { key: key.to_owned(), reason });
    let items: Vec<&str> = text.split(',').map(str::trim).collect();
    let named: Vec<(&str, &str)> = items.iter().filter_map(|item| item.split_once('=')).collect();
    if named.is_empty() {
        return Ok(list(place, items.into_iter().map(|item| source(place, item)).collect::<Result<_, _>>()?));
    }
    if named.len() < items.len() {
        return Err(refuse("expected ARGUMENT=TENSOR for all arguments or for none, found both".to_owned()));
    }
    for (index, (name, _)) in named.iter().enumerate() {
        if named.iter().take(index).any(|(earlier, _)| earlier == name) {
            return Err(refuse(format!(
                "expected each argument once, found `{}` twice",
                super::error::shortened(name)
            )));
        }
    }
    let fields = named.into_iter().map(|(name, item)| Ok((name, source(place, item)?)));
    Ok(map(place, fields.collect::<Result<_, Error>>()?))
}

/// `TENSOR` or `const:VALUE`.
fn source(place: &Place, item: &str) -> Result<Node, Error> {
    match item.strip_prefix("const:") {
        Some(constant) => Ok(map(place, vec![("const", Node::parse(constant, &Arc::clone(&place.origin))?)])),
        None => Ok(leaf(place, item)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::{ComparisonPlan, Constant, InputSource, InputsPlan, Metric};
    use super::*;

    /// What these flags resolve into, in a folder with `q.npz` and `f.pt`, or the error without the folder.
    fn resolve(flags: &[(&str, &str, Typed<'_>)]) -> Result<ComparisonPlan, String> {
        let folder = tempfile::tempdir().unwrap();
        for file in ["q.npz", "f.pt"] {
            fs_err::write(folder.path().join(file), "").unwrap();
        }
        let mut experiment = Ok(Experiment::of_flags("tsquant evaluate"));
        for (flag, key, typed) in flags {
            experiment = experiment.and_then(|experiment| experiment.with_flag(flag, key, *typed));
        }
        let plan = experiment.and_then(|experiment| experiment.resolve_comparison(folder.path()));
        plan.map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), "/dir/"))
    }

    const DATA: (&str, &str, Typed<'_>) = ("--data", "evaluation.data", Typed::Text("q.npz"));
    const FLOAT: (&str, &str, Typed<'_>) = ("--reference", "model.path", Typed::Text("f.pt"));
    const X: (&str, &str, Typed<'_>) = ("--inputs", "evaluation.inputs", Typed::Inputs("x"));
    const LABELS: (&str, &str, Typed<'_>) = ("--labels", "evaluation.labels", Typed::Text("y"));

    fn inputs_of(text: &str) -> Result<InputsPlan, String> {
        resolve(&[DATA, FLOAT, ("--inputs", "evaluation.inputs", Typed::Inputs(text))])
            .map(|plan| plan.evaluation.data.inputs)
    }

    #[test]
    fn inputs_by_position_and_by_name() {
        let tensor = |name: &str| InputSource::Tensor(name.to_owned());
        assert_eq!(inputs_of("a, 5").unwrap(), InputsPlan::Positional(vec![tensor("a"), tensor("5")]));
        let rate = InputSource::Const(Constant::Int(16000));
        assert_eq!(inputs_of("a,const:16000").unwrap(), InputsPlan::Positional(vec![tensor("a"), rate.clone()]));
        let none = InputSource::Const(Constant::None);
        let named = [("x", tensor("a")), ("sr", rate), ("mask", none)].map(|(name, source)| (name.to_owned(), source));
        assert_eq!(inputs_of("x=a,sr=const:16000,mask=const:null").unwrap(), InputsPlan::Named(named.into()));
    }

    #[test]
    fn inputs_that_mean_nothing_name_the_flag() {
        for (text, expected) in [
            ("x=a,b", "`evaluation.inputs`: expected ARGUMENT=TENSOR for all arguments or for none, found both"),
            ("x=a,x=b", "`evaluation.inputs`: expected each argument once, found `x` twice"),
            ("a,", "`evaluation.inputs[1]`: expected the name of a tensor, found an empty text"),
            ("", "`evaluation.inputs[0]`: expected the name of a tensor, found an empty text"),
            ("a,const:b", "`evaluation.inputs[1].const` must be a number, true, false or null, found the text `b`"),
            ("a,const:[", "not valid YAML: unclosed bracket '['"),
            ("const:1", "`evaluation.inputs`: expected at least one tensor, found constants alone"),
            ("=a", "`evaluation.inputs`: expected the name of an argument, found an empty text"),
        ] {
            assert_eq!(inputs_of(text).unwrap_err(), format!("--inputs {text}: {expected}"));
        }
    }

    #[test]
    fn flags_alone_are_enough() {
        let plan = resolve(&[DATA, FLOAT, X]).unwrap();
        assert!(plan.reference.is_some_and(|path| path.ends_with("f.pt")));
        assert_eq!((plan.section, plan.evaluation.data.batch_size.get()), ("evaluation", 32));
        assert_eq!(plan.evaluation.metrics, [Metric::Agreement, Metric::Sqnr]);
        let all = [
            DATA,
            FLOAT,
            X,
            LABELS,
            ("--output", "evaluation.output", Typed::Text("1")),
            ("--metrics", "evaluation.metrics", Typed::Names("top5, cosine")),
            ("--samples", "evaluation.samples", Typed::Yaml("7")),
            ("--batch-size", "evaluation.batch_size", Typed::Yaml("3")),
            ("--transform", "evaluation.transform", Typed::Yaml("{scale: 2, mean: [1, 2]}")),
        ];
        let evaluation = resolve(&all).unwrap().evaluation;
        assert_eq!((evaluation.labels.as_deref(), evaluation.output.as_deref()), (Some("y"), Some("1")));
        assert_eq!(evaluation.metrics, [Metric::Top5, Metric::Cosine]);
        assert_eq!(evaluation.data.samples.map(std::num::NonZeroUsize::get), Some(7));
        assert_eq!((evaluation.data.batch_size.get(), evaluation.data.transform.scale), (3, Some(2.0)));
    }

    #[test]
    fn a_model_alone_needs_labels() {
        assert_eq!(resolve(&[DATA, X, LABELS]).unwrap().evaluation.metrics, [Metric::Top1]);
        let refusal = resolve(&[DATA, X]).unwrap_err();
        let expected =
            "tsquant evaluate: `evaluation.labels` is missing, expected the name of a tensor, or a float model";
        assert!(refusal.starts_with(expected), "{refusal}");
        let metrics = ("--metrics", "evaluation.metrics", Typed::Names("agreement"));
        let refusal = resolve(&[DATA, X, LABELS, metrics]).unwrap_err();
        assert!(refusal.starts_with("--metrics agreement: `evaluation.metrics`: expected top1 or top5"), "{refusal}");
    }

    #[test]
    fn wrong_values_name_flag_and_key() {
        let refused = |flag: (&str, &str, Typed<'_>)| resolve(&[DATA, FLOAT, X, flag]).unwrap_err();
        assert_eq!(
            refused(("--data", "evaluation.data", Typed::Text("z.npz"))),
            "--data z.npz: `evaluation.data`: expected a file that exists, found nothing at /dir/z.npz"
        );
        assert_eq!(
            refused(("--samples", "evaluation.samples", Typed::Yaml("0"))),
            "--samples 0: `evaluation.samples`: expected a whole number from 1 to 4294967295, found 0"
        );
        assert_eq!(
            refused(("--metrics", "evaluation.metrics", Typed::Names("agreement,top2"))),
            "--metrics agreement,top2: `evaluation.metrics[1]` must be one of `top1`, `top5`, `agreement`, `sqnr`, `cosine`, \
             `max_abs_diff`, found `top2`, did you mean `top5`?"
        );
        let typo = refused(("--transform", "evaluation.transform", Typed::Yaml("{men: [1]}")));
        assert_eq!(typo, "--transform {men: [1]}: unknown key `men` in `evaluation.transform`, did you mean `mean`?");
        assert_eq!(
            resolve(&[X, LABELS]).unwrap_err(),
            "tsquant evaluate: `evaluation.data` is missing, expected the path of a data file or a folder of images"
        );
    }
}
