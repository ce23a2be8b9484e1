//! The keys of an entry of `overrides` as typed and as written for a plan. It refuses to know what they mean.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

use super::super::keys::{Deviations, LpValue, Method, OneOrMany};
use super::{Fields, Located, Override, SiteOverride};
use crate::quantizer::{Bits, Granularity, Grid};

/// Other settings for some layers.
#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct OverrideKeys {
    /// Layers with a name that fits this pattern, or one of them; `*` stops at a dot, `**` does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) layers: Option<OneOrMany<String>>,
    /// Of those, the layers with this op, or one of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ops: Option<OneOrMany<String>>,
    /// For the weights of those layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) weights: Option<RoleKeys<WeightKeys>>,
    /// For the results of those layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) activations: Option<RoleKeys<ActivationKeys>>,
    /// For what those layers read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) inputs: Option<RoleKeys<ActivationKeys>>,
}

/// `float`, or settings.
#[derive(Debug)]
pub(super) enum RoleKeys<K> {
    Float,
    Set(K),
}

/// Settings of weights.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct WeightKeys {
    /// Width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bits: Option<Bits>,
    /// Where the levels lie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) grid: Option<Grid>,
    /// One threshold per tensor or per output channel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) granularity: Option<Granularity>,
    /// How thresholds are chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error_method: Option<Method>,
    /// The exponent of LP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) l_p_value: Option<LpValue>,
}

/// Settings of activations.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ActivationKeys {
    /// Width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bits: Option<Bits>,
    /// Where the levels lie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) grid: Option<Grid>,
    /// One threshold per tensor or per output channel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) granularity: Option<Granularity>,
    /// How thresholds are chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error_method: Option<Method>,
    /// The exponent of LP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) l_p_value: Option<LpValue>,
    /// Values farther than so many standard deviations from the mean do not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) z_threshold: Option<Deviations>,
}

/// The word for sites that are not quantized.
const FLOAT: &str = "float";

impl<K: Serialize> Serialize for RoleKeys<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Float => serializer.serialize_str(FLOAT),
            Self::Set(keys) => keys.serialize(serializer),
        }
    }
}

impl<'de, K: Deserialize<'de>> Deserialize<'de> for RoleKeys<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RoleVisitor(PhantomData))
    }
}

impl<K: JsonSchema> JsonSchema for RoleKeys<K> {
    fn schema_name() -> Cow<'static, str> {
        format!("{}OrFloat", K::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "const": FLOAT }, generator.subschema_for::<K>()] })
    }
}

struct RoleVisitor<K>(PhantomData<K>);

impl<'de, K: Deserialize<'de>> Visitor<'de> for RoleVisitor<K> {
    type Value = RoleKeys<K>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`float` or a map of keys")
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<RoleKeys<K>, E> {
        if word == FLOAT { Ok(RoleKeys::Float) } else { Err(E::unknown_variant(word, &[FLOAT])) }
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RoleKeys<K>, A::Error> {
        K::deserialize(MapAccessDeserializer::new(map)).map(RoleKeys::Set)
    }
}

impl From<&Override> for OverrideKeys {
    fn from(entry: &Override) -> Self {
        Self {
            layers: entry.layers.as_ref().map(|patterns| names(patterns.iter().map(|typed| typed.value.text()))),
            ops: entry.ops.as_ref().map(|ops| names(ops.iter().map(|typed| typed.value.text()))),
            weights: entry.weights.as_ref().map(role),
            activations: entry.activations.as_ref().map(role),
            inputs: entry.inputs.as_ref().map(role),
        }
    }
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> OneOrMany<String> {
    let names: Vec<String> = names.map(str::to_owned).collect();
    match <[String; 1]>::try_from(names) {
        Ok([only]) => OneOrMany::One(only),
        Err(names) => OneOrMany::Many(names),
    }
}

fn role<K: From<Fields>>(typed: &Located<SiteOverride>) -> RoleKeys<K> {
    match typed.value {
        SiteOverride::Float => RoleKeys::Float,
        SiteOverride::Set(fields) => RoleKeys::Set(fields.into()),
    }
}

impl From<Fields> for WeightKeys {
    fn from(fields: Fields) -> Self {
        let Fields { bits, grid, granularity, error_method, l_p_value, z_threshold: _ } = fields;
        Self { bits, grid, granularity, error_method, l_p_value: l_p_value.map(LpValue) }
    }
}

impl From<Fields> for ActivationKeys {
    fn from(fields: Fields) -> Self {
        let Fields { bits, grid, granularity, error_method, l_p_value, z_threshold } = fields;
        let (l_p_value, z_threshold) = (l_p_value.map(LpValue), z_threshold.map(Deviations));
        Self { bits, grid, granularity, error_method, l_p_value, z_threshold }
    }
}
