//! Runs of graphs that stop at each of their taps and go on when they are told to, so that several runs can wait for each
//! other in the middle of a model. What they wait for is the caller's business.
//!
//! Each run has a thread of its own, as libtorch's interpreter keeps its place on the stack; no two of them are ever at work.

#![allow(unsafe_code)]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use tch::Tensor;

use super::clean::Instrumented;
use super::module::Arguments;
use super::value::Output;
use super::visit::{BoxError, Visit};
use super::{Error, one_line};

/// Stack of a run's thread: that of a main thread.
const STACK: usize = 8 << 20;

/// Where a run has stopped.
#[derive(Debug)]
pub struct Stop {
    /// Number of the tap.
    pub tap: usize,
    /// The value there. Of a tap that only observes it is the model's own: what is written into it, the model reads.
    pub value: Tensor,
}

/// A run that goes from tap to tap. Dropped, it ends where it is.
pub struct Stepwise {
    answers: Sender<Option<Tensor>>,
    events: Receiver<Event>,
    has_ended: bool,
    output: Option<Output>,
}

enum Event {
    Stop(Stop),
    End(Result<Output, Error>),
}

impl Stepwise {
    /// Goes on to the next tap; `None` at the end of the model. From a tap that substitutes it goes on with `answer`, if there
    /// is one.
    ///
    /// # Errors
    /// Where the model fails.
    pub fn go(&mut self, answer: Option<Tensor>) -> Result<Option<Stop>, Error> {
        if self.has_ended {
            return Ok(None);
        }
        let lost = || Error::Libtorch("a run ended without a word".to_owned());
        self.answers.send(answer).map_err(|_| lost())?;
        match self.events.recv().map_err(|_| lost())? {
            Event::Stop(stop) => Ok(Some(stop)),
            Event::End(result) => {
                self.has_ended = true;
                self.output = Some(result?);
                Ok(None)
            }
        }
    }

    /// What the model gave, once it has ended.
    pub fn take_output(&mut self) -> Option<Output> {
        self.output.take()
    }
}

/// Begins these runs, each in front of its first tap, and hands them to `work`. What is left of them ends with it.
///
/// # Errors
/// Where the system has no thread for one of them.
pub fn stepwise<T>(runs: &[(&Instrumented, &Arguments)], work: impl FnOnce(Vec<Stepwise>) -> T) -> Result<T, Error> {
    thread::scope(|scope| {
        let begin = |&(graph, arguments): &(_, _)| {
            let ((answers, told), (tell, events)) = (channel(), channel());
            let run = Run(graph, arguments);
            let stepper = Stepper { answers: told, events: tell };
            let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, move || run.go(stepper));
            let failed = |error: std::io::Error| Error::Libtorch(one_line(&format!("no thread for a run: {error}")));
            thread.map(|_| Stepwise { answers, events, has_ended: false, output: None }).map_err(failed)
        };
        let runs: Vec<Stepwise> = runs.iter().map(begin).collect::<Result<_, _>>()?;
        Ok(work(runs))
    })
}

struct Run<'a>(&'a Instrumented, &'a Arguments);

// SAFETY: the other side waits whenever this one is at work. Runs that are given up end at the same time, each freeing what
// is its own, and tensors count their owners atomically.
unsafe impl Send for Run<'_> {}

impl Run<'_> {
    fn go(self, mut stepper: Stepper) {
        if stepper.answers.recv().is_err() {
            return;
        }
        let Self(graph, arguments) = self;
        let result = graph.run(arguments, &mut stepper);
        // Nobody listens to a run that was given up.
        let _ = stepper.events.send(Event::End(result));
    }
}

/// The visit of a run: it waits for an answer at each tap.
struct Stepper {
    answers: Receiver<Option<Tensor>>,
    events: Sender<Event>,
}

impl Stepper {
    fn stop(&self, tap: usize, value: &Tensor) -> Result<Option<Tensor>, BoxError> {
        let value = value.shallow_clone();
        let given_up = "the run was given up";
        self.events.send(Event::Stop(Stop { tap, value })).map_err(|_| given_up)?;
        Ok(self.answers.recv().map_err(|_| given_up)?)
    }
}

impl Visit for Stepper {
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        self.stop(tap, value).map(drop)
    }

    fn substitute(&mut self, tap: usize, value: &Tensor) -> Result<Tensor, BoxError> {
        Ok(self.stop(tap, value)?.unwrap_or_else(|| value.shallow_clone()))
    }
}
