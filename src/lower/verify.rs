//! Each 8-bit kernel against the float op that it stands for, on the same quantized input. It knows no files.

use tch::{Kind, Tensor};

use super::walk::Lowered;
use super::{Given, Lowering};
use crate::jit::{
    Arguments, BoxError, Clean, Edits, Error, Insertion, Instrumented, Makes, Operand, Output, Place, Position, Reader,
    Rewiring, Visit,
};

/// Levels by which a float result may miss the border between two levels and count as either side.
const TIE: f64 = 1e-3;

/// How a kernel differs from what it stands for.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerDifference {
    /// The layer.
    pub name: String,
    /// The op that it was.
    pub op: String,
    /// The kernel that it is.
    pub kernel: &'static str,
    /// It writes float numbers, not levels.
    pub is_float: bool,
    /// Values that were compared.
    pub values: u64,
    /// Values of another level; those on the border between two levels, up to rounding, count as either.
    pub different: u64,
    /// The largest difference, in levels; where the kernel writes float numbers, relative to the largest.
    pub largest: f64,
}

/// A graph in which each kernel and the op that it stands for read the same.
pub struct Verification<'a> {
    instrumented: Instrumented,
    kernels: &'a [Lowered],
    found: Found<'a>,
}

struct Found<'a> {
    kernels: &'a [Lowered],
    expected: Vec<Option<Tensor>>,
    differences: Vec<LayerDifference>,
}

impl Lowering {
    /// Prepares the comparison.
    ///
    /// # Errors
    /// Where libtorch refuses the graph.
    pub fn verification(&self, model: &Clean, given: &Given<'_>) -> Result<Verification<'_>, Error> {
        let mut edits = Edits {
            attributes: self.edits.attributes.clone(),
            tensors: self.edits.tensors.iter().map(Tensor::shallow_clone).collect(),
            insertions: self.edits.insertions.clone(),
            rewirings: self.edits.rewirings.clone(),
        };
        for (number, lowered) in self.kernels.iter().enumerate() {
            compare(&mut edits, model, (number, lowered));
        }
        let weights = given.sites.weights.iter().zip(&given.weights);
        let weights = weights.flat_map(|(site, weight)| {
            site.values.iter().map(|&value| (Place::Constant(value), weight.image.shallow_clone()))
        });
        let biases = given.biases.iter().map(|bias| (bias.place, bias.tensor.shallow_clone()));
        let tensors: Vec<_> = weights.chain(biases).collect();
        let instrumented = model.edited(&edits, &tensors)?;
        Ok(Verification { instrumented, kernels: &self.kernels, found: Found::new(&self.kernels) })
    }
}

/// Lets the op that a kernel stands for read what the kernel reads, and taps both.
fn compare(edits: &mut Edits, model: &Clean, (number, lowered): (usize, &Lowered)) {
    let mut insert = |position, op, inputs| {
        edits.insertions.push(Insertion { position, op, inputs, makes: Makes::Tensor });
        Operand::New(edits.insertions.len() - 1)
    };
    let listing = model.listing();
    let maker = listing.nodes.iter().position(|node| node.outputs.contains(&lowered.value)).unwrap_or(0);
    let mut rewirings = Vec::new();
    for (&(node, slot, _), quantized) in lowered.reads.iter().zip(&lowered.quantized) {
        let operand = insert(Position::Before(node), "aten::dequantize", vec![quantized.clone()]);
        rewirings.push(Rewiring { reader: Reader::Node(node), slot, operand });
    }
    let tap = |operand, number: usize| vec![operand, Operand::Int(i64::try_from(number).unwrap_or(i64::MAX))];
    insert(Position::After(maker), "tsquant::tap", tap(Operand::Value(lowered.value), 2 * number));
    insert(Position::After(maker), "tsquant::tap", tap(lowered.result.clone(), 2 * number + 1));
    edits.rewirings.extend(rewirings);
}

impl<'a> Found<'a> {
    fn new(kernels: &'a [Lowered]) -> Self {
        let difference = |lowered: &Lowered| LayerDifference {
            name: lowered.name.clone(),
            op: lowered.op.clone(),
            kernel: lowered.kernel,
            is_float: lowered.eight.is_none(),
            values: 0,
            different: 0,
            largest: 0.0,
        };
        let expected = kernels.iter().map(|_| None).collect();
        Self { kernels, expected, differences: kernels.iter().map(difference).collect() }
    }
}

impl Verification<'_> {
    /// Compares on these arguments, beside those before. Returns what the model gives in 8 bits.
    ///
    /// # Errors
    /// Where the model fails.
    pub fn run(&mut self, arguments: &Arguments) -> Result<Output, Error> {
        self.instrumented.run(arguments, &mut self.found)
    }

    /// What was found, in graph order.
    #[must_use]
    pub fn finish(self) -> Vec<LayerDifference> {
        debug_assert_eq!(self.kernels.len(), self.found.differences.len());
        self.found.differences
    }
}

impl Visit for Found<'_> {
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        let number = tap / 2;
        if tap.is_multiple_of(2) {
            self.expected[number] = Some(value.f_contiguous()?);
            return Ok(());
        }
        let expected = self.expected[number].take().ok_or("a kernel ran without the op that it stands for")?;
        let lowered = self.kernels.get(number).ok_or("a kernel without a number")?;
        let difference = &mut self.differences[number];
        difference.values += u64::try_from(expected.numel())?;
        let Some(eight) = lowered.eight else {
            let largest = expected.f_abs()?.f_max()?.f_double_value(&[])?.max(f64::MIN_POSITIVE);
            let apart = (expected.f_sub(value)?).f_abs()?.f_max()?.f_double_value(&[])? / largest;
            difference.largest = difference.largest.max(apart);
            return Ok(());
        };
        let levels = value.f_int_repr()?.f_to_kind(Kind::Double)?;
        let exact = expected.f_to_kind(Kind::Double)?.f_mul_scalar(1.0 / eight.scale)?;
        #[allow(clippy::cast_precision_loss)]
        let exact = exact.f_add_scalar(eight.zero_point as f64)?;
        let rounded = |by: f64| exact.f_add_scalar(by)?.f_round()?.f_clamp(0.0, eight.highest as f64);
        let (low, high) = (rounded(-TIE)?, rounded(TIE)?);
        let above = levels.f_sub(&high)?.f_clamp_min(0.0)?;
        let apart = low.f_sub(&levels)?.f_clamp_min(0.0)?.f_add(&above)?;
        difference.different += u64::try_from(apart.f_ne(0.0)?.f_sum(Kind::Int64)?.f_int64_value(&[])?)?;
        difference.largest = difference.largest.max(apart.f_max()?.f_double_value(&[])?);
        Ok(())
    }
}
