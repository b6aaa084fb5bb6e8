//! The signal that asks a container to stop.

use crate::error::SpecError;
use oci_spec::image::Config as ImageConfig;
use pinion_cri_proto::v1;

const SIGTERM: i32 = 15;
/// First real-time signal as user space sees it: the C libraries keep 32 and 33.
const SIGRTMIN: i32 = 34;
const SIGRTMAX: i32 = 64;

/// Names of signals 1 to 31 on the architectures that use the generic numbering (signal(7)).
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// CRI's `stop_signal`, else the image's `StopSignal`, else SIGTERM.
pub(crate) fn stop_signal(
    config: &v1::ContainerConfig,
    image: Option<&ImageConfig>,
    warnings: &mut Vec<String>,
) -> Result<i32, SpecError> {
    if config.stop_signal != 0 {
        let name = v1::Signal::try_from(config.stop_signal).map(|signal| signal.as_str_name());
        let name = name.unwrap_or_default().trim_start_matches("SIGNAL_");
        let reason = || format!("{} is no signal", config.stop_signal);
        return number(name).ok_or_else(|| SpecError::invalid("stop_signal", reason()));
    }
    let Some(text) = image.and_then(|image| image.stop_signal().as_deref()) else {
        return Ok(SIGTERM);
    };
    Ok(number(text).unwrap_or_else(|| {
        if !text.is_empty() {
            warnings.push(format!("image.stop_signal: {text:?} is no signal; SIGTERM is used"));
        }
        SIGTERM
    }))
}

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, `RTMAXMINUS1` → number.
pub fn number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=SIGRTMAX).contains(&number).then_some(number);
    }
    let upper = text.trim().to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(place) = NAMES.iter().position(|known| *known == name) {
        return i32::try_from(place + 1).ok();
    }
    match name {
        "IOT" => return Some(6),
        "CLD" => return Some(17),
        "POLL" => return Some(29),
        _ => {}
    }
    let (base, offset) = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => (SIGRTMIN, offset(rest, "+", "PLUS")?),
        (_, Some(rest)) => (SIGRTMAX, -offset(rest, "-", "MINUS")?),
        _ => return None,
    };
    Some(base + offset).filter(|number| (SIGRTMIN..=SIGRTMAX).contains(number))
}

fn offset(rest: &str, sign: &str, word: &str) -> Option<i32> {
    if rest.is_empty() {
        return Some(0);
    }
    let digits = rest.strip_prefix(sign).or_else(|| rest.strip_prefix(word))?;
    digits.parse::<u8>().ok().map(i32::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::image::ConfigBuilder;

    #[test]
    fn every_cri_signal_has_a_number() {
        for value in 1..=65 {
            let config = v1::ContainerConfig { stop_signal: value, ..Default::default() };
            let signal = stop_signal(&config, None, &mut Vec::new());
            assert!(signal.is_ok(), "{value}: {signal:?}");
        }
        let config = v1::ContainerConfig { stop_signal: 999, ..Default::default() };
        assert_eq!(stop_signal(&config, None, &mut Vec::new()).unwrap_err().field, "stop_signal");
    }

    #[test]
    fn names_numbers_and_realtime_offsets_are_read() {
        for (text, expected) in
            [("SIGTERM", 15), ("quit", 3), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAXMINUS1", 63)]
        {
            assert_eq!(number(text), Some(expected), "{text}");
        }
        for text in ["", "0", "65", "SIGNONE", "RTMIN+99", "RTMAX+1", "-9"] {
            assert_eq!(number(text), None, "{text}");
        }
    }

    #[test]
    fn the_image_decides_when_cri_is_silent() {
        let image = |text: &str| ConfigBuilder::default().stop_signal(text).build().unwrap();
        let config = v1::ContainerConfig::default();
        let mut warnings = Vec::new();
        assert_eq!(stop_signal(&config, None, &mut warnings).unwrap(), 15);
        assert_eq!(stop_signal(&config, Some(&image("SIGQUIT")), &mut warnings).unwrap(), 3);
        assert_eq!(stop_signal(&config, Some(&image("SIGBAD")), &mut warnings).unwrap(), 15);
        assert_eq!(warnings.len(), 1);
    }
}
