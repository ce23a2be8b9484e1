//! The same tensor ops that run on a GPU, run here on the processor, against the code for slices.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::statistics::{Activation, ChannelLayout, Counter, WeightedHistogram};

const SPECIAL: [f32; 18] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    6.0,
    1e-40,
    -1e-40,
    1e-45,
    -1e-45,
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE,
    f32::MAX,
    f32::MIN,
    f32::NAN,
    -f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    1.0 + f32::EPSILON,
];

fn any_value() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -10f32..10.0,
        2 => -1e-37f32..1e-37,
        2 => any::<u32>().prop_map(f32::from_bits),
        1 => select(SPECIAL.to_vec()),
    ]
}

/// Values of one kind or of all; finite ones alone in most streams.
fn stream(length: usize) -> impl Strategy<Value = Vec<f32>> {
    let finite = |x: f32| if x.is_finite() { x } else { 0.5 };
    let of = |value: BoxedStrategy<f32>| prop::collection::vec(value, length);
    prop_oneof![
        3 => of(any_value().prop_map(finite).boxed()),
        2 => of(prop_oneof![Just(0.0f32), -3f32..3.0].boxed()),
        1 => of(any_value().boxed()),
        1 => of(select(SPECIAL[..11].to_vec()).boxed()),
        1 => any_value().prop_map(move |x| vec![x; length]),
        1 => of((-1e-39f32..-1e-41).boxed()),
    ]
}

fn shared() -> Shared {
    Shared::new(Device::Cpu).unwrap()
}

fn by_slices(tensors: &[Vec<f32>], layout: ChannelLayout) -> Activation {
    let mut activation = Activation::new();
    let mut counters = [Counter::new()];
    for values in tensors {
        activation.observe(values, layout, &mut counters, |count, work| (0..count).for_each(work));
    }
    activation
}

fn by_tensors(tensors: &[Vec<f32>], layout: ChannelLayout) -> Counts {
    let (mut counts, shared) = (Counts::default(), shared());
    for values in tensors {
        counts.observe(&Tensor::from_slice(values), layout, &shared).unwrap();
    }
    counts
}

/// Every number, to the bit: equality alone takes 0.0 for −0.0.
fn numbers(activation: &Activation) -> Vec<u64> {
    let bins = [activation.histogram.negative_bins(), activation.histogram.positive_bins()].concat();
    let bins = bins.iter().flat_map(|bin| [bin.lo, bin.hi, bin.mass]).map(f64::to_bits);
    let channels = activation.channels.get().unwrap_or_default().iter();
    let channels = channels.flat_map(|channel| {
        let [min, max] = [channel.min(), channel.max()].map(|x| u64::from(x.to_bits()));
        [channel.count(), min, max, channel.sum().to_bits(), channel.mean().to_bits()]
    });
    let extremes = activation.observed().ok().flatten().map_or([0; 4], |seen| {
        [seen.min(), seen.max(), seen.smallest_positive(), seen.largest_negative()].map(|x| u64::from(x.to_bits()))
    });
    bins.chain(channels).chain(extremes).collect()
}

fn check(tensors: &[Vec<f32>], layout: ChannelLayout) -> Result<(), TestCaseError> {
    let expected = by_slices(tensors, layout);
    let mut counts = by_tensors(tensors, layout);
    let is_finite = are_finite(std::slice::from_ref(&counts)).unwrap();
    let found = counts.read().unwrap();
    prop_assert_eq!(found, &expected);
    prop_assert_eq!(numbers(found), numbers(&expected));
    prop_assert_eq!(is_finite, [expected.observed().is_ok()]);
    Ok(())
}

#[test]
fn nothing_was_seen() {
    let layout = ChannelLayout { count: 3, run_length: 2 };
    assert_eq!(Counts::default().read().unwrap(), &Activation::new());
    assert_eq!(by_tensors(&[Vec::new()], layout).read().unwrap(), &Activation::new());
    assert_eq!(are_finite(&[]).unwrap(), [false; 0]);
    assert_eq!(Scores::new(&shared()).unwrap().read().unwrap(), WeightedHistogram::new());
}

/// Each special value alone, and among others, in a tensor of one channel and of two.
#[test]
fn special_values() {
    for x in SPECIAL {
        for values in [vec![x], vec![x, x], vec![1.0, x, -2.0, 0.0], vec![x, -1e-40, x, 3e-39]] {
            for count in [1, 2] {
                let layout = ChannelLayout { count, run_length: 1 };
                check(std::slice::from_ref(&values), layout).unwrap_or_else(|error| panic!("{values:?}: {error}"));
            }
        }
    }
}

