//! Taps: they see and replace values wherever these arise, also inside branches and loops, and what goes wrong in a visit
//! ends the run as an error and nothing else.

mod common;

use tch::{Device, IndexOp, Kind, Tensor};
use tsquant::jit::{
    Argument, Arguments, BoxError, Clean, Error, Instrumented, Module, NoVisit, Output, Place, Tap, TapKind, ValueId,
    Visit, with_values,
};
use tsquant::sites;

use common::{assert_equal, model};

/// The names of the layers of `control_flow` in graph order; tap i watches layer i.
const LAYERS: [&str; 6] = ["stem", "bright", "dark", "mix", "refine", "head"];
const MIX: usize = 3;

/// The result of a layer.
#[track_caller]
fn output_of(clean: &Clean, layer: &str) -> ValueId {
    let layers = sites::find(clean.listing()).layers;
    let layer = layers.iter().find(|found| found.name == layer).expect("a layer of the model");
    clean.listing().nodes[layer.node].outputs[0]
}

fn tap_layers(clean: &Clean) -> Instrumented {
    let taps = LAYERS.iter().enumerate();
    let taps: Vec<_> =
        taps.map(|(number, layer)| Tap { value: output_of(clean, layer), number, kind: TapKind::Observe }).collect();
    clean.instrument(&taps, &[]).expect("an instrumented graph")
}

fn substitute_layer(clean: &Clean, layer: &str) -> Instrumented {
    let tap = Tap { value: output_of(clean, layer), number: 7, kind: TapKind::Substitute };
    clean.instrument(&[tap], &[]).expect("an instrumented graph")
}

/// Two images around `mean`, which decides the branch, and the number of loop steps.
fn arguments(module: &Module, mean: f64, steps: i64) -> Arguments {
    let x = (Tensor::arange(2 * 3 * 8 * 8, (Kind::Float, Device::Cpu)).reshape([2, 3, 8, 8]) * 0.37).sin() + mean;
    module.bind(vec![(None, Argument::Tensor(x)), (Some("steps".to_owned()), Argument::Int(steps))]).expect("arguments")
}

/// Counts the calls of each tap and keeps the order.
#[derive(Default)]
struct Calls(Vec<usize>);

impl Calls {
    fn counts(&self) -> [usize; 6] {
        std::array::from_fn(|tap| self.0.iter().filter(|&&seen| seen == tap).count())
    }
}

impl Visit for Calls {
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        assert_eq!(value.kind(), Kind::Float);
        self.0.push(tap);
        Ok(())
    }
}

#[test]
fn branches_and_loops_are_seen_as_often_as_they_run() {
    let clean = model("control_flow").clean();
    let instrumented = tap_layers(&clean);
    let count = |mean, steps| {
        let mut calls = Calls::default();
        instrumented.run(&arguments(clean.module(), mean, steps), &mut calls).expect("a run");
        calls
    };
    let three = count(0.5, 3);
    assert_eq!(three.counts(), [1, 1, 0, 2, 1, 1]);
    assert_eq!(three.0, [0, 1, 3, 4, 3, 5], "in the order in which they run");
    assert_eq!(count(0.5, 0).counts(), [1, 1, 0, 0, 0, 1]);
    assert_eq!(count(-0.5, 5).counts(), [1, 0, 1, 3, 2, 1]);
}

#[test]
fn taps_change_nothing() {
    let clean = model("control_flow").clean();
    let arguments = arguments(clean.module(), 0.5, 3);
    let plain = clean.instrument(&[], &[]).expect("a copy").run(&arguments, &mut NoVisit).expect("a run");
    let tapped = tap_layers(&clean).run(&arguments, &mut Calls::default()).expect("a run");
    assert_equal("tapped", &plain, &tapped);
}

#[derive(Debug, thiserror::Error, PartialEq)]
#[error("call {0} is one too many")]
struct TooMany(usize);

/// Fails or panics at the second call of the convolution in the loop.
struct Trips {
    calls: Calls,
    panics: bool,
}

impl Trips {
    fn new(panics: bool) -> Self {
        Self { calls: Calls::default(), panics }
    }

