//! Tensors of numbers in safetensors, and their description in the metadata.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use safetensors::tensor::View;
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::jit;
use crate::pipeline::{Error, hash};

/// Key of the description in the file's metadata.
const KEY: &str = "tsquant";

/// Bytes of a head, as safetensors allows them.
const MOST_HEAD: u64 = 100_000_000;

/// Key in the description: the SHA-256 of all else in it and of all tensors.
const HASH: &str = "sha256";

/// A number that a tensor holds.
pub(super) trait Number: Copy {
    const DTYPE: Dtype;

    fn write(self, bytes: &mut Vec<u8>);

    /// Those of these bytes, as many as there are whole numbers.
    fn read(bytes: &[u8]) -> Vec<Self>;
}

macro_rules! number {
    ($type:ty, $dtype:expr) => {
        impl Number for $type {
            const DTYPE: Dtype = $dtype;

            fn write(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }

            fn read(bytes: &[u8]) -> Vec<Self> {
                bytes.as_chunks().0.iter().map(|bytes| Self::from_le_bytes(*bytes)).collect()
            }
        }
    };
}

number!(f32, Dtype::F32);
number!(f64, Dtype::F64);
number!(u32, Dtype::U32);
number!(u64, Dtype::U64);
number!(i64, Dtype::I64);

/// A tensor on its way to disk.
pub(super) struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    /// Numbers of this shape, the last axis first.
    pub(super) fn new<T: Number>(shape: Vec<usize>, numbers: impl IntoIterator<Item = T>) -> Self {
        let mut bytes = Vec::new();
        numbers.into_iter().for_each(|number| number.write(&mut bytes));
        Self { dtype: T::DTYPE, shape, bytes }
    }

    /// Numbers along one axis.
    pub(super) fn list<T: Number>(numbers: &[T]) -> Self {
        Self::new(vec![numbers.len()], numbers.iter().copied())
    }
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes tensors with a description of them.
pub(super) fn write(path: &Path, tensors: Vec<(String, Stored)>, description: &impl Serialize) -> Result<(), Error> {
    let mut description = serde_json::to_value(description)?;
    let parts = tensors.iter().map(|(name, tensor)| (name.as_str(), &tensor.shape[..], &tensor.bytes[..]));
    let hash = hash_of(&description, parts.collect());
    if let Value::Object(entries) = &mut description {
        entries.insert(HASH.to_owned(), hash.into());
    }
    // One entry alone: several would come in any order.
    let metadata = HashMap::from([(KEY.to_owned(), description.to_string())]);
    let failed = |source| Error::Write { path: path.to_owned(), source };
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .map_err(|error| failed(std::io::Error::other(error.to_string())))?;
    // As other files have it, not for the owner alone.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).map_err(failed)
}

/// The description in a file, of which no more is read than its head; `None` where it has none.
pub(super) fn describe_file<D: DeserializeOwned>(path: &Path) -> Option<D> {
    let mut file = std::fs::File::open(path).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let mut head = Vec::new();
    file.take(u64::from_le_bytes(length).min(MOST_HEAD)).read_to_end(&mut head).ok()?;
    // The crate reads heads of whole files alone.
    let head: Value = serde_json::from_slice(&head).ok()?;
    serde_json::from_str(head.get("__metadata__")?.get(KEY)?.as_str()?).ok()
}

/// The description in a file that was read.
///
/// # Errors
/// What is wrong with the bytes.
pub(super) fn describe<D: DeserializeOwned>(bytes: &[u8]) -> Result<D, String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| text(&error))?;
    let described = metadata.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
    let described = described.ok_or_else(|| format!("expected the metadata `{KEY}`, found none"))?;
    serde_json::from_str(described).map_err(|error| text(&error))
}

/// The tensors of a file that was read, and their description.
///
/// # Errors
/// What is wrong with the bytes, if any of them is not what was written.
pub(super) fn parse<D: DeserializeOwned>(bytes: &[u8]) -> Result<(Tensors<'_>, D), String> {
    let mut described: Value = describe(bytes)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| text(&error))?;
    let written = described.as_object_mut().and_then(|entries| entries.remove(HASH));
    let views = tensors.tensors();
    let parts = views.iter().map(|(name, tensor)| (name.as_str(), tensor.shape(), tensor.data())).collect();
    if written != Some(hash_of(&described, parts).into()) {
        return Err("its SHA-256 is not that of what was written".to_owned());
    }
    let description = serde_json::from_value(described).map_err(|error| text(&error))?;
    Ok((Tensors(tensors), description))
}

fn text(error: &dyn std::error::Error) -> String {
    jit::one_line(&error.to_string())
}

fn hash_of(description: &Value, mut tensors: Vec<(&str, &[usize], &[u8])>) -> String {
    tensors.sort_unstable_by_key(|(name, ..)| *name);
    let mut hash = Sha256::new();
    hash.update(description.to_string().as_bytes());
    for (name, shape, bytes) in tensors {
        // No two files have the same text here.
        hash.update(format!("\0{name}\0{shape:?}\0").as_bytes());
        hash.update(bytes);
    }
    hash::hex(&hash.finalize())
}

/// Tensors of a file.
pub(super) struct Tensors<'a>(SafeTensors<'a>);

impl Tensors<'_> {
    /// The numbers of a tensor and its shape.
    pub(super) fn shaped<T: Number>(&self, name: &str) -> Result<(Vec<T>, Vec<usize>), String> {
        let tensor = self.0.tensor(name).map_err(|error| error.to_string())?;
        if tensor.dtype() != T::DTYPE {
            return Err(format!("expected {:?} elements in {name}, found {:?}", T::DTYPE, tensor.dtype()));
        }
        Ok((T::read(tensor.data()), tensor.shape().to_vec()))
    }

    /// The numbers of a tensor.
    pub(super) fn numbers<T: Number>(&self, name: &str) -> Result<Vec<T>, String> {
        self.shaped(name).map(|(numbers, _)| numbers)
    }
}
