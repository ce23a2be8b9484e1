//! Calibration: runs the model over a data set and sums up every activation site while it runs.
//!
//! A value is read in the tap and freed with the model's own memory; nothing is kept but statistics. It does not know what
//! the statistics are for.

use tch::Tensor;

use crate::dataset::{self, Dataset};
use crate::feed;
use crate::jit::{self, BoxError, Clean, Tap, Visit};
use crate::sites::ActivationSite;
use crate::statistics::{MinMax, NotFinite};

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
/// that never was there has a count of 0. `advance` is called with the rows of each finished batch.
///
/// # Errors
/// Where the data cannot be read, the model fails, or NaN or infinity turns up at a site.
pub fn observe(
    model: &Clean,
    sites: &[ActivationSite],
    data: &Dataset,
    mut advance: impl FnMut(usize),
) -> Result<Vec<Vec<MinMax>>, Error> {
    let places: Vec<_> = sites.iter().flat_map(|site| site.anchors.iter().map(move |anchor| (site, anchor))).collect();
    let numbered = places.iter().enumerate();
    let taps: Vec<_> =
        numbered.map(|(number, (_, anchor))| Tap { value: anchor.value, number, substitutes: false }).collect();
    let instrumented = model.instrument(&taps, &[])?;
    let mut observer = Observer {
        names: places.iter().map(|(site, _)| site.name.as_str()).collect(),
        statistics: vec![MinMax::new(); places.len()],
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
    names: Vec<&'a str>,
    statistics: Vec<MinMax>,
}

impl Visit for Observer<'_> {
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        let (Some(&site), Some(min_max)) = (self.names.get(tap), self.statistics.get_mut(tap)) else {
            return Err(format!("tap {tap} belongs to no site").into());
        };
        jit::with_values(value, |values| min_max.observe(values))
            .map_err(|error| SiteError::Tensor { site: site.to_owned(), message: error.to_string() })?;
        min_max.observed().map_err(|found| SiteError::NotFinite { site: site.to_owned(), found })?;
        Ok(())
    }
}
