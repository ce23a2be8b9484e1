//! The calibration data of a run, opened when it is first needed: kept statistics stand in for it.

use std::cell::OnceCell;
use std::rc::Rc;

use super::{Error, blame, hash};
use crate::config::DataPlan;
use crate::dataset::Dataset;

/// The data and how much of it there is.
pub(super) struct Calibration {
    plan: DataPlan,
    opened: OnceCell<Rc<Dataset>>,
    /// SHA-256 of the data.
    pub(super) hash: String,
    /// Rows that are run.
    pub(super) rows: usize,
    /// Rows that the data has.
    pub(super) stored_rows: usize,
}

impl Calibration {
    /// Opens the data.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(super) fn open(plan: &DataPlan) -> Result<Self, Error> {
        let hash = hash::of_path(&plan.path)?;
        let data = blame::open(plan, "calibration")?;
        let (rows, stored_rows) = (data.rows(), data.stored_rows());
        Ok(Self { plan: plan.clone(), opened: OnceCell::from(Rc::new(data)), hash, rows, stored_rows })
    }

    /// The data that statistics were kept of, of which no more than this is known.
    pub(super) fn kept(plan: &DataPlan, hash: String, [rows, stored_rows]: [usize; 2]) -> Self {
        Self { plan: plan.clone(), opened: OnceCell::new(), hash, rows, stored_rows }
    }

    /// The data itself.
    ///
    /// # Errors
    /// Where it cannot be read, or is not what statistics were kept of.
    pub(super) fn data(&self) -> Result<&Rc<Dataset>, Error> {
        if let Some(data) = self.opened.get() {
            return Ok(data);
        }
        let found = hash::of_path(&self.plan.path)?;
        if found != self.hash {
            return Err(Error::OtherData { path: self.plan.path.clone(), expected: self.hash.clone(), found });
        }
        let data = blame::open(&self.plan, "calibration")?;
        Ok(self.opened.get_or_init(|| Rc::new(data)))
    }

    /// Whether the data was read.
    pub(super) fn is_open(&self) -> bool {
        self.opened.get().is_some()
    }
}
