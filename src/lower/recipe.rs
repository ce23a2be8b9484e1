//! What the written module holds of weights: packed for a kernel, or as levels with scales. A recipe names what it is made of;
//! tensors are made of recipes at the end.

use tch::{Kind, Tensor};

use super::{Given, Weight};
use crate::jit::{self, Attribute, Clean, Operand, ValueId};
use crate::quantizer::Grid;

/// An attribute to be made.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Recipe {
    /// A weight packed for a kernel.
    Packed {
        /// Its layer.
        layer: String,
        /// The op that packs.
        op: &'static str,
        /// Index of the weight.
        weight: usize,
        /// It is a matrix whose columns are output channels.
        transposed: bool,
        /// Its bias.
        bias: Option<BiasOf>,
        /// What else the op takes.
        numbers: Vec<Operand>,
    },
    /// The levels of a weight.
    Levels {
        /// Index of the weight.
        weight: usize,
    },
    /// The levels of a weight of at most 4 bits, two to a byte: the first in the low half, moved up to begin at 0.
    Nibbles {
        /// Index of the weight.
        weight: usize,
    },
    /// The scales of a weight, in a shape that multiplies it.
    Scales {
        /// Index of the weight.
        weight: usize,
    },
    /// The zero points of a weight, in that shape.
    ZeroPoints {
        /// Index of the weight.
        weight: usize,
    },
    /// The same number for each channel.
    Filled {
        /// The layer that it is for.
        layer: String,
        /// What it stands for there.
        role: &'static str,
        /// Channels.
        features: i64,
        /// The number.
        number: f64,
    },
    /// A row that holds the ends of a quantizer's range.
    Range {
        /// The layer that it is for.
        layer: String,
        /// Length of the row.
        features: i64,
        /// Lower end.
        lo: f64,
        /// Upper end.
        hi: f64,
    },
}

/// Where a bias comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BiasOf {
    /// A constant of the graph.
    Constant(ValueId),
    /// A corrected one, by its number.
    Corrected(usize),
}

/// What recipes draw on.
pub(super) struct Larder<'a> {
    model: &'a Clean,
    given: &'a Given<'a>,
    /// As many as the longest weight has channels: zero points of all weights, which the file then holds once.
    zeros: Tensor,
}

impl<'a> Larder<'a> {
    pub(super) fn new(model: &'a Clean, given: &'a Given<'a>) -> Result<Self, tch::TchError> {
        let longest = given.weights.iter().map(|weight| weight.scale.len()).max().unwrap_or(0);
        // A number of tensors in memory fits an i64.
        let zeros = Tensor::f_zeros([longest as i64], (Kind::Int64, tch::Device::Cpu))?;
        Ok(Self { model, given, zeros })
    }
}

impl Recipe {
    /// Whether one attribute serves both: layers that are called twice share it.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Packed { .. }, Self::Packed { .. }) => self.clone().nameless() == other.clone().nameless(),
            _ => self == other,
        }
    }

    fn nameless(mut self) -> Self {
        if let Self::Packed { layer, .. } = &mut self {
            layer.clear();
        }
        self
    }

    /// What it is best called. No path of modules: each module would be a file of code in the archive.
    pub(super) fn name(&self, given: &Given<'_>) -> String {
        let site = |weight: &usize| &given.sites.weights[*weight].name;
        let name = match self {
            Self::Packed { layer, .. } => format!("{layer}.packed_params"),
            Self::Levels { weight } | Self::Nibbles { weight } => site(weight).clone(),
            Self::Scales { weight } => format!("{}.scale", site(weight)),
            Self::ZeroPoints { weight } => format!("{}.zero_point", site(weight)),
            Self::Filled { layer, role, .. } => format!("{layer}.{role}"),
            Self::Range { layer, .. } => format!("{layer}.input_range"),
        };
        name.replace('.', "_")
    }

    /// Makes the attribute; the tensors that it is made of go to the end of `tensors`.
    pub(super) fn cook(
        &self,
        Larder { model, given, zeros }: &Larder<'_>,
        name: String,
        tensors: &mut Vec<Tensor>,
    ) -> Result<Attribute, jit::Error> {
        let mut add = |tensor: Tensor| {
            tensors.push(tensor);
            Operand::Tensor(tensors.len() - 1)
        };
        let (op, operands) = match self {
            Self::Packed { op, weight, transposed, bias, numbers, .. } => {
                let quantized = given.weights[*weight].quantized(*transposed, zeros)?;
                let bias = bias.map(|bias| bias.tensor(model, given)).transpose()?;
                let mut operands = vec![add(quantized), bias.map_or(Operand::None, &mut add)];
                operands.extend(numbers.iter().cloned());
                (Some(*op), operands)
            }
            Self::Levels { weight } => {
                let weight = &given.weights[*weight];
                (None, vec![add(weight.levels(weight.stored_kind())?)])
            }
            Self::Nibbles { weight } => (None, vec![add(given.weights[*weight].nibbles()?)]),
            Self::Scales { weight } => {
                let weight = &given.weights[*weight];
                (None, vec![add(weight.per_channel(weight.scale)?)])
            }
            Self::ZeroPoints { weight } => {
                let weight = &given.weights[*weight];
                (None, vec![add(weight.zero_points()?)])
            }
            Self::Filled { features, number, .. } => {
                (None, vec![add(Tensor::f_full([*features], *number, (Kind::Float, tch::Device::Cpu))?)])
            }
            Self::Range { features, lo, hi, .. } => {
                let row = Tensor::f_zeros([1, *features], (Kind::Float, tch::Device::Cpu))?;
                let _ = row.f_narrow(1, 0, 1)?.f_fill_(*lo)?;
                let _ = row.f_narrow(1, 1, 1)?.f_fill_(*hi)?;
                (None, vec![add(row)])
            }
        };
        Ok(Attribute { name, op, operands })
    }
}

