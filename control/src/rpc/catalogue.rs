//! The 37 methods of the agent with their parameters in order.

use super::value::Value;

/// One parameter of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Name, as keyword arguments give it.
    pub name: &'static str,
    /// What stands in when the caller leaves it out; `None` means it must be given.
    pub default: Option<DefaultValue>,
}

/// Defaults that occur.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultValue {
    /// `None`.
    Nil,
    /// `False`.
    False,
    /// `{}`.
    EmptyMap,
}

impl DefaultValue {
    /// The value itself.
    #[must_use]
    pub fn value(self) -> Value {
        match self {
            Self::Nil => Value::Nil,
            Self::False => Value::Bool(false),
            Self::EmptyMap => Value::Map(Vec::new()),
        }
    }
}

/// Name and parameters of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// Name on the wire.
    pub name: &'static str,
    /// Parameters in positional order.
    pub parameters: &'static [Parameter],
}

macro_rules! methods {
    ($($name:ident ( $($parameter:ident $(= $default:ident)?),* );)*) => {
        &[$(Method {
            name: stringify!($name),
            parameters: &[$(Parameter {
                name: stringify!($parameter),
                default: methods!(@default $($default)?),
            }),*],
        }),*]
    };
    (@default) => { None };
    (@default $default:ident) => { Some(DefaultValue::$default) };
}

/// Every method, in the order of the specification.
pub const METHODS: &[Method] = methods! {
    ping(msg);
    gather_hwinfo();
    check_and_pull(image_configs);
    check_pulling(image_name);
    create_kernels(
        raw_session_id, raw_kernel_ids, raw_configs, raw_cluster_info, kernel_image_refs
    );
    check_creating(kernel_id);
    check_running(kernel_id);
    destroy_kernel(kernel_id, session_id, reason = Nil, suppress_events = False);
    restart_kernel(session_id, kernel_id, kernel_image, updated_config);
    execute(session_id, kernel_id, api_version, run_id, mode, code, opts, flush_timeout);
    interrupt_kernel(kernel_id);
    trigger_batch_execution(session_id, kernel_id, code, timeout);
    get_completions(kernel_id, text, opts);
    start_service(kernel_id, service, opts);
    shutdown_service(kernel_id, service);
    get_logs(kernel_id);
    upload_file(kernel_id, filename, filedata);
    download_file(kernel_id, filepath);
    download_single(kernel_id, filepath);
    list_files(kernel_id, path);
    commit(kernel_id, subdir, canonical = Nil, extra_labels = EmptyMap, filename = Nil);
    push_image(image_ref, registry_conf);
    get_commit_status(kernel_id, subdir);
    purge_images(image_canonicals, force, noprune);
    sync_kernel_registry(raw_kernel_session_ids);
    purge_containers(container_kernel_ids);
    drop_kernel_registry(kernel_ids);
    create_local_network(network_name);
    destroy_local_network(network_name);
    assign_port();
    release_port(port_no);
    scan_gpu_alloc_map();
    update_scaling_group(scaling_group);
    get_local_config();
    ping_kernel(kernel_id);
    shutdown_agent(terminate_kernels);
    reset_agent();
};

/// The method of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn all_methods_are_there_once_and_defaults_come_last() {
        assert_eq!(METHODS.len(), 37);
        let names: BTreeSet<_> = METHODS.iter().map(|method| method.name).collect();
        assert_eq!(names.len(), 37);
        for method in METHODS {
            let required = method
                .parameters
                .iter()
                .filter(|p| p.default.is_none())
                .count();
            assert!(
                method.parameters[..required]
                    .iter()
                    .all(|p| p.default.is_none())
            );
        }
        assert_eq!(find("execute").unwrap().parameters.len(), 8);
        assert_eq!(find("nosuch"), None);
    }
}
