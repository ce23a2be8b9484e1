//! Hessian scores keep nothing of a batch but the sums of its rows, and those without the bins that are empty. Alone in its file, since it looks at the memory of the whole process.

#![cfg(target_os = "linux")]

mod common;

use std::num::NonZeroUsize;

use tsquant::config::{Distribution, HessianRequest};
use tsquant::dataset::Dataset;
use tsquant::hessian::{self, Layers};
use tsquant::sites;

/// Resident memory of this process in MB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a resident set");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
}

/// One batch keeps about 40 MB of activations for the way back, sixteen of them 600. Sums of 256 rows with all their bins would
/// take 4 MB a site, 80 MB and more together.
#[test]
fn little_is_left_of_a_batch() {
    let mnist = common::MNIST;
    let module = mnist.load();
    let clean = module.clean(Some(&mnist.arguments(&module, 4))).expect("a clean model");
    let sites = sites::find(clean.listing());
    let data = Dataset::open(&mnist.data_plan(256, 64)).expect("data");
    let weights: Vec<_> = sites.weights.iter().collect();
    let activations: Vec<_> = sites.activations.iter().collect();
    // So wide that few bins are filled.
    let ranges = vec![Some(-1e4..=1e4f32); activations.len()];
    let layers = Layers { weights: &weights, activations: &activations, ranges: &ranges };
    let count = |number| NonZeroUsize::new(number).expect("a count");
    let request = HessianRequest {
        samples: count(256),
        probes: count(2),
        batch_size: count(64),
        distribution: Distribution::Rademacher,
        tolerance: None,
        seed: 0,
    };
    assert!(activations.len() >= 20, "{} sites", activations.len());
    let score = || hessian::score(&clean, layers, &data, &request, |_| ()).expect("scores");
    drop(score());
    drop(score());
    let before = resident();
    (0..4).for_each(|_| drop(score()));
    let growth = resident().saturating_sub(before);
    assert!(growth < 60, "{growth} MB more");
    let scores = score();
    let rows = scores.activations.iter().flat_map(|site| &site.scores).map(|scores| scores.sums.rows().len());
    assert!(rows.sum::<usize>() >= 20 * 256);
    let growth = resident().saturating_sub(before);
    assert!(growth < 60, "{growth} MB more with sums of rows");
}
