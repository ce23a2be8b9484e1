//! Bits for each site under a budget: the least predicted noise that so many bits buy.
//!
//! Each site has so many elements and, for each width that it may have, a noise; noises of sites add up. What is minimised is
//! the multiple-choice knapsack, and it is solved exactly: `search` says how. Plain data; it refuses to know tensors, how noise
//! was predicted, and whether elements are those of weights or of activations.

mod search;

use crate::quantizer::Bits;

/// A site whose bits are to be chosen; one with a single width has its bits and counts all the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// Numbers that are stored at the chosen width.
    pub elements: u64,
    /// The widths that it may have, each once, at least one.
    pub widths: Vec<Width>,
}

/// A width that a site may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Width {
    /// Bits of each element.
    pub bits: Bits,
    /// What quantizing the site with so many bits adds to the squared error of the outputs; finite and not negative.
    pub noise: f64,
}

/// Bits for all sites.
#[derive(Debug, Clone, PartialEq)]
pub struct Allotment {
    /// In the order of the sites.
    pub bits: Vec<Bits>,
    /// Bits of all elements together.
    pub used: u64,
    /// Σ noise of all sites.
    pub noise: f64,
    /// No choice within the budget has less noise than this: equal to `noise`, but for rounding, unless so many choices are so
    /// nearly equal that not all of them could be looked at.
    pub least_noise: f64,
}

/// The same width for all sites that have a choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Uniform {
    /// The width.
    pub bits: Bits,
    /// Bits of all elements together.
    pub used: u64,
    /// Σ noise of all sites.
    pub noise: f64,
}

/// A budget that no choice meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected at least {least} bits, found {budget}")]
pub struct TooLittle {
    /// What the narrowest widths need.
    pub least: u64,
    /// What there is.
    pub budget: u64,
}

/// The bits that the narrowest widths of all sites need.
#[must_use]
pub fn least(sites: &[Site]) -> u64 {
    let narrowest = |site: &Site| site.widths.iter().map(|width| site.cost(width.bits)).min().unwrap_or_default();
    sites.iter().map(narrowest).sum()
}

/// The bits with the least noise among those that take no more than `budget` bits in all; of several the narrowest.
///
/// # Errors
/// A budget that the narrowest widths exceed.
pub fn allot(sites: &[Site], budget: u64) -> Result<Allotment, TooLittle> {
    let least = least(sites);
    if least > budget {
        return Err(TooLittle { least, budget });
    }
    let start = uniform(sites, budget).map(|best| best.bits);
    Ok(search::search(sites, budget, start))
}

/// The one width for all sites with a choice that has the least noise within `budget`; `None` if none is within it, or no width
/// is open to all of them.
#[must_use]
pub fn uniform(sites: &[Site], budget: u64) -> Option<Uniform> {
    let mut widths: Vec<Bits> = sites.iter().flat_map(|site| &site.widths).map(|width| width.bits).collect();
    widths.sort_unstable();
    widths.dedup();
    let all = widths.into_iter().filter_map(|bits| {
        let (mut used, mut noise) = (0, 0.0);
        for site in sites {
            let width = site.uniform(bits)?;
            used += site.cost(width.bits);
            noise += width.noise;
        }
        (used <= budget).then_some(Uniform { bits, used, noise })
    });
    all.min_by(|a, b| a.noise.total_cmp(&b.noise).then(a.used.cmp(&b.used)))
}

impl Site {
    /// Bits of all elements at this width.
    fn cost(&self, bits: Bits) -> u64 {
        self.elements.saturating_mul(bits.get().into())
    }

    /// What it has where all have this width.
    fn uniform(&self, bits: Bits) -> Option<&Width> {
        match self.widths.as_slice() {
            [only] => Some(only),
            several => several.iter().find(|width| width.bits == bits),
        }
    }
}

#[cfg(test)]
mod tests;
