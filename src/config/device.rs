//! Where a model runs, as it is written: `auto`, `cpu`, `cuda`, `cuda:1`. It refuses to know which devices there are.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, EnumAccess, VariantAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// What the key may be, as messages have it.
const VALUES: &[&str] = &["auto", "cpu", "cuda", "cuda:N"];

/// The highest number that libtorch gives a device.
const LAST: u8 = i8::MAX.unsigned_abs();

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DevicePlan {
    /// CUDA if it works, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// The GPU of this number, which `cuda` alone has as 0.
    Cuda(u8),
}

impl fmt::Display for DevicePlan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Cpu => formatter.write_str("cpu"),
            Self::Cuda(number) => write!(formatter, "cuda:{number}"),
        }
    }
}

impl Serialize for DevicePlan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DevicePlan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_enum("DevicePlan", VALUES, DeviceVisitor)
    }
}

struct DeviceVisitor;

impl<'de> Visitor<'de> for DeviceVisitor {
    type Value = DevicePlan;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the name of a device")
    }

    fn visit_enum<A: EnumAccess<'de>>(self, names: A) -> Result<DevicePlan, A::Error> {
        let (name, rest) = names.variant::<String>()?;
        rest.unit_variant()?;
        let number = match name.as_str() {
            "auto" => return Ok(DevicePlan::Auto),
            "cpu" => return Ok(DevicePlan::Cpu),
            "cuda" => "0",
            other => other.strip_prefix("cuda:").unwrap_or_default(),
        };
        if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(de::Error::unknown_variant(&name, VALUES));
        }
        match number.parse() {
            Ok(number @ 0..=LAST) => Ok(DevicePlan::Cuda(number)),
            _ => Err(de::Error::custom(format!("expected the number of a GPU, 0 to {LAST}, found {number}"))),
        }
    }
}

impl JsonSchema for DevicePlan {
    fn schema_name() -> Cow<'static, str> {
        "Device".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^(auto|cpu|cuda(:[0-9]{1,3})?)$" })
    }
}
