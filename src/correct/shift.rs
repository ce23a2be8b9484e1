//! What is added to the channels of an op so that its results come nearer to those of the float model, as far as the outputs
//! depend on them. Plain arithmetic on what was seen of the results; it knows no op and no model.

use tch::{Device, Kind, Tensor};

/// Of one batch, each (rows, channels, positions).
pub(super) struct Seen {
    /// What the float op gives.
    pub(super) wanted: Tensor,
    /// What there is.
    pub(super) found: Tensor,
    /// Squared gradients of the outputs, behind the clamp where there is one.
    pub(super) squares: Tensor,
}

/// Parts of the way that are tried where a clamp bends it.
const PARTS: [f64; 3] = [1.0, 0.5, 0.25];

/// λ·Σ g²·(y − y_q) / Σ g² per channel, where λ is how far what one half of the batches asks for helps on the other half; `None` for
/// nowhere. Behind a clamp with these bounds it is Newton's step of the squared errors there, and λ the best of some parts of the way.
///
/// # Errors
/// Where libtorch fails.
pub(super) fn shift(halves: &[Vec<Seen>; 2], bounds: Option<[f64; 2]>) -> Result<Option<Tensor>, tch::TchError> {
    let [Some(even), Some(odd)] = [Sums::of(&halves[0], bounds)?, Sums::of(&halves[1], bounds)?] else {
        return Ok(None);
    };
    // Along what one half asks for, the other half's Σ g²·(r − λ·b)² is least where λ is the first over the second.
    let [mut gain, mut cost] = [0.0; 2];
    let ways = [(even.step()?, &odd), (odd.step()?, &even)];
    for (step, Sums { moved, weight }) in &ways {
        gain += total(&step.f_mul(moved)?)?;
        cost += total(&step.f_square()?.f_mul(weight)?)?;
    }
    let all = even.with(&odd)?.step()?;
    if !(gain * cost).is_finite() || all.f_isfinite()?.f_all()?.f_int64_value(&[])? != 1 {
        return Ok(None);
    }
    let Some(share) = share(gain, cost) else { return Ok(None) };
    let share = match bounds {
        None => share,
        Some(bounds) => {
            let error = |share: f64| -> Result<f64, tch::TchError> {
                let [even, odd] = &ways;
                Ok(error(&halves[1], &even.0.f_mul_scalar(share)?, bounds)?
                    + error(&halves[0], &odd.0.f_mul_scalar(share)?, bounds)?)
            };
            let mut best = (error(0.0)?, 0.0);
            for part in PARTS.map(|part| part * share) {
                let error = error(part)?;
                if error < best.0 {
                    best = (error, part);
                }
            }
            best.1
        }
    };
    Ok(if share > 0.0 { Some(all.f_mul_scalar(share)?.f_to_kind(Kind::Float)?) } else { None })
}

/// How far to go; `None` for nowhere.
fn share(gain: f64, cost: f64) -> Option<f64> {
    // Of nothing to gain at no cost this is NaN.
    let share = gain / cost;
    (share > 0.0).then(|| share.min(1.0))
}

/// By channel; float64, on the CPU.
struct Sums {
    /// Σ weights · what is missing.
    moved: Tensor,
    /// Σ weights.
    weight: Tensor,
}

impl Sums {
    /// `None` of no batches.
    fn of(batches: &[Seen], bounds: Option<[f64; 2]>) -> Result<Option<Self>, tch::TchError> {
        let mut all: Option<[Self; 2]> = None;
        for Seen { wanted, found, squares } in batches {
            // Where nothing of a channel comes through, what should come through counts.
            let (missing, weights) = match bounds {
                None => (wanted.f_sub(found)?, [squares.shallow_clone(), squares.f_zeros_like()?]),
                Some(bounds) => {
                    let missing = clamped(wanted, bounds)?.f_sub(&clamped(found, bounds)?)?;
                    let within = |value: &Tensor| squares.f_mul(&is_within(value, bounds)?);
                    (missing, [within(found)?, within(wanted)?])
                }
            };
            let of = |weights: &Tensor| -> Result<Self, tch::TchError> {
                Ok(Self { moved: by_channel(&weights.f_mul(&missing)?)?, weight: by_channel(weights)? })
            };
            let [first, second] = [of(&weights[0])?, of(&weights[1])?];
            all = Some(match all {
                None => [first, second],
                Some([a, b]) => [a.with(&first)?, b.with(&second)?],
            });
        }
        let Some([first, second]) = all else { return Ok(None) };
        let is_there = first.weight.f_gt(0.0)?;
        Ok(Some(Self {
            moved: first.moved.f_where_self(&is_there, &second.moved)?,
            weight: first.weight.f_where_self(&is_there, &second.weight)?,
        }))
    }

