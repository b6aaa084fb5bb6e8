//! The tar reader against the tar crate as oracle, and against hostile archives.

use ::tar::{Builder, EntryType, Header as TarHeader};
use proptest::prelude::*;

use super::*;
use crate::unpack::chunks;

/// Everything the reader makes of an archive: entries with their data.
fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, LayerError> {
    let (filled, mut chunks) = chunks::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for part in archive.chunks(1000) {
                if !filled.send(part.to_vec()) {
                    return;
                }
            }
        });
        let mut reader = Reader::new(&mut chunks);
        let mut entries = Vec::new();
        let result = loop {
            match reader.next() {
                Ok(Some(entry)) => {
                    let mut data = Vec::new();
                    if reader.copy_to(&mut data).is_err() {
                        break Err(reader.bad("short"));
                    }
                    entries.push((entry, data));
                }
                Ok(None) => break Ok(entries),
                Err(e) => break Err(e),
            }
        };
        drop(chunks);
        result
    })
}

fn reason(archive: &[u8]) -> String {
    match read(archive) {
        Err(e) => e.to_string(),
        Ok(entries) => panic!("accepted: {entries:?}"),
    }
}

fn block(name: &str, kind: u8, size: u64) -> Vec<u8> {
    let mut header = TarHeader::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_mode(0o644);
    header.set_uid(1);
    header.set_gid(2);
    header.set_mtime(3);
    header.set_size(size);
    header.as_mut_bytes()[156] = kind;
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn padded(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    data.resize(data.len().next_multiple_of(512), 0);
    data
}

fn file(name: &str, data: &[u8]) -> Vec<u8> {
    [block(name, b'0', data.len() as u64), padded(data)].concat()
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    pax_kind(b'x', records)
}

fn pax_kind(kind: u8, records: &[(&str, &str)]) -> Vec<u8> {
    let mut text = Vec::new();
    for (key, value) in records {
        let rest = format!(" {key}={value}\n");
        let mut length = rest.len() + 1;
        while length != rest.len() + length.to_string().len() {
            length = rest.len() + length.to_string().len();
        }
        text.extend(format!("{length}{rest}").into_bytes());
    }
    [block("pax", kind, text.len() as u64), padded(&text)].concat()
}

fn end() -> Vec<u8> {
    vec![0; 1024]
}

#[test]
fn what_a_common_writer_writes_is_read_back() {
    let mut builder = Builder::new(Vec::new());
    let mut header = TarHeader::new_gnu();
    header.set_mode(0o4755);
    header.set_uid(3_000_000); // too large for octal
    header.set_gid(7);
    header.set_mtime(1_700_000_000);
    header.set_size(5);
    let long = "d/".repeat(80) + "name";
    builder.append_data(&mut header, &long, &b"hello"[..]).unwrap();
    let mut link = TarHeader::new_gnu();
    link.set_entry_type(EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, "l", "t/".repeat(90)).unwrap();
    let entries = read(&builder.into_inner().unwrap()).unwrap();
    let (entry, data) = &entries[0];
    assert_eq!(entry.path, long.as_bytes());
    assert_eq!((entry.mode, entry.uid, entry.gid), (0o4755, 3_000_000, 7));
    assert_eq!((entry.mtime, data.as_slice()), ((1_700_000_000, 0), &b"hello"[..]));
    assert_eq!(entries[1].0.kind, Kind::Symlink);
    assert_eq!(entries[1].0.link, "t/".repeat(90).into_bytes());
}

#[test]
fn pax_records_win_over_the_header() {
    let archive = [
        pax(&[
            ("path", "long/name"),
            ("size", "5"),
            ("uid", "4000000000"),
            ("mtime", "-1.5"),
            ("SCHILY.xattr.user.a", "line\nbreak=x"),
            ("comment", "ignored"),
        ]),
        // The header says 0 bytes; whoever believed it would take the data for a header.
        block("short", b'0', 0),
        padded(b"hello"),
        file("next", b"x"),
        end(),
    ]
    .concat();
    let entries = read(&archive).unwrap();
    assert_eq!(entries.len(), 2);
    let (entry, data) = &entries[0];
    assert_eq!((entry.path.as_slice(), data.as_slice()), (&b"long/name"[..], &b"hello"[..]));
    assert_eq!((entry.uid, entry.mtime), (4_000_000_000, (-2, 500_000_000)));
    assert_eq!(entry.xattrs, [(b"user.a".to_vec(), b"line\nbreak=x".to_vec())]);
}

#[test]
fn links_and_directories_have_no_data_whatever_they_claim() {
    for kind in *b"123456" {
        let archive = [block("a", kind, 512), file("b", b"x"), end()].concat();
        let entries = read(&archive).unwrap();
        assert_eq!(entries.len(), 2, "type {}", kind as char);
    }
}

#[test]
fn old_archives_mark_directories_by_a_slash() {
    let entries = read(&[block("d/", b'0', 0), block("f", 0, 0), end()].concat()).unwrap();
    assert_eq!((entries[0].0.kind, entries[1].0.kind), (Kind::Directory, Kind::File));
}

#[test]
fn an_archive_may_end_without_its_empty_blocks() {
    assert_eq!(read(&file("a", b"x")).unwrap().len(), 1);
    assert_eq!(read(b"").unwrap().len(), 0);
}

#[test]
fn malformed_and_ambiguous_archives_are_refused() {
    let mut bad_sum = file("a", b"x");
    bad_sum[0] = b'b';
    let long_name = [block("l", b'L', 5), padded(b"name\0")].concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (bad_sum, "checksum"),
        (file("a", b"x")[..600].to_vec(), "ends within"),
        (file("a", b"x")[..100].to_vec(), "ends within a header"),
        ([vec![0; 512], file("a", b"x")].concat(), "one empty block"),
        ([pax(&[("path", "a")]), end()].concat(), "without an entry"),
        ([pax(&[("a", "b")]), pax(&[("a", "b")]), file("a", b"")].concat(), "two PAX"),
        ([pax(&[("path", "a")]), long_name, file("a", b"")].concat(), "both name"),
        ([pax(&[("size", "12x")]), file("a", b"")].concat(), "size is not a number"),
        ([pax(&[("path", "a\0b")]), file("a", b"")].concat(), "NUL"),
        ([pax(&[("GNU.sparse.major", "1")]), file("a", b"")].concat(), "sparse"),
        ([pax_kind(b'g', &[("size", "1")]), file("a", b"")].concat(), "global"),
        ([block("a", b'S', 0), end()].concat(), "sparse"),
        ([block("a", b'Z', 0), end()].concat(), "unknown entry type"),
        ([block("p", b'x', 6), padded(b"99 a=b"), file("a", b"")].concat(), "wrong length"),
        ([block("p", b'x', 3), padded(b"abc"), file("a", b"")].concat(), "without length"),
    ];
    for (archive, expected) in cases {
        let reason = reason(&archive);
        assert!(reason.contains(expected), "{reason} lacks {expected:?}");
    }
}

