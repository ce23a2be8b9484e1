//! Second-order rounding of the weights of one op: to which level each weight goes, given what the op reads.
//!
//! What counts is E(‖y − W_q·x_q‖²), y being the float op's result and x_q what it reads in the quantized model: a quadratic
//! form in W_q. The levels are found feature by feature, the error of each being spread over those that are still to come by
//! the Cholesky factor of the inverse Hessian, as in "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
//! Transformers" (Frantar et al. 2022); then each channel's scale is refitted by least squares, and levels move by coordinate
//! descent until none gains. It knows matrices and quantizers, and nothing of graphs.

use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::moments::Means;
use super::pull::LEAST_SPREAD;
use crate::quantizer::{Levels, QuantParams};

/// Share of the mean diagonal that is added to the diagonal of a Hessian.
const DAMPING: f64 = 0.01;

/// Rounds of coordinate descent.
const SWEEPS: usize = 3;

/// Channels that go through the features together: the factor is read once for all of them.
const TOGETHER: usize = 16;

/// The weights of an op and what it reads.
pub(super) struct Problem<'a> {
    /// (groups, outputs, features): what is to be rounded; float64.
    pub(super) weight: &'a Tensor,
    /// As it is rounded now.
    pub(super) nearest: &'a Tensor,
    /// Of x_q and y.
    pub(super) means: &'a Means,
    /// The same where positions count as much as the outputs depend on them, if that is known.
    pub(super) weighted: Option<&'a Means>,
    /// One for each channel, or one for all.
    pub(super) params: &'a [QuantParams],
    /// Whether a channel's scale may change.
    pub(super) refits: bool,
}

/// Rounded weights.
#[derive(Debug)]
pub(super) struct Rounded {
    /// (groups, outputs, features); float32.
    pub(super) weight: Tensor,
    /// One for each channel, or one for all.
    pub(super) params: Vec<QuantParams>,
    /// E(‖y − W_q·x_q‖²) of all channels rounded to nearest, and as they are now.
    pub(super) errors: [f64; 2],
    /// E(‖y‖²).
    pub(super) energy: f64,
    /// Channels that stay as they were, as nothing was better.
    pub(super) kept: usize,
}

/// Rounds towards `target`, which is the weight itself, or what makes up for the errors of x_q. `None` where the inputs do not
/// tell anything: they never differ. What is found makes the weighted error small; a channel takes it only if its error is less
/// without weights too.
pub(super) fn round(problem: &Problem<'_>, target: &Tensor) -> Result<Option<Rounded>, tch::TchError> {
    let plain = &problem.means.xx;
    let counted = problem.weighted.map(|weighted| Counted::of(weighted, plain)).transpose()?;
    let weighted = match &counted {
        Some(counted) => factor(&counted.hessian)?.map(|found| (found, counted)),
        None => None,
    };
    let (found, hessian, judge) = match weighted {
        Some((found, counted)) => (found, &counted.hessian, Some(counted)),
        None => {
            let Some(found) = factor(plain)? else { return Ok(None) };
            (found, plain, None)
        }
    };
    let [_, outputs, features] = <[i64; 3]>::try_from(problem.weight.size()).unwrap_or_default();
    let (outputs, features) = (outputs.unsigned_abs() as usize, features.unsigned_abs() as usize);
    let of = |channel: usize| &problem.params[if problem.params.len() == 1 { 0 } else { channel }];
    let channels: Vec<Grid> = (0..problem.weight.numel() / features.max(1)).map(|channel| of(channel).into()).collect();

    let by_row = |tensor: &Tensor| Vec::<f64>::try_from(tensor.f_contiguous()?.f_reshape([-1])?);
    let mut levels = vec![0.0; problem.weight.numel()];
    {
        let (targets, factors) = (by_row(target)?, by_row(&found.factor)?);
        let size = outputs * features;
        let groups = levels.chunks_mut(size).zip(targets.chunks(size)).zip(channels.chunks(outputs));
        let work = groups.enumerate().flat_map(|(group, ((levels, targets), grids))| {
            let some = TOGETHER * features;
            let parts = levels.chunks_mut(some).zip(targets.chunks(some)).zip(grids.chunks(TOGETHER));
            parts.map(move |((levels, targets), grids)| (group, levels, targets, grids))
        });
        work.collect::<Vec<_>>().into_par_iter().for_each(|(group, levels, targets, grids)| {
            let factor = &factors[group * features * features..][..features * features];
            let order = &found.order[group * features..][..features];
            pulp::Arch::new().dispatch(Spread { levels, targets, grids, factor, order });
        });
    }

    // z·H and w·H for all channels at once.
    let as_tensor = |values: &[f64]| Tensor::f_from_slice(values)?.f_reshape(problem.weight.size());
    let pulled = by_row(&target.f_bmm(hessian)?)?;
    let level_products = by_row(&as_tensor(&levels)?.f_bmm(hessian)?)?;
    let hessians = by_row(hessian)?;
    let rows =
        levels.par_chunks_mut(features).zip(pulled.par_chunks(features)).zip(level_products.par_chunks(features));
    let refits = problem.refits;
    let grids: Vec<Grid> = rows
        .zip(&channels)
        .enumerate()
        .map(|(channel, (((levels, pulled), products), grid))| {
            let hessian = &hessians[channel / outputs * features * features..][..features * features];
            let grid = if refits { grid.refitted(levels, pulled, products) } else { *grid };
            pulp::Arch::new().dispatch(Descend { levels, grid, hessian, pulled, products });
            grid
        })
        .collect();
    chosen(problem, &levels, &grids, judge)
}

