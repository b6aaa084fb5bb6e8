//! The one rtnetlink request made here: bring a link up (rtnetlink(7), netlink(7)).
//!
//! Messages are native-endian and short enough to be spelled out; a crate for it would be
//! async and larger than the rest of this one.

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use std::io;
use std::os::fd::AsRawFd;

const RTM_NEWLINK: u16 = 16;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const IFF_UP: u32 = 1;
/// `struct nlmsghdr` and `struct ifinfomsg`.
const LENGTH: u32 = 16 + 16;

/// Sets IFF_UP on the link with `index` in the calling thread's network namespace.
pub(crate) fn set_link_up(index: i32) -> io::Result<()> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(fd.as_raw_fd(), &up_request(index), &kernel, MsgFlags::empty())?;
    let mut answer = [0u8; 512];
    let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    acknowledged(answer.get(..length).unwrap_or_default())
}

fn up_request(index: i32) -> Vec<u8> {
    let mut message = Vec::with_capacity(LENGTH as usize);
    message.extend(LENGTH.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend(1u32.to_ne_bytes()); // sequence
    message.extend(0u32.to_ne_bytes()); // port: the kernel fills it in
    message.extend([0u8, 0]); // family, padding
    message.extend(0u16.to_ne_bytes()); // device type
    message.extend(index.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes()); // flags
    message.extend(IFF_UP.to_ne_bytes()); // which flags change
    message
}

/// Reads an NLMSG_ERROR message: code 0 is the acknowledgement.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "short netlink answer");
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).ok_or_else(short)?;
    if u16::from_ne_bytes(kind) != NLMSG_ERROR {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "unexpected netlink answer"));
    }
    let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).ok_or_else(short)?;
    match i32::from_ne_bytes(code) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_length_it_states() {
        assert_eq!(up_request(1).len(), LENGTH as usize);
    }

    #[test]
    fn errors_become_errno() {
        let mut answer = vec![0u8; 20];
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert!(acknowledged(&answer).is_ok());
        answer[16..20].copy_from_slice(&(-19i32).to_ne_bytes());
        assert_eq!(acknowledged(&answer).unwrap_err().raw_os_error(), Some(19));
        assert!(acknowledged(&answer[..10]).is_err());
        assert!(acknowledged(&[]).is_err());
    }
}
