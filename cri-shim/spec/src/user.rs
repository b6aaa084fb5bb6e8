//! Who the process runs as: CRI's user fields, else the image's `USER`.
//!
//! Precedence is `run_as_username` → `run_as_user` → image `USER` → root. What looks like a
//! number is a number and never looked up as a name: `4294967296` is refused, not wrapped to
//! root (CVE-2024-40635), even when the image has a user of that name.

use crate::accounts::{self, Group, MAX_ID, Passwd};
use crate::error::SpecError;
use crate::inputs::{Accounts, ResolvedUser};
use pinion_cri_proto::v1::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};
use std::collections::BTreeSet;

const SECURITY: &str = "linux.security_context";

/// A user or group as it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted<'a> {
    Id(u32),
    Name(&'a str),
}

/// Resolves identity and groups; `image_user` is the image's `USER` (may be empty).
pub(crate) fn resolve(
    security: &LinuxContainerSecurityContext,
    image_user: &str,
    accounts: Accounts<'_>,
) -> Result<ResolvedUser, SpecError> {
    let (user, group, field) = wanted(security, image_user)?;
    let entry = look_up_user(user, accounts);
    let uid = match (user, entry) {
        (Wanted::Id(uid), _) => uid,
        (Wanted::Name(_), Some(entry)) => entry.uid,
        (Wanted::Name(name), None) => {
            let reason = format!("user {name:?} not in the image's /etc/passwd");
            return Err(SpecError::invalid(field, reason));
        }
    };
    let gid = match group {
        None => entry.map_or(0, |entry| entry.gid),
        Some(Wanted::Id(gid)) => gid,
        Some(Wanted::Name(name)) => {
            let known = accounts::groups(accounts.group).find(|group| group.name == name);
            let reason = || format!("group {name:?} not in the image's /etc/group");
            known.map(|group| group.gid).ok_or_else(|| SpecError::invalid(field, reason()))?
        }
    };
    let mut groups = supplemental(security)?;
    groups.insert(gid);
    match SupplementalGroupsPolicy::try_from(security.supplemental_groups_policy) {
        Ok(SupplementalGroupsPolicy::Strict) => {}
        Ok(SupplementalGroupsPolicy::Merge) => {
            let name = match user {
                Wanted::Name(name) => Some(name),
                Wanted::Id(_) => entry.map(|entry| entry.name),
            };
            groups.extend(memberships(name, accounts).map(|group| group.gid));
        }
        Err(_) => {
            let policy = security.supplemental_groups_policy;
            let field = format!("{SECURITY}.supplemental_groups_policy");
            return Err(SpecError::invalid(field, format!("unknown policy {policy}")));
        }
    }
    Ok(ResolvedUser { uid, gid, groups: groups.into_iter().collect() })
}

/// User, group if one was named, and the field to blame.
fn wanted<'a>(
    security: &'a LinuxContainerSecurityContext,
    image_user: &'a str,
) -> Result<(Wanted<'a>, Option<Wanted<'a>>, String), SpecError> {
    let group = match &security.run_as_group {
        None => None,
        Some(group) => Some(Wanted::Id(in_range(group.value, "run_as_group")?)),
    };
    if !security.run_as_username.is_empty() {
        let field = format!("{SECURITY}.run_as_username");
        let user = parse(&security.run_as_username, &field)?;
        return Ok((user, group, field));
    }
    if let Some(user) = &security.run_as_user {
        let uid = in_range(user.value, "run_as_user")?;
        return Ok((Wanted::Id(uid), group, format!("{SECURITY}.run_as_user")));
    }
    if group.is_some() {
        let field = format!("{SECURITY}.run_as_group");
        let reason = "a group without run_as_user or run_as_username";
        return Err(SpecError::invalid(field, reason));
    }
    let field = "image.user".to_owned();
    if image_user.is_empty() {
        return Ok((Wanted::Id(0), None, field));
    }
    let (user, group) = match image_user.split_once(':') {
        None => (image_user, None),
        Some((user, group)) => (user, Some(group)),
    };
    // `USER :group` and `USER user:` leave the empty half to the default, as Docker does.
    let user = if user.is_empty() { Wanted::Id(0) } else { parse(user, &field)? };
    let group = group.filter(|group| !group.is_empty());
    Ok((user, group.map(|group| parse(group, &field)).transpose()?, field))
}

