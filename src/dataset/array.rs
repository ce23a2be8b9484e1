//! One tensor that lies in a file as plain bytes, read row by row. Knows no file format: a reader says where the bytes
//! are, and [`Array::new`] checks that they can be there.
//!
//! Rows are read with positioned reads into the batch's own buffer. That needs no `unsafe` as a memory map would, takes
//! the memory of one batch, and a file that shrinks meanwhile is an error, not a signal.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use tch::{Kind, Tensor};

use super::dtype::{Dtype, INPUT_DTYPES};
use super::error::{Error, Place, shape_text};
use super::rows::Rows;

/// A tensor in C order, of at least one row and one element per row.
#[derive(Debug)]
pub(super) struct Array {
    place: Place,
    dtype: Dtype,
    shape: Vec<usize>,
    row_bytes: usize,
    bytes: Extent,
}

/// Bytes of an open file.
#[derive(Debug, Clone)]
pub(super) struct Extent {
    /// The file.
    pub(super) file: Arc<File>,
    /// Offset of the first byte.
    pub(super) start: u64,
    /// Number of bytes.
    pub(super) length: u64,
}

impl Array {
    /// Checks that `shape` is one of rows and that its elements take exactly the bytes of the extent, and those lie in
    /// the file. Whatever a header says, no more memory than the file's size is ever asked for after this.
    pub(super) fn new(place: Place, dtype: Dtype, shape: Vec<usize>, bytes: Extent) -> Result<Self, Error> {
        let Some(&rows) = shape.first() else {
            return Err(Error::tensor(&place, "at least one axis, the first of them rows", "a single number"));
        };
        if shape.contains(&0) {
            return Err(Error::tensor(&place, "at least one element", format!("shape {}", shape_text(&shape))));
        }
        let row_bytes = shape[1..].iter().try_fold(dtype.size(), |bytes, &axis| bytes.checked_mul(axis));
        let needed = row_bytes.and_then(|bytes| bytes.checked_mul(rows)).and_then(|bytes| u64::try_from(bytes).ok());
        let (Some(row_bytes), true) = (row_bytes, needed == Some(bytes.length)) else {
            let needed = needed.map_or("more bytes than any file has".to_owned(), |bytes| format!("{bytes} bytes"));
            let expected = format!("{needed} for {} of shape {}", dtype.name(), shape_text(&shape));
            return Err(Error::tensor(&place, expected, format!("{} bytes", bytes.length)));
        };
        let size = bytes.file.metadata().map_err(Error::io(&place.path))?.len();
        if bytes.start.checked_add(bytes.length).is_none_or(|end| end > size) {
            let expected = format!("{} bytes from byte {}", bytes.length, bytes.start);
            return Err(Error::tensor(&place, expected, format!("a file of {size} bytes: it is truncated")));
        }
        Ok(Self { place, dtype, shape, row_bytes, bytes })
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// All axes, rows first; none is 0.
    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(super) fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    /// The rows at `positions` of the chosen `rows`: integers and bools as stored, floats as float32.
    ///
    /// # Errors
    /// An element type that no model takes, a failed read, a value that is not finite, a bool that is neither 0 nor 1.
    pub(super) fn read(&self, rows: &Rows, positions: Range<usize>) -> Result<Tensor, Error> {
        let kind = self.input_kind()?;
        let bytes = self.read_bytes(rows, positions.clone())?;
        let stored = self.tensor(&bytes, kind)?;
        if !self.dtype.is_float() {
            self.check_bools(&bytes, rows, positions.start)?;
            return Ok(stored);
        }
        let float = stored.f_to_kind(Kind::Float).map_err(Error::libtorch(&self.place))?;
        // A finite sum has finite terms only, so that the slow search is for errors (and sums beyond float32) alone.
        let sum =
            float.f_sum(Kind::Float).and_then(|sum| sum.f_double_value(&[])).map_err(Error::libtorch(&self.place))?;
        if !sum.is_finite()
            && let Some((index, value)) = self.dtype.first_not_finite(&bytes)
        {
            let row = self.row_of(rows, positions.start, index * self.dtype.size());
            return Err(Error::tensor(&self.place, "finite float32 values", format!("{value} in row {row}")));
        }
        Ok(float)
    }

    /// The tensor kind that a model gets this as, or an error for element types that none takes.
    pub(super) fn input_kind(&self) -> Result<Kind, Error> {
        let wrong = || Error::tensor(&self.place, INPUT_DTYPES, format!("{} elements", self.dtype.name()));
        self.dtype.kind().ok_or_else(wrong)
    }

    /// All chosen rows as class indices: int64 of shape (N), (N, K), (N, T) or (N, T, K).
    ///
    /// # Errors
    /// Elements that are no integers, another rank, a failed read.
    pub(super) fn labels(&self, rows: &Rows) -> Result<Tensor, Error> {
        const EXPECTED: &str = "class indices as integers that int64 holds";
        // Bytes of no element: asks for the type alone, before anything is read.
        self.dtype.integers(&[]).map_err(|found| Error::tensor(&self.place, EXPECTED, found))?;
        if self.shape.len() > 3 {
            let found = format!("shape {}", shape_text(&self.shape));
            return Err(Error::tensor(&self.place, "class indices of shape [N], [N, K], [N, T] or [N, T, K]", found));
        }
        let bytes = self.read_bytes(rows, 0..rows.len())?;
        let values = self.dtype.integers(&bytes).map_err(|found| Error::tensor(&self.place, EXPECTED, found))?;
        let mut shape = vec![rows.len() as i64];
        shape.extend(self.shape[1..].iter().map(|&axis| axis as i64));
        let flat = Tensor::f_from_slice(&values).map_err(Error::libtorch(&self.place))?;
        flat.f_view(shape.as_slice()).map_err(Error::libtorch(&self.place))
    }

    fn read_bytes(&self, rows: &Rows, positions: Range<usize>) -> Result<Vec<u8>, Error> {
        let runs = rows.runs(positions);
        let count: usize = runs.iter().map(ExactSizeIterator::len).sum();
        // Cannot overflow: all rows together fit into the file.
        let length = count * self.row_bytes;
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(length).map_err(|_| {
            Error::tensor(&self.place, format!("{length} bytes of memory for {count} rows"), "less; lower `batch_size`")
        })?;
        buffer.resize(length, 0);
        let mut rest = buffer.as_mut_slice();
        for run in runs {
            let (part, after) = rest.split_at_mut(run.len() * self.row_bytes);
            let start = self.bytes.start + (run.start * self.row_bytes) as u64;
            self.bytes.file.read_exact_at(part, start).map_err(Error::io(&self.place.path))?;
            rest = after;
        }
        Ok(buffer)
    }

    /// A tensor with a copy of `bytes`, whole rows.
    fn tensor(&self, bytes: &[u8], kind: Kind) -> Result<Tensor, Error> {
        let rows = bytes.len() / self.row_bytes;
        // tch copies as many bytes as the shape has, whatever the slice holds: rows times row_bytes is that slice's length.
        let mut shape = vec![rows as i64];
        shape.extend(self.shape[1..].iter().map(|&axis| axis as i64));
        Tensor::f_from_data_size(bytes, &shape, kind).map_err(Error::libtorch(&self.place))
    }

    fn check_bools(&self, bytes: &[u8], rows: &Rows, first: usize) -> Result<(), Error> {
        if self.dtype != Dtype::Bool {
            return Ok(());
        }
        match bytes.iter().position(|&byte| byte > 1) {
            Some(offset) => {
                let row = self.row_of(rows, first, offset);
                Err(Error::tensor(&self.place, "bools of 0 or 1", format!("{} in row {row}", bytes[offset])))
            }
            None => Ok(()),
        }
    }

    /// The row of the file that byte `offset` of a batch starting at position `first` belongs to.
    fn row_of(&self, rows: &Rows, first: usize, offset: usize) -> usize {
        let position = first + offset / self.row_bytes;
        rows.at(position..position + 1).next().unwrap_or(position)
    }
}
