//! Tests of the histogram, and the kinds of values that tests of other statistics use too.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

const NOT_FINITE: [f32; 4] = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

/// Finite values of one kind or of all: normal, narrow, tiny and denormal, huge, any bits, one value; some in runs.
pub(in crate::statistics) fn finite_values(most_runs: usize) -> BoxedStrategy<Vec<f32>> {
    let finite = |bits: u32| if f32::from_bits(bits).is_finite() { bits } else { bits & !(1 << 30) };
    let special = [0.0, -0.0, 1.0, -1.0, 6.0, 1e-40, -1e-40, f32::MIN_POSITIVE, -f32::MIN_POSITIVE, f32::MAX, f32::MIN];
    let kinds = [
        (-10f32..10.0).boxed(),
        (0.99f32..1.01).boxed(),
        (-1e-37f32..1e-37).boxed(),
        (-f32::MAX..f32::MAX).boxed(),
        any::<u32>().prop_map(move |bits| f32::from_bits(finite(bits))).boxed(),
        prop::sample::select(special.to_vec()).boxed(),
    ];
    let mut streams: Vec<_> = kinds.iter().map(|kind| in_runs(kind.clone(), most_runs)).collect();
    streams.push(in_runs(prop::strategy::Union::new(kinds.clone()).boxed(), most_runs));
    streams.push((prop::strategy::Union::new(kinds), 1usize..50).prop_map(|(x, n)| vec![x; n]).boxed());
    prop::strategy::Union::new(streams).boxed()
}

/// The same, NaN and infinities among them in one stream of three.
pub(in crate::statistics) fn any_values(most_runs: usize) -> BoxedStrategy<Vec<f32>> {
    let odd = prop::collection::vec((any::<Index>(), prop::sample::select(NOT_FINITE.to_vec())), 1..5);
    let mixed = (finite_values(most_runs), odd).prop_map(|(mut values, odd)| {
        odd.iter().for_each(|(place, x)| values.insert(place.index(values.len() + 1), *x));
        values
    });
    prop_oneof![2 => finite_values(most_runs), 1 => mixed].boxed()
}

fn in_runs(value: BoxedStrategy<f32>, most_runs: usize) -> BoxedStrategy<Vec<f32>> {
    let run = (value, prop_oneof![4 => Just(1usize), 1 => 1usize..100]).prop_map(|(x, n)| vec![x; n]);
    prop::collection::vec(run, 0..=most_runs).prop_map(|runs| runs.concat()).boxed()
}

/// As many finite values: like activations, with zeros, runs and now and then any bits.
pub(in crate::statistics) fn noise(length: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut values = Vec::with_capacity(length);
    while values.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bits = (state >> 32) as u32;
        match bits % 32 {
            0 => values.extend([0.0; 9]),
            1 => values.push(-0.0),
            2 if bits.is_multiple_of(1024) => values.push(f32::from_bits(state as u32 & !(1 << 30))),
            _ => values.push(bits as f32 / 2f32.powi(30) - 2.0),
        }
    }
    values.truncate(length);
    values
}

/// The parts between the cuts, some of them empty.
pub(in crate::statistics) fn cut<'a, T>(values: &'a [T], cuts: &[Index]) -> Vec<&'a [T]> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(values.len() + 1)).collect();
    ends.extend([0, values.len()]);
    ends.sort_unstable();
    ends.windows(2).map(|ends| &values[ends[0]..ends[1]]).collect()
}

/// All that can be read, to the bit: `==` alone does not tell zeros apart.
pub(in crate::statistics) fn readings(histogram: &Histogram) -> String {
    let Histogram { min_max, .. } = histogram;
    let (positive, negative) = (histogram.positive_bins(), histogram.negative_bins());
    format!("{min_max:?} {positive:?} {negative:?} {:?}", histogram.moments())
}

pub(in crate::statistics) fn of(values: &[f32]) -> Histogram {
    let mut histogram = Histogram::new();
    histogram.observe(values, &mut Counter::new());
    histogram
}

