//! Plays a control that is killed: publishes one port row, says so, and lives until then.
//!
//! Arguments: control's directory, the dataplane's directory, host port, target address.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use shared::Sizes;
use shared::desired::{DesiredWriter, PortKey, PortRow, Protocol};
use shared::doorbell::Ringer;
use shared::ids::{ContainerId, KernelId};

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let mut word = |what: &'static str| words.next().context(what);
    let control = word("control's directory")?;
    let dataplane = word("the dataplane's directory")?;
    let host_port = word("the host port")?.parse()?;
    let target: SocketAddr = word("the target")?.parse()?;
    let mut desired = DesiredWriter::open(control, Sizes::default())?;
    let key = PortKey {
        protocol: Protocol::Tcp,
        host_port,
    };
    let mut row = PortRow::new(
        key,
        KernelId([7; 16]),
        ContainerId([9; 32]),
        target.ip(),
        target.port(),
    );
    row.bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
    desired.batch(|batch| batch.put_port(row))?;
    Ringer::of(dataplane)?.ring()?;
    println!("published");
    loop {
        std::thread::park();
    }
}
