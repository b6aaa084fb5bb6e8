//! The part of CRIU's protocol (`images/rpc.proto`) that dumping and restoring needs, in
//! Protocol Buffers' wire format: a field is a key (`number << 3 | kind`) and a number
//! (kind 0) or a length and that many bytes (kind 2).

/// A message under construction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Encoder(Vec<u8>);

impl Encoder {
    /// An integer, an enumeration or a boolean; negative numbers take ten bytes.
    pub(crate) fn number(&mut self, field: u32, value: i64) -> &mut Self {
        self.varint(u64::from(field) << 3);
        self.varint(value as u64);
        self
    }

    /// Only a true value is worth a field: false is what its absence means.
    pub(crate) fn flag(&mut self, field: u32, value: bool) -> &mut Self {
        if value { self.number(field, 1) } else { self }
    }

    pub(crate) fn text(&mut self, field: u32, value: &str) -> &mut Self {
        self.bytes(field, value.as_bytes())
    }

    pub(crate) fn message(&mut self, field: u32, value: &Self) -> &mut Self {
        self.bytes(field, &value.0)
    }

    pub(crate) fn finish(&self) -> &[u8] {
        &self.0
    }

    fn bytes(&mut self, field: u32, value: &[u8]) -> &mut Self {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// The value of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message in order; `None` for bytes that are none.
fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, Value<'_>)>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = take_varint(&mut bytes)?;
        let value = match key & 7 {
            0 => Value::Number(take_varint(&mut bytes)?),
            1 => Value::Bytes(take(&mut bytes, 8)?),
            2 => {
                let length = usize::try_from(take_varint(&mut bytes)?).ok()?;
                Value::Bytes(take(&mut bytes, length)?)
            }
            5 => Value::Bytes(take(&mut bytes, 4)?),
            _ => return None,
        };
        all.push((key >> 3, value));
    }
    Some(all)
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (part, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(part)
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = *take(bytes, 1)?.first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// `criu_req_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Dump = 1,
    Restore = 2,
    PreDump = 4,
    Notify = 6,
    FeatureCheck = 9,
}

/// `criu_resp`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) kind: u64,
    pub(crate) success: bool,
    pub(crate) errno: Option<i32>,
    pub(crate) notify: Option<Notify>,
    pub(crate) features: Features,
}

/// `criu_notify`: the moment in CRIU's work, and the process it is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Notify {
    pub(crate) script: String,
    pub(crate) pid: i32,
}

/// `criu_features`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    pub(crate) mem_track: bool,
    pub(crate) lazy_pages: bool,
}

impl Response {
    /// Reads one answer; `None` when it is not one.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut response = Self::default();
        for (number, value) in fields(bytes)? {
            match (number, value) {
                (1, Value::Number(kind)) => response.kind = kind,
                (2, Value::Number(success)) => response.success = success != 0,
                (5, Value::Bytes(bytes)) => response.notify = Some(Notify::decode(bytes)?),
                (7, Value::Number(errno)) => response.errno = Some(errno as i32),
                (8, Value::Bytes(bytes)) => response.features = Features::decode(bytes)?,
                _ => {}
            }
        }
        (response.kind != 0).then_some(response)
    }
}

impl Notify {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut notify = Self::default();
        for (number, value) in fields(bytes)? {
            match (number, value) {
                (1, Value::Bytes(text)) => notify.script = to_text(text),
                (2, Value::Number(pid)) => notify.pid = pid as i32,
                _ => {}
            }
        }
        Some(notify)
    }
}

impl Features {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut features = Self::default();
        for (number, value) in fields(bytes)? {
            match (number, value) {
                (1, Value::Number(has)) => features.mem_track = has != 0,
                (2, Value::Number(has)) => features.lazy_pages = has != 0,
                _ => {}
            }
        }
        Some(features)
    }
}

fn to_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_bytes_protocol_buffers_has() {
        let mut inner = Encoder::default();
        inner.text(1, "k").text(2, "v");
        let mut outer = Encoder::default();
        outer.number(1, 150).flag(3, true).flag(4, false).message(23, &inner).number(2, -1);
        let expected = [
            &[0x08, 0x96, 0x01, 0x18, 0x01][..],
            &[0xba, 0x01, 0x06, 0x0a, 0x01, b'k', 0x12, 0x01, b'v'],
            &[0x10, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
        ];
        assert_eq!(outer.finish(), expected.concat());
    }

    #[test]
    fn a_notification_is_understood() {
        let mut notify = Encoder::default();
        notify.text(1, "post-restore").number(2, 4242);
        let mut bytes = Encoder::default();
        bytes.number(1, 6).flag(2, true).message(5, &notify).text(99, "later").number(7, -2);
        let response = Response::decode(bytes.finish()).unwrap();
        assert!(response.success);
        assert_eq!(response.errno, Some(-2));
        assert_eq!(response.notify.unwrap(), Notify { script: "post-restore".into(), pid: 4242 });
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_break_the_decoder(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64)) {
            let _ = Response::decode(&bytes);
        }

        #[test]
        fn numbers_survive(number in proptest::num::i64::ANY, field in 1_u32..1000) {
            let mut encoder = Encoder::default();
            encoder.number(field, number);
            let decoded = fields(encoder.finish()).unwrap();
            assert_eq!(decoded, [(u64::from(field), Value::Number(number as u64))]);
        }
    }
}
