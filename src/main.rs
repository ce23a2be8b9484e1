//! The `tsquant` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    tsquant::cli::main()
}
