//! The way through a graph, op by op: which ones run on quantized tensors, and what has to be inserted for that.
//!
//! Each value is there as float numbers, as a quantized tensor, or as both; what is missing is made where the first reader asks
//! for it. It knows no tensors: what weights become is a recipe.

use std::collections::{BTreeMap, BTreeSet};

use super::Given;
use super::graph::Graph;
use super::kernels::{self, Kernel};
use super::recipe::Recipe;
use crate::config::EnginePlan;
use crate::jit::{Insertion, Listing, Makes, NodeId, Operand, Position, Reader, Rewiring, ValueId};
use crate::quantizer::QuantParams;
use crate::sites::{self, LeftFloat};

/// libtorch's number of the dtype quint8.
const QUINT8: i64 = 13;
/// libtorch's number of the dtype float32.
pub(super) const FLOAT: i64 = 6;

/// A quantizer as kernels take it: levels 0 to 255, or 0 to 127, above which kernels have to be clamped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Eight {
    pub(super) params: QuantParams,
    pub(super) scale: f64,
    pub(super) zero_point: i64,
    pub(super) highest: i64,
}

impl Eight {
    /// `None` where the quantizer has other than 256 or 128 levels.
    pub(super) fn of(params: QuantParams) -> Option<Self> {
        let (shift, highest) = match (params.quant_min(), params.quant_max()) {
            (0, 255) => (0, 255),
            (-128, 127) => (128, 255),
            (0, 127) => (0, 127),
            (-64, 63) => (64, 127),
            _ => return None,
        };
        let zero_point = i64::from(params.zero_point() + shift);
        Some(Self { params, scale: f64::from(params.scale()), zero_point, highest })
    }

    /// Whether its levels end at 127.
    pub(super) fn has_7_bits(&self) -> bool {
        self.highest == 127
    }

    /// The arguments of a clamp to these bounds: QNNPACK wants both.
    pub(super) fn clamp(&self, [lo, hi]: [f64; 2]) -> [Operand; 2] {
        let range = self.params.range();
        [Operand::Float(lo.max(range.lo)), Operand::Float(hi.min(range.hi))]
    }

    pub(super) fn operands(&self) -> [Operand; 2] {
        [Operand::Float(self.scale), Operand::Int(self.zero_point)]
    }
}

/// An op that runs on quantized tensors.
#[derive(Debug, Clone)]
pub(super) struct Lowered {
    /// The layer.
    pub(super) name: String,
    /// The op that it was.
    pub(super) op: String,
    /// The kernel that it is.
    pub(super) kernel: &'static str,
    /// The value of the graph that it makes.
    pub(super) value: ValueId,
    /// The same as the kernel makes it.
    pub(super) result: Operand,
    /// The quantizer of the result; `None` where the kernel writes float numbers.
    pub(super) eight: Option<Eight>,
    /// What it reads: node, slot, value.
    pub(super) reads: Vec<(NodeId, usize, ValueId)>,
    /// The same as quantized tensors.
    pub(super) quantized: Vec<Operand>,
}

/// Why an op stays in float.
pub(super) enum Stay {
    /// For a reason that a reader of the report should know.
    Because(String),
    /// What it reads is in float anyway.
    AsItIs,
}

impl From<&str> for Stay {
    fn from(reason: &str) -> Self {
        Self::Because(reason.to_owned())
    }
}

/// In which forms a value is there.
#[derive(Debug, Clone, Default)]
struct Form {
    /// As it was made, if that is in float.
    raw: Option<Operand>,
    /// As ops in float read it.
    float: Option<Operand>,
    quantized: Option<Operand>,
    /// Set where it was made quantized.
    native: Option<Eight>,
}

/// All that a walk finds.
pub(super) struct Found {
    pub(super) recipes: Vec<Recipe>,
    pub(super) insertions: Vec<Insertion>,
    pub(super) rewirings: Vec<Rewiring>,
    pub(super) kernels: Vec<Lowered>,
    pub(super) in_float: Vec<LeftFloat>,
}

pub(super) struct Walk<'a> {
    pub(super) graph: Graph<'a>,
    pub(super) given: &'a Given<'a>,
    names: Vec<String>,
    site_of: Vec<Option<usize>>,
    anchors: BTreeSet<ValueId>,
    weight_of: BTreeMap<ValueId, usize>,
    forms: Vec<Form>,
    positions: Vec<Position>,
    /// Ops that an earlier one computes along.
    merged: BTreeSet<NodeId>,
    stored: BTreeMap<usize, Operand>,
    /// Values as layers that write float numbers read them.
    pub(super) ranged: BTreeMap<ValueId, [Operand; 2]>,
    found: Found,
}

