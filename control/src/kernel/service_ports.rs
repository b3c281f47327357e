//! Service ports: which container ports a kernel exposes, in which order, under which names.
//!
//! In: the image's `ai.backend.service-ports` label and the request's extra ports. Out: the ordered
//! list of [`ServicePort`] that host ports are taken for and that the manager is told about.
//! Invariant: no container port appears twice, and a service has one host port per container port
//! (the original could not start services with several ports).

use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fmt;
use thiserror::Error;

/// Container port on which the runner takes requests.
pub const REPL_IN: u16 = 2000;
/// Container port on which the runner answers.
pub const REPL_OUT: u16 = 2001;
/// Container port of the runner's ssh server.
pub const SSHD: u16 = 2200;
/// Container port of the runner's web terminal.
pub const TTYD: u16 = 7681;
/// Container ports an image may not claim: the runner's own (2002 and 2003 belong to its pty).
pub const RESERVED: [u16; 6] = [REPL_IN, REPL_OUT, 2002, 2003, SSHD, TTYD];

/// What speaks on a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceProtocol {
    Http,
    Tcp,
    /// Opened by the user's own program; nothing is started for it.
    Preopen,
    /// Never shown to users.
    Internal,
}

impl ServiceProtocol {
    /// The text on the wire and in labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Tcp => "tcp",
            Self::Preopen => "preopen",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for ServiceProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One service of a kernel, in the manager's form (`create_kernels` result, `kernel_started`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    pub name: String,
    pub protocol: ServiceProtocol,
    pub container_ports: Vec<u16>,
    /// One for each container port, in the same order; empty until ports are taken.
    #[serde(default)]
    pub host_ports: Vec<u16>,
    #[serde(default)]
    pub is_inference: bool,
    /// Told by the runner once it answers `get-apps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url_template: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_arguments: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_envs: Option<serde_json::Value>,
}

impl ServicePort {
    /// A service without host ports yet.
    pub fn new(name: impl Into<String>, protocol: ServiceProtocol, ports: Vec<u16>) -> Self {
        Self {
            name: name.into(),
            protocol,
            container_ports: ports,
            host_ports: Vec::new(),
            is_inference: false,
            url_template: None,
            allowed_arguments: None,
            allowed_envs: None,
        }
    }

    /// Whether the manager is told of it.
    pub fn is_public(&self) -> bool {
        self.protocol != ServiceProtocol::Internal
    }
}

/// Why the ports of a kernel can't be arranged. All are the image's or the request's fault, and a
/// retry gives the same answer.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ServicePortError {
    #[error("the service-ports label has an entry that is not name:protocol:port: {0:?}")]
    Entry(String),
    #[error("the service name {0:?} has other characters than letters, digits, '_' and '-'")]
    Name(String),
    #[error("the service {name} has the unknown protocol {protocol:?}; use tcp, http or preopen")]
    Protocol { name: String, protocol: String },
    #[error("the service {name} has {port:?} where a port number from 1025 to 65534 belongs")]
    Number { name: String, port: String },
    #[error("the service {name} wants port {port}, which the runner keeps for itself")]
    Reserved { name: String, port: u16 },
    #[error("the container port {port} is wanted twice, by {first} and by {second}")]
    Twice {
        port: u16,
        first: String,
        second: String,
    },
    #[error("port 2000 and 2001 are reserved for the runner and cannot be preopened")]
    PreopenRepl,
    #[error("the preopen port {0} overlaps with the service {1}")]
    PreopenOverlap(u16, String),
    #[error("the model {0} wants port 2000 or 2001, which are reserved for the runner")]
    ModelRepl(String),
    #[error("the port {port} of the model {model} overlaps with the service {service}")]
    ModelOverlap {
        model: String,
        port: u16,
        service: String,
    },
}