fn in_range(value: i64, member: &str) -> Result<u32, SpecError> {
    let id = u32::try_from(value).ok().filter(|id| *id <= MAX_ID);
    let reason = || format!("{value} is not between 0 and {MAX_ID}");
    id.ok_or_else(|| SpecError::invalid(format!("{SECURITY}.{member}"), reason()))
}

/// A number, or a name that cannot be mistaken for one.
fn parse<'a>(text: &'a str, field: &str) -> Result<Wanted<'a>, SpecError> {
    let numeric = text.bytes().all(|byte| byte.is_ascii_digit());
    let canonical = !text.starts_with('0') || text == "0";
    if numeric
        && canonical
        && let Some(id) = accounts::id(text)
    {
        return Ok(Wanted::Id(id));
    }
    let signed = text.starts_with(['-', '+']);
    let based = text.starts_with('0') && text.len() > 1;
    let odd = text.contains(|c: char| c.is_whitespace() || c.is_control() || ":/,".contains(c));
    if numeric || signed || based || odd || text.len() > 256 {
        let start: String = text.chars().take(64).collect();
        let reason = format!("{start:?} is neither a name nor an id from 0 to {MAX_ID}");
        return Err(SpecError::invalid(field, reason));
    }
    Ok(Wanted::Name(text))
}

fn look_up_user<'a>(user: Wanted<'_>, accounts: Accounts<'a>) -> Option<Passwd<'a>> {
    accounts::users(accounts.passwd).find(|entry| match user {
        Wanted::Id(uid) => entry.uid == uid,
        Wanted::Name(name) => entry.name == name,
    })
}

/// Groups that list the user; the one named like the user is its primary group, not a
/// supplemental one.
fn memberships<'a>(
    user: Option<&'a str>,
    accounts: Accounts<'a>,
) -> impl Iterator<Item = Group<'a>> {
    let member = move |group: &Group<'_>| {
        user.is_some_and(|user| group.name != user && group.has_member(user))
    };
    accounts::groups(accounts.group).filter(member)
}

