//! The event bus against real servers: bytes, order, outages, restarts, log-in, sentinels.

mod consoles;
mod idle;
mod manager;
mod outages;
mod publishing;
mod tls;
mod vectors;

use std::time::Duration;

use anyhow::{Result, ensure};
use control::events::bus::{Bus, BusServer, BusSettings};
use control::events::{Event, Events};
use control::kernel::lifecycle::Reason;
use shared::ids::{KernelId, SessionId};

/// Generous: these suites may run beside many others.
const LIMIT: Duration = Duration::from_secs(60);

/// Settings with short deadlines for a server on loopback.
fn settings(port: u16) -> BusSettings {
    let mut settings = BusSettings::new("i-evh", BusServer::plain("127.0.0.1", port));
    settings.connect_timeout = Duration::from_secs(2);
    settings.command_timeout = Duration::from_secs(2);
    settings
}

/// A bus and the handle events go through.
fn bus(settings: &BusSettings) -> Result<(Bus, Events)> {
    let bus = Bus::start(settings)?;
    let events = Events::new(64, vec![Box::new(bus.sink())]);
    Ok((bus, events))
}

/// The end of kernel number `n`.
fn ended(n: u16) -> Event {
    let mut id = [0; 16];
    id[..2].copy_from_slice(&n.to_be_bytes());
    Event::KernelTerminated {
        kernel: KernelId(id),
        session: SessionId([9; 16]),
        reason: Reason::SELF_TERMINATED,
        exit_code: Some(i64::from(n)),
    }
}

/// The numbers of ended kernels in a stream, in its order.
fn numbers(entries: &[harness::redis::StreamEntry]) -> Vec<u16> {
    entries
        .iter()
        .filter(|entry| entry.text("name") == "kernel_terminated")
        .filter_map(|entry| u16::try_from(entry.args().get(3)?.as_i64()?).ok())
        .collect()
}

async fn drained(bus: &Bus) -> Result<()> {
    ensure!(
        bus.drained(LIMIT).await,
        "events still wait: {:?}",
        *bus.state().borrow()
    );
    Ok(())
}