impl BiasOf {
    fn tensor(self, model: &Clean, given: &Given<'_>) -> Result<Tensor, jit::Error> {
        match self {
            Self::Constant(value) => Ok(model.constant(value)?.f_to_device(tch::Device::Cpu)?.f_contiguous()?),
            Self::Corrected(number) => {
                let tensor = &given.biases[number].tensor;
                Ok(tensor.f_to_device(tch::Device::Cpu)?.f_contiguous()?)
            }
        }
    }
}

impl Weight<'_> {
    /// Whether its levels fit into 8 bits.
    pub(super) fn fits_a_byte(&self) -> bool {
        self.bits.get() <= 8
    }

    pub(super) fn has_zero_points(&self) -> bool {
        self.zero_point.iter().any(|&zero| zero != 0)
    }

    /// Whether two of its levels fit into 8 bits.
    pub(super) fn fits_a_nibble(&self) -> bool {
        self.bits.get() <= 4
    }

    /// What is added to a level for it to begin at 0.
    pub(super) fn nibble_offset(&self) -> i32 {
        if self.grid == Grid::Uniform { 0 } else { self.bits.level_count() / 2 }
    }

    fn nibbles(&self) -> Result<Tensor, tch::TchError> {
        let levels = self.levels(Kind::Int)?.f_add_scalar(i64::from(self.nibble_offset()))?.f_flatten(0, -1)?;
        let odd = i64::from(levels.numel() % 2 == 1);
        let pairs = levels.f_constant_pad_nd([0, odd])?.f_reshape([-1, 2])?;
        let high = pairs.f_select(1, 1)?.f_mul_scalar(16)?;
        pairs.f_select(1, 0)?.f_add(&high)?.f_to_kind(Kind::Uint8)
    }

    fn stored_kind(&self) -> Kind {
        // Levels of a uniform grid begin at 0.
        if self.grid == Grid::Uniform { Kind::Uint8 } else { Kind::Int8 }
    }

    /// Numbers by channel in the shape that meets the weight, or one for all.
    fn per_channel(&self, numbers: &[f32]) -> Result<Tensor, tch::TchError> {
        let tensor = Tensor::f_from_slice(numbers)?;
        if numbers.len() == 1 {
            return tensor.f_reshape([] as [i64; 0]);
        }
        let mut shape = vec![1; self.image.dim()];
        if let Some(size) = shape.get_mut(self.axis) {
            *size = -1;
        }
        tensor.f_reshape(shape)
    }

    fn zero_points(&self) -> Result<Tensor, tch::TchError> {
        let zero_points: Vec<f32> = self.zero_point.iter().map(|&zero| zero as f32).collect();
        self.per_channel(&zero_points)
    }

    /// The level of each element.
    fn levels(&self, kind: Kind) -> Result<Tensor, tch::TchError> {
        let image = self.image.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
        let levels = image.f_div(&self.per_channel(self.scale)?)?.f_round()?;
        levels.f_add(&self.zero_points()?)?.f_to_kind(kind)
    }

    /// As a quantized tensor whose output channels come first.
    fn quantized(&self, transposed: bool, zeros: &Tensor) -> Result<Tensor, tch::TchError> {
        let levels = self.levels(Kind::Int8)?;
        let levels = if transposed { levels.f_transpose(0, 1)?.f_contiguous()? } else { levels };
        if let [scale] = *self.scale {
            return levels.f_internal_make_per_tensor_quantized_tensor(f64::from(scale), 0);
        }
        let scales = Tensor::f_from_slice(self.scale)?.f_to_kind(Kind::Double)?;
        let zero_points = zeros.f_narrow(0, 0, scales.size1()?)?;
        levels.f_internal_make_per_channel_quantized_tensor(&scales, &zero_points, 0)
    }
}
