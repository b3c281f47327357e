//! Programs at interfaces, by tcx links where the kernel has them and by classic filters elsewhere.
//!
//! In: a loaded program, an interface, a side. Out: the program is attached once, whatever was there
//! of an earlier process, and stays when this process ends. Invariant: a program takes the place of
//! its predecessor in one step; no packet meets none or both. All of it waits for the kernel's interface
//! lock, and belongs to the thread of [`super::rtnl`].

use std::io;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};

use super::error::KernelPathError;
use super::pins::{Pins, PinsError, Side};
use super::predecessors;
use crate::causes::chain;
use crate::sys::netlink::LinkLookup;
use crate::sys::netlink::queueing::kind_at_ingress;

/// Filters of others, with smaller numbers, speak first; beside links all filters come after.
const FILTER_PRIORITY: u16 = 49_500;
/// The last layout whose filters have that; those of a later one speak before an earlier one's.
const FILTER_LAYOUT: u16 = 2;

/// How programs are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AttachMethod {
    /// tcx links, and filters where the kernel (before 6.6) lacks those.
    #[default]
    Auto,
    /// Filters of a clsact queueing discipline.
    Filters,
}

fn direction(side: Side) -> TcAttachType {
    match side {
        Side::Uplink | Side::Container => TcAttachType::Ingress,
        Side::Guard => TcAttachType::Egress,
    }
}

