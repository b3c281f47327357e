//! The messages of the device-plugin host are those of Kubernetes' published definition, field by
//! field: what a program that knows only the definition encodes is read, and is written the same.
//! (The plugin that the host is tested with takes messages, methods and paths from it too.)

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;

use anyhow::{Context, Result, ensure};
use control::accelerator::host::wire::{
    AllocateResponse, CdiDevice, ContainerAllocateResponse, ContainerPreferredAllocationRequest,
    Device, DeviceIds, DevicePluginOptions, DeviceSpec, ListAndWatchResponse, Mount, NumaNode,
    PerContainer, PreferredAllocationRequest, RegisterRequest, TopologyInfo,
};
use harness::{device_plugin, python};
use prost::Message;
use serde::Deserialize;

/// What `tests/python/device_plugin_api.py` says.
#[derive(Deserialize)]
struct Published {
    methods: BTreeSet<(String, String, String, bool)>,
    messages: BTreeMap<String, [String; 2]>,
}

impl Published {
    /// `None` where there is no Python to ask.
    fn ask() -> Result<Option<Self>> {
        let Some(python) = python::interpreter("accelerator_device_plugin_api")? else {
            return Ok(None);
        };
        let definition = device_plugin::definition()?;
        let definition = definition.to_str().context("a path is UTF-8")?;
        let said = python::check(&python, "device_plugin_api.py", &[definition])?;
        Ok(Some(serde_json::from_str(&said)?))
    }

    /// A message of this name is what is made for either choice of its booleans; it need not be asked
    /// about again.
    fn is<M>(&mut self, name: &str, made: impl Fn(bool) -> M) -> Result<()>
    where
        M: Message + Default + PartialEq + Debug,
    {
        let encoded = self.messages.remove(name);
        let encoded = encoded.with_context(|| format!("no message {name} is published"))?;
        for (hex, odd) in encoded.iter().zip([true, false]) {
            let digits = hex.as_bytes().chunks(2).map(std::str::from_utf8);
            let bytes: Vec<u8> = digits
                .map(|pair| Ok(u8::from_str_radix(pair?, 16)?))
                .collect::<Result<_>>()?;
            let ours = made(odd);
            let read = M::decode(bytes.as_slice())?;
            ensure!(read == ours, "{name} is read as {read:?}, not {ours:?}");
            let written = ours.encode_to_vec();
            ensure!(
                written == bytes,
                "{name} is written as {written:02x?}, not {bytes:02x?}"
            );
        }
        Ok(())
    }
}

fn two(name: &str) -> Vec<String> {
    vec![name.to_owned(), format!("{name}2")]
}

fn text_map(name: &str) -> HashMap<String, String> {
    HashMap::from([(format!("{name}.key"), name.to_owned())])
}

fn options(odd: bool) -> DevicePluginOptions {
    DevicePluginOptions {
        pre_start_required: odd,
        get_preferred_allocation_available: !odd,
    }
}

fn topology(_: bool) -> TopologyInfo {
    TopologyInfo {
        nodes: vec![NumaNode { id: i64::MIN + 1 }; 2],
    }
}

fn device(odd: bool) -> Device {
    Device {
        id: "ID".to_owned(),
        health: "health".to_owned(),
        topology: Some(topology(odd)),
    }
}

fn preferred(_: bool) -> ContainerPreferredAllocationRequest {
    ContainerPreferredAllocationRequest {
        available_ids: two("available_deviceIDs"),
        must_include_ids: two("must_include_deviceIDs"),
        allocation_size: i32::MIN + 3,
    }
}

fn ids(name: &str) -> DeviceIds {
    DeviceIds { ids: two(name) }
}

fn per_container(name: &str) -> PerContainer {
    PerContainer {
        containers: vec![ids(name); 2],
    }
}

fn mount(odd: bool) -> Mount {
    Mount {
        container_path: "container_path".to_owned(),
        host_path: "host_path".to_owned(),
        read_only: odd,
    }
}

