//! What runs: arguments, environment, working directory.

use crate::error::SpecError;
use oci_spec::image::Config as ImageConfig;
use pinion_cri_proto::v1;

/// The search path when neither image nor CRI sets one.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// `command` replaces the entrypoint, `args` the image's Cmd; a `command` alone drops Cmd.
pub(crate) fn args(
    config: &v1::ContainerConfig,
    image: Option<&ImageConfig>,
) -> Result<Vec<String>, SpecError> {
    let mut all = config.command.clone();
    if all.is_empty() {
        let entrypoint = image.and_then(|image| image.entrypoint().clone()).unwrap_or_default();
        // `ENTRYPOINT [""]` is how a Dockerfile clears an inherited entrypoint.
        all.extend(entrypoint.into_iter().filter(|word| !word.is_empty()));
        if config.args.is_empty() {
            all.extend(image.and_then(|image| image.cmd().clone()).unwrap_or_default());
        }
    }
    all.extend_from_slice(&config.args);
    if all.is_empty() {
        let reason = "neither the request nor the image names a command";
        return Err(SpecError::invalid("command", reason));
    }
    match all.iter().position(|word| word.contains('\0')) {
        Some(place) => Err(SpecError::invalid("command", format!("word {place} contains NUL"))),
        None => Ok(all),
    }
}

/// Later entries replace earlier ones in place: default PATH, TERM for terminals, HOSTNAME,
/// the image's, CRI's.
///
/// An image entry that is not `KEY=value` is dropped with a warning and never completed from
/// the host's environment (CVE-2026-57231).
pub(crate) fn env(
    config: &v1::ContainerConfig,
    image: Option<&ImageConfig>,
    hostname: &str,
    warnings: &mut Vec<String>,
) -> Result<Vec<String>, SpecError> {
    let mut env = Environment(vec![DEFAULT_PATH.to_owned()]);
    if config.tty {
        env.set("TERM", "xterm");
    }
    env.set("HOSTNAME", hostname);
    for entry in image.and_then(|image| image.env().as_ref()).into_iter().flatten() {
        match entry.split_once('=') {
            Some((key, value)) if !key.is_empty() && !entry.contains('\0') => env.set(key, value),
            _ => warnings.push(format!("image.env: {entry:?} is not KEY=value; left out")),
        }
    }
    for (index, pair) in config.envs.iter().enumerate() {
        let refuse = |what: &str| {
            Err(SpecError::invalid(format!("envs[{index}]"), format!("{:?}: {what}", pair.key)))
        };
        if pair.key.is_empty() || pair.key.contains(['=', '\0']) {
            return refuse("no name for a variable");
        }
        match std::str::from_utf8(&pair.value) {
            Ok(value) if !value.contains('\0') => env.set(&pair.key, value),
            Ok(_) => return refuse("the value contains NUL"),
            // config.json is UTF-8; replacing bytes would hand over another value silently.
            Err(_) => return refuse("the value is not UTF-8, which config.json cannot carry"),
        }
    }
    Ok(env.0)
}

struct Environment(Vec<String>);

impl Environment {
    fn set(&mut self, key: &str, value: &str) {
        let entry = format!("{key}={value}");
        let same = |old: &&mut String| old.split_once('=').is_some_and(|(name, _)| name == key);
        match self.0.iter_mut().find(same) {
            Some(old) => *old = entry,
            None => self.0.push(entry),
        }
    }
}

