//! Convolutions, linear layers and products with a constant matrix as 8-bit kernels. It knows no other ops.

use super::engine::{self, Geometry, Task};
use super::kernels::{self, Convolution, Kernel};
use super::recipe::{BiasOf, Recipe};
use super::walk::{Eight, Lowered, Stay, Walk};
use crate::jit::{Makes, Node, NodeId, Operand, Place, Position, ValueId};
use crate::sites;

/// Where a kernel writes.
pub(super) struct Target {
    /// The value that it makes.
    pub(super) value: ValueId,
    /// The last op that it stands for.
    pub(super) last: NodeId,
    pub(super) eight: Eight,
    /// What it clamps to, beyond what the kernel clamps to anyway.
    pub(super) clamp: Option<[f64; 2]>,
    /// A ReLU is computed along with it.
    pub(super) relu: bool,
}

impl Target {
    /// For a kernel that has no form with a ReLU.
    pub(super) fn without_relu(mut self) -> Self {
        if std::mem::take(&mut self.relu) && self.eight.params.zero_point() > self.eight.params.quant_min() {
            let [_, hi] = self.clamp.unwrap_or([0.0, f64::INFINITY]);
            self.clamp = Some([0.0, hi]);
        }
        self
    }
}

/// Reason of a layer whose result leaves the model.
const OUTPUT: &str = "its result is an output of the model, which stays float";