    fn trip(&mut self, tap: usize) -> Result<(), BoxError> {
        self.calls.0.push(tap);
        if self.calls.0.iter().filter(|&&seen| seen == tap).count() < 2 {
            return Ok(());
        }
        assert!(!self.panics, "call 2 of tap {tap} panics");
        Err(TooMany(2).into())
    }
}

impl Visit for Trips {
    fn observe(&mut self, tap: usize, _: &Tensor) -> Result<(), BoxError> {
        self.trip(tap)
    }

    fn substitute(&mut self, tap: usize, value: &Tensor) -> Result<Tensor, BoxError> {
        self.trip(tap)?;
        Ok(value.shallow_clone())
    }
}

#[test]
fn an_error_of_the_visit_ends_the_run_and_comes_back() {
    let clean = model("control_flow").clean();
    let arguments = arguments(clean.module(), 0.5, 3);
    let before = clean.module().forward(&arguments).expect("a run");
    let observing = tap_layers(&clean);
    let substituting = substitute_layer(&clean, "mix");
    for (instrumented, expected) in [(&observing, vec![0, 1, 3, 4, 3]), (&substituting, vec![7, 7])] {
        let plain = instrumented.run(&arguments, &mut Keeps).expect("a run");
        let mut trips = Trips::new(false);
        let error = instrumented.run(&arguments, &mut trips).expect_err("the visit's error");
        let Error::Visit(inner) = &error else { panic!("expected the visit's error, found {error:?}") };
        assert_eq!(inner.downcast_ref::<TooMany>(), Some(&TooMany(2)));
        assert_eq!(error.to_string(), "call 2 is one too many");
        assert_eq!(trips.calls.0, expected, "nothing is visited after the error");
        assert_equal("the same graph again", &plain, &instrumented.run(&arguments, &mut Keeps).expect("a run"));
    }
    assert_equal("the model again", &before, &clean.module().forward(&arguments).expect("a run"));
}

/// Leaves every value as it is.
struct Keeps;

impl Visit for Keeps {}

#[test]
fn a_panic_in_a_visit_is_an_error() {
    let clean = model("control_flow").clean();
    let arguments = arguments(clean.module(), 0.5, 3);
    for (instrumented, tap) in [(tap_layers(&clean), MIX), (substitute_layer(&clean, "mix"), 7)] {
        let error = instrumented.run(&arguments, &mut Trips::new(true)).expect_err("an error, no abort");
        assert!(matches!(error, Error::Visit(_)), "{error:?}");
        let expected = format!("internal error while a value was visited: call 2 of tap {tap} panics");
        assert_eq!(error.to_string(), expected);
        instrumented.run(&arguments, &mut Keeps).expect("the graph still runs");
    }
}

/// Puts a constant in place of every value.
struct Constant(f64);

impl Visit for Constant {
    fn substitute(&mut self, tap: usize, value: &Tensor) -> Result<Tensor, BoxError> {
        assert_eq!(tap, 7);
        Ok(value.full_like(self.0))
    }
}

#[track_caller]
fn assert_rows(output: &Output, row: &Tensor) {
    let Output::Tensor(found) = output else { panic!("expected a tensor, found {output:?}") };
    let expected = row.unsqueeze(0).expand_as(found);
    // Sums of eight float32 products, added in another order.
    assert!(found.allclose(&expected, 1e-5, 1e-6, false), "expected {expected:?}, found {found:?}");
}

/// With one step the loop body is `y = relu(mix(y))`; then come the mean over all pixels and the linear layer `head`. A
/// constant c in place of mix(y) gives relu(c) · Σ weight + bias in every row.
#[test]
fn a_substitute_inside_a_loop_changes_what_comes_after() {
    let clean = model("control_flow").clean();
    let instrumented = substitute_layer(&clean, "mix");
    let arguments = arguments(clean.module(), 0.5, 1);
    let (weight, bias) = head(&clean);
    let sums = weight.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    let run = |value| instrumented.run(&arguments, &mut Constant(value)).expect("a run");
    assert_rows(&run(2.0), &(&sums * 2.0 + &bias));
    assert_rows(&run(-3.0), &bias);
}

