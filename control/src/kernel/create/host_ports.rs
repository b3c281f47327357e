//! The host ports of a kernel: of a new one, and of one that is made anew.
//!
//! In: the services it is to have, and those it has. Out: a host port for each of their container ports.
//! Invariants: a service that stays keeps its host ports; what is taken for a kernel that is then not made
//! anew goes back, and so do, when it is, those of services that it no longer has; what is taken is in the
//! journal before the old container is touched.

use std::sync::Arc;

use super::Order;
use super::error::CreateError;
use super::prepare::{self, NetworkChoice, Prepared, with_host_ports};
use crate::kernel::lifecycle::State;
use crate::kernel::node::Node;
use crate::kernel::record::PublishedBy;
use crate::kernel::registry::Kernel;
use crate::kernel::service_ports::ServicePort;
use crate::ports::PortError;

/// Takes host ports and notes which service has which.
pub fn take_ports(
    node: &Node,
    kernel: &Kernel,
    order: &Order,
    prepared: &Prepared,
) -> Result<(), CreateError> {
    let network = &prepared.network;
    // Where the container's own address does not lead to the runner, it takes host ports.
    let repl = match prepared.published_by {
        PublishedBy::Rows => 0,
        PublishedBy::Engine | PublishedBy::Host => 2,
    };
    let wanted = repl + prepare::pool_ports(&prepared.services, network);
    // Another node was told a port for this one's sshd before the kernel existed.
    let mapped = order
        .cluster
        .mapped_ssh_port(order.config.hostname(), order.id);
    claim_own(node, kernel, &prepared.services, network);
    let mut ports = node.ports.acquire(
        kernel.id,
        wanted - usize::from(mapped.is_some()),
        node.bind_host(),
    )?;
    if let Some(mapped) = mapped {
        node.ports.claim(kernel.id, mapped)?;
        // sshd is the first service.
        ports.insert(repl, mapped);
    }
    let repl_ports = (repl == 2).then(|| (ports[0], ports[1]));
    let services = with_host_ports(&prepared.services, &ports[repl..], network);
    kernel.update_record(|record| {
        record.repl_ports = repl_ports;
        record.services = services;
    });
    Ok(())
}

/// What an image opens on the host's network is its own choice. In the pool it is nobody else's then. Answers
/// what was taken for it.
fn claim_own(
    node: &Node,
    kernel: &Kernel,
    services: &[ServicePort],
    network: &NetworkChoice,
) -> Vec<u16> {
    let held = node.ports.of_kernel(kernel.id);
    let mut taken = Vec::new();
    for port in prepare::own_ports(services, network) {
        match node.ports.claim_unpromised(kernel.id, port) {
            Ok(()) if !held.contains(&port) => taken.push(port),
            Ok(()) | Err(PortError::OutsideRange { .. }) => {}
            Err(err) => {
                tracing::warn!(kernel_id = %kernel.id, port, err = &err as &dyn std::error::Error,
                "a service of an image on the host's network will not find its port free")
            }
        }
    }
    taken
}

/// The host ports of a kernel that is to be made anew. Those it did not have are in its record from now on
/// (`ports_ahead`): an agent that is killed before the new container is made finds them taken. They go back
/// when this is dropped while the kernel goes on as it was.
#[derive(Debug)]
pub struct KeptPorts<'n> {
    node: &'n Node,
    kernel: Arc<Kernel>,
    services: Vec<ServicePort>,
}

impl<'n> KeptPorts<'n> {
    /// Takes what it lacks: its services may be others by now (those of models are read anew). What a restart
    /// that was cut short had taken comes first.
    ///
    /// # Errors
    /// The pool has too few. The kernel has what it had.
    pub fn take(
        node: &'n Node,
        kernel: &Arc<Kernel>,
        prepared: &Prepared,
    ) -> Result<KeptPorts<'n>, PortError> {
        let network = &prepared.network;
        let (services, mut ports) = kernel.with_record(|record| {
            let services = with_old_ports(&prepared.services, &record.services);
            (services, record.ports_ahead.clone())
        });
        let lacking: Vec<ServicePort> = services.iter().filter(|it| lacks(it)).cloned().collect();
        let mut kept = KeptPorts {
            node,
            kernel: kernel.clone(),
            services,
        };
        kept.note_ahead(claim_own(node, kernel, &lacking, network));
        let (wanted, held) = (
            prepare::pool_ports(&lacking, network),
            node.ports.of_kernel(kernel.id),
        );
        let own: Vec<u16> = prepare::own_ports(&lacking, network).collect();
        ports.retain(|port| held.contains(port) && !own.contains(port));
        ports.truncate(wanted);
        let taken = node
            .ports
            .acquire(kernel.id, wanted - ports.len(), node.bind_host())?;
        ports.extend(&taken);
        kept.note_ahead(taken);
        let given = with_host_ports(&lacking, &ports, network);
        let lacking = kept.services.iter_mut().filter(|it| lacks(it));
        for (service, given) in lacking.zip(given) {
            *service = given;
        }
        Ok(kept)
    }

    fn note_ahead(&self, ports: Vec<u16>) {
        self.kernel
            .update_record(|record| record.ports_ahead.extend(ports));
    }

    /// Notes them as its own; the old container is gone. What the runner had told of the services is told
    /// anew. What the engine had published is by rows from now on, where a new kernel's is: the runner's
    /// ports go back then.
    pub async fn settle(mut self, published_by: PublishedBy) {
        let services = std::mem::take(&mut self.services);
        let mut unused = Vec::new();
        self.kernel.update_record(|record| {
            let before = std::mem::replace(&mut record.services, services);
            let has = |port: &u16| {
                record
                    .services
                    .iter()
                    .any(|it| it.host_ports.contains(port))
            };
            unused = before.into_iter().flat_map(|it| it.host_ports).collect();
            unused.append(&mut record.ports_ahead);
            unused.retain(|port| !has(port));
            if record.published_by == PublishedBy::Engine && published_by == PublishedBy::Rows {
                record.published_by = PublishedBy::Rows;
                unused.extend(
                    record
                        .repl_ports
                        .take()
                        .into_iter()
                        .flat_map(|(i, o)| [i, o]),
                );
            }
        });
        if unused.is_empty() {
            return;
        }
        // Another kernel's, as soon as they are given up: the journal must not say anything else then.
        self.node.note(&self.kernel, |_| {}).await;
        for port in unused {
            self.node.ports.give_up(self.kernel.id, port);
        }
    }
}

impl Drop for KeptPorts<'_> {
    fn drop(&mut self) {
        // One that is under way is gone on with, perhaps by the next start, or ends and gives all back.
        if let State::Creating { .. } | State::Restarting { .. } = self.kernel.state() {
            return;
        }
        // The journal may name them a while longer: of a kernel in service that counts for nothing.
        let mut ahead = Vec::new();
        self.kernel
            .update_record(|record| ahead = std::mem::take(&mut record.ports_ahead));
        for port in ahead {
            self.node.ports.give_up(self.kernel.id, port);
        }
    }
}

fn lacks(service: &ServicePort) -> bool {
    service.host_ports.len() != service.container_ports.len()
}

/// The services, with the host ports that those of the same container ports had.
fn with_old_ports(services: &[ServicePort], old: &[ServicePort]) -> Vec<ServicePort> {
    let mut services = services.to_vec();
    for service in &mut services {
        let mut old = old.iter();
        let same = old.find(|old| old.container_ports == service.container_ports);
        service.host_ports = same.map(|old| old.host_ports.clone()).unwrap_or_default();
    }
    services
}
