//! MSE, MAE and LP against brute force.

use super::data::{KINDS, Kind, histogram};
use crate::quantizer::{Bits, Grid, QuantParams, Range, Scheme, Threshold};
use crate::statistics::{Bin, Histogram};
use crate::threshold::closed_form::Closed;
use crate::threshold::family::Ends;
use crate::threshold::lp::Powers;
use crate::threshold::mae::Absolute;
use crate::threshold::mse::Square;
use crate::threshold::search::Side;
use crate::threshold::{Channels, ErrorMethod, Exponent, Selection, select_activation, select_weights};

pub(super) const GRIDS: [Grid; 3] = [Grid::Symmetric, Grid::PowerOfTwo, Grid::Uniform];

/// Thresholds of the brute force in (0, 2 T], T being NOCLIPPING's.
const THRESHOLDS: usize = 10_000;

/// What rounding of the scale to `f32` may cost where all values lie on levels, in levels.
pub(super) const SLACK: f64 = 1e-4;

/// Ends on each side of the brute force on a uniform grid, each from 0 to twice the extreme.
const ENDS: usize = 128;

pub(super) fn scheme(bits: u64, grid: Grid) -> Scheme {
    Scheme { bits: Bits::try_from(bits).unwrap(), grid }
}

fn methods() -> Vec<(ErrorMethod, i32)> {
    let lp = |p: i32| (ErrorMethod::Lp { p: Exponent::try_from(i128::from(p)).unwrap() }, p);
    vec![(ErrorMethod::Mse, 2), (ErrorMethod::Mae, 1), lp(3), lp(4)]
}

pub(super) fn of_weights(values: &[f32], scheme: Scheme, method: ErrorMethod) -> Selection {
    select_weights(&Channels::new(values, &[values.len()], None).unwrap(), scheme, method).unwrap()
}

/// Mean of abs((x − q) / unit)^p by the definition; infinite where an image is.
fn raw_error(values: &[f32], params: &QuantParams, p: i32, unit: f64) -> f64 {
    let mut images = vec![0.0; values.len()];
    params.fake_quantize_slice(values, &mut images);
    let error = |(x, q): (&f32, &f32)| {
        let error = ((f64::from(*x) - f64::from(*q)) / unit).abs();
        match p {
            1 => error,
            2 => error * error,
            _ => error.powi(p),
        }
    };
    values.iter().zip(&images).map(error).sum::<f64>() / values.len() as f64
}

/// All quantizers of the brute force.
pub(super) fn candidates(no_clipping: Threshold, extremes: Range, scheme: Scheme) -> Vec<QuantParams> {
    let thresholds = |t: f64| (1..=THRESHOLDS).map(move |i| 2.0 * t * i as f64 / THRESHOLDS as f64);
    let mut params: Vec<QuantParams> = match (scheme.grid, no_clipping) {
        (Grid::PowerOfTwo, Threshold::Signed(t)) => {
            (-1..20).map(|k| Threshold::Signed(t / 2f64.powi(k)).params(scheme.bits)).collect()
        }
        (Grid::PowerOfTwo, Threshold::Unsigned(t)) => {
            (-1..20).map(|k| Threshold::Unsigned(t / 2f64.powi(k)).params(scheme.bits)).collect()
        }
        (_, Threshold::Signed(t)) => thresholds(t).map(|t| Threshold::Signed(t).params(scheme.bits)).collect(),
        (_, Threshold::Unsigned(t)) => thresholds(t).map(|t| Threshold::Unsigned(t).params(scheme.bits)).collect(),
        (_, Threshold::Uniform(_)) => {
            let end = |i: usize| 2.0 * i as f64 / (ENDS - 1) as f64;
            let pairs = (0..ENDS).flat_map(|i| (0..ENDS).map(move |j| (end(i), end(j))));
            let range = |(lo, hi)| Range { lo: lo * extremes.lo.min(0.0), hi: hi * extremes.hi.max(0.0) };
            pairs.map(|pair| Threshold::Uniform(range(pair)).params(scheme.bits)).collect()
        }
    };
    params.dedup();
    params
}