/// What the positions' weights make of the Hessians.
struct Counted<'a> {
    means: &'a Means,
    /// Each by its trace, so that groups are of one magnitude; without weights where the outputs depend on too few positions.
    hessian: Tensor,
    /// (groups, 1): where they do not.
    is_known: Tensor,
}

impl<'a> Counted<'a> {
    fn of(weighted: &'a Means, plain: &Tensor) -> Result<Self, tch::TchError> {
        let trace = |of: &Tensor| of.f_diagonal(0, 1, 2)?.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Double);
        let unit = |of: &Tensor| of.f_div(&trace(of)?.f_clamp_min(f64::MIN_POSITIVE)?.f_unsqueeze(2)?);
        let means = weighted.x.f_square()?.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Double)?;
        let is_known = trace(&weighted.xx)?.f_gt_tensor(&means.f_mul_scalar(LEAST_SPREAD)?)?;
        let hessian = unit(&weighted.xx)?.f_where_self(&is_known.f_unsqueeze(2)?, &unit(plain)?)?;
        Ok(Self { means: weighted, hessian, is_known })
    }
}

/// Of each channel the better of the two, in the arithmetic of the quantizer.
fn chosen(
    problem: &Problem<'_>,
    levels: &[f64],
    grids: &[Grid],
    judge: Option<&Counted<'_>>,
) -> Result<Option<Rounded>, tch::TchError> {
    let Problem { means, params, .. } = problem;
    let features = levels.len() / grids.len().max(1);
    let of = |channel: usize| if params.len() == 1 { params[0] } else { params[channel] };
    let candidates: Vec<QuantParams> =
        grids.iter().enumerate().map(|(channel, grid)| grid.params(&of(channel))).collect();
    let rows = levels.chunks(features).zip(&candidates);
    let values: Vec<f32> = rows
        .flat_map(|(levels, params)| levels.iter().map(|&level| params.dequantize(level as i32 + params.zero_point())))
        .collect();
    let rounded = Tensor::f_from_slice(&values)?.f_reshape(problem.weight.size())?;
    let error = |weight: &Tensor, means: &Means| {
        // Of the difference, which is small: y − W_q·x is (W − W_q)·x + r.
        form(&problem.weight.f_sub(&weight.f_to_kind(Kind::Double)?)?, means)
    };
    let (nearest, found) = (error(problem.nearest, means)?, error(&rounded, means)?);
    let mut is_better = found.f_lt_tensor(&nearest)?;
    if let Some(Counted { means, is_known, .. }) = judge {
        let falls = error(&rounded, means)?.f_le_tensor(&error(problem.nearest, means)?)?;
        is_better = is_better.f_logical_and(&falls.f_logical_or(&is_known.f_logical_not()?)?)?;
    }
    let weight = rounded.f_where_self(&is_better.f_unsqueeze(-1)?, &problem.nearest.f_to_kind(Kind::Float)?)?;
    let better = Vec::<i64>::try_from(is_better.f_reshape([-1])?.f_to_kind(Kind::Int64)?)?;
    let best = found.f_where_self(&is_better, &nearest)?;
    let total = |errors: &Tensor| errors.f_sum(Kind::Double)?.f_double_value(&[]);
    let params = if params.len() == 1 {
        params.to_vec()
    } else {
        let both = candidates.into_iter().zip(params.iter().copied()).zip(&better);
        both.map(|((new, old), &is_better)| if is_better == 1 { new } else { old }).collect()
    };
    Ok(Some(Rounded {
        weight,
        params,
        errors: [total(&nearest)?.max(0.0), total(&best)?.max(0.0)],
        energy: total(&form(problem.weight, means)?)?,
        kept: better.iter().filter(|&&is_better| is_better == 0).count(),
    }))
}