impl<'a> Walk<'a> {
    pub(super) fn new(listing: &'a Listing, given: &'a Given<'a>) -> Self {
        let count = listing.values.len();
        let graph = Graph::new(listing);
        let mut site_of = vec![None; count];
        let mut anchors = BTreeSet::new();
        for (index, site) in given.sites.activations.iter().enumerate() {
            site.members.iter().for_each(|&value| site_of[value] = Some(index));
            anchors.extend(site.anchors.iter().map(|anchor| anchor.value));
        }
        let weights = given.sites.weights.iter().enumerate();
        let weight_of = weights.flat_map(|(index, site)| site.values.iter().map(move |&value| (value, index)));
        let form = |value| Form { raw: Some(Operand::Value(value)), ..Form::default() };
        Self {
            names: sites::names_of_nodes(listing),
            site_of,
            anchors,
            weight_of: weight_of.collect(),
            forms: (0..count).map(form).collect(),
            positions: (0..count).map(|value| graph.position(value)).collect(),
            graph,
            given,
            merged: BTreeSet::new(),
            stored: BTreeMap::new(),
            ranged: BTreeMap::new(),
            found: Found {
                recipes: Vec::new(),
                insertions: Vec::new(),
                rewirings: Vec::new(),
                kernels: Vec::new(),
                in_float: Vec::new(),
            },
        }
    }

    /// Walks the whole graph.
    pub(super) fn run(mut self) -> Found {
        self.visit_all();
        self.feed_returns()
    }

    /// Whether each value of the graph is made as a quantized tensor, and what is found on the way.
    pub(super) fn made_in_8_bits(mut self) -> (Vec<bool>, Found) {
        self.visit_all();
        (self.forms.iter().map(|form| form.native.is_some()).collect(), self.found)
    }

    fn visit_all(&mut self) {
        for id in 0..self.graph.listing.nodes.len() {
            self.visit(id);
        }
    }

    /// Walks the whole graph and leaves it in float; only its weights are stored in another way.
    pub(super) fn store_weights(mut self) -> Found {
        for id in 0..self.graph.listing.nodes.len() {
            let is_embedding = self.graph.node(id).op == "aten::embedding";
            if !is_embedding || self.embedding(id).is_err() {
                self.feed_float(id);
            }
        }
        self.feed_returns()
    }

    fn feed_returns(mut self) -> Found {
        for (block, returns) in self.graph.listing.blocks.iter().map(|block| &block.returns).enumerate() {
            for (slot, &value) in returns.iter().enumerate() {
                let operand = if block == 0 { self.returned(value) } else { self.float(value) };
                self.rewire(Reader::Block(block), slot, value, operand);
            }
        }
        self.found
    }

    fn visit(&mut self, id: NodeId) {
        if self.merged.contains(&id) {
            return;
        }
        let node = self.graph.node(id);
        let outcome = match kernels::of(&node.op) {
            Some(Kernel::Shape) => {
                self.feed_shape(id);
                return;
            }
            Some(kernel) => self.lower(id, kernel),
            None if node.op == "aten::embedding" => self.embedding(id),
            None => Err(Stay::from("libtorch has no 8-bit kernel that writes what its site needs")),
        };
        if let Err(stay) = outcome {
            if let Stay::Because(reason) = stay {
                self.list_in_float(id, reason);
            }
            self.feed_float(id);
        }
    }

    fn lower(&mut self, id: NodeId, kernel: Kernel) -> Result<(), Stay> {
        match kernel {
            Kernel::Convolution(slots) => self.convolution(id, slots),
            Kernel::Transposed => self.transposed(id),
            Kernel::Linear => self.linear(id, (0, 1), true),
            Kernel::Product { data, weight } => self.linear(id, (data, weight), false),
            Kernel::Binary { plain, relu, factor } => self.binary(id, [plain, relu], factor),
            Kernel::Concat => self.concat(id),
            Kernel::BatchNorm => self.batch_norm(id),
            Kernel::Function(function) => self.function(id, function),
            Kernel::Keep => self.keep(id, None),
            Kernel::KeepOf(rank) => self.keep(id, Some(rank)),
            Kernel::Mean => self.mean(id),
            Kernel::Reshape => self.reshape(id),
            Kernel::Shape => Ok(()),
        }
    }

    /// Its kernels have gaps of their own.
    pub(super) fn runs_on_qnnpack(&self) -> bool {
        self.given.trial.is_some_and(|trial| trial.engine == EnginePlan::Qnnpack)
    }

