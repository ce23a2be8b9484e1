//! Arrays in NumPy's `.npy` format: the header is parsed here, the data stays where it is.
//!
//! The format: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>. A parser of our own, because a
//! damaged header must be an error, and the crates for it overflow on shapes that multiply beyond 64 bits.

use std::os::unix::fs::FileExt;

use super::array::{Array, Extent};
use super::dtype::{Dtype, INPUT_DTYPES};
use super::error::{Error, Place, one_line};

/// What each `.npy` begins with.
pub(super) const MAGIC: &[u8] = b"\x93NUMPY";
/// NumPy itself refuses headers above 10 000 bytes unless told otherwise.
const MAX_HEADER_BYTES: u64 = 1 << 20;

/// The array whose `.npy` bytes, header first, are `bytes`.
///
/// # Errors
/// A damaged header, an element type that is not supported, big-endian or Fortran order, a length that does not fit.
pub(super) fn array(place: Place, bytes: Extent) -> Result<Array, Error> {
    let (text, data_start) = header_text(&place, &bytes)?;
    let Some(header) = Header::parse(&text) else {
        let expected = "a .npy header with `descr`, `fortran_order` and `shape`";
        return Err(Error::tensor(&place, expected, one_line(text.trim())));
    };
    let dtype = element_type(&place, header.descr)?;
    if header.fortran_order {
        let expected = "C order (save `numpy.ascontiguousarray(a)` again)";
        return Err(Error::tensor(&place, expected, "Fortran order"));
    }
    let data = Extent { start: bytes.start + data_start, length: bytes.length - data_start, file: bytes.file };
    Array::new(place, dtype, header.shape, data)
}

/// The header's dictionary and the offset of the data that follows it, which is at most the extent's length.
fn header_text(place: &Place, bytes: &Extent) -> Result<(String, u64), Error> {
    let mut head = [0u8; 12];
    // Ten bytes suffice for version 1; the shortest dictionary is longer than two.
    if bytes.length < head.len() as u64 {
        return Err(Error::tensor(place, "a .npy array", format!("{} bytes", bytes.length)));
    }
    bytes.file.read_exact_at(&mut head, bytes.start).map_err(Error::io(&place.path))?;
    if !head.starts_with(MAGIC) {
        return Err(Error::tensor(place, "a .npy array", "bytes that do not begin like one"));
    }
    let [.., major, _minor, a, b, c, d] = head;
    let (text_start, length) = match major {
        1 => (10, u64::from(u16::from_le_bytes([a, b]))),
        2 | 3 => (12, u64::from(u32::from_le_bytes([a, b, c, d]))),
        _ => return Err(Error::tensor(place, "a .npy array of version 1, 2 or 3", format!("version {major}"))),
    };
    let room = bytes.length.saturating_sub(text_start).min(MAX_HEADER_BYTES);
    if length > room {
        let expected = format!("a .npy header of at most {room} bytes");
        return Err(Error::tensor(place, expected, format!("{length}: it is damaged or truncated")));
    }
    let mut text = vec![0; length as usize];
    bytes.file.read_exact_at(&mut text, bytes.start + text_start).map_err(Error::io(&place.path))?;
    Ok((String::from_utf8_lossy(&text).into_owned(), text_start + length))
}

fn element_type(place: &Place, descr: &str) -> Result<Dtype, Error> {
    let dtype = match descr.get(1..).unwrap_or_default() {
        "b1" => Some(Dtype::Bool),
        "u1" => Some(Dtype::U8),
        "i1" => Some(Dtype::I8),
        "u2" => Some(Dtype::U16),
        "i2" => Some(Dtype::I16),
        "u4" => Some(Dtype::U32),
        "i4" => Some(Dtype::I32),
        "u8" => Some(Dtype::U64),
        "i8" => Some(Dtype::I64),
        "f2" => Some(Dtype::F16),
        "f4" => Some(Dtype::F32),
        "f8" => Some(Dtype::F64),
        _ => None,
    };
    match (descr.chars().next(), dtype) {
        (Some('>'), Some(dtype)) if dtype.size() > 1 => {
            let expected = "little-endian elements (save `a.astype(a.dtype.newbyteorder('<'))` again)";
            Err(Error::tensor(place, expected, format!("big-endian {}", dtype.name())))
        }
        (Some('<' | '|' | '>'), Some(dtype)) => Ok(dtype),
        _ => Err(Error::tensor(place, INPUT_DTYPES, format!("the NumPy type `{}`", one_line(descr)))),
    }
}

