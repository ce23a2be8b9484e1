//! From keys as typed to the checked plan: defaults, absolute paths, combinations.
//!
//! It looks at the file system only to see that model and data are there and where links lead; it opens nothing and refuses
//! to know formats.

use std::num::NonZeroUsize;
use std::path::{Component, Path, PathBuf};

use super::accuracy::Recipe;
use super::device::DevicePlan;
use super::document::Node;
use super::error::{Error, Problem, path_text};
use super::keys::{
    CalibrationKeys, Count, Deviations, EvaluationKeys, Keys, LpValue, Method, OneOrMany, OutputKeys, OutputName,
    QuantizationKeys, TransformKeys,
};
use super::overrides::Overrides;
use super::plan::{
    ActivationPlan, BiasCorrection, BudgetPlan, ComparisonPlan, DataPlan, EnginePlan, EvaluationPlan, Format,
    InputSource, InputsPlan, Int8Plan, Metric, MixedPlan, OutputPlan, Plan, Rounding, Transform, WeightPlan,
};
use super::reduce_range::ReduceRange;
use crate::quantizer::{Bits, Granularity, Grid, Scheme};
use crate::threshold::{ErrorMethod, Exponent};

/// Rows in a batch where nothing else is typed.
const BATCH_SIZE: NonZeroUsize = NonZeroUsize::new(32).unwrap();

/// What keys are resolved against.
pub(super) struct Resolver<'a> {
    /// The tree the keys were read from, for the places of errors.
    pub(super) root: &'a Node,
    /// Absolute folder of relative paths.
    pub(super) base: &'a Path,
    /// Last part of the default run directory.
    pub(super) name: &'a str,
    /// The key whose data need not be there.
    pub(super) dispensable: &'a str,
}

/// What evaluation takes from calibration where it has none of its own.
struct Fallback {
    inputs: Option<InputsPlan>,
    batch_size: Option<NonZeroUsize>,
    transform: Transform,
}

impl From<&DataPlan> for Fallback {
    fn from(plan: &DataPlan) -> Self {
        let (inputs, batch_size) = (Some(plan.inputs.clone()), Some(plan.batch_size));
        Self { inputs, batch_size, transform: plan.transform.clone() }
    }
}

