//! What the overrides say of one site, laid over what the plan says of all: later ones win field by field, and layers that
//! share the site have to agree.

use super::select::{Numbered, Role, Told};
use super::{Settled, SiteSettings, WeightNeeds};
use crate::config::{BudgetPlan, Error, Fields, Located, Plan, SiteOverride};
use crate::quantizer::{Granularity, Grid, Scheme};
use crate::threshold::{ErrorMethod, Exponent};

/// Settings of all weights or of all activations, to lay others over.
pub(super) struct Merger {
    all: SiteSettings,
    /// Of weights whose kernels take any.
    granularity: Granularity,
    /// What kernels need of weights.
    needs: WeightNeeds,
    /// The exponent of LP where an override asks for LP and none says which.
    exponent: Exponent,
    /// Keys of bits and error method of all.
    keys: [&'static str; 2],
}

/// A setting of a site.
struct Field {
    is_said: fn(&Fields) -> bool,
    show: fn(&SiteSettings) -> String,
}

const FIELDS: [Field; 5] = [
    Field { is_said: |fields| fields.bits.is_some(), show: bits },
    Field { is_said: |fields| fields.grid.is_some(), show: |site| format!("grid {}", grid(site.scheme.grid)) },
    Field { is_said: |fields| fields.granularity.is_some(), show: |site| granularity(site.granularity).to_owned() },
    Field {
        is_said: |fields| fields.error_method.is_some() || fields.l_p_value.is_some(),
        show: |site| match site.error_method {
            ErrorMethod::Lp { p } => format!("error method LP with l_p_value {}", p.get()),
            method => format!("error method {method}"),
        },
    },
    Field {
        is_said: |fields| fields.z_threshold.is_some(),
        show: |site| site.z_threshold.map_or_else(|| "no z_threshold".to_owned(), |z| format!("z_threshold {z}")),
    },
];

impl Merger {
    pub(super) fn of_weights(plan: &Plan, needs: WeightNeeds) -> Self {
        let all = &plan.weights;
        let budget = plan.mixed_precision.as_ref().and_then(|mixed| mixed.weights.as_ref());
        let mut merger = Self {
            granularity: all.granularity,
            needs,
            all: SiteSettings {
                scheme: widest(all.scheme, budget),
                free: budget.map(|budget| budget.widths),
                granularity: all.granularity,
                error_method: all.error_method,
                z_threshold: None,
                taps: needs.taps,
            },
            exponent: plan.overrides.exponent,
            keys: [
                if budget.is_some() { "mixed_precision.weights.bits" } else { "quantization.weights.bits" },
                "quantization.weights_error_method",
            ],
        };
        merger.all.granularity = merger.granularity_of(&merger.all);
        merger
    }

    /// Where no override says it.
    fn granularity_of(&self, settings: &SiteSettings) -> Granularity {
        let may_run = settings.scheme.grid != Grid::Uniform && settings.widths().any(|bits| bits.get() == 8);
        if self.needs.per_tensor && may_run { Granularity::PerTensor } else { self.granularity }
    }

    /// With 7 bits in place of 8 where that is asked for.
    pub(super) fn of_activations(plan: &Plan, has_7_bits: bool) -> Self {
        let all = &plan.activations;
        let budget = plan.mixed_precision.as_ref().and_then(|mixed| mixed.activations.as_ref());
        Self {
            granularity: Granularity::PerTensor,
            needs: WeightNeeds::default(),
            all: SiteSettings {
                scheme: match budget {
                    None if has_7_bits => reduced(all.scheme),
                    budget => widest(all.scheme, budget),
                },
                free: budget.map(|budget| budget.widths),
                granularity: Granularity::PerTensor,
                error_method: all.error_method,
                z_threshold: all.z_threshold,
                taps: None,
            },
            exponent: plan.overrides.exponent,
            keys: [
                if budget.is_some() { "mixed_precision.activations.bits" } else { "quantization.activations.bits" },
                "quantization.activation_error_method",
            ],
        }
    }

