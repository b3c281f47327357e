//! Ports of this host for the tests of one process.
//!
//! In: nothing. Out: numbers below the range the kernel gives out. Invariant: two test processes never
//! have a port in common, and none is given out twice: a port that was merely free a moment ago may be
//! somebody else's when it is bound.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// The first block begins here ...
const FIRST: u16 = 10_000;
/// ... each has so many ports ...
const BLOCK: u16 = 500;
/// ... and there are so many.
const BLOCKS: u16 = 39;

/// What this process has: the block's lock and the ports in it that were not given out.
#[derive(Debug)]
struct Block {
    next: u16,
    end: u16,
    _lock: File,
}

fn take_block() -> Result<Block> {
    let directory = std::env::temp_dir().join("bai-agent-test-ports");
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let origin = u16::try_from(std::process::id() % u32::from(BLOCKS)).unwrap_or(0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        for step in 0..BLOCKS {
            let number = (origin + step) % BLOCKS;
            let lock = File::create(directory.join(number.to_string()))?;
            // Held until the process ends, however it ends.
            if lock.try_lock().is_ok() {
                let next = FIRST + number * BLOCK;
                return Ok(Block {
                    next,
                    end: next + BLOCK,
                    _lock: lock,
                });
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("{BLOCKS} other test processes have all blocks of ports")
}

/// Nobody outside the tests has it either.
fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
        && UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
}

/// The first of `count` adjacent ports that are this process's alone.
///
/// # Errors
/// Other processes have all there are, or so many are more than a block.
pub fn adjacent(count: u16) -> Result<u16> {
    static OWN: Mutex<Vec<Block>> = Mutex::new(Vec::new());
    ensure!(count <= BLOCK, "at most {BLOCK} ports are adjacent");
    // Locks of blocks that are used up are kept: somebody may still use the ports.
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(block) = own.last_mut() {
            while block.end - block.next >= count {
                let first = block.next;
                match (first..first + count).rev().find(|port| !is_free(*port)) {
                    Some(taken) => block.next = taken + 1,
                    None => {
                        block.next = first + count;
                        return Ok(first);
                    }
                }
            }
        }
        own.push(take_block()?);
    }
}

/// A port of this process alone.
///
/// # Errors
/// Other processes have all there are.
pub fn one() -> Result<u16> {
    adjacent(1)
}
