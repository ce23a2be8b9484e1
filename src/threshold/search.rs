//! The search that all error methods but KL share: which scale, and on a uniform grid which zero point, has the least
//! error. It refuses to know what an error is; that is a [`Side`]'s business.
//!
//! An error as a function of the scale has many local minima, close to each other in height where values are few. So a
//! geometric sweep down from twice NOCLIPPING's scale finds the region, all of the region within a margin of the best is
//! gone through in fine steps, and the best of the fine steps are polished. NOCLIPPING itself comes first and wins ties.

use super::family::{Ends, Family};
use crate::quantizer::{MIN_SCALE, QuantParams};

/// Ratio of neighbouring scales of the sweep.
const COARSE_STEP: f64 = 1.06;

/// Fine steps in one coarse step: 0.15% each, and 0.03% where few values make the valleys many and narrow.
const FINE_STEPS: i32 = 40;
const FINER_STEPS: i32 = 200;

/// Independent values below which every scale is tried.
const FEW: f64 = 128.0;

/// Independent values from which the error is so smooth that few local minima have to be polished.
const MANY: f64 = 1024.0;

/// Equal steps of the scale that are tried too where the error is as good as random.
const EQUAL_STEPS: u32 = 500;

/// Levels up to which all scales are tried that put the greatest magnitude on a level.
const MOST_WHOLE_LEVELS: u32 = 512;

/// How many of the scales are polished that put the greatest magnitude on a level.
const WHOLE_FINALISTS: usize = 4;

/// Hopeless coarse steps on end after which the sweep ends: they halve the scale, and an extreme between level 1 and level 2
/// has one of them at its own by then.
const PATIENCE: u32 = 12;

/// Halvings of the step when a local minimum is polished on a grid of up to 8 bits; each bit more takes one more, as it
/// halves the distance between minima.
const HALVINGS: u8 = 6;

/// How often the scale is computed anew from the levels that it gives.
const FITS: usize = 3;

/// Where the sweep begins, in units of NOCLIPPING's scale.
const FIRST: f64 = 2.0;

/// The magnitudes of the values of one sign, and what quantizing them to levels 0, s, 2s … costs.
///
/// Errors are sums over values, in a unit that all errors of a search share.
pub(super) trait Side {
    /// The error if the last level is `levels` times `scale`.
    fn error(&self, scale: f64, levels: u32) -> f64;

    /// The errors for last levels from the greatest in `levels` down to the least, or down to where clipping alone costs
    /// more than `limit`.
    fn errors(&self, scale: f64, levels: std::ops::RangeInclusive<u32>, limit: f64, errors: &mut Vec<f64>);

    /// What the magnitudes beyond `end` would cost if they became `end` and all others were exact.
    fn clipping(&self, end: f64) -> f64;

    /// The greatest magnitude; 0 of nothing.
    fn greatest(&self) -> f64;

    /// The magnitude that should lie on a level if any can, and how much it counts.
    fn anchor(&self) -> Anchor {
        Anchor { magnitude: self.greatest(), weight: self.greatest() }
    }

    /// How the scale that is best for the levels that magnitudes have is computed; `None` if it is not.
    fn fit(&self, _scale: f64, _levels: u32) -> Option<Fit> {
        None
    }
}

/// A magnitude that should lie on a level.
#[derive(Debug, Clone, Copy)]
pub(super) struct Anchor {
    pub(super) magnitude: f64,
    pub(super) weight: f64,
}

/// Sums over magnitudes x with weights h and levels k, which the scale Σ h x k / Σ h k² fits best.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fit {
    /// Σ h x k.
    pub(super) products: f64,
    /// Σ h k².
    pub(super) squares: f64,
}

/// The values of both signs.
pub(super) struct Sides<S> {
    pub(super) negative: S,
    pub(super) positive: S,
}

/// How thorough a search has to be for its data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    /// Coarse steps that are worse than the best by at most this share of its error are gone through in fine steps.
    pub(super) margin: f64,
    /// Fine steps in one coarse step.
    pub(super) fine_steps: i32,
    /// How many local minima are polished.
    pub(super) finalists: usize,
    /// Whether there may be a scale of which all values are multiples.
    pub(super) is_discrete: bool,
    /// Whether the error is no smooth function of the scale.
    pub(super) has_few_values: bool,
    /// How many coarse steps on end may be hopeless before a uniform grid's sweep ends.
    pub(super) patience: u32,
}

