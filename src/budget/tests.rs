//! Against every possible choice on small cases, and on large ones against bounds.

use proptest::prelude::*;

use super::*;

fn bits(bits: u64) -> Bits {
    Bits::try_from(bits).unwrap()
}

fn site(elements: u64, widths: &[(u64, f64)]) -> Site {
    let width = |&(count, noise): &(u64, f64)| Width { bits: bits(count), noise };
    Site { elements, widths: widths.iter().map(width).collect() }
}

/// The least noise within the budget and the fewest bits that reach it, by trying everything; noises are whole numbers.
fn brute_force(sites: &[Site], budget: u64) -> Option<(f64, u64)> {
    let mut all = vec![(0.0, 0)];
    for site in sites {
        let with = |&(noise, used): &(f64, u64)| {
            let width = move |width: &Width| (noise + width.noise, used + site.cost(width.bits));
            site.widths.iter().map(width).collect::<Vec<_>>()
        };
        all = all.iter().flat_map(with).collect();
    }
    all.retain(|&(_, used)| used <= budget);
    all.into_iter().min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
}

/// Noise and bits of an allotment, added up again.
fn check(sites: &[Site], budget: u64, found: &Allotment) {
    let chosen = sites.iter().zip(&found.bits).map(|(site, bits)| {
        let width = site.widths.iter().find(|width| width.bits == *bits).expect("a width of the site");
        (site.cost(*bits), width.noise)
    });
    let (used, noise) = chosen.fold((0, 0.0), |sum, own| (sum.0 + own.0, sum.1 + own.1));
    assert_eq!((found.bits.len(), found.used), (sites.len(), used));
    assert!((found.noise - noise).abs() <= 1e-12 * noise, "{} {noise}", found.noise);
    assert!(used <= budget && found.least_noise <= found.noise);
    if let Some(best) = uniform(sites, budget) {
        assert!(found.noise <= best.noise * (1.0 + 1e-12), "{found:?} {best:?}");
    }
}

/// Widths with noises that are whole numbers, few enough to be equal often; not always less for more bits.
fn any_site() -> impl Strategy<Value = Site> {
    let elements = prop_oneof![0..4u64, 1..1000u64, 1..100_000_000u64];
    let noises = prop::collection::vec(prop_oneof![0..8u32, 0..1_000_000u32], 1..5);
    (elements, noises, 2..6u64).prop_map(|(elements, noises, first)| {
        let widths = noises.into_iter().zip(first..).map(|(noise, count)| (count, f64::from(noise)));
        site(elements, &widths.collect::<Vec<_>>())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_choice_is_better(sites in prop::collection::vec(any_site(), 0..7), share in 0.0..1.2f64) {
        let widest = sites.iter().map(|site| site.elements * 10).sum::<u64>();
        let budget = (share * widest as f64) as u64;
        match brute_force(&sites, budget) {
            None => {
                let least = least(&sites);
                prop_assert!(least > budget);
                prop_assert_eq!(allot(&sites, budget), Err(TooLittle { least, budget }));
                prop_assert!(allot(&sites, least).is_ok());
            }
            Some(expected) => {
                let found = allot(&sites, budget).unwrap();
                check(&sites, budget, &found);
                prop_assert_eq!((found.noise, found.used), expected);
                prop_assert_eq!(found.least_noise, found.noise);
                prop_assert_eq!(&allot(&sites, budget).unwrap(), &found);
            }
        }
    }
}

#[test]
fn an_example_by_hand() {
    // 20 elements at 6 bits on average: the small site alone can have 8.
    let sites = [site(5, &[(4, 9.0), (8, 1.0)]), site(15, &[(4, 10.0), (8, 0.0)])];
    let found = allot(&sites, 20 * 6).unwrap();
    assert_eq!((found.bits.clone(), found.used, found.noise), (vec![bits(8), bits(4)], 100, 11.0));
    assert_eq!(uniform(&sites, 20 * 6), Some(Uniform { bits: bits(4), used: 80, noise: 19.0 }));
    assert_eq!(allot(&sites, 79), Err(TooLittle { least: 80, budget: 79 }));
    assert_eq!(uniform(&sites, 79), None);
    // One with its bits counts.
    let fixed = [site(5, &[(16, 0.5)]), sites[1].clone()];
    assert_eq!(allot(&fixed, 20 * 6), Err(TooLittle { least: 140, budget: 120 }));
    assert_eq!(uniform(&fixed, 20 * 8).map(|best| best.bits), Some(bits(4)));
}

#[test]
fn more_bits_that_bring_nothing_are_not_taken() {
    let sites = [site(3, &[(4, 0.0), (8, 0.0)]), site(3, &[(4, 2.0), (8, 2.0), (16, 3.0)])];
    assert_eq!(allot(&sites, 1000).unwrap().bits, [bits(4), bits(4)]);
    assert!(allot(&[], 0).unwrap().bits.is_empty());
}

/// Numbers from 0 to 1 that are the same in every run.
fn drawn(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// As large models are: sizes over six orders of magnitude, noise that falls by 4 for each bit, give or take a lot.
#[test]
fn three_hundred_sites_of_five_widths() {
    for seed in 0..6 {
        let mut next = drawn(seed);
        let sites: Vec<Site> = (0..300)
            .map(|_| {
                let elements = (100.0 * 1e6f64.powf(next())) as u64;
                let noise = elements as f64 * 1e4f64.powf(next());
                let widths = [2, 3, 4, 6, 8].map(|count| (count, noise * (0.5 + next()) * 4f64.powf(-(count as f64))));
                site(elements, &widths)
            })
            .collect();
        let all: u64 = sites.iter().map(|site| site.elements).sum();
        for average in [2.0, 2.01, 2.5, 4.1, 5.7, 7.9, 8.0] {
            let budget = (all as f64 * average) as u64;
            let found = allot(&sites, budget).unwrap();
            check(&sites, budget, &found);
            assert_eq!(found.least_noise, found.noise, "seed {seed}, average {average}");
        }
    }
}

/// The same block over and over, as transformers have it.
#[test]
fn sites_that_are_alike() {
    let block = [(65_536, 1.0), (262_144, 3.0), (262_144, 2.0), (1024, 0.5)];
    let widths = |noise: f64| [2u64, 3, 4, 6, 8].map(|count| (count, noise * 4f64.powf(-(count as f64))));
    let sites: Vec<Site> =
        (0..75).flat_map(|_| block.map(|(elements, noise)| site(elements, &widths(noise)))).collect();
    let all: u64 = sites.iter().map(|site| site.elements).sum();
    for average in [2.3, 4.1, 6.0] {
        let budget = (all as f64 * average) as u64;
        let found = allot(&sites, budget).unwrap();
        check(&sites, budget, &found);
        assert!(found.least_noise >= found.noise * (1.0 - 1e-9), "{} {}", found.least_noise, found.noise);
    }
}

/// Every bit of every site is worth the same: a puzzle of sums, whose best choice nobody needs, ends all the same.
#[test]
fn bits_that_are_all_worth_the_same() {
    let mut next = drawn(7);
    let sites: Vec<Site> = (0..300)
        .map(|_| {
            let elements = (1e8 * (0.1 + 0.9 * next())) as u64;
            site(elements, &[2u64, 4, 8].map(|count| (count, elements as f64 * (8 - count) as f64)))
        })
        .collect();
    let budget = sites.iter().map(|site| site.elements).sum::<u64>() * 5;
    let found = allot(&sites, budget).unwrap();
    check(&sites, budget, &found);
    assert!(found.least_noise >= found.noise * (1.0 - 1e-6), "{} {}", found.least_noise, found.noise);
}
