//! The measurements of `benches/gpu`, on any device.

use std::num::NonZeroUsize;
use std::time::Instant;

use anyhow::Result;
use tch::Device;
use tsquant::config::{HessianPlan, HessianRequest, Plan};
use tsquant::correct::InputSums;
use tsquant::dataset::{Dataset, Shard};
use tsquant::hessian::{self, Layers};
use tsquant::jit::Clean;
use tsquant::observe::{Summing, observe_by};
use tsquant::{feed, jit, pipeline, sites};

use super::way_back;

/// Seconds, the best of all rounds, and bytes.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) device: String,
    pub(crate) rows: usize,
    pub(crate) sites: usize,
    pub(crate) forward: f64,
    pub(crate) calibration: f64,
    pub(crate) backward: f64,
    pub(crate) hessian: f64,
    pub(crate) forward_bytes: Option<u64>,
    pub(crate) calibration_bytes: Option<u64>,
    pub(crate) hessian_bytes: Option<u64>,
}

pub(crate) fn measure(plan: &Plan, device: Device, rounds: usize) -> Result<Measured> {
    measure_by(Summing::on(device), plan, device, rounds)
}

/// The same with statistics computed as asked.
pub(crate) fn measure_by(summing: Summing, plan: &Plan, device: Device, rounds: usize) -> Result<Measured> {
    let data = Dataset::open(&plan.calibration)?;
    let clean = pipeline::load_clean(plan, &data, device)?;
    let sites = sites::find(clean.listing());
    let weights: Vec<_> = sites.weights.iter().collect();
    let activations: Vec<_> = sites.activations.iter().collect();
    let lifted: Vec<_> = weights.iter().flat_map(|site| site.values.iter().copied()).collect();
    let graph = clean.differentiable(&[], &lifted)?.as_given();
    let rows = NonZeroUsize::new(data.rows()).unwrap_or(NonZeroUsize::MIN);
    let (samples, batch_size) = (rows, data.batch_size());
    let request =
        HessianRequest { samples, batch_size, probes: NonZeroUsize::MIN, ..HessianPlan::with_seed(0).request };
    let ranges = vec![Some(-4.0..=4.0f32); activations.len()];
    let layers = Layers { weights: &weights, activations: &activations, ranges: &ranges };
    let timed = |run: &dyn Fn() -> Result<()>| -> Result<(f64, Option<u64>)> {
        // Warm: libtorch optimizes in the first runs. What was the peak before counts no more.
        run()?;
        run()?;
        jit::peak_device_memory(device)?;
        let mut best = f64::INFINITY;
        for _ in 0..rounds {
            jit::synchronize(device)?;
            let start = Instant::now();
            run()?;
            jit::synchronize(device)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok((best, jit::peak_device_memory(device)?))
    };
    let (forward, forward_bytes) = timed(&|| plain(&clean, &data))?;
    let (calibration, calibration_bytes) = timed(&|| {
        Ok(observe_by(summing, &clean, &sites.activations, &mut InputSums::default(), data.batches(), |_| ())
            .map(drop)?)
    })?;
    let (backward, _) = timed(&|| way_back::plain(&clean, &graph, &data, &request))?;
    let (hessian, hessian_bytes) =
        timed(&|| Ok(hessian::score_by(summing, &clean, layers, (&data, Shard::WHOLE), &request, |_| ()).map(drop)?))?;
    Ok(Measured {
        device: jit::device_name(device),
        rows: data.rows(),
        sites: activations.len(),
        forward,
        calibration,
        backward,
        hessian,
        forward_bytes,
        calibration_bytes,
        hessian_bytes,
    })
}

/// The batches through the model as it is.
fn plain(clean: &Clean, data: &Dataset) -> Result<()> {
    for batch in data.batches() {
        clean.module().forward(&feed::bind(clean.module(), batch?)?)?;
    }
    Ok(())
}
