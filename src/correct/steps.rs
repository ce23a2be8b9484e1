//! Which ops are rounded and corrected one after the other, and why others are not.

use super::LeftOut;
use super::targets::{Form, OldBias, Reading, Target, Targets};
use crate::config::{BiasCorrection, Rounding};
use crate::jit::{Listing, Node, ValueId};
use crate::sites::Sites;

/// The largest Hessian that is summed up, in bytes; some six of them are in memory while it is inverted.
pub const MOST_HESSIAN_BYTES: u64 = 1 << 28;

/// Numbers of a batch whose squared gradients are kept for one op: for a mean of each channel, and for products of features.
const SEEN: [i64; 2] = [1 << 16, 1 << 17];

/// What is done to weights and biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// How weights are rounded.
    pub rounding: Rounding,
    /// How biases are corrected.
    pub correction: BiasCorrection,
}

impl Asked {
    /// Whether ops have to wait for those before them.
    #[must_use]
    pub fn is_in_sequence(self) -> bool {
        self.rounding == Rounding::Gptq || self.correction == BiasCorrection::Weighted
    }
}

/// Ops in graph order with what is done at each.
#[derive(Debug, Default)]
pub struct Steps {
    pub(super) steps: Vec<Step>,
    /// Ops whose weights are rounded to nearest though more was asked for.
    pub not_rounded: Vec<LeftOut>,
    /// Ops whose biases are not corrected.
    pub not_corrected: Vec<LeftOut>,
    /// Layers whose Hessians are too large, with their bytes.
    pub too_large: Vec<(LeftOut, u64)>,
}

/// What is done at one op.
#[derive(Debug, Clone)]
pub(super) struct Step {
    pub(super) target: Target,
    pub(super) reading: Reading,
    /// Its weights are rounded.
    pub(super) rounds: bool,
    /// Its bias is corrected.
    pub(super) corrects: bool,
    /// What it should give is the product of its float weight and the float model's input, not the float model's result:
    /// that has other terms.
    pub(super) has_other_terms: bool,
    /// The clamp behind it.
    pub(super) clamp: Option<Clamp>,
    hessian_bytes: u64,
}

/// A clamp that alone reads the result of an op.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Clamp {
    /// What it makes of it.
    pub(super) value: ValueId,
    /// Its lower bound and its upper one.
    pub(super) bounds: [f64; 2],
}

impl Clamp {
    fn behind(listing: &Listing, result: ValueId) -> Option<Self> {
        let mut readers = listing.nodes.iter().filter(|node| node.inputs.contains(&result));
        let (Some(reader), None) = (readers.next(), readers.next()) else { return None };
        let is_returned = listing.blocks.iter().any(|block| block.returns.contains(&result));
        let (&[value], bounds) = (reader.outputs.as_slice(), listing.clamp(reader)?) else { return None };
        (!is_returned && reader.inputs.first() == Some(&result)).then_some(Self { value, bounds })
    }
}

impl Steps {
    /// Looks at every target.
    #[must_use]
    pub fn find(listing: &Listing, sites: &Sites, targets: &Targets, asked: Asked) -> Self {
        let mut steps = Self::default();
        if !asked.is_in_sequence() {
            return steps;
        }
        let corrects = asked.correction != BiasCorrection::None;
        for left in &targets.left_out {
            if asked.rounding == Rounding::Gptq {
                let is_recurrent = RECURRENT.contains(&left.op.as_str());
                let reason = if is_recurrent { INNER_STATES.to_owned() } else { left.reason.clone() };
                steps.not_rounded.push(LeftOut { reason, ..left.clone() });
            }
            if corrects {
                steps.not_corrected.push(left.clone());
            }
        }
        let known = targets.ops.iter().filter_map(|target| {
            let reading = targets.inputs.get(target.input)?.reading.clone();
            let has_other_terms = !corrects || target.op == "aten::addmm";
            // Whose own terms are not all known: what comes through the clamp is not either.
            let clamp = if has_other_terms { None } else { Clamp::behind(listing, target.result) };
            let (target, rounds) = (target.clone(), false);
            Some(Step { target, reading, rounds, corrects, has_other_terms, clamp, hessian_bytes: 0 })
        });
        let recurrent = if asked.rounding == Rounding::Gptq { recurrent(listing, sites) } else { Vec::new() };
        let all = known.chain(recurrent).filter_map(|step| Some((node_of(listing, &step.target)?, step)));
        let mut all: Vec<(usize, Step)> = all.collect();
        all.sort_by_key(|(node, _)| *node);
        for (node, step) in all {
            let step = steps.settled(step, &listing.nodes[node], (listing, sites), asked);
            if step.rounds || step.corrects {
                steps.steps.push(step);
            }
        }
        steps
    }

