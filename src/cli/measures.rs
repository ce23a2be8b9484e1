//! The table of measures: float beside quantized, or one model alone.

use super::table;
use crate::config::Metric;
use crate::report::{Accuracy, Alone, Evaluation, Gave};

/// Sizes of the model files in bytes.
pub(super) struct Sizes {
    pub(super) float: u64,
    pub(super) quantized: u64,
}

/// One row per metric, and one for the sizes.
pub(super) fn compared(evaluation: &Evaluation, metrics: &[Metric], sizes: &Sizes) -> comfy_table::Table {
    let title = format!("{} rows of {} data", evaluation.quantized.rows, evaluation.data);
    let mut table = table::table(&[&title, "float", "quantized"], true);
    for metric in metrics {
        let (float, quantized) = cells(*metric, evaluation);
        table.add_row([name(*metric), float.as_str(), quantized.as_str()]);
    }
    table.add_row(["model file", &table::bytes(sizes.float), &table::bytes(sizes.quantized)]);
    table
}

/// One row per metric that needs no other model, and one for the size in bytes.
pub(super) fn alone(data: &str, measures: &Alone, metrics: &[Metric], size: u64) -> comfy_table::Table {
    let title = format!("{} rows of {data} data", measures.rows);
    let mut table = table::table(&[&title, "model"], true);
    for metric in metrics {
        let share = match metric {
            Metric::Top1 => measures.accuracy.top1,
            Metric::Top5 => measures.accuracy.top5,
            Metric::Agreement | Metric::Sqnr | Metric::Cosine | Metric::MaxAbsDiff => continue,
        };
        table.add_row([name(*metric), &percent(share)]);
    }
    table.add_row(["model file", &table::bytes(size)]);
    table
}

/// A metric of one run of a sweep.
pub(super) fn cell(metric: Metric, gave: &Gave) -> String {
    // The name of the data is for titles.
    cells(metric, &Evaluation { data: "", float: gave.float, quantized: gave.quantized }).1
}

/// A metric in words.
pub(super) fn name(metric: Metric) -> &'static str {
    match metric {
        Metric::Top1 => "top-1 accuracy",
        Metric::Top5 => "top-5 accuracy",
        Metric::Agreement => "agreement with float",
        Metric::Sqnr => "output SQNR",
        Metric::Cosine => "cosine similarity",
        Metric::MaxAbsDiff => "largest difference",
    }
}

fn cells(metric: Metric, evaluation: &Evaluation) -> (String, String) {
    let (float, quantized) = (&evaluation.float, &evaluation.quantized);
    let both = |pick: fn(&Accuracy) -> Option<f64>| (percent(pick(float)), percent(pick(&quantized.accuracy)));
    let nothing = String::new;
    match metric {
        Metric::Top1 => both(|accuracy| accuracy.top1),
        Metric::Top5 => both(|accuracy| accuracy.top5),
        Metric::Agreement => (nothing(), percent(quantized.agreement)),
        Metric::Sqnr => (nothing(), quantized.sqnr().to_string()),
        Metric::Cosine => (nothing(), quantized.cosine.map_or_else(undefined, |cosine| format!("{cosine:.6}"))),
        Metric::MaxAbsDiff => (nothing(), quantized.max_abs_diff.map_or_else(undefined, |most| format!("{most:.4e}"))),
    }
}

fn undefined() -> String {
    "undefined".to_owned()
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "–".to_owned(), |share| format!("{:.2}%", share * 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Comparison;

    #[test]
    fn measures_that_are_no_numbers_have_words() {
        let shown_of = |sqnr_db, cosine, max_abs_diff, max_abs_float| {
            let accuracy = Accuracy::default();
            let (agreement, not_finite, rows) = (None, 0, 1);
            let quantized = Comparison {
                accuracy,
                agreement,
                sqnr_db,
                squared_error: None,
                cosine,
                max_abs_diff,
                max_abs_float,
                not_finite,
                rows,
            };
            let evaluation = Evaluation { data: "evaluation", float: accuracy, quantized };
            [Metric::Sqnr, Metric::Cosine, Metric::MaxAbsDiff].map(|metric| cells(metric, &evaluation).1)
        };
        let shown = |sqnr_db, cosine, max_abs_diff| shown_of(sqnr_db, cosine, max_abs_diff, Some(0.0));
        let beyond = "undefined: squares beyond a float64";
        assert_eq!(shown_of(None, None, Some(3.0), Some(1.0)), [beyond, "undefined", "3.0000e0"]);
        assert_eq!(shown(Some(20.0), Some(0.5), Some(1.0)), ["20.00 dB", "0.500000", "1.0000e0"]);
        assert_eq!(shown(None, Some(1.0), Some(0.0)), ["equal outputs", "1.000000", "0.0000e0"]);
        assert_eq!(shown(None, None, Some(3.0)), ["−∞ dB: float outputs are all 0", "undefined", "3.0000e0"]);
        assert_eq!(shown(None, None, None), ["no finite value to compare", "undefined", "undefined"]);
    }
}
