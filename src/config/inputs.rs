//! How the arguments of `forward` are written in YAML: `[image, {const: 16000}]` or `{ids: tokens}`.
//!
//! It refuses to know which arguments a model has and which tensors a file holds.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use super::plan::{Constant, InputSource, InputsPlan};

impl Serialize for InputsPlan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Positional(sources) => serializer.collect_seq(sources),
            Self::Named(sources) => serializer.collect_map(sources.iter().map(|(name, source)| (name, source))),
        }
    }
}

impl<'de> Deserialize<'de> for InputsPlan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InputsVisitor)
    }
}

struct InputsVisitor;

impl<'de> Visitor<'de> for InputsVisitor {
    type Value = InputsPlan;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tensor names, or a map from argument names to tensor names")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<InputsPlan, A::Error> {
        let mut sources = Vec::new();
        while let Some(source) = list.next_element()? {
            sources.push(source);
        }
        Ok(InputsPlan::Positional(sources))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<InputsPlan, A::Error> {
        let mut sources = Vec::new();
        while let Some(entry) = map.next_entry()? {
            sources.push(entry);
        }
        Ok(InputsPlan::Named(sources))
    }
}

impl Serialize for InputSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Tensor(name) => serializer.serialize_str(name),
            Self::Const(constant) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("const", constant)?;
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for InputSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SourceVisitor)
    }
}

struct SourceVisitor;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConstKeys {
    r#const: Constant,
}

impl<'de> Visitor<'de> for SourceVisitor {
    type Value = InputSource;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a tensor (in quotes where it reads as a number) or {const: VALUE}")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<InputSource, E> {
        if name.is_empty() {
            return Err(E::custom("expected the name of a tensor, found an empty text"));
        }
        Ok(InputSource::Tensor(name.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<InputSource, A::Error> {
        let keys = ConstKeys::deserialize(MapAccessDeserializer::new(map))?;
        Ok(InputSource::Const(keys.r#const))
    }
}

impl<'de> Deserialize<'de> for Constant {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ConstantVisitor)
    }
}

struct ConstantVisitor;

impl Visitor<'_> for ConstantVisitor {
    type Value = Constant;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, true, false or null")
    }

    fn visit_unit<E>(self) -> Result<Constant, E> {
        Ok(Constant::None)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Constant, E> {
        Ok(Constant::Bool(value))
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Constant, E> {
        let wrong = || E::custom(format!("expected a whole number of at most 64 bits, found {value}"));
        i64::try_from(value).map(Constant::Int).map_err(|_| wrong())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Constant, E> {
        if !value.is_finite() {
            return Err(E::custom(format!("expected a finite number, found {value}")));
        }
        Ok(Constant::Float(value))
    }
}
