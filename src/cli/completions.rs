//! `tsquant completions`.

use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Print the completions of a shell.
#[derive(Debug, Args)]
#[command(after_help = "Example: tsquant completions bash > ~/.local/share/bash-completion/completions/tsquant")]
pub(super) struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Cli::command(), "tsquant", &mut script);
        std::io::stdout().lock().write_all(&script)?;
        Ok(())
    }
}
