//! A plan as an experiment again: the same keys, absolute paths, every default written.

use std::path::Path;

use serde::{Serialize, Serializer};

use super::error::{Error, Origin, Place, Problem};
use super::hessian::HessianKeys;
use super::keys::{
    CalibrationKeys, Count, Crop, Deviations, EvaluationKeys, Keys, LpValue, Method, ModelKeys, OneOrMany, OutputKeys,
    OutputName, Pixels, QuantizationKeys, SiteKeys, TransformKeys, WeightKeys,
};
use super::plan::{ActivationPlan, DataPlan, EvaluationPlan, HessianPlan, OutputPlan, Plan, Transform, WeightPlan};
use crate::quantizer::Granularity;
use crate::threshold::ErrorMethod;

impl Plan {
    /// This plan as the text of an `experiment.yaml` that resolves into an equal plan; keys stand in a fixed order.
    ///
    /// # Errors
    /// A path that is not UTF-8, which no resolved plan holds.
    pub fn to_yaml(&self) -> Result<String, Error> {
        section(&self.output.dir, self)
    }
}

impl DataPlan {
    /// This plan as the text of the section `calibration`.
    ///
    /// # Errors
    /// A path that is not UTF-8, which no resolved plan holds.
    pub fn to_yaml(&self) -> Result<String, Error> {
        section(&self.path, &CalibrationKeys::from(self))
    }
}

impl HessianPlan {
    /// What scores depend on, as the text of the section `hessian`.
    ///
    /// # Errors
    /// None that a plan can cause.
    pub fn request_to_yaml(&self) -> Result<String, Error> {
        let request = Self { allow_fallback: false, save: false, request: self.request.clone() };
        section(Path::new("hessian"), &HessianKeys::from(&request))
    }
}

fn section(path: &Path, keys: &impl Serialize) -> Result<String, Error> {
    serde_yaml::to_string(keys).map_err(|error| {
        let place = Place::whole(Origin::File(path.to_owned()));
        place.error(Problem::Unwritable { reason: error.to_string() })
    })
}

impl Serialize for Plan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Keys::from(self).serialize(serializer)
    }
}

impl From<&Plan> for Keys {
    fn from(plan: &Plan) -> Self {
        let methods = [plan.weights.error_method, plan.activations.error_method];
        // Where both are LP they share it.
        let exponent = methods.into_iter().find_map(ErrorMethod::exponent);
        let exponent = exponent.or(plan.overrides.ask_for(Method::Lp).then_some(plan.overrides.exponent));
        let overrides: Vec<_> = plan.overrides.entries.iter().map(Into::into).collect();
        Self {
            model: Some(ModelKeys { path: Some(plan.model.clone()) }),
            calibration: Some((&plan.calibration).into()),
            quantization: Some(QuantizationKeys {
                // What it stands for is written out.
                accuracy: None,
                weights: Some((&plan.weights).into()),
                activations: Some((&plan.activations).into()),
                weights_error_method: Some(plan.weights.error_method.into()),
                activation_error_method: Some(plan.activations.error_method.into()),
                l_p_value: exponent.map(LpValue),
                weights_bias_correction: Some(plan.weights.bias_correction),
                z_threshold: plan.activations.z_threshold.map(Deviations),
            }),
            overrides: Some(overrides).filter(|overrides| !overrides.is_empty()),
            mixed_precision: plan.mixed_precision.as_ref().map(Into::into),
            hessian: plan.hessian.as_ref().map(Into::into),
            device: Some(plan.device),
            allow_tf32: Some(plan.allow_tf32),
            output: Some((&plan.output).into()),
            evaluation: plan.evaluation.as_ref().map(Into::into),
            seed: Some(plan.seed),
            sweep: None,
        }
    }
}

impl From<&OutputPlan> for OutputKeys {
    fn from(plan: &OutputPlan) -> Self {
        let format = match plan.further.as_slice() {
            [] => OneOrMany::One(plan.format),
            _ => OneOrMany::Many(plan.formats().collect()),
        };
        Self {
            dir: Some(plan.dir.clone()),
            format: Some(format),
            engine: plan.int8.map(|int8| int8.engine),
            strict: plan.int8.map(|int8| int8.strict),
            reduce_range: plan.int8.map(|int8| int8.reduce_range),
        }
    }
}

impl From<&DataPlan> for CalibrationKeys {
    fn from(plan: &DataPlan) -> Self {
        Self {
            data: Some(plan.path.clone()),
            inputs: Some(plan.inputs.clone()),
            samples: plan.samples.map(Count),
            shuffle: Some(plan.shuffle),
            batch_size: Some(Count(plan.batch_size)),
            transform: Some((&plan.transform).into()),
        }
    }
}

impl From<&EvaluationPlan> for EvaluationKeys {
    fn from(plan: &EvaluationPlan) -> Self {
        let CalibrationKeys { data, inputs, samples, shuffle, batch_size, transform } = (&plan.data).into();
        let (labels, metrics) = (plan.labels.clone(), Some(plan.metrics.clone()));
        let output = plan.output.clone().map(OutputName);
        Self { data, inputs, labels, output, metrics, samples, shuffle, batch_size, transform }
    }
}

impl From<&Transform> for TransformKeys {
    fn from(plan: &Transform) -> Self {
        Self {
            resize: plan.resize.map(Pixels),
            crop: plan.crop.map(|sides| Crop(sides.map(Pixels))),
            layout: Some(plan.layout),
            scale: plan.scale,
            mean: plan.mean.clone(),
            std: plan.std.clone(),
        }
    }
}

impl From<&WeightPlan> for WeightKeys {
    fn from(plan: &WeightPlan) -> Self {
        Self {
            bits: Some(plan.scheme.bits),
            grid: Some(plan.scheme.grid),
            granularity: Some(plan.granularity),
            rounding: Some(plan.rounding),
            rounding_fallback: Some(plan.rounding_fallback),
        }
    }
}

impl From<&ActivationPlan> for SiteKeys {
    fn from(plan: &ActivationPlan) -> Self {
        let granularity = Some(Granularity::PerTensor);
        Self { bits: Some(plan.scheme.bits), grid: Some(plan.scheme.grid), granularity }
    }
}

impl From<ErrorMethod> for Method {
    fn from(method: ErrorMethod) -> Self {
        match method {
            ErrorMethod::NoClipping => Self::NoClipping,
            ErrorMethod::Mse => Self::Mse,
            ErrorMethod::Mae => Self::Mae,
            ErrorMethod::Lp { .. } => Self::Lp,
            ErrorMethod::Kl => Self::Kl,
            ErrorMethod::Hmse => Self::Hmse,
        }
    }
}
