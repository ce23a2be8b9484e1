//! Whether activations of an 8-bit model have 7 bits, as it is written: `auto`, `true`, `false`. It refuses to know what engines
//! need.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// What the key may be, as messages have it.
const VALUES: &[&str] = &["auto", "true", "false"];

/// Whether activations that the plan gives 8 bits have 7, so that sums of two products fit 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceRange {
    /// Where the engine computes something wrong with 8 that it computes right with 7.
    Auto,
    /// Yes.
    Always,
    /// No.
    Never,
}

impl Serialize for ReduceRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Always => serializer.serialize_bool(true),
            Self::Never => serializer.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for ReduceRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ReduceRangeVisitor)
    }
}

struct ReduceRangeVisitor;

impl Visitor<'_> for ReduceRangeVisitor {
    type Value = ReduceRange;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("auto, true or false")
    }

    fn visit_bool<E: de::Error>(self, is_reduced: bool) -> Result<ReduceRange, E> {
        Ok(if is_reduced { ReduceRange::Always } else { ReduceRange::Never })
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<ReduceRange, E> {
        if name == "auto" { Ok(ReduceRange::Auto) } else { Err(E::unknown_variant(name, VALUES)) }
    }
}

impl JsonSchema for ReduceRange {
    fn schema_name() -> Cow<'static, str> {
        "ReduceRange".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "enum": ["auto", true, false] })
    }
}
