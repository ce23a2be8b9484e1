//! What the runs of a sweep gave, as plain data: one row for each, ranked, and which of them no other beats in size and quality.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use super::{Accuracy, Comparison, Sqnr, Versions};
use crate::config::Metric;

/// Everything that `results.json` holds.
#[derive(Debug, Clone, Serialize)]
pub struct SweepReport {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// Of tsquant and libtorch.
    pub versions: Versions,
    /// What ranks.
    pub rank_by: Metric,
    /// Best first; runs that failed come last.
    pub rows: Vec<SweepRow>,
}

/// One run of a sweep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SweepRow {
    /// Its place in the experiment, from 1.
    pub number: usize,
    /// Its name.
    pub name: String,
    /// Keys and values laid over the experiment, as `--set` takes them.
    pub settings: Vec<(String, String)>,
    /// A command that makes the model of this row.
    pub command: String,
    /// What it gave; `None` where it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gave: Option<Gave>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether no other row is both as small and better, or smaller and as good.
    #[serde(default)]
    pub is_on_pareto_front: bool,
}

/// What one run of a sweep gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gave {
    /// The float model's own measures.
    pub float: Accuracy,
    /// The quantized model's.
    pub quantized: Comparison,
    /// Bytes of all weights at their bits, those that stay float at 32.
    pub weight_bytes: u64,
    /// Seconds of the search.
    pub search_s: f64,
    /// Seconds of the evaluation.
    pub evaluate_s: f64,
    /// Why rounding and bias correction op by op were given up, if they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up: Option<String>,
}

impl Gave {
    /// By how much it is good, larger being better; `None` where the metric could not be measured.
    #[must_use]
    pub fn quality(&self, metric: Metric) -> Option<f64> {
        let quantized = &self.quantized;
        let value = match metric {
            Metric::Top1 => quantized.accuracy.top1,
            Metric::Top5 => quantized.accuracy.top5,
            Metric::Agreement => quantized.agreement,
            Metric::Sqnr => match quantized.sqnr() {
                Sqnr::Db(db) => Some(db),
                Sqnr::Equal => Some(f64::INFINITY),
                Sqnr::NoSignal | Sqnr::OutOfRange | Sqnr::NothingCompared => None,
            },
            Metric::Cosine => quantized.cosine,
            Metric::MaxAbsDiff => quantized.max_abs_diff.map(|difference| -difference),
        };
        value.filter(|value| !value.is_nan())
    }
}

impl SweepRow {
    fn quality(&self, metric: Metric) -> Option<f64> {
        self.gave.as_ref()?.quality(metric)
    }
}

impl SweepReport {
    /// Ranks the rows, ties by size and then by their place in the experiment, and marks the Pareto front.
    #[must_use]
    pub fn new(versions: Versions, rank_by: Metric, mut rows: Vec<SweepRow>) -> Self {
        let size = |row: &SweepRow| row.gave.as_ref().map(|gave| gave.weight_bytes);
        rows.sort_by(|a, b| {
            let failed = a.gave.is_none().cmp(&b.gave.is_none());
            let (x, y) = (a.quality(rank_by), b.quality(rank_by));
            failed
                .then(x.is_none().cmp(&y.is_none()))
                .then(y.partial_cmp(&x).unwrap_or(Ordering::Equal))
                .then(size(a).cmp(&size(b)))
                .then(a.number.cmp(&b.number))
        });
        let known = |row: &SweepRow| Some((row.quality(rank_by)?, size(row)?));
        let points: Vec<Option<(f64, u64)>> = rows.iter().map(known).collect();
        for (row, point) in rows.iter_mut().zip(&points) {
            row.is_on_pareto_front = point.is_some_and(|(quality, size)| {
                let beats =
                    |(other, bytes): (f64, u64)| other >= quality && bytes <= size && (other > quality || bytes < size);
                !points.iter().copied().flatten().any(beats)
            });
        }
        Self { schema: super::SCHEMA, versions, rank_by, rows }
    }

    /// The first row, if what ranks was measured on it.
    #[must_use]
    pub fn best(&self) -> Option<&SweepRow> {
        self.rows.first().filter(|row| row.quality(self.rank_by).is_some())
    }

