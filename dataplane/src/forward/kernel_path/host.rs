//! Hooks at the sockets of this host: its own clients reach containers past the relay.
//!
//! In: the maps of [`super::object`], containers' links. Out: the programs of `connect.bpf.c` attached
//! to the root of the version 2 control groups, pinned. Invariant: the hooks act on sockets of this
//! process's network namespace only, and only towards links that the kernel knows to be there.

use std::collections::HashSet;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::{Array, DevMapHash, IterableMap as _, MapData};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSock, CgroupSockAddr, Program};
use aya::{Ebpf, EbpfLoader};
use ebpf::records::{Address, LedSet, Node, PROTOCOL_TCP, Service, ServiceKey};
use ebpf::{ADDRESS_HOOKS, RELEASE_HOOK, map};
use shared::procfs::unified_cgroup_mount;

use super::error::KernelPathError;
use super::object::typed;
use super::pins::Pins;
use crate::causes::chain;
use crate::sys::bpf::{self, Table};
use crate::sys::netlink::sockets;

/// The hooks.
pub(super) struct Hooks {
    links: DevMapHash<MapData>,
    sockets: Table<u32, LedSet>,
    // Kept for its maps; the programs are held by their pinned links.
    _object: Ebpf,
}

/// A failed step of a hook.
fn hook<E: std::error::Error + Send + Sync + 'static>(
    name: &'static str,
) -> impl FnOnce(E) -> KernelPathError {
    move |err| KernelPathError::Hook {
        name,
        source: Box::new(err),
    }
}

/// Attaches a loaded program, or puts it in the place of an earlier process's.
fn put_up(
    program: &mut Program,
    name: &'static str,
    root: &File,
    pin: &Path,
) -> Result<(), KernelPathError> {
    let fd = match program {
        Program::CgroupSockAddr(it) => it.fd(),
        _ => match program {
            Program::CgroupSock(it) => it.fd(),
            _ => return Err(KernelPathError::Missing { name }),
        },
    };
    let fd = fd.map_err(hook(name))?;
    if pin.exists() {
        match bpf::replace_program(pin, fd.as_fd()) {
            Ok(()) => return Ok(()),
            Err(err) => {
                tracing::debug!(name, %err, "a pinned hook is of no use");
                std::fs::remove_file(pin).map_err(hook(name))?;
            }
        }
    }
    // Links of control groups never keep others out.
    let mode = CgroupAttachMode::Single;
    let link: FdLink = match program {
        Program::CgroupSockAddr(it) => {
            let id = it.attach(root, mode).map_err(hook(name))?;
            let link = it.take_link(id).map_err(hook(name))?;
            link.try_into().map_err(hook(name))?
        }
        Program::CgroupSock(it) => {
            let id = it.attach(root, mode).map_err(hook(name))?;
            let link = it.take_link(id).map_err(hook(name))?;
            link.try_into().map_err(hook(name))?
        }
        _ => return Err(KernelPathError::Missing { name }),
    };
    link.pin(pin).map_err(hook(name))?;
    Ok(())
}

impl Hooks {
    /// Puts the hooks up.
    ///
    /// # Errors
    /// The step that failed.
    pub(super) fn start(pins: &Pins) -> Result<Self, KernelPathError> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let root = unified_cgroup_mount(&mounts).ok_or(KernelPathError::NoControlGroups)?;
        let root = File::open(root).map_err(hook("all hooks"))?;
        let namespace = bpf::namespace_cookie().map_err(KernelPathError::Namespace)?;
        let mut object = EbpfLoader::new()
            .default_map_pin_directory(pins.directory())
            .load(ebpf::connect())
            .map_err(KernelPathError::Load)?;
        let mut nodes: Array<MapData, Node> = typed!(&mut object, map::NODES);
        let links: DevMapHash<MapData> = typed!(&mut object, map::LINKS);
        let sockets: Array<MapData, LedSet> = typed!(&mut object, map::LED_SOCKETS);
        let sockets = Table::of(sockets.map()).map_err(hook("all hooks"))?;
        nodes
            .set(0, Node { namespace }, 0)
            .map_err(|source| KernelPathError::Map {
                name: map::NODES,
                source,
            })?;
        // Those that remember come before those that lead, so that nothing led is unknown to them.
        for name in ADDRESS_HOOKS.iter().rev().chain([&RELEASE_HOOK]) {
            let program = object
                .program_mut(name)
                .ok_or(KernelPathError::Missing { name })?;
            match program {
                Program::CgroupSockAddr(it) => CgroupSockAddr::load(it),
                Program::CgroupSock(it) => CgroupSock::load(it),
                _ => return Err(KernelPathError::Missing { name }),
            }
            .map_err(|source| KernelPathError::Program { name, source })?;
        }
        for name in [&RELEASE_HOOK]
            .into_iter()
            .chain(ADDRESS_HOOKS.iter().rev())
        {
            let program = object
                .program_mut(name)
                .ok_or(KernelPathError::Missing { name })?;
            put_up(program, name, &root, &pins.hook(name))?;
        }
        Ok(Self {
            links,
            sockets,
            _object: object,
        })
    }

    /// Lets the hooks lead sockets over a link, for as long as there is one.
    ///
    /// # Errors
    /// The link is gone.
    pub(super) fn allow(&mut self, link: u32) -> Result<(), KernelPathError> {
        self.links
            .insert(link, link, None, 0)
            .map_err(KernelPathError::Watch)
    }

    /// Resets those connections of this host's clients that a service has led to its container and that
    /// asked for an address `of` which this is said. Sockets of datagrams are led by each datagram, so
    /// there is nothing to end.
    pub(super) fn cut(
        &mut self,
        key: ServiceKey,
        service: &Service,
        of: impl Fn(&Address) -> bool,
    ) {
        if key.protocol != PROTOCOL_TCP {
            return;
        }
        let mut cookies = HashSet::new();
        let read = self.sockets.read(|_, sets| {
            for set in sets {
                let led = set.cookie.iter().zip(&set.led);
                let wanted = led.filter(|(cookie, it)| {
                    **cookie != 0
                        && (it.host_port, it.life) == (key.port, service.life)
                        && of(&it.host)
                });
                cookies.extend(wanted.map(|(cookie, _)| *cookie));
            }
        });
        if let Err(err) = read {
            tracing::warn!(%err, "connections of clients on this host may go on");
        }
        if cookies.is_empty() {
            return;
        }
        let peer = SocketAddr::new(
            IpAddr::from(service.target),
            u16::from_be(service.target_port),
        );
        match sockets::cut(&cookies, peer) {
            Ok(cut) => tracing::debug!(port = u16::from_be(key.port), cut, "connections are cut"),
            Err(err) => tracing::warn!(
                port = u16::from_be(key.port),
                err = chain(&err),
                "connections of clients on this host go on"
            ),
        }
    }

    /// Leads nobody over a link any more. Not there is fine.
    pub(super) fn forbid(&mut self, link: u32) {
        let _ = self.links.remove(link);
    }
}
