//! The rtnetlink requests that a virtual function's identity needs: what its parent says of
//! it (MAC, VLAN), setting both again, and the name and MAC of its interface
//! (rtnetlink(7), include/uapi/linux/if_link.h).
//!
//! Messages are native-endian and short enough to be spelled out.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use serde::{Deserialize, Serialize};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 1 << 15;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_VFINFO_LIST: u16 = 22;
const IFLA_EXT_MASK: u16 = 29;
const RTEXT_FILTER_VF: u32 = 1;
const IFLA_VF_INFO: u16 = 1;
const IFLA_VF_MAC: u16 = 1;
const IFLA_VF_VLAN: u16 = 2;
const HEADER: usize = 16;
const IFINFO: usize = 16;
/// A parent with 256 virtual functions answers with less.
const LARGEST: usize = 256 << 10;

/// What a physical function says of one of its virtual functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VfIdentity {
    /// The MAC given by the parent; zeros when it chose none.
    pub(crate) mac: [u8; 6],
    /// VLAN id, 0 for none.
    pub(crate) vlan: u32,
    /// Priority in the VLAN.
    pub(crate) qos: u32,
}

/// The identity of a virtual function, asked of its parent's interface.
pub(crate) fn vf_identity(parent: u32, vf: u32) -> io::Result<Option<VfIdentity>> {
    let mut body = ifinfo(parent);
    attribute(&mut body, IFLA_EXT_MASK, &RTEXT_FILTER_VF.to_ne_bytes());
    let answer = ask(RTM_GETLINK, 0, &body)?;
    Ok(identity_in(answer.get(HEADER + IFINFO..).unwrap_or_default(), vf))
}

fn identity_in(attributes: &[u8], vf: u32) -> Option<VfIdentity> {
    let list = each(attributes).find(|(kind, _)| *kind == IFLA_VFINFO_LIST)?.1;
    each(list).filter(|(kind, _)| *kind == IFLA_VF_INFO).find_map(|(_, info)| {
        let part = |wanted| each(info).find(|(kind, _)| *kind == wanted).map(|(_, data)| data);
        let (mac, vlan) = (part(IFLA_VF_MAC)?, part(IFLA_VF_VLAN)?);
        (word(mac, 0)? == vf).then_some(())?;
        Some(VfIdentity {
            mac: mac.get(4..10)?.try_into().ok()?,
            vlan: word(vlan, 4)?,
            qos: word(vlan, 8)?,
        })
    })
}

/// Gives a virtual function its identity back, through its parent's interface.
pub(crate) fn set_vf_identity(parent: u32, vf: u32, identity: &VfIdentity) -> io::Result<()> {
    let mut mac = vf.to_ne_bytes().to_vec();
    mac.extend(identity.mac);
    mac.resize(4 + 32, 0);
    let vlan: Vec<u8> =
        [vf, identity.vlan, identity.qos].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut info = Vec::new();
    attribute(&mut info, IFLA_VF_MAC, &mac);
    attribute(&mut info, IFLA_VF_VLAN, &vlan);
    let mut list = Vec::new();
    attribute(&mut list, IFLA_VF_INFO | NLA_F_NESTED, &info);
    let mut body = ifinfo(parent);
    attribute(&mut body, IFLA_VFINFO_LIST | NLA_F_NESTED, &list);
    ask(RTM_SETLINK, NLM_F_ACK, &body).map(drop)
}

/// Renames an interface, which must be down.
pub(crate) fn rename(index: u32, name: &str) -> io::Result<()> {
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    let mut body = ifinfo(index);
    attribute(&mut body, IFLA_IFNAME, &text);
    ask(RTM_NEWLINK, NLM_F_ACK, &body).map(drop)
}

/// Sets the MAC of an interface.
pub(crate) fn set_mac(index: u32, mac: [u8; 6]) -> io::Result<()> {
    let mut body = ifinfo(index);
    attribute(&mut body, IFLA_ADDRESS, &mac);
    ask(RTM_NEWLINK, NLM_F_ACK, &body).map(drop)
}

/// `struct ifinfomsg` of an interface.
fn ifinfo(index: u32) -> Vec<u8> {
    let mut body = vec![0u8; 4];
    body.extend(index.to_ne_bytes());
    body.extend([0u8; 8]);
    body
}

fn attribute(message: &mut Vec<u8>, kind: u16, data: &[u8]) {
    let length = u16::try_from(4 + data.len()).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend_from_slice(data);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// The attributes of a buffer; ends at the first that is cut off.
fn each(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & !NLA_F_NESTED;
        let data = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, data))
    })
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

fn ask(kind: u16, flags: u16, body: &[u8]) -> io::Result<Vec<u8>> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    message.extend(1u32.to_ne_bytes()); // sequence
    message.extend(0u32.to_ne_bytes()); // port: the kernel fills it in
    message.extend_from_slice(body);
    sendto(fd.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = vec![0u8; LARGEST];
    let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(length);
    let short = || io::Error::new(io::ErrorKind::InvalidData, "short netlink answer");
    let head = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).ok_or_else(short)?;
    if u16::from_ne_bytes(head) == NLMSG_ERROR {
        let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).ok_or_else(short)?;
        let code = i32::from_ne_bytes(code);
        if code != 0 {
            return Err(io::Error::from_raw_os_error(-code));
        }
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_found_among_the_virtual_functions() {
        let mut list = Vec::new();
        for vf in 0u32..3 {
            let mut mac = vf.to_ne_bytes().to_vec();
            mac.extend([2, 0, 0, 0, 0, vf as u8]);
            mac.resize(36, 0);
            let vlan: Vec<u8> = [vf, 100 + vf, 3].iter().flat_map(|w| w.to_ne_bytes()).collect();
            let mut info = Vec::new();
            attribute(&mut info, IFLA_VF_MAC, &mac);
            attribute(&mut info, IFLA_VF_VLAN, &vlan);
            attribute(&mut list, IFLA_VF_INFO | NLA_F_NESTED, &info);
        }
        let mut attributes = Vec::new();
        attribute(&mut attributes, IFLA_IFNAME, b"eth0\0");
        attribute(&mut attributes, IFLA_VFINFO_LIST | NLA_F_NESTED, &list);
        let found = identity_in(&attributes, 1).unwrap();
        assert_eq!(found, VfIdentity { mac: [2, 0, 0, 0, 0, 1], vlan: 101, qos: 3 });
        assert_eq!(identity_in(&attributes, 9), None);
        assert_eq!(identity_in(&attributes[..attributes.len() - 40], 2), None, "cut off");
    }

    #[test]
    fn loopback_has_no_virtual_functions_and_no_such_link_is_an_error() {
        assert_eq!(vf_identity(1, 0).unwrap(), None);
        assert_eq!(vf_identity(u32::MAX >> 2, 0).unwrap_err().raw_os_error(), Some(19));
    }
}
