//! The files of the CDI directories, read with suspicion and again when they change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags};

use super::name::QualifiedName;
use super::spec::{Edits, Format, Spec};

/// Vendors' files are some kilobytes; one with every function of a large node is below this.
const LARGEST: u64 = 1 << 20;
const MOST_FILES: usize = 1024;

/// What a file looked like when it was read.
type Fingerprint = BTreeMap<PathBuf, (u64, u64, Option<SystemTime>)>;

/// The devices on offer.
#[derive(Debug, Default)]
pub struct Registry {
    dirs: Vec<PathBuf>,
    seen: Option<Fingerprint>,
    specs: Vec<Spec>,
    devices: BTreeMap<String, (usize, usize)>,
    errors: BTreeMap<PathBuf, Vec<String>>,
}

/// Devices that cannot be given, each with what is known about why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CDI devices that cannot be resolved: {}", .0.join("; "))]
pub struct ResolveError(pub Vec<String>);

impl Registry {
    /// A registry over directories by rising priority. Nothing is read yet.
    #[must_use]
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self { dirs, ..Self::default() }
    }

    /// The qualified names of all devices, after a look at the directories.
    pub fn devices(&mut self) -> Vec<String> {
        self.refresh();
        self.devices.keys().cloned().collect()
    }

    /// What is wrong, by file or directory, as of the last look.
    #[must_use]
    pub fn errors(&self) -> &BTreeMap<PathBuf, Vec<String>> {
        &self.errors
    }

    /// The edits for these devices: those of each file once, before its first device's.
    pub fn resolve(&mut self, names: &[QualifiedName]) -> Result<Edits, ResolveError> {
        self.refresh();
        let mut edits = Edits::default();
        let mut files = BTreeSet::new();
        let mut missing = Vec::new();
        for name in names {
            let found = self.devices.get(&name.to_string()).and_then(|&(file, device)| {
                let spec = self.specs.get(file)?;
                Some((file, spec, spec.devices.get(device)?))
            });
            let Some((file, spec, device)) = found else {
                missing.push(self.explain(name));
                continue;
            };
            if files.insert(file) {
                edits.append(&spec.container_edits);
            }
            edits.append(&device.container_edits);
        }
        if missing.is_empty() { Ok(edits) } else { Err(ResolveError(missing)) }
    }

    fn explain(&self, name: &QualifiedName) -> String {
        let text = name.to_string();
        let conflict = self.errors.values().flatten().find(|error| error.contains(&text));
        if let Some(conflict) = conflict {
            return conflict.clone();
        }
        let kind =
            |known: &&String| known.split_once('=').is_some_and(|(kind, _)| kind == name.kind);
        let of_kind: Vec<&str> =
            self.devices.keys().filter(kind).map(String::as_str).take(8).collect();
        let dirs: Vec<String> = self.dirs.iter().map(|dir| dir.display().to_string()).collect();
        if of_kind.is_empty() {
            let bad = match self.errors.len() {
                0 => String::new(),
                n => format!(" ({n} bad files there)"),
            };
            return format!("{name}: no file in {} has kind {}{bad}", dirs.join(", "), name.kind);
        }
        format!("{name}: its kind has {}", of_kind.join(", "))
    }

    /// Reads everything again if a directory or a file is not what it was.
    fn refresh(&mut self) {
        let mut errors: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
        let mut files = Vec::new();
        for (priority, dir) in self.dirs.iter().enumerate() {
            match list(dir) {
                Ok(found) => files.extend(found.into_iter().map(|path| (priority, path))),
                Err(error) => errors.entry(dir.clone()).or_default().push(error),
            }
        }
        let look = |path: &PathBuf| {
            let meta = fs::symlink_metadata(path).ok()?;
            Some((path.clone(), (meta.ino(), meta.len(), meta.modified().ok())))
        };
        let now: Fingerprint = files.iter().filter_map(|(_, path)| look(path)).collect();
        if errors.is_empty() && self.seen.as_ref() == Some(&now) {
            return;
        }
        self.specs.clear();
        let mut offers: BTreeMap<String, Vec<Offer>> = BTreeMap::new();
        for (priority, path) in files {
            match read(&path) {
                Ok(spec) => {
                    for (device, entry) in spec.devices.iter().enumerate() {
                        let name = format!("{}={}", spec.kind, entry.name);
                        let at = (self.specs.len(), device);
                        offers.entry(name).or_default().push(Offer {
                            priority,
                            path: path.clone(),
                            at,
                        });
                    }
                    self.specs.push(spec);
                }
                Err(error) => errors.entry(path).or_default().push(error),
            }
        }
        self.devices.clear();
        for (name, offers) in offers {
            let highest = offers.iter().map(|offer| offer.priority).max();
            let best: Vec<&Offer> =
                offers.iter().filter(|offer| Some(offer.priority) == highest).collect();
            if let [only] = best.as_slice() {
                self.devices.insert(name, only.at);
                continue;
            }
            let paths: Vec<String> = best.iter().map(|o| o.path.display().to_string()).collect();
            let conflict = format!("conflicting device {name}: {} have it", paths.join(" and "));
            for offer in best {
                errors.entry(offer.path.clone()).or_default().push(conflict.clone());
            }
        }
        self.errors = errors;
        self.seen = Some(now);
    }
}

/// A file that has a device.
struct Offer {
    priority: usize,
    path: PathBuf,
    at: (usize, usize),
}

fn format(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "json" => Some(Format::Json),
        "yaml" => Some(Format::Yaml),
        _ => None,
    }
}