/// Tables are drained, channels change, and a tensor is no whole number of rows.
#[test]
fn more_than_a_table_takes_and_other_channels() {
    let layout = |count, run_length| ChannelLayout { count, run_length };
    let values: Vec<f32> = (0..3 << 15).map(|number| ((number * 37) % 1001) as f32 - 500.0).collect();
    let two = [values.clone(), values.clone()];
    check(&two, layout(1, 3 << 15)).unwrap();
    check(&two, layout(3, 1 << 14)).unwrap();
    check(&two, layout(3 << 10, 1)).unwrap();
    check(&two, layout(7, 5)).unwrap();
    let (mut slices, mut counters) = (Activation::new(), [Counter::new()]);
    let (mut tensors, shared) = (Counts::default(), shared());
    for layout in [layout(3, 1 << 14), layout(2, 1)] {
        slices.observe(&values, layout, &mut counters, |count, work| (0..count).for_each(work));
        tensors.observe(&Tensor::from_slice(&values), layout, &shared).unwrap();
    }
    assert_eq!(tensors.read().unwrap(), &slices);
    assert_eq!(slices.channels.get(), None);
}

#[test]
fn other_dtypes_are_refused_as_slices_refuse_them() {
    for kind in [Kind::Half, Kind::BFloat16, Kind::Double, Kind::Int64] {
        let tensor = Tensor::zeros([2, 3], (kind, Device::Cpu));
        let refused = crate::jit::with_dense(&tensor, |_| ()).unwrap_err().to_string();
        assert_eq!(crate::jit::flat(&tensor).unwrap_err().to_string(), refused);
    }
}

/// Strides that fill memory without gaps, and some that do not.
#[test]
fn values_come_in_the_order_of_memory() {
    let whole = Tensor::arange(2 * 3 * 4 * 5, (Kind::Float, Device::Cpu)).reshape([2, 3, 4, 5]);
    for tensor in [whole.shallow_clone(), whole.permute([0, 2, 3, 1]), whole.narrow(0, 1, 1), whole.narrow(3, 1, 2)] {
        let flat = crate::jit::flat(&tensor).unwrap();
        crate::jit::with_dense(&tensor, |dense| {
            assert_eq!(Vec::<f32>::try_from(&flat.values).unwrap(), dense.values);
            assert_eq!((flat.sizes.as_slice(), flat.strides.as_slice()), (dense.sizes, dense.strides));
        })
        .unwrap();
    }
    let (a, b) = (whole.permute([0, 2, 3, 1]), whole.permute([0, 2, 3, 1]).contiguous());
    let [first, second] = crate::jit::flat_pair(&a, &b).unwrap();
    assert!(first.equal(&second));
    assert!(crate::jit::flat_pair(&a, &whole).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn counts_are_those_of_slices_bit_for_bit(
        layout in select(vec![(1, 20_000), (2, 10_000), (40, 25), (100, 10), (1000, 1), (5000, 4)]),
        tensors in prop::collection::vec(stream(20_000), 1..3),
    ) {
        check(&tensors, ChannelLayout { count: layout.0, run_length: layout.1 })?;
    }

    #[test]
    fn scores_are_those_of_slices_but_for_rounding(
        values in stream(10_000),
        gradients in prop::collection::vec(prop_oneof![3 => -1f32..1.0, 1 => -1e18f32..1e18, 1 => Just(0.0f32)], 10_000),
        odd in prop::option::weighted(0.2, (any::<Index>(), select(vec![f32::NAN, f32::INFINITY]))),
    ) {
        let mut gradients = gradients;
        if let Some((place, x)) = odd {
            gradients[place.index(10_000)] = x;
        }
        let mut expected = WeightedHistogram::new();
        expected.observe(&values, &gradients, &mut [], |count, work| (0..count).for_each(work));
        let shared = shared();
        let mut scores = Scores::new(&shared).unwrap();
        scores.observe(&Tensor::from_slice(&values), &Tensor::from_slice(&gradients), &shared).unwrap();
        let found = scores.read().unwrap();
        prop_assert_eq!(found.is_finite(), expected.is_finite());
        if !expected.is_finite() {
            return Ok(());
        }
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs();
        let (bins, expected_bins) = (found.sparse(), expected.sparse());
        prop_assert_eq!(bins.len(), expected_bins.len());
        prop_assert!(bins.iter().zip(&expected_bins).all(|(a, b)| a.0 == b.0 && near(a.1, b.1)));
        prop_assert!(near(found.zeros(), expected.zeros()));
        let sums = read_octave_sums(std::slice::from_ref(&scores)).unwrap().remove(0);
        let sums: Vec<(u16, f64)> = WeightedHistogram::octave_sums_of_table(&sums).collect();
        let expected: Vec<(u16, f64)> = expected.octave_sums().collect();
        prop_assert_eq!(sums.len(), expected.len());
        prop_assert!(sums.iter().zip(&expected).all(|(a, b)| a.0 == b.0 && near(a.1, b.1)));
    }
}
