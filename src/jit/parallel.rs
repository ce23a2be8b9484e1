//! Work on the threads of libtorch's own kernels: a second pool beside it would fight with it for the processors, as its
//! threads go on spinning for a while after each kernel.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;

use super::Error;
use super::ffi::bridge;

/// What C++ calls. A panic never crosses into it.
pub(super) struct Work<'a> {
    call: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

impl Work<'_> {
    pub(super) fn run(&self, number: usize) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.call)(number)))
            && let Ok(mut first) = self.panic.lock()
        {
            first.get_or_insert(panic);
        }
    }
}

/// How many threads libtorch uses for one kernel, at least 1.
#[must_use]
pub fn thread_count() -> usize {
    bridge::thread_count()
}

/// Calls with each number below `count`, on libtorch's threads and this one, and returns when all calls have.
///
/// # Errors
/// Where libtorch fails.
///
/// # Panics
/// Where a call does, once all others have returned.
pub fn in_parallel(count: usize, call: &(dyn Fn(usize) + Sync)) -> Result<(), Error> {
    let work = Work { call, panic: Mutex::new(None) };
    bridge::in_parallel(count, &work)?;
    match work.panic.into_inner() {
        Ok(None) => Ok(()),
        Ok(Some(panic)) => resume_unwind(panic),
        Err(poisoned) => resume_unwind(Box::new(poisoned.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_number_once() {
        for count in [0, 1, 2, 3, 1000] {
            let calls: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            in_parallel(count, &|number| {
                calls[number].fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
            assert!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1), "{count}");
        }
        assert!(thread_count() >= 1);
    }

    #[test]
    fn a_panic_comes_back() {
        let panic = catch_unwind(|| in_parallel(8, &|number| assert_ne!(number, 3, "three"))).unwrap_err();
        assert!(panic.downcast_ref::<String>().is_some_and(|text| text.contains("three")));
    }
}
