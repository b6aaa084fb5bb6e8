//! Overlay mounts with both mount APIs, and the escaping of paths in options.

use std::fs;

use super::*;

fn stack(dir: &Path, layers: usize) -> Stack {
    let layers_dir = dir.join("layers");
    let lowers: Vec<String> = (0..layers).map(|n| format!("{n:024x}")).collect();
    for (n, lower) in lowers.iter().enumerate() {
        fs::create_dir_all(layers_dir.join(lower)).unwrap();
        fs::write(layers_dir.join(lower).join("which"), n.to_string()).unwrap();
        fs::write(layers_dir.join(lower).join(format!("f{n}")), "x").unwrap();
    }
    let (upper, work) = (dir.join("upper"), dir.join("work"));
    fs::create_dir_all(&upper).unwrap();
    fs::create_dir_all(&work).unwrap();
    Stack { layers_dir, lowers, writable: Some(Writable { upper, work, volatile: true }) }
}

fn try_out(how: impl Fn(&Stack, &Path) -> Result<()>, dir: &Path, layers: usize) {
    let stack = stack(dir, layers);
    let target = dir.join("merged");
    fs::create_dir_all(&target).unwrap();
    assert!(!is_mount_point(&target).unwrap());
    how(&stack, &target).unwrap();
    let seen = std::panic::catch_unwind(|| {
        assert!(is_mount_point(&target).unwrap());
        assert_eq!(fs::read_to_string(target.join("which")).unwrap(), "0", "the first is on top");
        assert!(target.join(format!("f{}", layers - 1)).exists());
        fs::write(target.join("new"), "written").unwrap();
        assert_eq!(fs::read_to_string(dir.join("upper/new")).unwrap(), "written");
    });
    unmount_all(&target).unwrap();
    unmount_all(&target).unwrap();
    seen.unwrap();
    assert!(!is_mount_point(&target).unwrap());
}

fn new_api(stack: &Stack, target: &Path) -> Result<()> {
    by_new_api(stack, target).map_err(|(step, errno)| failed(target, step)(errno.into()))
}

/// overlayfs cannot be its own upper directory, and the test's directory may be on one.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn both_ways_of_mounting_stack_layers_alike() {
    for layers in [1, 5, 128] {
        try_out(new_api, scratch().path(), layers);
        try_out(by_mount, scratch().path(), layers);
    }
}

#[test]
fn characters_that_mean_something_in_options_are_plain_in_paths() {
    for name in ["a,lowerdir=etc", "a:b", "a\\b", "a b", "é\n"] {
        for how in [mount_stack, by_mount] {
            let scratch = scratch();
            let dir = scratch.path().join(name);
            fs::create_dir(&dir).unwrap();
            try_out(how, &dir, 2);
        }
    }
}

#[test]
fn paths_too_long_for_the_new_api_are_mounted_the_old_way() {
    let scratch = scratch();
    let dir = scratch.path().join("n".repeat(200)).join("m".repeat(100));
    fs::create_dir_all(&dir).unwrap();
    try_out(mount_stack, &dir, 3);
}

#[test]
fn a_stack_without_a_place_for_changes_is_read_only() {
    for how in [new_api as fn(&Stack, &Path) -> Result<()>, by_mount] {
        let scratch = scratch();
        let stack = Stack { writable: None, ..stack(scratch.path(), 2) };
        let target = scratch.path().join("merged");
        fs::create_dir_all(&target).unwrap();
        how(&stack, &target).unwrap();
        let written = fs::write(target.join("new"), "x");
        let read = fs::read_to_string(target.join("which"));
        unmount_all(&target).unwrap();
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(read.unwrap(), "0");
    }
}

#[test]
fn a_missing_layer_is_an_error_that_names_it() {
    let scratch = scratch();
    let mut stack = stack(scratch.path(), 1);
    stack.lowers.push("missing".to_owned());
    let target = scratch.path().join("merged");
    fs::create_dir(&target).unwrap();
    let error = mount_stack(&stack, &target).unwrap_err().chain();
    assert!(error.contains("missing") && error.contains("merged"), "{error}");
    assert!(!is_mount_point(&target).unwrap());
}