/// The number of each bin and its count.
fn naive_counts(values: &[f32]) -> BTreeMap<u32, u64> {
    let mut counts = BTreeMap::new();
    for x in values.iter().filter(|x| x.is_normal()) {
        *counts.entry(x.to_bits() >> 13).or_default() += 1;
    }
    counts
}

/// Bins with a sign.
fn signed_bins(histogram: &Histogram) -> Vec<(f32, Bin)> {
    let positive = histogram.positive_bins().into_iter().map(|bin| (1.0, bin));
    positive.chain(histogram.negative_bins().into_iter().map(|bin| (-1.0, bin))).collect()
}

fn number_of(sign: f32, bin: &Bin) -> u32 {
    (sign * bin.lo as f32).to_bits() >> 13
}

/// The histogram merged with itself this many times.
fn doubled(histogram: &Histogram, times: u32) -> Histogram {
    let mut sum = histogram.clone();
    for _ in 0..times {
        let half = sum.clone();
        sum.merge(&half);
    }
    sum
}

fn is_wide(histogram: &Histogram) -> Vec<bool> {
    histogram.octaves.0.values().map(|counts| matches!(counts, Counts::Wide(_))).collect()
}

/// Where a value counts: its bin, or among the zeros.
fn place(x: f32) -> u32 {
    if x.abs() < f32::MIN_POSITIVE { 0 } else { bin_of(x) }
}

#[test]
fn nothing_has_no_bins_and_no_moments() {
    for nothing in [Histogram::new(), of(&[]), of(&[f32::NAN, f32::INFINITY])] {
        assert!(signed_bins(&nothing).is_empty());
        assert_eq!(nothing.moments(), None);
        assert_eq!(nothing.without_outliers(1.0), nothing);
    }
    assert_eq!(Histogram::new(), Histogram::default());
}

#[test]
fn a_constant_is_one_bin_without_width() {
    for x in [0.1, 6.0, 2e-38, f32::MIN_POSITIVE, f32::MAX, 1.0] {
        let (positive, negative) = (of(&[x; 3]), of(&[-x; 3]));
        let bin = Bin { lo: x.into(), hi: x.into(), mass: 3.0 };
        assert_eq!((positive.positive_bins(), positive.negative_bins()), (vec![bin], vec![]));
        assert_eq!((negative.positive_bins(), negative.negative_bins()), (vec![], vec![bin]));
        let moments = Moments { mean: x.into(), standard_deviation: 0.0 };
        assert_eq!(positive.moments(), Some(moments));
        assert_eq!(positive.without_outliers(0.5), positive, "{x}");
        assert_eq!(negative.without_outliers(0.5), negative, "{x}");
    }
    let zeros = of(&[0.0, -0.0, 1e-40]);
    assert_eq!(zeros.moments(), Some(Moments { mean: 0.0, standard_deviation: 0.0 }));
    assert_eq!(readings(&zeros.without_outliers(0.5)), readings(&zeros));
    assert!(zeros.octaves.0.is_empty());
}

#[test]
fn drains_in_time() {
    let values = noise(3 * DRAINED_AFTER + 5);
    let mut merged = Histogram::new();
    values.chunks(1000).rev().for_each(|part| merged.merge(&of(part)));
    let at_once = of(&values);
    assert!(merged == at_once);
    assert_eq!(at_once.octaves.counts(), naive_counts(&values));
}

#[test]
fn counts_beyond_32_bits() {
    let parts = [vec![1.5], vec![1.25; 3], vec![-2.0], vec![0.0; 2]];
    let small = of(&parts.concat());
    let large = doubled(&small, 33);
    assert_eq!(is_wide(&large), [true, true]);
    assert_eq!(large.count(), 7 << 33);
    assert_eq!(large.observed().unwrap().unwrap().zeros(), 2 << 33);
    let times = |(sign, bin): (f32, Bin)| (sign, Bin { mass: bin.mass * 2f64.powi(33), ..bin });
    assert_eq!(signed_bins(&large), signed_bins(&small).into_iter().map(times).collect::<Vec<_>>());
    // Powers of two do not change the rounding of any sum.
    assert_eq!(large.moments(), small.moments());

    let mut in_parts = Histogram::new();
    parts.iter().rev().for_each(|part| in_parts.merge(&doubled(&of(part), 33)));
    assert_eq!(in_parts, large);
    let mut narrow_last = doubled(&small, 33);
    narrow_last.merge(&small);
    let mut narrow_first = small.clone();
    narrow_first.merge(&large);
    assert_eq!(narrow_first, narrow_last);
    let mut observed_last = large;
    observed_last.observe(&parts.concat(), &mut Counter::new());
    assert_eq!(observed_last, narrow_last);
    assert_eq!(narrow_last.without_outliers(1e6), narrow_last);
}

