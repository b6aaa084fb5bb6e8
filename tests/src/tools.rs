//! The Go programs of other projects that the suites drive: critest with its runner, crictl and
//! kubelet.
//!
//! Each is built once, static, from the module that pins its version below `tests/go`, and
//! kept in the cache's `bin`. The modules are embedded, so the harness needs no source tree.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::cache::Cache;
use crate::command;
use crate::error::{During, Error, Result};

const CRI_TOOLS: &str = "sigs.k8s.io/cri-tools";

/// One program and how it is built.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    /// Name in the cache's `bin`.
    pub(crate) name: &'static str,
    module: Module,
    package: &'static str,
    /// The package is a test binary.
    test: bool,
}

#[derive(Debug, Clone, Copy)]
struct Module {
    name: &'static str,
    go_mod: &'static str,
    go_sum: &'static str,
    /// The module whose version is stamped into the program, and the variable for it.
    version: (&'static str, &'static str),
}

const CRI_TOOLS_MODULE: Module = Module {
    name: "cri-tools",
    go_mod: include_str!("../go/cri-tools/go.mod"),
    go_sum: include_str!("../go/cri-tools/go.sum"),
    version: (CRI_TOOLS, "sigs.k8s.io/cri-tools/pkg/version.Version"),
};

/// The conformance suite of CRI.
pub(crate) const CRITEST: Tool = Tool {
    name: "critest",
    module: CRI_TOOLS_MODULE,
    package: "sigs.k8s.io/cri-tools/cmd/critest",
    test: true,
};

/// The command-line client of CRI.
pub(crate) const CRICTL: Tool = Tool {
    name: "crictl",
    module: CRI_TOOLS_MODULE,
    package: "sigs.k8s.io/cri-tools/cmd/crictl",
    test: false,
};

/// The runner that critest starts to run specs in parallel.
pub(crate) const GINKGO: Tool = Tool {
    name: "ginkgo",
    module: CRI_TOOLS_MODULE,
    package: "github.com/onsi/ginkgo/v2/ginkgo",
    test: false,
};

/// Kubernetes' node agent.
pub(crate) const KUBELET: Tool = Tool {
    name: "kubelet",
    module: Module {
        name: "kubelet",
        go_mod: include_str!("../go/kubelet/go.mod"),
        go_sum: include_str!("../go/kubelet/go.sum"),
        version: ("k8s.io/kubernetes", "k8s.io/component-base/version.gitVersion"),
    },
    package: "k8s.io/kubernetes/cmd/kubelet",
    test: false,
};

/// The path of a tool, built on first use.
pub(crate) fn build(cache: &Cache, tool: &Tool) -> Result<PathBuf> {
    let program = cache.path("bin").join(tool.name);
    let stamp = cache.path("bin").join(format!(".{}.go.sum", tool.name));
    let key = format!("{}{}", tool.module.go_mod, tool.module.go_sum);
    let _lock = cache.lock(tool.name)?;
    if program.exists() && fs::read_to_string(&stamp).is_ok_and(|have| have == key) {
        return Ok(program);
    }
    let started = Instant::now();
    eprintln!("building {} with Go", tool.name);
    let dir = cache.path("go").join(tool.module.name);
    for dir in [dir.as_path(), &cache.path("bin")] {
        fs::create_dir_all(dir).during(|| format!("create {}", dir.display()))?;
    }
    write(&dir.join("go.mod"), tool.module.go_mod)?;
    write(&dir.join("go.sum"), tool.module.go_sum)?;
    let mut go = Command::new(go_program()?);
    go.current_dir(&dir).env("CGO_ENABLED", "0").env("GOFLAGS", "-mod=mod -buildvcs=false");
    if tool.test {
        go.args(["test", "-c"]);
    } else {
        go.arg("build");
    }
    let flags = format!("-s -w {}", version_flag(&tool.module));
    go.args(["-trimpath", "-ldflags", &flags, "-o"]).arg(&program).arg(tool.package);
    command::run(&mut go)?;
    write(&stamp, &key)?;
    eprintln!("built {} in {:.0} s", tool.name, started.elapsed().as_secs_f32());
    Ok(program)
}

/// Stamps the version that go.mod pins.
fn version_flag(module: &Module) -> String {
    let (path, variable) = module.version;
    let version = module.go_mod.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word != path).skip(1);
        words.next().filter(|word| word.starts_with('v'))
    });
    version.map(|version| format!("-X {variable}={version}")).unwrap_or_default()
}

fn go_program() -> Result<PathBuf> {
    if command::exists("go") {
        return Ok("go".into());
    }
    let usual = PathBuf::from("/usr/local/go/bin/go");
    if usual.exists() {
        return Ok(usual);
    }
    Err(Error::check("Go is missing: install 1.21 or newer, it fetches the version go.mod names"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).during(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_stamped_is_the_one_that_go_mod_pins() {
        assert!(version_flag(&KUBELET.module).contains("gitVersion=v1.36."));
        assert!(version_flag(&CRI_TOOLS_MODULE).ends_with("version.Version=v1.37.0"));
    }
}
