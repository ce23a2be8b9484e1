//! Tests of weighted histograms and of their counters.

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::statistics::channels::tests::{RUNNERS, Runner};
use crate::statistics::histogram::tests::{any_values, cut, finite_values, noise, of};

/// Relative error that another order of the sums may make.
const ROUNDING: f64 = 1e-9;

/// Enough for eight parts, and a rest.
const LENGTH: usize = 8 * PAIRS_PER_PART + 77;

fn counters(count: usize) -> Vec<WeightedCounter> {
    (0..count).map(|_| WeightedCounter::new()).collect()
}

fn observed(values: &[f32], gradients: &[f32], counters: &mut [WeightedCounter], runner: Runner) -> WeightedHistogram {
    let mut weights = WeightedHistogram::new();
    weights.observe(values, gradients, counters, runner);
    weights
}

fn weights_of(values: &[f32], gradients: &[f32]) -> WeightedHistogram {
    observed(values, gradients, &mut counters(1), RUNNERS[0])
}

/// A gradient for each value, of 20 orders of magnitude, one in ten of them 0.
fn gradients(length: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let gradient = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let exponent = (state >> 40) % 20;
        let mantissa = (state >> 33) as f32 / 2f32.powi(31) - 0.5;
        if (state >> 50).is_multiple_of(10) { 0.0 } else { mantissa * 10f32.powi(exponent as i32 - 10) }
    };
    (0..length).map(gradient).collect()
}

fn square(gradient: f32) -> f64 {
    f64::from(gradient) * f64::from(gradient)
}

/// The score of each bin and of the zeros, value by value; `None` if something is not finite.
fn naive(values: &[f32], gradients: &[f32]) -> Option<(BTreeMap<u32, f64>, f64)> {
    let (mut bins, mut zeros) = (BTreeMap::new(), 0.0);
    for (&x, &gradient) in values.iter().zip(gradients) {
        if !x.is_finite() || !gradient.is_finite() {
            return None;
        }
        if x.is_normal() {
            *bins.entry(x.to_bits() >> 13).or_default() += square(gradient);
        } else {
            zeros += square(gradient);
        }
    }
    bins.retain(|_, score| *score != 0.0);
    Some((bins, zeros))
}

fn is_near(a: f64, b: f64) -> bool {
    (a - b).abs() <= ROUNDING * a.abs().max(b.abs())
}

/// Whether two hold the same bins and, but for rounding, the same scores.
fn are_near(a: &WeightedHistogram, b: &WeightedHistogram) -> bool {
    let (bins, others) = (a.sparse(), b.sparse());
    let same = |((bin, score), (other, other_score)): (&(u32, f64), &(u32, f64))| {
        bin == other && is_near(*score, *other_score)
    };
    bins.len() == others.len() && bins.iter().zip(&others).all(same) && is_near(a.zeros, b.zeros)
}

/// All that can be read, to the bit.
fn bits(weights: &WeightedHistogram) -> (Vec<(u32, u64)>, u64, bool) {
    let bins = weights.sparse().into_iter().map(|(bin, score)| (bin, score.to_bits())).collect();
    (bins, weights.zeros().to_bits(), weights.is_finite())
}

#[test]
fn nothing_has_no_score() {
    let mut counters = counters(2);
    let nothing = observed(&[], &[], &mut counters, |_, _| panic!("nothing to do"));
    assert_eq!(nothing, WeightedHistogram::default());
    assert!(nothing.is_zero() && nothing.is_finite() && nothing.sparse().is_empty());
    assert_eq!(nothing.octave_sums().collect::<Vec<_>>(), [(WeightedHistogram::ZEROS, 0.0)]);
    // Scores of 0 leave no trace either.
    assert_eq!(weights_of(&[1.0, 0.0, -3.0], &[0.0, 0.0, -0.0]), nothing);
}