/// The dictionary of a `.npy` header.
#[derive(Debug, PartialEq)]
struct Header<'a> {
    descr: &'a str,
    fortran_order: bool,
    shape: Vec<usize>,
}

impl<'a> Header<'a> {
    /// Python's literal of a dictionary with three keys, in any order.
    fn parse(text: &'a str) -> Option<Self> {
        let mut cursor = Cursor { rest: text };
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        cursor.eat('{')?;
        while cursor.eat('}').is_none() {
            let key = cursor.string()?;
            cursor.eat(':')?;
            match key {
                "descr" => descr = Some(cursor.string().or_else(|| cursor.structured())?),
                "fortran_order" => fortran_order = Some(cursor.boolean()?),
                "shape" => shape = Some(cursor.tuple()?),
                _ => return None,
            }
            // The comma may be missing after the last entry only.
            if cursor.eat(',').is_none() && !cursor.rest.trim_start().starts_with('}') {
                return None;
            }
        }
        cursor.rest.trim().is_empty().then_some(())?;
        Some(Self { descr: descr?, fortran_order: fortran_order?, shape: shape? })
    }
}

/// What is left of a header. Every method takes its token from the front, or leaves the text and returns `None`.
struct Cursor<'a> {
    rest: &'a str,
}

impl<'a> Cursor<'a> {
    fn eat(&mut self, token: char) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn string(&mut self) -> Option<&'a str> {
        let text = self.rest.trim_start();
        let quote = text.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
        let (string, rest) = text.strip_prefix(quote)?.split_once(quote)?;
        self.rest = rest;
        Some(string)
    }

    /// A list of fields, as far as its last bracket: a type of its own, shown in an error.
    fn structured(&mut self) -> Option<&'a str> {
        let text = self.rest.trim_start();
        let end = text.rfind(']')?;
        text.starts_with('[').then_some(())?;
        let (list, rest) = text.split_at_checked(end + 1)?;
        self.rest = rest;
        Some(list)
    }

    fn boolean(&mut self) -> Option<bool> {
        let text = self.rest.trim_start();
        let (value, rest) = match text.strip_prefix("True") {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix("False")?),
        };
        self.rest = rest;
        Some(value)
    }

    /// `(3, 4)`, `(3,)` or `()`; Python 2 wrote `(3L,)`.
    fn tuple(&mut self) -> Option<Vec<usize>> {
        let (inner, rest) = self.rest.trim_start().strip_prefix('(')?.split_once(')')?;
        self.rest = rest;
        let inner = inner.trim();
        let inner = inner.strip_suffix(',').unwrap_or(inner);
        if inner.is_empty() {
            return Some(Vec::new());
        }
        inner.split(',').map(|axis| axis.trim().trim_end_matches('L').parse().ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_as_numpy_writes_them() {
        let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }          \n";
        let header = Header { descr: "<f4", fortran_order: false, shape: vec![3, 4] };
        assert_eq!(Header::parse(text), Some(header));
        let text = "{\"shape\": (3L,),'fortran_order':True,'descr':'|u1'}";
        assert_eq!(Header::parse(text), Some(Header { descr: "|u1", fortran_order: true, shape: vec![3] }));
        let text = "{'descr': [('a', '<i4'), ('b', '<f4')], 'fortran_order': False, 'shape': (), }";
        assert_eq!(Header::parse(text).map(|header| header.descr), Some("[('a', '<i4'), ('b', '<f4')]"));
    }

    #[test]
    fn damaged_headers_are_refused() {
        for text in [
            "",
            "{",
            "{}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (3, -4), }",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (,), } x",
            "{'descr': '<f4' 'fortran_order': False, 'shape': (3,), }",
            "{'descr': '<f4', 'fortran_order': 0, 'shape': (3,), }",
            "{'descr': '<f4', 'shape': (3,), }",
        ] {
            assert_eq!(Header::parse(text), None, "{text}");
        }
    }
}
