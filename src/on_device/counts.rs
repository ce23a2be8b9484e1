//! Counts, extremes and sums of the values of one site, on the device where the values are.

use tch::{Kind, Tensor};

use super::bits::{Bits, nearest};
use super::{PIECE, Shared, read};
use crate::jit::{self, Error};
use crate::statistics::{Activation, ChannelLayout, Counted, Layout};

/// All that calibration keeps of one activation, as tables on a device.
#[derive(Debug, Default)]
pub struct Counts {
    tables: Option<Tables>,
    /// What earlier tables held.
    drained: Activation,
}

/// Tables for one number of channels.
#[derive(Debug)]
struct Tables {
    channels: i64,
    /// How many values are in them.
    held: i64,
    bins: Tensor,
    infinities: Tensor,
    /// Keys of the values nearest to zero, positive and negative.
    nearest: [Tensor; 2],
    finite: Tensor,
    lows: Tensor,
    highs: Tensor,
    sums: Tensor,
}

impl Counts {
    /// Adds the values of a tensor of rank 1, as [`Activation::observe`] does.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn observe(&mut self, values: &Tensor, layout: ChannelLayout, shared: &Shared) -> Result<(), Error> {
        if values.numel() == 0 {
            return Ok(());
        }
        let row = layout.count.saturating_mul(layout.run_length);
        let is_whole = row > 0 && values.numel().is_multiple_of(row);
        let whole = ChannelLayout { count: 1, run_length: values.numel() };
        let layout = if is_whole { layout } else { whole };
        let [channels, run] = [layout.count, layout.run_length].map(|size| i64::try_from(size).unwrap_or(i64::MAX));
        let values = values.f_reshape([-1, channels, run])?;
        jit::in_any_order(|| pieces(&values, |piece, first| self.add(piece, first, channels, shared)))
    }

    fn add(&mut self, piece: &Tensor, first: i64, channels: i64, shared: &Shared) -> Result<(), Error> {
        let count = piece.size().iter().product::<i64>();
        let fits = |tables: &Tables| {
            tables.channels == channels && tables.held + count <= i64::try_from(Layout::MOST_VALUES).unwrap_or(i64::MAX)
        };
        if !self.tables.as_ref().is_some_and(fits) {
            self.drain()?;
            self.tables = Some(Tables::new(channels, shared)?);
        }
        self.tables.as_mut().map_or(Ok(()), |tables| tables.add(piece, first, shared))
    }

    /// What there is so far.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn read(&mut self) -> Result<&Activation, Error> {
        self.drain()?;
        Ok(&self.drained)
    }

    fn drain(&mut self) -> Result<(), Error> {
        if let Some(tables) = self.tables.take() {
            self.drained.merge(&tables.read()?);
        }
        Ok(())
    }
}

impl Tables {
    fn new(channels: i64, shared: &Shared) -> Result<Self, Error> {
        let device = shared.device;
        let of_channels = |value: f64| Tensor::f_full([channels], value, (Kind::Float, device));
        let no_key = || Tensor::f_full([1i64; 0], i64::from(i32::MAX), (Kind::Int, device));
        Ok(Self {
            channels,
            held: 0,
            bins: Tensor::f_zeros([Layout::BINS as i64], (Kind::Int, device))?,
            infinities: Tensor::f_zeros([1i64; 0], (Kind::Int64, device))?,
            nearest: [no_key()?, no_key()?],
            finite: Tensor::f_zeros([channels], (Kind::Int64, device))?,
            lows: of_channels(f64::INFINITY)?,
            highs: of_channels(f64::NEG_INFINITY)?,
            sums: Tensor::f_zeros([channels * Layout::EXPONENTS as i64], (Kind::Double, device))?,
        })
    }

