//! Files out of Debian's packages, without installing anything.
//!
//! A *tree* is a directory into which packages were unpacked with `dpkg -x`. It is resolved
//! by apt against an empty package database, so it holds the whole closure, libc included,
//! and its programs run on any machine through the tree's own dynamic loader. The apt state
//! (lists, cache, sources) is private; only the mirror is taken from the machine's sources.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Cache;
use crate::command;
use crate::error::{During, Error, Result, ensure};

const RELEASE: &str = "bookworm";
/// Debian's next release, for what [`RELEASE`] does not have.
const NEXT: &str = "trixie";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const LIBRARY_DIRS: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// What a tree is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec<'a> {
    /// Name of the cache entry.
    pub(crate) name: &'a str,
    /// The packages asked for.
    pub(crate) packages: &'a [&'a str],
    /// Takes packages from backports where they are there.
    pub(crate) backports: bool,
    /// Takes packages from Debian's next release.
    pub(crate) next: bool,
    /// Also unpacks what the packages depend on.
    pub(crate) closure: bool,
    /// Dependencies left out, by the start of the package's name: only their maintainer
    /// scripts need them.
    pub(crate) without: &'a [&'a str],
}

/// An unpacked tree.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    /// Where it is.
    pub(crate) root: PathBuf,
}

impl Tree {
    /// A path inside the tree; the program is looked for in both /usr and /.
    pub(crate) fn find(&self, relative: &str) -> Result<PathBuf> {
        let relative = relative.trim_start_matches('/');
        [self.root.join(relative), self.root.join("usr").join(relative)]
            .into_iter()
            .find(|path| path.exists())
            .ok_or_else(|| Error::check(format!("{} lacks {relative}", self.root.display())))
    }

    /// A command that runs a program of the tree with the tree's own libraries.
    pub(crate) fn command(&self, program: &str) -> Result<Command> {
        let mut command = self.loader()?;
        command.arg(self.find(program)?);
        Ok(command)
    }

    /// The same for a program that looks at the name it was called by.
    pub(crate) fn command_named(&self, program: &str, name: &str) -> Result<Command> {
        let mut command = self.loader()?;
        command.arg("--argv0").arg(name).arg(self.find(program)?);
        Ok(command)
    }

    /// The libraries a program of the tree loads: name as in the tree, and the file.
    pub(crate) fn libraries(&self, program: &Path) -> Result<BTreeMap<String, PathBuf>> {
        let listing = command::text(self.loader()?.arg("--list").arg(program))?;
        let paths = listing.lines().filter_map(|line| {
            let path = line.split_once("=>").map_or(line, |(_, path)| path);
            path.split_whitespace().next().filter(|path| path.starts_with('/'))
        });
        Ok(paths
            .filter_map(|path| {
                let path = PathBuf::from(path);
                let inside = path.strip_prefix(&self.root).ok()?.to_string_lossy().into_owned();
                Some((inside, path))
            })
            .collect())
    }

    /// The tree's dynamic loader, told where the tree's libraries are.
    fn loader(&self) -> Result<Command> {
        let path = LIBRARY_DIRS
            .iter()
            .map(|dir| self.root.join(dir).to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(":");
        let loader = self.find("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")?;
        let mut command = Command::new(loader);
        command.arg("--library-path").arg(path);
        Ok(command)
    }
}

/// Makes trees from Debian's archive.
#[derive(Debug)]
pub(crate) struct Archive<'a> {
    cache: &'a Cache,
}

impl<'a> Archive<'a> {
    /// The archive whose trees live in `cache`.
    pub(crate) fn new(cache: &'a Cache) -> Self {
        Self { cache }
    }

    /// The tree, unpacked on first use.
    pub(crate) fn tree(&self, spec: &Spec<'_>) -> Result<Tree> {
        // Trees that were made before there was a choice are still good.
        let made_of = format!("{spec:?}").replace("next: false, ", "");
        let root = self.cache.entry(&format!("debian/{}", spec.name), &made_of, {
            |dir| {
                eprintln!("fetching {} from Debian", spec.packages.join(" "));
                let debs = self.download(spec)?;
                ensure(!debs.is_empty(), || format!("apt offers nothing for {spec:?}"))?;
                for deb in debs {
                    command::run(Command::new("dpkg").arg("-x").arg(&deb).arg(dir))?;
                }
                for useless in ["doc", "man", "locale", "info", "lintian", "bash-completion"] {
                    crate::cache::remove_tree(&dir.join("usr/share").join(useless))?;
                }
                Ok(())
            }
        })?;
        Ok(Tree { root })
    }

    /// The package a meta package of backports stands for, such as the kernel's.
    pub(crate) fn first_dependency(&self, meta: &str) -> Result<String> {
        let state = self.state(false)?;
        let _lock = self.cache.lock("apt")?;
        self.update(&state)?;
        let shown = command::text(
            apt(&state, "apt-cache").arg("show").arg(format!("{meta}/{RELEASE}-backports")),
        )?;
        shown
            .lines()
            .find_map(|line| line.strip_prefix("Depends: ")?.split([' ', ',']).next())
            .map(str::to_owned)
            .ok_or_else(|| Error::check(format!("{meta} of {RELEASE}-backports has no Depends")))
    }