impl Effort {
    /// For a loss with this exponent on about so many independent values: the fewer they are, and the fewer of them a high
    /// power makes count, the more the error jumps from one scale to the next.
    pub(super) fn for_noise(exponent: u8, values: f64) -> Self {
        let noise = match exponent {
            1 => 0.6,
            2 => 0.9,
            p => 0.75 * f64::from(p),
        };
        let is_discrete = values < FEW;
        let margin = if is_discrete { f64::INFINITY } else { 0.03 + 6.0 * noise / values.sqrt() };
        let (finalists, fine_steps) = if values < MANY { (24, FINER_STEPS) } else { (6, FINE_STEPS) };
        Self { margin, fine_steps, finalists, is_discrete, has_few_values: values < MANY, patience: 0 }
    }

    /// The same where single values may make most of the error. A uniform grid then has good scales below hopeless ones: an
    /// extreme that lies between two levels counts as clipped to the lower one, until the scale brings the next one near.
    pub(super) fn patient(self) -> Self {
        Self { patience: PATIENCE, ..self }
    }
}

/// A quantizer that was tried.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Point {
    pub(super) scale: f32,
    pub(super) zero_point: i32,
    /// Sum over all values, in the unit of the sides.
    pub(super) error: f64,
}

impl Point {
    /// Whether its error was worth computing.
    fn is_hopeful(&self) -> bool {
        self.error < f64::INFINITY
    }
}

/// What a search found.
pub(super) struct Found {
    pub(super) best: Point,
    /// The sweep, by descending scale.
    pub(super) curve: Vec<Point>,
}

/// The best quantizer, not worse than `no_clipping`.
pub(super) fn search<S: Side>(sides: &Sides<S>, family: Family, no_clipping: &QuantParams, effort: Effort) -> Found {
    let mut search = Search { sides, family, below: Vec::new(), above: Vec::new() };
    let mut best = search.of_params(no_clipping);
    let mut curve = search.sweep(best, effort.patience);
    for point in &curve {
        keep_better(&mut best, *point);
    }
    if !family.is_continuous() || best.error == 0.0 {
        curve.retain(Point::is_hopeful);
        return Found { best, curve };
    }
    let fine = search.fine(&curve, best.error * (1.0 + effort.margin), effort.fine_steps);
    let mut finalists = lowest_minima(&fine, effort.finalists);
    if effort.is_discrete {
        let least = curve.last().map_or(best.scale, |point| point.scale);
        finalists.extend(search.best_whole_scales(least, no_clipping.scale()));
    }
    for point in finalists {
        keep_better(&mut best, search.polished(point, effort.fine_steps));
    }
    if family.bits().get() > 8 && effort.has_few_values {
        search.equal_steps(no_clipping.scale(), &mut best);
    }
    curve.retain(Point::is_hopeful);
    Found { best, curve }
}

/// The quantizer with the least sum of error and `surplus`, which is what a quantizer costs beyond the sum over its values, never
/// negative, and dear to compute: of all fine steps those are looked at whose error alone is not above the best sum.
pub(super) fn search_with_surplus<S: Side>(
    sides: &Sides<S>,
    family: Family,
    no_clipping: &QuantParams,
    effort: Effort,
    surplus: impl Fn(&Point) -> f64,
) -> Found {
    let Found { mut best, curve } = search(sides, family, no_clipping, effort);
    let mut search = Search { sides, family, below: Vec::new(), above: Vec::new() };
    let mut least = best.error + surplus(&best);
    let mut points = vec![search.of_params(no_clipping)];
    points.extend(&curve);
    if family.is_continuous() {
        points.extend(search.fine(&curve, least, effort.fine_steps));
    }
    sort_by_error(&mut points);
    for point in points {
        if point.error >= least {
            break;
        }
        let sum = point.error + surplus(&point);
        if sum < least {
            (best, least) = (point, sum);
        }
    }
    Found { best, curve }
}

fn keep_better(best: &mut Point, other: Point) {
    if other.error < best.error {
        *best = other;
    }
}

struct Search<'a, S> {
    sides: &'a Sides<S>,
    family: Family,
    /// Errors by number of levels, kept to be filled again.
    below: Vec<f64>,
    above: Vec<f64>,
}

