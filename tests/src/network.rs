//! A CNI network for one site. Sites may run side by side, so each takes a number of its
//! own, which gives bridge and addresses; a lock holds it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};
use serde_json::json;

use crate::command;
use crate::error::{During, Error, Result};

const LOCKS: &str = "/run/pinion-tests";
const SITES: u8 = 16;
/// The first of the networks 10.x.0.0/16.
const FIRST: u8 = 200;

/// A bridge with addresses, masquerading and host ports; the bridge goes with this value.
#[derive(Debug)]
pub(crate) struct Network {
    number: u8,
    _lock: Flock<File>,
}

impl Network {
    /// Takes the first number that is free.
    pub(crate) fn take() -> Result<Self> {
        fs::create_dir_all(LOCKS).during(|| format!("create {LOCKS}"))?;
        for number in 0..SITES {
            let path = PathBuf::from(LOCKS).join(format!("network-{number}"));
            let file = File::create(&path).during(|| format!("create {}", path.display()))?;
            if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                return Ok(Self { number, _lock: lock });
            }
        }
        Err(Error::check(format!("{SITES} test networks are in use")))
    }

    /// Writes the configuration that servers read; leases are kept in `leases`.
    pub(crate) fn write(&self, path: &Path, leases: &Path) -> Result<()> {
        let list = json!({
            "cniVersion": "1.0.0",
            "name": format!("pinion-test-{}", self.number),
            "plugins": [
                {
                    "type": "bridge", "bridge": self.bridge(), "isGateway": true,
                    "ipMasq": true, "hairpinMode": true,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": leases,
                        "ranges": [[{ "subnet": format!("10.{}.0.0/16", FIRST + self.number) }]],
                        "routes": [{ "dst": "0.0.0.0/0" }],
                    },
                },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        });
        fs::write(path, list.to_string()).during(|| format!("write {}", path.display()))
    }

    fn bridge(&self) -> String {
        format!("pintest{}", self.number)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // the plugins make the bridge and keep it; where no pod ran there is none
        let _ = command::run(Command::new("ip").args(["link", "delete", &self.bridge()]));
    }
}