pub(super) fn extremes(values: &[f32]) -> Range {
    let fold = |f: fn(f32, f32) -> f32| f64::from(values.iter().copied().fold(0.0, f));
    Range { lo: fold(f32::min), hi: fold(f32::max) }
}

/// The worst ratio seen, and all that break their bounds.
#[derive(Default)]
pub(super) struct Worst {
    ratio: f64,
    case: String,
    failures: Vec<String>,
}

impl Worst {
    /// Compares what was found with the best of the brute force times the bound, plus an absolute slack.
    pub(super) fn check(&mut self, found: f64, best: f64, bound: f64, slack: f64, case: impl Fn() -> String) {
        let ratio = if found <= best + slack { 1.0 } else { found / best };
        if ratio > bound || ratio.is_nan() {
            self.failures.push(format!("{}: {found:e}, best {best:e}, ratio {ratio}", case()));
        }
        if ratio > self.ratio {
            (self.ratio, self.case) = (ratio, case());
        }
    }

    /// Prints the worst case; fails if any was out of bounds.
    pub(super) fn finish(self, what: &str, method: ErrorMethod, p: i32, grid: Grid) {
        println!("{what} {method} p {p} {grid:?}: {:.6} at {}", self.ratio, self.case);
        assert!(self.failures.is_empty(), "{what} {method} p {p} {grid:?}: {:#?}", self.failures);
    }
}

/// Every kind of data with every grid, and with one in three of the widths in each turn: all of them would take minutes.
pub(super) fn is_sampled(kind: Kind, grid: Grid, bits: u64, turn: usize) -> bool {
    (kind as usize + grid as usize + bits as usize / 2 + turn).is_multiple_of(3)
}

/// The largest ratio to the best of brute force that raw values may have.
pub(super) fn bound_of_weights(grid: Grid) -> f64 {
    if grid == Grid::Uniform { 1.005 } else { 1.001 }
}

impl Worst {
    /// Chooses for raw values, and compares with the best of one in `stride` of the brute force.
    fn check_weights(
        &mut self,
        values: &[f32],
        scheme: Scheme,
        (method, p): (ErrorMethod, i32),
        stride: usize,
        case: &str,
    ) {
        let no_clipping = of_weights(values, scheme, ErrorMethod::NoClipping);
        let unit = f64::from(no_clipping.params[0].scale());
        let found = raw_error(values, &of_weights(values, scheme, method).params[0], p, unit);
        let all = candidates(no_clipping.thresholds[0], extremes(values), scheme);
        let all = all.iter().step_by(stride).chain(&no_clipping.params);
        let best = all.map(|params| raw_error(values, params, p, unit)).fold(f64::INFINITY, f64::min);
        self.check(found, best, bound_of_weights(scheme.grid), SLACK.powi(p), || {
            format!("{case}, {} values, {} bits", values.len(), scheme.bits)
        });
    }
}

/// Raw values: within 1.001 of the best on symmetric grids, 1.005 on uniform ones.
#[test]
fn weights_are_near_the_optimum() {
    for (method, p) in methods() {
        for grid in GRIDS {
            let mut worst = Worst::default();
            for kind in KINDS {
                for (turn, (count, salt)) in [(9, 0), (9, 1), (64, 0), (128, 0), (300, 0)].into_iter().enumerate() {
                    for bits in [2, 3, 4, 6, 8].into_iter().filter(|&bits| is_sampled(kind, grid, bits, turn)) {
                        let values = kind.values(count, bits + count as u64 + 1000 * salt);
                        worst.check_weights(&values, scheme(bits, grid), (method, p), 1, &format!("{kind:?}"));
                    }
                }
            }
            worst.finish("weights", method, p, grid);
        }
    }
}

