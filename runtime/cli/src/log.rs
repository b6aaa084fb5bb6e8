//! Where errors and warnings go: standard error, and the log file that clients read back.

use std::io::Write;
use std::path::PathBuf;

use pinion_container::time::now_rfc3339;

use crate::args::{Global, LogFormat};

/// The log of one invocation.
#[derive(Debug)]
pub(crate) struct Log {
    file: Option<PathBuf>,
    format: LogFormat,
    debug: bool,
}

impl Log {
    pub(crate) fn new(global: &Global) -> Self {
        Self { file: global.log.clone(), format: global.log_format, debug: global.debug }
    }

    /// The one error an invocation ends with. People (and clients that know no better) read
    /// the plain text on standard error, clients of runc the file.
    pub(crate) fn error(&self, message: &str) {
        self.append("error", message);
        eprintln!("{message}");
    }

    /// Something that was left out or went wrong without being fatal.
    pub(crate) fn warn(&self, message: &str) {
        match &self.file {
            Some(_) => self.append("warning", message),
            None => eprintln!("warning: {message}"),
        }
    }

    /// With `--debug`: what was asked and how it ended.
    pub(crate) fn debug(&self, message: impl FnOnce() -> String) {
        match (self.debug, &self.file) {
            (false, _) => {}
            (true, Some(_)) => self.append("debug", &message()),
            (true, None) => eprint!("{}", self.line("debug", &message())),
        }
    }

    fn append(&self, level: &str, message: &str) {
        let Some(path) = &self.file else { return };
        let opened = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let written =
            opened.and_then(|mut file| file.write_all(self.line(level, message).as_bytes()));
        if let Err(error) = written {
            eprintln!("unable to write to the log {}: {error}", path.display());
        }
    }

    fn line(&self, level: &str, message: &str) -> String {
        let time = now_rfc3339();
        match self.format {
            LogFormat::Json => {
                let entry = serde_json::json!({ "level": level, "msg": message, "time": time });
                format!("{entry}\n")
            }
            LogFormat::Text => format!("time=\"{time}\" level={level} msg={message:?}\n"),
        }
    }
}
