//! Runs that go from tap to tap, some of them at work at the same time.

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::Tensor;
use tsquant::jit::{Arguments, BoxError, Clean, Instrumented, NoVisit, Output, Stop, Tap, TapKind, stepwise};

/// libtorch has one number of threads for the whole process.
fn with_threads(threads: i32) -> MutexGuard<'static, ()> {
    static THREADS: Mutex<()> = Mutex::new(());
    let guard = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    tch::set_num_threads(threads);
    guard
}

/// A model with a tap that observes its first layer's result, and batches of different rows.
fn model() -> (Clean, Instrumented, Vec<Arguments>) {
    let (clean, module) = (common::model("mlp").clean(), common::model("mlp").load());
    let layer = clean.listing().nodes.iter().find(|node| node.op == "aten::linear").expect("a layer");
    let tap = Tap { value: layer.outputs[0], number: 7, kind: TapKind::Observe };
    let instrumented = clean.instrument(&[tap], &[]).expect("a graph");
    let batches = common::model("mlp").batches(&module, 16, 4);
    assert_eq!(batches.len(), 4);
    (clean, instrumented, batches)
}

fn nothing(tap: usize, _: &Tensor) -> Result<Tensor, BoxError> {
    Err(format!("tap {tap} substitutes nothing").into())
}

fn tensor(output: &Output) -> Tensor {
    output.tensors()[0].1.shallow_clone()
}

#[test]
fn each_run_stops_and_gives_what_it_gives_alone() {
    for threads in [1, 2, 3] {
        let _alone = with_threads(threads);
        let (_, instrumented, batches) = model();
        let runs: Vec<_> = batches.iter().map(|arguments| (&instrumented, arguments)).collect();
        let mut stops = vec![0; runs.len()];
        let outputs = stepwise(&runs, runs.len(), &nothing, |mut runs| {
            runs.go(0..4, |run, Stop { tap, .. }| {
                assert_eq!(tap, 7);
                stops[run] += 1;
                Ok(false)
            })?;
            assert!((0..4).all(|run| runs.take_output(run).is_none()));
            assert_eq!(tch::get_num_threads(), threads);
            runs.go([3, 1], |_, _| Ok(true))?;
            runs.go(0..4, |_, _| Ok(true))?;
            Ok::<_, tsquant::jit::Error>((0..4).map(|run| runs.take_output(run)).collect::<Vec<_>>())
        });
        let outputs = outputs.expect("threads").expect("runs");
        assert_eq!(stops, [1; 4]);
        for (output, arguments) in outputs.into_iter().zip(&batches) {
            let alone = instrumented.run(arguments, &mut NoVisit).expect("a run");
            let found = tensor(&output.expect("an output"));
            assert!(found.allclose(&tensor(&alone), 1e-6, 1e-6, false));
        }
    }
}

#[test]
fn what_is_written_at_a_stop_is_what_the_model_reads() {
    let _alone = with_threads(2);
    let (_, instrumented, batches) = model();
    let runs: Vec<_> = batches.iter().map(|arguments| (&instrumented, arguments)).collect();
    let outputs = stepwise(&runs, 2, &nothing, |mut runs| {
        runs.go(0..4, |run, Stop { value, .. }| {
            if run == 2 {
                let _ = value.shallow_clone().zero_();
            }
            Ok(true)
        })?;
        Ok::<_, tsquant::jit::Error>((0..4).filter_map(|run| runs.take_output(run)).collect::<Vec<_>>())
    });
    let outputs = outputs.expect("threads").expect("runs");
    for (run, (output, arguments)) in outputs.iter().zip(&batches).enumerate() {
        let alone = tensor(&instrumented.run(arguments, &mut NoVisit).expect("a run"));
        assert_eq!(tensor(output).allclose(&alone, 1e-6, 1e-6, false), run != 2, "{run}");
    }
}

/// Whoever fails, nobody waits for ever, and libtorch has the threads that it had.
#[test]
fn one_failure_ends_all() {
    let _alone = with_threads(2);
    let (_, instrumented, batches) = model();
    let runs: Vec<_> = batches.iter().map(|arguments| (&instrumented, arguments)).collect();
    let failed = stepwise(&runs, runs.len(), &nothing, |mut runs| {
        let first = runs
            .go(0..4, |run, _| if run == 1 { Err(tsquant::jit::Error::Libtorch("no".to_owned())) } else { Ok(true) });
        let again = runs.go(0..4, |_, _| Ok(true));
        (first, again)
    });
    let (first, again) = failed.expect("threads");
    assert!(first.expect_err("a failure").to_string().contains("no"));
    assert!(again.is_err(), "all are given up");
    assert_eq!(tch::get_num_threads(), 2);
}
