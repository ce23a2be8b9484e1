//! From a tree to the typed keys: a serde deserializer whose errors know the key's full path and its place.
//!
//! It refuses to know any key by name; those are in `keys`.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};

use super::document::{Key, Node, Value, join};
use super::error::{Error, Place, Problem, printable, shortened};
use crate::names;

/// Reads `T` from a tree.
///
/// # Errors
/// An unknown key or value, a value of another kind.
pub(super) fn decode<T: de::DeserializeOwned>(root: &Node) -> Result<T, Error> {
    T::deserialize(Reader(root)).map_err(|fault| fault.in_node(root).into_error(root))
}

/// What went wrong, gathering its place and path on the way out of the tree.
#[derive(Debug)]
struct Fault {
    wrong: Box<Wrong>,
    place: Option<Place>,
    found: Option<String>,
    /// Innermost first.
    steps: Vec<Step>,
}

#[derive(Debug)]
enum Step {
    Key(String),
    Index(usize),
}

#[derive(Debug)]
enum Wrong {
    Key { name: String, valid: &'static [&'static str] },
    Value { name: String, valid: &'static [&'static str] },
    Type { expected: String },
    Missing { name: &'static str },
    Other { reason: String },
}

impl From<Wrong> for Fault {
    fn from(wrong: Wrong) -> Self {
        Self { wrong: Box::new(wrong), place: None, found: None, steps: Vec::new() }
    }
}

impl Fault {
    /// Takes place and description of `node`, unless a node inside it was already to blame.
    fn in_node(mut self, node: &Node) -> Self {
        self.found.get_or_insert_with(|| node.describe());
        self.place.get_or_insert_with(|| node.place.clone());
        self
    }

    fn at_key(mut self, key: &Key) -> Self {
        self.place.get_or_insert_with(|| key.place.clone());
        self
    }

    fn below(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    fn path(&self) -> String {
        self.steps.iter().rev().fold(String::new(), |path, step| match step {
            Step::Key(name) => join(&path, name),
            Step::Index(index) => format!("{path}[{index}]"),
        })
    }

    fn into_error(self, root: &Node) -> Error {
        let path = self.path();
        let problem = match *self.wrong {
            Wrong::Key { name, valid } => unknown_key(&path, &name, valid),
            Wrong::Value { name, valid } => unknown_value(path, &name, valid),
            Wrong::Missing { name } => Problem::Missing { key: join(&path, name), expected: "a value".to_owned() },
            Wrong::Other { reason } => Problem::Invalid { key: path, reason },
            Wrong::Type { expected } if path.is_empty() => {
                Problem::NotAnExperiment { expected, found: self.found.unwrap_or_default() }
            }
            Wrong::Type { expected } => {
                Problem::WrongType { key: path, expected, found: self.found.unwrap_or_default() }
            }
        };
        self.place.unwrap_or_else(|| root.place.clone()).error(problem)
    }
}

fn unknown_key(parent: &str, name: &str, valid: &[&str]) -> Problem {
    let mut hint = did_you_mean(name, valid);
    if hint.is_empty() {
        hint = format!(", expected {}", one_of(valid));
    }
    let parent = if parent.is_empty() { "the experiment".to_owned() } else { format!("`{parent}`") };
    Problem::UnknownKey { key: shortened(name), parent, hint }
}

fn unknown_value(key: String, name: &str, valid: &[&str]) -> Problem {
    let hint = did_you_mean(name, valid);
    Problem::UnknownValue { key, expected: one_of(valid), found: shortened(name), hint }
}

/// The nearest name that is valid, also where the case alone differs.
fn did_you_mean(name: &str, valid: &[&str]) -> String {
    let known = || valid.iter().copied();
    let nearest = known().find(|known| known.eq_ignore_ascii_case(name)).or_else(|| names::nearest(name, known()));
    match nearest {
        Some(nearest) => format!(", did you mean `{nearest}`?"),
        None => String::new(),
    }
}

fn one_of(valid: &[&str]) -> String {
    let quoted: Vec<_> = valid.iter().map(|name| format!("`{name}`")).collect();
    match quoted.as_slice() {
        [only] => only.clone(),
        _ => format!("one of {}", quoted.join(", ")),
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.wrong)
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(reason: T) -> Self {
        Wrong::Other { reason: printable(&reason.to_string()) }.into()
    }

    fn invalid_type(_: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Wrong::Type { expected: expected.to_string() }.into()
    }

    fn unknown_field(name: &str, valid: &'static [&'static str]) -> Self {
        Wrong::Key { name: name.to_owned(), valid }.into()
    }

