//! What a person sees while a build runs: bars on a terminal, one line per step anywhere else.
//! Everything goes to stderr; stdout belongs to results.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::{
    io::{IsTerminal, Write},
    time::Duration,
};

/// The progress of the whole run.
pub(crate) struct Progress {
    terminal: Option<MultiProgress>,
}

impl Progress {
    /// Bars where stderr is a terminal.
    pub(crate) fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal().then(MultiProgress::new) }
    }

    /// Begins a step; it ends when the value is dropped.
    pub(crate) fn step(&self, what: impl Into<String>) -> Step {
        let what = what.into();
        let Some(terminal) = &self.terminal else {
            line(&what);
            return Step { bar: None, what };
        };
        let bar = terminal.add(ProgressBar::new_spinner().with_message(what.clone()));
        bar.set_style(style("{spinner} {msg} ({elapsed})"));
        bar.enable_steady_tick(Duration::from_millis(120));
        Step { bar: Some(bar), what }
    }

    /// Says something that is not a step.
    pub(crate) fn note(&self, text: &str) {
        match &self.terminal {
            // Losing a line on a broken terminal is no reason to end a build.
            Some(terminal) => drop(terminal.println(format!("  {text}"))),
            None => line(text),
        }
    }
}

/// One step.
pub(crate) struct Step {
    bar: Option<ProgressBar>,
    what: String,
}

impl Step {
    /// Turns the spinner into a bar of `total` bytes with a rate.
    pub(crate) fn expect_bytes(&self, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_style(style("  {msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}"));
        }
    }

    /// So many bytes are done.
    pub(crate) fn at_bytes(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.set_style(style("  {msg}"));
            bar.finish_with_message(format!("{} ({:.1} s)", self.what, bar.elapsed().as_secs_f64()));
        }
    }
}

fn line(text: &str) {
    // A closed stderr must not end a build.
    let _ = writeln!(std::io::stderr().lock(), "kontor-image: {text}");
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates stand in this file")
}
