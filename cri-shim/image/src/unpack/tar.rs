//! A strict reader of tar streams: ustar, GNU long names, PAX.
//!
//! Own code because the parsers at hand read extended headers of any size into memory, and because
//! two readers that disagree about a size see different files in one archive (CVE-2025-62518).
//! Rules, after Go's archive/tar, which made nearly every image: a PAX record always wins; links,
//! devices and directories have no data whatever their size field says; extended headers end at
//! 1 MiB; what is malformed, ambiguous or sparse is refused.

use std::io::{self, Read, Write};

use super::LayerError;

const BLOCK: usize = 512;
const MAX_EXTENDED: u64 = 1 << 20;

/// Where a tar stream comes from.
pub(crate) trait Source: Read {
    /// Bytes read or skipped so far.
    fn position(&self) -> u64;
    /// Writes the next `count` bytes to `out`; `UnexpectedEof` if there are fewer.
    fn copy_to(&mut self, out: &mut dyn Write, count: u64) -> io::Result<()>;
    /// Passes over the next `count` bytes; `UnexpectedEof` if there are fewer.
    fn skip(&mut self, count: u64) -> io::Result<()> {
        self.copy_to(&mut io::sink(), count)
    }
}

/// A name and a value.
type Pair = (Vec<u8>, Vec<u8>);

/// What an entry creates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink,
    Hardlink,
    CharDevice,
    BlockDevice,
    Fifo,
}

/// One entry; its data, if any, is read through [`Reader::copy_to`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds.
    pub(crate) mtime: (i64, u32),
    pub(crate) size: u64,
    /// Major and minor.
    pub(crate) device: (u32, u32),
    /// Name and value, in the archive's order.
    pub(crate) xattrs: Vec<Pair>,
}

/// Reads entries one after another.
pub(crate) struct Reader<'a, S> {
    stream: &'a mut S,
    /// Data of the current entry not read yet, and its padding.
    remaining: u64,
    padding: u64,
    header_at: u64,
}

/// What extended headers said about the entry that follows.
#[derive(Default)]
struct Extended {
    pax: Option<Vec<Pair>>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<'a, S: Source> Reader<'a, S> {
    pub(crate) fn new(stream: &'a mut S) -> Self {
        Self { stream, remaining: 0, padding: 0, header_at: 0 }
    }

    /// The next entry, `None` at the end of the archive.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, LayerError> {
        let mut extended = Extended::default();
        loop {
            self.skip(self.remaining + self.padding)?;
            (self.remaining, self.padding) = (0, 0);
            self.header_at = self.stream.position();
            let Some(header) = self.header()? else {
                let dangling = extended.pax.is_some()
                    || extended.long_name.is_some()
                    || extended.long_link.is_some();
                return if dangling {
                    Err(self.bad("extended header without an entry"))
                } else {
                    Ok(None)
                };
            };
            match header.kind {
                b'x' => {
                    let text = self.extended_data(&header)?;
                    let records = parse_pax(&text).map_err(|reason| self.bad(reason))?;
                    if extended.pax.replace(records).is_some() {
                        return Err(self.bad("two PAX headers for one entry"));
                    }
                }
                b'g' => {
                    let text = self.extended_data(&header)?;
                    let records = parse_pax(&text).map_err(|reason| self.bad(reason))?;
                    if records.iter().any(|(key, _)| changes_layout(key)) {
                        return Err(self.bad("global PAX header changes names or sizes"));
                    }
                }
                b'L' => {
                    let name = self.extended_data(&header)?;
                    extended.long_name = Some(until_nul(&name).to_vec());
                }
                b'K' => {
                    let link = self.extended_data(&header)?;
                    extended.long_link = Some(until_nul(&link).to_vec());
                }
                _ => return self.entry(&header, extended).map(Some),
            }
        }
    }

    /// Writes the current entry's data to `out`.
    pub(crate) fn copy_to(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let count = std::mem::take(&mut self.remaining);
        self.stream.copy_to(out, count)
    }

    /// Offset of the current entry's data, if none of it has been read.
    pub(crate) fn data_offset(&self) -> u64 {
        self.stream.position()
    }

    /// An error at the current header.
    pub(crate) fn bad(&self, reason: impl Into<String>) -> LayerError {
        LayerError::Tar { offset: self.header_at, reason: reason.into() }
    }

