//! The part of the D-Bus wire format that talking to systemd takes (D-Bus specification,
//! "Message Protocol"). Little-endian, no file descriptors.

/// A unit property: name and value.
pub(super) type Property = (&'static str, Value);

/// A property's value, by D-Bus type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// `b`
    Bool(bool),
    /// `t`
    Number(u64),
    /// `s`
    Text(String),
    /// `as`
    Texts(Vec<String>),
    /// `au`
    Numbers(Vec<u32>),
    /// `ay`
    Bytes(Vec<u8>),
}

/// Message types.
pub(super) const METHOD_CALL: u8 = 1;
pub(super) const METHOD_RETURN: u8 = 2;
pub(super) const ERROR: u8 = 3;
pub(super) const SIGNAL: u8 = 4;

/// Messages larger than this are not from systemd (the specification allows 128 MiB).
const MAX_MESSAGE: usize = 1 << 20;

/// The fixed part of a header, up to and including the length of the field array.
pub(super) const FIXED_HEADER: usize = 16;

/// Marshals values with D-Bus alignment.
#[derive(Debug, Default)]
pub(super) struct Encoder(Vec<u8>);

impl Encoder {
    pub(super) fn bytes(self) -> Vec<u8> {
        self.0
    }

    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.align(8);
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn bool(&mut self, value: bool) {
        self.u32(u32::from(value));
    }

    pub(super) fn text(&mut self, text: &str) {
        self.u32(text.len() as u32);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, signature: &str) {
        self.0.push(signature.len() as u8);
        self.0.extend(signature.as_bytes());
        self.0.push(0);
    }

    /// An array of elements with the given alignment; its length counts neither itself nor
    /// the padding before the first element.
    pub(super) fn array(&mut self, alignment: usize, elements: impl FnOnce(&mut Self)) {
        self.u32(0);
        let length_at = self.0.len() - 4;
        self.align(alignment);
        let start = self.0.len();
        elements(self);
        let length = (self.0.len() - start) as u32;
        self.0[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    fn variant(&mut self, value: &Value) {
        match value {
            Value::Bool(value) => {
                self.signature("b");
                self.bool(*value);
            }
            Value::Number(value) => {
                self.signature("t");
                self.u64(*value);
            }
            Value::Text(text) => {
                self.signature("s");
                self.text(text);
            }
            Value::Texts(texts) => {
                self.signature("as");
                self.array(4, |out| texts.iter().for_each(|text| out.text(text)));
            }
            Value::Numbers(numbers) => {
                self.signature("au");
                self.array(4, |out| numbers.iter().for_each(|number| out.u32(*number)));
            }
            Value::Bytes(bytes) => {
                self.signature("ay");
                self.array(1, |out| out.0.extend(bytes));
            }
        }
    }

    /// `a(sv)`
    pub(super) fn properties(&mut self, properties: &[Property]) {
        self.array(8, |out| {
            for (name, value) in properties {
                out.align(8);
                out.text(name);
                out.variant(value);
            }
        });
    }
}

/// Where a method call goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Method {
    pub(super) destination: &'static str,
    pub(super) path: &'static str,
    pub(super) interface: &'static str,
    pub(super) name: &'static str,
    /// The body's signature.
    pub(super) signature: &'static str,
}

/// A complete method call.
pub(super) fn method_call(serial: u32, method: Method, body: &[u8]) -> Vec<u8> {
    let mut out = Encoder(vec![b'l', METHOD_CALL, 0, 1]);
    out.u32(body.len() as u32);
    out.u32(serial);
    let fields = [
        (1, "o", method.path),
        (6, "s", method.destination),
        (2, "s", method.interface),
        (3, "s", method.name),
    ];
    out.array(8, |out| {
        for (code, kind, text) in fields {
            out.align(8);
            out.0.push(code);
            out.signature(kind);
            out.text(text);
        }
        if !method.signature.is_empty() {
            out.align(8);
            out.0.push(8);
            out.signature("g");
            out.signature(method.signature);
        }
    });
    out.align(8);
    let mut message = out.bytes();
    message.extend(body);
    message
}

/// What of a received message matters here.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: u8,
    pub(super) reply_to: Option<u32>,
    /// Signals: the member.
    pub(super) member: Option<String>,
    /// Errors: the error's name.
    pub(super) error: Option<String>,
    /// The leading strings, paths and numbers of the body; anything else ends the list.
    pub(super) body: Vec<Item>,
}

/// One value of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Item {
    Number(u32),
    Text(String),
}

impl Message {
    /// The text at a position of the body.
    pub(super) fn text(&self, position: usize) -> Option<&str> {
        match self.body.get(position) {
            Some(Item::Text(text)) => Some(text),
            Some(Item::Number(_)) | None => None,
        }
    }
}

/// The length of the whole message whose first [`FIXED_HEADER`] bytes are given.
pub(super) fn message_length(header: &[u8; FIXED_HEADER]) -> Option<usize> {
    if header[0] != b'l' || header[3] != 1 {
        return None;
    }
    let word = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&header[at..at + 4]);
        u32::from_le_bytes(bytes) as usize
    };
    let fields_end = FIXED_HEADER.checked_add(word(12))?;
    let length = fields_end.checked_next_multiple_of(8)?.checked_add(word(4))?;
    (length <= MAX_MESSAGE).then_some(length)
}