/// Kinds and counts of values of which a search that looked less closely missed the optimum.
#[test]
fn weights_with_many_narrow_valleys_are_near_the_optimum() {
    for (method, p) in methods() {
        for grid in [Grid::Symmetric, Grid::Uniform] {
            let mut worst = Worst::default();
            for (kind, count) in [
                (Kind::Relu6, 300),
                (Kind::Sigmoid, 300),
                (Kind::Bimodal, 30),
                (Kind::Uniform, 30),
                (Kind::Relu6, 700),
                (Kind::Bimodal, 700),
            ] {
                for salt in [0, 10, 11] {
                    let values = kind.values(count, 8 + count as u64 + 1000 * salt);
                    worst.check_weights(&values, scheme(8, grid), (method, p), 1, &format!("{kind:?}"));
                }
            }
            worst.finish("narrow valleys", method, p, grid);
        }
    }
}

/// The same for as many values as real layers have, and many zeros.
#[test]
fn weights_of_large_layers_are_near_the_optimum() {
    for (method, p) in methods() {
        for grid in [Grid::Symmetric, Grid::Uniform] {
            let mut worst = Worst::default();
            for (kind, count, bits) in [
                (Kind::Normal, 1152, 8),
                (Kind::Laplace, 4096, 8),
                (Kind::Normal, 4096, 4),
                (Kind::Sparse, 2000, 8),
                (Kind::StudentT, 1024, 3),
            ] {
                let values = kind.values(count, 53);
                worst.check_weights(&values, scheme(bits, grid), (method, p), 4, &format!("{kind:?}"));
            }
            worst.finish("large weights", method, p, grid);
        }
    }
}

/// What the sides of a search say of a quantizer, by numerical integration over each bin.
fn slow_histogram_error(histogram: &Histogram, params: &QuantParams, p: i32, unit: f64) -> f64 {
    let scale = f64::from(params.scale());
    let level = |level: i32| f64::from(level - params.zero_point()) * scale;
    let error = |x: f64| {
        let nearest = (x / scale).round_ties_even() * scale;
        let image = nearest.clamp(level(params.quant_min()), level(params.quant_max()));
        ((x - image) / unit).abs().powi(p)
    };
    let mut sum = 0.0;
    for (sign, bins) in [(1.0, histogram.positive_bins()), (-1.0, histogram.negative_bins())] {
        for bin in bins {
            const POINTS: i32 = 200;
            let at = |i: i32| sign * (bin.lo + (bin.hi - bin.lo) * (f64::from(i) + 0.5) / f64::from(POINTS));
            sum += bin.mass * (0..POINTS).map(|i| error(at(i))).sum::<f64>() / f64::from(POINTS);
        }
    }
    sum / histogram.count() as f64
}

/// What `choose` minimises, for any quantizer, by the same sides: no search in it.
fn objective(histogram: &Histogram, p: i32, unit: f64) -> impl Fn(&QuantParams) -> f64 + use<> {
    objective_of_bins([histogram.negative_bins(), histogram.positive_bins()], histogram.count() as f64, p, unit)
}

/// The same for any bins, and what the masses of all and of the zeros come to.
pub(super) fn objective_of_bins(bins: [Vec<Bin>; 2], total: f64, p: i32, unit: f64) -> impl Fn(&QuantParams) -> f64 {
    let sides: [Box<dyn Side>; 2] = bins.map(|bins| -> Box<dyn Side> {
        match p {
            1 => Box::new(Closed::new(Absolute, &bins, unit)),
            2 => Box::new(Closed::new(Square, &bins, unit)),
            p => Box::new(Powers::new(&bins, Exponent::try_from(i128::from(p)).unwrap(), unit)),
        }
    });
    move |params| {
        let Ends { below, above } = Ends::of(params);
        let scale = f64::from(params.scale());
        (sides[0].error(scale, below) + sides[1].error(scale, above)) / total
    }
}

