//! LP: the mean of abs(x − q)^p. p = 1 and p = 2 are MAE and MSE, and are left to them.

use super::Exponent;
use super::mass::from_the_last;
use super::moments::{Moments, mean_power, nearest_level};
use super::search::Side;
use super::values::Loss;
use crate::statistics::Bin;

/// Bins narrower than this, in level units, count as points: differences of powers would cancel.
const NARROW: f64 = 1e-6;

/// abs(x − q)^p of raw values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Power(pub(super) Exponent);

impl Loss for Power {
    fn exponent(self) -> u8 {
        self.0.get()
    }

    /// The largest error that is no clipping becomes 1.
    fn lane_factor(self) -> f32 {
        2.0
    }

    #[inline(always)]
    fn lanes<const N: usize>(self, errors: &mut [f32; N]) {
        let magnitudes = errors.map(f32::abs);
        *errors = magnitudes;
        for _ in 1..self.0.get() {
            for (error, magnitude) in errors.iter_mut().zip(magnitudes) {
                *error *= magnitude;
            }
        }
    }

    fn of(self, error: f64) -> f64 {
        error.abs().powi(i32::from(self.0.get()))
    }
}

/// abs(x − q)^p of a histogram, bin by bin. In closed form, as for p = 1 and 2, it would be a difference of sums of x^p,
/// which lose all digits for large p.
#[derive(Debug)]
pub(super) struct Powers {
    exponent: usize,
    per_unit: f64,
    /// In units, ascending.
    bins: Vec<Even>,
    /// Σ x^p of the bins before each, and of all.
    powers: Vec<f64>,
    /// (p + 1) moments of what lies beyond the end of each bin, about that end.
    beyond: Vec<f64>,
}

/// Mass spread evenly.
#[derive(Debug, Clone, Copy)]
struct Even {
    lo: f64,
    hi: f64,
    mass: f64,
}

impl Powers {
    pub(super) fn new(bins: &[Bin], exponent: Exponent, unit: f64) -> Self {
        let per_unit = 1.0 / unit;
        let in_units = |bin: &Bin| Even { lo: bin.lo * per_unit, hi: bin.hi * per_unit, mass: bin.mass };
        let bins: Vec<Even> = bins.iter().map(in_units).collect();
        let p = usize::from(exponent.get());
        let mut powers = Vec::with_capacity(bins.len() + 1);
        let mut sum = 0.0;
        powers.push(sum);
        for bin in &bins {
            sum += bin.mass * mean_power(bin.lo, bin.hi, p);
            powers.push(sum);
        }
        let mut beyond = vec![0.0; bins.len() * (p + 1)];
        let mut moments = Moments::new(exponent.get());
        let mut previous: Option<Even> = None;
        for (bin, place) in bins.iter().zip(beyond.chunks_exact_mut(p + 1)).rev() {
            if let Some(farther) = previous {
                moments.shift(farther.hi - farther.lo);
                moments.add_even(farther.mass, farther.hi - farther.lo);
                moments.shift(farther.lo - bin.hi);
            }
            place.copy_from_slice(moments.sums());
            previous = Some(*bin);
        }
        Self { exponent: p, per_unit, bins, powers, beyond }
    }

    /// What the magnitudes beyond `tie` cost if they become `end`, which is not beyond `tie`.
    fn clipped(&self, end: f64, tie: f64) -> f64 {
        let index = self.bins.partition_point(|bin| bin.hi <= tie);
        let Some(bin) = self.bins.get(index) else { return 0.0 };
        let from = bin.lo.max(tie);
        let share = if bin.hi > bin.lo { (bin.hi - from) / (bin.hi - bin.lo) } else { 1.0 };
        let own = bin.mass * share * mean_power(from - end, bin.hi - end, self.exponent);
        // Σ (x − end)^p = Σ_k C(p, k) (hi − end)^(p − k) Σ (x − hi)^k
        let moments = &self.beyond[index * (self.exponent + 1)..][..=self.exponent];
        let distance = bin.hi - end;
        let (mut sum, mut binomial, mut power) = (0.0, 1.0, 1.0);
        for (taken, moment) in moments.iter().rev().enumerate() {
            sum += binomial * power * moment;
            binomial *= (self.exponent - taken) as f64 / (taken + 1) as f64;
            power *= distance;
        }
        own + sum
    }

