//! `hessian`: how Hessian scores are computed, as typed, checked, and written for a plan. It refuses to know what scores are
//! used for.

use std::num::NonZeroUsize;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::keys::Count;
use super::plan::{Distribution, HessianPlan, HessianRequest};

/// Defaults, chosen by measurement: docs/error-methods.md has the numbers.
const SAMPLES: usize = 64;
const PROBES: usize = 4;
const BATCH_SIZE: usize = 8;

/// The most probes that may be asked for, and that a tolerance may take.
pub const MOST_PROBES: usize = 4096;

/// How the Hessian scores of HMSE are computed.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct HessianKeys {
    /// Calibration rows to use, drawn by seed; all if there are no more.
    pub(super) samples: Option<Count>,
    /// Random directions for each row.
    pub(super) probes: Option<Count>,
    /// Rows in a batch.
    pub(super) batch_size: Option<Count>,
    /// How directions are drawn.
    pub(super) distribution: Option<Distribution>,
    /// Add directions until the relative standard error of each layer's scores is at most this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tolerance: Option<Tolerance>,
    /// Quantize a layer without usable scores with MSE instead of stopping.
    pub(super) allow_fallback: Option<bool>,
    /// Keep the scores in the run directory, and use those that are there.
    pub(super) save: Option<bool>,
    /// Seed of rows and directions; that of the experiment unless given.
    pub(super) seed: Option<u64>,
}

/// A relative error, above 0 and at most 1.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(try_from = "f64")]
pub(super) struct Tolerance(pub(super) f64);

impl TryFrom<f64> for Tolerance {
    type Error = String;

    fn try_from(number: f64) -> Result<Self, String> {
        if number > 0.0 && number <= 1.0 {
            return Ok(Self(number));
        }
        Err(format!("expected a relative error above 0 and at most 1, found {number:?}"))
    }
}

impl HessianPlan {
    /// What is done where nothing is said, with this seed.
    #[must_use]
    pub fn with_seed(seed: u64) -> Self {
        let count = |number| NonZeroUsize::new(number).unwrap_or(NonZeroUsize::MIN);
        let request = HessianRequest {
            samples: count(SAMPLES),
            probes: count(PROBES),
            batch_size: count(BATCH_SIZE),
            distribution: Distribution::Rademacher,
            tolerance: None,
            seed,
        };
        Self { request, allow_fallback: false, save: false }
    }
}

/// The plan of `keys` in an experiment with this seed, with `fallback` where they do not say whether layers may do without scores.
///
/// # Errors
/// The key that is wrong, below `hessian`, and why.
pub(super) fn resolve(keys: &HessianKeys, seed: u64, fallback: bool) -> Result<HessianPlan, (&'static str, String)> {
    let HessianPlan { request, save, .. } = HessianPlan::with_seed(keys.seed.unwrap_or(seed));
    let count = |typed: Option<Count>, default| typed.map_or(default, |Count(count)| count);
    let request = HessianRequest {
        samples: count(keys.samples, request.samples),
        probes: count(keys.probes, request.probes),
        batch_size: count(keys.batch_size, request.batch_size),
        distribution: keys.distribution.unwrap_or(request.distribution),
        tolerance: keys.tolerance.map(|Tolerance(tolerance)| tolerance),
        ..request
    };
    let probes = request.probes.get();
    if probes > MOST_PROBES {
        return Err(("probes", format!("expected from 1 to {MOST_PROBES} probes, found {probes}")));
    }
    if probes < 2 && request.tolerance.is_some() {
        let reason = "expected at least 2 probes, as `tolerance` is about how much they differ, found 1".to_owned();
        return Err(("probes", reason));
    }
    let allow_fallback = keys.allow_fallback.unwrap_or(fallback);
    Ok(HessianPlan { request, allow_fallback, save: keys.save.unwrap_or(save) })
}

impl From<&HessianPlan> for HessianKeys {
    fn from(plan: &HessianPlan) -> Self {
        let request = &plan.request;
        Self {
            samples: Some(Count(request.samples)),
            probes: Some(Count(request.probes)),
            batch_size: Some(Count(request.batch_size)),
            distribution: Some(request.distribution),
            tolerance: request.tolerance.map(Tolerance),
            allow_fallback: Some(plan.allow_fallback),
            save: Some(plan.save),
            seed: Some(request.seed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::decode::decode;
    use super::super::document::Node;
    use super::super::error::Origin;
    use super::*;

    fn plan(yaml: &str) -> HessianPlan {
        let node = Node::parse(yaml, &Origin::Flag("here".to_owned()).into()).unwrap();
        resolve(&decode::<HessianKeys>(&node).unwrap(), 9, false).unwrap()
    }

    #[test]
    fn fills_every_default() {
        let plan = plan("{}");
        assert_eq!(plan, HessianPlan::with_seed(9));
        let HessianRequest { samples, probes, batch_size, distribution, tolerance, seed } = plan.request;
        assert_eq!((samples.get(), probes.get(), batch_size.get()), (SAMPLES, PROBES, BATCH_SIZE));
        assert_eq!((distribution, tolerance, seed), (Distribution::Rademacher, None, 9));
        assert!(!plan.allow_fallback && !plan.save);
    }

    #[test]
    fn what_is_written_is_read_again() {
        let every = "{samples: 7, probes: 5, batch_size: 3, distribution: normal, tolerance: 0.125, allow_fallback: true, \
                     save: true, seed: 18446744073709551615}";
        for typed in ["{}", every, "{probes: 4096}", "{tolerance: 1}"] {
            let typed = plan(typed);
            let written = serde_yaml::to_string(&HessianKeys::from(&typed)).unwrap();
            assert_eq!(plan(&written), typed, "{written}");
        }
    }
}
