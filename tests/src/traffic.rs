//! Byte streams whose every byte is known, to prove that what arrives is what was sent.
//!
//! In: a seed and a length. Out: senders and receivers that fail naming the first wrong offset.
//! Invariant: byte `n` of a stream depends on seed and `n` only, so a lost, doubled or swapped
//! piece is found wherever it is.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn};

/// How long a single read or write of a test may take before it is a hang.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A small deterministic generator (splitmix64), enough for traffic and independent of crates.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// Dice that fall the same way for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound` (which must not be 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn word_of(seed: u64, offset: u64) -> u64 {
    mix(seed ^ (offset / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// Byte number `offset` of the stream of `seed`.
pub fn byte(seed: u64, offset: u64) -> u8 {
    word_of(seed, offset).to_le_bytes()[usize::try_from(offset % 8).expect("below eight")]
}

/// Fills a buffer with the stream of `seed` from `offset` on.
pub fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    // Word by word in the middle: unoptimised tests send hundreds of megabytes.
    let head = usize::try_from((8 - offset % 8) % 8).expect("below eight");
    let (head, rest) = buffer.split_at_mut(head.min(buffer.len()));
    for (at, slot) in (offset..).zip(&mut *head) {
        *slot = byte(seed, at);
    }
    let mut at = offset + head.len() as u64;
    let mut words = rest.chunks_exact_mut(8);
    for word in &mut words {
        word.copy_from_slice(&word_of(seed, at).to_le_bytes());
        at += 8;
    }
    for (at, slot) in (at..).zip(words.into_remainder()) {
        *slot = byte(seed, at);
    }
}

/// How one end treats a stream.
#[derive(Debug, Clone, Copy)]
pub struct Manner {
    /// Largest piece written or read at once, in bytes.
    pub piece: usize,
    /// One in so many pieces is followed by a pause; 0 means none is.
    pub pause_every: u64,
    /// Length of a pause.
    pub pause: Duration,
}

impl Manner {
    /// As fast as it goes with pieces of up to this size.
    pub fn eager(piece: usize) -> Self {
        Self {
            piece,
            pause_every: 0,
            pause: Duration::ZERO,
        }
    }

    fn rest(&self, dice: &mut Dice) {
        if self.pause_every != 0 && dice.below(self.pause_every) == 0 {
            std::thread::sleep(self.pause);
        }
    }
}

/// Sends `length` bytes of the stream of `seed` in pieces of random size.
pub fn send(stream: &mut TcpStream, seed: u64, length: u64, manner: Manner) -> std::io::Result<()> {
    let mut dice = Dice::new(seed ^ 0x5e4d);
    let mut buffer = vec![0; manner.piece];
    let mut offset = 0;
    while offset < length {
        let piece = (1 + dice.below(manner.piece as u64)).min(length - offset);
        let piece = usize::try_from(piece).expect("a piece fits in memory");
        let bytes = &mut buffer[..piece];
        fill(seed, offset, bytes);
        stream.write_all(bytes)?;
        offset += piece as u64;
        manner.rest(&mut dice);
    }
    Ok(())
}

/// Reads to the end of the stream and compares every byte. Returns the length.
///
/// # Errors
/// What is wrong and at which offset, or how reading failed.
pub fn receive(stream: &mut TcpStream, seed: u64, manner: Manner) -> Result<u64, String> {
    let mut dice = Dice::new(seed ^ 0x4ece);
    let mut buffer = vec![0; manner.piece];
    let mut want = vec![0; manner.piece];
    let mut offset = 0;
    loop {
        let piece = usize::try_from(1 + dice.below(manner.piece as u64)).expect("small");
        let read = match stream.read(&mut buffer[..piece]) {
            Ok(0) => return Ok(offset),
            Ok(read) => read,
            Err(err) if err.kind() == ErrorKind::Interrupted => continue,
            Err(err) => return Err(format!("reading at offset {offset}: {err}")),
        };
        fill(seed, offset, &mut want[..read]);
        if buffer[..read] != want[..read] {
            let wrong = buffer.iter().zip(&want).position(|(got, want)| got != want);
            return Err(format!(
                "byte {} is wrong",
                offset + wrong.unwrap_or(0) as u64
            ));
        }
        offset += read as u64;
        manner.rest(&mut dice);
    }
}

/// A stream connected to `address`, with deadlines.
pub fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    patient(&stream)?;
    Ok(stream)
}

/// The same from an address of its own.
pub fn connect_from(own: SocketAddrV4, to: SocketAddr) -> std::io::Result<TcpStream> {
    let SocketAddr::V4(to) = to else {
        return Err(ErrorKind::AddrNotAvailable.into());
    };
    let socket = socket::socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::empty(),
        None,
    )?;
    socket::bind(socket.as_raw_fd(), &SockaddrIn::from(own))?;
    socket::connect(socket.as_raw_fd(), &SockaddrIn::from(to))?;
    let stream = TcpStream::from(socket);
    patient(&stream)?;
    Ok(stream)
}

/// Ends a stream by a reset: no state is left that would keep its port.
pub fn reset(stream: TcpStream) {
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    socket::setsockopt(&stream, socket::sockopt::Linger, &linger).expect("an option");
}

/// Gives a stream deadlines, so that a hang becomes a failure.
pub fn patient(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

/// A listener on a free loopback port.
pub fn listener(address: &str) -> TcpListener {
    TcpListener::bind(address).expect("a free loopback port")
}

/// A server that echoes every connection until its client ends; runs until the process does.
pub fn echo_server(address: &str) -> SocketAddr {
    let listener = listener(address);
    let at = listener.local_addr().expect("a bound listener");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut buffer = vec![0; 64 * 1024];
                while let Ok(read) = stream.read(&mut buffer) {
                    if read == 0 || stream.write_all(&buffer[..read]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    at
}

/// Sends a word and takes all that comes back.
pub fn ask(address: SocketAddr, word: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = connect(address)?;
    stream.write_all(word)?;
    stream.shutdown(Shutdown::Write)?;
    let mut back = Vec::new();
    stream.read_to_end(&mut back)?;
    Ok(back)
}

/// True when the connection was refused or reset without a byte.
pub fn turned_away(address: SocketAddr) -> bool {
    match connect(address) {
        Err(_) => true,
        Ok(mut stream) => {
            matches!(stream.read(&mut [0]), Err(err) if err.kind() == ErrorKind::ConnectionReset)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_however_it_is_cut() {
        let mut whole = vec![0; 100];
        fill(7, 3, &mut whole);
        for cut in 0..100 {
            let (mut a, mut b) = (vec![0; cut], vec![0; 100 - cut]);
            fill(7, 3, &mut a);
            fill(7, 3 + cut as u64, &mut b);
            a.extend(b);
            assert_eq!(a, whole, "cut at {cut}");
        }
        assert_eq!(whole[0], byte(7, 3));
    }
}