    fn header(&mut self) -> Result<Option<Header>, LayerError> {
        let Some(block) = self.block()? else { return Ok(None) };
        if block.iter().all(|&b| b == 0) {
            return match self.block()? {
                Some(second) if second.iter().any(|&b| b != 0) => {
                    Err(self.bad("one empty block, then more data"))
                }
                _ => Ok(None),
            };
        }
        Header::parse(&block).map(Some).map_err(|reason| self.bad(reason))
    }

    /// One block; `None` if the stream ends exactly here.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        let mut block = [0; BLOCK];
        let mut count = 0;
        while count < BLOCK {
            match self.stream.read(&mut block[count..]) {
                Ok(0) if count == 0 => return Ok(None),
                Ok(0) => return Err(self.bad("ends within a header")),
                Ok(read) => count += read,
                Err(e) => return Err(self.bad(e.to_string())),
            }
        }
        Ok(Some(block))
    }

    fn extended_data(&mut self, header: &Header) -> Result<Vec<u8>, LayerError> {
        if header.size > MAX_EXTENDED {
            return Err(LayerError::TooLarge { what: "extended tar header", limit: MAX_EXTENDED });
        }
        let mut data = Vec::new();
        self.stream
            .copy_to(&mut data, header.size)
            .map_err(|_eof| self.bad("ends within an extended header"))?;
        self.padding = padding(header.size);
        Ok(data)
    }

    fn skip(&mut self, count: u64) -> Result<(), LayerError> {
        self.stream.skip(count).map_err(|_eof| self.bad("ends within the data of an entry"))
    }

    fn entry(&mut self, header: &Header, extended: Extended) -> Result<Entry, LayerError> {
        let mut entry = Entry {
            path: header.path.clone(),
            link: header.link.clone(),
            kind: Kind::File,
            mode: header.mode & 0o7777,
            uid: header.uid,
            gid: header.gid,
            mtime: (header.mtime, 0),
            size: header.size,
            device: header.device,
            xattrs: Vec::new(),
        };
        let pax = extended.pax.unwrap_or_default();
        let has = |key: &[u8]| pax.iter().any(|(k, _)| k == key);
        if (extended.long_name.is_some() && has(b"path"))
            || (extended.long_link.is_some() && has(b"linkpath"))
        {
            return Err(self.bad("GNU and PAX headers both name the entry"));
        }
        entry.path = extended.long_name.unwrap_or(entry.path);
        entry.link = extended.long_link.unwrap_or(entry.link);
        for (key, value) in pax {
            apply_pax(&mut entry, &key, value).map_err(|reason| self.bad(reason))?;
        }
        entry.kind = match header.kind {
            // Archives older than ustar mark directories by their name only.
            b'0' | 0 | b'7' if entry.path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::Hardlink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err(self.bad("sparse files are not supported")),
            other => return Err(self.bad(format!("unknown entry type {other:#04x}"))),
        };
        if entry.kind != Kind::File {
            entry.size = 0;
        }
        if entry.path.contains(&0) || entry.link.contains(&0) {
            return Err(self.bad("a name contains NUL"));
        }
        self.remaining = entry.size;
        self.padding = padding(entry.size);
        Ok(entry)
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

fn changes_layout(key: &[u8]) -> bool {
    matches!(key, b"path" | b"linkpath" | b"size") || key.starts_with(b"GNU.sparse")
}

/// `<length> <key>=<value>\n`, repeated; the length counts itself and the newline.
fn parse_pax(mut text: &[u8]) -> Result<Vec<Pair>, &'static str> {
    let mut records = Vec::new();
    while !text.is_empty() {
        let space = text.iter().position(|&b| b == b' ').ok_or("PAX record without length")?;
        let length: usize = std::str::from_utf8(&text[..space])
            .ok()
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok())
            .ok_or("PAX record with a bad length")?;
        if length <= space + 1 || length > text.len() || text[length - 1] != b'\n' {
            return Err("PAX record with a wrong length");
        }
        let record = &text[space + 1..length - 1];
        let equals = record.iter().position(|&b| b == b'=').ok_or("PAX record without '='")?;
        if equals == 0 {
            return Err("PAX record without a key");
        }
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        text = &text[length..];
    }
    Ok(records)
}