impl<S: Side> Search<'_, S> {
    fn of_params(&self, params: &QuantParams) -> Point {
        let scale = f64::from(params.scale());
        Point { scale: params.scale(), zero_point: params.zero_point(), error: self.error(scale, Ends::of(params)) }
    }

    fn error(&self, scale: f64, ends: Ends) -> f64 {
        self.sides.negative.error(scale, ends.below) + self.sides.positive.error(scale, ends.above)
    }

    /// Scales from the largest down until no quantizer is left whose clipping alone does not cost more than the best one;
    /// those of which that is true, and which are gone through with patience, have an infinite error.
    fn sweep(&mut self, no_clipping: Point, patience: u32) -> Vec<Point> {
        let patience = if self.family.ends().is_none() { patience } else { 0 };
        let ratio = if self.family.is_continuous() { COARSE_STEP } else { 2.0 };
        let mut curve = Vec::new();
        let mut best = no_clipping.error;
        let mut scale = f64::from(no_clipping.scale) * FIRST;
        while scale as f32 >= MIN_SCALE {
            if scale <= f64::from(f32::MAX) && self.family.has_scale(scale as f32) {
                let hopeless = Point { scale: scale as f32, zero_point: 0, error: f64::INFINITY };
                let point = self.at(scale, best).unwrap_or(hopeless);
                best = best.min(point.error);
                curve.push(point);
                let waited = curve.iter().rev().take_while(|point| !point.is_hopeful()).count();
                if waited > patience as usize {
                    break;
                }
            }
            scale /= ratio;
        }
        let hopeful = curve.iter().rposition(Point::is_hopeful).map_or(0, |last| last + 1);
        curve.truncate(hopeful);
        curve
    }

    /// The best quantizer with this scale; `None` if clipping alone would cost more than `limit`.
    fn at(&mut self, scale: f64, limit: f64) -> Option<Point> {
        let single = scale as f32;
        let scale = f64::from(single);
        match self.family.ends() {
            Some(ends) => {
                let end = |levels: u32| scale * f64::from(levels);
                let Sides { negative, positive } = self.sides;
                let is_hopeless = limit.is_finite()
                    && negative.clipping(end(ends.below)) + positive.clipping(end(ends.above)) > limit;
                (!is_hopeless).then(|| Point { scale: single, zero_point: 0, error: self.error(scale, ends) })
            }
            None => {
                let (zero_point, error) = self.best_zero_point(scale, limit)?;
                Some(Point { scale: single, zero_point, error })
            }
        }
    }

    /// All zero points of a uniform grid, none of which is looked at that clips more than it has to.
    fn best_zero_point(&mut self, scale: f64, limit: f64) -> Option<(i32, f64)> {
        let last = self.family.bits().level_count().unsigned_abs() - 1;
        let Sides { negative, positive } = self.sides;
        let needed = |greatest: f64| (greatest / scale).round_ties_even().min(f64::from(last)) as u32;
        let (below, above) = (needed(negative.greatest()), needed(positive.greatest()));
        if below + above <= last && (greatest_fits(negative, scale, last) && greatest_fits(positive, scale, last)) {
            let error = negative.error(scale, below) + positive.error(scale, above);
            // What is left over goes to both ends in proportion, for the sake of values that were not seen.
            let spare = last - below - above;
            let share = f64::from(below) / f64::from((below + above).max(1));
            return Some(((below + (f64::from(spare) * share) as u32) as i32, error));
        }
        negative.errors(scale, last - above..=below, limit, &mut self.below);
        positive.errors(scale, last - below..=above, limit, &mut self.above);
        // The i-th error below has below − i levels, and leaves last − below + i to the other side, which are among those
        // that were asked for: its errors are those for above − k levels, so that k is above + below − last − i.
        let overlap = below + above - last;
        let mut best: Option<(i32, f64)> = None;
        for (i, error_below) in (0..=overlap).zip(&self.below) {
            let Some(error_above) = self.above.get((overlap - i) as usize) else { continue };
            let error = error_below + error_above;
            if best.is_none_or(|(_, least)| error < least || least.is_nan()) {
                best = Some(((below - i) as i32, error));
            }
        }
        best
    }

    /// Goes in fine steps through each coarse step that touches `limit`.
    fn fine(&mut self, curve: &[Point], limit: f64, steps: i32) -> Vec<Point> {
        let mut fine = Vec::new();
        let ratio = COARSE_STEP.powf(-1.0 / f64::from(steps));
        for (index, point) in curve.iter().enumerate() {
            let next = curve.get(index + 1).map_or(f64::INFINITY, |next| next.error);
            if point.error.min(next) > limit {
                continue;
            }
            let mut scale = f64::from(point.scale);
            fine.push(*point);
            for _ in 1..steps {
                scale *= ratio;
                let Some(point) = self.at_valid(scale, f64::INFINITY) else { break };
                fine.push(point);
            }
        }
        fine
    }

    /// Walks from a fine step to the bottom of its valley.
    fn polished(&mut self, start: Point, fine_steps: i32) -> Point {
        let mut best = start;
        let mut step = (COARSE_STEP - 1.0) / f64::from(fine_steps);
        let halvings = HALVINGS + self.family.bits().get().saturating_sub(8);
        for _ in 0..halvings {
            step /= 2.0;
            let centre = f64::from(best.scale);
            for scale in [centre * (1.0 + step), centre * (1.0 - step)] {
                if let Some(point) = self.at_valid(scale, f64::INFINITY) {
                    keep_better(&mut best, point);
                }
            }
        }
        self.fitted(best)
    }

    /// The quantizer with the scale that is best for the levels that the values have, as long as it is better, where it can be
    /// computed: steps do not get to the bottom of the valleys of a few values that make almost all of the error.
    fn fitted(&mut self, start: Point) -> Point {
        let mut best = start;
        for _ in 0..FITS {
            let Some(point) = self.best_scale(best).and_then(|scale| self.at_valid(scale, f64::INFINITY)) else {
                break;
            };
            if point.error >= best.error {
                break;
            }
            best = point;
        }
        best
    }

    fn best_scale(&self, Point { scale, zero_point, .. }: Point) -> Option<f64> {
        let Sides { negative, positive } = self.sides;
        let last = self.family.bits().level_count().unsigned_abs() - 1;
        let ends = self.family.ends().unwrap_or_else(|| {
            let below = zero_point.unsigned_abs();
            Ends { below, above: last.saturating_sub(below) }
        });
        let (below, above) = (negative.fit(scale.into(), ends.below)?, positive.fit(scale.into(), ends.above)?);
        Some((below.products + above.products) / (below.squares + above.squares))
    }
}

