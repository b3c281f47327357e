//! Small files of sysfs. Invariant: whatever a file holds, an answer or none, never more than a page.

use std::io::Read;
use std::path::Path;

/// The trimmed text of a file.
pub(super) fn text(path: &Path) -> Option<String> {
    let file = std::fs::File::open(path).ok()?;
    let mut text = String::new();
    // A file of sysfs is at most a page.
    file.take(65_536).read_to_string(&mut text).ok()?;
    Some(text.trim().to_owned())
}

/// A decimal number.
pub(super) fn number(path: &Path) -> Option<u64> {
    text(path)?.parse().ok()
}

/// A number such as `0x1002`.
pub(super) fn hex(path: &Path) -> Option<u64> {
    u64::from_str_radix(text(path)?.strip_prefix("0x")?, 16).ok()
}

/// Whether a device of the PCI bus is a display controller or a processing accelerator (PCI Code and ID
/// Assignment).
pub(super) fn is_accelerator(device: &Path) -> bool {
    let class = hex(&device.join("class")).unwrap_or(0);
    matches!(class >> 16, 0x03 | 0x12)
}

/// The NUMA node of a device; -1 is none.
pub(super) fn numa_node(device: &Path) -> Option<u16> {
    text(&device.join("numa_node"))?.parse().ok()
}

/// Names in a directory.
pub(super) fn names(directory: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}
