//! `resource.txt`: what a kernel was given, as a text file in its config directory.
//!
//! In: a [`ResourceSpec`] (slots, allocation, mounts) and plugin extras. Out: the lines that hook
//! libraries inside the container read, and back. Invariant: reading what was
//! written gives the same spec, except that sizes in `*_SHARES` lines are rounded to two decimals
//! by the format, and that the file has at most one `CID` line.

use super::mounts::{Mount, MountKind};
use super::request::{MountPermission, TextMap};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// Amounts per device id, of one slot of one device plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotAllocation {
    pub slot: String,
    /// Device id to amount, both text; bytes as plain integers.
    pub amounts: Vec<(String, String)>,
}

/// What one device plugin (`cpu`, `mem`, `cuda`, ...) gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceAllocation {
    pub device: String,
    pub slots: Vec<SlotAllocation>,
}

/// Device name -> slot name -> device id -> amount, in the order allocated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allocations(pub Vec<DeviceAllocation>);

impl Allocations {
    /// Adds one amount, keeping the order of first appearance.
    pub fn push(&mut self, device: &str, slot: &str, id: &str, amount: &str) {
        let place = self.0.iter().position(|entry| entry.device == device);
        let place = place.unwrap_or_else(|| {
            self.0.push(DeviceAllocation {
                device: device.to_owned(),
                slots: Vec::new(),
            });
            self.0.len() - 1
        });
        let slots = &mut self.0[place].slots;
        let place = slots.iter().position(|entry| entry.slot == slot);
        let place = place.unwrap_or_else(|| {
            slots.push(SlotAllocation {
                slot: slot.to_owned(),
                amounts: Vec::new(),
            });
            slots.len() - 1
        });
        slots[place]
            .amounts
            .push((id.to_owned(), amount.to_owned()));
    }

    /// The ids of the devices given of one slot.
    pub fn ids(&self, device: &str, slot: &str) -> Vec<&str> {
        self.slot(device, slot)
            .map(|entry| entry.amounts.iter().map(|(id, _)| id.as_str()).collect())
            .unwrap_or_default()
    }

    /// One slot's entry.
    pub fn slot(&self, device: &str, slot: &str) -> Option<&SlotAllocation> {
        let device = self.0.iter().find(|entry| entry.device == device)?;
        device.slots.iter().find(|entry| entry.slot == slot)
    }
}

impl Serialize for Allocations {
    fn serialize<S: Serializer>(&self, sink: S) -> Result<S::Ok, S::Error> {
        struct Slots<'a>(&'a [SlotAllocation]);
        impl Serialize for Slots<'_> {
            fn serialize<S: Serializer>(&self, sink: S) -> Result<S::Ok, S::Error> {
                let mut map = sink.serialize_map(Some(self.0.len()))?;
                for entry in self.0 {
                    let amounts: TextMap = entry
                        .amounts
                        .iter()
                        .map(|(id, amount)| (id, amount))
                        .collect();
                    map.serialize_entry(&entry.slot, &amounts)?;
                }
                map.end()
            }
        }
        let mut map = sink.serialize_map(Some(self.0.len()))?;
        for entry in &self.0 {
            map.serialize_entry(&entry.device, &Slots(&entry.slots))?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Allocations {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let map = serde_json::Map::<String, serde_json::Value>::deserialize(source)?;
        let mut allocations = Self::default();
        for (device, slots) in map {
            let slots = slots
                .as_object()
                .ok_or_else(|| D::Error::custom("slots are not a map"))?;
            for (slot, amounts) in slots {
                let amounts = TextMap::deserialize(amounts).map_err(D::Error::custom)?;
                for (id, amount) in amounts.iter() {
                    allocations.push(&device, slot, id, amount);
                }
            }
        }
        Ok(allocations)
    }
}

/// What a kernel has of the node; part of the `create_kernels` result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceSpec {
    /// Every known slot with its amount as text, zero ones too.
    pub slots: TextMap,
    pub allocations: Allocations,
    /// Always 0, as in the original.
    #[serde(default)]
    pub scratch_disk_size: u64,
    pub mounts: Vec<Mount>,
}

/// Why a file can't be written or read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ResourceTextError {
    #[error(
        "the slot {slot} does not belong to the device {device}: it must be {device} or start with {device}."
    )]
    ForeignSlot { device: String, slot: String },
    #[error("the amount {amount:?} of {slot} on device {id} is not a number of bytes")]
    NotBytes {
        slot: String,
        id: String,
        amount: String,
    },
    #[error("resource.txt has an entry in MOUNTS that is not source:target:permission: {0:?}")]
    Mount(String),
    #[error("the SLOTS line of resource.txt is not a JSON map: {0:?}")]
    Slots(String),
    #[error("resource.txt has an entry in {key} that is not device:amount: {entry:?}")]
    Share { key: String, entry: String },
}

