//! Which ops let no gradient through: asked only to explain an error.

use tch::Tensor;

use super::{Error, Layers, lifted, taps};
use crate::config::HessianRequest;
use crate::dataset::Dataset;
use crate::feed;
use crate::jit::{Arguments, BoxError, Clean, Listing, Tap, TapKind, Visit};

/// Ops that are named; more are counted only.
const NAMED: usize = 4;

/// Sees which values carry a gradient.
struct Sight(Vec<Option<bool>>);

impl Visit for Sight {
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        if let Some(slot) = self.0.get_mut(tap) {
            *slot = Some(value.requires_grad());
        }
        Ok(())
    }
}

/// As [`of_run`], on the first batch.
pub(super) fn describe(
    model: &Clean,
    layers: Layers<'_>,
    data: &Dataset,
    request: &HessianRequest,
) -> Result<String, Error> {
    let Some(batch) = data.sample(request.samples, request.seed, request.batch_size).next() else {
        return Ok(String::new());
    };
    of_run(model, layers, &feed::bind(model.module(), batch?)?)
}

/// The ops that take a value with a gradient and give only tensors without, in words.
pub(super) fn of_run(model: &Clean, layers: Layers<'_>, arguments: &Arguments) -> Result<String, Error> {
    let listing = model.listing();
    let tensors = listing.values.iter().enumerate();
    let tensors = tensors.filter(|(_, value)| value.is_tensor && value.constant.is_none());
    // Behind the taps on gradients, so that it is seen what they let through.
    let watched = tensors.map(|(value, _)| Tap { value, number: value, kind: TapKind::Observe });
    let all: Vec<Tap> = watched.chain(taps(layers)).collect();
    let mut sight = Sight(vec![None; listing.values.len()]);
    model.differentiable(&all, &lifted(layers))?.record(arguments, &mut sight)?;
    let reached = |value: usize| sight.0.get(value).copied().flatten();
    Ok(in_words(&cutting_ops(listing, &lifted(layers), reached)))
}

fn cutting_ops(listing: &Listing, lifted: &[usize], reached: impl Fn(usize) -> Option<bool>) -> Vec<String> {
    let has_gradient = |value: &usize| reached(*value) == Some(true) || lifted.contains(value);
    let cuts = listing.nodes.iter().filter(|node| {
        let outputs: Vec<bool> = node.outputs.iter().filter_map(|&value| reached(value)).collect();
        node.inputs.iter().any(has_gradient) && !outputs.is_empty() && !outputs.contains(&true)
    });
    let mut ops: Vec<String> = Vec::new();
    for node in cuts {
        let place = if node.path.is_empty() { String::new() } else { format!(" in {}", node.path) };
        let name = format!("{}{place}", node.op);
        if !ops.contains(&name) {
            ops.push(name);
        }
    }
    ops
}

fn in_words(ops: &[String]) -> String {
    match ops {
        [] => "no op was seen that lets no gradient through".to_owned(),
        [only] => format!("{only} lets no gradient through"),
        _ => {
            let named = ops.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
            let more = ops.len().saturating_sub(NAMED);
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            format!("{named}{more} let no gradient through")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        let ops = |count: usize| (0..count).map(|index| format!("aten::op{index}")).collect::<Vec<_>>();
        assert_eq!(in_words(&ops(0)), "no op was seen that lets no gradient through");
        assert_eq!(in_words(&ops(1)), "aten::op0 lets no gradient through");
        let many = "aten::op0, aten::op1, aten::op2, aten::op3 and 2 more let no gradient through";
        assert_eq!(in_words(&ops(6)), many);
    }
}
