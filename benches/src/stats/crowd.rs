//! Many containers, as the collector sees them: cgroups, a process in each, a link each.
//!
//! In: a site and a number. Out: rows for the collector; [`Crowd::busy`] has every member use CPU and
//! memory once. Invariant: [`end`] removes all of it, also what a killed bench has left.

use std::collections::BTreeMap;
use std::io::{PipeReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};

use anyhow::{Context, Result};
use dataplane::collect::hierarchies::CgroupHierarchies;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shared::desired::ContainerRow;
use shared::ids::{ContainerId, Generation};

use crate::site::{Place, Site, done, ip, until};

const TOP: &str = "crowd";

/// The members.
#[derive(Debug)]
pub struct Crowd {
    /// What the collector is told.
    pub rows: Vec<ContainerRow>,
    members: Vec<(Child, ChildStdin)>,
    answers: PipeReader,
}

fn top(root: &Path, site: &Site) -> PathBuf {
    root.join(format!("{}-{TOP}", site.id()))
}

impl Crowd {
    /// Makes `count` of them; the links' host ends are in the site's host.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn gather(site: &Site, count: u16) -> Result<Self> {
        let roots = CgroupHierarchies::gather().mounts();
        for root in &roots {
            let top = top(root, site);
            std::fs::create_dir(&top).with_context(|| top.display().to_string())?;
            for place in [root, &top] {
                for controller in ["cpu", "memory", "pids", "io"] {
                    // Only the unified hierarchy has this file.
                    let _ = std::fs::write(
                        place.join("cgroup.subtree_control"),
                        format!("+{controller}"),
                    );
                }
            }
        }
        let links = links(site, count)?;
        let (answers, answer) = std::io::pipe()?;
        let mut crowd = Self {
            rows: Vec::with_capacity(count.into()),
            members: Vec::with_capacity(count.into()),
            answers,
        };
        for number in 0..count {
            let mut child = Command::new(std::env::current_exe()?)
                .arg("--member")
                .stdin(Stdio::piped())
                .stdout(answer.try_clone()?)
                .spawn()?;
            let stdin = child.stdin.take().context("piped")?;
            for root in &roots {
                let group = top(root, site).join(number.to_string());
                std::fs::create_dir(&group)?;
                std::fs::write(group.join("cgroup.procs"), child.id().to_string())?;
            }
            crowd.members.push((child, stdin));
            let mut id = [0; 32];
            id[..2].copy_from_slice(&number.to_be_bytes());
            crowd.rows.push(ContainerRow {
                container_id: ContainerId(id),
                cgroup_path: format!("{}-{TOP}/{number}", site.id()),
                link_indexes: vec![*links.get(&number).context("a link is missing")?],
                generation: Generation(1),
                ..ContainerRow::default()
            });
        }
        crowd.busy()?;
        Ok(crowd)
    }

    /// Has every member work once; returns when all have.
    ///
    /// # Errors
    /// One has ended.
    pub fn busy(&mut self) -> Result<()> {
        for (_, stdin) in &mut self.members {
            stdin.write_all(b"x").context("a member has ended")?;
        }
        let mut answers = vec![0; self.members.len()];
        Ok(self.answers.read_exact(&mut answers)?)
    }

    /// Sends all home.
    ///
    /// # Errors
    /// Something of it can't be removed.
    pub fn disperse(mut self, site: &Site) -> Result<()> {
        for (mut child, stdin) in self.members.drain(..) {
            drop(stdin);
            child.wait()?;
        }
        end(site);
        Ok(())
    }
}

/// Ends the members of a site and removes all that is theirs.
pub fn end(site: &Site) {
    for root in CgroupHierarchies::gather().mounts() {
        let top = top(&root, site);
        let Ok(entries) = std::fs::read_dir(&top) else {
            continue;
        };
        for group in entries.flatten().map(|entry| entry.path()) {
            if !group.is_dir() {
                continue;
            }
            let left = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            for pid in left.lines().filter_map(|line| line.parse::<i32>().ok()) {
                if pid > 0 {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            let _ = until("an empty cgroup", || {
                let removed = std::fs::remove_dir(&group);
                (removed.is_ok() || !group.exists()).then_some(())
            });
        }
        let _ = std::fs::remove_dir(&top);
    }
    for place in [Place::Host, Place::Container] {
        if Path::new("/run/netns").join(site.namespace(place)).exists() {
            let _ = ip(&format!("netns del {}", site.namespace(place)));
        }
    }
}

/// Makes the links; the index of each one's host end.
fn links(site: &Site, count: u16) -> Result<BTreeMap<u16, u32>> {
    let (host, other) = (
        site.namespace(Place::Host),
        site.namespace(Place::Container),
    );
    for name in [&host, &other] {
        ip(&format!("netns add {name}"))?;
    }
    let lines: String = (0..count)
        .map(|number| {
            format!(
                "link add m{number} type veth peer name c{number} netns {other}\n\
                 link set m{number} up\n"
            )
        })
        .collect();
    let mut other_ends: String = (0..count)
        .map(|number| format!("link set c{number} up\n"))
        .collect();
    other_ends.push_str("addr add 10.213.9.2/24 dev c0\n");
    let batch = site.directory().join("links");
    std::fs::write(&batch, lines)?;
    done(Command::new("ip").args(["-n", &host, "-batch"]).arg(&batch))?;
    std::fs::write(&batch, other_ends)?;
    done(
        Command::new("ip")
            .args(["-n", &other, "-batch"])
            .arg(&batch),
    )?;
    // One has counted something, and not the same in both directions: it tells whether links are read rightly.
    ip(&format!("-n {host} addr add 10.213.9.1/24 dev m0"))?;
    site.within(Place::Host, || -> std::io::Result<usize> {
        let socket = std::net::UdpSocket::bind("10.213.9.1:0")?;
        socket.send_to(&[0; 999], "10.213.9.2:9")
    })??;
    let shown = ip(&format!("-n {host} -o link"))?;
    Ok(shown
        .lines()
        .filter_map(|line| {
            let (index, rest) = line.split_once(": m")?;
            let number = rest.split(['@', ':']).next()?;
            Some((number.parse().ok()?, index.trim().parse().ok()?))
        })
        .collect())
}

/// What a member does: a bit of CPU and memory at each word, until there is none any more.
pub fn work() -> ExitCode {
    const PAGES: usize = 64;
    let (mut word, mut sum) = ([0], 0_u64);
    let (mut stdin, mut stdout) = (std::io::stdin().lock(), std::io::stdout());
    while stdin.read_exact(&mut word).is_ok() {
        // Above the size from which the allocator gives memory back at once.
        let mut memory = vec![0_u8; PAGES * 4096];
        for (place, byte) in memory.iter_mut().enumerate().step_by(4096) {
            *byte = place.to_le_bytes()[0] | 1;
            sum = sum.wrapping_mul(31).wrapping_add(u64::from(*byte));
        }
        drop(std::hint::black_box(memory));
        std::hint::black_box(sum);
        if stdout
            .write_all(b"x")
            .and_then(|()| stdout.flush())
            .is_err()
        {
            break;
        }
    }
    ExitCode::SUCCESS
}