#[test]
fn extended_headers_end_at_one_mebibyte() {
    for kind in *b"xgLK" {
        for size in [MAX_EXTENDED + 1, 8 << 30] {
            let error = read(&block("p", kind, size)).unwrap_err();
            assert!(matches!(error, LayerError::TooLarge { .. }), "{error}");
        }
    }
    let name = vec![b'n'; MAX_EXTENDED as usize];
    let archive = [block("l", b'L', MAX_EXTENDED), name, file("a", b"")].concat();
    assert_eq!(read(&archive).unwrap().len(), 1);
}

proptest! {
    #[test]
    fn any_bytes_give_an_error_or_entries(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let _ = read(&bytes);
    }

    #[test]
    fn a_flipped_byte_never_panics(at in 0_usize..4000, flip in 1_u8..) {
        let mut archive = [
            pax(&[("path", "some/name"), ("SCHILY.xattr.user.a", "v")]),
            file("a", b"hello"),
            block("l", b'L', 5), padded(b"name\0"),
            file("b", &[7; 700]),
            end(),
        ].concat();
        let at = at % archive.len();
        archive[at] ^= flip;
        let _ = read(&archive);
    }

    #[test]
    fn accepted_archives_list_the_same_files_as_the_tar_crate(
        files in prop::collection::vec(("[a-z]{1,8}(/[a-z]{1,90}){0,3}", prop::collection::vec(any::<u8>(), 0..1500)), 0..6)
    ) {
        let mut builder = Builder::new(Vec::new());
        for (name, data) in &files {
            let mut header = TarHeader::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, data.as_slice()).unwrap();
        }
        let archive = builder.into_inner().unwrap();
        let ours: Vec<_> = read(&archive).unwrap().into_iter()
            .map(|(entry, data)| (String::from_utf8(entry.path).unwrap(), data))
            .collect();
        prop_assert_eq!(ours, files);
    }
}