/// E((w·x + r)²) of each channel.
fn form(weight: &Tensor, means: &Means) -> Result<Tensor, tch::TchError> {
    let square = weight.f_bmm(&means.xx)?.f_mul(weight)?;
    let mixed = weight.f_mul(&means.xr.f_transpose(1, 2)?)?.f_mul_scalar(2.0)?;
    square.f_add(&mixed)?.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Double)?.f_add(&means.rr)
}

/// The upper Cholesky factor of the inverse Hessian of each group, its features in `order`.
struct Factor {
    factor: Tensor,
    /// Group by group, features by descending diagonal.
    order: Vec<usize>,
}

/// `None` where all inputs are zero, or not finite.
fn factor(hessian: &Tensor) -> Result<Option<Factor>, tch::TchError> {
    let diagonal = hessian.f_diagonal(0, 1, 2)?;
    let mean = diagonal.f_mean_dim([1i64].as_slice(), true, Kind::Double)?;
    let total = mean.f_sum(Kind::Double)?.f_double_value(&[])?;
    if !(total.is_finite() && total > 0.0) {
        return Ok(None);
    }
    // A group without inputs is rounded to nearest by any factor.
    let least = total / mean.numel() as f64 * f64::EPSILON;
    let order = diagonal.f_argsort_stable(true, 1, true)?;
    let size = hessian.size();
    let sorted = hessian.f_gather(1, &order.f_unsqueeze(2)?.f_expand(&size, false)?, false)?;
    let sorted = sorted.f_gather(2, &order.f_unsqueeze(1)?.f_expand(&size, false)?, false)?;
    let factor = |damping: f64| {
        let damping = mean.f_mul_scalar(damping)?.f_clamp_min(least)?.f_expand_as(&diagonal)?;
        let damped = sorted.f_add(&damping.f_diag_embed(0, 1, 2)?)?;
        damped.f_linalg_cholesky(false)?.f_cholesky_inverse(false)?.f_linalg_cholesky(true)
    };
    // Where a mean is large and values hardly differ, rounding may leave a matrix that is none of squares.
    let Some(factor) = [1.0, 10.0, 100.0].into_iter().find_map(|times| factor(DAMPING * times).ok()) else {
        return Ok(None);
    };
    let order = Vec::<i64>::try_from(order.f_reshape([-1])?)?;
    Ok(Some(Factor { factor, order: order.into_iter().map(|index| index.unsigned_abs() as usize).collect() }))
}

/// A channel's levels, counted from the one that stands for zero.
#[derive(Debug, Clone, Copy)]
struct Grid {
    scale: f64,
    lowest: f64,
    highest: f64,
}

impl From<&QuantParams> for Grid {
    fn from(params: &QuantParams) -> Self {
        let zero = f64::from(params.zero_point());
        Self {
            scale: params.scale().into(),
            lowest: f64::from(params.quant_min()) - zero,
            highest: f64::from(params.quant_max()) - zero,
        }
    }
}

impl Grid {
    fn level(self, value: f64) -> f64 {
        (value / self.scale).round_ties_even().clamp(self.lowest, self.highest)
    }

    /// With the scale that makes the error of these levels least: `pulled` is w·H, `products` z·H.
    fn refitted(self, levels: &[f64], pulled: &[f64], products: &[f64]) -> Self {
        let along = |of: &[f64]| of.iter().zip(levels).map(|(a, z)| a * z).sum::<f64>();
        let scale = along(pulled) / along(products);
        // As it will be.
        let scale = f64::from(scale as f32);
        if scale.is_normal() && scale > 0.0 { Self { scale, ..self } } else { self }
    }

    /// A quantizer as `old` with this scale; `old` where that is none.
    fn params(self, old: &QuantParams) -> QuantParams {
        let levels = Levels { quant_min: old.quant_min(), quant_max: old.quant_max() };
        QuantParams::new(self.scale as f32, old.zero_point(), levels).unwrap_or(*old)
    }
}

/// Feature by feature in this order, the error of each is made up for by those that follow, for a few channels at a time.
struct Spread<'a> {
    levels: &'a mut [f64],
    targets: &'a [f64],
    grids: &'a [Grid],
    factor: &'a [f64],
    order: &'a [usize],
}