    /// What is settled about `site`, told this through each layer that reaches it.
    ///
    /// # Errors
    /// Layers that are told different things, and a method that cannot choose for so many bits.
    pub(super) fn settle<'a>(&self, site: &str, told: &[Told<'a>]) -> Result<Settled<'a>, Error> {
        let mut settled: Option<(&Told<'a>, Settled<'a>)> = None;
        for other in told {
            let found = self.merge(site, other)?;
            match settled {
                None => settled = Some((other, found)),
                Some((first, expected)) if !agree(&expected, &found) => {
                    return Err(disagreement(site, (first, &expected), (other, &found)));
                }
                Some(_) => {}
            }
        }
        Ok(settled.map_or(Settled::Quantized(self.all), |(_, settled)| settled))
    }

    fn merge<'a>(&self, site: &str, told: &Told<'a>) -> Result<Settled<'a>, Error> {
        let mut fields = Fields::default();
        let mut float = None;
        for (_, typed) in &told.by {
            match typed.value {
                SiteOverride::Float => float = Some(&typed.at),
                SiteOverride::Set(later) => {
                    fields = fields.with(later);
                    float = None;
                }
            }
        }
        if let Some(at) = float {
            return Ok(Settled::Float(at));
        }
        let mut settings = self.all;
        if let Some(bits) = fields.bits {
            settings = settings.with_bits(bits);
        }
        settings.scheme.grid = fields.grid.unwrap_or(settings.scheme.grid);
        settings.granularity = fields.granularity.unwrap_or_else(|| self.granularity_of(&settings));
        settings.error_method = fields.method(settings.error_method, self.exponent);
        settings.z_threshold = fields.z_threshold.or(settings.z_threshold);
        self.check_bits(site, told, settings)?;
        Ok(Settled::Quantized(settings))
    }

    fn check_bits(&self, site: &str, told: &Told<'_>, settings: SiteSettings) -> Result<(), Error> {
        let (most, found) = (ErrorMethod::KL_MAX_BITS, settings.scheme.bits.get());
        if settings.error_method != ErrorMethod::Kl || found <= most {
            return Ok(());
        }
        let bits = last_that(told, |fields| fields.bits.is_some());
        let method = last_that(told, |fields| fields.error_method.is_some());
        let key = |by: Option<Numbered<'_>>, field: &str, all: &str| {
            by.map_or_else(|| all.to_owned(), |(_, typed)| format!("{}.{field}", typed.at.key()))
        };
        let [all_bits, all_methods] = self.keys;
        let (from, method_from) = (key(bits, "bits", all_bits), key(method, "error_method", all_methods));
        let reason = format!(
            "KL of `{method_from}` chooses for at most {most} bits, found {found} in `{from}`, for the site `{site}`"
        );
        let later = [bits, method].into_iter().flatten().max_by_key(|(number, _)| *number);
        let (_, typed) = later.unwrap_or(told.last);
        Err(typed.at.error(&reason))
    }
}

/// The widest of the widths that a budget is for.
fn widest(scheme: Scheme, budget: Option<&BudgetPlan>) -> Scheme {
    budget.map_or(scheme, |budget| Scheme { bits: budget.widths.widest(), ..scheme })
}

/// With 7 bits in place of 8.
fn reduced(scheme: Scheme) -> Scheme {
    let bits = if scheme.bits.get() == 8 { scheme.bits.narrower() } else { scheme.bits };
    Scheme { bits, ..scheme }
}

/// Two ways to leave a site float are one.
fn agree(a: &Settled<'_>, b: &Settled<'_>) -> bool {
    match (a, b) {
        (Settled::Float(_), Settled::Float(_)) => true,
        (Settled::Quantized(a), Settled::Quantized(b)) => a == b,
        _ => false,
    }
}

/// The last override that says something of this kind.
fn last_that<'a>(told: &Told<'a>, says: impl Fn(&Fields) -> bool) -> Option<Numbered<'a>> {
    let says = |typed: &Located<SiteOverride>| matches!(&typed.value, SiteOverride::Set(fields) if says(fields));
    told.by.iter().rev().copied().find(|(_, typed)| says(typed))
}

fn disagreement(site: &str, a: (&Told<'_>, &Settled<'_>), b: (&Told<'_>, &Settled<'_>)) -> Error {
    let field = match (a.1, b.1) {
        (Settled::Quantized(a), Settled::Quantized(b)) => {
            FIELDS.iter().find(|field| (field.show)(a) != (field.show)(b)).or(FIELDS.first())
        }
        _ => FIELDS.first(),
    };
    let (mut earlier, mut later) = (side(a, field), side(b, field));
    if earlier.0.0 > later.0.0 {
        std::mem::swap(&mut earlier, &mut later);
    }
    let (((_, earlier), expected), ((_, later), found)) = (earlier, later);
    let key = earlier.at.key();
    later.at.error(&format!("expected what `{key}` says of the site `{site}` ({expected}), found {found}"))
}

/// Who says what of the site: the override to blame, and its words with the layer.
fn side<'a>((told, settled): (&Told<'a>, &Settled<'_>), field: Option<&Field>) -> (Numbered<'a>, String) {
    let (by, shown) = match (settled, field) {
        (Settled::Quantized(settings), Some(field)) => (last_that(told, field.is_said), (field.show)(settings)),
        _ => (None, "float".to_owned()),
    };
    let role = match told.role {
        Role::Weights => "a weight of",
        Role::Activations => "a result of",
        Role::Inputs => "an input of",
    };
    (by.unwrap_or(told.last), format!("{shown} as {role} `{}`", told.layer))
}

fn bits(site: &SiteSettings) -> String {
    match site.free {
        Some(_) => "the bits of `mixed_precision`".to_owned(),
        None => format!("{} bits", site.scheme.bits),
    }
}

fn grid(grid: Grid) -> &'static str {
    match grid {
        Grid::Symmetric => "symmetric",
        Grid::Uniform => "uniform",
        Grid::PowerOfTwo => "power_of_two",
    }
}

fn granularity(granularity: Granularity) -> &'static str {
    match granularity {
        Granularity::PerTensor => "per_tensor",
        Granularity::PerChannel => "per_channel",
    }
}
