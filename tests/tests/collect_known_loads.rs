//! Loads of known size are found in the samples within one per cent of what was done.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::cgroup::TestCgroup;
use harness::dataplane::{Control, Options, Place, Process, container_row, until};
use harness::netns::VethPair;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shared::desired::ContainerRow;
use shared::observed::{ContainerSample, Source};

/// A dataplane that samples one cgroup. Dropped in this order.
struct Watched {
    control: Control,
    _process: Process,
    _place: Place,
    row: ContainerRow,
    group: TestCgroup,
}

fn watched(name: &str, number: u8) -> Option<Watched> {
    watched_over(name, number, None)
}

/// The same with the host side of a container's link.
fn watched_over(name: &str, number: u8, link: Option<&VethPair>) -> Option<Watched> {
    let group = TestCgroup::new(name).expect("a cgroup")?;
    let place = Place::new(Options {
        dataplane: "stats-interval = 0.1".to_owned(),
        namespace: link.map(|pair| pair.host.clone()),
        ..Options::default()
    })
    .expect("a place");
    let mut control = place.control().expect("the desired region");
    let process = place.start().expect("bai-dataplane");
    let mut row = container_row(number);
    row.cgroup_path.clone_from(&group.path);
    row.link_indexes = link.map(|pair| pair.host_index).into_iter().collect();
    control
        .write(|batch| batch.put_container(row.clone()))
        .expect("written");
    Some(Watched {
        control,
        _process: process,
        _place: place,
        row,
        group,
    })
}

impl Watched {
    /// A sample made after now that `wanted` accepts.
    fn sample(&mut self, mut wanted: impl FnMut(&ContainerSample) -> bool) -> ContainerSample {
        let id = self.row.container_id;
        let tick = self.control.sample(id, |_| true).expect("a sample").tick;
        self.control
            .sample(id, |it| it.tick >= tick + 2 && wanted(it))
            .expect("a sample of what was done")
    }
}

/// Within one per cent, and `extra` of what the tools need themselves.
fn near(found: Option<u64>, done: u64, extra: u64) -> bool {
    let slack = done / 100;
    found.is_some_and(|found| found + slack >= done && found <= done + slack + extra)
}

#[test]
fn a_cpu_burner_is_charged_what_it_burnt() {
    let Some(mut it) = watched("burner", 31) else {
        return;
    };
    let pid = it
        .group
        .run("kill -STOP $$; trap 'exec sleep 1000' USR1; while :; do :; done")
        .expect("a burner");
    // The task's own account, kept by the scheduler apart from the cgroup's.
    let account = || -> Option<u64> {
        let account = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
        account.split_whitespace().next()?.parse().ok()
    };
    let is = |words: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.contains(words).then_some(())
    };
    let send = |signal| kill(Pid::from_raw(pid.cast_signed()), signal).expect("its process");
    until("the burner having stopped", || is("(sh) T ")).expect("a burner");
    // Before it entered the cgroup it had used some time, too.
    let before = account().expect("its account");
    let charged = it.group.cpu_ns().expect("the file");
    send(Signal::SIGCONT);
    until("a second being burnt", || {
        account().filter(|burnt| *burnt > before + 1_000_000_000)
    })
    .expect("a burner");
    send(Signal::SIGUSR1);
    until("the burner having become sleep", || is("(sleep) S ")).expect("burnt");
    let id = it.row.container_id;
    let burnt = account().expect("its account") - before + charged;
    let sample = it
        .control
        .sample(id, |sample| near(sample.cpu.counters.usage_ns, burnt, 0));
    let sample = sample.expect("what was burnt");
    assert_eq!(sample.cpu.source, Source::Bpf, "root may load programs");
    let (user, system) = (
        sample.cpu.counters.user_ns.expect("user time"),
        sample.cpu.counters.system_ns.expect("system time"),
    );
    assert!(user > system, "a loop of a shell runs in user mode");
}