pub(super) fn power_of_two_near(params: &QuantParams) -> f64 {
    f64::from(params.scale()).log2().floor().exp2()
}

#[test]
fn the_error_of_a_histogram_is_its_integral() {
    for (method, p) in methods() {
        for grid in GRIDS {
            // Outliers on the edge of a bin and next to it.
            let at_edges = [Kind::Normal.values(300, 5), vec![-4.0, -3.999, 7.999, 8.0]].concat();
            let data = KINDS.iter().map(|kind| kind.values(300, 5)).chain([at_edges]);
            for (kind, values) in data.enumerate() {
                let histogram = histogram(&values);
                for bits in [2, 5, 8] {
                    let scheme = scheme(bits, grid);
                    let params = select_activation(&histogram, scheme, method, None).unwrap().params[0];
                    let unit = power_of_two_near(&params);
                    let (fast, slow) =
                        (objective(&histogram, p, unit)(&params), slow_histogram_error(&histogram, &params, p, unit));
                    // The slow one has 200 points in a bin.
                    assert!((fast - slow).abs() <= 1e-3 * slow + 1e-6, "{kind} {scheme:?} {method}: {fast:e} {slow:e}");
                }
            }
        }
    }
}

/// The histogram's own objective: within 1.0005 of the best on symmetric grids, 1.002 on uniform ones.
#[test]
fn activations_are_near_the_optimum_of_their_histogram() {
    for (method, p) in methods() {
        for grid in GRIDS {
            let mut worst = Worst::default();
            let bound = if grid == Grid::Uniform { 1.002 } else { 1.0005 };
            for kind in KINDS {
                let histogram = histogram(&kind.values(4096, 11));
                for bits in [2, 3, 4, 6, 8].into_iter().filter(|&bits| is_sampled(kind, grid, bits, 0)) {
                    let scheme = scheme(bits, grid);
                    let no_clipping = select_activation(&histogram, scheme, ErrorMethod::NoClipping, None).unwrap();
                    let unit = power_of_two_near(&no_clipping.params[0]);
                    let error = objective(&histogram, p, unit);
                    let found = error(&select_activation(&histogram, scheme, method, None).unwrap().params[0]);
                    let data = histogram.observed().unwrap().unwrap();
                    let range = Range { lo: data.min().into(), hi: data.max().into() };
                    let all = candidates(no_clipping.thresholds[0], range, scheme);
                    let best = all.iter().chain(&no_clipping.params).map(&error).fold(f64::INFINITY, f64::min);
                    let slack = SLACK.powi(p) + 1e-9;
                    worst.check(found, best, bound, slack, || format!("{kind:?} {bits} bits"));
                }
            }
            worst.finish("activations", method, p, grid);
        }
    }
}

/// The choice on a histogram measured on the raw data: within 1.005 of the best for smooth data, 1.01 for other and for high
/// powers, much of whose error is made by a few outliers that are known to a bin, and what half a bin of a lone outlier costs.
#[test]
fn activations_are_near_the_optimum_of_their_values() {
    for (method, p) in methods() {
        for grid in GRIDS {
            let mut worst = Worst::default();
            // What counts as zero in a histogram does not in this measure.
            let kinds = || KINDS.into_iter().filter(|&kind| kind != Kind::Denormal);
            for (turn, (seed, kind)) in
                [17, 917].into_iter().flat_map(|seed| kinds().map(move |kind| (seed, kind))).enumerate()
            {
                let values = kind.values(4096, seed);
                let histogram = histogram(&values);
                let bound = if kind.is_spiky() || p > 2 { 1.01 } else { 1.005 };
                for bits in [2, 4, 8].into_iter().filter(|&bits| is_sampled(kind, grid, bits, turn)) {
                    let scheme = scheme(bits, grid);
                    let no_clipping = select_activation(&histogram, scheme, ErrorMethod::NoClipping, None).unwrap();
                    let unit = f64::from(no_clipping.params[0].scale());
                    let found = select_activation(&histogram, scheme, method, None).unwrap().params[0];
                    let found = raw_error(&values, &found, p, unit);
                    let range = extremes(&values);
                    let all = candidates(no_clipping.thresholds[0], range, scheme);
                    let all = all.iter().step_by(10).chain(&no_clipping.params);
                    let best = all.map(|params| raw_error(&values, params, p, unit)).fold(f64::INFINITY, f64::min);
                    let slack =
                        (range.hi.max(-range.lo) / unit / 4096.0).powi(p) / if kind.is_spiky() { 1.0 } else { 4096.0 };
                    worst.check(found, best, bound, slack, || format!("{kind:?} {bits} bits, seed {seed}"));
                }
            }
            worst.finish("measured", method, p, grid);
        }
    }
}