/// The files of a directory that end in .json or .yaml, by name.
fn list(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("list it: {error}")),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| format!("list it: {error}"))?.path();
        files.extend(format(&path).map(|_| path));
        if files.len() > MOST_FILES {
            return Err(format!("more than {MOST_FILES} files"));
        }
    }
    files.sort();
    Ok(files)
}

/// A file may run programs as root for every container that asks for its devices: it must be
/// a regular file that root alone can write.
fn read(path: &Path) -> Result<Spec, String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::LOOP) => return Err("it is a symbolic link".into()),
        Err(error) => return Err(format!("open it: {error}")),
    };
    let meta = file.metadata().map_err(|error| format!("stat it: {error}"))?;
    if !meta.is_file() {
        return Err("it is not a regular file".into());
    }
    if meta.uid() != 0 && meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(format!("it belongs to user {}, not to root", meta.uid()));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(format!("others than root may write it (mode {:o})", meta.mode() & 0o7777));
    }
    let mut text = String::new();
    let length = file.take(LARGEST + 1).read_to_string(&mut text);
    let length = length.map_err(|error| format!("read it: {error}"))?;
    if length as u64 > LARGEST {
        return Err(format!("it is larger than {LARGEST} bytes"));
    }
    let format = format(path).ok_or("it is neither .json nor .yaml")?;
    Spec::parse(&text, format).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    struct Dirs(tempfile::TempDir);

    impl Dirs {
        fn new() -> Self {
            let dirs = Self(tempfile::tempdir().unwrap());
            for name in ["etc", "run"] {
                fs::create_dir(dirs.path(name)).unwrap();
            }
            dirs
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn registry(&self) -> Registry {
            Registry::new(vec![self.path("etc"), self.path("run"), self.path("not-there")])
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.path(name), text).unwrap();
            fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o644)).unwrap();
        }

        fn device(&self, name: &str, env: &str) {
            self.write(
                name,
                &format!(
                    r#"{{"cdiVersion": "0.5.0", "kind": "v.com/c", "devices": [
                        {{"name": "d", "containerEdits": {{"env": ["WHO={env}"]}}}},
                        {{"name": "{env}", "containerEdits": {{"env": ["ALSO={env}"]}}}}],
                        "containerEdits": {{"env": ["FILE={env}"]}}}}"#
                ),
            );
        }
    }

    fn env(registry: &mut Registry, names: &[&str]) -> Result<Vec<String>, ResolveError> {
        let names: Vec<QualifiedName> = names.iter().map(|name| name.parse().unwrap()).collect();
        registry.resolve(&names).map(|edits| edits.env)
    }

    #[test]
    fn the_later_directory_wins_and_a_tie_is_a_conflict() {
        let dirs = Dirs::new();
        let mut registry = dirs.registry();
        dirs.device("etc/a.json", "low");
        assert_eq!(env(&mut registry, &["v.com/c=d"]).unwrap(), ["FILE=low", "WHO=low"]);
        dirs.device("run/a.json", "high");
        assert_eq!(env(&mut registry, &["v.com/c=d"]).unwrap(), ["FILE=high", "WHO=high"]);
        dirs.device("run/b.json", "tie");
        let error = env(&mut registry, &["v.com/c=d"]).unwrap_err().to_string();
        assert!(error.contains("run/a.json") && error.contains("run/b.json"), "{error}");
        assert!(env(&mut registry, &["v.com/c=tie"]).is_ok(), "its other device is no conflict");
        fs::remove_file(dirs.path("run/b.json")).unwrap();
        assert!(env(&mut registry, &["v.com/c=d"]).is_ok());
        assert!(registry.errors().is_empty());
    }

    #[test]
    fn a_files_own_edits_come_once() {
        let dirs = Dirs::new();
        dirs.device("etc/a.json", "x");
        let mut registry = dirs.registry();
        let both = env(&mut registry, &["v.com/c=x", "v.com/c=d"]).unwrap();
        assert_eq!(both, ["FILE=x", "ALSO=x", "WHO=x"]);
        assert_eq!(registry.devices(), ["v.com/c=d", "v.com/c=x"]);
    }

    #[test]
    fn a_bad_file_costs_only_its_own_devices_and_is_named() {
        let dirs = Dirs::new();
        dirs.device("etc/good.json", "x");
        dirs.write("etc/bad.json", "{");
        dirs.write("etc/bad.yaml", "kind: [");
        dirs.write("etc/ignored.txt", "{");
        dirs.write("etc/huge.json", &" ".repeat(2 << 20));
        dirs.device("etc/loose.json", "loose");
        fs::set_permissions(dirs.path("etc/loose.json"), fs::Permissions::from_mode(0o666))
            .unwrap();
        symlink("/dev/zero", dirs.path("etc/link.json")).unwrap();
        fs::create_dir(dirs.path("etc/dir.json")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dirs.path("etc/fifo.json"),
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let mut registry = dirs.registry();
        assert!(env(&mut registry, &["v.com/c=d"]).is_ok());
        let names: Vec<String> = registry
            .errors()
            .keys()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        let expected = [
            "bad.json",
            "bad.yaml",
            "dir.json",
            "fifo.json",
            "huge.json",
            "link.json",
            "loose.json",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn unknown_devices_are_explained() {
        let dirs = Dirs::new();
        dirs.device("etc/a.json", "x");
        let mut registry = dirs.registry();
        let error = env(&mut registry, &["v.com/c=none", "w.com/c=d"]).unwrap_err();
        assert_eq!(error.0[0], "v.com/c=none: its kind has v.com/c=d, v.com/c=x");
        assert!(error.0[1].contains("has kind w.com/c"), "{}", error.0[1]);
    }
}
