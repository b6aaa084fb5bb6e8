//! Network configuration lists: which one is in force, and whether it is sound.
//!
//! The lexically first `*.conflist`, `*.conf` or `*.json` of the directory is the pod network,
//! as for every other runtime. It is read anew at each use: a file dropped in takes effect at
//! once, and there is no cache that could be stale.

use super::Version;
use crate::error::NetworkError;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::io;
use std::path::{Path, PathBuf};

/// Larger files are taken for a mistake.
const MAX_BYTES: u64 = 1 << 20;
const SUFFIXES: [&str; 3] = ["conf", "conflist", "json"];

/// A network: a chain of plugins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkList {
    /// Version spoken with the plugins.
    pub version: Version,
    /// Network name.
    pub name: String,
    /// CHECK must not be called.
    pub disable_check: bool,
    /// The chain, in ADD order.
    pub plugins: Vec<PluginConfig>,
}

/// One plugin of a chain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PluginConfig {
    /// `type`: name of the binary.
    pub kind: String,
    /// The whole object as written by the administrator.
    pub object: Map<String, Value>,
}

impl PluginConfig {
    fn parse(value: &Value, place: &str) -> Result<Self, String> {
        let object = value.as_object().ok_or_else(|| format!("{place} is not an object"))?;
        let kind = object.get("type").and_then(Value::as_str);
        let kind = kind.ok_or_else(|| format!("{place} has no \"type\""))?;
        check_type(kind).map_err(|reason| format!("{place}: {reason}"))?;
        if let Some(ipam) = ipam_type(object) {
            check_type(ipam).map_err(|reason| format!("{place}.ipam: {reason}"))?;
        }
        Ok(Self { kind: kind.to_owned(), object: object.clone() })
    }

    /// `ipam.type`, the binary this plugin delegates addresses to.
    pub fn ipam(&self) -> Option<&str> {
        ipam_type(&self.object)
    }

    /// Whether the plugin asked for a capability's data.
    pub fn wants(&self, capability: &str) -> bool {
        let granted = self.object.get("capabilities").and_then(|all| all.get(capability));
        granted.and_then(Value::as_bool) == Some(true)
    }
}

fn ipam_type(object: &Map<String, Value>) -> Option<&str> {
    object.get("ipam")?.get("type")?.as_str().filter(|kind| !kind.is_empty())
}

/// A plugin is a file of the plugin directories and nothing else (CVE-2021-20206).
pub(crate) fn check_type(kind: &str) -> Result<(), String> {
    let odd = |c: char| c == '/' || c == '\\' || c.is_control();
    if kind.is_empty() || kind == "." || kind == ".." || kind.contains(odd) {
        return Err(format!("type {kind:?} is not the name of a plugin"));
    }
    Ok(())
}

/// The network in force in `dir`; `None` when there is no configuration.
///
/// # Errors
/// The first file in order is the network even if it is broken: falling through to the next
/// one would attach pods to a network the administrator did not mean.
pub fn load(dir: &Path) -> Result<Option<(PathBuf, NetworkList)>, NetworkError> {
    let Some(path) = files(dir)?.into_iter().next() else { return Ok(None) };
    let bytes = read(&path)?;
    let single = path.extension().is_none_or(|suffix| suffix != "conflist");
    let bad = |reason| NetworkError::BadConfig { path: path.clone(), reason };
    let mut list = parse(&bytes, single).map_err(bad)?;
    if list.load_more {
        append(dir, &mut list.network)?;
    }
    if list.network.plugins.is_empty() {
        return Err(bad("\"plugins\" is empty".to_owned()));
    }
    Ok(Some((path, list.network)))
}