    fn with(&self, other: &Self) -> Result<Self, tch::TchError> {
        Ok(Self { moved: self.moved.f_add(&other.moved)?, weight: self.weight.f_add(&other.weight)? })
    }

    /// The whole way; channels that nothing depends on stay.
    fn step(&self) -> Result<Tensor, tch::TchError> {
        let step = self.moved.f_div(&self.weight)?;
        step.f_where_self(&self.weight.f_gt(0.0)?, &step.f_zeros_like()?)
    }
}

/// Σ g²·(clamp(y) − clamp(y_q + b))².
fn error(batches: &[Seen], added: &Tensor, bounds: [f64; 2]) -> Result<f64, tch::TchError> {
    let mut sum = 0.0;
    for Seen { wanted, found, squares } in batches {
        let added = added.f_to_kind(found.kind())?.f_to_device(found.device())?.f_reshape([1, -1, 1])?;
        let missing = clamped(wanted, bounds)?.f_sub(&clamped(&found.f_add(&added)?, bounds)?)?;
        sum += total(&squares.f_mul(&missing.f_square()?)?)?;
    }
    Ok(sum)
}

fn total(value: &Tensor) -> Result<f64, tch::TchError> {
    value.f_sum(value.kind())?.f_double_value(&[])
}

/// In float64: sums of a batch are as exact as its numbers, those of batches are not to lose what is small.
fn by_channel(value: &Tensor) -> Result<Tensor, tch::TchError> {
    let sums = value.f_sum_dim_intlist([0i64, 2].as_slice(), false, value.kind())?;
    sums.f_to_kind(Kind::Double)?.f_to_device(Device::Cpu)
}

fn clamped(value: &Tensor, [lo, hi]: [f64; 2]) -> Result<Tensor, tch::TchError> {
    value.f_clamp(lo, hi)
}

/// 1 where a clamp to these bounds lets changes pass, 0 elsewhere.
pub(super) fn is_within(value: &Tensor, [lo, hi]: [f64; 2]) -> Result<Tensor, tch::TchError> {
    value.f_gt(lo)?.f_logical_and(&value.f_lt(hi)?)?.f_to_kind(value.kind())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RELU: [f64; 2] = [0.0, f64::INFINITY];

    /// One channel, the same in both halves.
    fn halves(wanted: &[f64], found: &[f64]) -> [Vec<Seen>; 2] {
        let tensor = |values: &[f64]| Tensor::from_slice(values).reshape([1, 1, -1]);
        let seen = || {
            let (wanted, found) = (tensor(wanted), tensor(found));
            vec![Seen { squares: wanted.ones_like(), wanted, found }]
        };
        [seen(), seen()]
    }

    fn shifted(wanted: &[f64], found: &[f64], bounds: Option<[f64; 2]>) -> Option<f64> {
        shift(&halves(wanted, found), bounds).unwrap().map(|added| added.double_value(&[0]))
    }

    #[test]
    fn values_that_a_clamp_cuts_off_ask_for_nothing() {
        let (wanted, found) = ([1.0, 2.0, -1.0], [0.5, 1.5, -9.0]);
        assert_eq!(shifted(&wanted, &found, Some(RELU)), Some(0.5));
        assert_eq!(shifted(&wanted, &found, None), Some(3.0));
    }

    /// One value of ten is 0.5 too low, and nine that are cut off would come through with it.
    #[test]
    fn no_step_is_taken_that_lets_more_through_than_it_mends() {
        let values = |first: f64| -> Vec<f64> { [first].into_iter().chain([-0.01; 9]).collect() };
        let (wanted, found) = (values(1.5), values(1.0));
        let error = |added: f64| error(&halves(&wanted, &found)[0], &Tensor::from_slice(&[added]), RELU).unwrap();
        let added = shifted(&wanted, &found, Some(RELU)).unwrap_or(0.0);
        assert!(error(0.5) > error(0.0) && error(added) <= error(0.0), "{added}: {}", error(added));
    }

    #[test]
    fn a_channel_that_never_comes_through_is_lifted() {
        let added = shifted(&[0.5, 1.0], &[-0.25, -0.5], Some(RELU)).unwrap();
        assert!(added > 0.5, "{added}");
    }

    #[test]
    fn halves_that_disagree_move_nothing() {
        let [even, _] = halves(&[1.0], &[0.0]);
        let [odd, _] = halves(&[-1.0], &[0.0]);
        assert!(shift(&[even, odd], None).unwrap().is_none());
        assert!(shift(&[Vec::new(), halves(&[1.0], &[0.0]).into_iter().flatten().collect()], None).unwrap().is_none());
    }
}