/// A file's text, and the mounts that its format cannot express (`:` or `,` in a path). Nothing
/// inside a container reads `MOUNTS`, and a restart takes them from the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    pub left_out: Vec<Mount>,
}

/// Writes a spec. `is_bytes` tells the slots that are sizes (`mem` always is); `extras` are the
/// plugins' own lines.
///
/// # Errors
/// A slot under the wrong device, or a size that is no number.
///
/// # Panics
/// Never: a map of texts is JSON.
pub fn render(
    spec: &ResourceSpec,
    extras: &[(String, String)],
    is_bytes: impl Fn(&str) -> bool,
) -> Result<Rendered, ResourceTextError> {
    let mut left_out = Vec::new();
    let mut mounts = Vec::new();
    for mount in &spec.mounts {
        let breaks = |path: &str| path.contains([':', ',', '\n']);
        if breaks(&mount.source) || breaks(&mount.target) {
            left_out.push(mount.clone());
        } else {
            mounts.push(format!(
                "{}:{}:{}",
                mount.source, mount.target, mount.permission
            ));
        }
    }
    let slots = serde_json::to_string(&spec.slots).expect("a map of texts is JSON");
    let mut text = format!(
        "SCRATCH_SIZE=0m\nMOUNTS={}\nSLOTS={slots}\n",
        mounts.join(",")
    );
    for entry in &spec.allocations.0 {
        for SlotAllocation { slot, amounts } in &entry.slots {
            let device = &entry.device;
            let below = slot.strip_prefix(device.as_str());
            if !below.is_some_and(|rest| rest.is_empty() || rest.starts_with('.')) {
                let (device, slot) = (device.clone(), slot.clone());
                return Err(ResourceTextError::ForeignSlot { device, slot });
            }
            let bytes = slot == "mem" || is_bytes(slot);
            let shares = amounts.iter().map(|(id, amount)| {
                if !bytes {
                    return Ok(format!("{id}:{amount}"));
                }
                let size =
                    parse_binary_size(amount).ok_or_else(|| ResourceTextError::NotBytes {
                        slot: slot.clone(),
                        id: id.clone(),
                        amount: amount.clone(),
                    })?;
                Ok(format!("{id}:{}", scaled(size)))
            });
            let shares = shares.collect::<Result<Vec<_>, _>>()?.join(",");
            text.push_str(&format!("{}_SHARES={shares}\n", slot.to_uppercase()));
        }
    }
    for (key, value) in extras {
        text.push_str(&format!("{key}={}\n", value.replace(['\n', '\r'], " ")));
    }
    Ok(Rendered { text, left_out })
}

/// The text with exactly one `CID` line, at its end: what the original wrote twice on a restart.
pub fn with_container_id(text: &str, container_id: &str) -> String {
    let kept = text.lines().filter(|line| !line.starts_with("CID="));
    let mut result: String = kept.flat_map(|line| [line, "\n"]).collect();
    result.push_str(&format!("CID={container_id}\n"));
    result
}

/// A file read back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResourceText {
    pub spec: ResourceSpec,
    pub container_id: Option<String>,
    /// Lines of device plugins, and of anybody else.
    pub extras: Vec<(String, String)>,
}

/// Reads a file; sizes in `*_SHARES` of byte slots become plain integers again.
///
/// # Errors
/// The first line that is not what the format says; lines without `=` are passed over.
pub fn parse(
    text: &str,
    is_bytes: impl Fn(&str) -> bool,
) -> Result<ResourceText, ResourceTextError> {
    let mut read = ResourceText::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        match key {
            "SCRATCH_SIZE" => {}
            "MOUNTS" => {
                for entry in value.split(',').filter(|entry| !entry.is_empty()) {
                    read.spec.mounts.push(parse_mount(entry)?);
                }
            }
            "SLOTS" => {
                read.spec.slots = serde_json::from_str(value)
                    .map_err(|_| ResourceTextError::Slots(value.to_owned()))?;
            }
            "CID" => read.container_id = Some(value.trim().to_owned()),
            _ => match key.strip_suffix("_SHARES") {
                Some(slot) => {
                    let slot = slot.to_lowercase();
                    let bytes = slot == "mem" || is_bytes(&slot);
                    parse_shares(&mut read.spec.allocations, key, &slot, value, bytes)?;
                }
                None => read.extras.push((key.to_owned(), value.to_owned())),
            },
        }
    }
    Ok(read)
}

