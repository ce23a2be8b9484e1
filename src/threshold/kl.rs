//! KL: the divergence of the distribution from its quantized image, on 2048 linear bins for each sign.
//!
//! P are the counts of the bins whose level needs no clamping, the clipped mass of either side added to the outermost bin of
//! its end level; Q spreads the unclipped mass of each level over its bins that are not empty and is not renormalised, so
//! that clipping always costs: KL is never below −ln of the share that is not clipped. Zeros are left out. Docs:
//! `docs/error-methods.md`.

use std::sync::LazyLock;

use super::choose::Data;
use super::family::{Ends, Family};
use super::moments::nearest_level;
use super::search::{Found, Point, Sides};
use crate::quantizer::{Grid, MIN_SCALE, QuantParams};
use crate::statistics::{Bin, Observed};

/// Bins of each sign.
const BINS: u32 = 2048;

/// Floor of Q.
const LEAST_SHARE: f64 = 1e-12;

/// What a smaller threshold has to gain to win.
const GAIN: f64 = 1e-12;

/// Nearer to the centre of a bin than this, in bins, a tie between levels is decided by the rounding itself.
const NEAR: f64 = 1e-6;

/// Counts whose logarithms are kept in a table.
const TABLED: usize = 1 << 13;

/// More than floors can add to the sum of Q; keeps the bound on KL from below a bound.
const SLACK: f64 = 1e-8;

/// Relative step from one width of a uniform range to the next; there are never more than one for each bin.
const UNIFORM_STEP: f64 = 0.004;

/// The quantizer with the least divergence, not worse than NOCLIPPING's.
pub(super) fn search(data: Data<'_>, observed: Observed, family: Family, no_clipping: &QuantParams) -> Found {
    let is_uniform = family.ends().is_none();
    let extent = if is_uniform {
        f64::from(observed.max()).max(-f64::from(observed.min()))
    } else {
        f64::from(no_clipping.scale()) * f64::from(no_clipping.quant_min().abs().max(no_clipping.quant_max() + 1))
    };
    let lines = Lines::new(data, extent / f64::from(BINS));
    let scale = f64::from(no_clipping.scale());
    let error = lines.divergence(scale, Ends::of(no_clipping));
    let mut best = Point { scale: no_clipping.scale(), zero_point: no_clipping.zero_point(), error };
    let mut curve = vec![best];
    let candidates = Candidates { family, lines: &lines, no_clipping, observed };
    for scale in candidates.scales() {
        let found = match family.ends() {
            Some(ends) => lines.divergence_below(f64::from(scale), ends, best.error).map(|error| (0, error)),
            None => candidates.best_zero_point(f64::from(scale), best.error),
        };
        let Some((zero_point, error)) = found else { continue };
        let point = Point { scale, zero_point, error };
        curve.push(point);
        if error < best.error - GAIN {
            best = point;
        }
    }
    Found { best, curve }
}

/// The scales that are tried beside NOCLIPPING's.
struct Candidates<'a> {
    family: Family,
    lines: &'a Lines,
    no_clipping: &'a QuantParams,
    observed: Observed,
}