/// Reads the `ai.backend.service-ports` label: `name:protocol:port` or `name:protocol:[p,p]`,
/// comma-separated. Entries of the protocol `pty` are passed over; of several with one name the last counts,
/// in the place of the first.
///
/// # Errors
/// The first entry that breaks the grammar or claims a port it may not have.
pub fn parse_label(label: &str) -> Result<Vec<ServicePort>, ServicePortError> {
    let mut services: Vec<ServicePort> = Vec::new();
    let mut taken: Vec<(u16, String)> = Vec::new();
    for entry in split_entries(label) {
        let entry = entry.trim();
        if entry.is_empty() {
            continue;
        }
        let mut parts = entry.splitn(3, ':');
        let (Some(name), Some(protocol), Some(ports)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(ServicePortError::Entry(entry.to_owned()));
        };
        if name.is_empty()
            || !name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        {
            return Err(ServicePortError::Name(name.to_owned()));
        }
        let protocol = match protocol {
            "tcp" => ServiceProtocol::Tcp,
            "http" => ServiceProtocol::Http,
            "preopen" => ServiceProtocol::Preopen,
            "pty" => continue,
            other => {
                return Err(ServicePortError::Protocol {
                    name: name.to_owned(),
                    protocol: other.to_owned(),
                });
            }
        };
        let ports = parse_ports(name, ports)?;
        for &port in &ports {
            if RESERVED.contains(&port) {
                return Err(ServicePortError::Reserved {
                    name: name.to_owned(),
                    port,
                });
            }
            if let Some((_, first)) = taken.iter().find(|(used, _)| *used == port) {
                let (first, second) = (first.clone(), name.to_owned());
                return Err(ServicePortError::Twice {
                    port,
                    first,
                    second,
                });
            }
            taken.push((port, name.to_owned()));
        }
        let service = ServicePort::new(name, protocol, ports);
        match services.iter_mut().find(|other| other.name == name) {
            // As in the original, which keeps them by name. Nobody else gets the port of the earlier one.
            Some(earlier) => {
                tracing::warn!(
                    name,
                    left_out = ?earlier.container_ports,
                    "the service-ports label of an image names a service twice; the later one counts"
                );
                *earlier = service;
            }
            None => services.push(service),
        }
    }
    Ok(services)
}

/// Splits at commas that are not inside brackets.
fn split_entries(label: &str) -> impl Iterator<Item = &str> {
    let mut inside = false;
    label.split(move |c| {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            _ => {}
        }
        c == ',' && !inside
    })
}

fn parse_ports(name: &str, written: &str) -> Result<Vec<u16>, ServicePortError> {
    let written = written.trim();
    let list = match written.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').unwrap_or("]"),
        None => written,
    };
    list.split(',')
        .map(|port| {
            let port = port.trim();
            match port.parse::<u16>() {
                Ok(number) if (1025..65535).contains(&number) && !port.starts_with('+') => {
                    Ok(number)
                }
                _ => Err(ServicePortError::Number {
                    name: name.to_owned(),
                    port: port.to_owned(),
                }),
            }
        })
        .collect()
}

/// What decides the ports of one kernel.
#[derive(Debug, Clone, Copy, Default)]
pub struct Exposure<'a> {
    /// `ai.backend.service-ports` of the image.
    pub label: &'a str,
    /// `ai.backend.endpoint-ports` of the image: names of the services that are inference endpoints.
    pub endpoints: &'a str,
    /// Role `main`/`master`: only these get the image's and the extra ports.
    pub is_main: bool,
    pub preopen: &'a [u16],
    pub allocated_host_ports: &'a [u16],
    /// Model name and port, for inference sessions.
    pub models: &'a [(String, u16)],
}

/// The services of a kernel in the order their host ports are taken, after the two REPL ports.
///
/// # Errors
/// A label that can't be read, or ports that collide.
pub fn arrange(exposure: &Exposure<'_>) -> Result<Vec<ServicePort>, ServicePortError> {
    let mut services = vec![
        ServicePort::new("sshd", ServiceProtocol::Tcp, vec![SSHD]),
        ServicePort::new("ttyd", ServiceProtocol::Http, vec![TTYD]),
    ];
    if exposure.is_main {
        for &port in exposure.preopen {
            if port == REPL_IN || port == REPL_OUT {
                return Err(ServicePortError::PreopenRepl);
            }
            if let Some(owner) = owner_of(&services, port) {
                return Err(ServicePortError::PreopenOverlap(port, owner.to_owned()));
            }
            services.push(ServicePort::new(
                port.to_string(),
                ServiceProtocol::Preopen,
                vec![port],
            ));
        }
        let endpoints: HashSet<&str> = exposure.endpoints.split(',').map(str::trim).collect();
        for mut service in parse_label(exposure.label)? {
            for &port in &service.container_ports {
                if let Some(owner) = owner_of(&services, port) {
                    let (first, second) = (owner.to_owned(), service.name.clone());
                    return Err(ServicePortError::Twice {
                        port,
                        first,
                        second,
                    });
                }
            }
            service.is_inference = endpoints.contains(service.name.as_str());
            services.push(service);
        }
        for (index, &port) in exposure.allocated_host_ports.iter().enumerate() {
            let name = format!("hostport{}", index + 1);
            if let Some(owner) = owner_of(&services, port) {
                let first = owner.to_owned();
                return Err(ServicePortError::Twice {
                    port,
                    first,
                    second: name,
                });
            }
            services.push(ServicePort::new(
                name,
                ServiceProtocol::Internal,
                vec![port],
            ));
        }
    }
    for (model, port) in exposure.models {
        if matches!(*port, REPL_IN | REPL_OUT) {
            return Err(ServicePortError::ModelRepl(model.clone()));
        }
        if let Some(owner) = owner_of(&services, *port) {
            let (model, service) = (model.clone(), owner.to_owned());
            return Err(ServicePortError::ModelOverlap {
                model,
                port: *port,
                service,
            });
        }
        let name = format!("{model}-{port}");
        let mut service = ServicePort::new(name, ServiceProtocol::Preopen, vec![*port]);
        service.is_inference = true;
        services.push(service);
    }
    Ok(services)
}

