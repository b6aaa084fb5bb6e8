//! Volumes of a pod in a machine: what kubelet mounts into every container, seen from inside
//! and from outside, and what a guest gets of the host beyond them: nothing.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::Duration;

use pinion_cri_proto::v1::{self, MountPropagation};

use super::{step, wait_for, write};
use crate::cri::{Container, Cri, Pod};
use crate::error::{During, Error, Result, ensure};
use crate::image::catalogue;
use crate::leaks;
use crate::site::Site;

/// Directories and files as kubelet makes them.
#[derive(Debug)]
pub(super) struct Volumes {
    root: PathBuf,
}

impl Volumes {
    pub(super) fn make(site: &Site) -> Result<Self> {
        let this = Self { root: site.scratch.path("volumes") };
        for directory in ["config/..1", "empty", "owned", "elsewhere"] {
            let path = this.path(directory);
            fs::create_dir_all(&path).during(|| format!("create {}", path.display()))?;
        }
        write(&this.path("config/..1/key"), "one")?;
        // As an atomic writer does: names lead through a link that is replaced.
        symlink("..1", this.path("config/..data")).during(|| "link ..data".into())?;
        symlink("..data/key", this.path("config/key")).during(|| "link key".into())?;
        write(&this.path("elsewhere/secret"), "not for guests")?;
        write(&this.path("hosts"), "10.9.8.7 from-kubelet\n")?;
        write(&this.path("termination"), "")?;
        write(&this.path("owned/file"), "mine")?;
        let owned = this.path("owned/file");
        std::os::unix::fs::chown(&owned, Some(1234), Some(5678)).during(|| "chown".into())?;
        fs::set_permissions(&owned, fs::Permissions::from_mode(0o640)).during(|| "chmod".into())?;
        Ok(this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn mount(&self, host: &str, inside: &str, readonly: bool) -> v1::Mount {
        v1::Mount {
            host_path: self.path(host).display().to_string(),
            container_path: inside.into(),
            readonly,
            ..Default::default()
        }
    }

    pub(super) fn mounts(&self) -> Vec<v1::Mount> {
        vec![
            self.mount("config", "/config", true),
            self.mount("empty", "/empty", false),
            self.mount("owned", "/owned", false),
            self.mount("hosts", "/etc/hosts", false),
            self.mount("termination", "/dev/termination-log", false),
        ]
    }

    /// What a container with these mounts sees and does.
    pub(super) fn seen(&self, cri: &Cri, id: &str) -> Result<()> {
        let sh = |script: &str| cri.exec(id, &["sh", "-c", script]);
        let same = |what: &str, found: &str, wanted: &str| {
            ensure(found == wanted, || format!("{what}: {found:?} instead of {wanted:?}"))
        };
        same("/config/key", &sh("cat /config/key")?.stdout, "one")?;
        ensure(sh("echo x > /config/new")?.code != 0, || "/config could be written".into())?;
        ensure(sh("mount -o remount,rw /config; echo x > /config/new")?.code != 0, || {
            "/config could be remounted and written".into()
        })?;
        same("/etc/hosts", &sh("cat /etc/hosts")?.stdout, "10.9.8.7 from-kubelet\n")?;
        sh("echo over > /dev/termination-log; echo written > /empty/new; chmod 4711 /empty/new")?;
        same("termination log", &self.read("termination"), "over\n")?;
        same("emptyDir outside", &self.read("empty/new"), "written\n")?;
        let owner = sh("stat -c '%u %g %a' /owned/file")?.stdout;
        same("owner and mode", &owner, "1234 5678 640\n")?;
        step("volumes: ConfigMap read-only, emptyDir, hosts and termination log, owners kept");
        let next = self.path("config/..2");
        fs::create_dir(&next).during(|| "create ..2".into())?;
        write(&next.join("key"), "two")?;
        symlink("..2", self.path("config/..new")).during(|| "link ..new".into())?;
        fs::rename(self.path("config/..new"), self.path("config/..data"))
            .during(|| "replace ..data".into())?;
        let seen = || sh("cat /config/key").is_ok_and(|said| said.stdout == "two");
        wait_for(seen).map_err(|()| Error::check("the new ConfigMap was not seen"))?;
        step("a ConfigMap that is replaced is seen inside");
        Ok(())
    }

    /// Two containers share a volume; what is lent to one is taken back with it; what the guest
    /// makes in a volume leads nowhere; propagation is refused.
    pub(super) fn confined(
        &self,
        site: &Site,
        cri: &Cri,
        (pod, pod_id): (&Pod, &str),
        first: &str,
    ) -> Result<()> {
        let script = "cat /shared/new; echo of-second > /shared/second";
        let mut other = Container::new("sharer", catalogue::WORKLOAD, &["sh", "-c", script]);
        other.volumes = vec![self.mount("empty", "/shared", false)];
        let other_id = cri.launch(pod_id, pod, &other)?;
        let ended = cri.wait_exited(&other_id, Duration::from_secs(30))?;
        ensure(ended.exit_code == 0, || format!("the sharer ended with {}", ended.exit_code))?;
        ensure(site.log(pod, &other).contains("written"), || "the sharer saw nothing".into())?;
        let said = cri.exec(first, &["cat", "/empty/second"])?.stdout;
        ensure(said == "of-second\n", || format!("the first container sees {said:?}"))?;
        step("two containers share an emptyDir");
        self.hostile(cri, first)?;
        cri.remove_container(&other_id)?;
        let lent = lent()?;
        ensure(lent.iter().all(|name| !name.starts_with(&other_id)), || format!("{lent:?}"))?;
        step("what was lent to a container is taken back with it");
        let mut slave = Container::new("slave", catalogue::WORKLOAD, &["true"]);
        slave.volumes = vec![v1::Mount {
            propagation: MountPropagation::PropagationHostToContainer.into(),
            ..self.mount("empty", "/x", false)
        }];
        match cri.create(pod_id, pod, &slave) {
            Err(Error::Rpc { message, .. }) => {
                ensure(message.contains("propagate") || message.contains("propagation"), || {
                    message.clone()
                })?;
            }
            other => return Err(Error::check(format!("propagation was given: {other:?}"))),
        }
        step("mount propagation: refused");
        Ok(())
    }

    /// Links out of the volume, device nodes, and set-user-id files, made by root inside.
    fn hostile(&self, cri: &Cri, id: &str) -> Result<()> {
        let secret = self.path("elsewhere/secret");
        let links = format!(
            "cd /empty; ln -s {s} a; ln -s ../elsewhere/secret b; ln -s ../../../../../../../..{s} c; \
             mkdir d; mv d/. x 2>/dev/null; cat a b c ../elsewhere/secret 2>/dev/null; \
             mknod disk b 254 0 2>/dev/null; mknod null c 1 3 2>/dev/null; true",
            s = secret.display()
        );
        let said = cri.exec(id, &["sh", "-c", &links])?.stdout;
        ensure(!said.contains("not for guests"), || "the guest read the host's file".into())?;
        for name in ["disk", "null"] {
            let path = self.path("empty").join(name);
            ensure(fs::symlink_metadata(&path).is_err(), || {
                format!("the guest made the device node {}", path.display())
            })?;
        }
        // The server of the files has this tree and nothing else as its root.
        let pid = server()?;
        let names = names(&format!("/proc/{pid}/root"))?;
        let lent = |name: &String| name.contains('-');
        ensure(names.iter().all(lent), || format!("virtiofsd sees {names:?}"))?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))
            .during(|| format!("read the status of {pid}"))?;
        let field = |name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim()
        };
        ensure(field("Seccomp:") == "2", || format!("Seccomp: {}", field("Seccomp:")))?;
        ensure(field("NoNewPrivs:") == "1", || "no_new_privs is not set".into())?;
        let capabilities = u64::from_str_radix(field("CapEff:"), 16).unwrap_or(u64::MAX);
        // CAP_SYS_ADMIN, CAP_MKNOD, CAP_SYS_PTRACE, CAP_NET_ADMIN
        let forbidden = 1 << 21 | 1 << 27 | 1 << 19 | 1 << 12;
        ensure(capabilities & forbidden == 0, || format!("CapEff: {capabilities:x}"))?;
        let host = fs::metadata("/proc/self/ns/mnt").during(|| "stat our namespace".into())?;
        let theirs = fs::metadata(format!("/proc/{pid}/ns/mnt"))
            .during(|| "stat virtiofsd's namespace".into())?;
        ensure(host.ino() != theirs.ino(), || "virtiofsd is in the host's namespace".into())?;
        step("a hostile guest: no link leads out, no device node, nothing else in reach");
        Ok(())
    }
}

/// The process that serves files: the last of those named so, which is in its own namespaces.
fn server() -> Result<u32> {
    leaks::processes_containing(&["virtiofsd", "--shared-dir"])
        .into_iter()
        .max()
        .ok_or_else(|| Error::check("virtiofsd does not run"))
}

/// What is lent now.
fn lent() -> Result<Vec<String>> {
    names(&format!("/proc/{}/root", server()?))
}

fn names(directory: &str) -> Result<Vec<String>> {
    let entries = fs::read_dir(directory).during(|| format!("list {directory}"))?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}