    /// Adds values of shape (rows, some channels from `first` on, run).
    fn add(&mut self, values: &Tensor, first: i64, shared: &Shared) -> Result<(), Error> {
        let some = values.size().get(1).copied().unwrap_or_default();
        let count = values.size().iter().product::<i64>();
        let bits = Bits::of(values)?;
        let rows_and_run = &[0i64, 2][..];

        let are_finite = bits.are_finite()?;
        let mut finite = self.finite.f_narrow(0, first, some)?;
        let _ = finite.f_add_(&are_finite.f_sum_dim_intlist(rows_and_run, false, Kind::Int64)?)?;
        let lows = values.f_where_scalarother(&are_finite, f64::INFINITY)?.f_amin(rows_and_run, false)?;
        let mut own = self.lows.f_narrow(0, first, some)?;
        own.f_copy_(&own.f_minimum(&lows)?)?;
        let highs = values.f_where_scalarother(&are_finite, f64::NEG_INFINITY)?.f_amax(rows_and_run, false)?;
        let mut own = self.highs.f_narrow(0, first, some)?;
        own.f_copy_(&own.f_maximum(&highs)?)?;

        for (own, key) in self.nearest.iter_mut().zip(bits.nearest_keys()?) {
            *own = own.f_minimum(&key)?;
        }
        let _ = self.infinities.f_add_(&bits.infinities()?)?;
        let _ = self.bins.f_index_add_(0, &bits.bins(shared)?, &shared.one.f_expand([count], false)?)?;

        let channels = Tensor::f_arange_start(first, first + some, (Kind::Int, shared.device))?;
        let starts = channels.f_mul_scalar(Layout::EXPONENTS as i64)?.f_reshape([1, -1, 1])?;
        let places = bits.exponents()?.f_add(&starts)?.f_reshape([-1])?;
        let _ = self.sums.f_index_add_(0, &places, &values.f_to_kind(Kind::Double)?.f_reshape([-1])?)?;
        self.held += count;
        Ok(())
    }

    fn read(&self) -> Result<Activation, Error> {
        let number = |tensor: &Tensor| tensor.f_int64_value(&[]);
        let [positive, negative] = [number(&self.nearest[0])?, number(&self.nearest[1])?];
        let key = |number: i64| i32::try_from(number).unwrap_or(i32::MAX);
        Ok(Activation::of_counted(&Counted {
            count: self.held.unsigned_abs(),
            infinities: number(&self.infinities)?.unsigned_abs(),
            smallest_positive: nearest(key(positive)),
            largest_negative: -nearest(key(negative)),
            bins: &read::<i32>(&self.bins)?,
            finite: &read::<i64>(&self.finite)?,
            lows: &read::<f32>(&self.lows)?,
            highs: &read::<f32>(&self.highs)?,
            sums: &read::<f64>(&self.sums)?,
        }))
    }
}

/// For each site whether all its values are finite, so that only those of one number come from the device.
///
/// # Errors
/// Where libtorch fails.
pub fn are_finite(sites: &[Counts]) -> Result<Vec<bool>, Error> {
    let tables = sites.iter().filter_map(|counts| counts.tables.as_ref());
    let finite = tables.map(|tables| tables.finite.f_sum(Kind::Int64)).collect::<Result<Vec<_>, _>>()?;
    let mut finite =
        if finite.is_empty() { Vec::new() } else { read::<i64>(&Tensor::f_stack(&finite, 0)?)? }.into_iter();
    let is_finite = |counts: &Counts| {
        let in_tables = counts.tables.as_ref().is_none_or(|tables| finite.next() == Some(tables.held));
        in_tables && counts.drained.observed().is_ok()
    };
    Ok(sites.iter().map(is_finite).collect())
}

/// Calls with parts of (rows, channels, run) of at most [`PIECE`] values and the first channel of each.
fn pieces(values: &Tensor, mut add: impl FnMut(&Tensor, i64) -> Result<(), Error>) -> Result<(), Error> {
    let &[rows, channels, run] = values.size().as_slice() else { return Ok(()) };
    let step = |others: i64, own: i64| (PIECE / others.max(1)).clamp(1, own);
    let run_step = step(1, run);
    let channel_step = step(run_step, channels);
    let row_step = step(run_step * channel_step, rows);
    let starts = |count: i64, step: i64| (0..count).step_by(usize::try_from(step).unwrap_or(1));
    for row in starts(rows, row_step) {
        let of_rows = values.f_narrow(0, row, row_step.min(rows - row))?;
        for channel in starts(channels, channel_step) {
            let of_channels = of_rows.f_narrow(1, channel, channel_step.min(channels - channel))?;
            for place in starts(run, run_step) {
                add(&of_channels.f_narrow(2, place, run_step.min(run - place))?, channel)?;
            }
        }
    }
    Ok(())
}
