//! The repository's own tasks: `cargo xtask test`, `cargo xtask demo`, `cargo xtask bench`.
//!
//! Everything that needs the network or a package happens outside, as the caller; everything that
//! runs Kontor happens inside one outer user namespace ([`world`]) that takes processes, mounts and
//! interfaces with it when it ends.
#![deny(unsafe_code)]

mod bench;
mod build;
mod capture;
mod clean;
mod demo;
mod fresh;
mod leaks;
mod liar;
mod manual;
mod numeric;
mod office;
mod packages;
mod probe;
mod report;
mod reproducible;
mod run;
mod scene;
mod suite;
mod sys;
mod test;
mod workvm;
mod world;

use clap::{Parser, Subcommand};
use std::{
    ffi::OsString,
    fs::File,
    path::{Path, PathBuf},
    process::ExitCode,
};

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
    /// Measure something, in turn with what it is compared with.
    #[command(subcommand)]
    Bench(Bench),
    /// Run demo and test on a fresh Debian 13, made for that and removed after; needs root.
    Fresh {
        /// Only these of the two.
        commands: Vec<String>,
    },
    /// What runs inside the outer namespaces.
    #[command(hide = true)]
    Inside {
        /// What for.
        role: world::Role,
        /// Where the outside put what it built.
        plan: PathBuf,
        /// Arguments for the test harness.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// The uplinks, and the kernel's own network driver with a UDP socket: rates and what they cost.
    Uplink {
        #[command(flatten)]
        choice: bench::Choice,
        /// Write the report as JSON to this file (`-`: standard output).
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// From QEMU's start to the tunnel, and to an init that does nothing.
    Boot {
        #[command(flatten)]
        choice: bench::Choice,
        /// Which device the work VM's uplink is.
        #[arg(long, value_enum, default_value = "port")]
        uplink: build::Backend,
        /// Write the report as JSON to this file (`-`: standard output).
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let task = Arguments::parse().task;
    let outcome = become_nobody(&task).and_then(|()| run(task));
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{}", run::chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(task: Task) -> run::Result<ExitCode> {
    match task {
        Task::Test { all, only, uplink } => test::run(all, only.as_deref(), uplink),
        Task::Demo { json, uplink } => demo::run(json.as_deref(), uplink),
        Task::Bench(Bench::Uplink { choice, json }) => bench::uplink::run(choice, json.as_deref()),
        Task::Bench(Bench::Boot { choice, uplink, json }) => {
            bench::boot::run(choice, uplink, json.as_deref())
        }
        Task::Inside { role: world::Role::BenchBoot, plan, rest } => bench::boot::inside(&plan, &rest),
        Task::Fresh { commands } => fresh::run(&commands),
        Task::Inside { role: world::Role::Demo, plan, .. } => demo::inside(&plan),
        Task::Inside { role: world::Role::Suite, plan, rest } => suite::inside(&plan, rest),
    }
}

/// Root installs what is missing and goes on as nobody in particular; see [`numeric`].
fn become_nobody(task: &Task) -> run::Result<()> {
    let json = match task {
        Task::Inside { .. } | Task::Fresh { .. } => return Ok(()),
        Task::Demo { json, .. } | Task::Bench(Bench::Uplink { json, .. } | Bench::Boot { json, .. }) => {
            json.as_deref().filter(|file| *file != Path::new("-"))
        }
        Task::Test { .. } => None,
    };
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    packages::ensure()?;
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let mut output = None;
    if let Some(file) = json {
        // Root may write where the numeric uid may not.
        output = Some(File::create(file).map_err(run::at("write", file))?);
        // Of two the last would count, but clap takes only one.
        arguments.retain(|argument| !argument.to_string_lossy().starts_with("--json") && argument != file);
        arguments.extend(["--json".into(), "-".into()]);
    }
    let reason = numeric::replace(arguments, output)?;
    eprintln!("everything runs as root, for want of a numeric uid: {}", run::chain(&reason));
    Ok(())
}
