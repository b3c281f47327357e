//! The heartbeat's arguments, in the one form the published manager accepts.
//!
//! In: what the node is and has. Out: the map with its ext form of slots. Invariant: every key the
//! manager demands is there; slots are a pickle made from a fixed template with texts put in.

use std::net::IpAddr;

use bytes::Bytes;
use config::Config;

use crate::resource::{AvailableSlot, PluginFacts};
use crate::rpc::{PublicKey, Value};

/// The release whose protocol this agent speaks; managers show it as the agent's version.
pub const PROTOCOL_VERSION: &str = "25.15.8";
/// Ext code of a `ResourceSlot`.
const RESOURCE_SLOT: i8 = 8;
/// An empty list of images, compressed.
pub(super) const NO_IMAGES: &[u8] = b"\x78\x9c\x9b\x00\x00\x00\x91\x00\x91";

/// What of the heartbeat stays the same while the process lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Host of the announced RPC address.
    pub ip: String,
    /// Region; the manager's table wants text.
    pub region: String,
    /// `tcp://host:port`, where the manager connects.
    pub address: String,
    /// The agent's CURVE key as 40 characters, when it has one.
    pub public_key: Option<String>,
    /// Host that clients are told.
    pub public_host: String,
    /// `x86_64` or `aarch64`.
    pub architecture: String,
    /// Whether kernels reported as abusing are ended by this node.
    pub ends_abusing_kernels: bool,
}

impl Identity {
    /// The identity that the configuration gives.
    #[must_use]
    pub fn of(config: &Config, public_key: Option<&PublicKey>) -> Self {
        let announced = &config.agent.advertised_rpc_addr;
        let host = match announced.host.parse::<IpAddr>() {
            Ok(IpAddr::V6(address)) => format!("[{address}]"),
            _ => announced.host.clone(),
        };
        Self {
            ip: announced.host.clone(),
            region: config.agent.region.clone(),
            address: format!("tcp://{host}:{}", announced.port),
            public_key: public_key.map(PublicKey::to_z85),
            public_host: config.agent.public_host.clone(),
            architecture: std::env::consts::ARCH.to_owned(),
            ends_abusing_kernels: config.agent.force_terminate_abusing_containers,
        }
    }
}

/// The arguments of `agent_heartbeat`.
#[must_use]
pub fn args(
    identity: &Identity,
    scaling_group: &str,
    slots: &[AvailableSlot],
    plugins: &[(String, PluginFacts)],
    images: Bytes,
) -> Vec<Value> {
    let amounts: Vec<(String, String)> = slots
        .iter()
        .map(|slot| (slot.name.clone(), slot.amount.normalize().to_string()))
        .collect();
    let units = slots
        .iter()
        .map(|slot| (slot.name.clone(), text(slot.kind.word())));
    let plugins = plugins
        .iter()
        .map(|(name, facts)| (name.clone(), plugin(name, facts, identity)));
    let public_key = match &identity.public_key {
        Some(key) => Value::Bin(Bytes::copy_from_slice(key.as_bytes())),
        None => Value::Nil,
    };
    let images = if images.is_empty() {
        Bytes::from_static(NO_IMAGES)
    } else {
        images
    };
    vec![Value::map([
        ("ip", text(&identity.ip)),
        ("region", text(&identity.region)),
        ("scaling_group", text(scaling_group)),
        ("addr", text(&identity.address)),
        ("public_key", public_key),
        ("public_host", text(&identity.public_host)),
        (
            "available_resource_slots",
            Value::Ext(RESOURCE_SLOT, resource_slot(&amounts).into()),
        ),
        ("slot_key_and_units", Value::map(units)),
        ("version", text(PROTOCOL_VERSION)),
        ("compute_plugins", Value::map(plugins)),
        ("images", Value::Bin(images)),
        ("architecture", text(&identity.architecture)),
        (
            "auto_terminate_abusing_kernel",
            Value::Bool(identity.ends_abusing_kernels),
        ),
        ("images_opts", Value::map([("compression", text("zlib"))])),
    ])]
}

fn plugin(name: &str, facts: &PluginFacts, identity: &Identity) -> Value {
    let mut entries = vec![("version", text(&facts.version))];
    let texts = facts.texts.iter().map(|(key, value)| (&**key, text(value)));
    entries.extend(texts);
    let flags = facts.flags.iter();
    entries.extend(flags.map(|(key, is)| (&**key, Value::Bool(*is))));
    if name == "cpu" {
        entries.push(("agent_version", text(PROTOCOL_VERSION)));
        entries.push(("machine", text(&identity.architecture)));
        entries.push(("os_type", text("Linux")));
    }
    Value::map(entries)
}

