//! Which layers each override selects, and what a site is told through them. It refuses to know what the settings mean.

use std::collections::BTreeSet;

use crate::config::{Error, LayerPattern, Located, OpName, Override, SiteOverride};
use crate::names;
use crate::sites::{Op, OpId, Sites};

/// Layers that a message names at most.
const LISTED_LAYERS: usize = 3;

/// What a site is to a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A weight of it.
    Weights,
    /// Its result.
    Activations,
    /// Something that it reads.
    Inputs,
}

/// An override and the layers that it selects.
pub(super) struct Selected<'a> {
    entry: &'a Override,
    ops: BTreeSet<OpId>,
}

/// What a site is told through one layer.
pub(super) struct Told<'a> {
    /// The layer.
    pub(super) layer: String,
    /// What the site is to it.
    pub(super) role: Role,
    /// By which overrides, in the order in which they apply.
    pub(super) by: Vec<Numbered<'a>>,
    /// The last of them.
    pub(super) last: Numbered<'a>,
}

/// A part of an override, and the number of that.
pub(super) type Numbered<'a> = (usize, &'a Located<SiteOverride>);

impl Role {
    fn of(self, entry: &Override) -> Option<&Located<SiteOverride>> {
        match self {
            Self::Weights => entry.weights.as_ref(),
            Self::Activations => entry.activations.as_ref(),
            Self::Inputs => entry.inputs.as_ref(),
        }
    }
}

/// The layers of each override.
///
/// # Errors
/// A pattern or op that fits no layer, an override that selects no layer, or none with a site of the kind that it sets.
pub(super) fn select<'a>(entries: &'a [Override], sites: &Sites) -> Result<Vec<Selected<'a>>, Error> {
    let select = |entry| {
        let ops = layers_of(entry, &sites.ops)?;
        check_roles(entry, &ops, sites)?;
        Ok(Selected { entry, ops })
    };
    entries.iter().map(select).collect()
}

/// What the overrides say of a site that is this to these layers; layers through which nothing is said are left out.
pub(super) fn told<'a>(
    selected: &[Selected<'a>],
    ops: &[Op],
    reaching: impl Iterator<Item = (OpId, Role)>,
) -> Vec<Told<'a>> {
    let told = reaching.filter_map(|(op, role)| {
        let selected = selected.iter().enumerate().filter(|(_, selected)| selected.ops.contains(&op));
        let by: Vec<_> = selected.filter_map(|(number, selected)| Some((number, role.of(selected.entry)?))).collect();
        let (layer, last) = (ops.get(op)?.name.clone(), by.last().copied()?);
        Some(Told { layer, role, by, last })
    });
    told.collect()
}

fn layers_of(entry: &Override, ops: &[Op]) -> Result<BTreeSet<OpId>, Error> {
    for pattern in entry.layers.iter().flatten() {
        if !ops.iter().any(|op| pattern.value.fits(&op.name)) {
            let hint = nearest_layer(&pattern.value, ops);
            let reason =
                format!("expected a layer of the model or a pattern of layers, found `{}`{hint}", pattern.value);
            return Err(pattern.at.error(&reason));
        }
    }
    for name in entry.ops.iter().flatten() {
        if !ops.iter().any(|op| name.value.names(&op.op)) {
            let hint = nearest_op(&name.value, ops);
            return Err(name.at.error(&format!("expected an op of the model, found `{}`{hint}", name.value)));
        }
    }
    let fits = |op: &Op| {
        let layers = entry.layers.as_ref();
        let names = entry.ops.as_ref();
        layers.is_none_or(|patterns| patterns.iter().any(|pattern| pattern.value.fits(&op.name)))
            && names.is_none_or(|names| names.iter().any(|name| name.value.names(&op.op)))
    };
    let selected: BTreeSet<OpId> = (0..).zip(ops).filter(|(_, op)| fits(op)).map(|(id, _)| id).collect();
    if selected.is_empty() {
        return Err(entry.at.error("expected a layer that `layers` and `ops` both select, found none"));
    }
    Ok(selected)
}

/// Advice about a pattern that fits nothing.
fn nearest_layer(pattern: &LayerPattern, ops: &[Op]) -> String {
    let inside = |op: &Op| op.name.strip_prefix(pattern.text()).is_some_and(|rest| rest.starts_with('.'));
    if ops.iter().any(inside) {
        return format!(", did you mean `{pattern}.**`?");
    }
    let hint = names::did_you_mean(pattern.text(), ops.iter().map(|op| op.name.as_str()));
    if hint.is_empty() { "; `tsquant inspect` lists layers and sites".to_owned() } else { hint }
}

fn nearest_op(name: &OpName, ops: &[Op]) -> String {
    let is_full = name.text().contains("::");
    let known: BTreeSet<&str> = ops.iter().map(|op| op.op.as_str()).collect();
    let shown = known.into_iter().map(|op| if is_full { op } else { op.strip_prefix("aten::").unwrap_or(op) });
    let shown: Vec<&str> = shown.collect();
    let hint = names::did_you_mean(name.text(), shown.iter().copied());
    if hint.is_empty() { format!("; it has {}", shown.join(", ")) } else { hint }
}

/// Each kind of site that the entry has settings for is there in the layers that it selects.
fn check_roles(entry: &Override, selected: &BTreeSet<OpId>, sites: &Sites) -> Result<(), Error> {
    let touches = |ops: &[OpId]| ops.iter().any(|op| selected.contains(op));
    let roles = [
        (Role::Weights, "a weight", sites.weights.iter().any(|site| touches(&site.users))),
        (Role::Activations, "a result", sites.activations.iter().any(|site| touches(&site.makers))),
        (Role::Inputs, "an input", sites.activations.iter().any(|site| touches(&site.readers))),
    ];
    for (role, what, found) in roles {
        if let (Some(typed), false) = (role.of(entry), found) {
            let layers: Vec<&Op> = selected.iter().filter_map(|&op| sites.ops.get(op)).collect();
            let listed: Vec<String> = layers.iter().take(LISTED_LAYERS).map(|op| format!("`{}`", op.name)).collect();
            let more = if layers.len() > LISTED_LAYERS { ", …" } else { "" };
            let why = layers.iter().find_map(|op| reason(sites, op, role)).unwrap_or_default();
            let layers = listed.join(", ");
            let reason =
                format!("expected layers with {what} that can be quantized, found none in {layers}{more}{why}");
            return Err(typed.at.error(&reason));
        }
    }
    Ok(())
}

/// Why the layer has no such site, where that is known.
fn reason(sites: &Sites, op: &Op, role: Role) -> Option<String> {
    let left = sites.left_float.iter().find(|left| {
        let part = left.name.strip_prefix(&op.name).and_then(|rest| rest.strip_prefix('.'));
        match role {
            Role::Weights => part.is_some_and(|part| !part.contains('.') && part != "output"),
            Role::Activations => part.is_some_and(|part| part == "output" || part.starts_with("output.")),
            Role::Inputs => false,
        }
    })?;
    Some(format!(" (`{}`: {})", left.name, left.reason))
}
