//! Data of many kinds, the same in every run.

use crate::statistics::{Counter, Histogram};

/// A small generator with known constants (xorshift64*): tests need no more.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// From 0 to 1, both excluded.
    pub(super) fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    /// Standard normal, by the polar form of Box and Muller.
    pub(super) fn normal(&mut self) -> f64 {
        loop {
            let (u, v) = (2.0 * self.uniform() - 1.0, 2.0 * self.uniform() - 1.0);
            let s = u * u + v * v;
            if s > 0.0 && s < 1.0 {
                return u * (-2.0 * s.ln() / s).sqrt();
            }
        }
    }
}

/// A shape of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Laplace,
    Relu,
    Relu6,
    Uniform,
    StudentT,
    Bimodal,
    Lattice,
    Outlier,
    Outliers,
    Sigmoid,
    Gelu,
    Constant,
    NegativeConstant,
    Two,
    Negative,
    Tiny,
    Huge,
    Denormal,
    Sparse,
}

pub(super) const KINDS: [Kind; 20] = [
    Kind::Normal,
    Kind::Laplace,
    Kind::Relu,
    Kind::Relu6,
    Kind::Uniform,
    Kind::StudentT,
    Kind::Bimodal,
    Kind::Lattice,
    Kind::Outlier,
    Kind::Outliers,
    Kind::Sigmoid,
    Kind::Gelu,
    Kind::Constant,
    Kind::NegativeConstant,
    Kind::Two,
    Kind::Negative,
    Kind::Tiny,
    Kind::Huge,
    Kind::Denormal,
    Kind::Sparse,
];

impl Kind {
    /// Whether its values repeat or crowd at one place, or lone ones decide.
    pub(super) fn is_spiky(self) -> bool {
        !matches!(
            self,
            Self::Normal | Self::Laplace | Self::Relu | Self::Uniform | Self::Negative | Self::Tiny | Self::Huge
        )
    }

    /// `count` values of this kind.
    pub(super) fn values(self, count: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed ^ (self as u64) << 32);
        let mut value = |index: usize| -> f64 {
            let x = random.normal();
            match self {
                Self::Normal => x,
                Self::Laplace => -random.uniform().ln() * x.signum(),
                Self::Relu => x.max(0.0),
                Self::Relu6 => (x * 4.0).clamp(0.0, 6.0),
                Self::Uniform => 2.0 * random.uniform() - 1.0,
                // Three degrees of freedom.
                Self::StudentT => x / ((0..3).map(|_| random.normal().powi(2)).sum::<f64>() / 3.0).sqrt(),
                Self::Bimodal => x * 0.1 + if index.is_multiple_of(2) { 3.0 } else { -1.0 },
                Self::Lattice => (x * 8.0).round() / 8.0,
                Self::Outlier => {
                    if index == 0 {
                        60.0
                    } else {
                        x
                    }
                }
                Self::Outliers => {
                    if random.uniform() < 0.01 {
                        x * 30.0
                    } else {
                        x
                    }
                }
                Self::Sigmoid => 1.0 / (1.0 + (-3.0 * x).exp()),
                Self::Gelu => x * (1.0 / (1.0 + (-1.702 * x).exp())),
                Self::Constant => 0.37,
                Self::NegativeConstant => -1.7,
                Self::Two => {
                    if x > 0.0 {
                        1.0
                    } else {
                        -0.3
                    }
                }
                Self::Negative => -x.abs() - 0.2,
                Self::Tiny => x * 1e-30,
                Self::Huge => x * 1e30,
                Self::Denormal => x * 4e-38,
                Self::Sparse if random.uniform() < 0.95 => 0.0,
                Self::Sparse => x,
            }
        };
        (0..count).map(|index| value(index) as f32).collect()
    }
}

pub(super) fn histogram(values: &[f32]) -> Histogram {
    let mut histogram = Histogram::new();
    histogram.observe(values, &mut Counter::new());
    histogram
}
