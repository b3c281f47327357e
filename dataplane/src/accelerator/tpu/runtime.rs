//! What the process that holds the chips tells of them: the metric service of libtpu, when it serves
//! one, on one connection with as much of HTTP/2 and gRPC as three questions without compression take.
//!
//! In: an address. Out: memory and load per chip. Invariants: nobody listening costs one refused
//! connection; nothing a peer sends makes this wait longer or keep more than the constants say; what
//! cannot be matched with the chips of this host is absent.
//!
//! Sources: Google's published definition of `tpu.monitoring.runtime.RuntimeMetricService` and its tool
//! `tpu-info`; RFC 9113 (frames), RFC 7541 (header fields as literals), gRPC over HTTP/2.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const TOTAL: &str = "tpu.runtime.hbm.memory.total.bytes";
const USED: &str = "tpu.runtime.hbm.memory.usage.bytes";
const LOAD: &str = "tpu.runtime.tensorcore.dutycycle.percent";
const METHOD: &str = "/tpu.monitoring.runtime.RuntimeMetricService/GetRuntimeMetric";

/// Connecting to an address of this host takes no time at all, or forever.
const CONNECT: Duration = Duration::from_millis(200);
/// All three answers.
const DEADLINE: Duration = Duration::from_secs(2);
/// The window of a peer that is not told of another one (RFC 9113, 6.9.2): more is never sent.
const WINDOW: usize = 65_535;
/// The largest frame that the protocol allows without being asked.
const FRAME: usize = 16_384;
/// Frames in all; three answers take a dozen.
const FRAMES: usize = 1_000;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACKNOWLEDGE: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

/// What is told of a chip.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Chip {
    /// Memory, bytes.
    pub memory_total_bytes: Option<u64>,
    /// Memory used, bytes.
    pub memory_used_bytes: Option<u64>,
    /// Busy share, thousandths.
    pub utilisation_permille: Option<u64>,
}

/// Asks for all chips of this host; none when nobody answers.
pub fn ask(address: SocketAddr, chips: usize) -> Option<Vec<Chip>> {
    let stream = TcpStream::connect_timeout(&address, CONNECT).ok()?;
    let answers = converse(Timed::new(stream).ok()?, address)
        .inspect_err(|err| tracing::debug!(%err, %address, "a TPU runtime tells nothing"))
        .ok()?;
    Some(per_chip(&answers, chips))
}

/// A connection whose calls all together have a deadline.
struct Timed {
    stream: TcpStream,
    until: Instant,
}

impl Timed {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let until = Instant::now() + DEADLINE;
        Ok(Self { stream, until })
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(Some(left)),
        }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Values by the number of the core or chip.
type Values = BTreeMap<i64, f64>;

/// Asks the three questions; answers are in their order.
fn converse<S: Read + Write>(mut stream: S, authority: SocketAddr) -> io::Result<[Values; 3]> {
    let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    frame(&mut out, SETTINGS, 0, 0, &[]);
    let mut headers = vec![0x83, 0x86]; // `:method: POST` and `:scheme: http` of the static table.
    field(&mut headers, 4, "", METHOD);
    field(&mut headers, 1, "", &authority.to_string());
    field(&mut headers, 0, "content-type", "application/grpc");
    field(&mut headers, 0, "te", "trailers");
    for (stream, metric) in [1_u32, 3, 5].into_iter().zip([TOTAL, USED, LOAD]) {
        frame(&mut out, HEADERS, END_HEADERS, stream, &headers);
        // `MetricRequest { metric_name = 1 }` after the byte for compression and the length.
        let length = u8::try_from(metric.len()).unwrap_or(u8::MAX);
        let mut body = vec![0, 0, 0, 0, length + 2, 0x0a, length];
        body.extend(metric.bytes());
        frame(&mut out, DATA, END_STREAM, stream, &body);
    }
    stream.write_all(&out)?;
    let mut bodies: [Vec<u8>; 3] = Default::default();
    let mut open = 3;
    let mut kept = 0;
    for _ in 0..FRAMES {
        if open == 0 {
            return Ok(bodies.map(|body| values(&body).unwrap_or_default()));
        }
        let mut head = [0; 9];
        stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > FRAME {
            return Err(refused("its frame is too large"));
        }
        let (kind, flags) = (head[3], head[4]);
        let number = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload)?;
        let mut answer = Vec::new();
        match kind {
            SETTINGS if flags & ACKNOWLEDGE == 0 => frame(&mut answer, SETTINGS, 1, 0, &[]),
            PING if flags & ACKNOWLEDGE == 0 => frame(&mut answer, PING, 1, 0, &payload),
            GOAWAY => return Err(refused("it goes away")),
            _ => {}
        }
        stream.write_all(&answer)?;
        let place = match number {
            1 | 3 | 5 => usize::try_from(number / 2).unwrap_or(0),
            _ => continue,
        };
        if kind == DATA {
            kept += length;
            if kept > WINDOW {
                return Err(refused("it answers too much"));
            }
            bodies[place].extend_from_slice(unpadded(&payload, flags)?);
        }
        if kind == RESET || (matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0) {
            open -= 1;
        }
    }
    Err(refused("it sends frames without end"))
}

