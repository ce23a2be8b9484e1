//! Time per element of what calibration does with each value: `cargo bench --bench statistics`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tsquant::statistics::{Activation, ChannelLayout, Counter, Histogram, MinMax, WeightedCounter, WeightedHistogram};

const VALUES: usize = 1 << 20;

/// Sums of twelve uniform numbers, which are close to normal.
fn normal(seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 24) as f32
    };
    (0..VALUES).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

fn data() -> Vec<(&'static str, Vec<f32>)> {
    let normal = normal(7);
    let relu = normal.iter().map(|x| x.max(0.0)).collect();
    let relu6 = normal.iter().map(|x| (x * 4.0).clamp(0.0, 6.0)).collect();
    vec![("normal", normal), ("relu", relu), ("relu6", relu6), ("zero", vec![0.0; VALUES])]
}

fn statistics(c: &mut Criterion) {
    let mut counter = [Counter::new()];
    let mut weighted_counter = [WeightedCounter::new()];
    let gradients = normal(11);
    for (name, values) in data() {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(VALUES as u64));
        group.bench_function("sum_min_max_loop", |b| {
            b.iter(|| {
                let values = black_box(values.as_slice());
                let (mut sum, mut min, mut max) = ([0.0f32; 16], [f32::MAX; 16], [f32::MIN; 16]);
                for chunk in values.as_chunks::<16>().0 {
                    for lane in 0..16 {
                        sum[lane] += chunk[lane];
                        min[lane] = if chunk[lane] < min[lane] { chunk[lane] } else { min[lane] };
                        max[lane] = if chunk[lane] > max[lane] { chunk[lane] } else { max[lane] };
                    }
                }
                (sum, min, max)
            });
        });
        group.bench_function("min_max", |b| {
            b.iter(|| {
                let mut min_max = MinMax::new();
                min_max.observe(black_box(&values));
                min_max
            });
        });
        group.bench_function("histogram", |b| {
            let mut histogram = Histogram::new();
            b.iter(|| histogram.observe(black_box(&values), &mut counter[0]));
        });
        group.bench_function("weighted_histogram", |b| {
            let mut weights = WeightedHistogram::new();
            b.iter(|| {
                weights.observe(black_box(&values), &gradients, &mut weighted_counter, |parts, run| {
                    (0..parts).for_each(run);
                });
            });
        });
        for (layout, count, run_length) in
            [("channels_of_3136", 64, 3136), ("channels_of_49", 512, 49), ("last_axis", 512, 1)]
        {
            group.bench_function(BenchmarkId::new("activation", layout), |b| {
                let mut activation = Activation::new();
                let whole = VALUES / (count * run_length) * (count * run_length);
                let layout = ChannelLayout { count, run_length };
                b.iter(|| {
                    activation.observe(black_box(&values[..whole]), layout, &mut counter, |parts, run| {
                        (0..parts).for_each(run);
                    });
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, statistics);
criterion_main!(benches);
