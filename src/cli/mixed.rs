//! Lines about mixed precision: what would be chosen, what was, and what it costs.

use std::io::Write;

use super::table;
use crate::config::{BudgetPlan, Limit, MixedPlan};
use crate::report::{Allotted, Budget, MixedPrecision, Share};

/// Of a dry run: how many weights and activations would get which bits.
pub(super) fn print_planned(
    out: &mut impl Write,
    plan: &MixedPlan,
    [weights, activations]: [usize; 2],
) -> std::io::Result<()> {
    for (what, budget, free) in [("weight", &plan.weights, weights), ("activation", &plan.activations, activations)] {
        let Some(BudgetPlan { widths, limit }) = budget else { continue };
        let narrower: Vec<String> = widths.iter().map(|bits| bits.to_string()).collect();
        let (last, narrower) =
            narrower.split_last().map(|(last, rest)| (last.clone(), rest.join(", "))).unwrap_or_default();
        let limit = match limit {
            Limit::Average(average) => format!("at most {average} bits on average"),
            Limit::Memory(bytes) => format!("at most {}", table::bytes(*bytes)),
        };
        let free = table::count(free, what);
        writeln!(out, "# {free} would get {narrower} or {last} bits each, {limit}, those with set bits included")?;
    }
    Ok(())
}

/// Of a run: what was chosen, and noise predicted and measured.
pub(super) fn print(out: &mut impl Write, mixed: &MixedPrecision) -> std::io::Result<()> {
    for (what, half) in [("weights", &mixed.weights), ("activations", &mixed.activations)] {
        if let Some(half) = half {
            writeln!(out, "bits of {what}: {}", allotted(half))?;
        }
    }
    let noise = &mixed.noise;
    let measured =
        noise.measured.map_or_else(|| "not measured".to_owned(), |noise| format!("measured {}", short(noise)));
    let uniform = noise.uniform.map(|noise| format!("; with one width for all {} predicted", short(noise)));
    writeln!(
        out,
        "squared error of the outputs per row: predicted {} (weights {}, activations {}), {measured}{}",
        short(noise.predicted),
        short(noise.weights),
        short(noise.activations),
        uniform.unwrap_or_default()
    )
}

fn allotted(half: &Allotted) -> String {
    let used = match (half.budget, half.used_memory_bytes) {
        (Budget::MemoryBytes(asked), Some(used)) => format!("{} of {}", table::bytes(used), table::bytes(asked)),
        (Budget::Average(asked), _) => format!("{:.3} on average of {asked}", half.used_average),
        (Budget::MemoryBytes(asked), None) => format!("at most {}", table::bytes(asked)),
    };
    let share = |share: &Share| {
        let sites = table::count(share.sites, "site");
        format!("{} bits at {sites} ({:.2}% of all elements)", share.bits, share.share * 100.0)
    };
    format!("{used}: {}", half.widths.iter().map(share).collect::<Vec<_>>().join(", "))
}

/// Four digits.
fn short(noise: f64) -> String {
    if noise == 0.0 {
        "0".to_owned()
    } else if (1e-3..1e5).contains(&noise) {
        let digits = (3 - noise.log10().floor() as i32).clamp(0, 6);
        format!("{noise:.*}", usize::try_from(digits).unwrap_or_default())
    } else {
        format!("{noise:.3e}")
    }
}

#[cfg(test)]
mod tests {
    use super::short;

    #[test]
    fn four_digits_of_noise() {
        let shown = [0.0, 0.001_234_56, 0.5, 9.87654, 123.456, 99_999.0, 1e5, 1.5e-7, 1e300].map(short);
        let expected = ["0", "0.001235", "0.5000", "9.877", "123.5", "99999", "1.000e5", "1.500e-7", "1.000e300"];
        assert_eq!(shown, expected);
    }
}
