//! The programs' command lines, and what describes them: man pages and shell completions.
//!
//! Every program that people call parses its arguments by [`parse`]. So each has a hidden verb, `manual DIR`, which
//! writes what its own command line says, in the places of a prefix such as `/usr`:
//!
//! ```text
//! DIR/share/man/man1/NAME.1, NAME-VERB.1, …           or man8, NAME.8, …
//! DIR/share/bash-completion/completions/NAME
//! DIR/share/zsh/vendor-completions/_NAME
//! DIR/share/fish/vendor_completions.d/NAME.fish
//! ```
//!
//! No time and no path of the machine is in them. Sources: hier(7), and where Debian's shells look.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

use clap::{Arg, Command, Parser, value_parser};
use clap_complete::{
    Generator,
    aot::{Bash, Fish, Zsh},
};
use clap_mangen::Man;
use std::{
    error::Error as _,
    fs, io,
    path::{Path, PathBuf},
    process::exit,
};

/// The verb that every program has.
const VERB: &str = "manual";
/// Where it writes.
const DIR: &str = "DIR";
/// Exit code where that cannot be written.
const HOST_LACKS: i32 = 4;

/// Which part of the manual a program belongs to. Source: man(1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// What people call.
    Commands = 1,
    /// What runs by itself on a server or a PC.
    Services = 8,
}

/// Why the descriptions could not be written.
#[derive(Debug, thiserror::Error)]
#[error("write {path}")]
pub struct WriteError {
    path: PathBuf,
    source: io::Error,
}

/// This process's arguments, for a program called `name`. Ends the process, as [`Parser::parse`] does, where they
/// cannot be understood or ask for nothing but a description.
#[must_use]
pub fn parse<P: Parser>(name: &'static str, section: Section) -> P {
    let command = P::command().name(name);
    let dir = Arg::new(DIR).required(true).value_parser(value_parser!(PathBuf));
    let verb =
        Command::new(VERB).about("Write man pages and shell completions below DIR").hide(true).arg(dir);
    let mut all = command.clone().subcommand(verb);
    let matches = all.get_matches_mut();
    if let Some(dir) = matches.subcommand_matches(VERB).and_then(|manual| manual.get_one::<PathBuf>(DIR)) {
        let Err(error) = write(&command, section, dir) else { exit(0) };
        eprintln!("{name}: {error}: {}", error.source().map(ToString::to_string).unwrap_or_default());
        exit(HOST_LACKS);
    }
    P::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut all).exit())
}

/// Writes all descriptions of `command` below `dir`; older ones there are overwritten.
fn write(command: &Command, section: Section, dir: &Path) -> Result<(), WriteError> {
    let (share, name) = (dir.join("share"), command.get_name());
    let mut described = command.clone().disable_help_subcommand(true);
    described.build();
    let source = [name, command.get_version().unwrap_or_default()].join(" ");
    write_pages(&described, section, &source, &share.join(format!("man/man{}", section as u8)))?;
    let completions = [
        ("bash-completion/completions", name.to_owned(), bash(command)),
        ("zsh/vendor-completions", format!("_{name}"), completion(Zsh, command, name)),
        ("fish/vendor_completions.d", format!("{name}.fish"), completion(Fish, command, name)),
    ];
    completions.into_iter().try_for_each(|(place, file, text)| put(share.join(place).join(file), &text))
}

/// A page of the command and of each of its visible verbs; `source` is the program with its version.
fn write_pages(command: &Command, section: Section, source: &str, dir: &Path) -> Result<(), WriteError> {
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        write_pages(verb, section, source, dir)?;
    }
    let page = Man::new(command.clone()).section((section as u8).to_string()).source(source).manual("Kontor");
    let (path, mut text) = (dir.join(page.get_filename()), Vec::new());
    page.render(&mut text).map_err(|source| WriteError { path: path.clone(), source })?;
    put(path, &text)
}

fn completion(shell: impl Generator, command: &Command, name: &str) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command.clone(), name, &mut text);
    text
}

/// The generator loses verbs of a program with a hyphen in its name (clap's issue 6421). The name matters in the last
/// word of a line alone, where the function is bound to it; elsewhere it only has to be the same.
fn bash(command: &Command) -> Vec<u8> {
    let name = command.get_name();
    let plain = name.replace('-', "_");
    let text = completion(Bash, command, &plain);
    let text = String::from_utf8_lossy(&text);
    text.replace(&format!(" default {plain}\n"), &format!(" default {name}\n")).into_bytes()
}

fn put(path: PathBuf, text: &[u8]) -> Result<(), WriteError> {
    let dirs = path.parent().map_or(Ok(()), fs::create_dir_all);
    dirs.and_then(|()| fs::write(&path, text)).map_err(|source| WriteError { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::collections::BTreeSet;

    /// Does things.
    #[derive(Parser)]
    enum Sample {
        /// Does one thing.
        One {
            /// How much of it.
            #[arg(long)]
            much: u32,
        },
        /// Has verbs.
        #[command(subcommand)]
        More(More),
        #[command(hide = true)]
        Secret,
    }

    #[derive(clap::Subcommand)]
    enum More {
        Inner,
    }

    fn files(dir: &Path) -> BTreeSet<String> {
        let names = fs::read_dir(dir).unwrap();
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn every_visible_verb_has_a_page_in_its_section_and_hidden_ones_have_none() {
        let dir = tempfile::tempdir().unwrap();
        let command = Sample::command().name("sample");
        write(&command, Section::Services, dir.path()).unwrap();
        let man = dir.path().join("share/man/man8");
        let wanted = ["sample.8", "sample-one.8", "sample-more.8", "sample-more-inner.8"];
        assert_eq!(files(&man), wanted.map(str::to_owned).into());
        let page = fs::read_to_string(man.join("sample-one.8")).unwrap();
        assert!(page.contains("Does one thing") && page.contains("How much of it"), "{page}");
        assert_eq!(files(&dir.path().join("share/man")), ["man8".to_owned()].into());
    }

    #[test]
    fn completions_of_three_shells_know_the_verbs_and_options_but_not_the_verb_manual() {
        let dir = tempfile::tempdir().unwrap();
        let command = Sample::command().name("sam-ple");
        write(&command, Section::Commands, dir.path()).unwrap();
        for file in [
            "bash-completion/completions/sam-ple",
            "zsh/vendor-completions/_sam-ple",
            "fish/vendor_completions.d/sam-ple.fish",
        ] {
            let text = fs::read_to_string(dir.path().join("share").join(file)).unwrap();
            for word in ["one", "more", "inner", "much"] {
                assert!(text.contains(word), "{file}: {word}");
            }
            assert!(!text.contains(VERB), "{file}");
            assert!(text.contains("sam-ple"), "{file}");
        }
    }

    #[test]
    fn place_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("share"), "a file").unwrap();
        let error = write(&Sample::command().name("sample"), Section::Commands, dir.path()).unwrap_err();
        assert!(error.to_string().contains("share/man/man1/sample"), "{error}");
    }
}
