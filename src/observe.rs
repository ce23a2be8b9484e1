//! Calibration: runs the model over a data set and sums up every activation site while it runs.
//!
//! A value is read in the tap and freed with the model's own memory; nothing is kept but statistics. It does not know what
//! the statistics are for. What the ops with weights read is handed on to be summed up on the same way.

use tch::Tensor;

use crate::correct::InputSums;
use crate::dataset::{self, Dataset};
use crate::feed;
use crate::jit::{self, BoxError, Clean, Dense, Tap, TapKind, Visit};
use crate::sites::{ActivationSite, ChannelAxis};
use crate::statistics::{Activation, ChannelLayout, Counter, NotFinite};

/// Counters beyond these gain little: the statistics of a batch are a small part of its forward.
const MOST_COUNTERS: usize = 8;

/// Why calibration fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The data.
    #[error(transparent)]
    Dataset(#[from] dataset::Error),
    /// The model.
    #[error(transparent)]
    Jit(#[from] jit::Error),
}

/// NaN or infinity where a quantizer has to go, or a tensor of another dtype.
#[derive(Debug, thiserror::Error)]
enum SiteError {
    #[error("activation site {site}: {found}")]
    NotFinite { site: String, found: NotFinite },
    #[error("activation site {site}: {message}")]
    Tensor { site: String, message: String },
}

/// Runs all batches and returns the statistics of each site's values, in the order of `sites` and of their anchors; a value
/// that never was there has a count of 0. What ops read goes to `inputs`. `advance` is called with the rows of each finished
/// batch.
///
/// # Errors
/// Where the data cannot be read, the model fails, or NaN or infinity turns up at a site.
pub fn observe(
    model: &Clean,
    sites: &[ActivationSite],
    inputs: &mut InputSums,
    data: &Dataset,
    mut advance: impl FnMut(usize),
) -> Result<Vec<Vec<Activation>>, Error> {
    let places: Vec<_> = sites.iter().flat_map(|site| site.anchors.iter().map(move |anchor| (site, anchor))).collect();
    let numbered = places.iter().enumerate();
    let taps = numbered.map(|(number, (_, anchor))| Tap { value: anchor.value, number, kind: TapKind::Observe });
    let of_inputs = inputs.taps().iter().map(|tap| Tap { number: places.len() + tap.number, ..*tap });
    let taps: Vec<_> = taps.chain(of_inputs).collect();
    let instrumented = model.instrument(&taps, &[])?;
    let mut observer = Observer {
        sites: places.iter().map(|(site, _)| *site).collect(),
        statistics: vec![Activation::new(); places.len()],
        counters: (0..jit::thread_count().min(MOST_COUNTERS)).map(|_| Counter::new()).collect(),
        inputs,
    };
    for batch in data.batches() {
        let batch = batch?;
        let rows = batch.rows;
        instrumented.run(&feed::bind(model.module(), batch)?, &mut observer)?;
        advance(rows);
    }
    let mut statistics = observer.statistics.into_iter();
    Ok(sites.iter().map(|site| statistics.by_ref().take(site.anchors.len()).collect()).collect())
}

struct Observer<'a> {
    /// The site of each tap.
    sites: Vec<&'a ActivationSite>,
    statistics: Vec<Activation>,
    /// One for each thread.
    counters: Vec<Counter>,
    /// Their taps follow those of the sites.
    inputs: &'a mut InputSums,
}

impl Visit for Observer<'_> {
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        let (Some(&site), Some(activation)) = (self.sites.get(tap), self.statistics.get_mut(tap)) else {
            return self.inputs.add(tap - self.sites.len(), value);
        };
        let failed = |error: jit::Error| SiteError::Tensor { site: site.name.clone(), message: error.to_string() };
        let counters = &mut self.counters;
        let observe = |dense: Dense<'_>| {
            let mut outcome = Ok(());
            let layout = channel_layout(&dense, site.channel_axis);
            activation.observe(dense.values, layout, counters, |parts, work| {
                outcome = jit::in_parallel(parts, work);
            });
            outcome
        };
        jit::with_dense(value, observe).map_err(failed)?.map_err(failed)?;
        activation.observed().map_err(|found| SiteError::NotFinite { site: site.name.clone(), found })?;
        Ok(())
    }
}

/// How the channels of a tensor without gaps lie in memory.
fn channel_layout(dense: &Dense<'_>, axis: ChannelAxis) -> ChannelLayout {
    if dense.sizes.len() < 2 {
        return ChannelLayout { count: 1, run_length: dense.values.len() };
    }
    let last = dense.sizes.len() - 1;
    let axis = if axis == ChannelAxis::Second { last.min(1) } else { last };
    let count = dense.sizes.get(axis).map_or(1, |&size| usize::try_from(size).unwrap_or_default());
    // The stride of an axis with one place says nothing.
    let run_length = match dense.strides.get(axis) {
        Some(&stride) if count > 1 => usize::try_from(stride).unwrap_or_default(),
        _ => dense.values.len(),
    };
    ChannelLayout { count, run_length }
}