impl Candidates<'_> {
    /// In descending order; at each at least as many bins as levels are inside.
    fn scales(&self) -> Vec<f32> {
        let width = self.lines.width;
        let levels = f64::from(self.family.bits().level_count());
        let scales: Vec<f64> = match (self.family.ends(), self.family.grid()) {
            (_, Grid::PowerOfTwo) => {
                (1..=BINS.ilog2() as i32).map(|k| f64::from(self.no_clipping.scale()) * 2f64.powi(-k)).collect()
            }
            (Some(ends), _) => {
                // T = k · width; signed levels reach from −T to almost T.
                let levels_to_t = f64::from(ends.below.max(ends.above + 1));
                (1..BINS).rev().map(|k| f64::from(k) * width / levels_to_t).collect()
            }
            (None, _) => {
                let range = f64::from(self.observed.max()).max(0.0) - f64::from(self.observed.min()).min(0.0);
                let mut scales = Vec::new();
                let mut bins = range / width;
                while bins >= levels {
                    scales.push(bins * width / (levels - 1.0));
                    bins -= (bins * UNIFORM_STEP).max(1.0);
                }
                scales
            }
        };
        let is_valid = |scale: &f64| {
            let single = *scale as f32;
            let has_bins = match self.family.ends() {
                Some(ends) => f64::from(self.lines.inside(f64::from(single), ends)) >= levels,
                None => true,
            };
            single >= MIN_SCALE && has_bins
        };
        scales.into_iter().filter(is_valid).map(|scale| scale as f32).collect()
    }

    /// All zero points whose ends lie within the observed range.
    fn best_zero_point(&self, scale: f64, best: f64) -> Option<(i32, f64)> {
        let last = self.family.bits().level_count().unsigned_abs() - 1;
        let needed = |end: f32| (f64::from(end.max(0.0)) / scale).round_ties_even().min(f64::from(last)) as u32;
        let (below, above) = (needed(-self.observed.min()), needed(self.observed.max()));
        if below + above < last {
            return None;
        }
        let zero_points = last - above..=below;
        let limit = (-best).exp() * self.lines.total - SLACK * self.lines.total;
        let could_win = zero_points.clone().any(|zero_point| {
            self.lines.inside_mass(scale, Ends { below: zero_point, above: last - zero_point }) >= limit
        });
        if !could_win {
            return None;
        }
        let levels = Levels::new(self.lines, scale, Ends { below, above }, f64::INFINITY)?;
        let divergence = |zero_point: u32| levels.divergence(Ends { below: zero_point, above: last - zero_point });
        zero_points.map(|zero_point| (zero_point as i32, divergence(zero_point))).min_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// Linear histogram of both signs.
struct Lines {
    width: f64,
    sides: Sides<Line>,
    /// All counts but those of zeros.
    total: f64,
    /// ln of 0, 1, 2 …
    logarithms: &'static [f64],
}

/// One sign: the bin i holds magnitudes from i to i + 1 widths.
struct Line {
    counts: Vec<f64>,
    /// Counts before each bin, and all.
    before: Vec<f64>,
    /// Σ c ln c before each bin, and all.
    entropy: Vec<f64>,
    /// Bins that are not empty before each, and all.
    filled: Vec<u32>,
}

impl Lines {
    fn new(data: Data<'_>, width: f64) -> Self {
        let mut sides = Sides { negative: vec![0.0; BINS as usize], positive: vec![0.0; BINS as usize] };
        match data {
            Data::Values(values) => {
                for x in values.iter().filter(|x| x.abs() >= f32::MIN_POSITIVE) {
                    let side = if *x < 0.0 { &mut sides.negative } else { &mut sides.positive };
                    side[bin_of(f64::from(x.abs()), width)] += 1.0;
                }
            }
            Data::Histogram(histogram) => {
                spread(&histogram.negative_bins(), width, &mut sides.negative);
                spread(&histogram.positive_bins(), width, &mut sides.positive);
            }
        }
        let sides = Sides { negative: Line::new(sides.negative), positive: Line::new(sides.positive) };
        let total = sides.negative.all() + sides.positive.all();
        static LOGARITHMS: LazyLock<Vec<f64>> = LazyLock::new(|| (0..TABLED).map(|x| (x as f64).ln()).collect());
        Self { width, sides, total, logarithms: &LOGARITHMS }
    }

    /// How many bins need no clamping, empty ones too.
    fn inside(&self, scale: f64, ends: Ends) -> u32 {
        self.start(scale, ends.below + 1) + self.start(scale, ends.above + 1)
    }

    fn inside_mass(&self, scale: f64, ends: Ends) -> f64 {
        let mass = |line: &Line, last: u32| line.before[self.start(scale, last + 1) as usize];
        mass(&self.sides.negative, ends.below) + mass(&self.sides.positive, ends.above)
    }

    /// The first bin whose centre has this level or a higher one.
    #[inline]
    fn start(&self, scale: f64, level: u32) -> u32 {
        let place = (f64::from(level) - 0.5) * scale / self.width - 0.5;
        if place < 0.0 {
            return 0;
        }
        if place >= f64::from(BINS) {
            return BINS;
        }
        let bin = place as u32;
        let part = place - f64::from(bin);
        if part > NEAR && part < 1.0 - NEAR {
            return bin + 1;
        }
        // So near to a centre that its own level has to tell.
        let nearest = if part < 0.5 { bin } else { bin + 1 };
        let is_reached = nearest < BINS && nearest_level(self.centre(nearest) / scale) >= f64::from(level);
        if is_reached { nearest } else { (nearest + 1).min(BINS) }
    }

    /// Σ c ln c − M ln(M / bins) over the bins of a level, bins being those that are not empty.
    #[inline]
    fn level_term(&self, level: &[(&Line, u32, u32)]) -> f64 {
        let (mass, filled) = mass_and_filled(level);
        if mass <= 0.0 {
            return 0.0;
        }
        let entropy = level.iter().map(|&(line, start, end)| line.entropy[end as usize] - line.entropy[start as usize]);
        entropy.sum::<f64>() - mass * (self.ln(mass) - self.ln(filled.into()))
    }

    /// The natural logarithm; that of a small count, which raw values have, out of a table.
    #[inline]
    fn ln(&self, x: f64) -> f64 {
        let index = x as usize;
        match self.logarithms.get(index) {
            Some(&logarithm) if index as f64 == x => logarithm,
            _ => x.ln(),
        }
    }

    fn centre(&self, bin: u32) -> f64 {
        (f64::from(bin) + 0.5) * self.width
    }

    fn divergence(&self, scale: f64, ends: Ends) -> f64 {
        Levels::new(self, scale, ends, f64::INFINITY).map_or(f64::INFINITY, |levels| levels.divergence(ends))
    }

    /// The divergence, unless a bound from below tells that it is not below `best`.
    fn divergence_below(&self, scale: f64, ends: Ends, best: f64) -> Option<f64> {
        let bound = -(self.inside_mass(scale, ends) / self.total + SLACK).ln();
        if bound >= best {
            return None;
        }
        Levels::new(self, scale, ends, best).map(|levels| levels.divergence(ends))
    }
}

impl Line {
    fn new(counts: Vec<f64>) -> Self {
        let (mut before, mut entropy, mut filled) = (vec![0.0], vec![0.0], vec![0]);
        let (mut sum, mut sum_of_entropy, mut number) = (0.0, 0.0, 0);
        for &count in &counts {
            sum += count;
            sum_of_entropy += x_ln_x(count);
            number += u32::from(count > 0.0);
            before.push(sum);
            entropy.push(sum_of_entropy);
            filled.push(number);
        }
        Self { counts, before, entropy, filled }
    }

    fn all(&self) -> f64 {
        self.before.last().copied().unwrap_or_default()
    }
}

/// The bins of each level at one scale, and the sums of their terms. In all terms counts stand for shares; the logarithm
/// of their total is taken into account at the end.
struct Levels<'a> {
    lines: &'a Lines,
    negative: LevelsOfSide,
    positive: LevelsOfSide,
    /// Σ c ln c − M ln(M / bins) of level 0, which both sides share.
    middle: f64,
}

