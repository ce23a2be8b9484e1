//! Raw values with a score each as sides of a search: sums of h (x − q)². It refuses to know where scores come from, and how
//! a scale is chosen.
//!
//! Lanes take the roots of the scores, which span half as many orders of magnitude, and are multiplied with a power of two
//! with which `f32` can hold the sum: whatever the scores, nothing is lost that is not negligible beside the rest.

use super::moments::nearest_level;
use super::mse::Square;
use super::search::{Anchor, Effort, Fit, Side, Sides};
use super::values::{LANES, Term, UNCLIPPED, beyond, equal_parts, errors_by_level, in_blocks, in_tasks, rounded};

/// What the root of the largest score becomes, give or take a factor of √2, so that those of all others are normal numbers.
const LARGEST_ROOT: f64 = (1u64 << 60) as f64;

/// What errors times roots are multiplied with: the first undoes [`LARGEST_ROOT`], each next one is for sums too small for
/// the one before.
const FACTORS: [f64; 4] =
    [1.0 / (1u64 << 60) as f64, 1.0 / (1u64 << 20) as f64, (1u64 << 20) as f64, (1u64 << 60) as f64];

/// 2^-80: no part that matters of a larger sum is lost in `f32`, and the next factor makes a smaller one at most 1.
const LEAST_SUM: f64 = 1.0 / (1u128 << 80) as f64;

/// Magnitudes of one sign that have a score.
pub(super) struct Scored {
    /// Padded; descending if the grid is uniform.
    groups: Vec<Group>,
    /// Units in 1.
    per_unit: f64,
    /// In units.
    greatest: f64,
    /// Σ h x², in units.
    squares: f64,
    /// The magnitude with the greatest h x², in units.
    anchor: Anchor,
}

/// Magnitudes in units, and the root of the score of each.
#[derive(Clone, Copy)]
struct Group {
    magnitudes: [f32; LANES],
    roots: [f32; LANES],
}

/// What values and scores are counted in, both powers of two, so that counting in them changes no digit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Units {
    value: f64,
    score: f64,
}

impl Units {
    /// For values of which at least one that is not zero has a score; `None` if there is none.
    pub(super) fn of(values: &[f32], scores: &[f32]) -> Option<Self> {
        let scored = || scored(values, scores);
        let greatest = |all: &mut dyn Iterator<Item = f32>| all.reduce(f32::max).map(power_of_two);
        let value = greatest(&mut scored().map(|(x, _)| x.abs()))?;
        Some(Self { value, score: greatest(&mut scored().map(|(_, score)| score))? })
    }

    /// What a sum of the sides is in the units of the data.
    pub(super) fn sum(self, sum: f64) -> f64 {
        sum * self.value * self.value * self.score
    }
}

/// The values that are not zero and whose score is not zero.
fn scored<'a>(values: &'a [f32], scores: &'a [f32]) -> impl Iterator<Item = (f32, f32)> + 'a {
    values.iter().copied().zip(scores.iter().copied()).filter(|&(x, score)| x != 0.0 && score > 0.0)
}

/// The largest power of two not above a positive number.
fn power_of_two(x: f32) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    f64::from_bits(f64::from(x).to_bits() & !MANTISSA)
}

/// The effort for scored values: equal ones make as much noise as one of them, the more so the greater their share of all
/// scores.
pub(super) fn effort(values: &[f32], scores: &[f32]) -> Effort {
    let mut pairs: Vec<(u32, f64)> =
        scored(values, scores).map(|(x, score)| (x.abs().to_bits(), score.into())).collect();
    pairs.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let parts = pairs.chunk_by(|a, b| a.0 == b.0).map(|equal| equal.iter().map(|(_, score)| score).sum());
    Effort::for_noise(2, equal_parts(parts)).patient()
}

