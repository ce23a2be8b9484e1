//! Sums over the positions that each tap of a kernel meets, in one pass through memory. It knows numbers and axes, and no
//! tensors.
//!
//! Rows are added up place by place. Along the last axis numbers lie side by side; lines of them that the same taps of the other
//! axes meet are added up next: there are few kinds of lines, those inside and those at either border. What each tap meets is
//! picked from these.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::geometry::{Axis, Places};

/// Numbers that are worth a call of their own.
const ENOUGH: usize = 1 << 15;

/// Pairs of a tap and a position of an axis that are worth listing.
const MOST_MET: i64 = 1 << 22;

/// How the taps of all axes meet an input.
pub(super) struct Met {
    /// Of each line of a feature the kind, unless no tap meets it.
    lines: Vec<Option<usize>>,
    /// Numbers of a line.
    length: usize,
    /// Kinds along each axis but the last.
    kinds: Vec<usize>,
    /// For each of these axes and each of its taps: the kinds that it meets.
    of_taps: Vec<Vec<Vec<usize>>>,
    /// For each tap of the last axis the places that it meets.
    places: Vec<Places>,
}

impl Met {
    /// For an input of these lengths along the axes of a kernel; `None` where there is no axis or nothing along one, and where
    /// taps meet more of other axes than the last than is worth listing.
    pub(super) fn new(axes: &[Axis], lengths: &[usize]) -> Option<Self> {
        let (last, outer) = axes.split_last()?;
        let (&length, outer_lengths) = lengths.split_last().filter(|_| axes.len() == lengths.len())?;
        if lengths.contains(&0) {
            return None;
        }
        let (mut lines, mut all_kinds, mut of_taps) = (vec![Some(0)], Vec::new(), Vec::new());
        for (axis, &length) in outer.iter().zip(outer_lengths) {
            let met: i64 = (0..axis.kernel).map(|tap| axis.places(length as i64, tap).count as i64).sum();
            if met > MOST_MET {
                return None;
            }
            let (kinds, count, of_tap) = kinds(axis, length);
            let with = |line: &Option<usize>| {
                let line = *line;
                kinds.iter().map(move |kind| Some(line? * count + (*kind)?)).collect::<Vec<_>>()
            };
            lines = lines.iter().flat_map(with).collect();
            all_kinds.push(count);
            of_taps.push(of_tap);
        }
        let places = (0..last.kernel).map(|tap| last.places(length as i64, tap)).collect();
        Some(Self { lines, length, kinds: all_kinds, of_taps, places })
    }

    /// The sums over (rows, features, lengths) by feature and tap, the last axis's taps side by side.
    ///
    /// `in_parallel` has to call the function that it is given with each number below its first argument, in any order, on any
    /// thread. The sums do not depend on that.
    pub(super) fn sums(
        &self,
        values: &[f32],
        features: usize,
        in_parallel: impl FnOnce(usize, &(dyn Fn(usize) + Sync)),
    ) -> Vec<f64> {
        let taps = self.of_taps.iter().map(Vec::len).product::<usize>() * self.places.len();
        let mut sums = vec![0.0; features * taps];
        let each = self.lines.len() * self.length;
        if values.is_empty() || self.kinds.contains(&0) {
            return sums;
        }
        let rows = values.len() / (features * each).max(1);
        let together = (ENOUGH / (rows * each).max(1)).max(1);
        let parts: Vec<Mutex<&mut [f64]>> = sums.chunks_mut(together * taps).map(Mutex::new).collect();
        in_parallel(parts.len(), &|number| {
            let Some(part) = parts.get(number) else { return };
            let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
            let mut of_rows = vec![0.0; each];
            for (index, sums) in part.chunks_mut(taps).enumerate() {
                let feature = number * together + index;
                let planes = values.chunks(each).skip(feature).step_by(features);
                pulp::Arch::new().dispatch(AddUp { planes, sums: &mut of_rows });
                sums.copy_from_slice(&self.by_tap(&self.by_line(&of_rows)));
            }
        });
        drop(parts);
        sums
    }

