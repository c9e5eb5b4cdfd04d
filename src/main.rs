//! The binary: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser as _;
use timelined::cli::{Cli, execute};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => {
            let code = runtime.block_on(execute(cli));
            // What is stuck in a blocking call, such as a failed fsync, must not hold the exit up.
            runtime.shutdown_background();
            code
        }
        Err(error) => {
            eprintln!("timelined: cannot start: {error}");
            ExitCode::FAILURE
        }
    }
}
