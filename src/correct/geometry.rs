//! Which positions of its input a convolution reads through each tap of its kernel. Plain arithmetic, one axis at a time; it
//! knows no tensors.

/// A convolution along one of its spatial axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Axis {
    /// Taps of the kernel.
    pub(super) kernel: i64,
    pub(super) stride: i64,
    pub(super) padding: Padding,
    pub(super) dilation: i64,
    /// Positions that a transposed convolution adds at the end of its result; `None` if it is not transposed.
    pub(super) transposed: Option<i64>,
}

/// What is put around the input along an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Padding {
    /// So many zeros at either end.
    Zeros(i64),
    /// As many as make the result as long as the input, the odd one at the end.
    Same,
}

/// Positions that are equally far from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) start: usize,
    pub(super) step: usize,
    pub(super) count: usize,
}

impl Axis {
    /// Positions of the result for an input of this length.
    pub(super) fn output(&self, input: i64) -> i64 {
        let reach = self.dilation * (self.kernel - 1);
        match (self.padding, self.transposed) {
            (Padding::Same, _) => input,
            (Padding::Zeros(padding), None) => (input + 2 * padding - reach - 1).div_euclid(self.stride) + 1,
            (Padding::Zeros(padding), Some(more)) => (input - 1) * self.stride - 2 * padding + reach + more + 1,
        }
    }

    /// The positions of the input that `tap` meets somewhere in the result, each of them once.
    pub(super) fn met(&self, input: i64, tap: i64) -> impl Iterator<Item = i64> {
        let output = self.output(input);
        let padding = match self.padding {
            Padding::Zeros(padding) => padding,
            Padding::Same => self.dilation * (self.kernel - 1) / 2,
        };
        let shift = tap * self.dilation - padding;
        // Transposed, it is the input that is stepped through, and the result that has ends.
        let (steps, length) = if self.transposed.is_some() { (input, output) } else { (output, input) };
        let (stride, is_transposed) = (self.stride, self.transposed.is_some());
        (0..steps).filter_map(move |step| {
            let other = step * stride + shift;
            let position = if is_transposed { step } else { other };
            (0..length).contains(&other).then_some(position)
        })
    }

    /// The same, as the progression that they are.
    pub(super) fn places(&self, input: i64, tap: i64) -> Places {
        let mut met = self.met(input, tap).filter_map(|position| usize::try_from(position).ok());
        let (first, second) = (met.next(), met.next());
        let count = usize::from(first.is_some()) + usize::from(second.is_some()) + met.count();
        let step = second.zip(first).map_or(1, |(second, first)| second - first);
        Places { start: first.unwrap_or_default(), step, count }
    }

    /// True if each position of the input is met once by the only tap.
    pub(super) fn is_pointwise(&self) -> bool {
        let plain = Self {
            kernel: 1,
            stride: 1,
            padding: self.padding,
            dilation: self.dilation,
            transposed: self.transposed.map(|_| 0),
        };
        *self == plain && matches!(self.padding, Padding::Zeros(0) | Padding::Same)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Axis = Axis { kernel: 3, stride: 1, padding: Padding::Zeros(1), dilation: 1, transposed: None };

    fn met(axis: Axis, input: i64) -> Vec<Vec<i64>> {
        (0..axis.kernel).map(|tap| axis.met(input, tap).collect()).collect()
    }

    #[test]
    fn borders_are_missed_by_the_outer_taps() {
        assert_eq!(met(PLAIN, 4), [vec![0, 1, 2], vec![0, 1, 2, 3], vec![1, 2, 3]]);
        assert_eq!(met(Axis { padding: Padding::Same, ..PLAIN }, 4), met(PLAIN, 4));
        assert_eq!(met(Axis { padding: Padding::Zeros(0), ..PLAIN }, 4), [[0, 1], [1, 2], [2, 3]]);
    }

    #[test]
    fn strides_and_dilations_leave_positions_out() {
        assert_eq!(met(Axis { stride: 2, ..PLAIN }, 5), [vec![1, 3], vec![0, 2, 4], vec![1, 3]]);
        let wide = Axis { dilation: 2, padding: Padding::Zeros(0), ..PLAIN };
        assert_eq!((wide.output(6), met(wide, 6)), (2, vec![vec![0, 1], vec![2, 3], vec![4, 5]]));
    }

    #[test]
    fn what_a_tap_meets_is_a_progression() {
        let axis = Axis { stride: 2, ..PLAIN };
        assert_eq!(axis.places(5, 1), Places { start: 0, step: 2, count: 3 });
        assert_eq!(axis.places(2, 0), Places { start: 0, step: 1, count: 0 });
        assert_eq!(axis.places(3, 2), Places { start: 1, step: 1, count: 1 });
    }

    #[test]
    fn an_even_kernel_has_its_odd_zero_at_the_end() {
        let even = Axis { kernel: 2, padding: Padding::Same, ..PLAIN };
        assert_eq!(met(even, 3), [vec![0, 1, 2], vec![1, 2]]);
    }

    #[test]
    fn a_transposed_one_loses_what_is_cut_off_its_result() {
        let transposed = Axis { stride: 2, transposed: Some(0), ..PLAIN };
        assert_eq!((transposed.output(3), met(transposed, 3)), (5, vec![vec![1, 2], vec![0, 1, 2], vec![0, 1]]));
        let longer = Axis { transposed: Some(1), ..transposed };
        assert_eq!((longer.output(3), met(longer, 3)), (6, vec![vec![1, 2], vec![0, 1, 2], vec![0, 1, 2]]));
    }

    #[test]
    fn pointwise() {
        let one = Axis { kernel: 1, padding: Padding::Zeros(0), ..PLAIN };
        assert!(one.is_pointwise() && Axis { padding: Padding::Same, transposed: Some(0), ..one }.is_pointwise());
        let not = [PLAIN, Axis { stride: 2, ..one }, Axis { padding: Padding::Zeros(1), ..one }];
        assert!(!not.iter().any(Axis::is_pointwise));
    }
}
