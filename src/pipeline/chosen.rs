//! What was chosen for one plan: quantizers for all sites and biases, and what can be made of them: a simulation, a file.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::base::{Base, Observed};
use super::refine::GivenUp;
use super::score::SiteScores;
use super::select::{self, Given, Selections};
use super::simulation::Simulation;
use super::{Error, Progress, Work, device, int8, refine, worst};
use crate::config::{Plan, ReduceRange};
use crate::correct::{self, Corrections};
use crate::emit::{self, Emission};
use crate::lower::{self, Lowering};
use crate::report::{self, Hashes, Kind, SiteReport, Thresholds, WorstSite};
use crate::settings::Settings;
use crate::sites::{LeftFloat, Sites};

/// What was chosen.
pub(super) struct Chosen {
    /// Without those that never ran.
    pub(super) sites: Sites,
    pub(super) selections: Selections,
    pub(super) corrections: Corrections,
    pub(super) worst_sites: Vec<WorstSite>,
    /// Weights that are rounded to nearest though more was asked for.
    pub(super) not_rounded: Vec<LeftFloat>,
    /// Set where rounding and bias correction op by op were given up.
    pub(super) given_up: Option<GivenUp>,
    /// Seconds that rounding and bias correction op by op took.
    pub(super) correct: f64,
}

/// What goes into the emitted archive beside the model.
#[derive(Serialize)]
struct Description<'a> {
    schema: u32,
    versions: &'a report::Versions,
    hashes: &'a Hashes,
    seed: u64,
    sites: &'a [SiteReport],
    left_float: &'a [LeftFloat],
}

impl Chosen {
    /// Chooses for these sites, which `observed` and `scores` are of. `advance` is called with 1 for each.
    ///
    /// # Errors
    /// Where a threshold cannot be chosen.
    pub(super) fn new(
        base: &Base,
        plan: &Plan,
        (mut sites, settings): (Sites, &Settings),
        observed: Observed,
        scores: &SiteScores<'_>,
        progress: &mut dyn Progress,
    ) -> Result<Self, Error> {
        let Base { model, calibration, .. } = base;
        let Observed { statistics, targets, inputs } = observed;
        let given = Given { settings, statistics: &statistics, scores };
        progress.stage("search", Work::Sites(sites.weights.len() + sites.activations.len()));
        let mut selections = select::select(given, model, &mut sites, |count| progress.advance(count))?;
        int8::leave_float_outputs(plan, base, (&mut sites, &mut selections))?;
        let rows = worst::Rows { seen: calibration.rows, stored: calibration.stored_rows };
        let kernels = int8::settled(plan)?.output.int8.map(|int8| {
            let is_reduced = int8.reduce_range == ReduceRange::Always;
            worst::KernelBits { activations: if is_reduced { 7 } else { 8 } }
        });
        let worst_sites = worst::worst(model, &sites, &statistics, &selections.reports, (rows, kernels))?;
        let seen = correct::Seen { inputs, statistics: &statistics };
        let known = correct::closed_form(model, &sites, &selections.weights, &targets, seen)?;
        let (corrections, not_rounded) = (Corrections::default(), Vec::new());
        let mut chosen =
            Self { sites, selections, corrections, worst_sites, not_rounded, given_up: None, correct: 0.0 };
        if refine::asked(plan).is_in_sequence() {
            let start = Instant::now();
            refine::refine(base, plan, (&mut chosen, settings), known, progress)?;
            chosen.correct = start.elapsed().as_secs_f64();
        } else {
            chosen.corrections = known;
        }
        Ok(chosen)
    }

    /// Writes the model file in fake-quantize form.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(super) fn emit(&self, base: &Base, plan: &Plan, hashes: &Hashes, file: &Path) -> Result<(), Error> {
        let emission = self.emission_of(&self.selections.reports, base, plan, hashes)?;
        Ok(emit::fake_quant(&base.model, &emission, file)?)
    }

    /// What a model file is made of that holds the levels and scales of its weights.
    ///
    /// # Errors
    /// None that a plan can cause.
    pub(super) fn emission_in_levels(&self, base: &Base, plan: &Plan, hashes: &Hashes) -> Result<Emission<'_>, Error> {
        let reports: Vec<_> = self.selections.reports.iter().map(without_scales).collect();
        self.emission_of(&reports, base, plan, hashes)
    }

    /// With a table of these sites.
    fn emission_of(
        &self,
        reports: &[SiteReport],
        base: &Base,
        plan: &Plan,
        hashes: &Hashes,
    ) -> Result<Emission<'_>, Error> {
        let description = serde_json::to_string(&Description {
            schema: report::SCHEMA,
            versions: &base.versions,
            hashes,
            seed: plan.seed,
            sites: reports,
            left_float: &self.sites.left_float,
        })?;
        Ok(Emission {
            sites: &self.sites,
            activations: &self.selections.activations,
            weights: &self.selections.weights,
            biases: &self.corrections.biases,
            description,
        })
    }

    /// Writes the model file in float with weights in few bits, and gives its simulation.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(super) fn emit_weights(
        &self,
        base: &Base,
        plan: &Plan,
        hashes: &Hashes,
        file: &Path,
    ) -> Result<Simulation, Error> {
        let reports: Vec<_> =
            self.selections.reports.iter().filter(|site| site.kind == Kind::Weight).cloned().collect();
        let none = vec![None; self.sites.activations.len()];
        let emission = Emission { activations: &none, ..self.emission_of(&reports, base, plan, hashes)? };
        let given = lower::Given::new(&emission, &reports, None);
        Lowering::of_weights(&base.model, &given, &emission)?.emit(&base.model, (&given, &emission), file)?;
        Simulation::of_weights(&base.model, &self.sites, &self.selections, &self.corrections)
            .map_err(device::blame_weights)
    }

    /// The quantized model as it would be emitted.
    ///
    /// # Errors
    /// Where libtorch refuses it.
    pub(super) fn simulation(&self, base: &Base) -> Result<Simulation, Error> {
        Simulation::new(&base.model, &self.sites, &self.selections, &self.corrections).map_err(device::blame_weights)
    }
}

/// A site as the table of a file has it whose weights are levels and scales: as text these would be as large as the weights.
fn without_scales(site: &SiteReport) -> SiteReport {
    let mut site = site.clone();
    if site.kind == Kind::Weight {
        site.quantizers.thresholds = Thresholds::Threshold(Vec::new());
        site.quantizers.scale.clear();
        site.quantizers.zero_point.clear();
    }
    site
}
