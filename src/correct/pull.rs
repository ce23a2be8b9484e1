//! Where the weights of an op have to go for its quantized inputs to give what the float ones give, as far as the outputs depend on
//! it. Plain arithmetic on sums; it knows no op and no model.

use tch::{Kind, Tensor};

use super::moments::{Means, Moments};

/// Share of the mean diagonal that is added to the diagonal of the Hessian by which weights make up for the errors of inputs.
const PULL_DAMPING: f64 = 0.05;

/// Share of the mean r², each as much as the outputs depend on it, that counts as missing everywhere.
const LEAST_MISSING: f64 = 0.01;

/// Share of the squared means that is added at least: the sums are of float32 products.
pub(super) const LEAST_SPREAD: f64 = 1e-5;

/// What a position counts, so that Σ r² over its channels times that is Σ g²·r², r without its mean, which a bias takes out. A mean
/// of g² instead would count what is missing in a channel that the outputs hardly depend on as if it were missing in all: of a
/// transformer's massive activations that is most. Where next to nothing is missing it is the mean of g².
pub(super) fn by_position(squares: &Tensor, missing: &Tensor) -> Result<Tensor, tch::TchError> {
    let over = |value: &Tensor, axis: i64| value.f_sum_dim_intlist([axis].as_slice(), true, Kind::Float);
    let smallest = f64::from(f32::MIN_POSITIVE);
    // Means are as much of a value as the outputs depend on it, so that what does not count does not shift them.
    let weight = over(squares, -1)?;
    let mean = over(&squares.f_div(&weight.f_clamp_min(smallest)?)?.f_mul(missing)?, -1)?;
    let power = missing.f_sub(&mean)?.f_square()?;
    let shares = squares.f_div(&weight.f_sum(Kind::Float)?.f_clamp_min(smallest)?)?;
    let least = shares.f_mul(&power)?.f_sum(Kind::Float)?.f_mul_scalar(LEAST_MISSING)?.f_clamp_min(smallest)?;
    let power = power.f_add(&least)?;
    // Shares first: products of small numbers are none in float32.
    over(&power.f_div(&over(&power, 1)?)?.f_mul(squares)?, 1)?.f_squeeze_dim(1)
}

/// W + α·E(w·(y − W·x_q)·x_qᵀ)·(E(w·x_q·x_qᵀ) + λI)⁻¹, w being what a position counts: the weights with which the quantized inputs would come
/// nearer to the results that there should be, and the means that this is made of, if there are some; α is, for each channel, how
/// far what one half of the batches asks for helps on the other half.
pub(super) fn pulled(weight: &Tensor, halves: [Moments; 2]) -> Result<(Tensor, Option<Means>), tch::TchError> {
    let all = halves[0].with(&halves[1])?.means(true)?;
    let [even, odd] = halves;
    let (Some(even), Some(odd), Some(all)) = (even.means(true)?, odd.means(true)?, all) else {
        return Ok((weight.shallow_clone(), None));
    };
    let along = |a: &Tensor, b: &Tensor| a.f_mul(b)?.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
    let tried = |own: &Means, other: &Means| -> Result<[Tensor; 2], tch::TchError> {
        let step = step(own)?;
        Ok([along(&step, &other.xr.f_transpose(1, 2)?)?, along(&step.f_bmm(&other.xx)?, &step)?])
    };
    let [[gain, cost], [more_gain, more_cost]] = [tried(&even, &odd)?, tried(&odd, &even)?];
    let (gain, cost) = (gain.f_add(&more_gain)?, cost.f_add(&more_cost)?);
    let share = gain.f_div(&cost)?.f_clamp(0.0, 1.0)?.f_where_self(&cost.f_gt(0.0)?, &cost.f_zeros_like()?)?;
    Ok((weight.f_add(&step(&all)?.f_mul(&share)?)?, Some(all)))
}

