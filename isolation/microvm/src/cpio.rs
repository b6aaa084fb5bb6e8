//! The archive a kernel unpacks as its first root: cpio in the "newc" format
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Deterministic: no time, no owner but root, inode numbers in the order of adding.

/// A regular file, directory or character device in [`Archive::add`]'s mode.
pub const FILE: u32 = 0o100_000;
/// A directory.
pub const DIRECTORY: u32 = 0o040_000;
/// A character device.
pub const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive that grows.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds an entry. `mode` has type and permission bits; `device` is for device nodes. A
    /// directory comes before what is in it.
    pub fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_length = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let (major, minor) = device;
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(content);
        self.pad(4);
    }

    /// The whole archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.pad(512);
        self.bytes
    }

    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_shape_of_newc() {
        let mut archive = Archive::default();
        archive.add("dev", DIRECTORY | 0o755, (0, 0), &[]);
        archive.add("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[]);
        archive.add("init", FILE | 0o755, (0, 0), b"abc");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(&bytes[..14], b"07070100000001");
        // 110 bytes of header, the name, and each part padded to four
        let second = 110 + 4;
        let second = if second % 4 == 0 { second } else { second + 4 - second % 4 };
        assert_eq!(&bytes[second..second + 6], b"070701");
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("TRAILER!!!"));
        let init = text.find("init\0").unwrap();
        let content = (init + 5).next_multiple_of(4);
        assert_eq!(&bytes[content..content + 4], b"abc\0");
    }
}