fn parse_mount(entry: &str) -> Result<Mount, ResourceTextError> {
    let refused = || ResourceTextError::Mount(entry.to_owned());
    let mut parts = entry.split(':');
    let (Some(source), Some(target), Some(permission), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(refused());
    };
    let permission = MountPermission::from_text(permission).ok_or_else(refused)?;
    let kind = if source.contains('/') {
        MountKind::Bind
    } else {
        MountKind::Volume
    };
    Ok(Mount {
        kind,
        ..Mount::bind(source, target, permission)
    })
}

fn parse_shares(
    allocations: &mut Allocations,
    key: &str,
    slot: &str,
    value: &str,
    bytes: bool,
) -> Result<(), ResourceTextError> {
    let device = slot.split('.').next().unwrap_or(slot);
    for entry in value.split(',').filter(|entry| !entry.is_empty()) {
        let refused = || ResourceTextError::Share {
            key: key.to_owned(),
            entry: entry.to_owned(),
        };
        let (id, amount) = entry.split_once(':').ok_or_else(refused)?;
        // Entries without id or amount are passed over, as the original's reader does.
        if id.is_empty() || amount.is_empty() {
            continue;
        }
        let amount = match bytes {
            true => parse_binary_size(amount).ok_or_else(refused)?.to_string(),
            false => amount.to_owned(),
        };
        allocations.push(device, slot, id, &amount);
    }
    Ok(())
}

const UNITS: [char; 8] = ['k', 'm', 'g', 't', 'p', 'e', 'z', 'y'];

/// Bytes in the largest unit that leaves a whole part, with at most two decimals (half to even).
pub fn scaled(bytes: u64) -> String {
    if bytes < 1024 {
        return bytes.to_string();
    }
    let power = (bytes.ilog2() / 10) as usize;
    let unit = 1_u128 << (10 * power);
    format!(
        "{}{}",
        hundredths(u128::from(bytes), unit),
        UNITS[power - 1]
    )
}

