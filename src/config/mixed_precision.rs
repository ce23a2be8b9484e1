//! `mixed_precision`: widths to choose from and what they may cost, as typed, checked, and written for a plan. It refuses to know
//! how bits are chosen.

use std::fmt;

use schemars::JsonSchema;
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::plan::{BudgetPlan, Limit, MixedPlan};
use crate::quantizer::{Bits, Widths};

/// Units of memory, in bytes.
const UNITS: [(&str, f64); 7] = [
    ("B", 1.0),
    ("kB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("KiB", 1024.0),
    ("MiB", 1024.0 * 1024.0),
    ("GiB", 1024.0 * 1024.0 * 1024.0),
];

/// More than any weights take, and whole in an f64.
const MOST_BYTES: f64 = 1e15;

/// Bits for each site under a budget.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MixedKeys {
    /// Of weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) weights: Option<WeightBudgetKeys>,
    /// Of activations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) activations: Option<ActivationBudgetKeys>,
}

/// Widths of weights, and an average or the memory of all.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct WeightBudgetKeys {
    /// Widths to choose from.
    #[schemars(length(min = 2))]
    pub(super) bits: Option<Vec<Bits>>,
    /// Bits of a weight at most, on average over the elements of all quantized weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) average: Option<Average>,
    /// What all quantized weights may take, at bits / 8 bytes for each element.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<Memory>,
}

/// Widths of activations, and their average.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ActivationBudgetKeys {
    /// Widths to choose from.
    #[schemars(length(min = 2))]
    pub(super) bits: Option<Vec<Bits>>,
    /// Bits at most, on average over the numbers that a row has at all quantized activations.
    pub(super) average: Option<Average>,
}

/// Bits on average, finite and above 0.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(try_from = "f64")]
pub(super) struct Average(pub(super) f64);

impl TryFrom<f64> for Average {
    type Error = String;

    fn try_from(number: f64) -> Result<Self, String> {
        if number.is_finite() && number > 0.0 {
            return Ok(Self(number));
        }
        Err(format!("expected a finite number of bits above 0, found {number:?}"))
    }
}

/// So many bytes, typed with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory(pub(super) u64);

impl Memory {
    fn parse(text: &str) -> Option<Self> {
        let number = text.trim_end_matches(|sign: char| sign.is_ascii_alphabetic());
        let (_, unit) = UNITS.iter().find(|(name, _)| Some(*name) == text.get(number.len()..))?;
        let bytes = (number.trim().parse::<f64>().ok()? * unit).round();
        // In range, so that nothing is cut off.
        (1.0..=MOST_BYTES).contains(&bytes).then_some(Self(bytes as u64))
    }
}

impl Serialize for Memory {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{}B", self.0))
    }
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MemoryVisitor)
    }
}

struct MemoryVisitor;

impl Visitor<'_> for MemoryVisitor {
    type Value = Memory;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units: Vec<&str> = UNITS.iter().map(|(name, _)| *name).collect();
        write!(f, "a number above 0 with a unit, such as 2.1MB (units are {})", units.join(", "))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Memory, E> {
        Memory::parse(text).ok_or_else(|| E::invalid_type(de::Unexpected::Str(text), &self))
    }
}

/// A key that is wrong, and why.
type Wrong = (String, String);

/// The plan of `keys`.
///
/// # Errors
/// The key that is wrong, and why.
pub(super) fn resolve(keys: &MixedKeys) -> Result<MixedPlan, Wrong> {
    let weights = keys.weights.as_ref().map(|keys| weights("mixed_precision.weights", keys)).transpose()?;
    let activations =
        keys.activations.as_ref().map(|keys| activations("mixed_precision.activations", keys)).transpose()?;
    if weights.is_none() && activations.is_none() {
        return Err(wrong("mixed_precision", "expected `weights`, `activations` or both, found neither"));
    }
    Ok(MixedPlan { weights, activations })
}

fn weights(key: &str, keys: &WeightBudgetKeys) -> Result<BudgetPlan, Wrong> {
    let limit = match (keys.average, keys.memory) {
        (Some(Average(average)), None) => Limit::Average(average),
        (None, Some(Memory(bytes))) => Limit::Memory(bytes),
        (None, None) => {
            return Err(wrong(key, "expected `average` or `memory`, which bits may not exceed, found neither"));
        }
        (Some(_), Some(_)) => return Err(wrong(key, "expected `average` or `memory`, found both")),
    };
    Ok(BudgetPlan { widths: widths(key, keys.bits.as_deref())?, limit })
}

fn activations(key: &str, keys: &ActivationBudgetKeys) -> Result<BudgetPlan, Wrong> {
    let missing = || wrong(key, "expected `average`, which bits may not exceed, found none");
    let Average(average) = keys.average.ok_or_else(missing)?;
    Ok(BudgetPlan { widths: widths(key, keys.bits.as_deref())?, limit: Limit::Average(average) })
}

fn widths(key: &str, typed: Option<&[Bits]>) -> Result<Widths, Wrong> {
    let Some(typed) = typed else {
        return Err(wrong(key, "expected `bits`, a list of widths to choose from, found none"));
    };
    let twice = typed.iter().enumerate().find(|(index, bits)| typed.iter().take(*index).any(|other| other == *bits));
    if let Some((index, bits)) = twice {
        return Err(wrong(&format!("{key}.bits[{index}]"), &format!("expected each width once, found {bits} twice")));
    }
    match typed {
        [first, second, rest @ ..] => {
            Ok(rest.iter().fold(Widths::only(*first).with(*second), |all, bits| all.with(*bits)))
        }
        few => {
            let reason = format!("expected at least two widths to choose from, found {}", few.len());
            Err(wrong(&format!("{key}.bits"), &reason))
        }
    }
}

