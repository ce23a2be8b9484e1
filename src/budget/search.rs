//! The search for an allotment: sites are decided one after the other, the largest first.
//!
//! For the sites that are not decided, the steps from width to width by noise saved per bit, as far as the bits reach, tell two
//! things of a partial choice: a whole choice that it can become, and, with a share of the first step that is too long, a bound
//! below which it cannot get. Kept are the partial choices that no other beats in both bits and noise, and whose bound is below
//! the best whole choice so far. As small sites come last, both lie so close together that few are left. It refuses to know what
//! bits are of.

use super::{Allotment, Site};
use crate::quantizer::Bits;

/// Partial choices that are kept at a time at most. Sites of real models need some hundreds; this bounds time and memory where
/// all bits are worth nearly the same.
const MOST_PARTIAL: usize = 1 << 14;

/// Bounds are sums of thousands of terms: their rounding must not drop a choice.
const ROUNDING: f64 = 1e-12;

/// A width that is worth its bits: no other of the site has as few bits and as little noise.
#[derive(Debug, Clone, Copy)]
struct Point {
    bits: Bits,
    cost: u64,
    noise: f64,
}

/// A step of one site to a wider width.
#[derive(Debug, Clone, Copy)]
struct Step {
    site: usize,
    /// The point that it leads to.
    to: usize,
    cost: u64,
    /// Noise saved.
    saved: f64,
}

impl Step {
    fn saved_per_bit(&self) -> f64 {
        self.saved / self.cost as f64
    }
}

/// The number of a point of each site.
type Choice = Vec<usize>;

/// The best choice within the budget, which at least the narrowest widths are; `start` is a width that is within it too.
pub(super) fn search(sites: &[Site], budget: u64, start: Option<Bits>) -> Allotment {
    let points: Vec<Vec<Point>> = sites.iter().map(points).collect();
    let room = budget - narrowest(&points);
    // A share of a step that is too long for any choice would make bounds useless.
    let within = |points: Vec<Point>| {
        let first = points.first().map_or(0, |point| point.cost);
        points.into_iter().filter(|point| point.cost - first <= room).collect()
    };
    let problem = Problem { points: points.into_iter().map(within).collect(), budget };
    let mut best = Whole::of(&problem, vec![0; sites.len()]);
    if let Some(start) = start.map(|bits| problem.nearest(bits)) {
        best.take(Whole::of(&problem, start));
    }
    let left_out = problem.decide(&mut best);
    let bits = best.choice.iter().zip(&problem.points).filter_map(|(&number, points)| Some(points.get(number)?.bits));
    Allotment { bits: bits.collect(), used: best.used, noise: best.noise, least_noise: best.noise.min(left_out) }
}

/// The widths of a site that are worth their bits, by ascending cost and descending noise.
fn points(site: &Site) -> Vec<Point> {
    let point = |width: &super::Width| Point { bits: width.bits, cost: site.cost(width.bits), noise: width.noise };
    let mut all: Vec<Point> = site.widths.iter().map(point).collect();
    all.sort_by(|a, b| a.cost.cmp(&b.cost).then(a.noise.total_cmp(&b.noise)).then(a.bits.cmp(&b.bits)));
    let mut kept: Vec<Point> = Vec::new();
    for point in all {
        if kept.last().is_none_or(|last| point.noise < last.noise) {
            kept.push(point);
        }
    }
    kept
}

/// The bits of all sites at their narrowest.
fn narrowest(points: &[Vec<Point>]) -> u64 {
    points.iter().filter_map(|points| points.first()).map(|point| point.cost).sum()
}

/// The steps of a site along its convex hull: each saves less per bit than the one before.
fn steps(site: usize, points: &[Point]) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut from = 0;
    while let Some(start) = points.get(from) {
        let step = |(to, point): (usize, &Point)| Step {
            site,
            to,
            cost: point.cost - start.cost,
            saved: start.noise - point.noise,
        };
        let later = points.iter().enumerate().skip(from + 1).map(step);
        // Of equal ones the longest, so that no two steps of a site are equal.
        let best = later.max_by(|a, b| a.saved_per_bit().total_cmp(&b.saved_per_bit()).then(a.to.cmp(&b.to)));
        let Some(best) = best else { break };
        from = best.to;
        steps.push(best);
    }
    steps
}