#[test]
fn sums_by_hand() {
    let values = [1.0, -1.0, 1.0001, 0.0, -0.0, 1e-40, -1e-40, 4.0];
    let weights = weights_of(&values, &[1.0, 2.0, -3.0, 1.0, -2.0, 3.0, 0.5, 5.0]);
    let [one, four, minus] = [1f32, 4.0, -1.0].map(|x| x.to_bits() >> 13);
    assert_eq!(weights.sparse(), [(one, 10.0), (four, 25.0), (minus, 4.0)]);
    assert_eq!((weights.zeros(), weights.total()), (14.25, 53.25));
    let sums = [(127, 10.0), (129, 25.0), (NEGATIVE + 127, 4.0), (WeightedHistogram::ZEROS, 14.25)];
    assert_eq!(weights.octave_sums().collect::<Vec<_>>(), sums);
    let mut scaled = weights.clone();
    scaled.scale(0.5);
    assert_eq!((scaled.sparse(), scaled.zeros()), (vec![(one, 5.0), (four, 12.5), (minus, 2.0)], 7.125));
    scaled.scale(0.0);
    assert_eq!(scaled, WeightedHistogram::new());
}

#[test]
fn nothing_that_is_not_finite_gets_lost() {
    let [nan, infinity] = [f32::NAN, f32::INFINITY];
    for length in [1, 2, 1023, 1024, 1025, LENGTH] {
        for (x, gradient) in [(nan, 0.0), (-nan, 1.0), (infinity, 0.0), (-infinity, 1.0), (1.0, nan), (0.0, -infinity)]
        {
            for place in [0, length / 2, length - 1] {
                let (mut values, mut gradients) = (vec![0.5; length], vec![1.0; length]);
                (values[place], gradients[place]) = (x, gradient);
                let mut counters = counters(3);
                let weights = observed(&values, &gradients, &mut counters, RUNNERS[0]);
                assert!(!weights.is_finite(), "{x} {gradient} at {place} of {length}");
                assert!(counters.iter().all(WeightedCounter::is_empty));
                let mut merged = weights_of(&[1.0], &[1.0]);
                merged.merge(&weights);
                merged.scale(2.0);
                assert!(!merged.is_finite() && !merged.within(0.0..=1.0).is_finite());
            }
        }
        assert!(!weights_of(&vec![nan; length], &vec![0.0; length]).is_finite());
    }
    assert!(!weights_of(&[1.0, 2.0], &[1.0]).is_finite());
    assert!(!weights_of(&[], &[1.0]).is_finite());
}

#[test]
fn tells_an_overflow() {
    let mut weights = weights_of(&[1.0, 2.0, 0.0], &[f32::MAX, f32::MAX, 1.0]);
    assert!(weights.is_finite());
    weights.scale(1e230);
    assert!(weights.is_finite());
    let half = weights.clone();
    for _ in 0..200 {
        weights.merge(&half);
    }
    assert!(!weights.is_finite() && !weights.is_zero());
}

#[test]
fn denormals_count_as_zero() {
    let values = [1e-40, -1e-40, 0.0, -0.0, f32::from_bits(1), f32::MIN_POSITIVE, -f32::MIN_POSITIVE];
    for times in [1, 500] {
        let weights = weights_of(&values.repeat(times), &[2.0; 7].repeat(times));
        assert_eq!(weights.zeros(), 20.0 * times as f64);
        let numbers: Vec<u32> = weights.sparse().into_iter().map(|(bin, _)| bin).collect();
        assert_eq!(numbers, [1 << 10, (1 << 10) + (1 << 18)]);
    }
}

#[test]
fn parts_are_drained_in_their_order() {
    let values = noise(LENGTH);
    let gradients = gradients(LENGTH, 3);
    let alone = weights_of(&values, &gradients);
    for count in [1, 2, 3, 8, 20] {
        let all: Vec<_> = RUNNERS
            .iter()
            .map(|&runner| {
                let mut counters = counters(count);
                let weights = observed(&values, &gradients, &mut counters, runner);
                assert!(counters.iter().all(WeightedCounter::is_empty));
                weights
            })
            .collect();
        assert!(all.iter().all(|weights| bits(weights) == bits(&all[0])), "{count} counters");
        assert!(are_near(&all[0], &alone), "{count} counters");
        // Each part by itself, one after the other.
        let parts = count.min(LENGTH / PAIRS_PER_PART);
        let mut streamed = WeightedHistogram::new();
        for number in 0..parts {
            let own = LENGTH * number / parts..LENGTH * (number + 1) / parts;
            streamed.observe(&values[own.clone()], &gradients[own], &mut [], RUNNERS[0]);
        }
        assert_eq!(bits(&all[0]), bits(&streamed), "{count} counters");
    }
}