#[test]
fn wide_from_2_to_the_32_on() {
    let one = of(&[1.0]);
    let powers: Vec<Histogram> = (0..32).map(|times| doubled(&one, times)).collect();
    let mut ascending = Histogram::new();
    powers.iter().for_each(|power| ascending.merge(power));
    assert_eq!((is_wide(&ascending), ascending.count()), (vec![false], u64::from(u32::MAX)));
    assert_eq!(ascending.without_outliers(1.0), ascending);
    ascending.merge(&one);
    assert_eq!((is_wide(&ascending), ascending.count()), (vec![true], 1 << 32));
    let mut descending = one.clone();
    powers.iter().rev().for_each(|power| descending.merge(power));
    assert_eq!(descending, ascending);
    assert_eq!(doubled(&one, 32), ascending);
    // The limit is for the whole octave, one bin or many.
    let mut two_bins = doubled(&one, 31);
    two_bins.merge(&doubled(&of(&[1.5]), 31));
    assert_eq!(is_wide(&two_bins), [true]);
}

#[test]
fn narrow_again_without_outliers() {
    let mut histogram = doubled(&of(&[1.0, 1.9]), 33);
    let middle = of(&[1.45; 5]);
    histogram.merge(&middle);
    let kept = histogram.without_outliers(0.5);
    assert_eq!((is_wide(&histogram), is_wide(&kept), kept.count()), (vec![true], vec![false], 5));
    assert_eq!(kept.octaves, middle.octaves);
}

#[test]
fn nothing_may_be_left_without_outliers() {
    let histogram = of(&[-1.0, 1.0, f32::NAN]);
    assert_eq!(histogram.without_outliers(0.5).count(), 1, "the NaN must not be hidden");
    let nothing = of(&[-1.0, 1.0]).without_outliers(0.5);
    assert_eq!((nothing.count(), nothing.observed()), (0, Ok(None)));
    assert_eq!(nothing, Histogram::new());
}

#[test]
fn an_outlier_goes_and_its_neighbours_stay() {
    let mut values: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) / 100.0).collect();
    let inner = of(&values);
    values.extend([1000.0, -900.0]);
    let kept = of(&values).without_outliers(6.0);
    assert_eq!(kept.octaves, inner.octaves);
    let seen = kept.observed().unwrap().unwrap();
    assert_eq!((seen.count(), seen.zeros()), (1000, 1));
    // The edges of the outermost bins; those next to zero are the data's own.
    assert_eq!((seen.smallest_positive(), seen.largest_negative()), (0.01, -0.01));
    assert!((4.99..4.99 * (1.0 + 1.0 / 1024.0)).contains(&seen.max()), "{}", seen.max());
    assert!((-5.0 * (1.0 + 1.0 / 1024.0)..=-5.0).contains(&seen.min()), "{}", seen.min());
}

impl Octaves {
    fn counts(&self) -> BTreeMap<u32, u64> {
        let mut all = BTreeMap::new();
        for (&octave, counts) in &self.0 {
            counts.for_each(|index, count| {
                all.insert((u32::from(octave) << 10) + index, count);
            });
        }
        all
    }
}