fn node(_: bool) -> DeviceSpec {
    DeviceSpec {
        container_path: "container_path".to_owned(),
        host_path: "host_path".to_owned(),
        permissions: "permissions".to_owned(),
    }
}

fn by_name(_: bool) -> CdiDevice {
    CdiDevice {
        name: "name".to_owned(),
    }
}

fn answer(odd: bool) -> ContainerAllocateResponse {
    ContainerAllocateResponse {
        envs: text_map("envs"),
        mounts: vec![mount(odd); 2],
        devices: vec![node(odd); 2],
        annotations: text_map("annotations"),
        cdi_devices: vec![by_name(odd); 2],
    }
}

#[test]
fn every_message_is_read_and_written_as_published() -> Result<()> {
    let Some(mut api) = Published::ask()? else {
        return Ok(());
    };
    api.is("Empty", |_| ())?;
    api.is("DevicePluginOptions", options)?;
    api.is("RegisterRequest", |odd| RegisterRequest {
        version: "version".to_owned(),
        endpoint: "endpoint".to_owned(),
        resource_name: "resource_name".to_owned(),
        options: Some(options(odd)),
    })?;
    api.is("NUMANode", |_| NumaNode { id: i64::MIN + 1 })?;
    api.is("TopologyInfo", topology)?;
    api.is("Device", device)?;
    api.is("ListAndWatchResponse", |odd| ListAndWatchResponse {
        devices: vec![device(odd); 2],
    })?;
    api.is("ContainerPreferredAllocationRequest", preferred)?;
    api.is("PreferredAllocationRequest", |odd| {
        PreferredAllocationRequest {
            container_requests: vec![preferred(odd); 2],
        }
    })?;
    api.is("ContainerPreferredAllocationResponse", |_| ids("deviceIDs"))?;
    api.is("PreferredAllocationResponse", |_| {
        per_container("deviceIDs")
    })?;
    api.is("PreStartContainerRequest", |_| ids("devices_ids"))?;
    api.is("PreStartContainerResponse", |_| ())?;
    api.is("ContainerAllocateRequest", |_| ids("devices_ids"))?;
    api.is("AllocateRequest", |_| per_container("devices_ids"))?;
    api.is("Mount", mount)?;
    api.is("DeviceSpec", node)?;
    api.is("CDIDevice", by_name)?;
    api.is("ContainerAllocateResponse", answer)?;
    api.is("AllocateResponse", |odd| AllocateResponse {
        containers: vec![answer(odd); 2],
    })?;
    ensure!(
        api.messages.is_empty(),
        "published, and unknown here: {:?}",
        api.messages.keys()
    );
    Ok(())
}

#[test]
fn the_methods_are_the_published_ones() -> Result<()> {
    let Some(api) = Published::ask()? else {
        return Ok(());
    };
    let known = [
        ("Registration/Register", "RegisterRequest", "Empty", false),
        (
            "DevicePlugin/GetDevicePluginOptions",
            "Empty",
            "DevicePluginOptions",
            false,
        ),
        (
            "DevicePlugin/ListAndWatch",
            "Empty",
            "ListAndWatchResponse",
            true,
        ),
        (
            "DevicePlugin/GetPreferredAllocation",
            "PreferredAllocationRequest",
            "PreferredAllocationResponse",
            false,
        ),
        (
            "DevicePlugin/Allocate",
            "AllocateRequest",
            "AllocateResponse",
            false,
        ),
        (
            "DevicePlugin/PreStartContainer",
            "PreStartContainerRequest",
            "PreStartContainerResponse",
            false,
        ),
    ];
    let known = known.map(|(path, request, response, streams)| {
        let path = format!("/v1beta1.{path}");
        (path, request.to_owned(), response.to_owned(), streams)
    });
    ensure!(
        api.methods == BTreeSet::from(known),
        "published: {:?}",
        api.methods
    );
    Ok(())
}
