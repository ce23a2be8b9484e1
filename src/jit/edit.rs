//! A graph with other ops in it: what is inserted, what reads what from then on, and what the written module holds for it.
//!
//! It carries such edits out, in the order in which they are listed; which ones make sense is the caller's business.

use tch::Tensor;

use super::ffi::bridge;
use super::listing::{BlockId, NodeId, ValueId};
use super::{Error, tensor};

/// What an inserted op reads, or an attribute is made of.
#[derive(Debug, Clone, PartialEq)]
pub enum Operand {
    /// A value of the graph as it was.
    Value(ValueId),
    /// The result of an inserted op, by its number.
    New(usize),
    /// An attribute, by its number.
    Attribute(usize),
    /// A tensor that an attribute is made of, by its number.
    Tensor(usize),
    /// None.
    None,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// A list of whole numbers.
    Ints(Vec<i64>),
}

/// Where an op is inserted; behind what was inserted there before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Position {
    /// First in a block.
    Start(BlockId),
    /// In front of a node.
    Before(NodeId),
    /// Behind a node.
    After(NodeId),
}

/// What an inserted op makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Makes {
    /// A tensor.
    Tensor,
    /// A list of tensors.
    Tensors,
    /// A list of whole numbers.
    Ints,
}

/// An op to insert.
#[derive(Debug, Clone, PartialEq)]
pub struct Insertion {
    /// Where.
    pub position: Position,
    /// Qualified name without overload: `quantized::conv2d`.
    pub op: &'static str,
    /// What it reads.
    pub inputs: Vec<Operand>,
    /// What it makes.
    pub makes: Makes,
}

/// Who reads something else from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reader {
    /// A node.
    Node(NodeId),
    /// A block, in what it returns.
    Block(BlockId),
}

/// An input led elsewhere.
#[derive(Debug, Clone, PartialEq)]
pub struct Rewiring {
    /// Who reads.
    pub reader: Reader,
    /// Which of its inputs.
    pub slot: usize,
    /// What it reads from now on.
    pub operand: Operand,
}

/// An attribute of the written module.
#[derive(Debug, Clone, PartialEq)]
pub struct Attribute {
    /// Dotted name.
    pub name: String,
    /// The op that makes it of its operands, once; `None` for a buffer that is its only operand.
    pub op: Option<&'static str>,
    /// What it is made of: tensors and plain values.
    pub operands: Vec<Operand>,
}

/// All edits of one graph.
#[derive(Debug, Default)]
pub struct Edits {
    /// Made first.
    pub attributes: Vec<Attribute>,
    /// What attributes are made of.
    pub tensors: Vec<Tensor>,
    /// In order: an op reads what was inserted before.
    pub insertions: Vec<Insertion>,
    /// Carried out last.
    pub rewirings: Vec<Rewiring>,
}

impl Edits {
    pub(super) fn rows(&self) -> bridge::EditRows {
        let attributes = self.attributes.iter().map(attribute);
        let insertions = self.insertions.iter().map(|insertion| {
            let (place, index) = match insertion.position {
                Position::Start(block) => (bridge::Where::Start, block),
                Position::Before(node) => (bridge::Where::Before, node),
                Position::After(node) => (bridge::Where::After, node),
            };
            let makes = match insertion.makes {
                Makes::Tensor => bridge::Makes::Tensor,
                Makes::Tensors => bridge::Makes::Tensors,
                Makes::Ints => bridge::Makes::Ints,
            };
            let (op, inputs) = (insertion.op.to_owned(), operands(&insertion.inputs));
            bridge::InsertionRow { place, index, op, inputs, makes }
        });
        let rewirings = self.rewirings.iter().map(|rewiring| {
            let (is_block, index) = match rewiring.reader {
                Reader::Node(node) => (false, node),
                Reader::Block(block) => (true, block),
            };
            bridge::RewiringRow { is_block, index, slot: rewiring.slot, operand: operand(&rewiring.operand) }
        });
        bridge::EditRows {
            attributes: attributes.collect(),
            insertions: insertions.collect(),
            rewirings: rewirings.collect(),
        }
    }
}

fn operands(list: &[Operand]) -> Vec<bridge::OperandRow> {
    list.iter().map(operand).collect()
}

fn operand(operand: &Operand) -> bridge::OperandRow {
    use bridge::OperandKind;
    let row = |kind| bridge::OperandRow { kind, index: 0, number: 0, real: 0.0, numbers: Vec::new() };
    match operand {
        Operand::Value(index) => bridge::OperandRow { index: *index, ..row(OperandKind::Value) },
        Operand::New(index) => bridge::OperandRow { index: *index, ..row(OperandKind::New) },
        Operand::Attribute(index) => bridge::OperandRow { index: *index, ..row(OperandKind::Attribute) },
        Operand::Tensor(index) => bridge::OperandRow { index: *index, ..row(OperandKind::Tensor) },
        Operand::None => row(OperandKind::None),
        Operand::Bool(value) => bridge::OperandRow { number: i64::from(*value), ..row(OperandKind::Bool) },
        Operand::Int(number) => bridge::OperandRow { number: *number, ..row(OperandKind::Int) },
        Operand::Float(real) => bridge::OperandRow { real: *real, ..row(OperandKind::Float) },
        Operand::Ints(numbers) => bridge::OperandRow { numbers: numbers.clone(), ..row(OperandKind::Ints) },
    }
}

/// What a kernel writes, and how often it runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelRun {
    /// Scale of its result.
    pub scale: f64,
    /// Zero point of its result.
    pub zero_point: i64,
    /// At least once.
    pub runs: usize,
}

/// Packs a weight as an attribute of an edited graph would be, and runs `op` with it on a quantized tensor.
///
/// # Errors
/// Where the engine that is set refuses one of them.
pub fn pack_and_run(
    pack: &Attribute,
    made_of: &[Tensor],
    op: &str,
    (x, run): (&Tensor, KernelRun),
) -> Result<Tensor, Error> {
    let made_of = tensor::list(made_of.iter());
    let run = bridge::ResultRow { scale: run.scale, zero_point: run.zero_point, runs: run.runs.max(1) };
    let result = bridge::pack_and_run(&attribute(pack), &made_of, op, tensor::as_bridge(x), &run)?;
    Ok(tensor::from_unique(result))
}

fn attribute(attribute: &Attribute) -> bridge::AttributeOfOp {
    bridge::AttributeOfOp {
        name: attribute.name.clone(),
        op: attribute.op.unwrap_or_default().to_owned(),
        operands: operands(&attribute.operands),
    }
}
