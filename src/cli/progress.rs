//! Progress of a run: bars on a terminal, plain lines elsewhere, nothing with `--quiet`. All on standard error.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::pipeline::{Progress, Work};

/// How progress is shown.
pub(super) enum Display {
    /// Not at all.
    Quiet,
    /// One line per stage.
    Lines,
    /// A bar for the stage in hand, with the time that is left.
    Bar {
        /// That of the stage.
        bar: ProgressBar,
        /// Where bars are drawn.
        target: fn() -> ProgressDrawTarget,
    },
}

impl Display {
    pub(super) fn new(quiet: bool) -> Self {
        match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Self::Quiet,
            (false, false) => Self::Lines,
            (false, true) => Self::on(ProgressDrawTarget::stderr),
        }
    }

    fn on(target: fn() -> ProgressDrawTarget) -> Self {
        Self::Bar { bar: ProgressBar::hidden(), target }
    }

    /// Clears the bar, so that what follows stands alone.
    pub(super) fn finish(&mut self) {
        if let Self::Bar { bar, .. } = self {
            bar.finish_and_clear();
        }
    }
}

fn style(work: Work) -> ProgressStyle {
    let template = match work {
        Work::Uncounted => "{msg:<10} {spinner} {elapsed}",
        Work::Rows(_) => "{msg:<10} {wide_bar} {pos}/{len} rows, {eta} left",
        Work::Sites(_) => "{msg:<10} {wide_bar} {pos}/{len} sites, {eta} left",
        Work::Runs(_) => "{msg:<10} {wide_bar} {pos}/{len}, {eta} left",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Progress for Display {
    fn stage(&mut self, name: &'static str, work: Work) {
        match self {
            Self::Quiet => {}
            Self::Lines => match work {
                Work::Uncounted => eprintln!("{name}"),
                Work::Rows(rows) => eprintln!("{name}: {rows} rows"),
                Work::Sites(sites) => eprintln!("{name}: {sites} sites"),
                Work::Runs(runs) => eprintln!("{name}: {runs}"),
            },
            Self::Bar { bar, target } => {
                bar.finish_and_clear();
                let total = match work {
                    Work::Uncounted => None,
                    Work::Rows(count) | Work::Sites(count) | Work::Runs(count) => Some(count as u64),
                };
                *bar = ProgressBar::with_draw_target(total, target()).with_style(style(work)).with_message(name);
                bar.enable_steady_tick(Duration::from_millis(100));
            }
        }
    }

    fn advance(&mut self, count: usize) {
        if let Self::Bar { bar, .. } = self {
            bar.inc(count as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Result;
    use std::sync::{Mutex, PoisonError};

    use indicatif::TermLike;

    use super::*;

    /// What the terminal of the test was told, an escape for each line that was cleared.
    static TOLD: Mutex<String> = Mutex::new(String::new());

    /// A terminal of 80 columns that remembers.
    #[derive(Debug)]
    struct Terminal;

    fn tell(text: &str) -> Result<()> {
        TOLD.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
        Ok(())
    }

    impl TermLike for Terminal {
        fn width(&self) -> u16 {
            80
        }

        fn move_cursor_up(&self, _: usize) -> Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> Result<()> {
            Ok(())
        }

        fn write_line(&self, text: &str) -> Result<()> {
            tell(&format!("{text}\n"))
        }

        fn write_str(&self, text: &str) -> Result<()> {
            tell(text)
        }

        fn clear_line(&self) -> Result<()> {
            tell("\u{1b}")
        }

        fn flush(&self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_terminal_gets_a_bar_with_the_time_left_for_each_stage() {
        let mut display = Display::on(|| ProgressDrawTarget::term_like(Box::new(Terminal)));
        let told = |part: &str| {
            // Drawn by the bar's own thread, ten times a second.
            let is_told = || TOLD.lock().unwrap_or_else(PoisonError::into_inner).contains(part);
            let soon = (0..500).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                is_told()
            });
            assert!(soon, "{part:?} is not in {:?}", TOLD.lock().unwrap_or_else(PoisonError::into_inner));
        };
        display.stage("load", Work::Uncounted);
        told("load ");
        display.stage("calibrate", Work::Rows(64));
        display.advance(32);
        told(" 32/64 rows, ");
        told("s left");
        display.stage("search", Work::Sites(39));
        display.advance(13);
        display.advance(13);
        told("search ");
        told(" 26/39 sites, ");
        display.finish();
        assert!(TOLD.lock().unwrap_or_else(PoisonError::into_inner).ends_with('\u{1b}'), "the bar is left");
    }
}