#[test]
fn short_slices_are_one_part() {
    for (length, expected) in [(1, 1), (2 * PAIRS_PER_PART - 1, 1), (2 * PAIRS_PER_PART, 2), (LENGTH, 4)] {
        let mut weights = WeightedHistogram::new();
        let mut parts = 0;
        weights.observe(&vec![1.5; length], &vec![1.0; length], &mut counters(4), |count, run| {
            parts = count;
            (0..count).for_each(run);
        });
        assert_eq!((parts, weights.total()), (expected, length as f64));
        weights.observe(&[1.5], &[1.0], &mut [], |count, run| (0..count).for_each(run));
        assert_eq!(weights.total(), (length + 1) as f64);
    }
}

#[test]
fn refuses_bins_that_no_value_has() {
    let of = |bin: u32, score: f64, zeros: f64| WeightedHistogram::from_sparse([(bin, score)], zeros);
    let one = 1f32.to_bits() >> 13;
    let negative = 1 << 18;
    for bin in
        [0, 1023, negative, negative + 1023, negative - 1024, negative - 1, 2 * negative - 1024, 2 * negative, u32::MAX]
    {
        assert_eq!(of(bin, 1.0, 0.0), None, "{bin}");
    }
    for bin in [1024, negative - 1025, negative + 1024, 2 * negative - 1025] {
        assert!(of(bin, 1.0, 0.0).is_some(), "{bin}");
    }
    for score in [-1.0, f64::NAN, f64::INFINITY] {
        assert_eq!((of(one, score, 0.0), of(one, 1.0, score)), (None, None), "{score}");
    }
    assert_eq!(WeightedHistogram::from_sparse([(one, f64::MAX), (one + 1, f64::MAX)], 0.0), None);
    assert_eq!(of(one, 0.0, 0.0), Some(WeightedHistogram::new()));
}

