//! YAML as a tree whose every node knows where it was typed, and trees laid over one another.
//!
//! It knows YAML and positions; it refuses to know what any key means.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_yaml::{DuplicateKeyPolicy, MergeKeyPolicy, NonFiniteFloatPolicy, Spanned};

use super::error::{Error, Origin, Place, Problem, Spot, printable, shortened};

/// Nesting beyond which no experiment goes; bounds every recursion over a tree.
pub(super) const MAX_DEPTH: usize = 16;
/// Nodes beyond which no experiment goes, those that aliases repeat included.
const MAX_NODES: usize = 20_000;

/// A value and where it was typed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Value,
}

/// A YAML value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A key of a map and where it was typed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Key {
    pub(super) place: Place,
    pub(super) name: String,
}

impl Node {
    /// Parses one YAML document.
    ///
    /// # Errors
    /// No YAML, several documents, a duplicate key, tags and merge keys, more nesting or nodes than any experiment has.
    pub(super) fn parse(text: &str, origin: &Arc<Origin>) -> Result<Self, Error> {
        let root: Spanned<Raw> = serde_yaml::from_str_with_options(text, options()).map_err(|e| syntax(&e, origin))?;
        Self::from_raw(root, origin, "")
    }

    /// A document that holds `value` at the end of `path` alone.
    pub(super) fn nested(path: &[&str], value: Self) -> Self {
        path.iter().rev().fold(value, |inner, name| {
            let place = inner.place.clone();
            let key = Key { place: place.clone(), name: (*name).to_owned() };
            Self { place, value: Value::Map(vec![(key, inner)]) }
        })
    }

    /// Lays `over` on this tree: maps field by field, anything else replaced, and so are `whole` keys' maps.
    pub(super) fn lay(&mut self, over: Self, whole: &[&str]) {
        match (&mut self.value, over.value) {
            (Value::Map(fields), Value::Map(entries)) => {
                for (key, node) in entries {
                    match fields.iter_mut().find(|(field, _)| field.name == key.name) {
                        Some((field, below)) if whole.contains(&field.name.as_str()) => *below = node,
                        Some((_, below)) => below.lay(node, whole),
                        None => fields.push((key, node)),
                    }
                }
            }
            (value, replacement) => {
                *value = replacement;
                self.place = over.place;
            }
        }
    }

    /// Where the value of a key such as `calibration.inputs[0]` was typed, or the nearest node that holds it.
    pub(super) fn place_of(&self, key: &str) -> Place {
        let mut node = self;
        for step in key.split(['.', '[']) {
            match node.below(step) {
                Some(below) => node = below,
                None => break,
            }
        }
        node.place.clone()
    }

    /// Whether a value was typed for the first two names of a key such as `calibration.inputs[0]`.
    pub(super) fn says(&self, key: &str) -> bool {
        let mut steps = key.split(['.', '[']).take(2);
        let typed = steps.try_fold(self, |node, step| node.below(step));
        typed.is_some_and(|typed| typed.value != Value::Null)
    }