/// A largest value on the edge of a bin says nothing of the bin below.
#[test]
fn a_largest_value_alone_is_a_bin_of_no_width() {
    for sign in [1.0, -1.0] {
        let bins_of = |values: &[f32]| {
            let histogram = of(&values.iter().map(|x| x * sign).collect::<Vec<_>>());
            let bins = if sign > 0.0 { histogram.positive_bins() } else { histogram.negative_bins() };
            bins.iter().map(|bin| (bin.lo, bin.hi, bin.mass as u64)).collect::<Vec<_>>()
        };
        let below = (8.0 - 1.0 / 256.0, 8.0, 1);
        assert_eq!(bins_of(&[1.0, 7.999, 8.0]), [(1.0, 1.0 + 1.0 / 1024.0, 1), below, (8.0, 8.0, 1)]);
        assert_eq!(bins_of(&[1.0, 8.001])[1..], [(f64::from(8.001f32), f64::from(8.001f32), 1)]);
        assert_eq!(bins_of(&[1.0, 8.001, 8.002])[1..], [(8.0, f64::from(8.002f32), 2)]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn equals_the_naive_counts(values in any_values(300)) {
        let histogram = of(&values);
        let expected = naive_counts(&values);
        let finite: Vec<f32> = finite_of(&values);
        let zeros = finite.iter().filter(|x| x.abs() < f32::MIN_POSITIVE).count() as u64;
        prop_assert_eq!(histogram.count(), values.len() as u64);
        let nans = values.iter().filter(|x| x.is_nan()).count() as u64;
        match histogram.observed() {
            Err(found) => {
                let infinities = (values.len() - finite.len()) as u64 - nans;
                prop_assert_eq!(found, NotFinite { nans, infinities, count: values.len() as u64 });
                prop_assert!(finite.len() < values.len());
            }
            Ok(None) => prop_assert!(values.is_empty()),
            Ok(Some(seen)) => {
                prop_assert_eq!(seen.min(), finite.iter().copied().fold(f32::INFINITY, f32::min));
                prop_assert_eq!(seen.max(), finite.iter().copied().fold(f32::NEG_INFINITY, f32::max));
                prop_assert_eq!((seen.count(), seen.zeros()), (values.len() as u64, zeros));
            }
        }
        let signed = signed_bins(&histogram);
        let read: BTreeMap<u32, u64> = signed.iter().map(|(sign, bin)| (number_of(*sign, bin), bin.mass as u64)).collect();
        prop_assert_eq!(&read, &expected);
        prop_assert_eq!(read.len(), signed.len());
        prop_assert_eq!(&histogram.octaves.counts(), &expected);
        prop_assert_eq!(signed.iter().map(|(_, bin)| bin.mass as u64).sum::<u64>() + zeros, finite.len() as u64);
    }

    #[test]
    fn bins_ascend_and_end_at_the_extremes(values in any_values(300)) {
        let histogram = of(&values);
        for (sign, bins) in [(1.0, histogram.positive_bins()), (-1.0, histogram.negative_bins())] {
            let of_sign = values.iter().filter(|x| x.is_normal() && x.signum() == sign);
            let mut magnitudes: Vec<f64> = of_sign.map(|&x| f64::from(x.abs())).collect();
            magnitudes.sort_by(f64::total_cmp);
            prop_assert_eq!(bins.first().map(|bin| bin.lo), magnitudes.first().copied());
            prop_assert_eq!(bins.last().map(|bin| bin.hi), magnitudes.last().copied());
            prop_assert!(bins.windows(2).all(|pair| pair[0].hi <= pair[1].lo));
            let mut rest = magnitudes.as_slice();
            for bin in bins {
                prop_assert!(bin.mass > 0.0 && bin.lo <= bin.hi && bin.hi - bin.lo <= bin.lo / 1024.0, "{bin:?}");
                let (own, others) = rest.split_at(bin.mass as usize);
                prop_assert!(bin.lo <= own[0] && own[own.len() - 1] <= bin.hi, "{bin:?}");
                rest = others;
            }
        }
    }

    #[test]
    fn order_and_parts_do_not_matter(
        (values, shuffled) in any_values(200).prop_flat_map(|values| (Just(values.clone()), Just(values).prop_shuffle())),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
        rotation in any::<Index>(),
    ) {
        let whole = of(&values);
        let mut parts = cut(&shuffled, &cuts);
        let rotation = rotation.index(parts.len());
        parts.rotate_left(rotation);
        let (mut streamed, mut merged, mut counter) = (Histogram::new(), Histogram::new(), Counter::new());
        for part in &parts {
            streamed.observe(part, &mut counter);
            merged.merge(&of(part));
        }
        let mut in_a_tree = Histogram::new();
        for pair in parts.chunks(2) {
            let mut own = Histogram::new();
            pair.iter().rev().for_each(|part| own.merge(&of(part)));
            own.merge(&in_a_tree);
            in_a_tree = own;
        }
        for other in [streamed, merged, in_a_tree] {
            prop_assert!(other == whole);
            prop_assert_eq!(readings(&other), readings(&whole));
        }
    }

    /// A value is at most half a bin, so 2^-11 of its magnitude, from the centre of its bin; the spread within bins adds
    /// at most 2^-10 / sqrt(12). What counts as zero is off by less than 2^-126.
    #[test]
    fn moments_are_those_of_the_values(values in finite_values(300)) {
        let moments = of(&values).moments();
        prop_assert_eq!(moments.is_none(), values.is_empty());
        let Some(Moments { mean, standard_deviation }) = moments else { return Ok(()) };
        let mean_of = |f: &dyn Fn(f64) -> f64| values.iter().map(|&x| f(x.into())).sum::<f64>() / values.len() as f64;
        let naive_mean = mean_of(&|x| x);
        let naive_deviation = mean_of(&|x| (x - naive_mean).powi(2)).sqrt();
        let flushed = 2.0 * f64::from(f32::MIN_POSITIVE);
        let bin = 2f64.powi(-11) * (1.0 + 1e-9);
        prop_assert!((mean - naive_mean).abs() <= bin * mean_of(&f64::abs) + flushed, "{mean} {naive_mean}");
        let budget = bin * (1.0 + 2.0 / 12f64.sqrt()) * mean_of(&|x| x * x).sqrt() + flushed;
        let found = (standard_deviation - naive_deviation).abs();
        prop_assert!(found <= budget, "{standard_deviation} {naive_deviation}");
    }

    #[test]
    fn without_outliers_keeps_whole_bins(values in finite_values(200), deviations in 0.05f64..4.0) {
        let histogram = of(&values);
        let Some(Moments { mean, standard_deviation }) = histogram.moments() else { return Ok(()) };
        let is_inside = |x: f64| (x - mean).abs() <= deviations * standard_deviation;
        let bins = signed_bins(&histogram).into_iter();
        let inside = bins.filter(|(sign, bin)| is_inside(f64::from(*sign) * bin.centre()));
        let numbers: HashSet<u32> = inside.map(|(sign, bin)| number_of(sign, &bin)).collect();
        let is_kept = |x: f32| if place(x) == 0 { is_inside(0.0) } else { numbers.contains(&bin_of(x)) };
        let expected = of(&values.iter().copied().filter(|&x| is_kept(x)).collect::<Vec<_>>());
        let kept = histogram.without_outliers(deviations);
        prop_assert!(kept.octaves == expected.octaves);
        prop_assert_eq!(kept.count(), expected.count());
        let (kept, expected) = (kept.observed().unwrap(), expected.observed().unwrap());
        prop_assert_eq!(kept.is_some(), expected.is_some());
        let (Some(kept), Some(expected)) = (kept, expected) else { return Ok(()) };
        prop_assert_eq!(kept.zeros(), expected.zeros());
        let all = histogram.observed().unwrap().unwrap();
        for (outer, kept, exact, sign) in [
            (all.max(), kept.max(), expected.max(), 1.0),
            (all.min(), kept.min(), expected.min(), -1.0),
            (-all.smallest_positive(), -kept.smallest_positive(), -expected.smallest_positive(), 1.0),
            (-all.largest_negative(), -kept.largest_negative(), -expected.largest_negative(), -1.0),
        ] {
            prop_assert_eq!(place(kept), place(exact), "{} {}", kept, exact);
            let is_between = sign * exact <= sign * kept && sign * kept <= sign * outer;
            prop_assert!(is_between || place(exact) == 0, "{} {} {}", exact, kept, outer);
        }
    }

    #[test]
    fn all_is_inside_of_many_deviations(values in any_values(200)) {
        let histogram = of(&values);
        let kept = histogram.without_outliers(1e9);
        prop_assert!(kept == histogram);
        prop_assert_eq!(readings(&kept), readings(&histogram));
    }
}