    fn download(&self, spec: &Spec<'_>) -> Result<Vec<PathBuf>> {
        let state = self.state(spec.next)?;
        let _lock = self.cache.lock("apt")?;
        self.update(&state)?;
        let debs = state.join("debs");
        crate::cache::remove_tree(&debs)?;
        fs::create_dir_all(debs.join("partial")).during(|| format!("create {}", debs.display()))?;
        let mut get = apt(&state, "apt-get");
        if spec.backports {
            get.args(["-t", &format!("{RELEASE}-backports")]);
        }
        if spec.closure {
            get.args(["install", "--download-only", "--no-install-recommends", "-y", "-qq"]);
        } else {
            get.args(["download", "-qq"]).current_dir(&debs);
        }
        command::run(get.args(spec.packages))?;
        let listing = fs::read_dir(&debs).during(|| format!("list {}", debs.display()))?;
        let mut found: Vec<PathBuf> = listing
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|ext| ext == "deb"))
            .filter(|path| !left_out(path, spec.without))
            .collect();
        found.sort();
        Ok(found)
    }

    fn state(&self, next: bool) -> Result<PathBuf> {
        let state = self.cache.path(if next { "apt-next" } else { "apt" });
        let release = if next { NEXT } else { RELEASE };
        let suites: &[&str] = if next { &[""] } else { &["", "-updates", "-backports"] };
        for dir in ["lists/partial", "debs/partial"] {
            fs::create_dir_all(state.join(dir)).during(|| format!("create apt/{dir}"))?;
        }
        let mirror = machine_mirror()?;
        let sources: String = suites
            .iter()
            .map(|suite| format!("deb [signed-by={KEYRING}] {mirror} {release}{suite} main\n"))
            .collect();
        for (name, text) in [("sources.list", sources.as_str()), ("status", "")] {
            let path = state.join(name);
            fs::write(&path, text).during(|| format!("write {}", path.display()))?;
        }
        Ok(state)
    }

    /// Reads the package lists, at most once per hour.
    fn update(&self, state: &Path) -> Result<()> {
        let stamp = state.join("updated");
        let age = fs::metadata(&stamp).and_then(|meta| meta.modified()).ok();
        if age.and_then(|time| time.elapsed().ok()).is_some_and(|age| age.as_secs() < 3600) {
            return Ok(());
        }
        command::run(apt(state, "apt-get").args(["-qq", "update"]))?;
        fs::write(&stamp, "").during(|| format!("write {}", stamp.display()))
    }
}

/// An apt command that sees only our sources and an empty package database.
fn apt(state: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
    let at = |name: &str| state.join(name).to_string_lossy().into_owned();
    for (key, value) in [
        ("Dir::Etc::sourcelist", at("sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null".into()),
        ("Dir::State::status", at("status")),
        ("Dir::State::lists", at("lists")),
        ("Dir::Cache::archives", at("debs")),
        ("Dir::Cache::pkgcache", at("pkgcache.bin")),
        ("Dir::Cache::srcpkgcache", at("srcpkgcache.bin")),
        ("APT::Sandbox::User", "root".into()),
        ("Debug::NoLocking", "1".into()),
    ] {
        command.arg("-o").arg(format!("{key}={value}"));
    }
    command
}

fn left_out(deb: &Path, without: &[&str]) -> bool {
    let name = deb.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    without.iter().any(|start| name.starts_with(start))
}

/// The Debian mirror this machine already uses.
fn machine_mirror() -> Result<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(listing) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(listing.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .find_map(|text| mirror_in(&text))
        .ok_or_else(|| Error::check("no Debian mirror in /etc/apt/sources.list or sources.list.d"))
}

/// The first URI of a sources file (one-line or deb822 style) that is a Debian archive.
fn mirror_in(sources: &str) -> Option<String> {
    sources
        .lines()
        .filter(|line| line.starts_with("URIs:") || line.starts_with("deb "))
        .flat_map(str::split_whitespace)
        .find(|word| {
            let archive = word.trim_end_matches('/');
            (word.starts_with("http://") || word.starts_with("https://"))
                && archive.ends_with("/debian")
        })
        .map(|word| word.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_read_from_both_styles_of_sources() {
        let modern = "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\n";
        assert_eq!(mirror_in(modern).as_deref(), Some("http://mirror.example/debian"));
        let classic = "# x\ndeb [arch=amd64] https://m.example/debian/ bookworm main\n";
        assert_eq!(mirror_in(classic).as_deref(), Some("https://m.example/debian"));
        assert_eq!(mirror_in("URIs: http://mirror.example/debian-security\n"), None);
    }

    #[test]
    fn dependencies_of_maintainer_scripts_are_left_out_by_name() {
        assert!(left_out(Path::new("/x/perl-base_5.36_amd64.deb"), &["perl"]));
        assert!(!left_out(Path::new("/x/procps_4.0_amd64.deb"), &["perl"]));
    }
}