impl pulp::NullaryFnOnce for Spread<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { levels, targets, grids, factor, order } = self;
        let features = order.len();
        let mut left: Vec<f64> =
            targets.chunks(features).flat_map(|row| order.iter().map(|&index| row[index])).collect();
        for (place, &feature) in order.iter().enumerate() {
            let row = &factor[place * features..][..features];
            let rows = left.chunks_mut(features).zip(levels.chunks_mut(features)).zip(grids);
            for ((left, levels), grid) in rows {
                let level = grid.level(left[place]);
                levels[feature] = level;
                let error = (left[place] - level * grid.scale) / row[place];
                for (left, factor) in left[place + 1..].iter_mut().zip(&row[place + 1..]) {
                    *left -= error * factor;
                }
            }
        }
    }
}

/// Moves each level to where the error is least, the others as they are, until none moves. `pulled` is w·H, `products` z·H.
struct Descend<'a> {
    levels: &'a mut [f64],
    grid: Grid,
    hessian: &'a [f64],
    pulled: &'a [f64],
    products: &'a [f64],
}

impl pulp::NullaryFnOnce for Descend<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { levels, grid, hessian, pulled, products } = self;
        let features = levels.len();
        // Half of the gradient: H·(q − w).
        let mut slope: Vec<f64> = products.iter().zip(pulled).map(|(z, w)| grid.scale * z - w).collect();
        for _ in 0..SWEEPS {
            let mut has_moved = false;
            for feature in 0..features {
                let row = &hessian[feature * features..][..features];
                let curvature = row[feature] * grid.scale;
                if curvature <= 0.0 {
                    continue;
                }
                let old = levels[feature];
                let new = (old - slope[feature] / curvature).round_ties_even().clamp(grid.lowest, grid.highest);
                if new != old {
                    levels[feature] = new;
                    has_moved = true;
                    let step = (new - old) * grid.scale;
                    slope.iter_mut().zip(row).for_each(|(slope, h)| *slope += step * h);
                }
            }
            if !has_moved {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::super::moments::Moments;
    use super::*;

    fn randn(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    /// Of each channel, E((W·x − W_q·x)²), position by position.
    fn errors(weight: &Tensor, rounded: &Tensor, x: &Tensor) -> Tensor {
        let missing = (weight - rounded).to_kind(Kind::Double).bmm(&x.to_kind(Kind::Double));
        missing.square().mean_dim([-1i64].as_slice(), false, Kind::Double)
    }

    /// Whatever positions count, and whether they count at all, in layers of one group and of many.
    #[test]
    fn no_channel_is_worse_than_rounded_to_nearest() {
        for (seed, [groups, outputs, features]) in [[1, 12, 20], [8, 1, 9], [4, 3, 6]].into_iter().enumerate() {
            tch::manual_seed(seed as i64);
            let (weight, mix) = (randn(&[groups, outputs, features]), randn(&[groups, features, features]));
            let x = mix.bmm(&randn(&[groups, features, 200]));
            let levels = Levels { quant_min: -4, quant_max: 3 };
            let params: Vec<QuantParams> =
                (0..groups * outputs).map(|_| QuantParams::new(0.7, 0, levels).unwrap()).collect();
            let nearest = (&weight / 0.7).round().clamp(-4.0, 3.0) * 0.7;
            let means = |weights: Option<&Tensor>| {
                let mut moments = Moments::default();
                let nothing = Tensor::zeros([groups, outputs, 200], (Kind::Float, Device::Cpu));
                moments.add((0, groups), &x, &nothing, weights).unwrap();
                moments.means(weights.is_some()).unwrap().unwrap()
            };
            let counts = randn(&[groups, 200]).square().square();
            // Nothing depends on the first group, or on the second but at one position.
            let _ = counts.narrow(0, 0, 1).zero_();
            let _ = counts.narrow(0, groups / 2, 1).narrow(1, 1, 199).zero_();
            let (plain, weighted) = (means(None), means(Some(&counts)));
            let double = weight.to_kind(Kind::Double);
            let of = |weighted| {
                let problem = Problem {
                    weight: &double,
                    nearest: &nearest,
                    means: &plain,
                    weighted,
                    params: &params,
                    refits: true,
                };
                round(&problem, &double).unwrap().unwrap()
            };
            let before = errors(&weight, &nearest, &x);
            for (found, least) in [(of(None), 0.8), (of(Some(&weighted)), 0.95)] {
                let after = errors(&weight, &found.weight, &x);
                let worst = (&after / &before).max().double_value(&[]);
                assert!(worst <= 1.0 + 1e-6, "{groups} groups: {worst}");
                let all = (after.sum(Kind::Double) / before.sum(Kind::Double)).double_value(&[]);
                assert!(all < least, "{groups} groups: {all}");
                assert!((found.errors[1] / found.errors[0] - all).abs() < 1e-4, "{:?} {all}", found.errors);
            }
        }
    }
}
