//! What `create_kernels` answers and `kernel_started` carries.

use serde_json::{Value, json};

use super::prepare::public_services;
use crate::kernel::node::Node;
use crate::kernel::record::Record;
use crate::kernel::service_ports::{REPL_IN, REPL_OUT};

/// The original's map, with plain values in place of its decimals, sizes, enums and paths (the
/// manager reads either).
pub fn creation_info(node: &Node, record: &Record) -> Value {
    let attached: serde_json::Map<String, Value> = record
        .allocation
        .as_ref()
        .map(|allocation| node.ledger.attached_devices(allocation))
        .unwrap_or_default()
        .into_iter()
        .map(|(device, list)| (device, json!(list)))
        .collect();
    let (agent_addr, scaling_group) = record
        .request
        .as_ref()
        .map(|request| (request.agent_addr.clone(), request.scaling_group.clone()))
        .unwrap_or_default();
    let mut info = ports_info(record);
    let rest = json!({
        "id": record.id().to_string(),
        "kernel_host": node.config.container.advertised_host,
        "container_id": record.container_id,
        "resource_spec": {
            "slots": record.slots,
            "allocations": record.allocation,
            "scratch_disk_size": 0,
            "mounts": record.mounts,
        },
        "attached_devices": attached,
        "agent_addr": agent_addr,
        "scaling_group": scaling_group,
    });
    if let (Value::Object(info), Value::Object(rest)) = (&mut info, rest) {
        info.extend(rest);
    }
    info
}

/// The part that a restart answers too: ports and services. The runner's sockets are the
/// container's own and only reported.
pub fn ports_info(record: &Record) -> Value {
    let (repl_in, repl_out) = record.repl_ports.unwrap_or((REPL_IN, REPL_OUT));
    json!({
        "repl_in_port": repl_in,
        "repl_out_port": repl_out,
        "stdin_port": 0,
        "stdout_port": 0,
        "service_ports": public_services(&record.services),
    })
}
