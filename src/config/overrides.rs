//! `overrides`: other settings for some layers, as typed and checked without a model.
//!
//! An entry keeps where it was typed, so that what only a model can show of it is told there. It refuses to know which layers
//! a model has.

mod keys;
mod pattern;

use super::document::Node;
use super::error::{Error, Place, Problem, printable};
use super::keys::{Method, OneOrMany};
use crate::quantizer::{Bits, Granularity, Grid};
use crate::threshold::{ErrorMethod, Exponent};

pub use pattern::{LayerPattern, OpName};

pub(super) use keys::OverrideKeys;
use keys::{ActivationKeys, RoleKeys, WeightKeys};

/// The overrides of a plan.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Overrides {
    /// In the order in which they apply.
    pub entries: Vec<Override>,
    /// The exponent where an entry asks for LP and none says which.
    pub exponent: Exponent,
}

/// One entry: which layers, and what is different there.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    /// All of the entry.
    pub at: At,
    /// Layers with a name that fits one of these; `None` are all.
    pub layers: Option<Vec<Located<LayerPattern>>>,
    /// Of those, the layers with one of these ops; `None` are all.
    pub ops: Option<Vec<Located<OpName>>>,
    /// For the weights of those layers.
    pub weights: Option<Located<SiteOverride>>,
    /// For the results of those layers.
    pub activations: Option<Located<SiteOverride>>,
    /// For what those layers read.
    pub inputs: Option<Located<SiteOverride>>,
}

/// What is different at some sites.
#[derive(Debug, Clone, PartialEq)]
pub enum SiteOverride {
    /// They stay float.
    Float,
    /// They are quantized with these settings.
    Set(Fields),
}

/// Settings of sites, those that are said.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Fields {
    /// Width.
    pub bits: Option<Bits>,
    /// Where the levels lie.
    pub grid: Option<Grid>,
    /// One threshold or one per output channel; activations have one.
    pub granularity: Option<Granularity>,
    /// How thresholds are chosen.
    pub error_method: Option<Method>,
    /// The exponent of LP.
    pub l_p_value: Option<Exponent>,
    /// Standard deviations beyond which activation values do not count; never said of weights.
    pub z_threshold: Option<f64>,
}

/// A value and where it was typed.
#[derive(Debug, Clone, PartialEq)]
pub struct Located<T> {
    /// What was typed.
    pub value: T,
    /// Where.
    pub at: At,
}

/// Where something was typed. All places are equal: two plans that say the same are the same plan.
#[derive(Debug, Clone)]
pub struct At {
    key: String,
    place: Place,
}

impl PartialEq for At {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl At {
    fn new(root: &Node, key: String) -> Self {
        Self { place: root.place_of(&key), key }
    }

    /// Full path of the key: `overrides[1].layers`.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// An error here: what was expected and what was found.
    #[must_use]
    pub fn error(&self, reason: &str) -> Error {
        self.place.error(Problem::Invalid { key: self.key.clone(), reason: printable(reason) })
    }
}

impl Fields {
    /// These with what `later` says put in place.
    #[must_use]
    pub fn with(self, later: Self) -> Self {
        Self {
            bits: later.bits.or(self.bits),
            grid: later.grid.or(self.grid),
            granularity: later.granularity.or(self.granularity),
            error_method: later.error_method.or(self.error_method),
            l_p_value: later.l_p_value.or(self.l_p_value),
            z_threshold: later.z_threshold.or(self.z_threshold),
        }
    }

    /// The error method: as said, or else `base`. `exponent` is that of LP where nothing is said of it.
    #[must_use]
    pub fn method(self, base: ErrorMethod, exponent: Exponent) -> ErrorMethod {
        let method = self.error_method.unwrap_or_else(|| base.into());
        method.with_exponent(self.l_p_value.or(base.exponent()).unwrap_or(exponent))
    }
}

impl Overrides {
    /// Whether an entry asks for this error method.
    pub(super) fn ask_for(&self, method: Method) -> bool {
        let roles = self.entries.iter().flat_map(|entry| [&entry.weights, &entry.activations, &entry.inputs]);
        roles
            .flatten()
            .any(|role| matches!(&role.value, SiteOverride::Set(fields) if fields.error_method == Some(method)))
    }