/// What a branch makes: without a step of the loop, `head` reads the mean of `bright(…)`.
#[test]
fn a_substitute_inside_a_branch_changes_what_comes_after() {
    let clean = model("control_flow").clean();
    let instrumented = substitute_layer(&clean, "bright");
    let (weight, bias) = head(&clean);
    let sums = weight.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    let output = instrumented.run(&arguments(clean.module(), 0.5, 0), &mut Constant(-0.25)).expect("a run");
    assert_rows(&output, &(sums * -0.25 + bias));
}

/// Weight and bias of `head`, as the graph holds them.
fn head(clean: &Clean) -> (Tensor, Tensor) {
    let layers = sites::find(clean.listing()).layers;
    let layer = layers.iter().find(|layer| layer.name == "head").expect("the last layer");
    let node = &clean.listing().nodes[layer.node];
    let constant = |slot: usize| clean.constant(node.inputs[slot]).expect("a constant");
    (constant(1), constant(2))
}

#[test]
fn constants_can_be_replaced() {
    let clean = model("control_flow").clean();
    let layers = sites::find(clean.listing()).layers;
    let layer = layers.iter().find(|layer| layer.name == "head").expect("the last layer");
    let weight = clean.listing().nodes[layer.node].inputs[1];
    let zeros = clean.constant(weight).expect("the weight").zeros_like();
    let instrumented = clean.instrument(&[], &[(Place::Constant(weight), zeros)]).expect("an instrumented graph");
    let arguments = arguments(clean.module(), 0.5, 3);
    let output = instrumented.run(&arguments, &mut NoVisit).expect("a run");
    assert_rows(&output, &head(&clean).1);
    let untouched = clean.instrument(&[], &[]).expect("a copy").run(&arguments, &mut NoVisit).expect("a run");
    common::assert_close("the graph itself", &clean.module().forward(&arguments).expect("a run"), &untouched, 1e-5);
}

#[track_caller]
fn lent(tensor: &Tensor) -> Vec<f32> {
    with_values(tensor, <[f32]>::to_vec).expect("a float32 tensor")
}

fn six() -> Tensor {
    Tensor::from_slice(&[0.0f32, 1.0, 2.0, 3.0, 4.0, 5.0]).reshape([2, 3])
}

#[test]
fn values_are_lent_without_a_copy_where_they_lie_without_gaps() {
    let tensor = six();
    for dense in [&tensor, &tensor.tr(), &tensor.i(1..)] {
        let lent_at =
            with_values(dense, |values| values.as_ptr().cast::<std::ffi::c_void>()).expect("a float32 tensor");
        assert_eq!(lent_at, dense.data_ptr().cast_const(), "{dense:?}");
    }
    assert_eq!(lent(&tensor), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(lent(&tensor.tr()), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "in memory order");
    assert_eq!(lent(&tensor.i(1..)), [3.0, 4.0, 5.0]);
}

#[test]
fn values_with_gaps_or_repetitions_are_copied() {
    let tensor = six();
    assert_eq!(lent(&tensor.slice(1, 0, 3, 2)), [0.0, 2.0, 3.0, 5.0]);
    assert_eq!(lent(&tensor.slice(1, 0, 3, 2).tr()), [0.0, 3.0, 2.0, 5.0]);
    assert_eq!(lent(&tensor.i((.., 1))), [1.0, 4.0]);
    assert_eq!(lent(&tensor.i((0..1, ..)).expand([2, 3], false)), [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
    assert_eq!(lent(&Tensor::from(2.5f32)), [2.5]);
}

#[test]
fn tensors_without_elements_lend_nothing() {
    for shape in [vec![0i64], vec![3, 0], vec![0, 0, 2]] {
        assert_eq!(lent(&Tensor::zeros(shape, (Kind::Float, Device::Cpu))), [0.0f32; 0]);
    }
    assert_eq!(lent(&six().i((.., 3..))), [0.0f32; 0]);
}

#[test]
fn other_dtypes_are_refused_by_name() {
    for kind in [Kind::Double, Kind::Half, Kind::BFloat16, Kind::Int64, Kind::Uint8, Kind::Bool] {
        let error = with_values(&six().to_kind(kind), <[f32]>::len).expect_err("an error");
        assert_eq!(error.to_string(), format!("libtorch: expected a float32 tensor, found {kind:?}"));
    }
}
