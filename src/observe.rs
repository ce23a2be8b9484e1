//! Calibration: runs the model over a data set and sums up every activation site while it runs.
//!
//! A value is read in the tap and freed with the model's own memory; nothing is kept but statistics. It does not know what
//! the statistics are for. What the ops with weights read is handed on to be summed up on the same way.

use tch::{Device, Tensor};

use crate::correct::InputSums;
use crate::dataset::{self, Batches};
use crate::feed;
use crate::jit::{self, BoxError, Clean, Dense, Tap, TapKind, Visit};
use crate::on_device::{self, Counts, Shared};
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

/// How statistics are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Summing {
    /// From slices, on the processor.
    Slices,
    /// By tensor ops, on whatever device the model runs.
    TensorOps,
}

impl Summing {
    /// What suits this device.
    #[must_use]
    pub fn on(device: Device) -> Self {
        if device == Device::Cpu { Self::Slices } else { Self::TensorOps }
    }
}

/// Runs these batches and returns the statistics of each site's values, in the order of `sites` and of their anchors; a value
/// that never was there has a count of 0. What ops read goes to `inputs`. `advance` is called with the rows of each finished
/// batch.
///
/// # Errors
/// Where the data cannot be read, the model fails, or NaN or infinity turns up at a site.
pub fn observe(
    model: &Clean,
    sites: &[ActivationSite],
    inputs: &mut InputSums,
    batches: Batches<'_>,
    advance: impl FnMut(usize),
) -> Result<Vec<Vec<Activation>>, Error> {
    observe_by(Summing::on(model.module().device()), model, sites, inputs, batches, advance)
}

/// As [`observe`], with the statistics computed as asked: they are the same to the bit for the same values.
///
/// # Errors
/// As there.
pub fn observe_by(
    summing: Summing,
    model: &Clean,
    sites: &[ActivationSite],
    inputs: &mut InputSums,
    mut batches: Batches<'_>,
    mut advance: impl FnMut(usize),
) -> Result<Vec<Vec<Activation>>, Error> {
    let places: Vec<_> = sites.iter().flat_map(|site| site.anchors.iter().map(move |anchor| (site, anchor))).collect();
    let numbered = places.iter().enumerate();
    let taps = numbered.map(|(number, (_, anchor))| Tap { value: anchor.value, number, kind: TapKind::Observe });
    let of_inputs = inputs.taps().iter().map(|tap| Tap { number: places.len() + tap.number, ..*tap });
    let taps: Vec<_> = taps.chain(of_inputs).collect();
    let instrumented = model.instrument(&taps, &[])?;
    let sites_of_taps: Vec<&ActivationSite> = places.iter().map(|(site, _)| *site).collect();
    let mut observer: Box<dyn Observe> = match summing {
        Summing::Slices => Box::new(Observer::new(sites_of_taps, inputs)),
        Summing::TensorOps => Box::new(DeviceObserver::new(sites_of_taps, inputs, model.module().device())?),
    };
    let mut next = || -> Result<_, Error> {
        let Some(batch) = batches.next().transpose()? else { return Ok(None) };
        let rows = batch.rows;
        Ok(Some((feed::bind(model.module(), batch)?, rows)))
    };
    let mut current = next()?;
    while let Some((arguments, rows)) = current.take() {
        instrumented.run(&arguments, observer.visit())?;
        drop(arguments);
        // A GPU is still at work on this batch while the next one is read and on its way.
        current = next()?;
        observer.check()?;
        advance(rows);
    }
    let mut statistics = observer.finish()?.into_iter();
    Ok(sites.iter().map(|site| statistics.by_ref().take(site.anchors.len()).collect()).collect())
}

/// Looks at values and sums them up.
trait Observe {
    fn visit(&mut self) -> &mut dyn Visit;

    /// Tells of NaN and infinities where the visit could not yet.
    fn check(&mut self) -> Result<(), Error>;

    /// The statistics of each tap.
    fn finish(self: Box<Self>) -> Result<Vec<Activation>, Error>;
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

impl<'a> Observer<'a> {
    fn new(sites: Vec<&'a ActivationSite>, inputs: &'a mut InputSums) -> Self {
        let statistics = vec![Activation::new(); sites.len()];
        let counters = (0..jit::thread_count().min(MOST_COUNTERS)).map(|_| Counter::new()).collect();
        Self { sites, statistics, counters, inputs }
    }
}

impl Observe for Observer<'_> {
    fn visit(&mut self) -> &mut dyn Visit {
        self
    }

    fn check(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Vec<Activation>, Error> {
        Ok(self.statistics)
    }
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
            let layout = channel_layout(dense.sizes, dense.strides, site.channel_axis);
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

/// Sums values up where they are; a word of NaN and infinities comes after each batch.
struct DeviceObserver<'a> {
    /// The site of each tap.
    sites: Vec<&'a ActivationSite>,
    counts: Vec<Counts>,
    shared: Shared,
    /// Their taps follow those of the sites.
    inputs: &'a mut InputSums,
}

impl<'a> DeviceObserver<'a> {
    fn new(sites: Vec<&'a ActivationSite>, inputs: &'a mut InputSums, device: Device) -> Result<Self, Error> {
        let counts = sites.iter().map(|_| Counts::default()).collect();
        Ok(Self { sites, counts, shared: Shared::new(device)?, inputs })
    }
}

impl Visit for DeviceObserver<'_> {
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        let (Some(&site), Some(counts)) = (self.sites.get(tap), self.counts.get_mut(tap)) else {
            return self.inputs.add(tap - self.sites.len(), value);
        };
        let shared = &self.shared;
        let observed = jit::flat(value).and_then(|flat| {
            let layout = channel_layout(&flat.sizes, &flat.strides, site.channel_axis);
            counts.observe(&flat.values, layout, shared)
        });
        observed.map_err(|error| SiteError::Tensor { site: site.name.clone(), message: error.to_string() }.into())
    }
}

impl Observe for DeviceObserver<'_> {
    fn visit(&mut self) -> &mut dyn Visit {
        self
    }

    fn check(&mut self) -> Result<(), Error> {
        let are_finite = on_device::are_finite(&self.counts)?;
        for ((site, counts), is_finite) in self.sites.iter().zip(&mut self.counts).zip(are_finite) {
            if !is_finite {
                let observed = counts.read()?.observed();
                let failed = |found| SiteError::NotFinite { site: site.name.clone(), found };
                observed.map_err(|found| jit::Error::Visit(failed(found).into()))?;
            }
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Vec<Activation>, Error> {
        let read = self.counts.iter_mut().map(|counts| Ok(counts.read()?.clone()));
        read.collect()
    }
}

/// How the channels of a tensor without gaps lie in memory.
fn channel_layout(sizes: &[i64], strides: &[i64], axis: ChannelAxis) -> ChannelLayout {
    let length = sizes.iter().map(|&size| usize::try_from(size).unwrap_or_default()).product();
    if sizes.len() < 2 {
        return ChannelLayout { count: 1, run_length: length };
    }
    let last = sizes.len() - 1;
    let axis = if axis == ChannelAxis::Second { last.min(1) } else { last };
    let count = sizes.get(axis).map_or(1, |&size| usize::try_from(size).unwrap_or_default());
    // The stride of an axis with one place says nothing.
    let run_length = match strides.get(axis) {
        Some(&stride) if count > 1 => usize::try_from(stride).unwrap_or_default(),
        _ => length,
    };
    ChannelLayout { count, run_length }
}