/// A choice for all sites.
struct Whole {
    choice: Choice,
    used: u64,
    noise: f64,
}

impl Whole {
    fn of(problem: &Problem, choice: Choice) -> Self {
        let chosen = || choice.iter().zip(&problem.points).filter_map(|(&number, points)| points.get(number));
        let (used, noise) = (chosen().map(|point| point.cost).sum(), chosen().map(|point| point.noise).sum());
        Self { choice, used, noise }
    }

    fn take(&mut self, other: Self) {
        if other.noise.total_cmp(&self.noise).then(other.used.cmp(&self.used)).is_lt() {
            *self = other;
        }
    }
}

/// A choice for the sites that are decided.
#[derive(Clone, Copy)]
struct Partial {
    used: u64,
    noise: f64,
    last: Decision,
}

/// The point of the site that was decided last, and where in the list of all decisions the one before it stands.
#[derive(Clone, Copy)]
struct Decision {
    before: u32,
    point: u8,
}

/// The sites that are not decided.
struct Rest {
    /// Of all at their narrowest.
    cost: u64,
    noise: f64,
    /// By noise saved per bit.
    steps: Vec<Step>,
    /// Bits and noise saved of the first so many steps.
    sums: Vec<(u64, f64)>,
}

impl Rest {
    /// `steps` of these sites and others, by noise saved per bit.
    fn new(problem: &Problem, steps: &[Step], is_decided: &[bool]) -> Self {
        let open = problem.points.iter().zip(is_decided).filter(|(_, decided)| !**decided);
        let first = open.filter_map(|(points, _)| points.first());
        let (cost, noise) = first.fold((0, 0.0), |sum, point| (sum.0 + point.cost, sum.1 + point.noise));
        let is_open = |step: &&Step| is_decided.get(step.site) == Some(&false);
        let steps: Vec<Step> = steps.iter().filter(is_open).copied().collect();
        let sums = std::iter::once((0, 0.0)).chain(steps.iter().scan((0, 0.0), |sum, step| {
            *sum = (sum.0 + step.cost, sum.1 + step.saved);
            Some(*sum)
        }));
        Self { cost, noise, sums: sums.collect(), steps }
    }

    /// How many steps `partial` can go, the noise that it has then, and the noise below which it cannot get.
    fn bounds(&self, partial: &Partial, budget: u64) -> (usize, f64, f64) {
        let room = budget.saturating_sub(partial.used + self.cost);
        let count = self.sums.partition_point(|&(cost, _)| cost <= room).saturating_sub(1);
        let (cost, saved) = self.sums.get(count).copied().unwrap_or_default();
        let reached = partial.noise + (self.noise - saved);
        let share = self.steps.get(count).map_or(0.0, |step| step.saved_per_bit() * (room - cost) as f64);
        (count, reached, reached - share)
    }
}

struct Problem {
    /// Of each site, at least one.
    points: Vec<Vec<Point>>,
    budget: u64,
}

impl Problem {
    /// The points of this width; where a site has none, that below, or the first.
    fn nearest(&self, bits: Bits) -> Choice {
        let of = |points: &Vec<Point>| points.iter().rposition(|point| point.bits <= bits).unwrap_or(0);
        self.points.iter().map(of).collect()
    }

    /// Sites with a choice, the largest first.
    fn order(&self) -> Vec<usize> {
        let length = |points: &[Point]| Some(points.last()?.cost - points.first()?.cost);
        let all = self.points.iter().enumerate().filter(|(_, points)| points.len() > 1);
        let mut order: Vec<usize> = all.map(|(site, _)| site).collect();
        order.sort_by_key(|&site| std::cmp::Reverse(self.points.get(site).and_then(|points| length(points))));
        order
    }