#[test]
fn memory_is_charged_as_it_was_taken() {
    let Some(mut it) = watched("allocator", 32) else {
        return;
    };
    let (anonymous, shared) = (256_u64 << 20, 96_u64 << 20);
    let file = format!("/dev/shm/bai-known-load-{}", std::process::id());
    // The reader's buffer is touched in full, then it waits for a pipe that nobody empties.
    it.group
        .run(&format!(
            "head -c {shared} /dev/zero > {file}; exec 3<{file}; rm {file}; dd if=/dev/zero bs={anonymous} count=1 | sleep 1000"
        ))
        .expect("an allocator");
    let sample = it.sample(|sample| {
        near(sample.memory.counters.anon_bytes, anonymous, 2 << 20)
            && near(sample.memory.counters.shmem_bytes, shared, 0)
    });
    let memory = sample.memory.get().expect("memory");
    assert_eq!(sample.memory.source, Source::Bpf, "root may load programs");
    let current = memory.current_bytes.expect("usage");
    // Page tables and the kernel's own memory for all this come on top.
    assert!(
        near(Some(current), anonymous + shared, 16 << 20),
        "{current} of {}",
        anonymous + shared
    );
}

#[test]
fn a_link_is_charged_what_was_sent_over_it() {
    let Some(pair) = VethPair::new("load").expect("namespaces") else {
        return;
    };
    let Some(mut it) = watched_over("link", 34, Some(&pair)) else {
        return;
    };
    it.sample(|sample| sample.net.get().is_some());
    // Datagrams of 1,400 bytes to a neighbour that takes them in without a word: with their headers of
    // Ethernet, IP and UDP each is 1,442. Twice as many go in as come out.
    let (inwards, outwards) = (40_000_u64, 20_000_u64);
    for (inside, link, count) in [
        (
            VethPair::in_host as fn(&VethPair, &str) -> Command,
            "vhost",
            inwards,
        ),
        (VethPair::in_container, "eth0", outwards),
    ] {
        let script = format!(
            "ip neigh add 10.213.7.77 lladdr 02:00:00:00:00:77 dev {link} && \
             exec dd if=/dev/zero bs=1400 count={count} status=none >/dev/udp/10.213.7.77/9"
        );
        let sent = inside(&pair, "bash").args(["-c", &script]).output();
        let sent = sent.expect("bash");
        assert!(sent.status.success(), "{sent:?}");
    }
    let own = |place: usize| -> u64 {
        let table = pair.in_container("cat").arg("/proc/net/dev").output();
        let table = table.expect("its own counters").stdout;
        let table = String::from_utf8_lossy(&table).into_owned();
        let line = table.lines().find_map(|it| it.trim().strip_prefix("eth0:"));
        let word = line.expect("eth0").split_whitespace().nth(place);
        word.and_then(|word| word.parse().ok()).expect("a number")
    };
    let (received, sent) = (own(0), own(8));
    let sample = it.sample(|sample| {
        let net = &sample.net.counters;
        near(net.rx_bytes, inwards * 1442, 4096)
            && near(net.tx_bytes, outwards * 1442, 4096)
            && sample.net.source == Source::Bpf
    });
    let net = sample.net.counters;
    // Nothing has moved since but a word of the neighbours.
    assert!(near(net.rx_bytes, received, 0), "{net:?} {received}");
    assert!(near(net.tx_bytes, sent, 0), "{net:?} {sent}");
    assert!(near(net.rx_packets, inwards, 50) && near(net.tx_packets, outwards, 50));
}

/// A directory on a block device, if this host lets one be found.
fn on_a_disk() -> Option<PathBuf> {
    let candidates = [
        Path::new("/var/tmp"),
        Path::new(env!("CARGO_TARGET_TMPDIR")),
    ];
    let found = candidates.into_iter().find(|place| {
        place.metadata().is_ok_and(|it| {
            let (major, minor) = (it.dev() >> 8 & 0xfff, it.dev() & 0xff);
            Path::new(&format!("/sys/dev/block/{major}:{minor}")).exists()
        })
    });
    if found.is_none() {
        harness::skip::here("no directory lies on a block device", false);
    }
    found.map(Path::to_owned)
}

/// What the kernel has charged to a cgroup and those above it.
fn charged(group: &TestCgroup) -> String {
    let directory = group.directory_with("io.stat").unwrap_or(Path::new("/"));
    let levels = directory
        .ancestors()
        .take_while(|it| it.join("cgroup.controllers").exists());
    let told = levels.map(|level| {
        let text = std::fs::read_to_string(level.join("io.stat"));
        format!(
            "{}/io.stat: {}\n",
            level.display(),
            text.unwrap_or_else(|err| err.to_string())
        )
    });
    told.collect()
}

