//! Which container a process belongs to, and what its processes use together.
//!
//! In: processes as a driver lists them. Out: one [`AcceleratorUse`] per container. Invariants: a
//! process of no container (the host's own) is nobody's use; one that is not to be found (it has ended,
//! or its pid is of another namespace) may be anybody's; an amount the driver does not tell for every
//! process of a container is unknown for the container.

use std::collections::BTreeMap;
use std::io::Read;

use shared::ids::ContainerId;
use shared::observed::AcceleratorUse;

use super::ProcessUse;

/// More of `/proc/PID/cgroup` is not read: paths are bounded by the kernel, hierarchies are few.
const CGROUP_BYTES: u64 = 64 * 1024;

/// Whose a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A container's.
    Container(ContainerId),
    /// The host's own.
    Host,
    /// There is no such process (any more).
    Unknown,
}

/// Whose a process is, by the container id in its cgroup paths (cgroups(7)).
pub fn owner_of(pid: u32) -> Owner {
    let read = || -> std::io::Result<String> {
        let file = std::fs::File::open(format!("/proc/{pid}/cgroup"))?;
        let mut text = String::new();
        file.take(CGROUP_BYTES).read_to_string(&mut text)?;
        Ok(text)
    };
    match read() {
        Ok(text) => container_in(&text).map_or(Owner::Host, Owner::Container),
        Err(_) => Owner::Unknown,
    }
}

/// The last container id in the text: a container within a container belongs to the inner one.
fn container_in(text: &str) -> Option<ContainerId> {
    let line = text
        .lines()
        .max_by_key(|line| ids_in(line).count())
        .unwrap_or_default();
    ids_in(line).last()
}

fn ids_in(line: &str) -> impl Iterator<Item = ContainerId> + '_ {
    line.split(|c: char| !c.is_ascii_hexdigit())
        .filter(|word| word.len() == 64)
        .filter_map(|word| word.parse().ok())
}

/// Sums the processes of each container, and says whether all processes have been found.
pub fn by_container(
    processes: impl IntoIterator<Item = (u32, ProcessUse)>,
    owner_of: impl Fn(u32) -> Owner,
) -> (Vec<AcceleratorUse>, bool) {
    let mut sums: BTreeMap<ContainerId, ProcessUse> = BTreeMap::new();
    let mut all_found = true;
    for (pid, used) in processes {
        let container_id = match owner_of(pid) {
            Owner::Container(container_id) => container_id,
            Owner::Host => continue,
            Owner::Unknown => {
                all_found = false;
                continue;
            }
        };
        sums.entry(container_id)
            .and_modify(|sum| sum.add(used))
            .or_insert(used);
    }
    let uses = sums.into_iter().map(|(container_id, used)| AcceleratorUse {
        container_id,
        memory_bytes: used.memory_bytes,
        utilisation_permille: used.utilisation_permille,
        encoder_permille: used.encoder_permille,
        decoder_permille: used.decoder_permille,
    });
    (uses.collect(), all_found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const B: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";

    #[test]
    fn containers_are_found_in_every_form_of_path() {
        let id = |text: &str| text.parse::<ContainerId>().ok();
        assert_eq!(container_in(&format!("4:memory:/docker/{A}\n")), id(A));
        assert_eq!(
            container_in(&format!("0::/system.slice/docker-{A}.scope\n")),
            id(A)
        );
        assert_eq!(
            container_in(&format!("1:name=systemd:/\n4:cpu:/docker/{A}/docker/{B}\n")),
            id(B)
        );
        assert_eq!(container_in("0::/user.slice/user-0.slice\n"), None);
        assert_eq!(container_in(&format!("0::/x/{A}0\n")), None);
        assert_eq!(owner_of(std::process::id()), Owner::Host);
        // No pid is that large (pid_max is at most 2^22).
        assert_eq!(owner_of(u32::MAX), Owner::Unknown);
        assert_eq!(owner_of(0), Owner::Unknown);
    }

    #[test]
    fn sums_are_unknown_when_a_part_is() {
        let used = |memory, share| ProcessUse {
            memory_bytes: memory,
            utilisation_permille: share,
            encoder_permille: share.map(|share| share / 10),
            decoder_permille: None,
        };
        let (a, b) = (ContainerId([1; 32]), ContainerId([2; 32]));
        let (uses, all_found) = by_container(
            [
                (10, used(Some(100), Some(200))),
                (11, used(Some(50), None)),
                (20, used(Some(7), Some(1))),
                (30, used(Some(1 << 40), Some(1000))),
            ],
            |pid| match pid / 10 {
                1 => Owner::Container(a),
                2 => Owner::Container(b),
                _ => Owner::Host,
            },
        );
        assert!(all_found);
        let nobody = by_container([(40, used(Some(1), None))], |_| Owner::Unknown);
        assert_eq!(nobody, (Vec::new(), false));
        let uses = <[_; 2]>::try_from(uses).unwrap();
        assert_eq!(
            (uses[0].memory_bytes, uses[0].utilisation_permille),
            (Some(150), None)
        );
        assert_eq!(
            (uses[1].memory_bytes, uses[1].utilisation_permille),
            (Some(7), Some(1))
        );
        let coders = uses.map(|user| (user.encoder_permille, user.decoder_permille));
        assert_eq!(coders, [(None, None), (Some(0), None)]);
    }
}
