//! The repository's own tasks: `cargo xtask test`, `cargo xtask demo`.
//!
//! Everything that needs the network or a package happens outside, as the caller; everything that
//! runs Kontor happens inside one outer user namespace ([`world`]) that takes processes, mounts and
//! interfaces with it when it ends.
#![deny(unsafe_code)]

mod build;
mod capture;
mod demo;
mod leaks;
mod office;
mod packages;
mod probe;
mod report;
mod run;
mod scene;
mod suite;
mod suite_jail;
mod sys;
mod test;
mod workvm;
mod world;

use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The repository's own tasks", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check and test everything: format, lints, units, image, a real work VM. Ends with the counts.
    Test {
        /// Run the slow tests too.
        #[arg(long)]
        all: bool,
        /// Run only the stages whose name holds this.
        #[arg(long)]
        only: Option<String>,
        /// Try only work VMs whose uplink is this device, not one of each.
        #[arg(long, value_enum)]
        uplink: Option<build::Backend>,
    },
    /// Build what is missing, start an office and a work VM on this machine, and report what happened.
    Demo {
        /// Write the report as JSON to this file (`-`: standard output).
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Which device the work VM's uplink is.
        #[arg(long, value_enum, default_value = "port")]
        uplink: build::Backend,
    },
    /// What runs inside the outer namespaces.
    #[command(hide = true)]
    Inside {
        /// `demo` or `suite`.
        role: world::Role,
        /// Where the outside put what it built.
        plan: PathBuf,
        /// Arguments for the test harness.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().task {
        Task::Test { all, only, uplink } => test::run(all, only.as_deref(), uplink),
        Task::Demo { json, uplink } => demo::run(json.as_deref(), uplink),
        Task::Inside { role: world::Role::Demo, plan, .. } => demo::inside(&plan),
        Task::Inside { role: world::Role::Suite, plan, rest } => suite::inside(&plan, rest),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{}", run::chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}