/// Bytes written that `io.stat` tells.
fn written_by_file(group: &TestCgroup) -> Option<u64> {
    let text = group.read(&["io.stat"])?;
    let devices = text
        .split_whitespace()
        .filter_map(|it| it.strip_prefix("wbytes="));
    devices.map(|it| it.parse::<u64>().ok()).sum()
}

#[test]
fn block_devices_are_charged_what_was_moved() {
    let Some(directory) = on_a_disk() else {
        return;
    };
    let Some(mut it) = watched("disk", 33) else {
        return;
    };
    // In version 1 the counting begins with the process; its first sample says that it has.
    it.sample(|sample| sample.io.get().is_some());
    let file = directory.join(format!("bai-known-load-{}", std::process::id()));
    let path = file.display();
    let size = 64_u64 << 20;
    let unified = it.group.directory_with("io.stat").is_some();
    let mut run = |script: String| {
        it.group.run(&script).expect("dd");
        let ended = it.group.finish();
        if ended.is_err() {
            let _ = std::fs::remove_file(&file);
        }
        ended.expect("dd");
    };
    run(format!(
        "exec dd if=/dev/zero of={path} bs=1M count=64 oflag=direct status=none"
    ));
    run(format!(
        "exec dd if={path} of=/dev/null bs=1M iflag=direct status=none"
    ));
    let id = it.row.container_id;
    let mut first = None;
    let direct = it.control.sample(id, |sample| {
        first = Some(sample.io);
        sample.io.source == Source::Bpf
            && near(sample.io.counters.write_bytes, size, 1 << 20)
            && near(sample.io.counters.read_bytes, size, 1 << 20)
    });
    let directly = charged(&it.group);
    // Buffered: the cache has nothing of the file, so that all of it is read again.
    let mut run = |script: String| {
        it.group.run(&script).expect("dd");
        it.group.finish().expect("dd");
    };
    run(format!(
        "dd if={path} iflag=nocache count=0 status=none && exec dd if={path} of=/dev/null bs=1M status=none"
    ));
    // It is charged to whom writes it back: dd by its fsync, but for what threads of the kernel's, which are the
    // root's, took out of its hands. In version 2 that of the cache knows whose it is, and that of ext4's journal,
    // which commits every five seconds, does not; so the file tells the rest, and it is written again where too
    // little was charged to tell it from what was written directly.
    let before = written_by_file(&it.group);
    let mut rounds = 0;
    let least = loop {
        it.group
            .run(&format!(
                "exec dd if=/dev/zero of={path} bs=1M count=64 conv=notrunc,fsync status=none"
            ))
            .expect("dd");
        it.group.finish().expect("dd");
        rounds += 1;
        match before.filter(|_| unified) {
            None => break size + size / 10,
            Some(before) => {
                let charged = written_by_file(&it.group);
                if rounds == 5 || charged >= Some(before + size / 2) {
                    break before + size / 2;
                }
            }
        }
    };
    let done = (1 + rounds) * size;
    let mut last = None;
    let tick = it.control.sample(id, |_| true).expect("a sample").tick;
    let buffered = it.control.sample(id, |sample| {
        last = Some(sample.io);
        let written = sample.io.counters.write_bytes;
        sample.tick >= tick + 2
            && near(sample.io.counters.read_bytes, 2 * size, 2 << 20)
            && (!unified || written == written_by_file(&it.group))
            && (near(written, done, rounds * (4 << 20))
                || written.is_some_and(|it| (least..done).contains(&it)))
    });
    let by_cache = charged(&it.group);
    let removed = std::fs::remove_file(&file);
    assert!(
        direct.is_ok(),
        "64 MiB written and read past the cache: {first:?}\n{directly}"
    );
    let direct = direct.expect("said above");
    let operations = |count: Option<u64>| count.is_some_and(|count| (16..4096).contains(&count));
    assert!(
        operations(direct.io.counters.read_operations)
            && operations(direct.io.counters.write_operations),
        "{:?}",
        direct.io
    );
    assert!(
        buffered.is_ok(),
        "64 MiB read and written through the cache: {last:?}\nbefore: {directly}after: {by_cache}"
    );
    removed.expect("removed");
}

/// A block device whose bytes are those of a file.
struct Loop {
    device: String,
    file: PathBuf,
}

impl Loop {
    /// In memory: nothing else is written when the device is.
    fn new(bytes: u64) -> Option<Self> {
        let file = Path::new("/dev/shm").join(format!("bai-known-loop-{}", std::process::id()));
        let made = std::fs::File::create(&file).and_then(|it| it.set_len(bytes));
        made.expect("a file");
        Self::of(file, "off")
    }

