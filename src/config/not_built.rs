//! What the format has a name for and tsquant does not do yet. Building one removes its line here.

/// Full paths of keys.
const NOT_BUILT: &[&str] = &["quantization.accuracy"];

/// Whether the key with this full path is yet to be built.
pub(super) fn key(path: &str) -> bool {
    NOT_BUILT.contains(&path)
}

/// The names of the keys in the map at `parent` that are yet to be built.
pub(super) fn keys(parent: &str) -> Vec<&'static str> {
    let split = |key: &&'static str| key.rsplit_once('.').unwrap_or(("", key));
    NOT_BUILT.iter().map(split).filter(|(map, _)| *map == parent).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::super::decode::decode;
    use super::super::document::{Node, Value as Yaml};
    use super::super::error::{Origin, Place};
    use super::super::keys::Keys;
    use super::*;

    /// Fails for an entry whose key has been built, or whose path has a slip in it.
    #[test]
    fn refuses_every_entry_as_such() {
        for path in NOT_BUILT {
            let place = Place::whole(Origin::Flag("here".to_owned()));
            let text = Node { place, value: Yaml::Text("anything".to_owned()) };
            let tree = Node::nested(&path.split('.').collect::<Vec<_>>(), text);
            let error = decode::<Keys>(&tree).unwrap_err().to_string();
            assert_eq!(error, format!("here: `{path}` is not built yet"));
        }
    }
}