/// CRI's directory, else the image's, else `/`.
pub(crate) fn cwd(
    config: &v1::ContainerConfig,
    image: Option<&ImageConfig>,
) -> Result<String, SpecError> {
    let from_image = image.and_then(|image| image.working_dir().clone()).unwrap_or_default();
    let (cwd, field) = match (config.working_dir.as_str(), from_image.as_str()) {
        ("", "") => return Ok("/".to_owned()),
        ("", image) => (image, "image.working_dir"),
        (asked, _) => (asked, "working_dir"),
    };
    if !cwd.starts_with('/') || cwd.contains('\0') || cwd.len() > 4095 {
        let start: String = cwd.chars().take(64).collect();
        return Err(SpecError::invalid(field, format!("{start:?} is not an absolute path")));
    }
    Ok(cwd.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::image::ConfigBuilder;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|word| (*word).to_owned()).collect()
    }

    fn image(entrypoint: &[&str], cmd: &[&str]) -> ImageConfig {
        ConfigBuilder::default().entrypoint(words(entrypoint)).cmd(words(cmd)).build().unwrap()
    }

    fn config(command: &[&str], args: &[&str]) -> v1::ContainerConfig {
        v1::ContainerConfig { command: words(command), args: words(args), ..Default::default() }
    }

    #[test]
    fn command_and_args_combine_with_entrypoint_and_cmd() {
        let image = image(&["entry"], &["cmd"]);
        let run =
            |command: &[&str], list: &[&str]| args(&config(command, list), Some(&image)).unwrap();
        assert_eq!(run(&[], &[]), ["entry", "cmd"]);
        assert_eq!(run(&[], &["a"]), ["entry", "a"]);
        assert_eq!(run(&["c"], &[]), ["c"]);
        assert_eq!(run(&["c"], &["a"]), ["c", "a"]);
    }

    #[test]
    fn nothing_to_run_is_refused() {
        assert_eq!(args(&config(&[], &[]), None).unwrap_err().field, "command");
        assert!(args(&config(&[], &[]), Some(&image(&[""], &[]))).is_err());
        assert!(args(&config(&["a\0b"], &[]), None).is_err());
    }

    #[test]
    fn the_environment_is_layered_and_keeps_its_order() {
        let image = ConfigBuilder::default()
            .env(words(&["A=image", "PATH=/image", "B=b=c"]))
            .build()
            .unwrap();
        let mut config = config(&["x"], &[]);
        config.tty = true;
        config.envs = vec![v1::KeyValue { key: "A".into(), value: b"cri".into() }];
        let env = env(&config, Some(&image), "pod", &mut Vec::new()).unwrap();
        assert_eq!(env, ["PATH=/image", "TERM=xterm", "HOSTNAME=pod", "A=cri", "B=b=c"]);
    }

    #[test]
    fn malformed_image_entries_are_left_out_with_a_warning() {
        let image = ConfigBuilder::default()
            .env(words(&["PATH", "*", "SECRET", "=x", "A=", "N=\0"]))
            .build()
            .unwrap();
        let mut warnings = Vec::new();
        let env = env(&config(&["x"], &[]), Some(&image), "pod", &mut warnings).unwrap();
        assert_eq!(env, [DEFAULT_PATH, "HOSTNAME=pod", "A="]);
        assert_eq!(warnings.len(), 5);
    }

    #[test]
    fn variables_that_config_json_cannot_carry_are_refused() {
        let bad: [(&str, &[u8]); 4] = [("", b"x"), ("A=B", b"x"), ("A", b"\0"), ("A", b"\xff")];
        for (key, value) in bad {
            let mut config = config(&["x"], &[]);
            config.envs = vec![v1::KeyValue { key: key.into(), value: value.into() }];
            let error = env(&config, None, "pod", &mut Vec::new()).unwrap_err();
            assert_eq!(error.field, "envs[0]", "{error}");
        }
    }

    #[test]
    fn the_working_directory_is_absolute() {
        let image = ConfigBuilder::default().working_dir("/image").build().unwrap();
        let mut config = config(&["x"], &[]);
        assert_eq!(cwd(&config, None).unwrap(), "/");
        assert_eq!(cwd(&config, Some(&image)).unwrap(), "/image");
        config.working_dir = "/cri".to_owned();
        assert_eq!(cwd(&config, Some(&image)).unwrap(), "/cri");
        config.working_dir = "relative".to_owned();
        assert_eq!(cwd(&config, Some(&image)).unwrap_err().field, "working_dir");
    }
}