    /// In a directory on a disk, which does at once what the device is to do.
    fn on_disk(directory: &Path, bytes: usize) -> Option<Self> {
        let file = directory.join(format!("bai-known-loop-{}", std::process::id()));
        let made = std::fs::File::create(&file).and_then(|mut it| {
            std::io::Write::write_all(&mut it, &vec![1; bytes])?;
            it.sync_all()
        });
        made.expect("a file");
        let device = Self::of(file, "on")?;
        let name = device.device.trim_start_matches("/dev/");
        let past = std::fs::read_to_string(format!("/sys/block/{name}/loop/dio"));
        if !past.as_ref().is_ok_and(|it| it.trim() == "1") {
            harness::skip::here("the file of a loop device is cached", false);
            return None;
        }
        Some(device)
    }

    fn of(file: PathBuf, past_the_cache: &str) -> Option<Self> {
        let found = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(format!("--direct-io={past_the_cache}"))
            .arg(&file)
            .output();
        let device = found.as_ref().ok().filter(|it| it.status.success());
        let device = device.map(|it| String::from_utf8_lossy(&it.stdout).trim().to_owned());
        if device.is_none() {
            let _ = std::fs::remove_file(&file);
            harness::skip::here(format!("no loop device: {found:?}"), false);
        }
        device.map(|device| Self { device, file })
    }

    /// A number of the device's own statistics.
    fn counted(&self, place: usize) -> u64 {
        let name = self.device.trim_start_matches("/dev/");
        let text = std::fs::read_to_string(format!("/sys/block/{name}/stat")).expect("its numbers");
        let word = text.split_whitespace().nth(place);
        word.and_then(|it| it.parse().ok()).expect("a number")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
        let _ = std::fs::remove_file(&self.file);
    }
}

/// The original counted freed blocks as written ones.
#[test]
fn discarded_blocks_are_not_written_ones() {
    const SECTORS_WRITTEN: usize = 6;
    const SECTORS_DISCARDED: usize = 13;
    let Some(device) = Loop::new(64 << 20) else {
        return;
    };
    let Some(mut it) = watched("discard", 35) else {
        return;
    };
    it.sample(|sample| sample.io.get().is_some());
    let mut run = |script: String| {
        it.group.run(&script).expect("a tool");
        it.group.finish().expect("its end");
    };
    let name = &device.device;
    let (before, after) = (8_u64 << 20, 4_u64 << 20);
    let device_counts = [SECTORS_DISCARDED, SECTORS_WRITTEN].map(|it| device.counted(it));
    let write = |bytes| {
        format!("exec dd if=/dev/zero of={name} bs={bytes} count=1 oflag=direct status=none")
    };
    run(write(before));
    run(format!("exec blkdiscard --offset 16M --length 32M {name}"));
    run(write(after));
    // The device has done all of it.
    let [discarded, written] = device_counts;
    assert_eq!(
        device.counted(SECTORS_DISCARDED) - discarded,
        (32 << 20) / 512
    );
    assert_eq!(
        device.counted(SECTORS_WRITTEN) - written,
        (before + after) / 512
    );
    let id = it.row.container_id;
    let written = |sample: &ContainerSample| sample.io.counters.write_bytes;
    let sample = it
        .control
        .sample(id, |sample| written(sample) >= Some(before + after));
    let sample = sample.expect("what was written");
    assert_eq!(written(&sample), Some(before + after), "{:?}", sample.io);
}

/// A volume made of the first 32 MiB of a device, as LVM makes them.
struct Volume {
    name: String,
    device: String,
}

impl Volume {
    fn new(name: &str, below: &str) -> Option<Self> {
        let name = format!("bai-known-{name}-{}", std::process::id());
        let made = dmsetup(&[
            "create",
            &name,
            "--table",
            &format!("0 65536 linear {below} 0"),
        ]);
        let number = made.and_then(|_| {
            let fields = ["info", "-c", "--noheadings", "-o", "minor"];
            dmsetup(&[&fields[..], &[&name]].concat())
        });
        match number {
            Ok(number) => Some(Self {
                device: format!("/dev/dm-{}", number.trim()),
                name,
            }),
            Err(err) => {
                harness::skip::here(format!("no volume: {err}"), false);
                None
            }
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = dmsetup(&["remove", "--retry", &self.name]);
    }
}

fn dmsetup(arguments: &[&str]) -> std::io::Result<String> {
    let output = Command::new("dmsetup")
        .args(["--noudevsync", "--noudevrules"])
        .args(arguments)
        .output()?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(std::io::Error::other(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )),
    }
}

