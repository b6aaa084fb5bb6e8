//! Netlink messages: building requests, reading attributes.

/// The bit that says that an attribute holds attributes.
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type that name it.
const TYPE: u16 = 0x3fff;

/// A request in the making.
#[derive(Debug, Clone, Default)]
pub(crate) struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// A request of this type, with nothing in it yet.
    pub(crate) fn new(kind: u16) -> Self {
        Self { kind, flags: 0, body: Vec::with_capacity(128) }
    }

    /// Adds flags to those the way of sending needs.
    pub(crate) fn flags(mut self, flags: u16) -> Self {
        self.flags |= flags;
        self
    }

    /// Adds a fixed header such as `struct ifinfomsg`.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.body.extend_from_slice(bytes);
        self
    }

    /// Adds an attribute.
    pub(crate) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        append(&mut self.body, kind, value);
        self
    }

    /// Adds a number in the machine's byte order.
    pub(crate) fn number(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// Adds a number in network byte order.
    pub(crate) fn number_be(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_be_bytes())
    }

    /// Adds a text with the NUL that the kernel wants.
    pub(crate) fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// Adds an attribute made of attributes.
    pub(crate) fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let inner = fill(Self::default());
        append(&mut self.body, kind | NESTED, &inner.body);
        self
    }

    /// What has been added so far, without a header.
    pub(crate) fn into_body(self) -> Vec<u8> {
        self.body
    }

    /// The bytes to send: `struct nlmsghdr` and the body. Port 0: the kernel fills it in.
    pub(super) fn finish(self, flags: u16, sequence: u32) -> Vec<u8> {
        let length = super::HEADER + self.body.len();
        let mut bytes = Vec::with_capacity(length.next_multiple_of(4));
        bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend((self.flags | flags).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(self.body);
        bytes.resize(length.next_multiple_of(4), 0);
        bytes
    }
}

/// Appends an attribute: length, type, value, padding to four bytes.
fn append(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The attributes of a message or of a nested attribute.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Attributes<'a> {
    /// The attributes that follow a fixed header of `length` bytes.
    pub(crate) fn after(body: &'a [u8], length: usize) -> Self {
        Self(body.get(length..).unwrap_or_default())
    }

    /// The first attribute of a type.
    pub(crate) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.into_iter().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// The attributes inside the first attribute of a type; none if it is not there.
    pub(crate) fn nested(self, kind: u16) -> Self {
        Self(self.get(kind).unwrap_or_default())
    }

    /// A number in the machine's byte order.
    pub(crate) fn number(self, kind: u16) -> Option<u32> {
        self.get(kind).filter(|value| value.len() == 4).map(number)
    }

    /// A text without its NUL.
    pub(crate) fn text(self, kind: u16) -> Option<String> {
        let value = self.get(kind)?;
        let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
        Some(String::from_utf8_lossy(value.get(..end)?).into_owned())
    }
}

impl<'a> IntoIterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        Iter(self.0)
    }
}

/// Iterates over attributes; ends at the first that is cut off.
#[derive(Debug)]
pub(crate) struct Iter<'a>(&'a [u8]);

impl<'a> Iterator for Iter<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?) & TYPE;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

/// A number of four bytes in the machine's byte order; 0 if there are fewer.
pub(crate) fn number(bytes: &[u8]) -> u32 {
    bytes.get(..4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// A number of up to eight bytes in network byte order.
pub(crate) fn number_be(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_can_be_read() {
        let message = Message::new(16)
            .text(3, "eth0")
            .nest(18, |inner| inner.text(1, "veth").number(2, 7))
            .attribute(1, &[1, 2, 3, 4, 5, 6]);
        let body = message.clone().into_body();
        let attributes = Attributes(&body);
        assert_eq!(attributes.text(3).as_deref(), Some("eth0"));
        assert_eq!(attributes.nested(18).text(1).as_deref(), Some("veth"));
        assert_eq!(attributes.nested(18).number(2), Some(7));
        assert_eq!(attributes.get(1), Some(&[1u8, 2, 3, 4, 5, 6][..]));
        assert_eq!(attributes.get(9), None);
        let bytes = message.finish(5, 1);
        assert_eq!(number(&bytes) as usize, bytes.len());
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn hostile_lengths_end_the_walk() {
        for bytes in [&[0u8, 0, 1, 0][..], &[255, 255, 1, 0, 0], &[3, 0, 1, 0], &[4], &[]] {
            assert!(Attributes(bytes).into_iter().count() <= 1, "{bytes:?}");
            assert_eq!(Attributes(bytes).number(1), None);
        }
    }

    #[test]
    fn numbers_in_network_order() {
        assert_eq!(number_be(&[0, 0, 1, 2]), 258);
        assert_eq!(number_be(&[]), 0);
    }
}