fn apply_pax(entry: &mut Entry, key: &[u8], value: Vec<u8>) -> Result<(), &'static str> {
    const XATTR: &[u8] = b"SCHILY.xattr.";
    if key.starts_with(b"GNU.sparse") {
        return Err("sparse files are not supported");
    }
    if let Some(name) = key.strip_prefix(XATTR) {
        if name.is_empty() || name.contains(&0) {
            return Err("PAX record with a bad xattr name");
        }
        entry.xattrs.retain(|(earlier, _)| earlier != name);
        entry.xattrs.push((name.to_vec(), value));
        return Ok(());
    }
    // An empty value takes an earlier record back; what the ustar header says then holds.
    if value.is_empty() {
        return Ok(());
    }
    let text = || std::str::from_utf8(&value).map_err(|_e| "PAX number is not text");
    match key {
        b"path" => entry.path = value,
        b"linkpath" => entry.link = value,
        b"size" => entry.size = text()?.parse().map_err(|_e| "PAX size is not a number")?,
        b"uid" => entry.uid = text()?.parse().map_err(|_e| "PAX uid is not a number")?,
        b"gid" => entry.gid = text()?.parse().map_err(|_e| "PAX gid is not a number")?,
        b"mtime" => entry.mtime = pax_time(text()?).ok_or("PAX mtime is not a time")?,
        _ => {}
    }
    Ok(())
}

/// Decimal seconds with an optional fraction, cut at nanoseconds.
fn pax_time(text: &str) -> Option<(i64, u32)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits = &fraction[..fraction.len().min(9)];
    let nanos = match digits {
        "" => 0,
        digits => digits.parse::<u32>().ok()? * 10_u32.pow(9 - digits.len() as u32),
    };
    if nanos > 0 && whole.starts_with('-') {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

/// The fields of one header block.
struct Header {
    path: Vec<u8>,
    link: Vec<u8>,
    kind: u8,
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    mtime: i64,
    device: (u32, u32),
}

impl Header {
    fn parse(block: &[u8; BLOCK]) -> Result<Self, String> {
        check_sum(block)?;
        let text = |from: usize, to: usize| until_nul(&block[from..to]);
        let posix = &block[257..263] == b"ustar\0";
        let gnu = &block[257..265] == b"ustar  \0";
        let mut path = text(0, 100).to_vec();
        let prefix = text(345, 500);
        if posix && !prefix.is_empty() {
            path = [prefix, b"/", &path].concat();
        }
        let kind = block[156];
        let number = |from: usize, to: usize, field: &str| {
            number(&block[from..to]).ok_or_else(|| format!("{field} is not a number"))
        };
        let narrow = |from, to, field: &str| {
            u32::try_from(number(from, to, field)?).map_err(|_e| format!("{field} out of range"))
        };
        let device = if matches!(kind, b'3' | b'4') && (posix || gnu) {
            (narrow(329, 337, "device major")?, narrow(337, 345, "device minor")?)
        } else {
            (0, 0)
        };
        Ok(Self {
            path,
            link: text(157, 257).to_vec(),
            kind,
            mode: narrow(100, 108, "mode")?,
            uid: narrow(108, 116, "uid")?,
            gid: narrow(116, 124, "gid")?,
            size: u64::try_from(number(124, 136, "size")?).map_err(|_e| "size is negative")?,
            mtime: number(136, 148, "mtime")?,
            device,
        })
    }
}

/// The sum of all bytes with the checksum field as spaces; some old writers summed signed bytes.
fn check_sum(block: &[u8; BLOCK]) -> Result<(), String> {
    let stated = number(&block[148..156]).ok_or("checksum is not a number")?;
    let bytes =
        || block.iter().enumerate().map(|(n, &b)| if (148..156).contains(&n) { b' ' } else { b });
    let unsigned: i64 = bytes().map(i64::from).sum();
    let signed: i64 = bytes().map(|b| i64::from(b.cast_signed())).sum();
    if stated == unsigned || stated == signed {
        Ok(())
    } else {
        Err("checksum does not match".to_owned())
    }
}

/// Octal digits padded with spaces and NULs, or GNU's big-endian two's complement.
fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (n, &byte) in field.iter().enumerate() {
            let byte = if n == 0 { (byte & 0x7f) | if negative { 0x80 } else { 0 } } else { byte };
            value = (value << 8) | i128::from(byte);
        }
        return i64::try_from(value).ok();
    }
    let text = std::str::from_utf8(field).ok()?;
    let digits = text.trim_matches([' ', '\0']);
    if digits.is_empty() {
        return Some(0);
    }
    if !digits.bytes().all(|b| matches!(b, b'0'..=b'7')) {
        return None;
    }
    i64::from_str_radix(digits, 8).ok()
}

#[cfg(test)]
mod tests;