impl Resolver<'_> {
    /// The plan of `keys`.
    ///
    /// # Errors
    /// A missing key, a value or combination that is impossible, a model or data set that is not there.
    pub(super) fn plan(&self, keys: Keys) -> Result<Plan, Error> {
        if keys.sweep.is_some() {
            let reason = "many runs are for `tsquant experiment`; `--set sweep=` leaves them out";
            return Err(self.invalid("sweep", reason.to_owned()));
        }
        let model = self.model(keys.model.unwrap_or_default().path)?;
        let seed = keys.seed.unwrap_or(0);
        let calibration = self.calibration(keys.calibration.unwrap_or_default(), seed)?;
        let quantization = keys.quantization.unwrap_or_default();
        let fallback = Recipe::of(quantization.accuracy).hessian_fallback;
        let exponent = quantization.l_p_value.map(|LpValue(p)| p).unwrap_or_default();
        let mixed_precision = keys.mixed_precision.as_ref().map(super::mixed_precision::resolve).transpose();
        let mixed_precision = mixed_precision.map_err(|(key, reason)| self.invalid(&key, reason))?;
        let (weights, activations) = self.quantization(quantization, exponent, mixed_precision.as_ref())?;
        let overrides = Overrides::resolve(self.root, keys.overrides.unwrap_or_default(), exponent)?;
        let hessian = super::hessian::resolve(&keys.hessian.unwrap_or_default(), seed, fallback)
            .map_err(|(key, reason)| self.invalid(&format!("hessian.{key}"), reason))?;
        let methods = [weights.error_method, activations.error_method];
        // They are computed on the rows that weights are rounded and biases corrected on.
        let is_in_sequence = weights.rounding == Rounding::Gptq || weights.bias_correction == BiasCorrection::Weighted;
        let is_asked = methods.contains(&ErrorMethod::Hmse)
            || overrides.ask_for(Method::Hmse)
            || mixed_precision.is_some()
            || is_in_sequence;
        let hessian = is_asked.then_some(hessian);
        let (device, allow_tf32) = (keys.device.unwrap_or(DevicePlan::Auto), keys.allow_tf32.unwrap_or(false));
        let output = self.output(keys.output.unwrap_or_default())?;
        let device = self.device_for(device, &output)?;
        let is_reduced = output.int8.is_some_and(|int8| int8.reduce_range == ReduceRange::Always);
        if is_reduced && mixed_precision.as_ref().is_some_and(|mixed| mixed.activations.is_some()) {
            let reason =
                "`mixed_precision.activations` chooses the bits of activations: expected auto or false, found true";
            return Err(self.invalid("output.reduce_range", reason));
        }
        let evaluation = keys.evaluation.map(|keys| {
            let data = self.required_data("evaluation.data", keys.data.as_deref())?;
            self.evaluation(keys, data, Fallback::from(&calibration), seed)
        });
        let evaluation = evaluation.transpose()?;
        let data = evaluation.as_ref().map(|evaluation| &evaluation.data.path);
        for path in [&calibration.path].into_iter().chain(data) {
            if is_in(&output.dir, path) && !is_in(path, &output.dir) {
                let found = path_text(path);
                let reason = format!(
                    "expected a folder outside of the data, as that would change with each run, found {found} around it"
                );
                return Err(self.invalid("output.dir", reason));
            }
        }
        for path in [&model, &calibration.path].into_iter().chain(data) {
            if is_in(path, &output.dir) {
                let found = path_text(path);
                let reason =
                    format!("expected a folder without model and data, as a run replaces it, found {found} in it");
                return Err(self.invalid("output.dir", reason));
            }
        }
        Ok(Plan {
            model,
            calibration,
            weights,
            activations,
            overrides,
            mixed_precision,
            hessian,
            device,
            allow_tf32,
            output,
            evaluation,
            seed,
        })
    }

    /// What `evaluate` does with `keys`: neither model nor calibration data need be there, and data that is not named
    /// under `evaluation` is that of calibration, as in a run.
    ///
    /// # Errors
    /// As those of [`plan`](Self::plan), and for metrics that compare where there is no float model.
    pub(super) fn comparison(&self, keys: Keys) -> Result<ComparisonPlan, Error> {
        let reference = keys.model.unwrap_or_default().path;
        let reference = reference.map(|path| self.model(Some(path))).transpose()?;
        let (calibration, mut evaluation) = (keys.calibration.unwrap_or_default(), keys.evaluation.unwrap_or_default());
        let (section, data) = match (&evaluation.data, &calibration.data) {
            (None, Some(data)) => ("calibration", self.required_data("calibration.data", Some(data))?),
            (data, _) => ("evaluation", self.required_data("evaluation.data", data.as_deref())?),
        };
        if section == "calibration" {
            evaluation.samples = evaluation.samples.or(calibration.samples);
            evaluation.shuffle = evaluation.shuffle.or(calibration.shuffle);
        }
        let fallback = Fallback {
            inputs: calibration.inputs,
            batch_size: calibration.batch_size.map(|Count(count)| count),
            transform: self.transform("calibration.transform", calibration.transform.unwrap_or_default())?,
        };
        let mut evaluation = self.evaluation(evaluation, data, fallback, keys.seed.unwrap_or(0))?;
        if reference.is_none() {
            self.check_alone(&mut evaluation)?;
        }
        let run_dir = self.output(keys.output.unwrap_or_default())?.dir;
        Ok(ComparisonPlan { reference, evaluation, section, run_dir })
    }

    /// A model alone has no measures but its accuracy.
    fn check_alone(&self, evaluation: &mut EvaluationPlan) -> Result<(), Error> {
        if evaluation.labels.is_none() {
            let key = "evaluation.labels".to_owned();
            let expected = "the name of a tensor, or a float model to compare with (`model.path`)".to_owned();
            return Err(self.error("evaluation.labels", Problem::Missing { key, expected }));
        }
        evaluation.metrics.retain(|metric| metric.needs_labels());
        if evaluation.metrics.is_empty() {
            let reason = "expected top1 or top5, since no float model (`model.path`) is given, found neither";
            return Err(self.invalid("evaluation.metrics", reason));
        }
        Ok(())
    }

    fn error(&self, key: &str, problem: Problem) -> Error {
        self.root.place_of(key).error(problem)
    }

    fn invalid(&self, key: &str, reason: impl Into<String>) -> Error {
        self.error(key, Problem::Invalid { key: key.to_owned(), reason: reason.into() })
    }

    fn required<T>(&self, key: &str, value: Option<T>, expected: &str) -> Result<T, Error> {
        let missing = || Problem::Missing { key: key.to_owned(), expected: expected.to_owned() };
        value.ok_or_else(|| self.error(key, missing()))
    }

    fn model(&self, typed: Option<PathBuf>) -> Result<PathBuf, Error> {
        let key = "model.path";
        let path = self.existing(key, &self.required(key, typed, "the path of a TorchScript file")?)?;
        if path.is_dir() {
            let shown = path_text(&path);
            return Err(self.invalid(key, format!("expected a TorchScript file, found the folder {shown}")));
        }
        Ok(path)
    }

    /// The data of calibration.
    ///
    /// # Errors
    /// Data or inputs that are missing, a value or combination that is impossible.
    pub(super) fn calibration(&self, keys: CalibrationKeys, seed: u64) -> Result<DataPlan, Error> {
        let path = self.required_data("calibration.data", keys.data.as_deref())?;
        let inputs = self.required("calibration.inputs", keys.inputs, "the tensors that the model takes")?;
        self.check_inputs("calibration.inputs", &inputs)?;
        Ok(DataPlan {
            path,
            inputs,
            samples: keys.samples.map(|Count(count)| count),
            shuffle: keys.shuffle.unwrap_or(false),
            seed,
            batch_size: keys.batch_size.map_or(BATCH_SIZE, |Count(count)| count),
            transform: self.transform("calibration.transform", keys.transform.unwrap_or_default())?,
        })
    }

    fn required_data(&self, key: &str, typed: Option<&Path>) -> Result<PathBuf, Error> {
        self.existing(key, self.required(key, typed, "the path of a data file or a folder of images")?)
    }

    fn evaluation(
        &self,
        keys: EvaluationKeys,
        path: PathBuf,
        fallback: Fallback,
        seed: u64,
    ) -> Result<EvaluationPlan, Error> {
        let inputs = keys.inputs.or(fallback.inputs);
        let inputs = self.required("evaluation.inputs", inputs, "the tensors that the model takes")?;
        self.check_inputs("evaluation.inputs", &inputs)?;
        let transform = match keys.transform {
            Some(own) => self.transform("evaluation.transform", own)?,
            None => fallback.transform,
        };
        let data = DataPlan {
            path,
            inputs,
            samples: keys.samples.map(|Count(count)| count),
            shuffle: keys.shuffle.unwrap_or(false),
            seed,
            batch_size: keys.batch_size.map(|Count(count)| count).or(fallback.batch_size).unwrap_or(BATCH_SIZE),
            transform,
        };
        if keys.labels.as_deref() == Some("") {
            return Err(self.invalid("evaluation.labels", "expected the name of a tensor, found an empty text"));
        }
        let metrics = self.metrics(keys.metrics, keys.labels.is_some())?;
        let output = keys.output.map(|OutputName(name)| name);
        Ok(EvaluationPlan { data, labels: keys.labels, output, metrics })
    }

    fn metrics(&self, typed: Option<Vec<Metric>>, labelled: bool) -> Result<Vec<Metric>, Error> {
        let Some(metrics) = typed else {
            let all = [Metric::Top1, Metric::Agreement, Metric::Sqnr];
            return Ok(all.into_iter().filter(|metric| labelled || !metric.needs_labels()).collect());
        };
        if metrics.is_empty() {
            return Err(self.invalid("evaluation.metrics", "expected at least one metric, found an empty list"));
        }
        for (i, metric) in metrics.iter().enumerate() {
            let key = format!("evaluation.metrics[{i}]");
            if metrics.iter().take(i).any(|earlier| earlier == metric) {
                return Err(self.invalid(&key, format!("expected each metric once, found {} twice", metric.name())));
            }
            if metric.needs_labels() && !labelled {
                let reason =
                    format!("{} needs labels, expected the key `evaluation.labels`, found none", metric.name());
                return Err(self.invalid(&key, reason));
            }
        }
        Ok(metrics)
    }

    fn check_inputs(&self, key: &str, inputs: &InputsPlan) -> Result<(), Error> {
        let sources: Vec<&InputSource> = match inputs {
            InputsPlan::Positional(sources) => sources.iter().collect(),
            InputsPlan::Named(sources) => sources.iter().map(|(_, source)| source).collect(),
        };
        let nameless = matches!(inputs, InputsPlan::Named(sources) if sources.iter().any(|(name, _)| name.is_empty()));
        if nameless {
            return Err(self.invalid(key, "expected the name of an argument, found an empty text"));
        }
        if !sources.iter().any(|source| matches!(source, InputSource::Tensor(_))) {
            let found = if sources.is_empty() { "none" } else { "constants alone" };
            return Err(self.invalid(key, format!("expected at least one tensor, found {found}")));
        }
        Ok(())
    }

    fn transform(&self, key: &str, keys: TransformKeys) -> Result<Transform, Error> {
        if let Some(scale) = keys.scale {
            self.check_number(&format!("{key}.scale"), scale, |s| s != 0.0, "a finite number other than 0")?;
        }
        for (i, mean) in keys.mean.iter().flatten().enumerate() {
            self.check_number(&format!("{key}.mean[{i}]"), *mean, |_| true, "a finite number")?;
        }
        for (i, std) in keys.std.iter().flatten().enumerate() {
            self.check_number(&format!("{key}.std[{i}]"), *std, |s| s > 0.0, "a finite number above 0")?;
        }
        for (name, list) in [("mean", &keys.mean), ("std", &keys.std)] {
            if list.as_ref().is_some_and(Vec::is_empty) {
                let reason = "expected one number or one per channel, found an empty list";
                return Err(self.invalid(&format!("{key}.{name}"), reason));
            }
        }
        if let (Some(mean), Some(std)) = (&keys.mean, &keys.std) {
            let (means, stds) = (mean.len(), std.len());
            if means != stds && means != 1 && stds != 1 {
                let reason = format!("expected as many numbers as `mean` has ({means}) or one, found {stds}");
                return Err(self.invalid(&format!("{key}.std"), reason));
            }
        }
        Ok(Transform {
            resize: keys.resize.map(|pixels| pixels.0),
            crop: keys.crop.map(|crop| crop.0.map(|pixels| pixels.0)),
            layout: keys.layout.unwrap_or_default(),
            scale: keys.scale,
            mean: keys.mean,
            std: keys.std,
        })
    }

    /// The arithmetic is in f32, so a number counts as what it becomes there.
    fn check_number(&self, key: &str, number: f64, fits: fn(f32) -> bool, expected: &str) -> Result<(), Error> {
        let single = number as f32;
        if single.is_finite() && fits(single) {
            return Ok(());
        }
        Err(self.invalid(key, format!("expected {expected} in float32, found {number:?}")))
    }

    fn quantization(
        &self,
        keys: QuantizationKeys,
        exponent: Exponent,
        mixed: Option<&MixedPlan>,
    ) -> Result<(WeightPlan, ActivationPlan), Error> {
        let recipe = Recipe::of(keys.accuracy);
        let weights = keys.weights.unwrap_or_default();
        let activations = keys.activations.unwrap_or_default();
        if activations.granularity == Some(Granularity::PerChannel) {
            let reason = "activations are quantized per tensor, expected `per_tensor`, found `per_channel`";
            return Err(self.invalid("quantization.activations.granularity", reason));
        }
        let weight_plan = WeightPlan {
            granularity: weights.granularity.unwrap_or(Granularity::PerChannel),
            scheme: self.scheme("quantization.weights", (weights.bits, weights.grid), Grid::Symmetric)?,
            error_method: keys.weights_error_method.unwrap_or(recipe.weights_error_method).with_exponent(exponent),
            bias_correction: keys.weights_bias_correction.unwrap_or(recipe.bias_correction),
            rounding: weights.rounding.unwrap_or(recipe.rounding),
            rounding_fallback: weights.rounding_fallback.unwrap_or(recipe.rounding_fallback),
        };
        let activation_plan = ActivationPlan {
            scheme: self.scheme("quantization.activations", (activations.bits, activations.grid), Grid::Uniform)?,
            error_method: keys
                .activation_error_method
                .unwrap_or(recipe.activation_error_method)
                .with_exponent(exponent),
            z_threshold: keys.z_threshold.map(|Deviations(z)| z),
        };
        let widest = |half: Option<&BudgetPlan>, scheme: Scheme| match half {
            Some(budget) => ("mixed_precision", budget.widths.widest()),
            None => ("quantization", scheme.bits),
        };
        let bits = widest(mixed.and_then(|mixed| mixed.weights.as_ref()), weight_plan.scheme);
        if let Some(reason) = too_wide("weights", bits, weight_plan.error_method) {
            return Err(self.invalid("quantization.weights_error_method", reason));
        }
        let bits = widest(mixed.and_then(|mixed| mixed.activations.as_ref()), activation_plan.scheme);
        if let Some(reason) = too_wide("activations", bits, activation_plan.error_method) {
            return Err(self.invalid("quantization.activation_error_method", reason));
        }
        Ok((weight_plan, activation_plan))
    }

    fn scheme(&self, key: &str, (bits, grid): (Option<Bits>, Option<Grid>), default: Grid) -> Result<Scheme, Error> {
        let bits = match bits {
            Some(bits) => bits,
            None => Bits::try_from(8u64).map_err(|error| self.invalid(key, error.to_string()))?,
        };
        Ok(Scheme { bits, grid: grid.unwrap_or(default) })
    }

    /// Where 8-bit kernels compute: they are the processor's.
    fn device_for(&self, device: DevicePlan, output: &OutputPlan) -> Result<DevicePlan, Error> {
        match (device, &output.int8) {
            (DevicePlan::Cuda(_), Some(_)) => {
                let reason = format!("the format int8 computes on the processor: expected cpu, found {device}");
                Err(self.invalid("device", reason))
            }
            (_, Some(_)) => Ok(DevicePlan::Cpu),
            (device, None) => Ok(device),
        }
    }

    fn output(&self, keys: OutputKeys) -> Result<OutputPlan, Error> {
        let dir = keys.dir.unwrap_or_else(|| Path::new("runs").join(self.name));
        let dir = self.absolute("output.dir", &dir)?;
        let formats = match keys.format {
            None => vec![Format::FakeQuant],
            Some(OneOrMany::One(only)) => vec![only],
            Some(OneOrMany::Many(formats)) => formats,
        };
        let Some((&format, further)) = formats.split_first() else {
            return Err(self.invalid("output.format", "expected the name of a format, found an empty list"));
        };
        for (i, format) in formats.iter().enumerate() {
            if formats.iter().take(i).any(|earlier| earlier == format) {
                let reason = format!("expected each format once, found {} twice", format.name());
                return Err(self.invalid(&format!("output.format[{i}]"), reason));
            }
        }
        let is_int8 = formats.contains(&Format::Int8);
        let of_int8 = [
            ("engine", keys.engine.is_some()),
            ("strict", keys.strict.is_some()),
            ("reduce_range", keys.reduce_range.is_some()),
        ];
        for (key, is_typed) in of_int8 {
            if is_typed && !is_int8 {
                let reason = "it is for the format int8, which `output.format` does not ask for";
                return Err(self.invalid(&format!("output.{key}"), reason));
            }
        }
        let int8 = is_int8.then_some(Int8Plan {
            engine: keys.engine.unwrap_or(EnginePlan::Auto),
            strict: keys.strict.unwrap_or(true),
            reduce_range: keys.reduce_range.unwrap_or(ReduceRange::Auto),
        });
        Ok(OutputPlan { dir, format, further: further.to_vec(), int8 })
    }

    fn existing(&self, key: &str, typed: &Path) -> Result<PathBuf, Error> {
        let path = self.absolute(key, typed)?;
        let shown = path_text(&path);
        match path.metadata() {
            Ok(_) => Ok(path),
            Err(_) if key == self.dispensable => Ok(path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(self.invalid(key, format!("expected a file that exists, found nothing at {shown}")))
            }
            Err(error) => Err(self.invalid(key, format!("{shown} cannot be read: {error}"))),
        }
    }

    fn absolute(&self, key: &str, typed: &Path) -> Result<PathBuf, Error> {
        let text = typed.to_string_lossy();
        if text.is_empty() || text.contains('\0') {
            let found = if text.is_empty() { "an empty text".to_owned() } else { path_text(typed) };
            return Err(self.invalid(key, format!("expected a path, found {found}")));
        }
        let path = normal(&self.base.join(typed));
        if path.to_str().is_none() {
            let shown = path_text(&path);
            return Err(self.invalid(key, format!("expected a path in UTF-8, found {shown}")));
        }
        Ok(path)
    }
}