    fn below(&self, step: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(fields) => fields.iter().find(|(field, _)| field.name == step).map(|(_, below)| below),
            Value::List(items) => step.trim_end_matches(']').parse().ok().and_then(|i: usize| items.get(i)),
            _ => None,
        }
    }

    /// The value of a map's key.
    pub(super) fn field(&self, name: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(fields) => fields.iter().find(|(key, _)| key.name == name).map(|(_, value)| value),
            _ => None,
        }
    }

    /// The items of a list.
    pub(super) fn items(&self) -> &[Self] {
        match &self.value {
            Value::List(items) => items,
            _ => &[],
        }
    }

    /// The map without this key.
    pub(super) fn without(&self, name: &str) -> Self {
        let mut rest = self.clone();
        if let Value::Map(fields) = &mut rest.value {
            fields.retain(|(key, _)| key.name != name);
        }
        rest
    }

    /// An error about this value, which `key` is the path of.
    pub(super) fn invalid(&self, key: &str, reason: &str) -> Error {
        self.place.error(Problem::Invalid { key: key.to_owned(), reason: reason.to_owned() })
    }

    /// As YAML on one line.
    pub(super) fn to_flow(&self) -> String {
        match &self.value {
            Value::Null => "null".to_owned(),
            Value::Bool(value) => value.to_string(),
            Value::Int(value) => value.to_string(),
            Value::Float(value) => format!("{value:?}"),
            Value::Text(text) => text_to_flow(text),
            Value::List(items) => {
                format!("[{}]", items.iter().map(Self::to_flow).collect::<Vec<_>>().join(", "))
            }
            Value::Map(fields) => {
                let fields =
                    fields.iter().map(|(key, value)| format!("{}: {}", text_to_flow(&key.name), value.to_flow()));
                format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
            }
        }
    }

    /// What was typed, for a message.
    pub(super) fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Bool(value) => format!("`{value}`"),
            Value::Int(value) => format!("the number {value}"),
            Value::Float(value) => format!("the number {value:?}"),
            Value::Text(text) => format!("the text `{}`", shortened(text)),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
        }
    }

    fn from_raw(raw: Spanned<Raw>, origin: &Arc<Origin>, path: &str) -> Result<Self, Error> {
        let place = place(origin, &raw.referenced);
        let value = match raw.value {
            Raw::Null => Value::Null,
            Raw::Bool(value) => Value::Bool(value),
            Raw::Int(value) => Value::Int(value),
            Raw::Float(value) => Value::Float(value),
            Raw::Text(value) => Value::Text(value),
            Raw::List(items) => {
                let nodes = items.into_iter().enumerate();
                let nodes = nodes.map(|(i, item)| Self::from_raw(item, origin, &format!("{path}[{i}]")));
                Value::List(nodes.collect::<Result<_, _>>()?)
            }
            Raw::Map(entries) => Value::Map(Self::fields(entries, origin, path)?),
        };
        Ok(Self { place, value })
    }

    fn fields(entries: Vec<Entry>, origin: &Arc<Origin>, path: &str) -> Result<Vec<(Key, Self)>, Error> {
        let mut fields: Vec<(Key, Self)> = Vec::with_capacity(entries.len());
        let mut names = std::collections::HashSet::new();
        for (key, value) in entries {
            let path = join(path, &key.value);
            let key = Key { place: place(origin, &key.referenced), name: key.value };
            if !names.insert(key.name.clone()) {
                return Err(key.place.error(Problem::Duplicate { key: path }));
            }
            fields.push((key, Self::from_raw(value, origin, &path)?));
        }
        Ok(fields)
    }
}

/// A text as YAML: plain where that is a text again, else in quotes as JSON has it, which YAML reads.
fn text_to_flow(text: &str) -> String {
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_./-".contains(c));
    let is_word = ["null", "true", "false", "yes", "no", "on", "off", "y", "n"].contains(&text.to_lowercase().as_str());
    if is_plain && !is_word { text.to_owned() } else { serde_json::Value::from(text).to_string() }
}

/// The path of the key `name` in the map at `parent`, for a message.
pub(super) fn join(parent: &str, name: &str) -> String {
    let name = shortened(name);
    if parent.is_empty() { name } else { format!("{parent}.{name}") }
}

/// Strict YAML 1.2 within bounds. Duplicate keys pass, to be refused where their full path is known.
fn options() -> serde_yaml::Options {
    serde_yaml::options! {
        budget: serde_yaml::budget! { max_depth: MAX_DEPTH, max_nodes: MAX_NODES },
        alias_limits: serde_yaml::alias_limits! { max_total_replayed_events: MAX_NODES },
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::Error,
        leading_zero_numbers_as_strings: true,
        strict_booleans: true,
        null_as_string: true,
        reject_unsupported_tags: true,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        with_snippet: false,
    }
}

fn place(origin: &Arc<Origin>, at: &serde_yaml::Location) -> Place {
    Place { origin: Arc::clone(origin), spot: Some(Spot { line: at.line().max(1), column: at.column().max(1) }) }
}

fn syntax(error: &serde_yaml::Error, origin: &Arc<Origin>) -> Error {
    let location = error.location();
    let reason = match error.without_snippet() {
        serde_yaml::Error::MultipleDocuments { .. } => "expected one document, found several".to_owned(),
        other => {
            let text = other.to_string();
            let tail = location.map(|at| format!(" at line {}, column {}", at.line(), at.column())).unwrap_or_default();
            printable(text.strip_suffix(&tail).unwrap_or(&text))
        }
    };
    let place = match location {
        Some(at) => place(origin, &at),
        None => Place { origin: Arc::clone(origin), spot: None },
    };
    place.error(Problem::Syntax { reason })
}

