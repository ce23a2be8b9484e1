//! What `inspect` shows of a model that tsquant emitted: where it comes from and how each site is quantized.

use std::io::Write;
use std::path::Path;

use serde::{Serialize, Serializer};

use super::table::{self, printable};
use crate::emit::EXTRA_FILE;
use crate::jit;
use crate::report::{Kind, Provenance, QuantizedSite};

/// The description in an emitted archive; serialized, it is the archive's own JSON.
#[derive(Debug)]
pub(super) struct Description {
    provenance: Provenance,
    json: serde_json::Value,
}

impl Serialize for Description {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.json.serialize(serializer)
    }
}

impl Description {
    /// That of the archive at `path`, `None` where tsquant did not write it; one that cannot be read is a note.
    pub(super) fn of(path: &Path, notes: &mut Vec<String>) -> Result<Option<Self>, jit::Error> {
        let Some(text) = jit::extra_file(path, EXTRA_FILE)? else { return Ok(None) };
        let parsed = Provenance::parse(&text).and_then(|provenance| Ok((provenance, serde_json::from_str(&text)?)));
        match parsed {
            Ok((provenance, json)) => Ok(Some(Self { provenance, json })),
            Err(error) => {
                notes.push(format!("the archive holds a {EXTRA_FILE} that cannot be read: {error}"));
                Ok(None)
            }
        }
    }

    pub(super) fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        let Provenance { versions, hashes, seed, sites, left_float } = &self.provenance;
        let (tsquant, torch) = (printable(&versions.tsquant), printable(&versions.torch));
        writeln!(out, "\nquantized by tsquant {tsquant} on torch {torch}, seed {seed}")?;
        let mut digests = table::table(&["of", "SHA-256"], false);
        let evaluation = hashes.evaluation.as_deref().unwrap_or("–");
        let rows = [("float model", hashes.model.as_str()), ("calibration data", &hashes.calibration)];
        for (name, digest) in rows.into_iter().chain([("evaluation data", evaluation), ("experiment", &hashes.plan)]) {
            digests.add_row([name, &printable(digest)]);
        }
        writeln!(out, "{digests}")?;

        let (weights, activations) = (self.provenance.count(Kind::Weight), self.provenance.count(Kind::Activation));
        let counts = [table::count(weights, "quantized weight"), table::count(activations, "quantized activation")];
        let mut quantized = table::table(&["site", "bits", "grid", "method", "scale", "zero point", "SQNR"], true);
        for site in sites {
            quantized.add_row(row(site));
        }
        writeln!(out, "\n{}\n{quantized}", counts.join(", "))?;

        let mut left = table::table(&["left float", "op", "reason"], false);
        for item in left_float {
            left.add_row([&item.name, &item.op, &item.reason].map(|text| printable(text)));
        }
        writeln!(out, "\nleft float: {}\n{left}", table::count(left_float.len(), "op or value"))
    }
}

fn row(site: &QuantizedSite) -> [String; 7] {
    let scale = span(&site.scale, |scale| format!("{scale:.4e}"));
    let zero_point = span(&site.zero_point, ToString::to_string);
    let sqnr = site.sqnr_db.map_or_else(|| "–".to_owned(), |db| format!("{db:.1} dB"));
    let [name, grid, method] = [&site.name, &site.grid, &site.error_method].map(|text| printable(text));
    [name, site.bits.to_string(), grid, method, scale, zero_point, sqnr]
}

/// One value, or the smallest and largest of several.
fn span<T: PartialOrd>(values: &[T], show: impl Fn(&T) -> String) -> String {
    let smaller = |a, b| if b < a { b } else { a };
    let larger = |a, b| if b > a { b } else { a };
    match (values.iter().reduce(smaller), values.iter().reduce(larger)) {
        (Some(low), Some(high)) if low < high => format!("{} – {}", show(low), show(high)),
        (Some(only), _) => show(only),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        let show = |values: &[i64]| span(values, ToString::to_string);
        assert_eq!([show(&[]), show(&[3]), show(&[3, 3]), show(&[3, -1, 7])], ["", "3", "3", "-1 – 7"]);
    }
}