fn refused(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// A field as a literal that is not remembered (RFC 7541, 6.2.2), its name out of the static table or
/// written out. All are shorter than what needs more than a byte of length.
fn field(block: &mut Vec<u8>, index: u8, name: &str, value: &str) {
    block.push(index);
    let written = (index == 0).then_some(name);
    for text in written.into_iter().chain([value]) {
        block.push(u8::try_from(text.len()).unwrap_or(0) & 0x7f);
        block.extend(text.bytes());
    }
}

fn unpadded(payload: &[u8], flags: u8) -> io::Result<&[u8]> {
    if flags & PADDED == 0 {
        return Ok(payload);
    }
    let wrong = || refused("its padding is longer than its frame");
    let (padding, body) = payload.split_first().ok_or_else(wrong)?;
    let length = body.len().checked_sub(usize::from(*padding));
    Ok(&body[..length.ok_or_else(wrong)?])
}

/// The values of a `MetricResponse`, which comes after a byte for compression and its length.
fn values(body: &[u8]) -> Option<Values> {
    let ([0, length @ ..], rest) = body.split_first_chunk::<5>()? else {
        return None;
    };
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let metric = Fields(rest.get(..length)?).bytes(1)?;
    let mut values = Values::new();
    for entry in Fields(metric).filter_map(|field| match field {
        (3, Wire::Bytes(entry)) => Some(entry),
        _ => None,
    }) {
        // `Metric { attribute = 1 { value = 2 { int_attr = 3 } }, gauge = 3 { as_double = 1, as_int = 2 } }`
        let attribute = Fields(entry).bytes(1).unwrap_or_default();
        let attribute = Fields(attribute).bytes(2).unwrap_or_default();
        let number = Fields(attribute).find_map(|field| match field {
            (3, Wire::Number(number)) => Some(number.cast_signed()),
            _ => None,
        });
        let gauge = Fields(entry).bytes(3).unwrap_or_default();
        let value = Fields(gauge).find_map(|field| match field {
            (1, Wire::Double(value)) => Some(value),
            // Bytes and percents: exact far beyond what there is.
            (2, Wire::Number(number)) => Some(number.cast_signed() as f64),
            _ => None,
        });
        // A number of 0 is left out, and so is a value of 0.
        values.insert(number.unwrap_or(0), value.unwrap_or(0.0));
    }
    Some(values)
}

/// Fields of a protobuf message, up to the first that makes no sense.
#[derive(Clone, Copy)]
struct Fields<'b>(&'b [u8]);

enum Wire<'b> {
    Number(u64),
    Double(f64),
    Bytes(&'b [u8]),
    Other,
}

impl<'b> Fields<'b> {
    fn bytes(mut self, wanted: u64) -> Option<&'b [u8]> {
        self.find_map(|field| match field {
            (number, Wire::Bytes(bytes)) if number == wanted => Some(bytes),
            _ => None,
        })
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for place in 0..10 {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f).checked_shl(7 * place)?;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}

impl<'b> Iterator for Fields<'b> {
    type Item = (u64, Wire<'b>);

    fn next(&mut self) -> Option<Self::Item> {
        let tag = self.varint()?;
        let wire = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            1 => Wire::Double(f64::from_le_bytes(self.take(8)?.try_into().ok()?)),
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => {
                self.take(4)?;
                Wire::Other
            }
            _ => return None,
        };
        Some((tag >> 3, wire))
    }
}

/// Values of cores are summed or averaged by chip. When there are not as many for each chip, the
/// runtime has only some of the chips, and nothing says which.
fn per_chip(answers: &[Values; 3], chips: usize) -> Vec<Chip> {
    let parts = |values: &Values| -> Option<Vec<Vec<f64>>> {
        let all: Vec<f64> = values.values().copied().collect();
        let fits = chips > 0 && !all.is_empty() && all.len().is_multiple_of(chips);
        fits.then(|| all.chunks(all.len() / chips).map(<[f64]>::to_vec).collect())
    };
    let [total, used, load] = answers;
    let (total, used, load) = (parts(total), parts(used), parts(load));
    let of = |parts: &Option<Vec<Vec<f64>>>, chip: usize| parts.as_ref()?.get(chip).cloned();
    (0..chips)
        .map(|chip| Chip {
            memory_total_bytes: of(&total, chip).and_then(|all| whole(all.iter().sum())),
            memory_used_bytes: of(&used, chip).and_then(|all| whole(all.iter().sum())),
            utilisation_permille: of(&load, chip).and_then(|all| {
                let count = u32::try_from(all.len()).ok()?;
                let percent = all.iter().sum::<f64>() / f64::from(count);
                whole((percent.clamp(0.0, 100.0) * 10.0).round())
            }),
        })
        .collect()
}