fn hundredths(bytes: u128, unit: u128) -> String {
    let (mut whole, rest) = (bytes * 100 / unit, bytes * 100 % unit);
    if rest * 2 > unit || (rest * 2 == unit && whole % 2 == 1) {
        whole += 1;
    }
    let text = format!("{}.{:02}", whole / 100, whole % 100);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Reads a size: a number with an optional unit `k m g t p e`, optional `ib`, `b`, `byte(s)`,
/// underscores and blanks. Nothing for other text, infinity, or more than 2^64 - 1.
pub fn parse_binary_size(written: &str) -> Option<u64> {
    let text: String = written
        .chars()
        .filter(|c| !c.is_whitespace() && *c != '_')
        .map(|c| c.to_ascii_lowercase())
        .collect();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, ending) = text.split_at(split);
    let ending = ["bytes", "byte", "ib", "b"]
        .iter()
        .find_map(|word| ending.strip_suffix(word))
        .unwrap_or(ending);
    let mut letters = ending.chars();
    let power = match (letters.next(), letters.next()) {
        (None, _) => 0,
        (Some(letter), None) => UNITS.iter().position(|unit| *unit == letter)? + 1,
        _ => return None,
    };
    let unit = 1_u128.checked_shl(u32::try_from(10 * power).ok()?)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole: u128 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    // Nineteen digits of a fraction are below one byte of any unit that fits.
    let fraction = &fraction[..fraction.len().min(19)];
    let divisor = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction: u128 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().ok()?
    };
    let fraction = fraction.checked_mul(unit)? / divisor;
    u64::try_from(whole.checked_mul(unit)?.checked_add(fraction)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn is_bytes(_: &str) -> bool {
        false
    }

    fn vector(file: &str) -> String {
        let vectors: serde_json::Value = serde_json::from_str(include_str!(
            "../../../tests/vectors/runner/scratch_files.json"
        ))
        .unwrap();
        vectors["data"][file].as_str().unwrap().to_owned()
    }

    #[test]
    fn the_captured_file_is_read_and_written_back_byte_for_byte() {
        let base = vector("resource_base.txt");
        let read = parse(&base, is_bytes).unwrap();
        assert_eq!(read.container_id, None);
        assert_eq!(read.spec.allocations.ids("cpu", "cpu"), ["0"]);
        assert_eq!(
            read.spec.allocations.slot("mem", "mem").unwrap().amounts,
            [("root".to_owned(), "536870912".to_owned())]
        );
        let volume = read
            .spec
            .mounts
            .iter()
            .find(|mount| mount.kind == MountKind::Volume)
            .unwrap();
        assert_eq!(volume.target, "/opt/backend.ai");
        let written = render(&read.spec, &read.extras, is_bytes).unwrap();
        assert_eq!(written.text, base);
        assert!(written.left_out.is_empty());
        let cid = "0c8a3f591edc3f5558b834c0e23d765c2f02c15bfbed5ddc76a03f8967f37362";
        assert_eq!(with_container_id(&base, cid), vector("resource.txt"));
    }

    /// Part of defect 1 of the original: a restart left two `CID` lines.
    #[test]
    fn defect_1_a_restart_leaves_a_single_container_id_line() {
        let once = with_container_id(&vector("resource_base.txt"), &"a".repeat(64));
        let twice = with_container_id(&once, &"b".repeat(64));
        assert_eq!(twice.matches("CID=").count(), 1);
        assert_eq!(
            parse(&twice, is_bytes).unwrap().container_id,
            Some("b".repeat(64))
        );
    }

    #[test]
    fn fractions_and_plugin_lines_keep_their_text() {
        let text = "SCRATCH_SIZE=0m\nMOUNTS=\nSLOTS={\"cuda.shares\":\"0.5\"}\n\
                    CUDA.SHARES_SHARES=g0:0.50,MIG-a/1:2/0:1\nCUDA_GLOBAL_DEVICE_IDS=0:0\nnoise\n";
        let read = parse(text, is_bytes).unwrap();
        let slot = read.spec.allocations.slot("cuda", "cuda.shares").unwrap();
        assert_eq!(slot.amounts[0], ("g0".to_owned(), "0.50".to_owned()));
        assert_eq!(slot.amounts[1], ("MIG-a/1".to_owned(), "2/0:1".to_owned()));
        assert_eq!(
            read.extras,
            [("CUDA_GLOBAL_DEVICE_IDS".to_owned(), "0:0".to_owned())]
        );
        let written = render(&read.spec, &read.extras, is_bytes).unwrap().text;
        assert_eq!(written, text.strip_suffix("noise\n").unwrap());
    }

    #[test]
    fn a_path_the_format_cannot_hold_is_left_out_and_told() {
        let spec = ResourceSpec {
            mounts: vec![
                Mount::bind("/a:b", "/x", MountPermission::ReadOnly),
                Mount::bind("/c", "/y", MountPermission::ReadWrite),
            ],
            ..ResourceSpec::default()
        };
        let written = render(&spec, &[], is_bytes).unwrap();
        assert!(written.text.contains("MOUNTS=/c:/y:rw\n"));
        assert_eq!(written.left_out, spec.mounts[..1]);
    }

    #[test]
    fn a_slot_of_another_device_is_refused() {
        let mut spec = ResourceSpec::default();
        spec.allocations.push("cuda", "cudax.device", "0", "1");
        assert!(matches!(
            render(&spec, &[], is_bytes),
            Err(ResourceTextError::ForeignSlot { .. })
        ));
    }

    #[test]
    fn broken_lines_are_named() {
        for text in [
            "MOUNTS=/a:/b",
            "MOUNTS=/a:/b:xx",
            "SLOTS=[",
            "CPU_SHARES=0",
            "MEM_SHARES=root:x",
        ] {
            assert!(parse(text, is_bytes).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_written_as_the_original_does() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1k"),
            (536_870_912, "512m"),
            (2_684_354_560, "2.5g"),
            (67_411_902_464, "62.78g"),
            (u64::MAX, "16e"),
        ] {
            assert_eq!(scaled(bytes), text);
        }
        assert_eq!(parse_binary_size("62.78g"), Some(67_409_511_710));
        assert_eq!(parse_binary_size(" 1_024 MiB"), Some(1 << 30));
        assert_eq!(parse_binary_size("512 bytes"), Some(512));
        assert_eq!(parse_binary_size("1.5k"), Some(1536));
        for text in [
            "",
            "g",
            "inf",
            "1x",
            "1mm",
            "-1",
            "1..2",
            "99999999999e",
            "1z",
        ] {
            assert_eq!(parse_binary_size(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn scaled_sizes_are_read_within_half_a_hundredth(bytes in any::<u64>()) {
            let read = u128::from(parse_binary_size(&scaled(bytes)).unwrap_or(u64::MAX));
            let unit = 1_u128 << (bytes.max(1).ilog2() / 10 * 10);
            prop_assert!(read.abs_diff(u128::from(bytes)) <= unit / 200 + 1);
        }

        #[test]
        fn any_text_is_read_without_panic(text in ".{0,200}") {
            let _ = parse(&text, is_bytes);
            let _ = parse_binary_size(&text);
        }
    }
}
