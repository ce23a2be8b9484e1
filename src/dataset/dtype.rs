//! Element types of stored tensors, whatever the file format calls them. Knows no file and no shape.

use half::{bf16, f16};
use tch::Kind;

/// Element type of a stored tensor, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dtype {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F16,
    Bf16,
    F32,
    F64,
}

/// The element types that a model's input may have, for errors.
pub(super) const INPUT_DTYPES: &str =
    "uint8, int8, int16, int32, int64, bool, float16, bfloat16, float32 or float64 elements";

impl Dtype {
    /// Bytes of one element.
    pub(super) fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// The name that torch and NumPy use.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::U8 => "uint8",
            Self::I8 => "int8",
            Self::U16 => "uint16",
            Self::I16 => "int16",
            Self::U32 => "uint32",
            Self::I32 => "int32",
            Self::U64 => "uint64",
            Self::I64 => "int64",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
        }
    }

    /// The tensor kind that stored bytes are copied into; `None` for types that no model takes.
    pub(super) fn kind(self) -> Option<Kind> {
        Some(match self {
            Self::Bool => Kind::Bool,
            Self::U8 => Kind::Uint8,
            Self::I8 => Kind::Int8,
            Self::I16 => Kind::Int16,
            Self::I32 => Kind::Int,
            Self::I64 => Kind::Int64,
            Self::F16 => Kind::Half,
            Self::Bf16 => Kind::BFloat16,
            Self::F32 => Kind::Float,
            Self::F64 => Kind::Double,
            Self::U16 | Self::U32 | Self::U64 => return None,
        })
    }

    /// Whether elements are floating point.
    pub(super) fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }

    /// Whether the transform applies: pixels and features, not ids and masks.
    pub(super) fn is_transformed(self) -> bool {
        self == Self::U8 || self.is_float()
    }

    /// The first element of `bytes` that is no finite float32, with its index; looks at float types only.
    pub(super) fn first_not_finite(self, bytes: &[u8]) -> Option<(usize, f64)> {
        match self {
            Self::F16 => find(bytes, |raw| f16::from_le_bytes(raw).to_f64()),
            Self::Bf16 => find(bytes, |raw| bf16::from_le_bytes(raw).to_f64()),
            Self::F32 => find(bytes, |raw| f64::from(f32::from_le_bytes(raw))),
            Self::F64 => find(bytes, f64::from_le_bytes),
            _ => None,
        }
    }

    /// The elements of `bytes` as class indices; `Err` holds what was found instead: another type, or a number that is
    /// too large.
    pub(super) fn integers(self, bytes: &[u8]) -> Result<Vec<i64>, String> {
        match self {
            Self::U8 => Ok(bytes.iter().map(|&value| i64::from(value)).collect()),
            Self::I8 => Ok(elements(bytes, |raw| i64::from(i8::from_le_bytes(raw))).collect()),
            Self::U16 => Ok(elements(bytes, |raw| i64::from(u16::from_le_bytes(raw))).collect()),
            Self::I16 => Ok(elements(bytes, |raw| i64::from(i16::from_le_bytes(raw))).collect()),
            Self::U32 => Ok(elements(bytes, |raw| i64::from(u32::from_le_bytes(raw))).collect()),
            Self::I32 => Ok(elements(bytes, |raw| i64::from(i32::from_le_bytes(raw))).collect()),
            Self::I64 => Ok(elements(bytes, i64::from_le_bytes).collect()),
            Self::U64 => elements(bytes, u64::from_le_bytes)
                .map(|value| i64::try_from(value).map_err(|_| value.to_string()))
                .collect(),
            Self::Bool | Self::F16 | Self::Bf16 | Self::F32 | Self::F64 => Err(format!("{} elements", self.name())),
        }
    }
}

fn elements<const SIZE: usize, T>(bytes: &[u8], convert: impl Fn([u8; SIZE]) -> T) -> impl Iterator<Item = T> {
    bytes.as_chunks::<SIZE>().0.iter().map(move |&raw| convert(raw))
}

fn find<const SIZE: usize>(bytes: &[u8], convert: impl Fn([u8; SIZE]) -> f64) -> Option<(usize, f64)> {
    elements(bytes, convert).enumerate().find(|&(_, value)| !(value as f32).is_finite())
}