    /// Finds the best choice, and returns a bound of those that were left out; infinite if none was.
    fn decide(&self, best: &mut Whole) -> f64 {
        let mut steps: Vec<Step> =
            self.points.iter().enumerate().flat_map(|(site, points)| steps(site, points)).collect();
        let saved_per_bit = |step: &Step| step.saved_per_bit();
        steps.sort_by(|a, b| saved_per_bit(b).total_cmp(&saved_per_bit(a)).then((a.site, a.to).cmp(&(b.site, b.to))));
        let slack = ROUNDING * self.points.iter().filter_map(|points| points.first()).map(|it| it.noise).sum::<f64>();
        let order = self.order();
        let mut is_decided: Vec<bool> = vec![false; self.points.len()];
        let mut partial = vec![Partial { used: 0, noise: 0.0, last: Decision { before: 0, point: 0 } }];
        let mut decisions: Vec<Decision> = Vec::new();
        let mut left_out = f64::INFINITY;
        for depth in 0..=order.len() {
            let rest = Rest::new(self, &steps, &is_decided);
            let decided = order.get(..depth).unwrap_or_default();
            let bounds = |own: &Partial| rest.bounds(own, self.budget);
            let reached = |own: &Partial| bounds(own).1;
            let nearest = partial.iter().min_by(|a, b| reached(a).total_cmp(&reached(b)).then(a.used.cmp(&b.used)));
            if let Some(own) = nearest {
                let steps = rest.steps.get(..bounds(own).0).unwrap_or_default();
                best.take(Whole::of(self, self.finished(own, (&decisions, decided), steps)));
            }
            partial.retain(|own| bounds(own).2 <= best.noise + slack);
            if partial.len() > MOST_PARTIAL {
                let bound = |own: &Partial| bounds(own).2;
                partial.sort_by(|a, b| bound(a).total_cmp(&bound(b)).then(a.used.cmp(&b.used)));
                left_out = partial.drain(MOST_PARTIAL..).map(|own| bound(&own)).fold(left_out, f64::min);
            }
            let Some((&site, points)) = order.get(depth).and_then(|site| Some((site, self.points.get(*site)?))) else {
                break;
            };
            if let Some(decided) = is_decided.get_mut(site) {
                *decided = true;
            }
            let narrowest = rest.cost - points.first().map_or(0, |point| point.cost);
            let before = u32::try_from(decisions.len()).unwrap_or(u32::MAX);
            decisions.extend(partial.iter().map(|own| own.last));
            partial = not_beaten(self.further(&partial, before, points, narrowest));
        }
        left_out
    }

    /// Each of the partial choices, which stand from `before` on in the list of decisions, with each of these points.
    fn further(&self, partial: &[Partial], before: u32, points: &[Point], narrowest: u64) -> Vec<Partial> {
        let mut further = Vec::with_capacity(partial.len() * points.len());
        for (own, before) in partial.iter().zip(before..) {
            for (point, number) in points.iter().zip(0..) {
                let used = own.used + point.cost;
                if used + narrowest <= self.budget {
                    further.push(Partial {
                        used,
                        noise: own.noise + point.noise,
                        last: Decision { before, point: number },
                    });
                }
            }
        }
        further
    }

    /// A partial choice with so many steps of the other sites.
    fn finished(&self, partial: &Partial, (decisions, decided): (&[Decision], &[usize]), steps: &[Step]) -> Choice {
        let mut choice = vec![0; self.points.len()];
        let mut last = partial.last;
        for &site in decided.iter().rev() {
            if let Some(own) = choice.get_mut(site) {
                *own = last.point.into();
            }
            let before = usize::try_from(last.before).ok().and_then(|place| decisions.get(place));
            last = before.copied().unwrap_or(last);
        }
        for step in steps {
            if let Some(own) = choice.get_mut(step.site) {
                *own = step.to;
            }
        }
        choice
    }
}

/// Those than which no other has both fewer bits and less noise, by ascending bits.
fn not_beaten(mut all: Vec<Partial>) -> Vec<Partial> {
    all.sort_by(|a, b| a.used.cmp(&b.used).then(a.noise.total_cmp(&b.noise)).then(a.last.before.cmp(&b.last.before)));
    let mut least = f64::INFINITY;
    all.retain(|own| {
        let is_kept = own.noise < least;
        least = least.min(own.noise);
        is_kept
    });
    all
}
