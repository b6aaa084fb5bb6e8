//! Connection tracking: forgetting UDP flows to a port that has a new owner.
//!
//! A UDP flow that was seen before the rules of a port mapping keeps going where it went, for
//! as long as packets come. The portmap plugin therefore deletes the entries of the port.
//! Source: `linux/netfilter/nfnetlink_conntrack.h`.

use super::{Attributes, Message, Socket};
use std::io;

const CT_GET: u16 = 1 << 8 | 1;
const CT_DELETE: u16 = 1 << 8 | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
const IPPROTO_UDP: u8 = 17;
/// Length of `struct nfgenmsg`.
const GENERIC: usize = 4;

/// Deletes the UDP entries of `family` whose original destination port is one of `ports`;
/// how many there were.
pub(crate) fn forget_udp(socket: &mut Socket, family: u8, ports: &[u16]) -> io::Result<usize> {
    let answers = socket.dump(&Message::new(CT_GET).raw(&[family, 0, 0, 0]))?;
    let mut forgotten = 0;
    for answer in answers {
        let entry = Attributes::after(&answer.body, GENERIC);
        let tuple = entry.nested(CTA_TUPLE_ORIG);
        if !udp_port(tuple).is_some_and(|port| ports.contains(&port)) {
            continue;
        }
        let delete = Message::new(CT_DELETE)
            .raw(&[family, 0, 0, 0])
            .nest(CTA_TUPLE_ORIG, |inner| inner.raw(tuple.0));
        match socket.request(delete) {
            Ok(()) => forgotten += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // it has just ended
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}

/// The destination port of a tuple, if it is of UDP.
fn udp_port(tuple: Attributes<'_>) -> Option<u16> {
    let protocol = tuple.nested(CTA_TUPLE_PROTO);
    let is_udp = protocol.get(CTA_PROTO_NUM) == Some(&[IPPROTO_UDP]);
    let port = protocol.get(CTA_PROTO_DST_PORT)?.try_into().ok()?;
    is_udp.then_some(u16::from_be_bytes(port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_udp_tuples_have_a_udp_port() {
        let tuple = |protocol: u8| {
            Message::new(0)
                .nest(CTA_TUPLE_PROTO, |inner| {
                    inner.attribute(CTA_PROTO_NUM, &[protocol]).attribute(3, &[0x1f, 0x90])
                })
                .into_body()
        };
        assert_eq!(udp_port(Attributes(&tuple(17))), Some(8080));
        assert_eq!(udp_port(Attributes(&tuple(6))), None);
        assert_eq!(udp_port(Attributes(&[])), None);
    }
}