/// Whole and not negative, else none.
fn whole(value: f64) -> Option<u64> {
    // The largest number that a double tells from its neighbours.
    let fits = (0.0..=9_007_199_254_740_992.0).contains(&value);
    #[allow(clippy::cast_possible_truncation)]
    fits.then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field_bytes(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        out.extend(bytes);
        out
    }

    fn entry(number: u8, gauge: &[u8]) -> Vec<u8> {
        let value = field_bytes(2, &[3 << 3, number]);
        let attribute = [field_bytes(1, b"device-id"), value].concat();
        field_bytes(
            3,
            &[field_bytes(1, &attribute), field_bytes(3, gauge)].concat(),
        )
    }

    /// An answer with these entries as its body.
    fn answer(entries: &[Vec<u8>]) -> Vec<u8> {
        let metric = [field_bytes(1, b"name"), entries.concat()].concat();
        let message = field_bytes(1, &metric);
        let mut body = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap()];
        body.extend(message);
        body
    }

    struct Peer {
        sends: io::Cursor<Vec<u8>>,
        got: Vec<u8>,
    }

    impl Read for Peer {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.sends.read(buffer)
        }
    }

    impl Write for Peer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.got.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn conversation(sends: Vec<u8>) -> io::Result<[Values; 3]> {
        let peer = Peer {
            sends: io::Cursor::new(sends),
            got: Vec::new(),
        };
        converse(peer, ([127, 0, 0, 1], 8431).into())
    }

    #[test]
    fn answers_are_read_from_their_frames() {
        let gauge = |value: f64| [vec![1 << 3 | 1], value.to_le_bytes().to_vec()].concat();
        let memory = [entry(1, &[2 << 3, 7]), entry(0, &[2 << 3, 5])];
        let load = [entry(0, &gauge(12.5)), entry(1, &[])];
        let mut sends = Vec::new();
        frame(&mut sends, SETTINGS, 0, 0, &[]);
        frame(&mut sends, PING, 0, 0, b"12345678");
        for (stream, entries) in [(1, &memory[..]), (5, &load), (3, &[])] {
            frame(&mut sends, HEADERS, END_HEADERS, stream, b"not decoded");
            let body = answer(entries);
            frame(&mut sends, DATA, 0, stream, &body[..4]);
            frame(&mut sends, DATA, 0, stream, &body[4..]);
            frame(&mut sends, HEADERS, END_HEADERS | END_STREAM, stream, &[]);
        }
        let answers = conversation(sends.clone()).unwrap();
        let chip = |total, load| Chip {
            memory_total_bytes: total,
            memory_used_bytes: None,
            utilisation_permille: Some(load),
        };
        assert_eq!(
            per_chip(&answers, 2),
            [chip(Some(5), 125), chip(Some(7), 0)]
        );
        // Two cores of one chip.
        assert_eq!(per_chip(&answers, 1), [chip(Some(12), 63)]);
        // Some of the chips of this host, nobody knows which.
        assert_eq!(per_chip(&answers, 3), [Chip::default(); 3]);
        assert!(conversation(sends[..sends.len() - 1].to_vec()).is_err());
        let mut many = Vec::new();
        for _ in 0..5 {
            frame(&mut many, DATA, 0, 1, &[0; FRAME]);
        }
        assert!(conversation(many).is_err());
    }

    #[test]
    fn numbers_that_cannot_be_are_none() {
        for wrong in [f64::NAN, f64::INFINITY, -1.0, 1e300] {
            assert_eq!(whole(wrong), None);
        }
        let load = Values::from([(0, f64::NAN)]);
        let answers = [Values::new(), Values::new(), load];
        assert_eq!(per_chip(&answers, 1), [Chip::default()]);
    }

    proptest! {
        #[test]
        fn bytes_never_panic(sent in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = conversation(sent.clone());
            let _ = values(&sent);
            let mut framed = Vec::new();
            for stream in [1, 3, 5] {
                frame(&mut framed, DATA, END_STREAM, stream, &sent);
            }
            let _ = conversation(framed);
        }
    }
}