    fn unknown_variant(name: &str, valid: &'static [&'static str]) -> Self {
        Wrong::Value { name: name.to_owned(), valid }.into()
    }

    fn missing_field(name: &'static str) -> Self {
        Wrong::Missing { name }.into()
    }
}

/// Reads one node.
#[derive(Clone, Copy)]
struct Reader<'a>(&'a Node);

impl<'a> Reader<'a> {
    fn refuse<T>(self, expected: &str) -> Result<T, Fault> {
        Err(Fault::from(Wrong::Type { expected: expected.to_owned() }).in_node(self.0))
    }

    fn text(self, expected: &str) -> Result<&'a str, Fault> {
        match &self.0.value {
            Value::Text(text) => Ok(text),
            _ => self.refuse(expected),
        }
    }
}

impl<'de> Deserializer<'de> for Reader<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let read = match &self.0.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Int(value) => visitor.visit_i128(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(value) => visitor.visit_str(value),
            Value::List(items) => visitor.visit_seq(Items { items: items.iter().enumerate() }),
            Value::Map(fields) => visitor.visit_map(Fields { fields: fields.iter(), current: None }),
        };
        read.map_err(|fault| fault.in_node(self.0))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0.value {
            Value::Bool(value) => visitor.visit_bool(value),
            _ => self.refuse("true or false"),
        }
    }

    fn deserialize_i128<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0.value {
            Value::Int(value) => visitor.visit_i128(value),
            _ => self.refuse("a whole number"),
        }
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let number = match self.0.value {
            Value::Int(value) => u64::try_from(value).ok(),
            _ => None,
        };
        match number {
            Some(value) => visitor.visit_u64(value),
            None => self.refuse("a whole number, 0 or more"),
        }
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0.value {
            Value::Int(value) => visitor.visit_f64(value as f64),
            Value::Float(value) => visitor.visit_f64(value),
            _ => self.refuse("a number"),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_str(self.text("text (in quotes where it reads as a number)")?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0.value {
            Value::List(_) => self.deserialize_any(visitor),
            _ => self.refuse("a list"),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self.0.value {
            Value::Map(_) => self.deserialize_any(visitor),
            _ => self.refuse("a map of keys"),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        valid: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let name: StrDeserializer<'_, Fault> = self.text(&one_of(valid))?.into_deserializer();
        visitor.visit_enum(name).map_err(|fault| fault.in_node(self.0))
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 u8 u16 u32 u128 f32 char bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct map
        identifier ignored_any
    }
}

struct Items<'a> {
    items: std::iter::Enumerate<std::slice::Iter<'a, Node>>,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        let read = seed.deserialize(Reader(node));
        read.map(Some).map_err(|fault| fault.in_node(node).below(Step::Index(index)))
    }
}

struct Fields<'a> {
    fields: std::slice::Iter<'a, (Key, Node)>,
    current: Option<&'a (Key, Node)>,
}

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        self.current = self.fields.next();
        let Some((key, _)) = self.current else { return Ok(None) };
        let name: StrDeserializer<'_, Fault> = key.name.as_str().into_deserializer();
        seed.deserialize(name).map(Some).map_err(|fault| fault.at_key(key))
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let Some((key, node)) = self.current else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        let read = seed.deserialize(Reader(node));
        read.map_err(|fault| fault.in_node(node).below(Step::Key(key.name.clone())))
    }
}
