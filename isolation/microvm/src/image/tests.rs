//! The guest image: the same inputs give the same bytes, and a damaged one is refused.

use super::*;

/// A program, static or not, as far as is looked at.
fn program(interpreter: Option<&str>) -> Vec<u8> {
    let mut bytes = vec![0u8; 0x40 + 56];
    bytes[..4].copy_from_slice(b"\x7fELF");
    bytes[0x20..0x28].copy_from_slice(&0x40u64.to_le_bytes());
    bytes[0x36..0x38].copy_from_slice(&56u16.to_le_bytes());
    bytes[0x38..0x3a].copy_from_slice(&1u16.to_le_bytes());
    if let Some(text) = interpreter {
        let at = bytes.len() as u64;
        bytes[0x40..0x44].copy_from_slice(&3u32.to_le_bytes());
        bytes[0x48..0x50].copy_from_slice(&at.to_le_bytes());
        bytes[0x60..0x68].copy_from_slice(&(text.len() as u64).to_le_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn inputs(dir: &Path) -> Inputs {
    write(&dir.join("vmlinux"), b"\x7fELF kernel");
    write(&dir.join("agent"), &program(None));
    write(&dir.join("pinion"), &program(None));
    let builtin: String = MODULES.iter().map(|name| format!("kernel/{name}.ko\n")).collect();
    write(&dir.join("6.1/modules.builtin"), builtin.as_bytes());
    let kernel =
        Kernel { release: "6.1".into(), image: dir.join("vmlinux"), modules: dir.join("6.1") };
    Inputs { kernel, agent: dir.join("agent"), runtime: dir.join("pinion") }
}

#[test]
fn the_same_inputs_are_the_same_image_and_others_are_another() {
    let dir = tempfile::tempdir().unwrap();
    let (inputs, store) = (inputs(dir.path()), dir.path().join("images"));
    let first = ensure(&store, &inputs).unwrap();
    assert_eq!(ensure(&store, &inputs).unwrap(), first);
    let again = ensure(&dir.path().join("elsewhere"), &inputs).unwrap();
    assert_eq!(again, first, "not reproducible");
    fs::write(&inputs.agent, [program(None), b"new".to_vec()].concat()).unwrap();
    let second = ensure(&store, &inputs).unwrap();
    assert!(second.id != first.id && second.initramfs != first.initramfs);
    assert_eq!(list(&store).unwrap().len(), 2);
}

#[test]
fn a_corrupt_image_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (inputs, store) = (inputs(dir.path()), dir.path().join("images"));
    let image = ensure(&store, &inputs).unwrap();
    for path in [image.kernel_path(&store), image.initramfs_path(&store)] {
        let good = fs::read(&path).unwrap();
        let mut bytes = good.clone();
        bytes[2] ^= 1;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&path, bytes).unwrap();
        let error = ensure(&store, &inputs).unwrap_err().to_string();
        assert!(error.contains("is corrupt") && error.contains(path.to_str().unwrap()), "{error}");
        fs::write(&path, good).unwrap();
    }
    ensure(&store, &inputs).unwrap();
}

#[test]
fn a_program_that_needs_a_loader_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = inputs(dir.path());
    write(&inputs.agent, &program(Some("/lib64/ld-linux-x86-64.so.2\0")));
    let error = ensure(&dir.path().join("images"), &inputs).unwrap_err().to_string();
    assert!(error.contains("needs the loader /lib64/ld-linux-x86-64.so.2"), "{error}");
}
