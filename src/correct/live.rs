//! How much of a model is in memory between two of its ops. It knows the graph as it was seen, and runs nothing.

use std::collections::BTreeMap;

use crate::jit::{Listing, Value, ValueId};

/// The most bytes of float values of one row that are there at any time, some of them counted twice where an op gives a view.
#[must_use]
pub fn live_bytes_of_a_row(listing: &Listing) -> u64 {
    let bytes = |value: &Value| {
        let shape = &value.seen.as_ref()?.shape;
        Some(shape.iter().map(|size| size.unsigned_abs()).product::<u64>() * 4)
    };
    let rows = listing.arguments().iter().find_map(|&value| {
        let seen = listing.values.get(value)?.seen.as_ref()?;
        seen.shape.first().map(|rows| rows.unsigned_abs().max(1))
    });
    let mut last: BTreeMap<ValueId, usize> = BTreeMap::new();
    for (place, node) in listing.nodes.iter().enumerate() {
        last.extend(node.inputs.iter().map(|&value| (value, place)));
    }
    let returned = listing.blocks.first().map(|forward| forward.returns.as_slice()).unwrap_or_default();
    last.extend(returned.iter().map(|&value| (value, listing.nodes.len())));
    let mut ends: BTreeMap<usize, u64> = BTreeMap::new();
    // What goes in is there all the time.
    let arguments = listing.arguments().iter().filter_map(|&value| bytes(listing.values.get(value)?));
    let (mut live, mut most) = (arguments.sum::<u64>(), 0u64);
    for (place, node) in listing.nodes.iter().enumerate() {
        for &value in &node.outputs {
            let Some(bytes) = listing.values.get(value).and_then(bytes) else { continue };
            live += bytes;
            *ends.entry(last.get(&value).copied().unwrap_or(place)).or_default() += bytes;
        }
        most = most.max(live);
        while let Some(end) = ends.first_entry().filter(|end| *end.key() <= place) {
            live = live.saturating_sub(end.remove());
        }
    }
    most / rows.unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jit::{Block, Node, Seen};

    /// Two values of 4 rows at a time: the first one is gone when the third comes.
    #[test]
    fn values_end_with_their_last_reader() {
        let value = |shape: &[i64]| Value {
            is_tensor: true,
            seen: Some(Seen { dtype: "Float".to_owned(), shape: shape.to_vec() }),
            ..Value::default()
        };
        let values = vec![Value::default(), value(&[4, 3]), value(&[4, 10]), value(&[4, 7]), value(&[4, 6])];
        let node = |input, output| Node { inputs: vec![input], outputs: vec![output], ..Node::default() };
        let forward = Block { parameters: vec![0, 1], returns: vec![4], ..Block::default() };
        let nodes = vec![node(1, 2), node(2, 3), node(3, 4)];
        let listing = Listing { values, blocks: vec![forward], nodes };
        assert_eq!(live_bytes_of_a_row(&listing), 4 * (3 + 10 + 7));
    }
}