    /// The name of a node's layer.
    pub(super) fn name(&self, id: NodeId) -> &str {
        &self.names[id]
    }

    /// The weight site of a constant.
    pub(super) fn weight(&self, value: ValueId) -> Option<usize> {
        self.weight_of.get(&value).copied()
    }

    pub(super) fn is_anchor(&self, value: ValueId) -> bool {
        self.anchors.contains(&value)
    }

    /// Whether a value belongs to a site.
    pub(super) fn is_of_site(&self, value: ValueId) -> bool {
        self.site_of[value].is_some()
    }

    /// Whether two values have one quantizer.
    pub(super) fn same_site(&self, a: ValueId, b: ValueId) -> bool {
        self.site_of[a].is_some() && self.site_of[a] == self.site_of[b]
    }

    /// Where what is made of a value is inserted.
    pub(super) fn position(&self, value: ValueId) -> Position {
        self.positions[value]
    }

    fn params(&self, value: ValueId) -> Option<QuantParams> {
        let site = self.site_of[value]?;
        *self.given.activations.get(site)?
    }

    /// The quantizer of a value, if kernels take it.
    pub(super) fn eight(&self, value: ValueId) -> Option<Eight> {
        self.forms[value].native.or_else(|| Eight::of(self.params(value)?))
    }

    /// The quantizer of a value that was made quantized.
    pub(super) fn native(&self, value: ValueId) -> Option<Eight> {
        self.forms[value].native
    }

    /// Whether an 8-bit kernel writes the value as float numbers.
    pub(super) fn is_written_in_float(&self, value: ValueId) -> bool {
        self.forms[value].raw.as_ref().is_some_and(|raw| *raw != Operand::Value(value))
    }

    pub(super) fn insert(&mut self, position: Position, op: &'static str, inputs: Vec<Operand>) -> Operand {
        self.insert_making(position, op, inputs, Makes::Tensor)
    }

    pub(super) fn insert_making(
        &mut self,
        position: Position,
        op: &'static str,
        inputs: Vec<Operand>,
        makes: Makes,
    ) -> Operand {
        self.found.insertions.push(Insertion { position, op, inputs, makes });
        Operand::New(self.found.insertions.len() - 1)
    }

    pub(super) fn recipe(&mut self, recipe: Recipe) -> Operand {
        let known = self.found.recipes.iter().position(|other| other.is_same(&recipe));
        let number = known.unwrap_or_else(|| {
            self.found.recipes.push(recipe);
            self.found.recipes.len() - 1
        });
        Operand::Attribute(number)
    }

    /// The value as a quantized tensor; it has to have a quantizer.
    pub(super) fn quantized(&mut self, value: ValueId, eight: &Eight) -> Operand {
        if let Some(operand) = &self.forms[value].quantized {
            return operand.clone();
        }
        let [scale, zero_point] = eight.operands();
        let raw = self.forms[value].raw.clone().unwrap_or(Operand::Value(value));
        let inputs = vec![raw, scale, zero_point, Operand::Int(QUINT8)];
        let operand = self.insert(self.positions[value], "aten::quantize_per_tensor", inputs);
        let operand = self.clamped(self.positions[value], operand, eight);
        self.forms[value].quantized = Some(operand.clone());
        operand
    }

    /// A quantized value without levels that its quantizer has not: kernels write up to 255.
    pub(super) fn clamped(&mut self, position: Position, operand: Operand, eight: &Eight) -> Operand {
        if !eight.has_7_bits() {
            return operand;
        }
        let ends = eight.clamp([f64::NEG_INFINITY, f64::INFINITY]);
        self.insert(position, "quantized::clamp", [operand].into_iter().chain(ends).collect())
    }

    /// The value as ops in float read it.
    pub(super) fn float(&mut self, value: ValueId) -> Operand {
        if let Some(operand) = &self.forms[value].float {
            return operand.clone();
        }
        let form = &self.forms[value];
        let operand = match (&form.raw, &form.quantized) {
            (None, Some(quantized)) => {
                let is_tensor = self.graph.listing.values[value].is_tensor;
                let makes = if is_tensor { Makes::Tensor } else { Makes::Tensors };
                let inputs = vec![quantized.clone()];
                self.insert_making(self.positions[value], "aten::dequantize", inputs, makes)
            }
            (raw, _) => {
                let raw = raw.clone().unwrap_or(Operand::Value(value));
                self.simulated(value, raw)
            }
        };
        self.forms[value].float = Some(operand.clone());
        operand
    }