    /// `results.json`, indented.
    ///
    /// # Errors
    /// Where serialization fails.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// `results.csv`: a line for each row, a column for each key that any row sets.
    ///
    /// # Errors
    /// Where serialization fails.
    pub fn to_csv(&self) -> Result<String, csv::Error> {
        let mut keys: Vec<&str> = Vec::new();
        for (key, _) in self.rows.iter().flat_map(|row| &row.settings) {
            if !keys.contains(&key.as_str()) {
                keys.push(key);
            }
        }
        let mut writer = csv::Writer::from_writer(Vec::new());
        const MEASURED: [&str; 11] = [
            "top1",
            "top5",
            "agreement",
            "sqnr_db",
            "cosine",
            "max_abs_diff",
            "weight_bytes",
            "pareto",
            "search_s",
            "evaluate_s",
            "error",
        ];
        let columns = ["rank", "number", "name"].into_iter().chain(keys.iter().copied()).chain(MEASURED);
        writer.write_record(columns.chain(["command"]))?;
        for (index, row) in self.rows.iter().enumerate() {
            let said = |key: &&str| row.settings.iter().find(|(own, _)| own == key).map(|(_, value)| value.clone());
            let mut record = vec![(index + 1).to_string(), row.number.to_string(), row.name.clone()];
            record.extend(keys.iter().map(|key| said(key).unwrap_or_default()));
            record.extend(row.measures());
            record.extend([row.error.clone().unwrap_or_default(), row.command.clone()]);
            writer.write_record(record)?;
        }
        let bytes = writer.into_inner().map_err(|error| csv::Error::from(error.into_error()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl SweepRow {
    /// The cells from `top1` to `evaluate_s`.
    fn measures(&self) -> Vec<String> {
        let Some(Gave { quantized, weight_bytes, search_s, evaluate_s, .. }) = &self.gave else {
            return vec![String::new(); 10];
        };
        let Accuracy { top1, top5 } = quantized.accuracy;
        let measured = [top1, top5, quantized.agreement, quantized.sqnr_db, quantized.cosine, quantized.max_abs_diff];
        let cells = measured.map(|value| value.map(|value| value.to_string()).unwrap_or_default());
        let rest = [
            weight_bytes.to_string(),
            u8::from(self.is_on_pareto_front).to_string(),
            format!("{search_s:.3}"),
            format!("{evaluate_s:.3}"),
        ];
        cells.into_iter().chain(rest).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(number: usize, agreement: Option<f64>, weight_bytes: u64) -> SweepRow {
        let quantized = Comparison { agreement, rows: 1, ..Comparison::NOTHING };
        let gave = Gave {
            float: Accuracy::default(),
            quantized,
            weight_bytes,
            search_s: 0.0,
            evaluate_s: 0.0,
            given_up: None,
        };
        let settings = vec![("a.b".to_owned(), format!("[{number}, \"x\"]"))];
        let (name, command) = (format!("row {number}"), "tsquant quantize e.yaml".to_owned());
        SweepRow { number, name, settings, command, gave: Some(gave), error: None, is_on_pareto_front: false }
    }

    fn report(rows: Vec<SweepRow>) -> SweepReport {
        let versions = Versions { tsquant: "0".to_owned(), torch: "0".to_owned() };
        SweepReport::new(versions, Metric::Agreement, rows)
    }

    #[test]
    fn the_best_comes_first_and_failures_last() {
        let failed = SweepRow { gave: None, error: Some("no, \"never\"".to_owned()), ..row(1, None, 0) };
        let rows = vec![failed, row(2, Some(0.5), 10), row(3, Some(0.9), 20), row(4, Some(0.5), 5), row(5, None, 1)];
        let report = report(rows);
        let order: Vec<usize> = report.rows.iter().map(|row| row.number).collect();
        assert_eq!(order[..3], [3, 4, 2]);
        assert_eq!(order[4], 1);
        assert_eq!(report.best().map(|row| row.number), Some(3));
        let csv = report.to_csv().unwrap();
        assert!(csv.starts_with("rank,number,name,a.b,top1,"), "{csv}");
        assert!(csv.contains("\n1,3,row 3,\"[3, \"\"x\"\"]\",,,0.9,"), "{csv}");
        assert!(csv.ends_with(",\"no, \"\"never\"\"\",tsquant quantize e.yaml\n"), "{csv}");
    }

    #[test]
    fn the_front_is_what_nothing_beats() {
        let rows = vec![row(1, Some(0.5), 10), row(2, Some(0.9), 20), row(3, Some(0.5), 5), row(4, Some(0.9), 20)];
        let mut rows = report(rows).rows;
        rows.sort_by_key(|row| row.number);
        let front: Vec<bool> = rows.iter().map(|row| row.is_on_pareto_front).collect();
        assert_eq!(front, [false, true, true, true]);
    }

    #[test]
    fn a_row_is_read_again() {
        let row = row(7, Some(0.25), 9);
        let text = serde_json::to_string(&row).unwrap();
        assert_eq!(serde_json::from_str::<SweepRow>(&text).unwrap(), row);
    }
}
