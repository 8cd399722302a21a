//! Where leases come from. Today a configured program answers: the request's envelope on its standard
//! input, one line of JSON on its standard output.
//!
//! ```text
//! {"lease":{"keysets":[base64 …],"device":base64,"bundle":base64,"lease":base64}}
//! {"refused":"words"}
//! ```
//!
//! Nothing of the answer is believed here; [`lease`](crate::lease) checks it.

use crate::{
    lines::{LineError, next_line},
    sys,
    tail::{clean, last_words},
};
use kontor_bundle::lease::{MAX_KEYSETS, Parts};
use kontor_trust::MAX_ENVELOPE;
use serde::Deserialize;
use std::{
    io,
    process::{Command, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncWriteExt, BufReader},
    time::timeout,
};

/// Most bytes of an answer: every envelope of a lease at its longest, in base64, and the JSON around.
pub const MAX_ANSWER: usize = (MAX_KEYSETS + 3) * MAX_ENVELOPE.div_ceil(3) * 4 + 1024;
/// How long an answer may take. A guest waits a minute.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Most characters of the office's words that are passed on.
const WORDS_MAX: usize = 200;

/// What the office says to a request.
#[derive(Debug)]
pub enum Reply {
    /// A lease, not yet checked.
    Lease(Parts),
    /// No, in these words.
    Refused(String),
}

/// Why the office says nothing.
#[derive(Debug, thiserror::Error)]
pub enum OfficeError {
    /// The program.
    #[error("run the office command {0:?}")]
    Run(String, #[source] io::Error),
    /// It took longer than [`PATIENCE`].
    #[error("the office did not answer within {} s", PATIENCE.as_secs())]
    Late,
    /// It ended with an error.
    #[error("the office command failed ({0})")]
    Failed(String),
    /// The line that it answered.
    #[error("read the office's answer")]
    Line(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// What it answered is no answer.
    #[error("understand the office's answer")]
    Parse(#[source] serde_json::Error),
}

/// Somebody who answers requests for leases.
pub trait LeaseSource: Clone + Send + Sync + 'static {
    /// Answers one request.
    fn answer(&self, request: Vec<u8>) -> impl Future<Output = Result<Reply, OfficeError>> + Send;
}

/// A program that answers.
#[derive(Debug, Clone)]
pub struct CommandOffice {
    argv: Vec<String>,
    patience: Duration,
}

impl CommandOffice {
    /// `argv` is the program and its arguments.
    #[must_use]
    pub fn new(argv: Vec<String>) -> Self {
        Self { argv, patience: PATIENCE }
    }

    async fn run(&self, request: Vec<u8>) -> Result<Reply, OfficeError> {
        let (program, arguments) = self.argv.split_first().map_or(("", [].as_slice()), |(p, a)| (p, a));
        let failed = |error| OfficeError::Run(program.to_owned(), error);
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        sys::die_with_parent(&mut command);
        let mut child = tokio::process::Command::from(command).kill_on_drop(true).spawn().map_err(failed)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let ask = async move {
            if let Some(mut stdin) = stdin {
                // A program that ends without reading says why by its exit code.
                let _ = stdin.write_all(&request).await;
            }
        };
        let hear = async move {
            match stdout {
                Some(stdout) => next_line(&mut BufReader::new(stdout), MAX_ANSWER).await,
                None => Ok(None),
            }
        };
        let words = async move {
            match stderr {
                Some(stderr) => last_words(stderr, "office").await,
                None => String::new(),
            }
        };
        let ((), line, words, status) = tokio::join!(ask, hear, words, child.wait());
        let status = status.map_err(failed)?;
        if !status.success() {
            return Err(OfficeError::Failed(format!("{status} {words}").trim_end().to_owned()));
        }
        let line = line.and_then(|line| line.ok_or(LineError::Cut));
        parse(&line.map_err(|error| OfficeError::Line(Box::new(error)))?)
    }
}

impl LeaseSource for CommandOffice {
    async fn answer(&self, request: Vec<u8>) -> Result<Reply, OfficeError> {
        timeout(self.patience, self.run(request)).await.unwrap_or(Err(OfficeError::Late))
    }
}

fn parse(line: &[u8]) -> Result<Reply, OfficeError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Answer {
        Lease(Parts),
        Refused(String),
    }
    match serde_json::from_slice(line).map_err(OfficeError::Parse)? {
        Answer::Lease(parts) => Ok(Reply::Lease(parts)),
        Answer::Refused(words) => {
            let words: String = words.chars().take(WORDS_MAX).collect();
            Ok(Reply::Refused(clean(words.as_bytes())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> CommandOffice {
        CommandOffice::new(["sh", "-c", script].map(str::to_owned).to_vec())
    }

    async fn answer(office: &CommandOffice) -> Result<Reply, OfficeError> {
        office.answer(b"request".to_vec()).await
    }

    #[tokio::test]
    async fn lease_comes_back_as_the_envelopes_it_is_made_of() {
        let script = r#"cat > /dev/null; echo '{"lease":{"keysets":["YQ=="],"device":"Yg==","bundle":"Yw==","lease":"ZA=="}}'"#;
        let Ok(Reply::Lease(parts)) = answer(&shell(script)).await else { panic!("no lease") };
        assert_eq!((parts.keysets, parts.lease), (vec![b"a".to_vec()], b"d".to_vec()));
    }

    #[tokio::test]
    async fn request_arrives_on_standard_input() {
        let script = r#"printf '{"refused":"%s"}\n' "$(cat)""#;
        assert!(matches!(answer(&shell(script)).await, Ok(Reply::Refused(words)) if words == "request"));
    }

    #[tokio::test]
    async fn words_of_the_office_are_cut_and_cleaned() {
        let line =
            serde_json::to_vec(&serde_json::json!({"refused": "\u{1b}[2J".to_owned() + &"x".repeat(500)}));
        let Ok(Reply::Refused(words)) = parse(&line.unwrap()) else { panic!("no refusal") };
        assert!(words.starts_with("\\x1b[2Jxx") && words.len() < WORDS_MAX + 10);
    }

    #[tokio::test]
    async fn failure_is_told_with_the_programs_last_words() {
        let Err(error) = answer(&shell("echo 'no such directory' >&2; exit 2")).await else { panic!() };
        assert_eq!(error.to_string(), "the office command failed (exit status: 2 no such directory)");
        let missing = CommandOffice::new(vec!["/does/not/exist".into()]);
        assert!(matches!(answer(&missing).await, Err(OfficeError::Run(..))));
    }

    #[tokio::test]
    async fn what_is_no_answer_is_refused() {
        for script in ["echo nonsense", r#"echo '{"lease":{}}'"#, r#"echo '{"refused":"a","lease":1}'"#] {
            assert!(matches!(answer(&shell(script)).await, Err(OfficeError::Parse(_))), "{script}");
        }
        assert!(matches!(answer(&shell("true")).await, Err(OfficeError::Line(_))));
    }

    #[tokio::test]
    async fn endless_answer_is_cut_at_the_limit() {
        let script = format!("head -c {} /dev/zero", MAX_ANSWER + 1);
        assert!(matches!(answer(&shell(&script)).await, Err(OfficeError::Line(_))));
    }

    #[tokio::test]
    async fn program_that_does_not_answer_is_given_up() {
        let office = CommandOffice { patience: Duration::from_millis(50), ..shell("exec sleep 600") };
        assert!(matches!(answer(&office).await, Err(OfficeError::Late)));
    }
}