fn text(text: &str) -> Value {
    Value::Str(text.to_owned())
}

/// A call of `ResourceSlot` with a map of `Decimal`s, in pickle protocol 2 without a memo: the
/// shortest form that the published decoder turns into the same object as the original's.
fn resource_slot(amounts: &[(String, String)]) -> Vec<u8> {
    let mut out = vec![0x80, 2];
    out.extend(b"cai.backend.common.types\nResourceSlot\n");
    out.extend(b"}(");
    for (slot, amount) in amounts {
        push_text(&mut out, slot);
        out.extend(b"cdecimal\nDecimal\n");
        push_text(&mut out, amount);
        out.extend(b"\x85R");
    }
    out.extend(b"u\x85R.");
    out
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    out.push(b'X');
    out.extend(length.to_le_bytes());
    out.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::SlotType;

    fn vectors() -> serde_json::Value {
        serde_json::from_str(include_str!("../../../tests/vectors/events/heartbeat.json")).unwrap()
    }

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect()
    }

    fn slot(name: &str, kind: SlotType, amount: u64) -> AvailableSlot {
        AvailableSlot {
            name: name.into(),
            kind,
            amount: amount.into(),
        }
    }

    fn identity() -> Identity {
        Identity {
            ip: "10.0.0.5".into(),
            region: "local".into(),
            address: "tcp://10.0.0.5:6001".into(),
            public_key: None,
            public_host: "10.0.0.5".into(),
            architecture: "x86_64".into(),
            ends_abusing_kernels: false,
        }
    }

    fn images() -> Bytes {
        let file = vectors();
        bytes(file["images_field"]["compressed_hex"].as_str().unwrap()).into()
    }

    #[test]
    fn the_heartbeat_is_what_the_published_decoder_was_seen_to_accept() {
        let slots = [
            slot("cpu", SlotType::Count, 7),
            slot("mem", SlotType::Bytes, 66_571_993_088),
            slot("cuda.shares", SlotType::Count, 1),
        ];
        let plugins = [("mem".to_owned(), PluginFacts::default())];
        let ours = args(&identity(), "default", &slots, &plugins, images());
        let written = Value::Array(ours).encode().unwrap();
        let file = vectors();
        let captured = file["vectors"].as_array().unwrap().last().unwrap();
        assert!(
            captured["origin"]
                .as_str()
                .unwrap()
                .starts_with("hand-built")
        );
        let expected = bytes(captured["args_hex"].as_str().unwrap());
        // All but the plugins, of which the captured form has other ones.
        let around = |all: &[u8]| {
            let at = |what: &[u8]| {
                all.windows(what.len())
                    .position(|part| part == what)
                    .unwrap()
            };
            let (before, after) = (at(b"compute_plugins"), at(b"\xa6images\xc4"));
            (all[..before].to_vec(), all[after..].to_vec())
        };
        assert_eq!(around(&written), around(&expected));
    }

    #[test]
    fn slots_are_the_documented_template() {
        let file = vectors();
        let captured = file["vectors"].as_array().unwrap().last().unwrap();
        let slots = &captured["args_decoded"][0]["available_resource_slots"];
        let amounts = [("cpu", "7"), ("mem", "66571993088"), ("cuda.shares", "1")]
            .map(|(name, amount)| (name.to_owned(), amount.to_owned()));
        assert_eq!(
            resource_slot(&amounts),
            bytes(slots["data_hex"].as_str().unwrap())
        );
    }

    #[test]
    fn cpu_tells_more_and_a_key_is_bytes() {
        let mut who = identity();
        who.public_key = Some("q".repeat(40));
        let plugins = [("cpu".to_owned(), PluginFacts::default())];
        let args = args(&who, "gpu", &[], &plugins, Bytes::new());
        let map = &args[0];
        let cpu = map.get("compute_plugins").and_then(|all| all.get("cpu"));
        let keys: Vec<&str> = cpu
            .and_then(Value::as_map)
            .unwrap()
            .iter()
            .filter_map(|(key, _)| key.as_str())
            .collect();
        assert_eq!(keys, ["version", "agent_version", "machine", "os_type"]);
        assert_eq!(
            map.get("public_key")
                .and_then(Value::as_bin)
                .map(Bytes::len),
            Some(40)
        );
        assert_eq!(
            map.get("images").and_then(Value::as_bin).unwrap(),
            &Bytes::from_static(NO_IMAGES)
        );
        assert_eq!(map.as_map().map(<[_]>::len), Some(14));
    }
}
