//! A plugin's answer in the engine's words. Invariant: what makes no sense is refused as a whole,
//! never put into a container in part.

use std::path::{Component, Path};

use serde_json::{Map, Value, json};

use super::wire::ContainerAllocateResponse;
use crate::accelerator::inject::{cdi, device_node};

/// Entries of one kind beyond this many are no answer for one container.
const MOST: usize = 4096;
/// The kernel starts no program with a longer variable (`MAX_ARG_STRLEN` with `=` and the end), bytes.
const LONGEST: usize = (128 << 10) - 2;

/// What a container gets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Granted {
    /// Variables.
    pub environment: Vec<(String, String)>,
    /// Parts of the engine's create body.
    pub arguments: Vec<Value>,
    /// Whether CDI names are among them.
    pub by_cdi: bool,
}

impl Granted {
    /// Adds another plugin's.
    pub(super) fn merge(&mut self, other: Self) {
        self.environment.extend(other.environment);
        self.arguments.extend(other.arguments);
        self.by_cdi |= other.by_cdi;
    }

    /// Checks an answer; the error says what is wrong with it.
    pub(super) fn of(answer: ContainerAllocateResponse) -> Result<Self, String> {
        let counts = [
            answer.envs.len(),
            answer.mounts.len(),
            answer.devices.len(),
            answer.annotations.len(),
            answer.cdi_devices.len(),
        ];
        if counts.iter().any(|count| *count > MOST) {
            return Err(format!("more than {MOST} entries"));
        }
        let mut environment: Vec<(String, String)> = answer.envs.into_iter().collect();
        environment.sort();
        for (name, value) in &environment {
            if name.is_empty()
                || name.contains(['=', '\0'])
                || name.contains(char::is_whitespace)
                || value.contains('\0')
                || name.len() + value.len() > LONGEST
            {
                return Err(format!("{name:?} is no variable"));
            }
        }
        let mut arguments = Vec::new();
        let mut host = Map::new();
        let mut mounts = Vec::new();
        for mount in answer.mounts {
            absolute(&mount.host_path)?;
            absolute(&mount.container_path)?;
            mounts.push(json!({
                "Type": "bind",
                "Source": mount.host_path,
                "Target": mount.container_path,
                "ReadOnly": mount.read_only,
            }));
        }
        let mut devices = Vec::new();
        for device in answer.devices {
            absolute(&device.host_path)?;
            absolute(&device.container_path)?;
            let permissions = device.permissions;
            if permissions.is_empty() || !permissions.chars().all(|c| "rwm".contains(c)) {
                return Err(format!("{permissions:?} are no permissions of a device"));
            }
            devices.push(device_node(
                &device.host_path,
                &device.container_path,
                &permissions,
            ));
        }
        for (name, list) in [("Mounts", mounts), ("Devices", devices)] {
            if !list.is_empty() {
                host.insert(name.to_owned(), Value::Array(list));
            }
        }
        if !answer.annotations.is_empty() {
            host.insert("Annotations".to_owned(), json!(answer.annotations));
        }
        if !host.is_empty() {
            arguments.push(json!({ "HostConfig": host }));
        }
        let names: Vec<String> = answer.cdi_devices.into_iter().map(|d| d.name).collect();
        if let Some(wrong) = names.iter().find(|name| !is_cdi(name)) {
            return Err(format!("{wrong:?} is no CDI name"));
        }
        let by_cdi = !names.is_empty();
        if by_cdi {
            arguments.push(cdi(names));
        }
        Ok(Self {
            environment,
            arguments,
            by_cdi,
        })
    }
}

fn absolute(path: &str) -> Result<(), String> {
    let plain = Path::new(path).is_absolute()
        && !path.contains('\0')
        && Path::new(path)
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if plain {
        Ok(())
    } else {
        Err(format!("{path:?} is no absolute path"))
    }
}

/// `vendor.com/class=name`.
fn is_cdi(name: &str) -> bool {
    name.split_once('=').is_some_and(|(kind, device)| {
        !device.is_empty()
            && kind
                .split_once('/')
                .is_some_and(|(vendor, class)| !vendor.is_empty() && !class.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::super::wire::{CdiDevice, DeviceSpec, Mount};
    use super::*;

    #[test]
    fn answers_are_put_into_the_engines_words() {
        let granted = Granted::of(ContainerAllocateResponse {
            envs: [("A".to_owned(), "1".to_owned())].into(),
            mounts: vec![Mount {
                container_path: "/there".into(),
                host_path: "/here".into(),
                read_only: true,
            }],
            devices: vec![DeviceSpec {
                container_path: "/dev/a".into(),
                host_path: "/dev/b".into(),
                permissions: "rw".into(),
            }],
            annotations: [("k".to_owned(), "v".to_owned())].into(),
            cdi_devices: vec![CdiDevice {
                name: "v.com/gpu=0".into(),
            }],
        })
        .unwrap();
        assert_eq!(granted.environment, [("A".to_owned(), "1".to_owned())]);
        assert_eq!(
            granted.arguments[0],
            json!({"HostConfig": {
                "Mounts": [{"Type": "bind", "Source": "/here", "Target": "/there", "ReadOnly": true}],
                "Devices": [{"PathOnHost": "/dev/b", "PathInContainer": "/dev/a", "CgroupPermissions": "rw"}],
                "Annotations": {"k": "v"},
            }})
        );
        assert_eq!(granted.arguments[1], cdi(vec!["v.com/gpu=0".to_owned()]));
        let nothing = Granted::of(ContainerAllocateResponse::default()).unwrap();
        assert_eq!(nothing, Granted::default());
    }

    #[test]
    fn nonsense_is_refused() {
        let device = |path: &str, permissions: &str| ContainerAllocateResponse {
            devices: vec![DeviceSpec {
                container_path: "/dev/a".into(),
                host_path: path.into(),
                permissions: permissions.into(),
            }],
            ..ContainerAllocateResponse::default()
        };
        for wrong in [
            device("dev/a", "rw"),
            device("/dev/../etc", "rw"),
            device("/dev/a", "x"),
            device("/dev/a", ""),
            ContainerAllocateResponse {
                envs: [("A=B".to_owned(), String::new())].into(),
                ..ContainerAllocateResponse::default()
            },
            ContainerAllocateResponse {
                envs: [("A".to_owned(), "x".repeat(LONGEST))].into(),
                ..ContainerAllocateResponse::default()
            },
            ContainerAllocateResponse {
                cdi_devices: vec![CdiDevice { name: "gpu".into() }],
                ..ContainerAllocateResponse::default()
            },
        ] {
            assert!(Granted::of(wrong.clone()).is_err(), "{wrong:?}");
        }
    }
}