/// Reads a complete message; `None` when it is malformed.
pub(super) fn decode(bytes: &[u8]) -> Option<Message> {
    let mut input = Decoder { bytes, at: 12 };
    let fields_end = FIXED_HEADER + input.u32()? as usize;
    let mut message = Message {
        kind: *bytes.get(1)?,
        reply_to: None,
        member: None,
        error: None,
        body: Vec::new(),
    };
    let mut signature = String::new();
    while input.at < fields_end {
        input.align(8);
        let code = input.u8()?;
        let kind = input.signature()?;
        match (code, kind.as_str()) {
            (3, "s") => message.member = Some(input.text()?),
            (4, "s") => message.error = Some(input.text()?),
            (5, "u") => message.reply_to = Some(input.u32()?),
            (8, "g") => signature = input.signature()?,
            (_, "s" | "o") => drop(input.text()?),
            (_, "u") => drop(input.u32()?),
            (_, "g") => drop(input.signature()?),
            _ => return None,
        }
    }
    input.at = fields_end.next_multiple_of(8);
    for kind in signature.chars() {
        message.body.push(match kind {
            's' | 'o' => Item::Text(input.text()?),
            'u' => Item::Number(input.u32()?),
            _ => break,
        });
    }
    Some(message)
}

struct Decoder<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Decoder<'_> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, count: usize) -> Option<&[u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(count)?)?;
        self.at += count;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u32(&mut self) -> Option<u32> {
        self.align(4);
        let bytes = self.take(4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    }

    fn text(&mut self) -> Option<String> {
        let length = self.u32()? as usize;
        let text = String::from_utf8(self.take(length)?.to_vec()).ok()?;
        self.take(1)?;
        Some(text)
    }

    fn signature(&mut self) -> Option<String> {
        let length = self.u8()? as usize;
        let text = String::from_utf8(self.take(length)?.to_vec()).ok()?;
        self.take(1)?;
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Method = Method {
        destination: "org.freedesktop.DBus",
        path: "/org/freedesktop/DBus",
        interface: "org.freedesktop.DBus",
        name: "Hello",
        signature: "",
    };

    #[test]
    fn a_call_is_laid_out_as_the_specification_says() {
        let message = method_call(1, HELLO, &[]);
        let mut expected = vec![b'l', 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0x6e, 0, 0, 0];
        expected.extend(b"\x01\x01o\0\x15\0\0\0/org/freedesktop/DBus\0\0\0");
        expected.extend(b"\x06\x01s\0\x14\0\0\0org.freedesktop.DBus\0\0\0\0");
        expected.extend(b"\x02\x01s\0\x14\0\0\0org.freedesktop.DBus\0\0\0\0");
        expected.extend(b"\x03\x01s\0\x05\0\0\0Hello\0\0\0");
        assert_eq!(message, expected);
        let header = message[..FIXED_HEADER].try_into().unwrap();
        assert_eq!(message_length(&header), Some(message.len()));
    }

    #[test]
    fn properties_are_aligned_structures_of_name_and_variant() {
        let mut out = Encoder::default();
        out.properties(&[("A", Value::Bool(true)), ("B", Value::Number(5))]);
        // Length, padding to the first structure, then each structure on a multiple of 8; so
        // is the 64-bit number inside the second one.
        let mut expected = vec![40, 0, 0, 0, 0, 0, 0, 0];
        expected.extend(b"\x01\0\0\0A\0\x01b\0\0\0\0\x01\0\0\0");
        expected.extend(b"\x01\0\0\0B\0\x01t\0\0\0\0\0\0\0\0");
        expected.extend([5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(out.bytes(), expected);
    }

    #[test]
    fn what_we_encode_we_decode() {
        let mut body = Encoder::default();
        body.u32(7);
        body.text("/job/7");
        body.text("a.scope");
        body.text("done");
        let method = Method { signature: "uoss", name: "JobRemoved", ..HELLO };
        let bytes = method_call(9, method, &body.bytes());
        let message = decode(&bytes).unwrap();
        assert_eq!(message.kind, METHOD_CALL);
        assert_eq!(message.member.as_deref(), Some("JobRemoved"));
        assert_eq!(message.body[0], Item::Number(7));
        assert_eq!((message.text(2), message.text(3)), (Some("a.scope"), Some("done")));
    }

    #[test]
    fn truncated_or_oversized_messages_are_refused_without_panic() {
        let bytes = method_call(1, HELLO, &[]);
        for length in 16..bytes.len() {
            let _ = decode(&bytes[..length]);
        }
        let mut header: [u8; FIXED_HEADER] = bytes[..FIXED_HEADER].try_into().unwrap();
        header[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(message_length(&header), None);
        header[0] = b'B';
        assert_eq!(message_length(&header), None);
    }
}