/// Above 8 bits: never worse than NOCLIPPING or than 500 equally spaced thresholds.
#[test]
fn wide_grids_are_not_worse_than_equal_steps() {
    for (method, p) in methods() {
        for grid in [Grid::Symmetric, Grid::Uniform] {
            for kind in KINDS {
                for (bits, count) in [(9, 300), (12, 64), (16, 40), (16, 300)] {
                    let values = kind.values(count, 29 + bits);
                    let scheme = scheme(bits, grid);
                    let no_clipping = of_weights(&values, scheme, ErrorMethod::NoClipping);
                    let unit = f64::from(no_clipping.params[0].scale());
                    let found = raw_error(&values, &of_weights(&values, scheme, method).params[0], p, unit);
                    let first = raw_error(&values, &no_clipping.params[0], p, unit);
                    assert!(found <= first, "{kind:?} {count} {scheme:?} {method}: {found:e} {first:e}");
                    let factors = (1..=500).map(|i| 2.0 * f64::from(i) / 500.0);
                    let threshold = |factor: f64| match no_clipping.thresholds[0] {
                        Threshold::Signed(t) => Threshold::Signed(t * factor),
                        Threshold::Unsigned(t) => Threshold::Unsigned(t * factor),
                        Threshold::Uniform(Range { lo, hi }) => {
                            Threshold::Uniform(Range { lo: lo * factor, hi: hi * factor })
                        }
                    };
                    let error = |factor| raw_error(&values, &threshold(factor).params(scheme.bits), p, unit);
                    let best = factors.map(error).fold(f64::INFINITY, f64::min);
                    // A scale rounded to f32 misses the last level by so much.
                    let slack = SLACK.max(f64::from(scheme.bits.level_count()) * 2f64.powi(-22));
                    assert!(
                        found <= best * 1.0001 + slack.powi(p),
                        "{kind:?} {count} {scheme:?} {method}: {found:e} {best:e} ratio {}",
                        found / best
                    );
                }
            }
        }
    }
}

/// NOCLIPPING is scored first and wins ties: no method is worse on its own metric, on any grid, at any width.
#[test]
fn never_worse_than_no_clipping() {
    for (method, p) in methods() {
        for grid in GRIDS {
            for kind in KINDS {
                let values = kind.values(200, 31);
                let histogram = histogram(&values);
                for bits in [2, 5, 6, 8, 11, 12, 14, 16].into_iter().filter(|&bits| is_sampled(kind, grid, bits, 0)) {
                    let scheme = scheme(bits, grid);
                    let no_clipping = of_weights(&values, scheme, ErrorMethod::NoClipping).params[0];
                    let error = |params| raw_error(&values, params, p, no_clipping.scale().into());
                    let found = of_weights(&values, scheme, method).params[0];
                    assert!(error(&found) <= error(&no_clipping), "weights, {kind:?} {scheme:?} {method}");
                    let of = |method| select_activation(&histogram, scheme, method, None).unwrap().params[0];
                    let (found, no_clipping) = (of(method), of(ErrorMethod::NoClipping));
                    let error = objective(&histogram, p, power_of_two_near(&no_clipping));
                    assert!(error(&found) <= error(&no_clipping), "activations, {kind:?} {scheme:?} {method}");
                }
            }
        }
    }
}