impl Walk<'_> {
    pub(super) fn convolution(&mut self, id: NodeId, slots: Convolution) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let (input, weight) = self.operands(node, (0, 1))?;
        let spatial = self.spatial(node, weight)?;
        if spatial == 3 && self.runs_on_qnnpack() {
            return Err("a file cannot hold what QNNPACK packs for 3 dimensions".into());
        }
        let geometry = self.geometry(node, slots, spatial)?;
        self.check_engine(self.task(weight, &geometry), &input)?;
        self.check_layer((weight, &geometry), &input)?;
        let bias = self.bias(node, true)?;
        let target = self.target(id)?;
        let numbers = geometry.operands();
        let (pack, names) = match spatial {
            1 => ("quantized::conv1d_prepack", ["quantized::conv1d", "quantized::conv1d_relu"]),
            2 => ("quantized::conv2d_prepack", ["quantized::conv2d", "quantized::conv2d_relu"]),
            _ => ("quantized::conv3d_prepack", ["quantized::conv3d", "quantized::conv3d_relu"]),
        };
        let layer = self.name(id).to_owned();
        let packed = self.recipe(Recipe::Packed { layer, op: pack, weight, transposed: false, bias, numbers });
        let quantized = self.quantized(node.inputs[0], &input);
        self.put(id, names, vec![quantized, packed], (target, vec![(id, 0, node.inputs[0])]));
        Ok(())
    }

    /// A transposed convolution.
    pub(super) fn transposed(&mut self, id: NodeId) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let (input, weight) = self.operands(node, (0, 1))?;
        let spatial = self.spatial(node, weight)?;
        self.check_engine(Task::of_transposed(spatial), &input)?;
        if self.given.weights[weight].scale.len() != 1 {
            return Err("its 8-bit kernel takes weights with one scale, found one for each channel".into());
        }
        let geometry = self.transposed_geometry(node, spatial)?;
        self.check_layer((weight, &geometry), &input)?;
        let bias = self.bias(node, true)?;
        let target = self.target(id)?.without_relu();
        let numbers = geometry.operands();
        let (pack, name) = match spatial {
            1 => ("quantized::conv_transpose1d_prepack", "quantized::conv_transpose1d"),
            2 => ("quantized::conv_transpose2d_prepack", "quantized::conv_transpose2d"),
            _ => ("quantized::conv_transpose3d_prepack", "quantized::conv_transpose3d"),
        };
        let layer = self.name(id).to_owned();
        let packed = self.recipe(Recipe::Packed { layer, op: pack, weight, transposed: false, bias, numbers });
        let quantized = self.quantized(node.inputs[0], &input);
        self.put(id, [name; 2], vec![quantized, packed], (target, vec![(id, 0, node.inputs[0])]));
        Ok(())
    }

    fn transposed_geometry(&self, node: &Node, spatial: usize) -> Result<Geometry, Stay> {
        let list = |slot, what: &str| self.constants(node, slot, (spatial, what));
        Ok(Geometry {
            stride: list(3, "stride")?,
            padding: list(4, "padding")?,
            output_padding: Some(list(5, "output_padding")?),
            groups: self.groups(node, 6)?,
            dilation: list(7, "dilation")?,
        })
    }

    /// Axes that a convolution goes over; its kernel takes batches.
    fn spatial(&self, node: &Node, weight: usize) -> Result<usize, Stay> {
        let spatial = self.given.weights[weight].image.dim().saturating_sub(2);
        if self.graph.rank(node.inputs[0]) != Some(spatial + 2) {
            return Err(Stay::Because(format!("its 8-bit kernel takes batches, tensors of {} axes", spatial + 2)));
        }
        Ok(spatial)
    }

    /// One number for each axis.
    fn constants(&self, node: &Node, slot: usize, (spatial, what): (usize, &str)) -> Result<Vec<i64>, Stay> {
        let numbers = self.graph.numbers(node, slot, spatial);
        numbers.ok_or_else(|| Stay::Because(format!("its `{what}` is no constant")))
    }

    fn groups(&self, node: &Node, slot: usize) -> Result<i64, Stay> {
        let groups = self.graph.numbers(node, slot, 1);
        Ok(groups.and_then(|groups| groups.first().copied()).ok_or("its `groups` is no constant")?)
    }

    /// What an engine has to be right in for a convolution.
    fn task(&self, weight: usize, geometry: &Geometry) -> Task {
        let shape = self.given.weights[weight].image.size();
        if geometry.groups != 1 && shape.get(1) == Some(&1) {
            if self.given.weights[weight].is_bounded { Task::BoundedDepthwise } else { Task::Depthwise }
        } else if shape.iter().skip(2).all(|&taps| taps == 1) {
            Task::Pointwise
        } else {
            Task::Window
        }
    }

    fn check_engine(&self, task: Task, input: &Eight) -> Result<(), Stay> {
        if self.given.trial.is_some_and(|trial| !trial.computes(task, input.has_7_bits())) {
            return Err(Stay::Because(format!("the engine computes {} wrong on this machine", task.name())));
        }
        Ok(())
    }

    /// Whether the engine is right in a layer like this with extreme values.
    fn check_layer(&self, (weight, geometry): (usize, &Geometry), input: &Eight) -> Result<(), Stay> {
        let Some(trial) = self.given.trial else { return Ok(()) };
        let weight = &self.given.weights[weight];
        let shape = weight.image.size();
        if !engine::computes(trial.engine, (geometry, &shape), weight.is_bounded, input.has_7_bits()) {
            return Err("the engine computes a layer like this wrong, or not at all, on this machine".into());
        }
        Ok(())
    }

    fn geometry(&self, node: &Node, slots: Convolution, spatial: usize) -> Result<Geometry, Stay> {
        let list = |slot, what: &str| self.constants(node, slot, (spatial, what));
        let (stride, dilation) = (list(3, "stride")?, list(slots.dilation, "dilation")?);
        let mode = self.graph.constant(node, 4).map(|constant| constant.text.trim_matches(['"', '\'']));
        let padding = match mode {
            Some("valid") => vec![0; spatial],
            Some("same") => {
                let shape = self.graph.constant(node, 1).map(|weight| weight.shape.as_slice()).unwrap_or_default();
                let taps = shape.iter().skip(2).zip(&dilation).map(|(kernel, dilation)| dilation * (kernel - 1));
                let both: Vec<i64> = taps.collect();
                if both.iter().any(|both| both % 2 != 0) {
                    return Err("its 8-bit kernel pads both sides alike".into());
                }
                both.into_iter().map(|both| both / 2).collect()
            }
            _ => list(4, "padding")?,
        };
        let groups = self.groups(node, slots.groups)?;
        Ok(Geometry { stride, padding, dilation, groups, output_padding: None })
    }

    /// A layer whose weight has its output channels in rows, or else in columns.
    pub(super) fn linear(&mut self, id: NodeId, (data, slot): (usize, usize), rows: bool) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let (input, weight) = self.operands(node, (data, slot))?;
        let value = node.inputs[data];
        let rank = self.graph.rank(value).filter(|&rank| rank >= 2);
        let rank = rank.ok_or("its 8-bit kernel takes batches of rows")?;
        if self.given.weights[weight].image.dim() != 2 {
            return Err("its 8-bit kernel takes weights of two axes".into());
        }
        self.check_engine(Task::Linear, &input)?;
        let bias = self.bias(node, rows)?;
        let layer = self.name(id).to_owned();
        let op = "quantized::linear_prepack";
        let packed = Recipe::Packed { layer, op, weight, transposed: !rows, bias, numbers: Vec::new() };
        match self.target(id) {
            Ok(target) => {
                let packed = self.recipe(packed);
                let quantized = self.quantized(value, &input);
                let names = ["quantized::linear", "quantized::linear_relu"];
                self.put(id, names, vec![quantized, packed], (target, vec![(id, data, value)]));
                Ok(())
            }
            Err(stay) => {
                let features = self.graph.constant(node, slot).and_then(|weight| {
                    let axis = if rows { 1 } else { 0 };
                    weight.shape.get(axis).copied()
                });
                let features = features.filter(|&features| features >= 2).ok_or(stay)?;
                if self.runs_on_qnnpack() && input.has_7_bits() {
                    return Err("QNNPACK's kernel that writes float numbers takes inputs of 8 bits alone".into());
                }
                self.linear_into_float(id, (value, data, rank), (packed, features), &input);
                Ok(())
            }
        }
    }

    /// A linear layer that writes float numbers. Its kernel chooses the quantizer of its input by the range of that: a further
    /// row with the ends of the site's range makes it choose the site's. Axes in front of the last one are rows.
    fn linear_into_float(
        &mut self,
        id: NodeId,
        (value, slot, rank): (ValueId, usize, usize),
        (packed, features): (Recipe, i64),
        input: &Eight,
    ) {
        let layer = self.name(id).to_owned();
        let packed = self.recipe(packed);
        let [float, rows] = self.with_range(&layer, (value, rank), features, input);
        let position = Position::Before(id);
        let (first, last) = (Operand::Int(0), Operand::Int(-1));
        let kernel = "quantized::linear_dynamic";
        let all = self.insert(position, kernel, vec![rows, packed, Operand::Bool(input.has_7_bits())]);
        let ends = [first.clone(), first.clone(), last.clone(), Operand::Int(1)];
        let mut result = self.insert(position, "aten::slice", [all].into_iter().chain(ends).collect());
        if rank != 2 {
            let sizes = self.insert_making(position, "aten::size", vec![float], Makes::Ints);
            let leading = self.insert_making(
                position,
                "aten::slice",
                vec![sizes, first.clone(), last, Operand::Int(1)],
                Makes::Ints,
            );
            result = self.insert(position, "aten::unflatten", vec![result, first, leading]);
        }
        let node = self.graph.node(id);
        let output = node.outputs[0];
        self.make_float(output, result.clone(), position);
        let (name, op) = (self.name(id).to_owned(), node.op.clone());
        let reads = vec![(id, slot, value)];
        self.add_kernel(Lowered { name, op, kernel, value: output, result, eight: None, reads, quantized: Vec::new() });
    }

    /// The value in float out of its levels, and the same as rows, with one more that has the ends of the site's range. Layers that read one
    /// value share them.
    fn with_range(
        &mut self,
        layer: &str,
        (value, rank): (ValueId, usize),
        features: i64,
        input: &Eight,
    ) -> [Operand; 2] {
        if let Some(known) = self.ranged.get(&value) {
            return known.clone();
        }
        let range = input.params.range();
        let row = self.recipe(Recipe::Range { layer: layer.to_owned(), features, lo: range.lo, hi: range.hi });
        let quantized = self.quantized(value, input);
        let position = self.position(value);
        let float = self.insert(position, "aten::dequantize", vec![quantized]);
        let rows = if rank == 2 {
            float.clone()
        } else {
            self.insert(position, "aten::flatten", vec![float.clone(), Operand::Int(0), Operand::Int(-2)])
        };
        let list = self.insert_making(position, "prim::ListConstruct", vec![rows, row], Makes::Tensors);
        let rows = self.insert(position, "aten::cat", vec![list, Operand::Int(0)]);
        self.ranged.insert(value, [float.clone(), rows.clone()]);
        [float, rows]
    }

    /// The quantizer of the data and the weight of a layer in these slots.
    fn operands(&self, node: &Node, (data, weight): (usize, usize)) -> Result<(Eight, usize), Stay> {
        let factor = node.inputs.get(weight).copied();
        if factor.is_some_and(|value| self.graph.listing.values[value].constant.is_none()) {
            let is_product = matches!(kernels::of(&node.op), Some(Kernel::Product { .. }));
            let of_layer = "its 8-bit kernel takes a constant weight, found one that the model computes";
            let of_left = "its 8-bit kernel takes a constant right factor, found a constant left one";
            let of_product = "a product of two activations, for which libtorch has no 8-bit kernel";
            let left = node.inputs.get(data).and_then(|&value| self.graph.listing.values[value].constant.as_ref());
            return Err(match left {
                _ if !is_product => of_layer,
                Some(_) => of_left,
                None => of_product,
            }
            .into());
        }
        let weight = factor.and_then(|value| self.weight(value)).ok_or("it has no quantized weight")?;
        if !self.given.weights[weight].fits_kernels() {
            return Err("its weight has no quantizer that its 8-bit kernel takes".into());
        }
        let data = node.inputs.get(data).copied();
        let input = data.filter(|&value| self.graph.listing.values[value].constant.is_none());
        let input = input.and_then(|value| self.eight(value)).ok_or("its input has no 8-bit quantizer")?;
        Ok((input, weight))
    }

    /// The bias in the third slot, or one that was to be added to the result.
    fn bias(&self, node: &Node, has_slot: bool) -> Result<Option<BiasOf>, Stay> {
        let result = node.outputs[0];
        let place = if has_slot { Place::Input { result, slot: 2 } } else { Place::Addend(result) };
        if let Some(number) = self.given.biases.iter().position(|bias| bias.place == place) {
            return Ok(Some(BiasOf::Corrected(number)));
        }
        if !has_slot {
            return Ok(None);
        }
        let value = node.inputs.get(2).copied();
        match value.and_then(|value| self.graph.listing.values[value].constant.as_ref().map(|known| (value, known))) {
            Some((value, known)) if known.dtype == "Float" && known.shape.len() == 1 => {
                Ok(Some(BiasOf::Constant(value)))
            }
            Some((_, known)) if !known.is_tensor() => Ok(None),
            _ => Err("its bias is no constant".into()),
        }
    }

    /// Where the kernel of an op writes, with the clamp that joins it.
    pub(super) fn target(&self, id: NodeId) -> Result<Target, Stay> {
        let output = self.graph.node(id).outputs[0];
        let (value, last) = if self.is_anchor(output) {
            (output, id)
        } else {
            self.joining(output).ok_or("its result has no quantizer")?
        };
        if self.graph.is_output(value) {
            return Err(OUTPUT.into());
        }
        let eight = self.eight(value).ok_or("its result has no 8-bit quantizer")?;
        let mut target = Target { value, last, eight, clamp: None, relu: false };
        if last != id {
            let [lo, hi] =
                self.graph.listing.clamp(self.graph.node(last)).ok_or("what it is clamped to is no constant")?;
            #[allow(clippy::cast_possible_truncation)]
            let level = |bound: f64| eight.params.quantize(bound as f32);
            target.relu = lo == 0.0;
            let cuts_low = lo != 0.0 && level(lo) > eight.params.quant_min();
            let cuts = cuts_low || level(hi) < eight.params.quant_max();
            target.clamp = cuts.then_some([lo, hi]);
        }
        if eight.has_7_bits() {
            let [lo, hi] = target.clamp.unwrap_or([f64::NEG_INFINITY, f64::INFINITY]);
            target.clamp = Some([lo, hi.min(eight.params.range().hi)]);
        }
        Ok(target)
    }

    /// The clamp that is the only reader of a value, and has the quantizer that the value has not.
    fn joining(&self, value: ValueId) -> Option<(ValueId, NodeId)> {
        let reader = self.graph.only_reader(value)?;
        let node = self.graph.node(reader);
        let joins = sites::is_clamp(&node.op) && node.inputs.first() == Some(&value);
        let output = node.outputs.first().copied().filter(|&output| joins && self.is_anchor(output))?;
        Some((output, reader))
    }

    /// Inserts a kernel that takes scale and zero point of its result last; `names` are the plain one and that with a ReLU.
    pub(super) fn put(
        &mut self,
        id: NodeId,
        names: [&'static str; 2],
        mut inputs: Vec<Operand>,
        (target, reads): (Target, Vec<(NodeId, usize, ValueId)>),
    ) {
        inputs.extend(target.eight.operands());
        self.put_with(id, names, inputs, (target, reads));
    }

    /// The same with all that the kernel takes.
    pub(super) fn put_with(
        &mut self,
        id: NodeId,
        names: [&'static str; 2],
        inputs: Vec<Operand>,
        (target, reads): (Target, Vec<(NodeId, usize, ValueId)>),
    ) {
        let Target { value, last, eight, clamp, relu } = target;
        let position = Position::Before(last);
        let kernel = names[usize::from(relu)];
        let mut result = self.insert(position, kernel, inputs);
        if let Some(bounds) = clamp {
            result =
                self.insert(position, "quantized::clamp", [result].into_iter().chain(eight.clamp(bounds)).collect());
        }
        if last != id {
            self.merge(last);
        }
        self.add_8_bit(id, kernel, (value, result, eight), reads, position);
    }
}
