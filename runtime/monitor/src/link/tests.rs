use super::*;
use proptest::prelude::*;
use std::os::unix::net::UnixStream;
use std::time::Duration;

type Loop = Reactor<LinkPart, ()>;

struct Side {
    link: Link<LinkPart>,
    reactor: Loop,
    packets: Vec<What>,
}

fn pipe() -> (OwnedFd, OwnedFd) {
    use rustix::pipe::{PipeFlags, pipe_with};
    pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap()
}

fn end(socket: UnixStream) -> Side {
    socket.set_nonblocking(true).unwrap();
    let mut reactor = Loop::new().unwrap();
    let link = Link::new(socket.into(), |part| part, &mut reactor).unwrap();
    Side { link, reactor, packets: Vec::new() }
}

fn pair() -> (Side, Side) {
    let (a, b) = UnixStream::pair().unwrap();
    (end(a), end(b))
}

impl Side {
    /// Serves what is ready now; whether anything was.
    fn turn(&mut self) -> Result<bool, LinkError> {
        let mut ready = Vec::new();
        self.reactor.after(Duration::ZERO, ());
        self.reactor.wait(&mut ready).unwrap();
        while self.reactor.expired().is_some() {}
        for (token, what) in &ready {
            if let Some(part) = self.reactor.source(*token) {
                self.link.ready(part, *what, &mut self.reactor, &mut self.packets)?;
            }
        }
        Ok(!ready.is_empty())
    }
}

/// Lets both sides work until neither has anything to do.
fn settle(a: &mut Side, b: &mut Side) {
    for _ in 0..2000 {
        let (left, right) = (a.turn().unwrap(), b.turn().unwrap());
        if !left && !right {
            return;
        }
    }
}

fn read_all(fd: &OwnedFd) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    while let Ok(n) = rustix::io::read(fd, buffer.as_mut_slice()) {
        if n == 0 {
            break;
        }
        all.extend_from_slice(&buffer[..n]);
    }
    all
}

#[test]
fn bytes_and_their_end_cross_the_channel() {
    let (mut a, mut b) = pair();
    let ((from, into), (out, to)) = (pipe(), pipe());
    a.link.open_reader(1, from, &mut a.reactor).unwrap();
    b.link.open_writer(1, to, &mut b.reactor).unwrap();
    rustix::io::write(&into, b"hello").unwrap();
    settle(&mut a, &mut b);
    assert_eq!(read_all(&out), b"hello");
    drop(into);
    settle(&mut a, &mut b);
    assert!(!a.link.is_open(1) && !b.link.is_open(1));
    assert_eq!(rustix::io::read(&out, &mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_reader_that_is_slow_holds_up_its_own_stream_only() {
    let (mut a, mut b) = pair();
    let ((slow_from, slow_into), (slow_out, slow_to)) = (pipe(), pipe());
    let ((from, into), (out, to)) = (pipe(), pipe());
    a.link.open_reader(1, slow_from, &mut a.reactor).unwrap();
    b.link.open_writer(1, slow_to, &mut b.reactor).unwrap();
    a.link.open_reader(2, from, &mut a.reactor).unwrap();
    b.link.open_writer(2, to, &mut b.reactor).unwrap();
    let mut written = 0;
    for _ in 0..64 {
        while let Ok(n) = rustix::io::write(&slow_into, &[7; 4096]) {
            written += n;
        }
        settle(&mut a, &mut b);
    }
    // a pipe on each side and one window between them
    assert!(written <= 3 * 65536 + 4096, "{written} bytes went in");
    rustix::io::write(&into, b"fast").unwrap();
    settle(&mut a, &mut b);
    assert_eq!(read_all(&out), b"fast");
    let mut got = 0;
    drop(slow_into);
    for _ in 0..64 {
        got += read_all(&slow_out).len();
        settle(&mut a, &mut b);
    }
    assert_eq!(got, written);
}

#[test]
fn a_reader_that_leaves_ends_the_writer() {
    let (mut a, mut b) = pair();
    let ((from, into), (out, to)) = (pipe(), pipe());
    a.link.open_reader(1, from, &mut a.reactor).unwrap();
    b.link.open_writer(1, to, &mut b.reactor).unwrap();
    drop(out);
    settle(&mut a, &mut b);
    assert!(!a.link.is_open(1) && !b.link.is_open(1));
    assert_eq!(rustix::io::write(&into, b"x").unwrap_err(), Errno::PIPE);
}

/// What one packet, sent by a hostile other side, comes to.
fn told(setup: impl FnOnce(&mut Side), what: What) -> Result<bool, LinkError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut end = end(ours);
    setup(&mut end);
    let bytes = encode(&Packet { what: Some(what) }).unwrap();
    rustix::io::write(&theirs, &bytes).unwrap();
    let result = end.turn();
    drop(theirs);
    result
}

#[test]
fn what_breaks_the_protocol_ends_the_link() {
    let nothing = |_: &mut Side| {};
    let reader = |end: &mut Side| {
        let (from, into) = pipe();
        Box::leak(Box::new(into));
        end.link.open_reader(5, from, &mut end.reactor).unwrap();
    };
    let writer = |end: &mut Side| {
        let (out, to) = pipe();
        Box::leak(Box::new(out));
        end.link.open_writer(5, to, &mut end.reactor).unwrap();
    };
    let data = |stream, length| What::Data(Data { stream, bytes: vec![0; length] });
    let credit = |stream, bytes| What::Credit(Credit { stream, bytes });
    assert!(told(nothing, data(1, 1)).is_err());
    assert!(told(nothing, What::End(End { stream: 9 })).is_err());
    assert!(told(nothing, What::Cut(Cut { stream: 0 })).is_err());
    assert!(told(writer, data(6, 1)).is_err());
    assert!(told(reader, data(5, 1)).is_err());
    assert!(told(reader, credit(5, 1)).is_err());
    assert!(told(reader, credit(5, u32::MAX)).is_err());
    assert!(told(writer, credit(5, 1)).is_err());
    assert!(told(writer, What::Cut(Cut { stream: 5 })).is_err());
    assert!(told(writer, data(5, WINDOW as usize + 1)).is_err());
    // of a stream that is over by now, all may be said
    assert!(told(writer, data(4, 1)).is_ok());
    assert!(told(writer, data(5, 100)).is_ok());
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_packets_or_an_error(
        bytes in prop::collection::vec(any::<u8>(), 0..512),
    ) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut end = end(ours);
        rustix::io::write(&theirs, &bytes).unwrap();
        drop(theirs);
        while matches!(end.turn(), Ok(true)) {}
        prop_assert!(end.link.unsent.is_empty());
    }
}
