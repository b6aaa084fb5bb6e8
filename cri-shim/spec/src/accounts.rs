//! Lines of an image's `/etc/passwd` and `/etc/group` (passwd(5), group(5)).
//!
//! The text comes from an image, so it is hostile: bytes that are no UTF-8, lines of any
//! length, numbers out of range. What is not exactly of the form is skipped, never guessed,
//! and nothing is copied per line. The first match wins, as in getpwnam(3).

/// Largest id accepted: the OCI runtimes' common limit, and far from the kernel's `(uid_t)-1`.
pub(crate) const MAX_ID: u32 = i32::MAX as u32;

/// A user of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Passwd<'a> {
    pub(crate) name: &'a str,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// A group of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Group<'a> {
    pub(crate) name: &'a str,
    pub(crate) gid: u32,
    members: &'a str,
}

impl Group<'_> {
    /// Whether `user` is listed as a member.
    pub(crate) fn has_member(&self, user: &str) -> bool {
        self.members.split(',').any(|member| member.trim() == user)
    }
}

/// Users, in file order.
pub(crate) fn users(passwd: Option<&[u8]>) -> impl Iterator<Item = Passwd<'_>> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let (uid, gid) = (fields.nth(1)?, fields.next()?);
        Some(Passwd { name, uid: id(uid)?, gid: id(gid)? })
    })
}

/// Groups, in file order.
pub(crate) fn groups(group: Option<&[u8]>) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = id(fields.nth(1)?)?;
        Some(Group { name, gid, members: fields.next().unwrap_or_default() })
    })
}

/// A decimal id in range; signs, blanks and other bases do not count as numbers.
pub(crate) fn id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten().filter(|id| *id <= MAX_ID)
}

/// Lines that are text, without comments and blanks around them.
fn lines(text: Option<&[u8]>) -> impl Iterator<Item = &str> {
    text.unwrap_or_default()
        .split(|byte| *byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#') && !line.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_formed_lines_are_read_and_the_rest_is_skipped() {
        let text = b"# comment\n\nroot:x:0:0:root:/root:/bin/sh\nshort:x:1\n:x:5:5::/:\n\
            neg:x:-1:0::/:\nbig:x:4294967296:0::/:\nedge:x:2147483648:0::/:\n\xff\xfe:x:7:7::/:\n\
            nul\0:x:8:8::/:\nwww-data:x:33:33";
        let found: Vec<_> = users(Some(text)).map(|user| (user.name, user.uid)).collect();
        assert_eq!(found, [("root", 0), ("www-data", 33)]);
        assert_eq!(users(None).count(), 0);
    }

    #[test]
    fn members_match_whole_names_only() {
        let text = b"adm:x:4:bin, alice ,ali\nempty:x:5:\nshort:x:6";
        let all: Vec<_> = groups(Some(text)).collect();
        assert_eq!(all.len(), 3);
        assert!(all[0].has_member("ali") && all[0].has_member("alice"));
        assert!(!all[0].has_member("al"));
        assert!(!all[1].has_member("x"));
    }

    #[test]
    fn a_line_of_megabytes_is_just_a_line() {
        let mut text = vec![b'a'; 4 << 20];
        text.extend_from_slice(b"\nroot:x:0:0:::\n");
        assert_eq!(users(Some(&text)).count(), 1);
    }

    #[test]
    fn ids_are_plain_decimal_numbers() {
        for text in ["", "-1", "+1", " 0", "0x0", "1_0", "2147483648", "99999999999999999999"] {
            assert_eq!(id(text), None, "{text:?}");
        }
        assert_eq!(id("2147483647"), Some(MAX_ID));
        assert_eq!(id("007"), Some(7));
    }
}
