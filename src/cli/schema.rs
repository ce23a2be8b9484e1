//! `tsquant schema`.

use std::io::Write;

use clap::Args;

use crate::config;

/// Print a JSON schema of the experiment file, for editors.
///
/// An editor with a YAML language server takes it from a first line `# yaml-language-server: $schema=tsquant.schema.json`.
#[derive(Debug, Args)]
#[command(after_help = "Example: tsquant schema > tsquant.schema.json")]
pub(super) struct Schema;

impl Schema {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let Self = self;
        let text = serde_json::to_string_pretty(&config::json_schema())?;
        writeln!(std::io::stdout().lock(), "{text}")?;
        Ok(())
    }
}