    /// Checks what was typed; `root` is the tree that it was read from.
    ///
    /// # Errors
    /// An entry that selects nothing or says nothing, and combinations that are impossible whatever the model is.
    pub(super) fn resolve(root: &Node, typed: Vec<OverrideKeys>, exponent: Exponent) -> Result<Self, Error> {
        let entries = typed.into_iter().enumerate();
        let entries = entries.map(|(index, keys)| entry(root, &format!("overrides[{index}]"), keys));
        let overrides = Self { entries: entries.collect::<Result<_, _>>()?, exponent };
        // It matters which LP is meant where an entry asks for it.
        Ok(if overrides.ask_for(Method::Lp) { overrides } else { Self { exponent: Exponent::default(), ..overrides } })
    }
}

fn entry(root: &Node, key: &str, typed: OverrideKeys) -> Result<Override, Error> {
    let at = At::new(root, key.to_owned());
    let OverrideKeys { layers, ops, weights, activations, inputs } = typed;
    if layers.is_none() && ops.is_none() {
        return Err(at.error("expected `layers` or `ops` to select by, found neither"));
    }
    if weights.is_none() && activations.is_none() && inputs.is_none() {
        return Err(at.error("expected settings under `weights`, `activations` or `inputs`, found none"));
    }
    let list = |name: &str, names: Option<OneOrMany<String>>, expected: &str| {
        names.map(|names| typed_names(root, &format!("{key}.{name}"), names, expected)).transpose()
    };
    let layers = list("layers", layers, "a pattern of layer names")?;
    let ops = list("ops", ops, "the name of an op")?;
    let activation = |name: &str, keys: Option<RoleKeys<ActivationKeys>>| {
        let fields = |keys: RoleKeys<ActivationKeys>| checked(At::new(root, format!("{key}.{name}")), keys);
        let typed = keys.map(fields).transpose()?;
        let fields = typed.as_ref().map(|typed| &typed.value);
        if matches!(fields, Some(SiteOverride::Set(Fields { granularity: Some(Granularity::PerChannel), .. }))) {
            let reason = "activations are quantized per tensor, expected `per_tensor`, found `per_channel`";
            return Err(At::new(root, format!("{key}.{name}.granularity")).error(reason));
        }
        Ok(typed)
    };
    Ok(Override {
        layers: layers.map(|names| names.into_iter().map(|name| name.map(|text| LayerPattern::new(&text))).collect()),
        ops: ops.map(|names| names.into_iter().map(|name| name.map(OpName::new)).collect()),
        weights: weights.map(|keys| checked(At::new(root, format!("{key}.weights")), keys)).transpose()?,
        activations: activation("activations", activations)?,
        inputs: activation("inputs", inputs)?,
        at,
    })
}

impl<T> Located<T> {
    fn map<U>(self, change: impl FnOnce(T) -> U) -> Located<U> {
        Located { value: change(self.value), at: self.at }
    }
}

fn typed_names(
    root: &Node,
    key: &str,
    names: OneOrMany<String>,
    expected: &str,
) -> Result<Vec<Located<String>>, Error> {
    let (names, is_list) = match names {
        OneOrMany::One(name) => (vec![name], false),
        OneOrMany::Many(names) => (names, true),
    };
    if names.is_empty() {
        return Err(At::new(root, key.to_owned()).error(&format!("expected {expected}, found an empty list")));
    }
    let typed = names.into_iter().enumerate().map(|(index, value)| {
        let at = At::new(root, if is_list { format!("{key}[{index}]") } else { key.to_owned() });
        if value.is_empty() {
            return Err(at.error(&format!("expected {expected}, found an empty text")));
        }
        Ok(Located { value, at })
    });
    typed.collect()
}

fn checked<K: Into<Fields>>(at: At, keys: RoleKeys<K>) -> Result<Located<SiteOverride>, Error> {
    let fields: Fields = match keys {
        RoleKeys::Float => return Ok(Located { value: SiteOverride::Float, at }),
        RoleKeys::Set(keys) => keys.into(),
    };
    if fields == Fields::default() {
        return Err(at.error("expected `float` or a map with at least one setting, found an empty map"));
    }
    let most = ErrorMethod::KL_MAX_BITS;
    match (fields.error_method, fields.bits) {
        (Some(Method::Kl), Some(bits)) if bits.get() > most => {
            Err(at.error(&format!("KL chooses for at most {most} bits, found {bits}")))
        }
        _ => Ok(Located { value: SiteOverride::Set(fields), at }),
    }
}

impl From<WeightKeys> for Fields {
    fn from(keys: WeightKeys) -> Self {
        let WeightKeys { bits, grid, granularity, error_method, l_p_value } = keys;
        Self { bits, grid, granularity, error_method, l_p_value: l_p_value.map(|p| p.0), z_threshold: None }
    }
}

impl From<ActivationKeys> for Fields {
    fn from(keys: ActivationKeys) -> Self {
        let ActivationKeys { bits, grid, granularity, error_method, l_p_value, z_threshold } = keys;
        let (l_p_value, z_threshold) = (l_p_value.map(|p| p.0), z_threshold.map(|z| z.0));
        Self { bits, grid, granularity, error_method, l_p_value, z_threshold }
    }
}

#[cfg(test)]
mod tests;