#[test]
fn scaling_by_a_power_of_two_scales_the_threshold() {
    for (method, _) in methods() {
        for grid in GRIDS {
            for kind in [Kind::Normal, Kind::Relu6, Kind::Outliers, Kind::Lattice] {
                let values = kind.values(200, 37);
                for exponent in [-100, -1, 7, 90] {
                    let scaled: Vec<f32> = values.iter().map(|x| x * 2f32.powi(exponent)).collect();
                    for bits in [3, 8] {
                        let scheme = scheme(bits, grid);
                        let of_histogram = |values: &[f32]| {
                            select_activation(&histogram(values), scheme, method, None).unwrap().params[0]
                        };
                        let of_weights = |values: &[f32]| of_weights(values, scheme, method).params[0];
                        for (a, b) in
                            [(of_weights(&values), of_weights(&scaled)), (of_histogram(&values), of_histogram(&scaled))]
                        {
                            assert_eq!(f64::from(b.scale()), f64::from(a.scale()) * 2f64.powi(exponent), "{kind:?}");
                            assert_eq!(b.zero_point(), a.zero_point(), "{kind:?} {scheme:?} {method}");
                        }
                    }
                }
            }
        }
    }
}

/// p = 1 and p = 2 are MAE and MSE.
#[test]
fn lp_continues_mae_and_mse() {
    let values = Kind::StudentT.values(300, 41);
    let histogram = histogram(&values);
    for (p, same) in [(1, ErrorMethod::Mae), (2, ErrorMethod::Mse)] {
        let lp = ErrorMethod::Lp { p: Exponent::try_from(p).unwrap() };
        for grid in GRIDS {
            let scheme = scheme(5, grid);
            assert_eq!(of_weights(&values, scheme, lp), of_weights(&values, scheme, same));
            let of_histogram = |method| select_activation(&histogram, scheme, method, None).unwrap();
            assert_eq!(of_histogram(lp), of_histogram(same));
        }
    }
    // The largest p lets the largest error alone count.
    let lp = ErrorMethod::Lp { p: Exponent::try_from(64).unwrap() };
    let worst = |params: &QuantParams| {
        values.iter().map(|&x| (f64::from(x) - f64::from(params.fake_quantize(x))).abs()).fold(0.0, f64::max)
    };
    let eight = scheme(4, Grid::Symmetric);
    let (found, no_clipping) = (of_weights(&values, eight, lp), of_weights(&values, eight, ErrorMethod::NoClipping));
    assert!(worst(&found.params[0]) <= worst(&no_clipping.params[0]));
}

/// Another number of threads, another order: the same thresholds.
#[test]
fn thresholds_depend_on_nothing_but_the_values() {
    let values = Kind::Laplace.values(4096 * 40, 43);
    let reversed: Vec<f32> = values.iter().rev().copied().collect();
    for (method, _) in methods().into_iter().chain([(ErrorMethod::Kl, 0)]) {
        let scheme = scheme(8, Grid::Uniform);
        let of_histogram = |values: &[f32]| select_activation(&histogram(values), scheme, method, None).unwrap();
        assert_eq!(of_histogram(&values), of_histogram(&reversed), "{method}");
        // Per channel, and one tensor large enough to be summed in parallel.
        let channels = Channels::new(&values[..4096 * 4], &[4, 4096], Some(0)).unwrap();
        let tensor = Channels::new(&values[..4096 * 20], &[4096 * 20], None).unwrap();
        let with_threads = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| [channels, tensor].map(|weights| select_weights(&weights, scheme, method).unwrap()))
        };
        assert_eq!(with_threads(1), with_threads(3), "{method}");
    }
}
