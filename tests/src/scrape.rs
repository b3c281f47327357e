//! The page of metrics of a node.
//!
//! In: where it is served. Out: the page, and single values in it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// The page at this address.
pub fn page(address: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).context("nobody listens")?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    // Version 1.0 has no chunks.
    write!(stream, "GET /metrics HTTP/1.0\r\nHost: node\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let (head, page) = reply.split_once("\r\n\r\n").context("no end of the head")?;
    ensure!(head.contains(" 200 "), "the answer is {head}");
    Ok(page.to_owned())
}

/// The first value of a series, among whose labels is this text.
pub fn value(page: &str, series: &str, label: &str) -> Option<f64> {
    page.lines()
        .filter_map(|line| line.rsplit_once(' '))
        .find(|(key, _)| key.split('{').next() == Some(series) && key.contains(label))
        .and_then(|(_, value)| value.parse().ok())
}