fn supplemental(security: &LinuxContainerSecurityContext) -> Result<BTreeSet<u32>, SpecError> {
    let all = security.supplemental_groups.iter().enumerate();
    all.map(|(index, gid)| in_range(*gid, &format!("supplemental_groups[{index}]"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_cri_proto::v1::Int64Value;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:34::/:/bin/sh\n\
        4294967296:x:0:0::/:\n00:x:0:0::/:\n0x0:x:0:0::/:\n-1:x:0:0::/:\nalice:x:1000:1000::/:\n";
    const GROUP: &[u8] = b"root:x:0:\nadm:x:4:alice,www-data\nbig:x:50000:alice\n\
        alice:x:1000:alice\nwww:x:1004:\n";

    fn accounts() -> Accounts<'static> {
        Accounts { passwd: Some(PASSWD), group: Some(GROUP) }
    }

    fn security(
        user: Option<i64>,
        name: &str,
        group: Option<i64>,
    ) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext {
            run_as_user: user.map(|value| Int64Value { value }),
            run_as_username: name.to_owned(),
            run_as_group: group.map(|value| Int64Value { value }),
            ..Default::default()
        }
    }

    fn ids(security: &LinuxContainerSecurityContext, image: &str) -> (u32, u32, Vec<u32>) {
        let user = resolve(security, image, accounts()).unwrap();
        (user.uid, user.gid, user.groups)
    }

    #[test]
    fn every_form_of_image_user_is_understood() {
        let none = security(None, "", None);
        assert_eq!(ids(&none, ""), (0, 0, vec![0]));
        assert_eq!(ids(&none, "1000"), (1000, 1000, vec![4, 1000, 50000]));
        assert_eq!(ids(&none, "1003:1004"), (1003, 1004, vec![1004]));
        assert_eq!(ids(&none, "www-data"), (33, 34, vec![4, 34]));
        assert_eq!(ids(&none, "www-data:www"), (33, 1004, vec![4, 1004]));
        assert_eq!(ids(&none, "www-data:1005"), (33, 1005, vec![4, 1005]));
        assert_eq!(ids(&none, "www-data:"), (33, 34, vec![4, 34]));
        assert_eq!(ids(&none, ":www"), (0, 1004, vec![1004]));
        assert_eq!(ids(&none, "4242"), (4242, 0, vec![0]), "unknown ids are ids all the same");
    }

    #[test]
    fn cri_beats_the_image_and_a_name_beats_an_id() {
        assert_eq!(ids(&security(Some(7), "", None), "alice").0, 7);
        assert_eq!(ids(&security(Some(7), "www-data", None), "alice").0, 33);
        assert_eq!(ids(&security(Some(1000), "", Some(9)), "").1, 9);
    }

    #[test]
    fn what_looks_like_a_number_is_never_a_name() {
        let odd = ["4294967296", "2147483648", "4294967295", "-1", "00", "0x0", " 0", "0 ", "+0"];
        for user in odd {
            let error = resolve(&security(None, "", None), user, accounts()).unwrap_err();
            assert_eq!(error.field, "image.user", "{user:?}");
        }
        assert!(resolve(&security(None, "", None), "65536:4294967296", accounts()).is_err());
        assert!(resolve(&security(None, "", None), "a:b:c", accounts()).is_err());
    }

    #[test]
    fn unknown_names_say_where_they_were_sought() {
        let error = resolve(&security(None, "x", None), "", accounts()).unwrap_err();
        let text = "linux.security_context.run_as_username: \
            user \"x\" not in the image's /etc/passwd";
        assert_eq!(error.to_string(), text);
        let error = resolve(&security(None, "", None), "root:nope", accounts()).unwrap_err();
        assert!(error.to_string().contains("group \"nope\""), "{error}");
        let error = resolve(&security(None, "root", None), "", Accounts::default()).unwrap_err();
        assert!(error.reason.contains("/etc/passwd"));
    }

    #[test]
    fn a_group_alone_is_refused() {
        let error = resolve(&security(None, "", Some(5)), "alice", accounts()).unwrap_err();
        assert_eq!(error.field, "linux.security_context.run_as_group");
    }

    #[test]
    fn negative_and_huge_ids_are_refused() {
        for bad in [security(Some(-1), "", None), security(Some(1 << 31), "", None)] {
            let error = resolve(&bad, "", accounts()).unwrap_err();
            assert_eq!(error.field, "linux.security_context.run_as_user");
        }
        let mut bad = security(Some(1), "", None);
        bad.supplemental_groups = vec![1, -5];
        let error = resolve(&bad, "", accounts()).unwrap_err();
        assert_eq!(error.field, "linux.security_context.supplemental_groups[1]");
    }

    #[test]
    fn merge_adds_the_image_s_groups_and_strict_does_not() {
        let mut asked = security(Some(1000), "", None);
        asked.supplemental_groups = vec![1234];
        assert_eq!(ids(&asked, "").2, [4, 1000, 1234, 50000]);
        asked.supplemental_groups_policy = SupplementalGroupsPolicy::Strict.into();
        assert_eq!(ids(&asked, "").2, [1000, 1234]);
        asked.supplemental_groups_policy = 9;
        let error = resolve(&asked, "", accounts()).unwrap_err();
        assert_eq!(error.field, "linux.security_context.supplemental_groups_policy");
    }
}