fn wrong(key: &str, reason: &str) -> Wrong {
    (key.to_owned(), reason.to_owned())
}

impl From<&MixedPlan> for MixedKeys {
    fn from(plan: &MixedPlan) -> Self {
        let bits = |plan: &BudgetPlan| Some(plan.widths.iter().collect());
        let average = |plan: &BudgetPlan| match plan.limit {
            Limit::Average(average) => Some(Average(average)),
            Limit::Memory(_) => None,
        };
        let memory = |plan: &BudgetPlan| match plan.limit {
            Limit::Average(_) => None,
            Limit::Memory(bytes) => Some(Memory(bytes)),
        };
        let weights = |plan| WeightBudgetKeys { bits: bits(plan), average: average(plan), memory: memory(plan) };
        let activations = |plan| ActivationBudgetKeys { bits: bits(plan), average: average(plan) };
        Self { weights: plan.weights.as_ref().map(weights), activations: plan.activations.as_ref().map(activations) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::decode::decode;
    use super::super::document::Node;
    use super::super::error::Origin;
    use super::*;

    fn plan(yaml: &str) -> Result<MixedPlan, String> {
        let node = Node::parse(yaml, &Origin::Flag("here".to_owned()).into()).unwrap();
        let keys = decode::<MixedKeys>(&node).map_err(|error| error.to_string())?;
        resolve(&keys).map_err(|(key, reason)| format!("{key}: {reason}"))
    }

    fn bytes(text: &str) -> Option<u64> {
        Memory::parse(text).map(|memory| memory.0)
    }

    #[test]
    fn memory_has_a_unit() {
        let sizes = ["7B", "2.1MB", "2.3 MB", "0.5kB", "1KiB", "1.5MiB", "2GB", "1GiB"].map(bytes);
        let expected = [7, 2_100_000, 2_300_000, 500, 1024, 1_572_864, 2_000_000_000, 1_073_741_824];
        assert_eq!(sizes, expected.map(Some));
        for wrong in
            ["", "MB", "2.1", "2.1mb", "2.1MBs", "-1MB", "0B", "infMB", "nanB", "1e20B", "2,1MB", "1 000kB", "é"]
        {
            assert_eq!(bytes(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn says_what_is_wrong() {
        let units = "a number above 0 with a unit, such as 2.1MB (units are B, kB, MB, GB, KiB, MiB, GiB)";
        let cases = [
            ("{}", "mixed_precision: expected `weights`, `activations` or both, found neither".to_owned()),
            ("{weight: {}}", "here: unknown key `weight` in the experiment, did you mean `weights`?".to_owned()),
            (
                "{weights: {bits: [4, 8]}}",
                "mixed_precision.weights: expected `average` or `memory`, which bits may not exceed, found neither"
                    .to_owned(),
            ),
            (
                "{weights: {bits: [4, 8], average: 5, memory: 1kB}}",
                "mixed_precision.weights: expected `average` or `memory`, found both".to_owned(),
            ),
            (
                "{weights: {average: 5}}",
                "mixed_precision.weights: expected `bits`, a list of widths to choose from, found none".to_owned(),
            ),
            (
                "{weights: {bits: [4], average: 5}}",
                "mixed_precision.weights.bits: expected at least two widths to choose from, found 1".to_owned(),
            ),
            (
                "{weights: {bits: [], average: 5}}",
                "mixed_precision.weights.bits: expected at least two widths to choose from, found 0".to_owned(),
            ),
            (
                "{weights: {bits: [4, 8, 4], average: 5}}",
                "mixed_precision.weights.bits[2]: expected each width once, found 4 twice".to_owned(),
            ),
            (
                "{weights: {bits: [1, 8], average: 5}}",
                "here: `weights.bits[0]`: bits must be from 2 to 16, found 1".to_owned(),
            ),
            ("{weights: {bits: 4, average: 5}}", "here: `weights.bits` must be a list, found the number 4".to_owned()),
            (
                "{weights: {bits: [4, 8], average: 0}}",
                "here: `weights.average`: expected a finite number of bits above 0, found 0.0".to_owned(),
            ),
            (
                "{activations: {bits: [4, 8], average: .inf}}",
                "here: `activations.average`: expected a finite number of bits above 0, found inf".to_owned(),
            ),
            (
                "{activations: {bits: [4, 8]}}",
                "mixed_precision.activations: expected `average`, which bits may not exceed, found none".to_owned(),
            ),
            (
                "{activations: {bits: [4, 8], memory: 1MB}}",
                "here: unknown key `memory` in `activations`, expected one of `bits`, `average`".to_owned(),
            ),
            (
                "{weights: {bits: [4, 8], memory: 2.1mb}}",
                format!("here: `weights.memory` must be {units}, found the text `2.1mb`"),
            ),
            (
                "{weights: {bits: [4, 8], memory: 2100000}}",
                format!("here: `weights.memory` must be {units}, found the number 2100000"),
            ),
        ];
        for (yaml, expected) in cases {
            assert_eq!(plan(yaml).unwrap_err(), expected, "{yaml}");
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        for yaml in [
            "{weights: {bits: [8, 4, 16], average: 4.1}}",
            "{weights: {bits: [2, 3], memory: 2.1MB}, activations: {bits: [8, 16], average: 8.5}}",
            "{activations: {bits: [8, 16], average: 30}}",
        ] {
            let typed = plan(yaml).unwrap();
            let written = serde_yaml::to_string(&MixedKeys::from(&typed)).unwrap();
            assert_eq!(plan(&written).as_ref(), Ok(&typed), "{written}");
        }
    }
}