fn owner_of(services: &[ServicePort], port: u16) -> Option<&str> {
    let owner = services
        .iter()
        .find(|service| service.container_ports.contains(&port))?;
    Some(&owner.name)
}

/// Every container port in exposure order: the REPL pair, then the services' ports. One host port
/// is taken for each, except that the REPL pair needs none when the agent reaches the container.
pub fn container_ports(services: &[ServicePort]) -> Vec<u16> {
    let services = services
        .iter()
        .flat_map(|service| service.container_ports.iter().copied());
    [REPL_IN, REPL_OUT].into_iter().chain(services).collect()
}

/// The container's `ai.backend.service-ports` label: the image's plus one entry per preopen port.
pub fn container_label(image_label: &str, preopen: &[u16]) -> String {
    let image = (!image_label.is_empty()).then(|| image_label.to_owned());
    let preopen = preopen.iter().map(|port| format!("{port}:preopen:{port}"));
    image
        .into_iter()
        .chain(preopen)
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::create::{NetworkChoice, with_host_ports};
    use ServicePortError as E;

    fn names(services: &[ServicePort]) -> Vec<&str> {
        services
            .iter()
            .map(|service| service.name.as_str())
            .collect()
    }

    #[test]
    fn label_grammar() {
        let services =
            parse_label("jupyter:http:8081,app:tcp:[9000, 9001],sh:pty:3000,pre:preopen:8070")
                .unwrap();
        assert_eq!(names(&services), ["jupyter", "app", "pre"]);
        assert_eq!(services[1].container_ports, [9000, 9001]);
        assert_eq!(services[2].protocol, ServiceProtocol::Preopen);
        assert!(parse_label("").unwrap().is_empty());
    }

    #[test]
    fn label_errors_name_the_entry() {
        assert_eq!(parse_label("a:http"), Err(E::Entry("a:http".into())));
        assert_eq!(parse_label("a b:http:8000"), Err(E::Name("a b".into())));
        assert_eq!(
            parse_label("a:udp:8000"),
            Err(E::Protocol {
                name: "a".into(),
                protocol: "udp".into()
            })
        );
        for port in [
            "1024", "65535", "70000", "x", "", "[8000", "[]", "-1", "+8000",
        ] {
            assert!(
                matches!(parse_label(&format!("a:tcp:{port}")), Err(E::Number { .. })),
                "{port}"
            );
        }
        for port in RESERVED {
            assert_eq!(
                parse_label(&format!("a:tcp:{port}")),
                Err(E::Reserved {
                    name: "a".into(),
                    port
                })
            );
        }
        assert!(matches!(
            parse_label("a:tcp:8000,b:tcp:[8001,8000]"),
            Err(E::Twice { port: 8000, .. })
        ));
        assert!(matches!(
            parse_label("a:tcp:[8000,8000]"),
            Err(E::Twice { port: 8000, .. })
        ));
    }

    #[test]
    fn of_a_name_that_appears_twice_the_last_counts_in_its_place() {
        let services = parse_label("a:tcp:8000,b:tcp:8001,a:http:8002").unwrap();
        assert_eq!(names(&services), ["a", "b"]);
        assert_eq!(services[0].container_ports, [8002]);
        assert_eq!(services[0].protocol, ServiceProtocol::Http);
        assert!(matches!(
            parse_label("a:tcp:8000,a:tcp:8001,b:tcp:8000"),
            Err(E::Twice { port: 8000, .. })
        ));
    }

    #[test]
    fn ports_are_exposed_in_the_documented_order() {
        let services = arrange(&Exposure {
            label: "webapp:http:8090,fast:http:8091",
            endpoints: "fast",
            is_main: true,
            preopen: &[9000],
            allocated_host_ports: &[30500],
            models: &[("llm".to_owned(), 8000)],
        })
        .unwrap();
        assert_eq!(
            names(&services),
            [
                "sshd",
                "ttyd",
                "9000",
                "webapp",
                "fast",
                "hostport1",
                "llm-8000"
            ]
        );
        assert_eq!(
            container_ports(&services),
            [2000, 2001, 2200, 7681, 9000, 8090, 8091, 30500, 8000]
        );
        assert!(services[4].is_inference && services[6].is_inference && !services[3].is_inference);
        assert!(!services[5].is_public());
    }

    #[test]
    fn a_sub_kernel_has_only_the_built_in_services() {
        let services = arrange(&Exposure {
            label: "a:http:8090",
            preopen: &[9000],
            ..Exposure::default()
        })
        .unwrap();
        assert_eq!(names(&services), ["sshd", "ttyd"]);
    }

    #[test]
    fn colliding_extra_ports_are_refused() {
        let main = Exposure {
            is_main: true,
            ..Exposure::default()
        };
        assert_eq!(
            arrange(&Exposure {
                preopen: &[2000],
                ..main
            }),
            Err(E::PreopenRepl)
        );
        assert_eq!(
            arrange(&Exposure {
                preopen: &[2200],
                ..main
            }),
            Err(E::PreopenOverlap(2200, "sshd".into()))
        );
        assert_eq!(
            arrange(&Exposure {
                preopen: &[9000, 9000],
                ..main
            }),
            Err(E::PreopenOverlap(9000, "9000".into()))
        );
        assert!(matches!(
            arrange(&Exposure {
                preopen: &[9000],
                label: "a:tcp:9000",
                ..main
            }),
            Err(E::Twice { port: 9000, .. })
        ));
        let models = [("m".to_owned(), 2001)];
        assert_eq!(
            arrange(&Exposure {
                models: &models,
                ..main
            }),
            Err(E::ModelRepl("m".into()))
        );
        let models = [("m".to_owned(), 8090)];
        assert!(matches!(
            arrange(&Exposure {
                models: &models,
                label: "a:tcp:8090",
                ..main
            }),
            Err(E::ModelOverlap { port: 8090, .. })
        ));
    }

    /// Defect 2 of the original: a service with several ports made creation fail.
    #[test]
    fn defect_2_multi_port_services_get_one_host_port_per_container_port() {
        let services = arrange(&Exposure {
            label: "app:tcp:[9000,9001]",
            is_main: true,
            ..Exposure::default()
        })
        .unwrap();
        let pool = [30000, 30001, 30002, 30003];
        let given = with_host_ports(&services, &pool, &NetworkChoice::Default);
        assert_eq!(given[2].container_ports, [9000, 9001]);
        assert_eq!(given[2].host_ports, [30002, 30003]);
        // On the host's network only the runner's own services move aside.
        let given = with_host_ports(&services, &pool, &NetworkChoice::Host);
        assert_eq!(given[2].host_ports, [9000, 9001]);
        assert_eq!(given[1].host_ports, [30001]);
    }

    #[test]
    fn container_label_lists_preopen_ports() {
        assert_eq!(
            container_label("webapp:http:8090", &[9000]),
            "webapp:http:8090,9000:preopen:9000"
        );
        assert_eq!(
            container_label("", &[9000, 9001]),
            "9000:preopen:9000,9001:preopen:9001"
        );
        assert_eq!(container_label("", &[]), "");
    }

    #[test]
    fn services_have_the_managers_shape() {
        let mut service = ServicePort::new("ttyd", ServiceProtocol::Http, vec![7681]);
        service.host_ports = vec![30723];
        assert_eq!(
            serde_json::to_value(&service).unwrap(),
            serde_json::json!({"name": "ttyd", "protocol": "http", "container_ports": [7681],
                               "host_ports": [30723], "is_inference": false})
        );
    }
}