    /// What is really done at an op; why less than was asked for is noted.
    fn settled(&mut self, mut step: Step, node: &Node, (listing, sites): (&Listing, &Sites), asked: Asked) -> Step {
        let is_repeated = is_in_loop(listing, node);
        if asked.rounding == Rounding::Gptq {
            step.hessian_bytes = hessian_bytes(&step.target, sites);
            let reason = why_nearest(listing, sites, &step);
            match reason.or(is_repeated.then_some(IN_LOOP)) {
                Some(reason) => self.not_rounded.push(step.target.left_out(reason)),
                None if step.hessian_bytes > MOST_HESSIAN_BYTES => {
                    let left = step.target.left_out("its Hessian would be too large");
                    self.too_large.push((left, step.hessian_bytes));
                }
                None => step.rounds = true,
            }
        }
        if asked.correction == BiasCorrection::Weighted && step.corrects && is_repeated {
            self.not_corrected.push(step.target.left_out(IN_LOOP));
            step.corrects = false;
        }
        step
    }

    /// Leaves weights rounded to nearest after all.
    pub fn keep_nearest(&mut self, is_kept: impl Fn(usize) -> bool, reason: &str) {
        for step in self.steps.iter_mut().filter(|step| step.rounds && is_kept(step.target.weight)) {
            step.rounds = false;
            self.not_rounded.push(step.target.left_out(reason));
        }
        self.steps.retain(|step| step.rounds || step.corrects);
    }

    /// All weights that would not be, if none were rounded but to nearest for this reason.
    #[must_use]
    pub fn all_nearest(&self, reason: &str) -> Vec<LeftOut> {
        let rounded = self.steps.iter().filter(|step| step.rounds);
        rounded.map(|step| step.target.left_out(reason)).chain(self.not_rounded.iter().cloned()).collect()
    }

    /// Weights that are rounded.
    #[must_use]
    pub fn rounded(&self) -> usize {
        self.steps.iter().filter(|step| step.rounds).count()
    }

    /// Ops whose biases are corrected.
    #[must_use]
    pub fn corrected(&self) -> usize {
        self.steps.iter().filter(|step| step.corrects).count()
    }

    /// Bytes of the largest Hessian that is summed up.
    #[must_use]
    pub fn largest_hessian(&self) -> u64 {
        self.steps.iter().filter(|step| step.rounds).map(|step| step.hessian_bytes).max().unwrap_or(0)
    }

    /// Elements of the largest weight that is rounded.
    #[must_use]
    pub fn largest_weight(&self, sites: &Sites) -> u64 {
        let rounded = self.steps.iter().filter(|step| step.rounds);
        rounded.map(|step| elements(sites, &step.target)).max().unwrap_or(0)
    }

    /// Numbers of a batch whose squared gradients are kept for one op.
    pub(super) fn seen(&self) -> i64 {
        SEEN[usize::from(self.rounded() > 0)]
    }

    /// The most that the squared gradients of so many batches take.
    #[must_use]
    pub fn squares_bytes(&self, batches: usize) -> u64 {
        // bfloat16.
        (self.steps.len() * batches) as u64 * self.seen().unsigned_abs() * 2
    }

    /// How many ops are looked at one after the other.
    #[must_use]
    pub fn count(&self) -> usize {
        self.steps.len()
    }
}

const INNER_STATES: &str = "its weights but `weight_ih` of the first layer read inner states, which are not observed";
const IN_LOOP: &str = "it runs in a loop: what it reads depends on its own results";