#[derive(Debug, thiserror::Error)]
enum ReplaceError {
    #[error("the pinned link can't be opened")]
    Open(#[source] LinkError),
    #[error("the pinned link takes no other program")]
    Update(#[source] ProgramError),
}

/// Attaches a program at an interface, or puts it in the place of an earlier version's.
pub(super) fn attach(
    program: &mut SchedClassifier,
    (pins, predecessors): (&Pins, &[Pins]),
    method: AttachMethod,
    side: Side,
    index: u32,
    interface: &str,
) -> Result<(), KernelPathError> {
    let (link, filter) = (pins.link(side, index), pins.filter(side, index));
    if filter.exists() || method == AttachMethod::Filters {
        pins.remove_link(side, index)
            .map_err(KernelPathError::Pins)?;
        return put_filter(program, pins, (side, index), interface, &filter);
    }
    match replace(program, &link) {
        Ok(true) => return Ok(()),
        Ok(false) => {}
        Err(err) => {
            // The interface may have gone and another come since it was pinned.
            tracing::debug!(interface, err = chain(&err), "a pinned link is of no use");
            pins.remove_link(side, index)
                .map_err(KernelPathError::Pins)?;
        }
    }
    let put = match predecessors::link(predecessors, side, index) {
        Some(predecessor) => LinkOrder::before_link(&predecessor)
            .ok()
            .and_then(|order| put_link(program, side, interface, &link, order).ok()),
        None => None,
    };
    if put.is_some() {
        return Ok(());
    }
    let order = match side {
        // A program somebody else has put there speaks first.
        Side::Uplink | Side::Guard => LinkOrder::last(),
        // If it has the last word, the answers to those that ours at the uplink has led here are lost.
        Side::Container => LinkOrder::first(),
    };
    match put_link(program, side, interface, &link, order) {
        Err(KernelPathError::Attach { source, .. }) if lacks_links(&source) => {
            put_filter(program, pins, (side, index), interface, &filter)
        }
        other => other,
    }
}

/// A kernel without tcx does not know the type of attachment.
fn lacks_links(err: &ProgramError) -> bool {
    matches!(err, ProgramError::SyscallError(err)
        if err.io_error.raw_os_error() == Some(libc::EINVAL))
}

/// Puts a program in the place of the pinned link's. False when nothing is pinned.
fn replace(program: &mut SchedClassifier, pin: &Path) -> Result<bool, ReplaceError> {
    let pinned = match PinnedLink::from_pin(pin) {
        Ok(pinned) => pinned,
        Err(LinkError::SyscallError(err)) if err.io_error.kind() == io::ErrorKind::NotFound => {
            return Ok(false);
        }
        Err(err) => return Err(ReplaceError::Open(err)),
    };
    let link = SchedClassifierLink::try_from(FdLink::from(pinned)).map_err(ReplaceError::Open)?;
    let id = program.attach_to_link(link).map_err(ReplaceError::Update)?;
    // The pin holds it; a descriptor here would keep it attached when the pin is removed.
    drop(program.take_link(id).map_err(ReplaceError::Update)?);
    Ok(true)
}

fn put_link(
    program: &mut SchedClassifier,
    side: Side,
    interface: &str,
    pin: &PathBuf,
    order: LinkOrder,
) -> Result<(), KernelPathError> {
    let attach = |source| KernelPathError::Attach {
        interface: interface.to_owned(),
        source,
    };
    let keep = |source: Box<dyn std::error::Error + Send + Sync>| KernelPathError::Link {
        interface: interface.to_owned(),
        source,
    };
    let options = TcAttachOptions::TcxOrder(order);
    let id = program
        .attach_with_options(interface, direction(side), options)
        .map_err(attach)?;
    let link = program.take_link(id).map_err(attach)?;
    let link = FdLink::try_from(link).map_err(|err| keep(Box::new(err)))?;
    link.pin(pin).map_err(|err| keep(Box::new(err)))?;
    Ok(())
}

/// The filter of this agent, which may not be another's.
fn filter_link(pins: &Pins, side: Side, interface: &str) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(
        interface,
        direction(side),
        filter_priority(pins),
        filter_handle(pins),
        None,
    )
}

fn filter_priority(pins: &Pins) -> u16 {
    FILTER_PRIORITY - pins.layout().saturating_sub(FILTER_LAYOUT).min(1_000)
}

fn filter_handle(pins: &Pins) -> TcHandle {
    // Handles of zero are given out by the kernel.
    TcHandle::new(pins.number(), 1)
}

/// A filter can't be pinned and stays without; the pinned program in its name tells of it.
fn put_filter(
    program: &mut SchedClassifier,
    pins: &Pins,
    (side, index): (Side, u32),
    interface: &str,
    pin: &Path,
) -> Result<(), KernelPathError> {
    let attach = |source| KernelPathError::Attach {
        interface: interface.to_owned(),
        source,
    };
    let failed = |err: io::Error| attach(ProgramError::TcError(TcError::IoError(err)));
    if pin.exists() {
        let link = filter_link(pins, side, interface).map_err(failed)?;
        if let Ok(id) = program.attach_to_link(link) {
            std::mem::forget(program.take_link(id).map_err(attach)?);
            return Ok(());
        }
        // It was taken away by somebody else.
        std::fs::remove_file(pin).map_err(failed)?;
    }
    // Refused when it is there already, which is as good, or when `ingress` is, which takes a filter of packets that
    // go out and shows it those that come in.
    let there = qdisc_add_clsact(interface);
    if there.is_err()
        && side == Side::Guard
        && kind_at_ingress(index).is_ok_and(|kind| kind.as_deref() == Some("ingress"))
    {
        return Err(KernelPathError::NoEgress {
            interface: interface.to_owned(),
        });
    }
    let options = NlOptions {
        priority: filter_priority(pins),
        handle: filter_handle(pins),
        classid: None,
    };
    let id = program
        .attach_with_options(
            interface,
            direction(side),
            TcAttachOptions::Netlink(options),
        )
        .map_err(|err| {
            tracing::debug!(interface, ?there, "no filter can be put up");
            attach(err)
        })?;
    std::mem::forget(program.take_link(id).map_err(attach)?);
    program.pin(pin).map_err(|err| KernelPathError::Link {
        interface: interface.to_owned(),
        source: Box::new(err),
    })
}

/// Takes a program away from an interface. One that is not there is fine.
pub(super) fn detach(
    pins: &Pins,
    side: Side,
    index: u32,
    interface: Option<&str>,
) -> Result<(), PinsError> {
    let filter = pins.filter(side, index);
    if filter.exists() {
        if let Some(interface) = interface
            && let Ok(link) = filter_link(pins, side, interface)
        {
            drop(link);
        }
        pins.remove_filter(side, index)?;
    }
    pins.remove_link(side, index)
}

/// Takes away the filters that these pins tell of; links go with their pins.
pub(super) fn remove_filters(pins: &Pins, names: &LinkLookup) {
    for (side, index) in pins.links() {
        if pins.filter(side, index).exists()
            && let Err(err) = detach(pins, side, index, names.name(index).as_deref())
        {
            tracing::warn!(
                interface = index,
                err = chain(&err),
                "a filter stays attached"
            );
        }
    }
}
