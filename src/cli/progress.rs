//! Progress of a run: bars on a terminal, plain lines elsewhere, nothing with `--quiet`. All on standard error.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::pipeline::Progress;

/// How progress is shown.
pub(super) enum Display {
    /// Not at all.
    Quiet,
    /// One line per stage.
    Lines,
    /// A bar for the stage in hand, with the time that is left.
    Bar(ProgressBar),
}

impl Display {
    pub(super) fn new(quiet: bool) -> Self {
        match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Self::Quiet,
            (false, false) => Self::Lines,
            (false, true) => Self::Bar(ProgressBar::new(0)),
        }
    }

    /// Clears the bar, so that what follows stands alone.
    pub(super) fn finish(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn style(total: usize) -> ProgressStyle {
    let template = match total {
        0 => "{msg:<10} {spinner} {elapsed}",
        _ => "{msg:<10} {wide_bar} {pos}/{len} rows, {eta} left",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Progress for Display {
    fn stage(&mut self, name: &'static str, total: usize) {
        match self {
            Self::Quiet => {}
            Self::Lines if total == 0 => eprintln!("{name}"),
            Self::Lines => eprintln!("{name}: {total} rows"),
            Self::Bar(bar) => {
                bar.finish_and_clear();
                *bar = ProgressBar::new(total as u64).with_style(style(total)).with_message(name);
                bar.enable_steady_tick(Duration::from_millis(100));
            }
        }
    }

    fn advance(&mut self, rows: usize) {
        if let Self::Bar(bar) = self {
            bar.inc(rows as u64);
        }
    }
}