    /// Where kernels do not take the quantizer, what it makes of the value.
    fn simulated(&mut self, value: ValueId, raw: Operand) -> Operand {
        // What leaves the model is a number of its quantizer there, as in the simulation.
        let site = self.site_of[value].and_then(|site| self.given.sites.activations.get(site));
        let is_returned = site.is_some_and(|site| site.is_returned);
        let is_wanted = |params: &QuantParams| self.is_anchor(value) && (is_returned || Eight::of(*params).is_none());
        let params = self.params(value).filter(is_wanted);
        let Some(params) = params else { return raw };
        let numbers = [params.zero_point(), params.quant_min(), params.quant_max()];
        let numbers = numbers.map(|number| Operand::Int(i64::from(number)));
        let mut inputs = vec![raw, Operand::Float(f64::from(params.scale()))];
        inputs.extend(numbers);
        self.insert(self.positions[value], "aten::fake_quantize_per_tensor_affine", inputs)
    }

    /// The value as the model returns it.
    fn returned(&mut self, value: ValueId) -> Operand {
        match &self.forms[value].raw {
            Some(raw) => raw.clone(),
            None => self.float(value),
        }
    }

    /// Takes note that the value is made quantized.
    pub(super) fn make_quantized(&mut self, value: ValueId, (operand, eight): (Operand, Eight), position: Position) {
        self.forms[value] = Form { raw: None, float: None, quantized: Some(operand), native: Some(eight) };
        self.positions[value] = position;
    }

    /// Takes note that the value is made in float by an inserted op.
    pub(super) fn make_float(&mut self, value: ValueId, operand: Operand, position: Position) {
        self.forms[value] = Form { raw: Some(operand), ..Form::default() };
        self.positions[value] = position;
    }

    pub(super) fn merge(&mut self, id: NodeId) {
        self.merged.insert(id);
    }

    pub(super) fn add_kernel(&mut self, mut lowered: Lowered) {
        let form = |&(_, _, value): &(NodeId, usize, ValueId)| self.forms[value].quantized.clone();
        lowered.quantized = lowered.reads.iter().filter_map(form).collect();
        self.found.kernels.push(lowered);
    }

    /// Takes note of a kernel that stands for an op and writes a quantized value.
    pub(super) fn add_8_bit(
        &mut self,
        id: NodeId,
        kernel: &'static str,
        (value, result, eight): (ValueId, Operand, Eight),
        reads: Vec<(NodeId, usize, ValueId)>,
        position: Position,
    ) {
        let (name, op) = (self.name(id).to_owned(), self.graph.node(id).op.clone());
        let (own, quantized) = (result.clone(), Vec::new());
        self.add_kernel(Lowered { name, op, kernel, value, result: own, eight: Some(eight), reads, quantized });
        self.make_quantized(value, (result, eight), position);
    }

    pub(super) fn rewire(&mut self, reader: Reader, slot: usize, value: ValueId, operand: Operand) {
        if operand != Operand::Value(value) {
            self.found.rewirings.push(Rewiring { reader, slot, operand });
        }
    }

    fn feed_shape(&mut self, id: NodeId) {
        for (slot, &value) in self.graph.node(id).inputs.iter().enumerate() {
            let form = &self.forms[value];
            let operand = form.raw.clone().or_else(|| form.quantized.clone()).unwrap_or(Operand::Value(value));
            self.rewire(Reader::Node(id), slot, value, operand);
        }
    }

    /// Lets a node that stays as it is read float numbers.
    fn feed_float(&mut self, id: NodeId) {
        let only_returns = self.graph.only_returns(id);
        for (slot, &value) in self.graph.node(id).inputs.iter().enumerate() {
            let operand = match self.weight(value) {
                Some(weight) => self.stored_weight(weight, value),
                None if only_returns => self.returned(value),
                None => self.float(value),
            };
            self.rewire(Reader::Node(id), slot, value, operand);
        }
    }

    /// A weight that an op reads in float, out of what the file holds of it.
    fn stored_weight(&mut self, weight: usize, value: ValueId) -> Operand {
        let given = self.given;
        let chosen = &given.weights[weight];
        if !chosen.fits_a_byte() {
            return Operand::Value(value);
        }
        if let Some(operand) = self.stored.get(&weight) {
            return operand.clone();
        }
        let at_start = Position::Start(0);
        let levels =
            if chosen.fits_a_nibble() { self.unpacked(weight) } else { self.recipe(Recipe::Levels { weight }) };
        let mut operand = self.numbers(at_start, levels);
        if chosen.fits_a_nibble() && chosen.nibble_offset() != 0 {
            let offset = Operand::Float(f64::from(chosen.nibble_offset()));
            operand = self.insert(at_start, "aten::sub", vec![operand, offset, Operand::Int(1)]);
        }
        if chosen.has_zero_points() {
            let zero_points = self.recipe(Recipe::ZeroPoints { weight });
            operand = self.insert(at_start, "aten::sub", vec![operand, zero_points, Operand::Int(1)]);
        }
        let scales = self.recipe(Recipe::Scales { weight });
        let operand = self.insert(at_start, "aten::mul", vec![operand, scales]);
        self.stored.insert(weight, operand.clone());
        operand
    }

