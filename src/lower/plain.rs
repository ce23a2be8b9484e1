//! Ops without weights on quantized tensors: sums, products, concatenation, functions, pooling, views.

use super::kernels::{self, Function, Kernel};
use super::recipe::Recipe;
use super::walk::{Stay, Walk};
use crate::jit::{Makes, NodeId, Operand, Position, Reader, ValueId};
use crate::sites;

/// Reason of an op that reads nothing in 8 bits.
const FLOAT_INPUT: &str = "what it reads is in float";
/// Reason of an op whose operands are not all sites.
const NOT_BOTH: &str = "not all of its operands have an 8-bit quantizer";

impl Walk<'_> {
    pub(super) fn binary(&mut self, id: NodeId, names: [&'static str; 2], factor: Option<usize>) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let operands = [node.inputs[0], node.inputs[1]];
        if !operands.iter().any(|&value| self.native(value).is_some()) {
            return Err(FLOAT_INPUT.into());
        }
        if operands.iter().any(|&value| self.graph.listing.values[value].constant.is_some()) {
            return Err("its 8-bit kernel takes no constant operand".into());
        }
        if factor.is_some_and(|slot| self.graph.number(node, slot) != Some(1.0)) {
            return Err("its 8-bit kernel takes no factor".into());
        }
        let eights = operands.map(|value| self.eight(value));
        let [Some(left), Some(right)] = eights else { return Err(NOT_BOTH.into()) };
        // The kernels make room for a result of the shape of the first.
        let shape = |value: ValueId| self.graph.listing.values[value].seen.as_ref().map(|seen| &seen.shape);
        let [is_first, is_second] = operands.map(|value| shape(value) == shape(node.outputs[0]));
        if !is_first && !is_second {
            return Err("its 8-bit kernel takes an operand of the result's shape".into());
        }
        let target = self.target(id)?;
        let mut inputs = vec![self.quantized(operands[0], &left), self.quantized(operands[1], &right)];
        if !is_first {
            inputs.swap(0, 1);
        }
        let reads = vec![(id, 0, operands[0]), (id, 1, operands[1])];
        self.put(id, names, inputs, (target, reads));
        Ok(())
    }

    pub(super) fn concat(&mut self, id: NodeId) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let elements = self.graph.elements(node.inputs[0]).ok_or("its list is not put together in the graph")?;
        if !elements.iter().any(|&value| self.native(value).is_some()) {
            return Err(FLOAT_INPUT.into());
        }
        let eights: Option<Vec<_>> = elements.iter().map(|&value| Some((value, self.eight(value)?))).collect();
        let eights = eights.ok_or(NOT_BOTH)?;
        let target = self.target(id)?;
        let list = self.graph.maker(node.inputs[0]).unwrap_or(id);
        let reads = elements.iter().enumerate().map(|(slot, &value)| (list, slot, value)).collect();
        let inputs = eights.into_iter().map(|(value, eight)| self.quantized(value, &eight)).collect();
        let list = self.insert_making(Position::Before(target.last), "prim::ListConstruct", inputs, Makes::Tensors);
        let names = ["quantized::cat", "quantized::cat_relu"];
        self.put(id, names, vec![list, Operand::Value(node.inputs[1])], (target, reads));
        Ok(())
    }

    pub(super) fn batch_norm(&mut self, id: NodeId) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let value = node.inputs[0];
        let input = self.native(value).ok_or(FLOAT_INPUT)?;
        let names = match self.graph.rank(value) {
            Some(2 | 3) => ["quantized::batch_norm1d", "quantized::batch_norm1d_relu"],
            Some(4) => ["quantized::batch_norm2d", "quantized::batch_norm2d_relu"],
            Some(5) => ["quantized::batch_norm3d", "quantized::batch_norm3d_relu"],
            _ => return Err("its 8-bit kernel takes tensors of two to five axes".into()),
        };
        let known = |slot| self.graph.constant(node, slot);
        let channels =
            |slot| known(slot).filter(|known| known.dtype == "Float" && known.strides == [1])?.shape.first().copied();
        let is_in_training = !known(5).is_some_and(|known| ["False", "0"].contains(&known.text.as_str()));
        let (false, Some(features), Some(_)) = (is_in_training, channels(3), channels(4)) else {
            return Err("its 8-bit kernel takes constant means and variances".into());
        };
        // The kernel wants a weight and a bias.
        let is_absent = [1, 2].map(|slot| known(slot).is_some_and(|known| !known.is_tensor()));
        if (1..=2).zip(is_absent).any(|(slot, is_absent)| !is_absent && channels(slot).is_none()) {
            return Err("its 8-bit kernel takes a constant weight and bias".into());
        }
        let target = self.target(id)?;
        let quantized = self.quantized(value, &input);
        let affine = [(1, "weight", 1.0), (2, "bias", 0.0)].into_iter().zip(is_absent);
        let affine = affine.map(|((slot, role, number), is_absent)| {
            let layer = self.name(id).to_owned();
            if is_absent {
                self.recipe(Recipe::Filled { layer, role, features, number })
            } else {
                Operand::Value(node.inputs[slot])
            }
        });
        let affine: Vec<Operand> = affine.collect();
        let further = affine.into_iter().chain([3, 4, 7].map(|slot| Operand::Value(node.inputs[slot])));
        let inputs = [quantized].into_iter().chain(further).collect();
        self.put(id, names, inputs, (target, vec![(id, 0, value)]));
        Ok(())
    }

    pub(super) fn function(&mut self, id: NodeId, function: Function) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let value = node.inputs[0];
        let input = self.native(value).ok_or(FLOAT_INPUT)?;
        let target = self.target(id)?.without_relu();
        if self.runs_on_qnnpack()
            && node.op == "aten::sigmoid"
            && (target.eight.scale, target.eight.zero_point) != (1.0 / 256.0, 0)
        {
            return Err("QNNPACK's kernel writes a scale of 1/256 and a zero point of 0 alone".into());
        }
        let quantized = self.quantized(value, &input);
        let reads = vec![(id, 0, value)];
        let further = |slot| node.inputs.get(slot).map_or(Operand::Int(1), |&value| Operand::Value(value));
        match function {
            Function::Plain(name) => self.put(id, [name; 2], vec![quantized], (target, reads)),
            Function::LeakyRelu => {
                let inputs = vec![quantized, further(1), Operand::Bool(false)];
                self.put(id, ["quantized::leaky_relu"; 2], inputs, (target, reads));
            }
            Function::Elu => {
                let further = [further(1), further(2), further(3)];
                let inputs = [quantized].into_iter().chain(target.eight.operands()).chain(further);
                self.put_with(id, ["quantized::elu"; 2], inputs.collect(), (target, reads));
            }
        }
        Ok(())
    }

    /// Whether the kernel of an op, if that has one, computes a clamp behind it too.
    fn takes_clamps_in(&self, id: NodeId) -> bool {
        let takes_none = |kernel| {
            matches!(kernel, Kernel::Keep | Kernel::KeepOf(_) | Kernel::Mean | Kernel::Reshape | Kernel::Function(_))
        };
        kernels::of(&self.graph.node(id).op).is_some_and(|kernel| !takes_none(kernel))
    }

    /// libtorch's own op, on a quantized tensor.
    pub(super) fn keep(&mut self, id: NodeId, rank: Option<usize>) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let value = node.inputs[0];
        // A clamp behind an op that could take it in is told along with that.
        let is_told = || {
            let takes_in = self.graph.maker(value).is_some_and(|id| self.takes_clamps_in(id));
            takes_in && self.graph.only_reader(value) == Some(id) && !self.is_written_in_float(value)
        };
        let computes = sites::keeps_quantizer(&node.op) || sites::is_clamp(&node.op) && !is_told();
        let stay = || if computes { Stay::from(FLOAT_INPUT) } else { Stay::AsItIs };
        let eight = self.native(value).ok_or_else(stay)?;
        if rank.is_some_and(|rank| self.graph.rank(value) != Some(rank)) {
            return Err("its 8-bit kernel takes batches".into());
        }
        let results = if node.op == "prim::ListUnpack" { node.outputs.as_slice() } else { &node.outputs[..1] };
        if results.iter().any(|&result| !self.is_of_site(result)) {
            return Err("its result has no quantizer, as at the end of a model".into());
        }
        if !results.iter().all(|&result| self.same_site(value, result)) {
            return Err("its result has a quantizer of its own, which its 8-bit kernel cannot write".into());
        }
        // A computed value that the model returns is returned in float.
        if results.iter().any(|&result| self.is_anchor(result) && self.graph.is_output(result)) {
            return Err("its result is an output of the model, which stays float".into());
        }
        let quantized = self.quantized(value, &eight);
        self.rewire(Reader::Node(id), 0, value, quantized);
        for &result in results {
            self.make_quantized(result, (Operand::Value(result), eight), Position::After(id));
        }
        Ok(())
    }

    pub(super) fn mean(&mut self, id: NodeId) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let is_plain = node.inputs.len() == 4
            && self.graph.constant(node, 1).is_some_and(|axes| axes.text.starts_with('['))
            && self.graph.constant(node, 3).is_some_and(|dtype| dtype.text == "None");
        if !is_plain && self.native(node.inputs[0]).is_some() {
            return Err("its 8-bit kernel takes constant axes, and no dtype".into());
        }
        self.keep(id, None)
    }

    /// A view, which kernels' layout in memory may not allow.
    pub(super) fn reshape(&mut self, id: NodeId) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let (value, result) = (node.inputs[0], node.outputs[0]);
        let eight = self.native(value).ok_or(Stay::AsItIs)?;
        if !self.same_site(value, result) || self.graph.listing.values[node.inputs[1]].type_name == "int" {
            return Err("it reads the bytes of its input as another dtype".into());
        }
        let position = Position::Before(id);
        let inputs = vec![self.quantized(value, &eight), Operand::Value(node.inputs[1])];
        let operand = self.insert(position, "aten::reshape", inputs);
        self.make_quantized(result, (operand, eight), position);
        Ok(())
    }
}