impl<S: Side> Search<'_, S> {
    /// The best of the scales of which the greatest magnitude, or the one that counts most, is a whole multiple: if all values
    /// can lie on levels at once, it is at one of these.
    fn best_whole_scales(&mut self, least: f32, no_clipping: f32) -> Vec<Point> {
        let [below, above] = [self.sides.negative.anchor(), self.sides.positive.anchor()];
        let anchor = if below.weight > above.weight { below.magnitude } else { above.magnitude };
        let level_count = self.family.bits().level_count().unsigned_abs();
        if level_count > MOST_WHOLE_LEVELS {
            return Vec::new();
        }
        let region = f64::from(least)..=f64::from(no_clipping) * FIRST;
        let scales = (1..=level_count).map(|level| anchor / f64::from(level)).filter(|scale| region.contains(scale));
        let points: Vec<Point> = scales.filter_map(|scale| self.at_valid(scale, f64::INFINITY)).collect();
        let mut points: Vec<Point> = points.into_iter().map(|point| self.fitted(point)).collect();
        sort_by_error(&mut points);
        points.truncate(WHOLE_FINALISTS);
        points
    }

    /// On wide grids the error of few values is as good as random from one fine step to the next: equal steps do as well.
    fn equal_steps(&mut self, no_clipping: f32, best: &mut Point) {
        for step in 1..=EQUAL_STEPS {
            let scale = f64::from(no_clipping) * FIRST * f64::from(step) / f64::from(EQUAL_STEPS);
            if let Some(point) = self.at_valid(scale, best.error) {
                keep_better(best, point);
            }
        }
    }

    /// Like [`at`](Self::at), and `None` for what is no scale of any quantizer.
    fn at_valid(&mut self, scale: f64, limit: f64) -> Option<Point> {
        let is_valid = (f64::from(MIN_SCALE)..=f64::from(f32::MAX)).contains(&scale);
        if is_valid { self.at(scale, limit) } else { None }
    }
}

fn greatest_fits<S: Side>(side: &S, scale: f64, last: u32) -> bool {
    side.greatest() <= scale * (f64::from(last) + 0.5)
}

/// The lowest of the points that are not above their neighbours.
fn lowest_minima(points: &[Point], count: usize) -> Vec<Point> {
    let error = |index: Option<usize>| index.and_then(|i| points.get(i)).map_or(f64::INFINITY, |point| point.error);
    let is_minimum = |&index: &usize| {
        points[index].error <= error(index.checked_sub(1)) && points[index].error <= error(Some(index + 1))
    };
    let mut minima: Vec<Point> = (0..points.len()).filter(is_minimum).map(|index| points[index]).collect();
    sort_by_error(&mut minima);
    minima.truncate(count);
    minima
}

/// Of equal errors the larger scale comes first.
fn sort_by_error(points: &mut [Point]) {
    points.sort_by(|a, b| a.error.total_cmp(&b.error).then(b.scale.total_cmp(&a.scale)));
}