    /// The sums of lines of one kind, place by place.
    fn by_line(&self, plane: &[f32]) -> Vec<f64> {
        let mut sums = vec![0.0; self.kinds.iter().product::<usize>() * self.length];
        for (line, kind) in plane.chunks_exact(self.length).zip(&self.lines) {
            let Some(kind) = kind else { continue };
            let Some(own) = sums.get_mut(kind * self.length..(kind + 1) * self.length) else { continue };
            own.iter_mut().zip(line).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        sums
    }

    /// What each tap meets of sums by kind along all axes but the last, and by place along that.
    fn by_tap(&self, by_line: &[f64]) -> Vec<f64> {
        let of_line = by_line.chunks(self.length).flat_map(|line| {
            self.places.iter().map(|&Places { start, step, count }| {
                line.get(start..).unwrap_or_default().iter().step_by(step).take(count).sum()
            })
        });
        let (mut sums, mut behind) = (of_line.collect::<Vec<f64>>(), self.places.len());
        for (axis, &kinds) in self.of_taps.iter().zip(&self.kinds).rev() {
            let picked = sums.chunks(kinds * behind).flat_map(|sums| {
                axis.iter().flat_map(move |met| {
                    (0..behind).map(move |place| met.iter().filter_map(|kind| sums.get(kind * behind + place)).sum())
                })
            });
            sums = picked.collect::<Vec<f64>>();
            behind *= axis.len();
        }
        sums
    }
}

/// Positions that the same taps meet are of one kind: that of each position, how many there are, and those that each tap meets.
fn kinds(axis: &Axis, length: usize) -> (Vec<Option<usize>>, usize, Vec<Vec<usize>>) {
    let mut taps_at = vec![Vec::new(); length];
    let taps = usize::try_from(axis.kernel).unwrap_or_default();
    for tap in 0..taps {
        let Places { start, step, count } = axis.places(length as i64, tap as i64);
        (0..count).for_each(|index| taps_at[start + index * step].push(tap));
    }
    let (mut known, mut of_taps) = (HashMap::new(), vec![Vec::new(); taps]);
    let mut kind_of = |taps: Vec<usize>| {
        if taps.is_empty() {
            return None;
        }
        let next = known.len();
        Some(*known.entry(taps).or_insert_with_key(|taps| {
            taps.iter().for_each(|&tap| of_taps[tap].push(next));
            next
        }))
    };
    let of_positions = taps_at.into_iter().map(&mut kind_of).collect();
    (of_positions, known.len(), of_taps)
}

/// The rows of one feature on their way to their sum; a type, because a closure would not be compiled for each set of vector
/// instructions.
struct AddUp<'a, P> {
    planes: P,
    sums: &'a mut [f32],
}

impl<'a, P: Iterator<Item = &'a [f32]>> pulp::NullaryFnOnce for AddUp<'_, P> {
    type Output = ();

    /// In f32: sums of a batch alone, of which those in f64 are made.
    #[inline(always)]
    fn call(self) {
        self.sums.fill(0.0);
        for plane in self.planes {
            self.sums.iter_mut().zip(plane).for_each(|(sum, x)| *sum += x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::geometry::Padding;
    use super::*;

    fn in_turn(parts: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..parts).rev().for_each(work);
    }

    /// Position by position, in another order.
    fn by_hand(values: &[f32], features: usize, axes: &[Axis], lengths: &[usize]) -> Vec<f64> {
        let each: usize = lengths.iter().product();
        let taps: usize = axes.iter().map(|axis| axis.kernel as usize).product();
        let mut sums = vec![0.0; features * taps];
        for (place, x) in values.iter().enumerate() {
            let (feature, mut position, mut at) = (place / each % features, place % each, Vec::new());
            for &length in lengths.iter().rev() {
                at.insert(0, position % length);
                position /= length;
            }
            for tap in 0..taps {
                let mut left = tap;
                let meets = axes.iter().zip(&at).zip(lengths).rev().all(|((axis, &at), &length)| {
                    let own = left as i64 % axis.kernel;
                    left /= axis.kernel as usize;
                    axis.met(length as i64, own).any(|position| position == at as i64)
                });
                sums[feature * taps + tap] += if meets { f64::from(*x) } else { 0.0 };
            }
        }
        sums
    }

    #[test]
    fn as_position_by_position() {
        let plain = Axis { kernel: 3, stride: 1, padding: Padding::Zeros(1), dilation: 1, transposed: None };
        let axes = [
            plain,
            Axis { stride: 2, ..plain },
            Axis { kernel: 4, padding: Padding::Same, ..plain },
            Axis { kernel: 2, stride: 3, padding: Padding::Zeros(0), ..plain },
            Axis { dilation: 2, padding: Padding::Zeros(2), ..plain },
            Axis { stride: 2, transposed: Some(1), ..plain },
        ];
        let values: Vec<f32> = (0..2 * 3 * 4 * 5 * 6).map(|index| ((index * 7919) % 31) as f32 - 9.0).collect();
        let check = |axes: &[Axis], lengths: &[usize], features: usize| {
            let met = Met::new(axes, lengths).expect("axes");
            let (found, expected) = (met.sums(&values, features, in_turn), by_hand(&values, features, axes, lengths));
            assert_eq!(found, expected, "{axes:?} {lengths:?}");
            assert!(found.iter().any(|&sum| sum != 0.0));
        };
        for first in axes {
            check(&[first], &[6], 60);
            check(&[first], &[60], 3);
            for second in axes {
                check(&[first, second], &[5, 6], 3);
                check(&[first, second, plain], &[4, 5, 6], 3);
            }
        }
    }

    #[test]
    fn nothing_to_add_up() {
        let axis = Axis { kernel: 3, stride: 1, padding: Padding::Zeros(1), dilation: 1, transposed: None };
        assert!(Met::new(&[], &[]).is_none() && Met::new(&[axis, axis], &[0, 4]).is_none());
        let long = Axis { kernel: 4001, padding: Padding::Same, ..axis };
        assert!(Met::new(&[long, axis], &[48_000, 1]).is_none() && Met::new(&[axis, long], &[1, 48_000]).is_some());
        let none = Met::new(&[axis, axis], &[2, 4]).expect("axes").sums(&[], 2, in_turn);
        assert_eq!(none, [0.0; 18]);
        // No position of the result is there at all.
        let short = Axis { padding: Padding::Zeros(0), ..axis };
        let sums = Met::new(&[short, axis], &[2, 4]).expect("axes").sums(&[1.0; 8], 1, in_turn);
        assert_eq!(sums, [0.0; 9]);
    }
}