/// Why this method cannot choose for so many bits, which a section says, where it cannot; `sites` is `weights` or `activations`.
fn too_wide(sites: &str, (section, bits): (&str, Bits), error_method: ErrorMethod) -> Option<String> {
    let (most, found) = (ErrorMethod::KL_MAX_BITS, bits.get());
    let wide = error_method == ErrorMethod::Kl && found > most;
    wide.then(|| format!("{error_method} chooses for at most {most} bits, found {found} in `{section}.{sites}.bits`"))
}

/// Whether `path` is `folder` or in it, as typed or with links followed.
fn is_in(path: &Path, folder: &Path) -> bool {
    path.starts_with(folder) || real(path).starts_with(real(folder))
}

/// `path` with links followed, as far as it exists.
fn real(path: &Path) -> PathBuf {
    let mut nearest = path.ancestors().filter_map(|folder| Some((folder.canonicalize().ok()?, folder)));
    let real = nearest.next().and_then(|(real, folder)| Some(real.join(path.strip_prefix(folder).ok()?)));
    real.unwrap_or_else(|| path.to_owned())
}

/// `path` without `.` and, where that cannot lead elsewhere, without `..`: a link may point into another folder.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if normal.is_symlink() || normal.ends_with("..") => normal.push(".."),
            Component::ParentDir => {
                normal.pop();
            }
            other => normal.push(other),
        }
    }
    normal
}
