//! Signals: CRI numbers them in its own way.

use pinion_cri_proto::v1::Signal;

/// SIGKILL.
pub(crate) const KILL: i32 = 9;

/// CRI's value for a kernel number; the runtime's default for what CRI has no name for.
pub(crate) fn to_cri(number: i32) -> Signal {
    let name = |signal: &Signal| signal.as_str_name().trim_start_matches("SIGNAL_");
    (1..=Signal::Sigrtmax as i32)
        .filter_map(|value| Signal::try_from(value).ok())
        .find(|signal| pinion_spec::signal::number(name(signal)) == Some(number))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_numbers_have_their_cri_names() {
        assert_eq!(to_cri(15), Signal::Sigterm);
        assert_eq!(to_cri(9), Signal::Sigkill);
        assert_eq!(to_cri(37), Signal::Sigrtminplus3);
        assert_eq!(to_cri(0), Signal::RuntimeDefault);
    }
}