/// In version 2 the kernel counts at each device on the way.
#[test]
fn what_passes_volumes_counts_once() {
    let Some(disk) = Loop::new(64 << 20) else {
        return;
    };
    let Some(lower) = Volume::new("lower", &disk.device) else {
        return;
    };
    let Some(upper) = Volume::new("upper", &lower.device) else {
        return;
    };
    let Some(mut it) = watched("volume", 36) else {
        return;
    };
    it.sample(|sample| sample.io.get().is_some());
    let mut run = |script: String| {
        it.group.run(&script).expect("dd");
        it.group.finish().expect("dd");
    };
    let (top, below) = (&upper.device, &disk.device);
    run(format!(
        "exec dd if=/dev/zero of={top} bs=1M count=8 oflag=direct status=none"
    ));
    run(format!(
        "exec dd if={top} of=/dev/null bs=1M count=4 iflag=direct status=none"
    ));
    // Beside the volumes.
    run(format!(
        "exec dd if=/dev/zero of={below} bs=1M count=2 seek=48 oflag=direct status=none"
    ));
    let id = it.row.container_id;
    let written = 10_u64 << 20;
    let sample = it
        .control
        .sample(id, |sample| sample.io.counters.write_bytes >= Some(written));
    let sample = sample.expect("what was written");
    let told = charged(&it.group);
    assert_eq!(
        sample.io.counters.write_bytes,
        Some(written),
        "{:?}\n{told}",
        sample.io
    );
    assert!(
        near(sample.io.counters.read_bytes, 4 << 20, 64 << 10),
        "{:?}\n{told}",
        sample.io
    );
    let unified = it.group.directory_with("io.stat").is_some();
    let source = if unified { Source::File } else { Source::Bpf };
    assert_eq!(sample.io.source, source);
}

/// From Linux 5.14 on the kernel counts at the device and at the disk that holds its file.
#[test]
fn what_is_done_on_a_loop_device_counts_once() {
    let Some(directory) = on_a_disk() else {
        return;
    };
    let Some(device) = Loop::on_disk(&directory, 16 << 20) else {
        return;
    };
    let Some(mut it) = watched("loop", 37) else {
        return;
    };
    it.sample(|sample| sample.io.get().is_some());
    let file = directory.join(format!("bai-beside-the-loop-{}", std::process::id()));
    let (name, beside) = (&device.device, file.display());
    let mut run = |script: String| {
        it.group.run(&script).expect("dd");
        let ended = it.group.finish();
        if ended.is_err() {
            let _ = std::fs::remove_file(&file);
        }
        ended.expect("dd");
    };
    run(format!(
        "exec dd if=/dev/zero of={beside} bs=1M count=2 oflag=direct status=none"
    ));
    let id = it.row.container_id;
    let wrote =
        |bytes: u64| move |sample: &ContainerSample| sample.io.counters.write_bytes >= Some(bytes);
    let before = it.control.sample(id, wrote(2 << 20));
    let _ = std::fs::remove_file(&file);
    let before = before.expect("what was written on the disk");
    assert_eq!(before.io.source, Source::Bpf, "it has used no loop device");
    let mut run = |script: String| {
        it.group.run(&script).expect("dd");
        it.group.finish().expect("dd");
    };
    run(format!(
        "exec dd if=/dev/zero of={name} bs=1M count=8 oflag=direct status=none"
    ));
    run(format!(
        "exec dd if={name} of=/dev/null bs=1M count=4 iflag=direct status=none"
    ));
    let sample = it
        .sample(|sample| wrote(8 << 20)(sample) && sample.io.counters.read_bytes >= Some(4 << 20));
    let told = charged(&it.group);
    let counters = sample.io.counters;
    // Before, the disk has counted what was done on it alone.
    assert!(
        (Some(8 << 20)..=Some(11 << 20)).contains(&counters.write_bytes)
            && near(counters.read_bytes, 4 << 20, 1 << 20),
        "{counters:?}\n{told}"
    );
    let unified = it.group.directory_with("io.stat").is_some();
    let source = if unified { Source::File } else { Source::Bpf };
    assert_eq!(sample.io.source, source);
}
