//! The programs that benches start inside namespaces: client, echo server, plain tokio relay.
#![forbid(unsafe_code)]

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use benches::{echo, load};
use clap::Parser;
use dataplane::sys::rlimit;
use tokio::net::{TcpListener, TcpStream};

/// What benches start inside namespaces.
#[derive(Debug, Parser)]
enum Program {
    /// Echo what comes in at an address.
    Serve { address: SocketAddr },
    /// Put load on an echo server; begins at a line on standard input.
    Run {
        kind: load::Kind,
        address: SocketAddr,
        /// Connections at once.
        #[arg(long, default_value_t = 32)]
        at_once: usize,
        /// Bytes of a request and of its answer.
        #[arg(long, default_value_t = load::MESSAGE)]
        message: usize,
        /// How long, in seconds.
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
    },
    /// Copy between pairs of `LISTEN=TARGET` addresses with tokio, as a plain program would.
    Copy { pairs: Vec<String> },
}

fn main() -> Result<()> {
    rlimit::raise_descriptors();
    match Program::parse() {
        Program::Serve { address } => echo::serve(address),
        Program::Run {
            kind,
            address,
            at_once,
            message,
            seconds,
        } => {
            let span = Duration::from_secs_f64(seconds);
            let outcome = load::run(kind, address, at_once, message, span)?;
            let mut out = std::io::stdout().lock();
            serde_json::to_writer(&mut out, &outcome)?;
            writeln!(out)?;
            Ok(())
        }
        Program::Copy { pairs } => copy(&pairs),
    }
}

#[tokio::main]
async fn copy(pairs: &[String]) -> Result<()> {
    let mut listening = Vec::new();
    for pair in pairs {
        let Some((listen, target)) = pair.split_once('=') else {
            anyhow::bail!("{pair}: LISTEN=TARGET is wanted");
        };
        let listener = TcpListener::bind(listen).await?;
        let target: SocketAddr = target.parse()?;
        listening.push(tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut container = TcpStream::connect(target).await?;
                    client.set_nodelay(true)?;
                    container.set_nodelay(true)?;
                    tokio::io::copy_bidirectional(&mut client, &mut container).await
                });
            }
        }));
    }
    for task in listening {
        task.await?;
    }
    Ok(())
}
