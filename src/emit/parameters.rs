//! Constants of the graph as named parameters and buffers, so that `.to(device)` moves them and `state_dict()` shows them
//! under the user's own names.

use std::collections::{BTreeMap, BTreeSet};

use super::Emission;
use crate::correct::Bias;
use crate::jit::{self, Clean, Constant, Listing, Parameter, Place, ValueId};
use crate::sites::Sites;

/// All tensor constants but single integers and doubles, one parameter or buffer per tensor; weights are replaced by their quantized
/// form, biases by their corrected one.
pub(super) fn collect(model: &Clean, emission: &Emission<'_>) -> Result<Vec<Parameter>, jit::Error> {
    let (listing, sites, weights) = (model.listing(), emission.sites, emission.weights);
    let names = Names::new(model, sites)?;
    let mut quantized = BTreeMap::new();
    for (site, tensor) in sites.weights.iter().zip(weights) {
        site.values.iter().for_each(|&value| {
            quantized.insert(value, tensor);
        });
    }
    let all_weights = sites.weights.iter().chain(&sites.float_weights);
    let weights_of_model: BTreeSet<_> = all_weights.flat_map(|site| site.values.iter().copied()).collect();
    let mut parameters = Vec::new();
    let mut named = BTreeMap::<_, String>::new();
    let mut taken: BTreeSet<String> = model.attributes()?.into_iter().collect();
    let replaced = replaced(listing, emission.biases);
    for (value, constant) in constants(listing) {
        if replaced.contains_key(&value) {
            continue;
        }
        let key = constant.identity();
        let name = match named.get(&key) {
            Some(name) => name.clone(),
            None => free_name(&names.of(value, constant), &mut taken),
        };
        named.insert(key, name.clone());
        let tensor = match quantized.get(&value) {
            Some(tensor) => tensor.shallow_clone(),
            None => model.constant(value)?,
        };
        let is_buffer = !weights_of_model.contains(&value) && !names.is_parameter(constant);
        parameters.push(Parameter { place: Place::Constant(value), name, is_buffer, tensor });
    }
    for (number, bias) in emission.biases.iter().enumerate() {
        let old = replaced.iter().find(|(_, by)| **by == [number]).map(|(value, _)| *value);
        let old = old.and_then(|value| Some(names.of(value, listing.values[value].constant.as_ref()?)));
        let name = free_name(&old.unwrap_or_else(|| format!("{}.bias", bias.layer)), &mut taken);
        parameters.push(Parameter { place: bias.place, name, is_buffer: false, tensor: bias.tensor.shallow_clone() });
    }
    Ok(parameters)
}

/// Constants that nothing reads any more, each with the numbers of the biases in its place.
fn replaced(listing: &Listing, biases: &[Bias]) -> BTreeMap<ValueId, Vec<usize>> {
    let numbered = biases.iter().enumerate();
    let by_place: Vec<_> = numbered.map(|(number, bias)| (bias.place, number)).collect();
    let mut readers: BTreeMap<ValueId, Vec<Option<usize>>> = BTreeMap::new();
    for node in &listing.nodes {
        for (slot, &value) in node.inputs.iter().enumerate() {
            let place = node.outputs.first().map(|&result| Place::Input { result, slot });
            let by = by_place.iter().find(|(other, _)| Some(*other) == place).map(|(_, number)| *number);
            readers.entry(value).or_default().push(by);
        }
    }
    let returned = listing.blocks.iter().flat_map(|block| &block.returns);
    returned.for_each(|&value| readers.entry(value).or_default().push(None));
    let all = readers.into_iter().filter_map(|(value, by)| Some((value, by.into_iter().collect::<Option<Vec<_>>>()?)));
    all.collect()
}

/// Tensor constants that have to move with the model: all but those without an axis that hold an integer or a double,
/// which are numbers to libtorch wherever they live.
fn constants(listing: &Listing) -> impl Iterator<Item = (ValueId, &Constant)> {
    let constants = listing.values.iter().enumerate().filter_map(|(id, value)| Some((id, value.constant.as_ref()?)));
    constants.filter(|(_, constant)| {
        constant.is_tensor() && constant.storage != 0 && (constant.dtype == "Float" || !constant.shape.is_empty())
    })
}

/// How constants are called.
struct Names {
    /// Value → name by the layer that uses it.
    by_layer: BTreeMap<ValueId, String>,
    /// Parameters of the user's model.
    parameters: BTreeSet<String>,
}

impl Names {
    fn new(model: &Clean, sites: &Sites) -> Result<Self, jit::Error> {
        let listing = model.listing();
        let tensors = model.module().tensors()?.into_iter();
        let parameters = tensors.filter(|tensor| !tensor.is_buffer).map(|tensor| tensor.name).collect();
        let mut by_layer = BTreeMap::new();
        for layer in &sites.layers {
            let node = &listing.nodes[layer.node];
            for (slot, &value) in node.inputs.iter().enumerate() {
                let is_vector =
                    listing.values[value].constant.as_ref().is_some_and(|constant| constant.shape.len() == 1);
                let name = if slot == 2 && is_vector { "bias".to_owned() } else { format!("constant_{slot}") };
                by_layer.entry(value).or_insert_with(|| format!("{}.{name}", layer.name));
            }
        }
        for site in sites.weights.iter().chain(&sites.float_weights) {
            site.values.iter().for_each(|&value| {
                by_layer.insert(value, site.name.clone());
            });
        }
        Ok(Self { by_layer, parameters })
    }

    /// Its own name if it is still the user's tensor, else one by its layer, else a number.
    fn of(&self, value: ValueId, constant: &Constant) -> String {
        let by_layer = || self.by_layer.get(&value).cloned();
        constant.parameter.clone().or_else(by_layer).unwrap_or_else(|| format!("constants.c{value}"))
    }

    /// What the user's model called a parameter stays one; other constants become buffers, which training leaves alone.
    fn is_parameter(&self, constant: &Constant) -> bool {
        let named = constant.parameter.as_ref().is_some_and(|name| self.parameters.contains(name));
        named && constant.dtype == "Float"
    }
}

/// A name that can be an attribute path and clashes with none before it, neither as a tensor nor as a module.
pub(crate) fn free_name(wanted: &str, taken: &mut BTreeSet<String>) -> String {
    let clean: String = wanted.chars().map(|c| if c.is_alphanumeric() || c == '.' { c } else { '_' }).collect();
    let inside = |outer: &str, inner: &str| inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('.'));
    // A tensor cannot hold another: give up the path where one of its modules is a tensor's name.
    let base = if taken.iter().any(|other| inside(other, &clean)) { clean.replace('.', "_") } else { clean };
    let clashes = |name: &str| taken.iter().any(|other| other == name || inside(name, other));
    let mut name = base.clone();
    for number in 2u32.. {
        if !clashes(&name) {
            break;
        }
        name = format!("{base}_{number}");
    }
    taken.insert(name.clone());
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_neither_clash_nor_nest() {
        let mut taken = BTreeSet::new();
        assert_eq!(free_name("conv1.weight", &mut taken), "conv1.weight");
        assert_eq!(free_name("conv1.weight", &mut taken), "conv1.weight_2");
        assert_eq!(free_name("conv1", &mut taken), "conv1_2");
        assert_eq!(free_name("conv1.weight.scale", &mut taken), "conv1_weight_scale");
        assert_eq!(free_name("conv1#2.bias", &mut taken), "conv1_2_bias");
    }
}