/// Configuration files of `dir`, in lexical order; a directory that does not exist has none.
fn files(dir: &Path) -> Result<Vec<PathBuf>, NetworkError> {
    let failed = |source| NetworkError::ReadConfig { path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let suffix = path.extension().and_then(|suffix| suffix.to_str());
        if suffix.is_some_and(|suffix| SUFFIXES.contains(&suffix)) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>, NetworkError> {
    let failed = |source| NetworkError::ReadConfig { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > MAX_BYTES {
        let reason = format!("{length} bytes are more than a configuration has");
        return Err(NetworkError::BadConfig { path: path.to_owned(), reason });
    }
    std::fs::read(path).map_err(failed)
}

struct Parsed {
    network: NetworkList,
    /// Plugins may come from `<dir>/<name>/*.conf` too (CNI 1.1).
    load_more: bool,
}

/// `single`: a `.conf` with one plugin, unless it has a `plugins` member after all.
fn parse(bytes: &[u8], single: bool) -> Result<Parsed, String> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let object = value.as_object().ok_or("not a JSON object")?;
    let name = object.get("name").and_then(Value::as_str).unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(plain) {
        return Err(format!("\"name\" {name:?} is no network name"));
    }
    let flag = |key: &str| object.get(key).and_then(Value::as_bool) == Some(true);
    let plugins = match object.get("plugins") {
        Some(Value::Array(list)) => list
            .iter()
            .enumerate()
            .map(|(index, plugin)| PluginConfig::parse(plugin, &format!("plugins[{index}]")))
            .collect::<Result<Vec<_>, _>>()?,
        Some(_) => return Err("\"plugins\" is not a list".to_owned()),
        None if single => vec![PluginConfig::parse(&value, "the configuration")?],
        None => Vec::new(),
    };
    let network = NetworkList {
        version: version(object)?,
        name: name.to_owned(),
        disable_check: flag("disableCheck"),
        plugins,
    };
    Ok(Parsed { network, load_more: !single && !flag("loadOnlyInlinedPlugins") })
}

/// The newest version of `cniVersions` and `cniVersion` that is spoken here.
fn version(object: &Map<String, Value>) -> Result<Version, String> {
    let listed = object.get("cniVersions").and_then(Value::as_array);
    let listed = listed.into_iter().flatten().filter_map(Value::as_str);
    let best = listed.filter_map(|text| text.parse().ok()).max();
    match (object.get("cniVersion").and_then(Value::as_str), best) {
        (None, None) => Err("\"cniVersion\" is missing".to_owned()),
        (None, Some(best)) => Ok(best),
        (Some(text), best) => match text.parse::<Version>() {
            Ok(version) => Ok(best.map_or(version, |best| best.max(version))),
            Err(reason) => best.ok_or(reason),
        },
    }
}

/// Adds the plugins of the folder named after the network.
fn append(dir: &Path, network: &mut NetworkList) -> Result<(), NetworkError> {
    for path in files(&dir.join(&network.name))? {
        let bad = |reason| NetworkError::BadConfig { path: path.clone(), reason };
        let value: Value =
            serde_json::from_slice(&read(&path)?).map_err(|error| bad(error.to_string()))?;
        network.plugins.push(PluginConfig::parse(&value, "the plugin").map_err(bad)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    fn one(name: &str, text: &str) -> Result<NetworkList, String> {
        let dir = dir(&[(name, text)]);
        load(dir.path()).map(|found| found.unwrap().1).map_err(|error| error.to_string())
    }

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"net","disableCheck":true,"plugins":[
        {"type":"bridge","ipam":{"type":"host-local"}},
        {"type":"portmap","capabilities":{"portMappings":true,"x":false}}]}"#;

    #[test]
    fn a_list_is_read_whole() {
        let list = one("10-net.conflist", LIST).unwrap();
        assert_eq!((list.version, list.name.as_str()), (Version::V1_0_0, "net"));
        assert!(list.disable_check);
        assert_eq!(list.plugins[0].ipam(), Some("host-local"));
        assert!(list.plugins[1].wants("portMappings"));
        assert!(!list.plugins[1].wants("x") && !list.plugins[0].wants("portMappings"));
    }

    #[test]
    fn a_single_plugin_is_a_list_of_one() {
        let list = one("a.conf", r#"{"cniVersion":"0.4.0","name":"n","type":"ptp"}"#).unwrap();
        assert_eq!(list.plugins.len(), 1);
        assert_eq!(list.plugins[0].kind, "ptp");
    }

    #[test]
    fn no_directory_and_no_file_mean_no_network() {
        assert!(load(Path::new("/no/such/dir")).unwrap().is_none());
        assert!(load(dir(&[("readme.txt", "x"), ("x.conf.bak", "x")]).path()).unwrap().is_none());
    }

    #[test]
    fn the_lexically_first_file_is_the_network_even_if_broken() {
        let both = dir(&[("20-b.conflist", LIST), ("10-a.conf", "{")]);
        let error = load(both.path()).unwrap_err().to_string();
        assert!(error.contains("10-a.conf") && error.contains("line 1"), "{error}");
    }

    #[test]
    fn defects_are_named() {
        for (text, part) in [
            ("", "EOF"),
            ("[]", "not a JSON object"),
            (r#"{"cniVersion":"1.0.0","plugins":[]}"#, "\"name\""),
            (r#"{"cniVersion":"1.0.0","name":"../x","plugins":[]}"#, "no network name"),
            (r#"{"cniVersion":"1.0.0","name":"n"}"#, "empty"),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":{}}"#, "not a list"),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":[{}]}"#, "plugins[0] has no \"type\""),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"../../bin/sh"}]}"#,
                "not the name",
            ),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":""}]}"#, "not the name"),
            (r#"{"name":"n","plugins":[{"type":"x"}]}"#, "cniVersion"),
            (r#"{"cniVersion":"0.1.0","name":"n","plugins":[{"type":"x"}]}"#, "0.1.0"),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"x","ipam":{"type":"a/b"}}]}"#,
                "ipam",
            ),
        ] {
            let error = one("x.conflist", text).unwrap_err();
            assert!(error.contains(part) && error.contains("x.conflist"), "{error}: {part}");
        }
    }

    #[test]
    fn the_newest_common_version_is_spoken() {
        let speak = |versions: &str| {
            let text = format!(r#"{{{versions},"name":"n","plugins":[{{"type":"x"}}]}}"#);
            one("x.conflist", &text).map(|list| list.version)
        };
        assert_eq!(speak(r#""cniVersions":["0.4.0","1.1.0","7.0.0"]"#), Ok(Version::V1_1_0));
        assert_eq!(speak(r#""cniVersion":"1.0.0","cniVersions":["0.4.0"]"#), Ok(Version::V1_0_0));
        assert_eq!(speak(r#""cniVersion":"9.0.0","cniVersions":["1.0.0"]"#), Ok(Version::V1_0_0));
    }

    #[test]
    fn plugins_from_the_network_s_folder_are_appended_unless_forbidden() {
        let more = [("10.conflist", LIST), ("net/50-tune.conf", r#"{"type":"tuning"}"#)];
        let (_, list) = load(dir(&more).path()).unwrap().unwrap();
        assert_eq!(list.plugins[2].kind, "tuning");
        let closed = LIST.replacen('{', r#"{"loadOnlyInlinedPlugins":true,"#, 1);
        let only = [("10.conflist", closed.as_str()), more[1]];
        assert_eq!(load(dir(&only).path()).unwrap().unwrap().1.plugins.len(), 2);
    }
}
