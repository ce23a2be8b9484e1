//! Tensors of a `.safetensors` file. The crate `safetensors` parses and checks the header; data stays in the file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype as StoredDtype;
use safetensors::tensor::Metadata;

use super::array::{Array, Extent};
use super::dtype::{Dtype, INPUT_DTYPES};
use super::error::{Error, Place};

/// Bytes of the header's length, which the file begins with.
const LENGTH_BYTES: u64 = 8;
/// The limit of the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open `.safetensors` file.
#[derive(Debug)]
pub(super) struct Safetensors {
    file: Arc<File>,
    metadata: Metadata,
    data_start: u64,
}

impl Safetensors {
    /// Reads and checks the header, and that the file is as long as it says.
    pub(super) fn open(path: &Path, file: File) -> Result<Self, Error> {
        let size = file.metadata().map_err(Error::io(path))?.len();
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_exact_at(&mut length, 0).map_err(Error::io(path))?;
        let length = u64::from_le_bytes(length);
        let room = size.saturating_sub(LENGTH_BYTES);
        if length > room.min(MAX_HEADER_BYTES) {
            let message = format!("expected a header of at most {room} bytes, found {length}: the file is truncated");
            return Err(Error::damaged(path, message));
        }
        let mut header = vec![0; length as usize];
        file.read_exact_at(&mut header, LENGTH_BYTES).map_err(Error::io(path))?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|error| Error::damaged(path, format_args!("the safetensors header is damaged: {error}")))?;
        let data_start = LENGTH_BYTES + length;
        let (expected, found) = (metadata.data_len() as u64, size - data_start);
        if expected != found {
            return Err(Error::damaged(path, format_args!("expected {expected} bytes of tensors, found {found}")));
        }
        Ok(Self { file: Arc::new(file), metadata, data_start })
    }

    /// Names in the order of the data.
    pub(super) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// The tensor at `place`, if there is one.
    pub(super) fn array(&self, place: Place) -> Result<Option<Array>, Error> {
        let Some(info) = self.metadata.info(&place.tensor) else { return Ok(None) };
        let Some(dtype) = dtype(info.dtype) else {
            return Err(Error::tensor(&place, INPUT_DTYPES, format!("{:?} elements", info.dtype)));
        };
        let (start, end) = info.data_offsets;
        // Both lie in the file: the offsets ascend, and the last one was compared with the file's size.
        let (start, length) = (self.data_start + start as u64, (end - start) as u64);
        let extent = Extent { file: Arc::clone(&self.file), start, length };
        Array::new(place, dtype, info.shape.clone(), extent).map(Some)
    }
}

fn dtype(stored: StoredDtype) -> Option<Dtype> {
    Some(match stored {
        StoredDtype::BOOL => Dtype::Bool,
        StoredDtype::U8 => Dtype::U8,
        StoredDtype::I8 => Dtype::I8,
        StoredDtype::U16 => Dtype::U16,
        StoredDtype::I16 => Dtype::I16,
        StoredDtype::U32 => Dtype::U32,
        StoredDtype::I32 => Dtype::I32,
        StoredDtype::U64 => Dtype::U64,
        StoredDtype::I64 => Dtype::I64,
        StoredDtype::F16 => Dtype::F16,
        StoredDtype::BF16 => Dtype::Bf16,
        StoredDtype::F32 => Dtype::F32,
        StoredDtype::F64 => Dtype::F64,
        _ => return None,
    })
}