impl Scored {
    /// Both sides of these values; sorted if `errors` will be asked for.
    pub(super) fn sides(values: &[f32], scores: &[f32], units: Units, sorted: bool) -> Sides<Self> {
        let side = |is_negative: bool| {
            let in_units = |(x, score): (f32, f32)| {
                let root = (f64::from(score) / units.score).sqrt() * LARGEST_ROOT;
                ((f64::from(x.abs()) / units.value) as f32, root as f32)
            };
            let belongs = |(x, _): &(f32, f32)| (*x < 0.0) == is_negative;
            let mut pairs: Vec<(f32, f32)> = scored(values, scores).filter(belongs).map(in_units).collect();
            if sorted {
                pairs.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(b.1.total_cmp(&a.1)));
            }
            Self::new(&pairs, 1.0 / units.value)
        };
        Sides { negative: side(true), positive: side(false) }
    }

    fn new(pairs: &[(f32, f32)], per_unit: f64) -> Self {
        let group = |pairs: &[(f32, f32)]| {
            let mut group = Group { magnitudes: [0.0; LANES], roots: [0.0; LANES] };
            for (lane, &(x, root)) in pairs.iter().enumerate() {
                (group.magnitudes[lane], group.roots[lane]) = (x, root);
            }
            group
        };
        let greatest = pairs.iter().map(|&(x, _)| f64::from(x)).fold(0.0, f64::max);
        let mut anchor = Anchor { magnitude: 0.0, weight: 0.0 };
        let mut squares = 0.0;
        for &(x, root) in pairs {
            let square = weight(root) * f64::from(x) * f64::from(x);
            squares += square;
            if square > anchor.weight {
                anchor = Anchor { magnitude: x.into(), weight: square };
            }
        }
        Self { groups: pairs.chunks(LANES).map(group).collect(), per_unit, greatest, squares, anchor }
    }

    /// Magnitudes and scores, in units.
    fn values(&self) -> impl Iterator<Item = (f64, f64)> {
        let pairs = self.groups.iter().flat_map(|group| group.magnitudes.iter().zip(&group.roots));
        pairs.map(|(&x, &root)| (f64::from(x), weight(root)))
    }

    /// Σ h e² of the errors e, in what they are counted in.
    fn sum(&self, term: Term) -> f64 {
        let mut sum = 0.0;
        for factor in FACTORS {
            let in_lanes = |groups: &[Group]| pulp::Arch::new().dispatch(Sum { groups, term, factor: factor as f32 });
            let multiplied = in_tasks(&self.groups, in_lanes);
            sum = multiplied / (factor * LARGEST_ROOT).powi(2);
            if multiplied >= LEAST_SUM {
                break;
            }
        }
        sum
    }

    /// The error if the last level is so many times the scale, which is in units.
    fn rounded(&self, scale: f64, last: f32) -> f64 {
        if last == 0.0 || self.greatest <= scale / 2.0 {
            return self.squares;
        }
        let inverse = (1.0 / scale).min(f64::from(f32::MAX)) as f32;
        self.sum(Term::Rounded { inverse, last }) * scale * scale
    }
}

/// The score whose root this is.
fn weight(root: f32) -> f64 {
    let root = f64::from(root) / LARGEST_ROOT;
    root * root
}

impl Side for Scored {
    fn error(&self, scale: f64, levels: u32) -> f64 {
        self.rounded(scale * self.per_unit, levels as f32)
    }

    fn errors(&self, scale: f64, levels: std::ops::RangeInclusive<u32>, limit: f64, errors: &mut Vec<f64>) {
        let scale = scale * self.per_unit;
        errors_by_level(Square, self.rounded(scale, UNCLIPPED), self.values(), scale, levels, limit, errors);
    }

    fn clipping(&self, end: f64) -> f64 {
        let end = end * self.per_unit;
        if end >= self.greatest { 0.0 } else { self.sum(Term::Beyond { end: end as f32 }) }
    }

    fn greatest(&self) -> f64 {
        self.greatest / self.per_unit
    }

    fn anchor(&self) -> Anchor {
        Anchor { magnitude: self.anchor.magnitude / self.per_unit, ..self.anchor }
    }

    fn fit(&self, scale: f64, levels: u32) -> Option<Fit> {
        let scale = scale * self.per_unit;
        let mut fit = Fit { products: 0.0, squares: 0.0 };
        for (x, weight) in self.values() {
            let level = nearest_level(x / scale).min(levels.into());
            fit.products += weight * x * level;
            fit.squares += weight * level * level;
        }
        Some(Fit { products: fit.products / self.per_unit, ..fit })
    }
}

/// A type, because a closure would not be compiled for each set of vector instructions.
struct Sum<'a> {
    groups: &'a [Group],
    term: Term,
    factor: f32,
}

impl pulp::NullaryFnOnce for Sum<'_> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        match self.term {
            Term::Rounded { inverse, last } => self.over(
                #[inline(always)]
                |x| rounded(x, inverse, last),
            ),
            Term::Beyond { end } => self.over(
                #[inline(always)]
                |x| beyond(x, end),
            ),
        }
    }
}

impl Sum<'_> {
    #[inline(always)]
    fn over(&self, error: impl Fn(f32) -> f32) -> f64 {
        in_blocks(
            self.groups,
            #[inline(always)]
            |group| {
                let mut squares = [0.0f32; LANES];
                for (place, (&x, &root)) in squares.iter_mut().zip(group.magnitudes.iter().zip(&group.roots)) {
                    let error = error(x) * root * self.factor;
                    *place = error * error;
                }
                squares
            },
        )
    }
}