/// One sign.
struct LevelsOfSide {
    /// First bin of each level from 0 on; one more, the first beyond the last level.
    starts: Vec<u32>,
    /// Σ over the levels from 1 on to each of Σ c ln c − M ln(M / bins); 0 for level 0.
    sums: Vec<f64>,
}

impl<'a> Levels<'a> {
    /// All levels to these ends; `None` once the levels alone, none of which has a negative term, come to `limit`.
    fn new(lines: &'a Lines, scale: f64, ends: Ends, limit: f64) -> Option<Self> {
        let limit = limit * lines.total;
        let Sides { negative: below, positive: above } = &lines.sides;
        let negative = LevelsOfSide::new(lines, below, scale, ends.below, limit)?;
        let positive = LevelsOfSide::new(lines, above, scale, ends.above, limit)?;
        let middle = lines.level_term(&[(below, 0, negative.starts[1]), (above, 0, positive.starts[1])]);
        Some(Self { lines, negative, positive, middle })
    }

    /// Σ P ln(P / Q) with these last levels.
    fn divergence(&self, ends: Ends) -> f64 {
        let Sides { negative: below, positive: above } = &self.lines.sides;
        let total = self.lines.total;
        let inside = self.middle + self.negative.sums[ends.below as usize] + self.positive.sums[ends.above as usize];
        let clipped = self.clipped_term(&self.negative, below, (&self.positive, above), ends.below)
            + self.clipped_term(&self.positive, above, (&self.negative, below), ends.above);
        (inside + clipped) / total
    }

