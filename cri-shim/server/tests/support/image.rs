//! An OCI image layout with busybox in it.

use std::fs;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};

const APPLETS: [&str; 18] = [
    "sh", "ls", "cat", "echo", "sleep", "true", "false", "id", "hostname", "touch", "kill", "yes",
    "ps", "grep", "mount", "mkdir", "seq", "dd",
];

/// Writes a layout directory with one image.
pub(crate) fn write_layout(directory: &Path, reference: &str) {
    fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
    let layer = layer();
    let layer_digest = blob(directory, &layer);
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "StopSignal": "SIGTERM" },
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] },
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": blob(directory, &config),
            "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": layer_digest,
            "size": layer.len(),
        }],
    });
    let manifest = manifest.to_string().into_bytes();
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": blob(directory, &manifest),
            "size": manifest.len(),
            "annotations": { "org.opencontainers.image.ref.name": reference },
        }],
    });
    fs::write(directory.join("index.json"), index.to_string()).unwrap();
    fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn blob(directory: &Path, bytes: &[u8]) -> String {
    let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    fs::write(directory.join("blobs/sha256").join(&digest), bytes).unwrap();
    format!("sha256:{digest}")
}

fn layer() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for name in ["bin", "etc", "tmp", "dev", "proc", "sys"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        tar.append_data(&mut header, name, std::io::empty()).unwrap();
    }
    let busybox = fs::read("/bin/busybox").expect("busybox-static is installed");
    file(&mut tar, "bin/busybox", &busybox, 0o755);
    file(&mut tar, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o644);
    file(&mut tar, "etc/group", b"root:x:0:\n", 0o644);
    for applet in APPLETS {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, format!("bin/{applet}"), "busybox").unwrap();
    }
    tar.into_inner().unwrap()
}

fn file(tar: &mut tar::Builder<Vec<u8>>, name: &str, bytes: &[u8], mode: u32) {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, name, bytes).unwrap();
}