/// The whole way; groups that nothing is known of stay.
fn step(means: &Means) -> Result<Tensor, tch::TchError> {
    let diagonal = means.xx.f_diagonal(0, 1, 2)?;
    let mean = |of: &Tensor| of.f_mean_dim([1i64].as_slice(), true, Kind::Double);
    // Where next to nothing is left without the means, that is rounding.
    let least = mean(&means.x.f_square()?)?.f_mul_scalar(LEAST_SPREAD)?.f_clamp_min(f64::MIN_POSITIVE)?;
    let damping = mean(&diagonal)?.f_mul_scalar(PULL_DAMPING)?.f_maximum(&least)?.f_expand_as(&diagonal)?;
    let damped = means.xx.f_add(&damping.f_diag_embed(0, 1, 2)?)?;
    let (step, singular) = Tensor::f_linalg_solve_ex(&damped, &means.xr, true, false)?;
    let step = step.f_transpose(1, 2)?.f_nan_to_num(0.0, 0.0, 0.0)?;
    step.f_mul(&singular.f_eq(0)?.f_reshape([-1, 1, 1])?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn randn(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    #[test]
    fn a_position_counts_what_its_error_does() {
        tch::manual_seed(1);
        let (squares, missing) = (randn(&[2, 5, 7]).square(), randn(&[2, 5, 7]));
        let found = by_position(&squares, &missing).unwrap();
        let over = |value: &Tensor, axis: i64| value.sum_dim_intlist([axis].as_slice(), true, Kind::Float);
        let mean = over(&(&squares * &missing), -1) / over(&squares, -1);
        let power = (&missing - mean).square();
        let least = (&squares * &power).sum(Kind::Float) / squares.sum(Kind::Float) * LEAST_MISSING;
        let power = &power + least;
        let expected = (over(&(&squares * &power), 1) / over(&power, 1)).squeeze_dim(1);
        assert!(found.allclose(&expected, 1e-5, 1e-7, false), "{found:?} {expected:?}");
        // A bias changes nothing, and the smallest numbers are numbers.
        let biased = by_position(&squares, &(&missing + randn(&[2, 5, 1]) * 10.0)).unwrap();
        assert!(found.allclose(&biased, 1e-3, 1e-5, false), "{found:?} {biased:?}");
        let small = by_position(&(&squares * 1e-30), &(&missing * 1e-15)).unwrap() * 1e30;
        assert!(found.allclose(&small, 1e-3, 1e-5, false), "{found:?} {small:?}");
    }

    #[test]
    fn where_nothing_is_missing_a_position_counts_as_its_mean() {
        let squares = randn(&[2, 5, 7]).square();
        let mean = squares.mean_dim([1i64].as_slice(), false, Kind::Float);
        assert!(by_position(&squares, &squares.zeros_like()).unwrap().allclose(&mean, 1e-5, 1e-7, false));
        let dead = by_position(&squares.zeros_like(), &squares).unwrap();
        assert_eq!(dead.abs().max().double_value(&[]), 0.0);
    }

    /// All of what is missing in the massive channel is at one position, where the outputs do not depend on it.
    #[test]
    fn a_massive_error_that_does_not_count_pulls_no_weights() {
        tch::manual_seed(2);
        let half = || {
            let (x, squares, missing) =
                (randn(&[1, 6, 40]), Tensor::ones([1, 3, 40], (Kind::Float, Device::Cpu)), randn(&[1, 3, 40]) * 1e-3);
            let _ = x.narrow(2, 0, 1).narrow(1, 4, 1).fill_(50.0);
            let _ = missing.narrow(2, 0, 1).narrow(1, 1, 1).fill_(1000.0);
            let _ = squares.narrow(2, 0, 1).narrow(1, 1, 1).fill_(1e-12);
            let mut moments = Moments::default();
            moments.add((0, 1), &x, &missing, Some(&by_position(&squares, &missing).unwrap())).unwrap();
            moments
        };
        let weight = Tensor::zeros([1, 3, 6], (Kind::Double, Device::Cpu));
        let (found, means) = pulled(&weight, [half(), half()]).unwrap();
        assert!(means.is_some() && found.abs().max().double_value(&[]) < 1e-2, "{found:?}");
    }

    /// r is x in the first channel, in the second it is x or −x by the half.
    #[test]
    fn channels_move_as_far_as_the_halves_agree_about_them() {
        tch::manual_seed(3);
        let half = |sign: f64| {
            let x = randn(&[1, 1, 100]);
            let mut moments = Moments::default();
            let weights = Tensor::ones([1, 100], (Kind::Float, Device::Cpu));
            moments.add((0, 1), &x, &Tensor::cat(&[&x, &(&x * sign)], 1), Some(&weights)).unwrap();
            moments
        };
        let weight = Tensor::zeros([1, 2, 1], (Kind::Double, Device::Cpu));
        let (found, _) = pulled(&weight, [half(1.0), half(-1.0)]).unwrap();
        let [first, second] = [0, 1].map(|channel| found.double_value(&[0, channel, 0]));
        assert!((first - 1.0 / 1.05).abs() < 0.01, "{first}");
        assert_eq!(second, 0.0);
    }

    #[test]
    fn nothing_is_pulled_by_no_positions() {
        let weight = randn(&[1, 2, 3]);
        let (found, means) = pulled(&weight, [Moments::default(), Moments::default()]).unwrap();
        assert!(means.is_none() && found.equal(&weight));
    }
}
