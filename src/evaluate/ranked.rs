//! Which of a model's outputs is ranked: the one whose largest value along the last axis is the model's answer.

use tch::Tensor;

use super::Error;
use crate::names;

/// The place among `tensors`, the outputs with their paths, of the one that `wanted` names by path or else by index from 0;
/// without a name the first of floating point.
pub(super) fn ranked(tensors: &[(String, &Tensor)], wanted: Option<&str>) -> Result<usize, Error> {
    let Some(wanted) = wanted else {
        return tensors.iter().position(|(_, tensor)| tensor.is_floating_point()).ok_or(Error::NoOutput);
    };
    let by_path = tensors.iter().position(|(path, _)| path == wanted);
    let index = by_path.or_else(|| wanted.parse().ok()).filter(|&index: &usize| index < tensors.len());
    let index = index.ok_or_else(|| unknown(tensors, wanted))?;
    match tensors.get(index) {
        Some((_, tensor)) if !tensor.is_floating_point() => {
            let found = format!("{:?}", tensor.kind()).to_lowercase();
            Err(Error::NotFloat { output: wanted.to_owned(), found })
        }
        _ => Ok(index),
    }
}

fn unknown(tensors: &[(String, &Tensor)], wanted: &str) -> Error {
    let name = |(index, (path, _)): (usize, &(String, &Tensor))| {
        if path.is_empty() { index.to_string() } else { path.clone() }
    };
    let names: Vec<_> = tensors.iter().enumerate().map(name).collect();
    let hint = names::did_you_mean(wanted, names.iter().map(String::as_str));
    let quoted: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    let known = if quoted.is_empty() { "none".to_owned() } else { quoted.join(", ") };
    Error::UnknownOutput { output: wanted.to_owned(), hint, known }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(names: &[&str], wanted: Option<&str>) -> Result<usize, String> {
        // Every name with an `i` in it is an output of integers.
        let tensors: Vec<_> = names
            .iter()
            .map(|name| if name.contains('i') { Tensor::from_slice(&[1i64]) } else { Tensor::from_slice(&[1f32]) })
            .collect();
        let tensors: Vec<_> = names.iter().map(|&name| name.to_owned()).zip(&tensors).collect();
        ranked(&tensors, wanted).map_err(|error| error.to_string())
    }

    #[test]
    fn the_first_of_floats_unless_named() {
        assert_eq!(find(&["ids", "logs", "z"], None), Ok(1));
        assert_eq!(find(&["ids", "logs", "z"], Some("z")), Ok(2));
        assert_eq!(find(&["ids", "logs", "z"], Some("2")), Ok(2));
        assert_eq!(find(&[""], Some("0")), Ok(0));
        // A path wins over an index.
        assert_eq!(find(&["0.0", "0.1", "1"], Some("1")), Ok(2));
        assert_eq!(find(&["0.0", "0.1", "1"], Some("0.1")), Ok(1));
    }

    #[test]
    fn names_that_lead_nowhere_are_refused() {
        assert_eq!(
            find(&["logits", "features"], Some("feature")).unwrap_err(),
            "the model has no output `feature`, did you mean `features`?; expected one of `logits`, `features`"
        );
        assert!(find(&["a", "b"], Some("2")).unwrap_err().ends_with("no output `2`; expected one of `a`, `b`"));
        assert!(find(&[""], Some("logits")).unwrap_err().ends_with("no output `logits`; expected one of `0`"));
        let error = find(&["ids", "b"], Some("ids")).unwrap_err();
        assert_eq!(error, "expected an output of floating-point numbers, found `ids` of int64");
        assert!(
            find(&["ids"], None).unwrap_err().contains("expected a floating-point tensor among the model's outputs")
        );
    }
}
