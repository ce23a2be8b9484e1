//! A JSON schema of the experiment file, for editors, from the types that it is read with.
//!
//! It says what a single value may be; combinations that are impossible are `resolve`'s.

use std::borrow::Cow;

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use super::hessian::Tolerance;
use super::keys::{Count, Crop, Deviations, Keys, LpValue, OutputName, Pixels};
use super::mixed_precision::{Average, Memory};
use super::plan::{InputSource, InputsPlan};
use crate::quantizer::Bits;
use crate::threshold::Exponent;

/// The schema of an experiment, draft 2020-12.
#[must_use]
pub fn json_schema() -> serde_json::Value {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<Keys>();
    schema.insert("title".to_owned(), "tsquant experiment".into());
    schema.insert("required".to_owned(), ["model", "calibration"].as_slice().into());
    schema.into()
}

/// Implements `JsonSchema` for a type that is read in a way of its own, and so written here.
macro_rules! schema_of {
    ($type:ty, $name:literal, $generator:ident => $schema:expr) => {
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }

            fn json_schema($generator: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
    };
}

schema_of!(Bits, "Bits", _generator => json_schema!({
    "type": "integer", "minimum": Bits::MIN.get(), "maximum": Bits::MAX.get(),
}));
schema_of!(LpValue, "LpValue", _generator => json_schema!({
    "type": "integer", "minimum": 1, "maximum": Exponent::MAX,
}));
schema_of!(Deviations, "Deviations", _generator => json_schema!({ "type": "number", "exclusiveMinimum": 0 }));
schema_of!(Tolerance, "Tolerance", _generator => json_schema!({
    "type": "number", "exclusiveMinimum": 0, "maximum": 1,
}));
schema_of!(Average, "Average", _generator => json_schema!({ "type": "number", "exclusiveMinimum": 0 }));
schema_of!(Memory, "Memory", _generator => json_schema!({
    "type": "string", "pattern": "^[0-9.]+([eE][+-]?[0-9]+)? *(B|kB|MB|GB|KiB|MiB|GiB)$",
}));
schema_of!(Count, "Count", _generator => json_schema!({ "type": "integer", "minimum": 1, "maximum": u32::MAX }));
schema_of!(Pixels, "Pixels", _generator => json_schema!({ "type": "integer", "minimum": 1, "maximum": u16::MAX }));
schema_of!(OutputName, "OutputName", _generator => json_schema!({
    "anyOf": [{ "type": "string", "minLength": 1 }, { "type": "integer", "minimum": 0, "maximum": u32::MAX }],
}));
schema_of!(Crop, "Crop", generator => {
    let side = generator.subschema_for::<Pixels>();
    json_schema!({ "anyOf": [side, { "type": "array", "items": side, "minItems": 2, "maxItems": 2 }] })
});
schema_of!(InputSource, "InputSource", _generator => json_schema!({ "anyOf": [
    { "type": "string", "description": "The name of a tensor." },
    {
        "type": "object",
        "description": "The same value for each batch.",
        "properties": { "const": { "type": ["number", "boolean", "null"] } },
        "required": ["const"],
        "additionalProperties": false,
    },
] }));
schema_of!(InputsPlan, "Inputs", generator => {
    let source = generator.subschema_for::<InputSource>();
    json_schema!({ "anyOf": [
        { "type": "array", "items": source, "minItems": 1 },
        { "type": "object", "additionalProperties": source, "minProperties": 1 },
    ] })
});