#[test]
fn trims_belong_to_the_outermost_bins() {
    let counted = of(&[-3.001, -1.0001, 0.0, 1.0001, 2.0, 5.001]);
    let ends = |values: &[f32]| {
        let bins = counted.weighted_bins(&weights_of(values, &vec![1.0; values.len()]));
        bins.map(|bins| bins.iter().map(|bin| (bin.lo as f32, bin.hi as f32)).collect::<Vec<_>>())
    };
    let below_two = (2.0, 2.0 + 1.0 / 512.0);
    assert_eq!(ends(&[1.0001, 2.0, 5.001])[1], [(1.0001, 1.0 + 1.0 / 1024.0), below_two, (5.001, 5.001)]);
    assert_eq!(ends(&[-3.001, -1.0001])[0], [(1.0001, 1.0 + 1.0 / 1024.0), (3.001, 3.001)]);
    // Neither end has a score.
    assert_eq!(ends(&[0.0, 2.0]), [vec![], vec![below_two]]);
    // Scores where nothing was counted, beyond either end.
    let beyond = ends(&[0.5, 1.0001, 5.001, 6.0]);
    let five = (5.0, 5.0 + 1.0 / 256.0);
    assert_eq!(beyond[1], [(0.5, 0.5 + 1.0 / 2048.0), (1.0, 1.0 + 1.0 / 1024.0), five, (6.0, 6.0 + 1.0 / 256.0)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn equals_the_naive_sums(values in any_values(200), seed in any::<u64>(), odd in prop::option::weighted(0.2, any::<Index>())) {
        let mut gradients = gradients(values.len(), seed);
        if let (Some(odd), false) = (odd, values.is_empty()) {
            gradients[odd.index(values.len())] = f32::NAN;
        }
        let mut counters = counters(1);
        let weights = observed(&values, &gradients, &mut counters, RUNNERS[0]);
        prop_assert!(counters[0].is_empty());
        let expected = naive(&values, &gradients);
        prop_assert_eq!(weights.is_finite(), expected.is_some());
        let Some((bins, zeros)) = expected else { return Ok(()) };
        let read: BTreeMap<u32, f64> = weights.sparse().into_iter().collect();
        prop_assert!(read.keys().eq(bins.keys()));
        prop_assert!(read.values().zip(bins.values()).all(|(a, b)| is_near(*a, *b)));
        prop_assert!(is_near(weights.zeros(), zeros));
        prop_assert!(is_near(weights.total(), bins.values().sum::<f64>() + zeros));
        prop_assert_eq!(weights.is_zero(), bins.is_empty() && zeros == 0.0);
        let octaves: Vec<(u16, f64)> = weights.octave_sums().collect();
        prop_assert!(octaves.is_sorted_by(|a, b| a.0 < b.0));
        prop_assert!(is_near(octaves.iter().map(|(_, sum)| sum).sum(), weights.total()));
        let again = WeightedHistogram::from_sparse(weights.sparse(), weights.zeros());
        prop_assert_eq!(again.as_ref(), Some(&weights));
    }

    #[test]
    fn merging_is_observing_all(
        values in finite_values(200),
        seed in any::<u64>(),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
        rotation in any::<Index>(),
    ) {
        let gradients = gradients(values.len(), seed);
        let whole = weights_of(&values, &gradients);
        let pairs: Vec<(f32, f32)> = values.iter().copied().zip(gradients).collect();
        let mut parts = cut(&pairs, &cuts);
        let rotation = rotation.index(parts.len());
        parts.rotate_left(rotation);
        let (mut streamed, mut merged, mut counters) = (WeightedHistogram::new(), WeightedHistogram::new(), counters(1));
        for part in parts {
            let (values, gradients): (Vec<f32>, Vec<f32>) = part.iter().copied().unzip();
            streamed.observe(&values, &gradients, &mut counters, RUNNERS[0]);
            merged.merge(&weights_of(&values, &gradients));
        }
        prop_assert!(are_near(&streamed, &whole) && are_near(&merged, &whole));
    }

    #[test]
    fn equal_gradients_give_the_bins_of_the_histogram(values in finite_values(200)) {
        let histogram = of(&values);
        let bins = histogram.weighted_bins(&weights_of(&values, &vec![1.0; values.len()]));
        prop_assert_eq!(bins, [histogram.negative_bins(), histogram.positive_bins()]);
    }

    #[test]
    fn bins_ascend_whatever_was_counted(counted in finite_values(60), scored in finite_values(60)) {
        let weights = weights_of(&scored, &gradients(scored.len(), 5));
        let bins = of(&counted).weighted_bins(&weights);
        let mass: f64 = bins.iter().flatten().map(|bin| bin.mass).sum();
        prop_assert!(is_near(mass + weights.zeros(), weights.total()));
        for bins in bins {
            prop_assert!(bins.iter().all(|bin| bin.mass > 0.0 && 0.0 < bin.lo && bin.lo <= bin.hi));
            prop_assert!(bins.windows(2).all(|pair| pair[0].hi <= pair[1].lo && pair[0].lo < pair[1].lo));
        }
    }

    #[test]
    fn keeps_the_bins_that_a_range_touches(values in finite_values(100), ends in prop::array::uniform2(any::<Index>())) {
        prop_assume!(!values.is_empty());
        let [a, b] = ends.map(|end| values[end.index(values.len())]);
        let weights = weights_of(&values, &vec![1.0; values.len()]);
        let range = a.min(b)..=a.max(b);
        let kept = weights.within(range.clone());
        let key = |x: f32| if x.is_normal() { bin_of(x) } else { 0 };
        let inside: Vec<u32> = values.iter().filter(|x| range.contains(x)).map(|&x| key(x)).collect();
        for (bin, score) in weights.sparse() {
            let found = kept.sparse().into_iter().find(|(other, _)| *other == bin);
            // The ends are values, so that the bins of both are touched.
            prop_assert_eq!(found, inside.contains(&bin).then_some((bin, score)));
        }
        let has_zero = *range.start() <= 0.0 && *range.end() >= 0.0;
        prop_assert_eq!(kept.zeros(), if has_zero { weights.zeros() } else { 0.0 });
    }
}

/// A share of the mean is added to the score of each value, also where it had none, and of zeros.
#[test]
fn damping_adds_to_each_value() {
    let (values, gradients) = ([1.0, 1.0, -3.0, 0.0, 5.0, 1e-40], [2.0, 0.0, 1.0, 0.0, 0.0, 1.0]);
    let damped = weights_of(&values, &gradients).damped(&of(&values), 0.5);
    let scores: Vec<f64> = damped.sparse().into_iter().map(|(_, score)| score).collect();
    // The mean is 6 / 6, of which each value gets a half: 1, 1 in one bin, then 5, then −3.
    assert_eq!((scores, damped.zeros()), (vec![5.0, 0.5, 1.5], 2.0));
    let nothing = WeightedHistogram::new().damped(&Histogram::new(), 0.5);
    assert_eq!(nothing, WeightedHistogram::new());
}