    /// What the clipped mass of one side changes: it joins a bin of the end level, or a bin of its own if that is empty.
    fn clipped_term(&self, side: &LevelsOfSide, line: &Line, other: (&LevelsOfSide, &Line), last: u32) -> f64 {
        let (start, end) = (side.starts[last as usize], side.starts[last as usize + 1]);
        let clipped = line.all() - line.before[end as usize];
        if clipped <= 0.0 {
            return 0.0;
        }
        let total = self.lines.total;
        let mut level = vec![(line, start, end)];
        if last == 0 {
            level.push((other.1, 0, other.0.starts[1]));
        }
        let outermost = (start..end).rev().map(|bin| line.counts[bin as usize]).find(|&count| count > 0.0);
        let innermost_of_other = || {
            let (_, first, beyond) = *level.get(1)?;
            (first..beyond).map(|bin| other.1.counts[bin as usize]).find(|&count| count > 0.0)
        };
        match outermost.or_else(innermost_of_other) {
            Some(count) => {
                let (mass, filled) = mass_and_filled(&level);
                let share = (mass / (total * f64::from(filled))).max(LEAST_SHARE) * total;
                x_ln_x(count + clipped) - x_ln_x(count) - clipped * share.ln()
            }
            None => clipped * (clipped / (total * LEAST_SHARE)).ln(),
        }
    }
}

impl LevelsOfSide {
    fn new(lines: &Lines, line: &Line, scale: f64, last: u32, limit: f64) -> Option<Self> {
        let (mut starts, mut sums) = (Vec::with_capacity(last as usize + 2), Vec::with_capacity(last as usize + 1));
        starts.extend([0, lines.start(scale, 1)]);
        sums.push(0.0);
        let (mut start, mut sum) = (lines.start(scale, 1), 0.0);
        for level in 1..=last {
            let end = lines.start(scale, level + 1);
            sum += lines.level_term(&[(line, start, end)]);
            if sum >= limit {
                return None;
            }
            starts.push(end);
            sums.push(sum);
            start = end;
        }
        Some(Self { starts, sums })
    }
}

fn mass_and_filled(level: &[(&Line, u32, u32)]) -> (f64, u32) {
    let mass = level.iter().map(|&(line, start, end)| line.before[end as usize] - line.before[start as usize]).sum();
    let filled = level.iter().map(|&(line, start, end)| line.filled[end as usize] - line.filled[start as usize]).sum();
    (mass, filled)
}

fn x_ln_x(x: f64) -> f64 {
    if x > 0.0 { x * x.ln() } else { 0.0 }
}

/// The extremes themselves belong to the last bin.
fn bin_of(magnitude: f64, width: f64) -> usize {
    ((magnitude / width) as usize).min(BINS as usize - 1)
}

/// Adds the mass of float bins to linear ones.
fn spread(bins: &[Bin], width: f64, counts: &mut [f64]) {
    for bin in bins {
        let (first, last) = (bin_of(bin.lo, width), bin_of(bin.hi, width));
        let mass = bin.mass;
        if first == last {
            counts[first] += mass;
            continue;
        }
        let density = mass / (bin.hi - bin.lo);
        let mut from = bin.lo;
        for (index, count) in counts.iter_mut().enumerate().take(last).skip(first) {
            let to = ((index + 1) as f64 * width).clamp(from, bin.hi);
            *count += density * (to - from);
            from = to;
        }
        counts[last] += density * (bin.hi - from);
    }
}
