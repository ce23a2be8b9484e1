//! What runs of one model and one set of calibration data share: the model, its sites, the data, and what was seen of them. It
//! refuses to know thresholds.

use std::collections::HashMap;

use super::calibration::Calibration;
use super::compare::Comparison;
use super::device::Taken;
use super::kept::statistics::{Kept, Key, section};
use super::{Error, calibration_batches, hash, kernels, load_checked, versions};
use crate::config::{BiasCorrection, Plan};
use crate::correct::{InputSums, Targets};
use crate::dataset::Batches;
use crate::jit::Clean;
use crate::observe::observe;
use crate::report;
use crate::sites::{self, Sites};
use crate::statistics::Activation;

/// A loaded model with its data.
pub(super) struct Base {
    pub(super) taken: Taken,
    pub(super) model_hash: String,
    pub(super) versions: report::Versions,
    pub(super) calibration: Calibration,
    pub(super) model: Clean,
    /// All that the model has.
    pub(super) sites: Sites,
}

/// What the calibration data showed.
pub(super) struct Observed {
    /// In the order of the activations that were looked at.
    pub(super) statistics: Vec<Vec<Activation>>,
    /// The ops whose biases are to be corrected.
    pub(super) targets: Targets,
    pub(super) inputs: InputSums,
}

impl Base {
    /// Loads what the plan names, onto the device that was taken, and what the models are compared on. What kept statistics are
    /// of is checked; where they stand in for the calibration data, values are what they were seen to be there.
    ///
    /// # Errors
    /// Where model or data cannot be read or do not fit each other, and where there is nothing to quantize.
    pub(super) fn load_to_compare(
        plan: &Plan,
        taken: Taken,
        (calibration, kept): (Calibration, Option<&Kept>),
    ) -> Result<(Self, Comparison), Error> {
        let comparison = Comparison::open(plan, &calibration)?;
        let base = if calibration.is_open() && kept.is_none() {
            Self::load(plan, taken, calibration)?
        } else {
            let model_hash = hash::of_path(&plan.model)?;
            let mut model = load_checked(plan, (comparison.dataset(), comparison.section()), taken.device)?;
            if let Some(kept) = kept {
                kept.check(plan, &versions(), &model_hash)?;
                model.see_as(&kept.seen)?;
            }
            Self::new(plan, taken, calibration, (model, model_hash))?
        };
        comparison.check(&base.model).map_err(comparison.batches().blame())?;
        Ok((base, comparison))
    }

    /// Loads what calibration needs of what the plan names, onto the device that was taken.
    ///
    /// # Errors
    /// As of [`load_to_compare`](Self::load_to_compare).
    pub(super) fn load(plan: &Plan, taken: Taken, calibration: Calibration) -> Result<Self, Error> {
        let model_hash = hash::of_path(&plan.model)?;
        let model = load_checked(plan, (calibration.data()?, "calibration"), taken.device)?;
        Self::new(plan, taken, calibration, (model, model_hash))
    }

    fn new(
        plan: &Plan,
        taken: Taken,
        calibration: Calibration,
        (model, model_hash): (Clean, String),
    ) -> Result<Self, Error> {
        let sites = sites::find_for(model.listing(), kernels::of(plan));
        if sites.weights.is_empty() && sites.activations.is_empty() {
            return Err(Error::NoSites { model: plan.model.clone() });
        }
        Ok(Self { taken, model_hash, versions: versions(), calibration, model, sites })
    }

    /// The name of the device.
    pub(super) fn device(&self) -> String {
        self.taken.name()
    }

    /// The hashes of a run.
    ///
    /// # Errors
    /// Where the plan cannot be written.
    pub(super) fn hashes(&self, plan: &Plan, comparison: &Comparison) -> Result<report::Hashes, Error> {
        Ok(report::Hashes {
            model: self.model_hash.clone(),
            calibration: self.calibration.hash.clone(),
            evaluation: comparison.hash().map(str::to_owned),
            plan: hash::of_plan(plan)?,
        })
    }

    /// Runs these batches of the calibration data. `advance` is called with the rows of each finished batch.
    ///
    /// # Errors
    /// Where the model fails, or NaN or infinity turns up at a site.
    pub(super) fn observe(
        &self,
        plan: &Plan,
        batches: Batches<'_>,
        (targets, sites): (Targets, &Sites),
        advance: impl FnMut(usize),
    ) -> Result<Observed, Error> {
        let mut inputs = InputSums::new(&targets);
        let statistics = observe(&self.model, &sites.activations, &mut inputs, batches, advance)
            .map_err(calibration_batches(plan).blame())?;
        Ok(Observed { statistics, targets, inputs })
    }

    /// What calibration would have observed of these sites.
    pub(super) fn observed_in(&self, kept: &Kept, plan: &Plan, sites: &Sites) -> Result<Observed, Error> {
        let statistics = kept.statistics_of(sites)?;
        let targets = self.targets(plan.weights.bias_correction, sites);
        let (all, inputs) = self.inputs_in(kept)?;
        let inputs = inputs.for_some(&all, &targets);
        Ok(Observed { statistics, targets, inputs })
    }

    /// The sums of all ops as they were summed up.
    fn inputs_in(&self, kept: &Kept) -> Result<(Targets, InputSums), Error> {
        let names: HashMap<&str, &Vec<Activation>> =
            kept.sites.iter().map(|(name, anchors)| (name.as_str(), anchors)).collect();
        let mut sites = self.sites.clone();
        sites.activations.retain(|site| names.contains_key(site.name.as_str()));
        let targets = Targets::find(self.model.listing(), &sites);
        let inputs = InputSums::of_layers(&targets, &kept.inputs)?;
        let inputs =
            inputs.ok_or_else(|| kept.damaged("its sums are of other layers than the model has".to_owned()))?;
        let own = sites.activations.iter().map(|site| names.get(site.name.as_str()).copied().cloned());
        let statistics: Vec<Vec<Activation>> = own.map(Option::unwrap_or_default).collect();
        let inputs = inputs.with_statistics(&targets, &statistics)?;
        Ok((targets, inputs))
    }

    /// What the statistics of a plan are of.
    ///
    /// # Errors
    /// Where the plan cannot be written.
    pub(super) fn key(&self, plan: &Plan) -> Result<Key, Error> {
        // Of several GPUs of one kind it does not matter which.
        let device = if self.device() == "cpu" { "cpu" } else { "cuda" };
        Ok(Key {
            versions: self.versions.clone(),
            device: device.to_owned(),
            // On the processor TF32 is never used.
            allow_tf32: plan.allow_tf32 && device != "cpu",
            kernels: kernels::name(plan).to_owned(),
            model: self.model_hash.clone(),
            data: self.calibration.hash.clone(),
            calibration: section(&plan.calibration)?,
        })
    }

    /// The ops whose biases are to be corrected, as planned.
    pub(super) fn targets(&self, correction: BiasCorrection, sites: &Sites) -> Targets {
        match correction {
            BiasCorrection::None => Targets::default(),
            BiasCorrection::ClosedForm | BiasCorrection::Weighted => Targets::find(self.model.listing(), sites),
        }
    }
}
