//! That the man pages and shell completions which the programs write of themselves know every verb and option.

use crate::run::{Error, Result, at, quietly};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The programs that people call, and the section of the manual that each is in.
const PROGRAMS: &[(&str, u8)] = &[
    ("kontor", 1),
    ("kontor-control", 8),
    ("kontor-gateway", 8),
    ("kontor-image", 1),
    ("kontorctl", 1),
    ("kontord", 8),
];
/// Completes a word: `$1` is the completion, `$2` what there is of the word, the rest the words before.
const COMPLETE: &str = r#"
. "$1"; word="$2"; shift 2
COMP_WORDS=("$@" "$word"); COMP_CWORD=$#
bound=$(complete -p "$1"); function=${bound#*-F }
"${function%% *}" "$1" "$word" "${!#}"
printf '%s\n' "${COMPREPLY[@]}"
"#;

/// Lets the programs in `bin` describe themselves; returns how many did so completely.
pub(crate) fn check(bin: &Path) -> Result<u64> {
    let mut programs = 0;
    for (name, section) in PROGRAMS {
        let scratch = tempfile::tempdir().map_err(at("make a directory in", &std::env::temp_dir()))?;
        let program = bin.join(name);
        quietly(Command::new(&program).arg("manual").arg(scratch.path()))?;
        let share = scratch.path().join("share");
        let completion = share.join("bash-completion/completions").join(name);
        quietly(Command::new("bash").arg("-n").arg(&completion))?;
        let pages = share.join(format!("man/man{section}"));
        let described = Described { program, pages, section: *section, completion };
        let verbs = described.verbs(&mut vec![(*name).to_owned()])?;
        eprintln!("{name} describes itself and its {verbs} verbs");
        programs += 1;
    }
    Ok(programs)
}

/// A program and what it wrote.
struct Described {
    program: PathBuf,
    pages: PathBuf,
    section: u8,
    completion: PathBuf,
}

impl Described {
    /// Checks `words`, the program's name and verbs of it, and all verbs behind them; returns how many these are.
    fn verbs(&self, words: &mut Vec<String>) -> Result<usize> {
        let page = self.pages.join(format!("{}.{}", words.join("-"), self.section));
        let text = fs::read_to_string(&page).map_err(at("read", &page))?;
        let help = output(Command::new(&self.program).args(&words[1..]).arg("--help"))?;
        let verbs = listed(&help);
        let missing = |what: &str, word: &str| {
            Error::Unexpected(format!("{what} of {} does not know {word}", words.join(" ")))
        };
        // In a page each hyphen is behind a backslash.
        let in_page = |word: &str| text.contains(&word.replace('-', "\\-"));
        let completed = self.completed("", words)?;
        for verb in &verbs {
            if !in_page(&format!("{}-{verb}({})", words.join("-"), self.section)) {
                return Err(missing("the page", verb));
            }
            if !completed.contains(verb) {
                return Err(missing("the completion", verb));
            }
        }
        let completed = self.completed("--", words)?;
        for option in options(&help) {
            if !in_page(&option) {
                return Err(missing("the page", &option));
            }
            if !completed.contains(&option) {
                return Err(missing("the completion", &option));
            }
        }
        let mut count = verbs.len();
        for verb in verbs {
            words.push(verb);
            count += self.verbs(words)?;
            words.pop();
        }
        Ok(count)
    }

    /// What bash offers for `word` behind `words`.
    fn completed(&self, word: &str, words: &[String]) -> Result<Vec<String>> {
        let mut complete = Command::new("bash");
        complete.args(["-c", COMPLETE, "bash"]).arg(&self.completion).arg(word).args(words);
        output(&mut complete).map(|text| text.lines().map(str::to_owned).collect())
    }
}

fn output(command: &mut Command) -> Result<String> {
    quietly(command).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The verbs that a program's help lists, but for the one that repeats the help.
fn listed(help: &str) -> Vec<String> {
    let lines =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // What a verb does may go on in lines that are further to the right.
    let verbs = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    verbs
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .map(str::to_owned)
        .collect()
}

/// The long options that a program's help lists.
fn options(help: &str) -> Vec<String> {
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let long = lines.filter_map(|line| line.split([' ', ',', '=']).find(|word| word.starts_with("--")));
    long.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_and_options_are_read_from_a_help() {
        let help = "Does things\n\nUsage: x <COMMAND>\n\nCommands:\n  one   Does one\n          and more\n  two\n  \
                    help  Print this\n\nOptions:\n      --size <N>  How much\n  -h, --help      Print help\n";
        assert_eq!(listed(help), ["one", "two"]);
        assert_eq!(options(help), ["--size", "--help"]);
        assert!(listed("Usage: x\n\nOptions:\n  -h, --help\n").is_empty());
    }
}