fn is_in_loop(listing: &Listing, node: &Node) -> bool {
    let mut block = node.block;
    while let Some(owner) = listing.blocks.get(block).and_then(|block| listing.nodes.get(block.owner?)) {
        if owner.op == "prim::Loop" {
            return true;
        }
        block = owner.block;
    }
    false
}

fn node_of(listing: &Listing, target: &Target) -> Option<usize> {
    listing.nodes.iter().position(|node| node.outputs.contains(&target.result))
}

/// Why the weights of an op stay rounded to nearest.
fn why_nearest(listing: &Listing, sites: &Sites, step: &Step) -> Option<&'static str> {
    if matches!(&step.reading, Reading::Positions(axes) if axes.iter().any(|axis| axis.transposed.is_some())) {
        return Some("a transposed convolution: which weights meet differs from place to place");
    }
    let site = sites.weights.get(step.target.weight)?;
    let readers = listing.nodes.iter().flat_map(|node| &node.inputs).filter(|value| site.values.contains(value));
    (readers.count() > 1).then_some("several ops read its weight")
}

/// The weights of recurrent layers that read what the layer reads, and not its inner states: `weight_ih` of the first layer, in
/// one direction or two.
fn recurrent(listing: &Listing, sites: &Sites) -> Vec<Step> {
    let mut steps = Vec::new();
    for layer in &sites.layers {
        let Some(node) = listing.nodes.get(layer.node).filter(|node| RECURRENT.contains(&node.op.as_str())) else {
            continue;
        };
        let maker = |value: &ValueId| listing.nodes.iter().find(|maker| maker.outputs.contains(value));
        let lists = node.inputs.iter().enumerate();
        let mut lists = lists.filter_map(|(slot, value)| {
            let maker = maker(value).filter(|maker| maker.op == "prim::ListConstruct")?;
            let is_weight = |value: &ValueId| site_of(sites, *value).is_some();
            maker.inputs.iter().any(is_weight).then_some((slot, maker))
        });
        let (Some((slot, list)), Some(&result)) = (lists.next(), node.outputs.first()) else { continue };
        let text = |behind: usize| {
            let value = listing.values.get(*node.inputs.get(slot + behind)?)?;
            Some(value.constant.as_ref()?.text.as_str())
        };
        let number = |behind: usize| text(behind)?.parse::<usize>().ok();
        // Behind the list: has_biases, num_layers, dropout, train, bidirectional.
        let Some(is_bidirectional) = text(5).map(|text| text == "True" || text == "1") else { continue };
        // With projections there is one tensor more in each layer and direction.
        let directions = 1 + usize::from(is_bidirectional);
        let Some(stride) = number(2).and_then(|layers| list.inputs.len().checked_div(layers * directions)) else {
            continue;
        };
        for place in [0, stride].into_iter().take(directions) {
            let Some(weight) = list.inputs.get(place).and_then(|value| site_of(sites, *value)) else { continue };
            let target = Target {
                layer: layer.name.clone(),
                op: layer.op.clone(),
                result,
                slot: 0,
                weight,
                form: Form::OutputsFirst { groups: 1 },
                input: usize::MAX,
                bias: OldBias::NoSlot,
                factor: 1.0,
            };
            let (rounds, corrects) = (false, false);
            steps.push(Step {
                target,
                reading: Reading::Rows,
                rounds,
                corrects,
                has_other_terms: true,
                clamp: None,
                hessian_bytes: 0,
            });
        }
    }
    steps
}

const RECURRENT: [&str; 4] = ["aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"];

fn site_of(sites: &Sites, value: ValueId) -> Option<usize> {
    sites.weights.iter().position(|site| site.values.contains(&value))
}

fn elements(sites: &Sites, target: &Target) -> u64 {
    sites.weights.get(target.weight).map_or(0, |site| site.shape.iter().product::<i64>().unsigned_abs())
}

/// Bytes of the Hessian of an op: one matrix of its features and taps for each group.
fn hessian_bytes(target: &Target, sites: &Sites) -> u64 {
    let features = elements(sites, target) / target.outputs(sites).unsigned_abs().max(1);
    features.saturating_mul(features).saturating_mul(target.form.groups().unsigned_abs()).saturating_mul(8)
}