    /// Levels that are two to a byte, in the shape of their weight.
    fn unpacked(&mut self, weight: usize) -> Operand {
        let position = Position::Start(0);
        let shape = self.given.weights[weight].image.size();
        let count = shape.iter().product();
        let bytes = self.recipe(Recipe::Nibbles { weight });
        let low = self.insert(position, "aten::bitwise_and", vec![bytes.clone(), Operand::Int(15)]);
        let high = self.insert(position, "aten::__rshift__", vec![bytes, Operand::Int(4)]);
        let list = self.insert_making(position, "prim::ListConstruct", vec![low, high], Makes::Tensors);
        let pairs = self.insert(position, "aten::stack", vec![list, Operand::Int(1)]);
        let flat = self.insert(position, "aten::flatten", vec![pairs, Operand::Int(0), Operand::Int(-1)]);
        let ends = [Operand::Int(0), Operand::Int(0), Operand::Int(count), Operand::Int(1)];
        let levels = self.insert(position, "aten::slice", [flat].into_iter().chain(ends).collect());
        self.insert(position, "aten::reshape", vec![levels, Operand::Ints(shape)])
    }

    /// Levels as float numbers, still to be scaled.
    pub(super) fn numbers(&mut self, position: Position, levels: Operand) -> Operand {
        let flags = [Operand::Bool(false), Operand::Bool(false), Operand::None];
        let inputs = [levels, Operand::Int(FLOAT)].into_iter().chain(flags);
        self.insert(position, "aten::to", inputs.collect())
    }

    /// Rows of a table in 8 bits, looked up and then scaled.
    fn embedding(&mut self, id: NodeId) -> Result<(), Stay> {
        let node = self.graph.node(id);
        let (table, output) = (node.inputs[0], node.outputs[0]);
        let weight = self.weight(table).filter(|&weight| {
            let weight = &self.given.weights[weight];
            weight.fits_a_byte() && !weight.fits_a_nibble()
        });
        let weight = weight.ok_or(Stay::AsItIs)?;
        let position = Position::Before(id);
        let look_up = |walk: &mut Self, table: Operand| {
            let inputs = [table].into_iter().chain(node.inputs.iter().skip(1).map(|&value| Operand::Value(value)));
            walk.insert(position, "aten::embedding", inputs.collect())
        };
        let levels = self.recipe(Recipe::Levels { weight });
        let rows = look_up(self, levels);
        let mut operand = self.numbers(position, rows);
        let is_per_row = self.given.weights[weight].scale.len() > 1;
        if self.given.weights[weight].has_zero_points() {
            let mut zero_points = self.recipe(Recipe::ZeroPoints { weight });
            if is_per_row {
                zero_points = look_up(self, zero_points);
            }
            operand = self.insert(position, "aten::sub", vec![operand, zero_points, Operand::Int(1)]);
        }
        let mut scales = self.recipe(Recipe::Scales { weight });
        if is_per_row {
            scales = look_up(self, scales);
        }
        let operand = self.insert(position, "aten::mul", vec![operand, scales]);
        self.make_float(output, operand, position);
        Ok(())
    }

    /// Lists an op on float tensors, unless the sites have it listed.
    fn list_in_float(&mut self, id: NodeId, reason: String) {
        let node = self.graph.node(id);
        let is_float = |&value: &ValueId| {
            let elements = self.graph.elements(value).unwrap_or(std::slice::from_ref(&value)).to_vec();
            elements.into_iter().any(|value| self.graph.may_be_float(value))
        };
        let name = &self.names[id];
        let is_listed = self.given.sites.left_float.iter().any(|left| left.name == *name && left.op == node.op);
        if node.op.starts_with("aten::")
            && !is_listed
            && node.inputs.iter().any(is_float)
            && node.outputs.iter().any(is_float)
        {
            let (name, op) = (name.clone(), node.op.clone());
            self.found.in_float.push(LeftFloat { name, op, reason });
        }
    }
}
