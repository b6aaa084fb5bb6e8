//! The status that ends a remote command, on its error stream.
//!
//! From protocol v4 on it is a Kubernetes `Status` object as JSON; before, plain text, and
//! nothing at all for success.

use serde_json::json;

/// How a remote command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Exited(i32),
    Failed(String),
}

impl Outcome {
    /// The bytes for the error stream.
    pub(crate) fn encode(&self, structured: bool) -> Vec<u8> {
        match (self, structured) {
            (Self::Exited(0), true) => json!({"metadata": {}, "status": "Success"}).to_string(),
            (Self::Exited(0), false) => String::new(),
            (Self::Exited(code), true) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("command terminated with non-zero exit code: exit status {code}"),
                "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            })
            .to_string(),
            (Self::Exited(code), false) => {
                format!("command terminated with non-zero exit code: exit status {code}")
            }
            (Self::Failed(message), true) => json!({
                "metadata": {},
                "status": "Failure",
                "message": message,
                "reason": "InternalError",
                "details": {"causes": [{"message": message}]},
                "code": 500,
            })
            .to_string(),
            (Self::Failed(message), false) => message.clone(),
        }
        .into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_is_a_cause_kubectl_reads() {
        let text = Outcome::Exited(3).encode(true);
        let status: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "3");
    }

    #[test]
    fn old_clients_see_nothing_on_success() {
        assert!(Outcome::Exited(0).encode(false).is_empty());
        assert_eq!(Outcome::Failed("no".into()).encode(false), b"no");
    }
}
