//! Runs of graphs that stop at taps and go on when they are told to, so that several runs can wait for each other in the middle
//! of a model. What they wait for is the caller's business.
//!
//! Each run has a thread of its own, as libtorch's interpreter keeps its place on the stack. Threads of libtorch's own belong to
//! the thread that asks for them: runs that are at work side by side share the processor's.

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
    /// The value there, the model's own: what is written into it while the run stands here, the model reads.
    pub value: Tensor,
}

/// What replaces the value at a tap that substitutes; called on the threads of runs.
pub type Substitute<'a> = &'a (dyn Fn(usize, &Tensor) -> Result<Tensor, BoxError> + Sync);

/// Runs that go from tap to tap. Dropped, they end where they are.
pub struct Stepwise {
    tell: Vec<Sender<()>>,
    events: Receiver<(usize, Event)>,
    at_once: usize,
    ends: Vec<End>,
}

/// How far a run is.
enum End {
    NotYet,
    With(Output),
    Taken,
}

enum Event {
    Ready,
    Stop(Stop),
    End(Result<Output, Error>),
    Lost,
}

impl Stepwise {
    /// Lets these runs go on. Whenever one stops at a tap that observes, `goes_on` says whether it goes on from there; those that
    /// have ended are passed over.
    ///
    /// # Errors
    /// Where the model fails, or `goes_on` does: then all runs are given up.
    pub fn go(
        &mut self,
        runs: impl IntoIterator<Item = usize>,
        goes_on: impl FnMut(usize, Stop) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let result = self.go_on(runs, goes_on);
        if result.is_err() {
            self.tell.clear();
        }
        result
    }

    fn go_on(
        &mut self,
        runs: impl IntoIterator<Item = usize>,
        mut goes_on: impl FnMut(usize, Stop) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let mut waiting = runs.into_iter();
        let mut busy = 0;
        loop {
            while busy < self.at_once
                && let Some(run) = waiting.next()
            {
                if matches!(self.ends.get(run), Some(End::NotYet)) {
                    self.tell(run)?;
                    busy += 1;
                }
            }
            if busy == 0 {
                return Ok(());
            }
            match self.events.recv().map_err(|_| lost())? {
                (run, Event::Stop(stop)) => {
                    if goes_on(run, stop)? {
                        self.tell(run)?;
                    } else {
                        busy -= 1;
                    }
                }
                (_, Event::Ready) => {}
                (run, Event::End(result)) => {
                    self.ends[run] = End::With(result?);
                    busy -= 1;
                }
                (_, Event::Lost) => return Err(lost()),
            }
        }
    }

    fn tell(&self, run: usize) -> Result<(), Error> {
        self.tell.get(run).and_then(|tell| tell.send(()).ok()).ok_or_else(lost)
    }

    /// What the model gave in this run, once it has ended.
    pub fn take_output(&mut self, run: usize) -> Option<Output> {
        let end = self.ends.get_mut(run).filter(|end| matches!(end, End::With(_)))?;
        match std::mem::replace(end, End::Taken) {
            End::With(output) => Some(output),
            End::NotYet | End::Taken => None,
        }
    }
}

fn lost() -> Error {
    Error::Libtorch("a run ended without a word".to_owned())
}

/// Begins these runs, each in front of its first tap, and hands them to `work`. What is left of them ends with it. As many as `together`
/// are at work at the same time, where there are threads for them.
///
/// # Errors
/// Where the system has no thread for one of them.
pub fn stepwise<T>(
    runs: &[(&Instrumented, &Arguments)],
    together: usize,
    substitute: Substitute<'_>,
    work: impl FnOnce(Stepwise) -> T,
) -> Result<T, Error> {
    let all = tch::get_num_threads();
    let at_once = together.clamp(1, usize::try_from(all).unwrap_or(1).max(1));
    let own = (at_once > 1).then(|| (all / i32::try_from(at_once).unwrap_or(all)).max(1));
    // What a thread asks for, those that begin later have too: this one asks first and last.
    let threads = own.map(|_| Threads::of(all));
    thread::scope(|scope| {
        let (sender, events) = channel();
        let begin = |(number, &(graph, arguments)): (usize, &(_, _))| {
            let (tell, told) = channel();
            let events = sender.clone();
            let run = Run(graph, arguments);
            let begun = move || {
                let mut stepper = Stepper { number, told, events, substitute, has_ended: false };
                stepper.take_threads(own);
                run.go(&mut stepper);
            };
            let failed = |error: std::io::Error| Error::Libtorch(one_line(&format!("no thread for a run: {error}")));
            let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, begun).map_err(failed)?;
            Ok((tell, thread))
        };
        let begun: Vec<_> = runs.iter().enumerate().map(begin).collect::<Result<_, Error>>()?;
        let (tell, begun): (Vec<_>, Vec<_>) = begun.into_iter().unzip();
        for _ in &tell {
            events.recv().map_err(|_| lost())?;
        }
        drop(threads);
        let ends = runs.iter().map(|_| End::NotYet).collect();
        let done = work(Stepwise { tell, events, at_once, ends });
        // One that panicked was told of as lost.
        begun.into_iter().for_each(|thread| drop(thread.join()));
        Ok(done)
    })
}

/// Gives libtorch as many threads as it had, however this ends.
struct Threads(i32);

impl Threads {
    fn of(all: i32) -> Self {
        tch::set_num_threads(all);
        Self(all)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        tch::set_num_threads(self.0);
    }
}

struct Run<'a>(&'a Instrumented, &'a Arguments);

// SAFETY: graphs and arguments are only read by runs, each of which has an interpreter of its own. Weights are written into while no run is
// at work, a value at which a run stands while that run waits: no other run has it. Tensors count their owners atomically.
unsafe impl Send for Run<'_> {}

impl Run<'_> {
    fn go(self, stepper: &mut Stepper<'_>) {
        if stepper.told.recv().is_err() {
            return;
        }
        let Self(graph, arguments) = self;
        let result = graph.run(arguments, stepper);
        stepper.has_ended = true;
        // Nobody listens to a run that was given up.
        let _ = stepper.events.send((stepper.number, Event::End(result)));
    }
}

/// The visit of a run: it waits at each tap that observes.
struct Stepper<'a> {
    number: usize,
    told: Receiver<()>,
    events: Sender<(usize, Event)>,
    substitute: Substitute<'a>,
    has_ended: bool,
}

impl Stepper<'_> {
    fn take_threads(&self, own: Option<i32>) {
        if let Some(own) = own {
            // A thread that has not asked yet would take what another asked for last.
            tch::get_num_threads();
            tch::set_num_threads(own);
        }
        let _ = self.events.send((self.number, Event::Ready));
    }
}

impl Visit for Stepper<'_> {
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        let value = value.shallow_clone();
        let given_up = "the run was given up";
        self.events.send((self.number, Event::Stop(Stop { tap, value }))).map_err(|_| given_up)?;
        Ok(self.told.recv().map_err(|_| given_up)?)
    }

    fn substitute(&mut self, tap: usize, value: &Tensor) -> Result<Tensor, BoxError> {
        (self.substitute)(tap, value)
    }
}

impl Drop for Stepper<'_> {
    fn drop(&mut self) {
        if !self.has_ended {
            // Whoever waits for it would wait for ever.
            let _ = self.events.send((self.number, Event::Lost));
        }
    }
}
