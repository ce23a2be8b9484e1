//! Ctrl-C and its kin: an unfinished run directory is removed before the process ends as the signal wants it to.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::{flag, iterator, low_level};

use crate::pipeline;

/// Watches from a thread of its own for as long as the process lives.
///
/// # Errors
/// Where the system does not let it.
pub(super) fn watch() -> std::io::Result<()> {
    let ignored = ignored();
    let ending = [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
    let is_second = Arc::new(AtomicBool::new(false));
    for signal in ending.clone() {
        // In this order: a signal that finds the flag set ends the process at once.
        flag::register_conditional_default(signal, Arc::clone(&is_second))?;
        flag::register(signal, Arc::clone(&is_second))?;
    }
    // Past the file size limit (`ulimit -f`) a write then fails with an error that can be told.
    flag::register(SIGXFSZ, Arc::default())?;
    let mut signals = iterator::Signals::new(ending)?;
    let wait = move || {
        if let Some(signal) = signals.forever().next() {
            pipeline::abandon_unfinished_runs();
            // By the signal itself, so that a shell sees what ended the command and shows 128 + its number.
            let _ = low_level::emulate_default_handler(signal);
            low_level::exit(128 + signal);
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait)?;
    Ok(())
}

/// The signals that this process is to ignore, as `nohup` and background jobs of a script are, a bit each, where the system
/// tells (Linux).
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
