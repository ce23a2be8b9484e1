//! How long models take side by side: frozen, by libtorch's own executor, on the same rows, in turn, after a warm-up. It knows no
//! quantization.

use std::time::{Duration, Instant};

use crate::jit::{Arguments, Error, Frozen};
use crate::report::{Latency, Race};

/// Runs that are not timed: the first ones profile and compile, and kernels are built for the shapes that they meet.
const WARM_UP: usize = 5;
/// Fewest and most runs that are timed.
const RUNS: [usize; 2] = [7, 1000];

/// A model with what it runs on.
pub struct Contender {
    /// What it is called.
    pub name: String,
    /// The model.
    pub model: Frozen,
    /// The rows, as its arguments.
    pub arguments: Arguments,
}

/// Runs the models in turn for about that time, warm-up left out, and at least seven times each.
///
/// # Errors
/// Where a model fails.
pub fn race(contenders: &[Contender], batch_size: usize, time: Duration) -> Result<Race, Error> {
    for contender in contenders {
        for _ in 0..WARM_UP {
            contender.model.run(&contender.arguments)?;
        }
    }
    let mut times = vec![Vec::new(); contenders.len()];
    let [fewest, most] = RUNS;
    let start = Instant::now();
    for round in 0..most {
        if round >= fewest && start.elapsed() > time {
            break;
        }
        for (contender, times) in contenders.iter().zip(&mut times) {
            let start = Instant::now();
            contender.model.run(&contender.arguments)?;
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let named = contenders.iter().map(|contender| contender.name.clone()).zip(times);
    Ok(Race { batch_size, models: named.map(|(name, times)| latency(name, times, batch_size)).collect() })
}

fn latency(name: String, mut seconds: Vec<f64>, batch_size: usize) -> Latency {
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let index = (share * seconds.len() as f64).ceil() as usize;
        1e3 * seconds.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    };
    let p50_ms = at(0.5);
    let rows_per_s = batch_size as f64 / (p50_ms / 1e3);
    Latency { name, runs: seconds.len(), p50_ms, p95_ms: at(0.95), min_ms: at(0.0), rows_per_s }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_taken() {
        let times = (1..=20).rev().map(f64::from).collect();
        let latency = latency("a".to_owned(), times, 4);
        assert_eq!((latency.p50_ms, latency.p95_ms, latency.min_ms), (10_000.0, 19_000.0, 1_000.0));
        assert_eq!((latency.runs, latency.rows_per_s), (20, 0.4));
    }

    #[test]
    fn ratios_are_of_medians() {
        let models = [("a", 4.0), ("b", 2.0)].map(|(name, seconds)| latency(name.to_owned(), vec![seconds], 1));
        let race = Race { batch_size: 1, models: models.to_vec() };
        assert_eq!(race.ratio("a", "b"), Some(2.0));
        assert_eq!(race.ratio("a", "c"), None);
    }
}