/// A value as the parser hands it over.
enum Raw {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Spanned<Raw>>),
    Map(Vec<Entry>),
}

type Entry = (Spanned<String>, Spanned<Raw>);

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Int(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Int(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Raw, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Raw::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Raw::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Node, String> {
        Node::parse(text, &Arc::new(Origin::File("/x.yaml".into()))).map_err(|e| e.to_string())
    }

    fn place_of(text: &str, key: &str) -> String {
        parse(text).unwrap().place_of(key).to_string()
    }

    #[test]
    fn knows_where_each_value_was_typed() {
        let text = "a: 1\nb:\n  c: {d: [x, y]}\n";
        assert_eq!(place_of(text, "a"), "/x.yaml:1:4");
        assert_eq!(place_of(text, "b.c.d[1]"), "/x.yaml:3:14");
        assert_eq!(place_of(text, "b.c.missing"), "/x.yaml:3:6", "the map that should hold it");
    }

    #[test]
    fn reads_yaml_1_2_scalars() {
        let text = "[null, ~, true, yes, 1, 0x10, 1.0, 1e3, .inf, '1', 007, 18446744073709551616]";
        let Value::List(items) = parse(text).unwrap().value else { panic!("no list") };
        let shown: Vec<_> = items.iter().map(Node::describe).collect();
        let expected = "nothing|nothing|`true`|the text `yes`|the number 1|the number 16|the number 1.0|\
                        the number 1000.0|the number inf|the text `1`|the text `007`|the number 1.8446744073709552e19";
        assert_eq!(shown.join("|"), expected);
    }

    #[test]
    fn refuses_what_is_not_one_plain_document() {
        let refused = [
            ("a: 1\nb: {c: 1, c: 2}\n", "/x.yaml:2:11: `b.c` is given twice"),
            ("a: 1\n---\nb: 2\n", "/x.yaml:3:1: not valid YAML: expected one document, found several"),
            ("a: [1", "/x.yaml:1:4: not valid YAML: unclosed bracket '['"),
            ("a: *x", "/x.yaml:1:4: not valid YAML: alias references unknown anchor"),
            ("<<: {a: 1}", "/x.yaml:1:1: not valid YAML: YAML merge keys are not allowed by configured policy"),
            ("a: !foo 1", "/x.yaml:1:9: not valid YAML: unsupported tag `!foo`"),
        ];
        for (text, expected) in refused {
            assert_eq!(parse(text).unwrap_err(), expected);
        }
    }

    #[test]
    fn bounds_depth_and_alias_bombs() {
        for deep in ["[".repeat(100_000), format!("{}1{}", "{a: ".repeat(30), "}".repeat(30)), "- ".repeat(5_000)] {
            assert!(parse(&deep).unwrap_err().contains("not valid YAML"));
        }
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..10 {
            let inner = vec![format!("*a{}", i - 1); 10].join(", ");
            bomb += &format!("a{i}: &a{i} [{inner}]\n");
        }
        assert!(parse(&bomb).unwrap_err().contains("not valid YAML"));
    }

    #[test]
    fn lays_maps_field_by_field() {
        let mut base = parse("a: {b: 1, c: 2, in: {x: 1}}\nd: [1, 2]").unwrap();
        base.lay(parse("a: {c: 3, in: {y: 2}, e: 4}\nd: [5]").unwrap(), &["in"]);
        let both = parse("a: {b: 1, c: 3, in: {y: 2}, e: 4}\nd: [5]").unwrap();
        assert_eq!(values(&base), values(&both));
    }

    fn values(node: &Node) -> String {
        match &node.value {
            Value::Map(fields) => {
                let fields = fields.iter().map(|(key, below)| format!("{}: {}", key.name, values(below)));
                format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
            }
            Value::List(items) => format!("[{}]", items.iter().map(values).collect::<Vec<_>>().join(", ")),
            _ => node.describe(),
        }
    }
}
