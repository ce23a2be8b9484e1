//! What the format has a name for and tsquant does not do yet. Building one removes its line here.

/// A key, or one value of a key.
enum NotBuilt {
    Key(&'static str),
    Value(&'static str, &'static str),
}

use NotBuilt::{Key, Value};

/// `[]` stands for every item of a list.
const NOT_BUILT: &[NotBuilt] = &[
    Key("mixed_precision"),
    Key("quantization.weights.rounding"),
    Key("quantization.accuracy"),
    Key("output.reduce_range"),
    Value("quantization.weights_bias_correction", "weighted"),
];

/// Whether the key with this full path is yet to be built.
pub(super) fn key(path: &str) -> bool {
    NOT_BUILT.iter().any(|entry| matches!(entry, Key(key) if *key == path))
}

/// The names of the keys in the map at `parent` that are yet to be built.
pub(super) fn keys(parent: &str) -> Vec<&'static str> {
    let split = |key: &'static str| key.rsplit_once('.').unwrap_or(("", key));
    let keys = NOT_BUILT.iter().filter_map(|entry| if let Key(key) = entry { Some(split(key)) } else { None });
    keys.filter(|(map, _)| *map == parent).map(|(_, name)| name).collect()
}

/// Whether this value of the key, or of an item of its list, is yet to be built.
pub(super) fn value(path: &str, name: &str) -> bool {
    values(path).contains(&name)
}

/// The values of the key, or of an item of its list, that are yet to be built.
pub(super) fn values(path: &str) -> Vec<&'static str> {
    let path = without_indices(path);
    let key_of_list = path.strip_suffix("[]").unwrap_or(&path);
    let values = NOT_BUILT.iter().filter_map(|entry| match entry {
        Value(key, value) if *key == path || *key == key_of_list => Some(*value),
        _ => None,
    });
    values.collect()
}

/// `overrides[].weights` of `overrides[3].weights`.
fn without_indices(path: &str) -> String {
    let mut parts = path.split('[');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |path, part| {
        path + "[]" + part.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches(']')
    })
}

#[cfg(test)]
mod tests {
    use super::super::decode::decode;
    use super::super::document::{Node, Value as Yaml};
    use super::super::error::{Origin, Place};
    use super::super::keys::Keys;
    use super::*;

    /// Fails for an entry whose key or value has been built, or whose path has a slip in it.
    #[test]
    fn refuses_every_entry_as_such() {
        for entry in NOT_BUILT {
            let (path, text, what) = match entry {
                Key(path) => (path, "anything", (*path).to_owned()),
                Value(path, value) => (path, *value, format!("{path}: {value}")),
            };
            let place = Place::whole(Origin::Flag("here".to_owned()));
            let text = Node { place: place.clone(), value: Yaml::Text(text.to_owned()) };
            let nested = |path: &str, inner| Node::nested(&path.split('.').collect::<Vec<_>>(), inner);
            let tree = match path.split_once("[].") {
                Some((list, rest)) => {
                    let items = Yaml::List(vec![nested(rest, text)]);
                    nested(list, Node { place, value: items })
                }
                None => nested(path, text),
            };
            let what = what.replace("[]", "[0]");
            let error = decode::<Keys>(&tree).unwrap_err().to_string();
            assert_eq!(error, format!("here: `{what}` is not built yet"));
        }
    }
}
