//! Plugins that lie in the plugin directory and are started by the server.
//!
//! A file `NN-name` that may be executed is started with one end of a socket pair as descriptor
//! 3 and told so in its environment; it gets nothing else of the server's.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::net::UnixStream;
use tokio::process::Command;

use crate::plugin::Launched;
use crate::plugins::Config;

/// A plugin's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) index: String,
    pub(crate) name: String,
    path: PathBuf,
}

/// The plugins in a directory, in order; none if there is no directory. What is not called like
/// a plugin is left alone.
pub(crate) fn find(directory: &Path) -> io::Result<Vec<Found>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let Some((index, name)) = path.file_name().and_then(|n| n.to_str()?.split_once('-')) else {
            continue;
        };
        let runnable = fs::metadata(&path)
            .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
        if runnable && index.len() == 2 && index.bytes().all(|b| b.is_ascii_digit()) {
            found.push(Found { index: index.into(), name: name.into(), path: path.clone() });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// The plugin's own configuration: `NN-name.conf`, else `name.conf`; empty without one.
fn settings(directory: &Path, found: &Found) -> io::Result<String> {
    let names = [format!("{}-{}.conf", found.index, found.name), format!("{}.conf", found.name)];
    for name in names {
        match fs::read_to_string(directory.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
    }
    Ok(String::new())
}

/// Starts a plugin.
pub(crate) fn start(config: &Config, found: &Found) -> io::Result<(UnixStream, Launched)> {
    let settings = settings(&config.plugin_config_dir, found)?;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    // The shell that becomes the plugin moves it from its standard input to descriptor 3, so
    // that no other child of ours can inherit it.
    let process = Command::new("/bin/sh")
        .arg("-c")
        .arg("exec \"$0\" 3<&0 </dev/null")
        .arg(&found.path)
        .env_clear()
        .env("NRI_PLUGIN_NAME", &found.name)
        .env("NRI_PLUGIN_IDX", &found.index)
        .env("NRI_PLUGIN_SOCKET", "3")
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let launched =
        Launched { index: found.index.clone(), name: found.name.clone(), settings, process };
    Ok((UnixStream::from_std(ours)?, launched))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(directory: &Path, name: &str, mode: u32) {
        let path = directory.join(name);
        fs::write(&path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn only_files_called_like_plugins_are_started_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for (name, mode) in [
            ("20-b", 0o755),
            ("10-a", 0o755),
            ("30-data", 0o644),
            ("x0-c", 0o755),
            ("README", 0o755),
        ] {
            program(dir.path(), name, mode);
        }
        fs::create_dir(dir.path().join("40-dir")).unwrap();
        let found = find(dir.path()).unwrap();
        let names: Vec<_> = found.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(find(&dir.path().join("absent")).unwrap(), []);
    }

    #[test]
    fn the_more_exact_configuration_counts() {
        let dir = tempfile::tempdir().unwrap();
        let found = Found { index: "10".into(), name: "a".into(), path: PathBuf::new() };
        assert_eq!(settings(dir.path(), &found).unwrap(), "");
        fs::write(dir.path().join("a.conf"), "general").unwrap();
        assert_eq!(settings(dir.path(), &found).unwrap(), "general");
        fs::write(dir.path().join("10-a.conf"), "exact").unwrap();
        assert_eq!(settings(dir.path(), &found).unwrap(), "exact");
    }
}