    /// Calls with the error of the magnitudes up to each tie between the levels from 0 to `last` and the next.
    fn for_each_inside(&self, scale: f64, last: u32, mut visit: impl FnMut(f64)) {
        let mut error = 0.0;
        let mut index = 0;
        for level in 0..=last {
            let (lower, upper) = ((f64::from(level) - 0.5) * scale, (f64::from(level) + 0.5) * scale);
            if level == 0 {
                index = self.bins.partition_point(|bin| bin.hi <= upper);
                error += self.powers[index];
            }
            while let Some(bin) = self.bins.get(index).filter(|bin| bin.lo < upper) {
                error += self.piece(bin, lower, upper, f64::from(level) * scale);
                if bin.hi > upper {
                    break;
                }
                index += 1;
            }
            visit(error);
        }
    }

    /// The error against `level` of the part of a bin between `lower` and `upper`.
    fn piece(&self, bin: &Even, lower: f64, upper: f64, level: f64) -> f64 {
        let (from, to) = (bin.lo.max(lower), bin.hi.min(upper));
        let share = if bin.hi > bin.lo { (to - from) / (bin.hi - bin.lo) } else { 1.0 };
        let (a, b) = (from - level, to - level);
        let mean = if a >= 0.0 {
            mean_power(a, b, self.exponent)
        } else if b <= 0.0 {
            mean_power(-b, -a, self.exponent)
        } else {
            // Both halves end at the level itself.
            (mean_power(0.0, -a, self.exponent) * -a + mean_power(0.0, b, self.exponent) * b) / (b - a)
        };
        bin.mass * share * mean
    }
}

impl Powers {
    /// The error by the area under abs(x − q)^p, `signed_power` being abs(x)^p · x.
    #[inline(always)]
    fn error_with(&self, scale: f64, levels: u32, signed_power: impl Fn(f64) -> f64) -> f64 {
        let scale = scale * self.per_unit;
        let (last, inverse) = (f64::from(levels), 1.0 / scale);
        let half_cell = signed_power(scale / 2.0);
        let tie = (last + 0.5) * scale;
        // (p + 1) times the area from 0 to x: whole halves of cells, and the rest, apart because they differ in size.
        let area = |x: f64| {
            let level = nearest_level(x * inverse).min(last);
            (level, signed_power(x - level * scale))
        };
        let start = self.bins.partition_point(|bin| bin.hi <= scale / 2.0);
        let mut error = 0.0;
        let mut end = (f64::NAN, (0.0, 0.0));
        for bin in self.bins[start..].iter().take_while(|bin| bin.lo < tie) {
            let hi = bin.hi.min(tie);
            let width = bin.hi - bin.lo;
            // Neighbouring bins share their edge.
            let from = if end.0 == bin.lo { end.1 } else { area(bin.lo) };
            let to = area(hi);
            if width >= NARROW * scale {
                let area = 2.0 * (to.0 - from.0) * half_cell + to.1 - from.1;
                error += bin.mass * area / width;
            } else {
                let x = bin.centre().min(tie) - to.0 * scale;
                error += bin.mass * (self.exponent + 1) as f64 * x.abs().powi(self.exponent as i32);
            }
            end = (hi, to);
        }
        self.powers[start] + self.clipped(last * scale, tie) + error / (self.exponent + 1) as f64
    }
}

impl Side for Powers {
    fn error(&self, scale: f64, levels: u32) -> f64 {
        match self.exponent {
            3 => self.error_with(scale, levels, |x| x.abs() * (x * x) * x),
            4 => self.error_with(scale, levels, |x| (x * x) * (x * x) * x),
            p => self.error_with(scale, levels, |x| x.abs().powi(p as i32) * x),
        }
    }

    fn errors(&self, scale: f64, levels: std::ops::RangeInclusive<u32>, limit: f64, errors: &mut Vec<f64>) {
        let in_units = scale * self.per_unit;
        let mut by_level = Vec::with_capacity(*levels.end() as usize + 1);
        self.for_each_inside(in_units, *levels.end(), |error| by_level.push(error));
        for (last, error) in by_level.iter_mut().enumerate().skip(*levels.start() as usize) {
            let end = last as f64 * in_units;
            *error += self.clipped(end, end + in_units / 2.0);
        }
        from_the_last(self, scale, levels, limit, &by_level, errors);
    }

    fn clipping(&self, end: f64) -> f64 {
        let end = end * self.per_unit;
        self.clipped(end, end)
    }

    fn greatest(&self) -> f64 {
        self.bins.last().map_or(0.0, |bin| bin.hi) / self.per_unit
    }
}

impl Even {
    fn centre(self) -> f64 {
        (self.lo + self.hi) / 2.0
    }
}
