//! What can go wrong on the kernel path.
//!
//! In: refusals of the kernel. Out: one variant per failed step.

use std::io;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;

use super::pins::PinsError;
use crate::sys::netlink::NetlinkError;

/// A failed step of the kernel path.
#[derive(Debug, thiserror::Error)]
pub enum KernelPathError {
    /// No place for pins.
    #[error("pins have no place")]
    Pins(#[source] PinsError),
    /// The kernel refused the object, or a program in it.
    #[error("the kernel refuses the programs")]
    Load(#[source] EbpfError),
    /// A program could not be loaded.
    #[error("the kernel refuses program {name}")]
    Program {
        /// Which.
        name: &'static str,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// The object lacks a program or a map.
    #[error("the object has no {name}")]
    Missing {
        /// Which.
        name: &'static str,
    },
    /// A map of a wrong kind, or one that can't be read or written.
    #[error("map {name} fails")]
    Map {
        /// Which.
        name: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// A hook at the control groups could not be put up or kept.
    #[error("cannot attach {name} to the control groups")]
    Hook {
        /// Which.
        name: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no tree of version 2 to hook to.
    #[error("no version 2 control groups are mounted")]
    NoControlGroups,
    /// The namespace has no cookie; kernels before 5.14.
    #[error("the network namespace can't be told")]
    Namespace(#[source] rustix::io::Errno),
    /// A map of devices could not be written.
    #[error("the container's link can't be watched")]
    Watch(#[source] aya::maps::xdp::XdpMapError),
    /// Attaching failed.
    #[error("cannot attach to {interface}")]
    Attach {
        /// Where.
        interface: String,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// What stands at the interface takes a filter of either side for one of packets that come in.
    #[error(
        "a queueing discipline `ingress` of somebody else at {interface} has no place for a filter of packets that go \
         out: take it away (tc qdisc del dev {interface} ingress), or have it be `clsact`"
    )]
    NoEgress {
        /// Where.
        interface: String,
    },
    /// A link could not be pinned or taken over.
    #[error("cannot keep the link at {interface}")]
    Link {
        /// Where.
        interface: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It went away before the program came to it.
    #[error("interface {interface} is gone")]
    Gone {
        /// Which.
        interface: u32,
    },
    /// No thread to attach programs by.
    #[error("no thread to attach programs by")]
    Thread(#[source] io::Error),
    /// A descriptor can't be had.
    #[error("no descriptor of program {name}")]
    Descriptor {
        /// Of which.
        name: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Interfaces can't be listed.
    #[error("interfaces can't be listed")]
    Interfaces(#[source] NetlinkError),
    /// Entries of ports that are gone are still in a map.
    #[error("counters of {ports} ports that are gone can't be removed from map {name} yet")]
    PendingRemovals {
        /// Which.
        name: &'static str,
        /// How many.
        ports: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The sweep could not be run.
    #[error("flows can't be swept")]
    Sweep(#[source] io::Error),
    /// What containers are given can't be read.
    #[error("what containers are given can't be counted")]
    Delivered(#[source] io::Error),
}
