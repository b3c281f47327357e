//! `[container]`.

use std::net::IpAddr;

use super::agent::{bind_host, place, warn_open_rpc};
use super::{DefaultPaths, not_blank};
use crate::choice::{SandboxType, ScratchType, StatsType};
use crate::document::Table;
use crate::problem::{NoteKind, Origin};
use crate::section::{Key, Reader, Section, key};
use crate::sections::{Agent, Container};
use crate::setting::{Chosen, GroupId, UserId};
use crate::units::{ByteSize, Fault, HostPort, PortRange};

const NFS: &str = "it belongs to the Kubernetes backend";
const NOT_USED: &[(&str, &str)] = &[
    ("scratch-nfs-address", NFS),
    ("scratch-nfs-options", NFS),
    (
        "swarm-enabled",
        "whether the engine is in a swarm is asked from it",
    ),
    (
        "krunner-volumes",
        "runner packages are found by their version",
    ),
];
const ADVERTISED: Key = key("advertised-host");

pub(super) fn read(
    reader: &mut Reader<'_>,
    root: &Table,
    defaults: &DefaultPaths,
    agent: &Agent,
) -> Container {
    warn_open_rpc(reader, agent);
    let process = reader.host.process_user();
    let scratch_default = defaults.directory(reader, "./scratches", "scratches");
    let mut s = Section::open(reader, Some(root), "container");
    let UserId(kernel_uid, uid_chosen) = s.or(
        key("kernel-uid").over("config/container"),
        UserId(process.uid, Chosen::ByProcess),
    );
    let GroupId(kernel_gid, gid_chosen) = s.or(
        key("kernel-gid").over("config/container"),
        GroupId(process.gid, Chosen::ByProcess),
    );
    let bind_text = s.checked(
        key("bind-host")
            .or(&["kernel-host"])
            .env("BACKEND_BIND_HOST_OVERRIDE"),
        |text: &String| match text.as_str() {
            "" => Ok(()),
            text => text.parse::<IpAddr>().map(|_| ()).map_err(|_| {
                Fault::new(
                    "ports can only be bound to an IP address",
                    "write an IP address of this host, 0.0.0.0 for all, or leave it blank",
                )
            }),
        },
    );
    let advertised = s.checked(ADVERTISED, |text: &String| {
        not_blank(text)?;
        let parsed = HostPort::parse_host(text)?;
        if HostPort::new(parsed, 1).is_unspecified() {
            return Err(Fault::new(
                "nobody can reach this address",
                "write the address users reach this host by",
            ));
        }
        Ok(())
    });
    let port_range = s.or(
        key("port-range").env("BACKEND_CONTAINER_PORT_RANGE"),
        PortRange {
            first: 30000,
            last: 31000,
        },
    );
    let stats_type = Some(s.or(key("stats-type"), StatsType::Docker));
    let sandbox_type = s.or(
        key("sandbox-type").env("BACKEND_SANDBOX_TYPE"),
        SandboxType::Docker,
    );
    let jail_args: Vec<String> = s.or(key("jail-args"), Vec::new());
    let scratch_type = scratch_type(&mut s);
    let scratch_root = place(
        &mut s,
        key("scratch-root").env("BACKEND_SCRATCH_ROOT"),
        scratch_default,
    );
    let scratch_size = s.or(key("scratch-size"), ByteSize(0));
    let alternative_bridge = s.checked(key("alternative-bridge"), not_blank);
    s.show_absent("alternative-bridge");
    s.finish(NOT_USED, &[]);
    warn_of_root(
        reader,
        (kernel_uid, uid_chosen) == (0, Chosen::ByProcess),
        (kernel_gid, gid_chosen) == (0, Chosen::ByProcess),
    );

    let bind_host = match bind_text.and_then(|text| text.parse().ok()) {
        Some(ip) => ip,
        None => bind_host(reader, agent),
    };
    let advertised_host = match advertised {
        Some(host) => host,
        None => {
            let (host, how) = if bind_host.is_unspecified() {
                (
                    agent.advertised_rpc_addr.host.clone(),
                    "agent.advertised-rpc-addr",
                )
            } else {
                (bind_host.to_string(), "container.bind-host")
            };
            reader.record("container", ADVERTISED.name, &host, Origin::Detected(how));
            host
        }
    };
    Container {
        kernel_uid,
        kernel_gid,
        bind_host,
        advertised_host,
        port_range,
        stats_type,
        sandbox_type,
        jail_args,
        scratch_type,
        scratch_root,
        scratch_size,
        alternative_bridge,
    }
}

/// The original was often run by the user that its kernels are to have, and this agent is run by root.
fn warn_of_root(reader: &mut Reader<'_>, uid: bool, gid: bool) {
    let (key, both) = match (uid, gid) {
        (true, true) => ("kernel-uid", ", and so is kernel-gid"),
        (true, false) => ("kernel-uid", ""),
        (false, true) => ("kernel-gid", ""),
        (false, false) => return,
    };
    let line = match reader.origin("container", key) {
        Some(Origin::File { line }) => Some(line),
        _ => None,
    };
    let text = format!(
        "is root's{both}, only because this agent is: the code of users runs as root in images that take the kernel's \
         account; write the account kernels are to have, here or in etcd (in place of a Python agent the one it ran as)"
    );
    reader.note(NoteKind::Warning, line, format!("container.{key}"), text);
}

fn scratch_type(s: &mut Section<'_, '_>) -> ScratchType {
    const SCRATCH: Key = key("scratch-type");
    let rule = |kind: &ScratchType| match kind {
        ScratchType::K8sNfs => Err(Fault::new(
            "this agent does not run on Kubernetes",
            "write \"hostdir\", \"hostfile\" or \"memory\"",
        )),
        _ => Ok(()),
    };
    let faults = s.reader.gathered.problems.len();
    if let Some(kind) = s.checked(SCRATCH, rule) {
        return kind;
    }
    if s.reader.standalone && s.reader.gathered.problems.len() == faults {
        s.reader.record(
            "container",
            SCRATCH.name,
            &ScratchType::Hostdir,
            Origin::Standalone,
        );
    } else if s.reader.gathered.problems.len() == faults {
        s.missing(SCRATCH, "write scratch-type = \"hostdir\" in [container]");
    }
    ScratchType::Hostdir
}
