//! What runs of one model and one set of calibration data share: the model, its sites, the data, and what was seen of them. It
//! refuses to know thresholds.

use super::device::Taken;
use super::{Error, blame, calibration_batches, compare, hash, load_clean, versions};
use crate::config::{BiasCorrection, Plan};
use crate::correct::{InputSums, Targets};
use crate::dataset::Dataset;
use crate::jit::Clean;
use crate::observe::observe;
use crate::report;
use crate::sites::{self, Sites};
use crate::statistics::Activation;

/// A loaded model with its data.
pub(super) struct Base {
    pub(super) taken: Taken,
    pub(super) hashes: hash::OfFiles,
    pub(super) versions: report::Versions,
    pub(super) calibration: Dataset,
    pub(super) comparison: compare::Data,
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
    /// Loads what the plan names, onto the device that was taken.
    ///
    /// # Errors
    /// Where model or data cannot be read or do not fit each other, and where there is nothing to quantize.
    pub(super) fn load(plan: &Plan, taken: Taken) -> Result<Self, Error> {
        let hashes = hash::of_files(plan)?;
        let calibration = blame::open(&plan.calibration, "calibration")?;
        let comparison = compare::Data::open(plan)?;
        let model = load_clean(plan, &calibration, taken.device)?;
        let sites = sites::find(model.listing());
        if sites.weights.is_empty() && sites.activations.is_empty() {
            return Err(Error::NoSites { model: plan.model.clone() });
        }
        comparison.check(&model, &calibration).map_err(comparison.batches().blame())?;
        Ok(Self { taken, hashes, versions: versions(), calibration, comparison, model, sites })
    }

    /// The name of the device.
    pub(super) fn device(&self) -> String {
        self.taken.name()
    }

    /// The hashes of a run.
    ///
    /// # Errors
    /// Where the plan cannot be written.
    pub(super) fn hashes_of(&self, plan: &Plan) -> Result<report::Hashes, Error> {
        let hash::OfFiles { model, calibration, evaluation } = self.hashes.clone();
        Ok(report::Hashes { model, calibration, evaluation, plan: hash::of_plan(plan)? })
    }

    /// Runs the calibration data. `advance` is called with the rows of each finished batch.
    ///
    /// # Errors
    /// Where the model fails, or NaN or infinity turns up at a site.
    pub(super) fn observe(
        &self,
        plan: &Plan,
        targets: Targets,
        sites: &Sites,
        advance: impl FnMut(usize),
    ) -> Result<Observed, Error> {
        let mut inputs = InputSums::new(&targets);
        let statistics = observe(&self.model, &sites.activations, &mut inputs, &self.calibration, advance)
            .map_err(calibration_batches(plan).blame())?;
        Ok(Observed { statistics, targets, inputs })
    }

    /// The ops whose biases are to be corrected, as planned.
    pub(super) fn targets(&self, correction: BiasCorrection, sites: &Sites) -> Targets {
        match correction {
            BiasCorrection::None => Targets::default(),
            BiasCorrection::ClosedForm => Targets::find(self.model.listing(), sites),
        }
    }
}
