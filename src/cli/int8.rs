//! What the terminal shows of an 8-bit model.

use std::io::Write;

use super::table;
use crate::report::{FLOAT, INT8, Int8, OPTIMIZED};

/// Kernels, how good and how fast they are, and the line that its user has to know.
pub(super) fn print(out: &mut impl Write, int8: &Int8) -> std::io::Result<()> {
    let kernels: usize = int8.kernels.values().sum();
    let float = match int8.in_float.as_slice() {
        [] => String::new(),
        [only] => format!("; in float: {} ({})", only.name, only.reason),
        [first, ..] => format!("; {} ops in float (see report.json), {} for instance", int8.in_float.len(), first.name),
    };
    writeln!(out, "{}: {} on {}{float}", int8.file, table::count(kernels, "8-bit kernel"), int8.engine)?;
    if int8.reduce_range {
        writeln!(out, "  activations of 8 bits have 7 (reduce_range)")?;
    }
    if let Some(bounded) = int8.bounded {
        writeln!(
            out,
            "  weights of {} are bounded for the 16-bit sums of {}: {} of {} have larger scales",
            table::count(bounded.weights, "depthwise convolution"),
            int8.engine,
            bounded.raised,
            table::count(bounded.channels, "channel")
        )?;
    }
    let agreement =
        |share: Option<f64>| share.map_or_else(String::new, |share| format!(", agreement {:.2}%", 100.0 * share));
    let db = |db: Option<f64>| db.map_or_else(|| "no SQNR".to_owned(), |db| format!("{db:.2} dB"));
    writeln!(
        out,
        "  against float {}{}; its simulation {}{}; against that simulation {}{}",
        db(int8.evaluation.sqnr_db),
        agreement(int8.evaluation.agreement),
        db(int8.simulation.sqnr_db),
        agreement(int8.simulation.agreement),
        db(int8.against_simulation.sqnr_db),
        agreement(int8.against_simulation.agreement)
    )?;
    if let Some(noise) = &int8.noise_floor {
        let (db, agreement) = (db(noise.sqnr_db), agreement(noise.agreement));
        writeln!(out, "  rounding alone: that simulation against itself row by row {db}{agreement}")?;
    }
    for race in &int8.speed {
        let of =
            |name: &str| race.models.iter().find(|model| model.name == name).map_or(f64::NAN, |model| model.p50_ms);
        let (float, optimized, own) = (of(FLOAT), of(OPTIMIZED), of(INT8));
        writeln!(
            out,
            "  batches of {}: {own:.2} ms, {:.2} times as fast as float ({float:.2} ms), {:.2} times as fast as \
             optimize_for_inference ({optimized:.2} ms); {}",
            race.batch_size,
            float / own,
            optimized / own,
            table::count(int8.threads, "thread")
        )?;
    }
    writeln!(out, "  before it is loaded: {}", int8.set_engine)
}

/// Each kernel against the op that it stands for.
pub(super) fn print_layers(out: &mut impl Write, int8: &Int8) -> std::io::Result<()> {
    let header = ["layer", "kernel", "values", "of another level", "largest difference"];
    let mut table = table::table(&header, true);
    for layer in &int8.layers {
        #[allow(clippy::cast_precision_loss)]
        let share = 100.0 * layer.different as f64 / (layer.values.max(1)) as f64;
        table.add_row([
            table::printable(&layer.name),
            layer.kernel.clone(),
            layer.values.to_string(),
            format!("{} ({share:.3}%)", layer.different),
            format!("{:.3}", layer.largest),
        ]);
    }
    writeln!(out, "{table}")
}
