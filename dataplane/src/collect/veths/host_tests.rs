//! The links of the kernel program against what the kernel tells, on this host: pairs of our own, quiet
//! while they are read.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebpf::link_records::{link_layout, link_target};
use rustix::thread::{CpuSet, sched_setaffinity};
use shared::desired::ContainerRow;
use shared::ids::{ContainerId, Generation};
use shared::observed::{ContainerSample, NetCounters, Source};

use super::Layout;
use crate::collect::disk::Disk;
use crate::collect::{ReadMethod, Sampler};
use crate::sys::netlink::{LinkCounters, LinkLookup, LinkStatistics};

fn ip(words: &str) -> bool {
    let done = Command::new("ip")
        .args(words.split_whitespace())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    done.is_ok_and(|it| it.success())
}

/// A link with one end here and the other in a namespace of its own.
pub(crate) struct Pair {
    name: String,
    number: u8,
    pub(crate) index: u32,
}

impl Pair {
    /// None when this host does not let us.
    pub(crate) fn new(test: &str, number: u8) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            crate::skip::needs("making network namespaces needs root");
            return None;
        }
        let mut pair = Self {
            name: format!("{test}{number}-{}", std::process::id()),
            number,
            index: 0,
        };
        assert!(ip(&format!("netns add {}", pair.name)));
        pair.link("");
        Some(pair)
    }

    /// Makes the link, of this index if there is one.
    fn link(&mut self, index: &str) {
        let (name, number) = (&self.name, self.number);
        assert!(ip(&format!(
            "link add {name} {index} type veth peer name eth0 netns {name}"
        )));
        // No word of neighbours.
        let quiet = "/proc/sys/net/ipv6/conf";
        let _ = std::fs::write(format!("{quiet}/{name}/disable_ipv6"), "1");
        let inside = format!("netns exec {name} sh -c");
        let _ = Command::new("ip")
            .args(inside.split(' '))
            .arg(format!("echo 1 > {quiet}/eth0/disable_ipv6"))
            .stderr(Stdio::null())
            .status();
        for words in [
            format!("addr add 10.213.{number}.1/24 dev {name}"),
            format!("-n {name} addr add 10.213.{number}.2/24 dev eth0"),
            format!("link set {name} up"),
            format!("-n {name} link set eth0 up"),
        ] {
            assert!(ip(&words), "{words}");
        }
        self.index = LinkLookup::open().unwrap().index(name).expect("a link");
    }

    fn delete(&self) {
        assert!(ip(&format!("link del {}", self.name)));
    }

    /// Sends datagrams to a port nobody has from each CPU; some are answered so.
    pub(crate) fn send(&self, count: usize) {
        let own = IpAddr::V4(Ipv4Addr::new(10, 213, self.number, 1));
        let other = IpAddr::V4(Ipv4Addr::new(10, 213, self.number, 2));
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        for cpu in 0..cpus {
            std::thread::spawn(move || {
                let mut only = CpuSet::new();
                only.set(cpu);
                let _ = sched_setaffinity(None, &only);
                let socket = UdpSocket::bind((own, 0)).expect("a socket");
                for _ in 0..count {
                    // Refused is what the last one was.
                    let _ = socket.send_to(&[7; 321], (other, 9));
                }
            })
            .join()
            .expect("sent");
        }
    }

    pub(crate) fn row(&self) -> ContainerRow {
        ContainerRow {
            container_id: ContainerId([self.number; 32]),
            link_indexes: vec![self.index],
            generation: Generation(self.index.into()),
            ..ContainerRow::default()
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        ip(&format!("link del {}", self.name));
        ip(&format!("netns del {}", self.name));
    }
}

fn told(index: u32) -> Option<LinkCounters> {
    let mut statistics = LinkStatistics::open().expect("a socket");
    statistics.read().expect("an answer").get(index).copied()
}

/// As the container sees it.
fn inside(told: &LinkCounters) -> NetCounters {
    NetCounters {
        rx_bytes: Some(told.tx_bytes),
        rx_packets: Some(told.tx_packets),
        rx_errors: Some(told.tx_errors),
        rx_drops: Some(told.tx_dropped),
        tx_bytes: Some(told.rx_bytes),
        tx_packets: Some(told.rx_packets),
        tx_errors: Some(told.rx_errors),
        tx_drops: Some(told.rx_dropped),
    }
}

/// Whether a sampler that follows a link reads it by the program. Says so when it does not.
pub(crate) fn reads_links(sampler: &Sampler) -> bool {
    let program = sampler.cgroup_program.as_ref();
    let why = match program.filter(|it| it.reads_links()) {
        None => "this kernel takes no program that reads links",
        Some(program) if program.veths().known != Layout::Known => {
            "this kernel does not tell where links count"
        }
        Some(_) => return true,
    };
    crate::skip::here(why, false);
    false
}

struct Watch {
    sampler: Sampler,
    until: Instant,
}

impl Watch {
    /// None when this kernel is not read so.
    fn over(pairs: &[Pair]) -> Option<Self> {
        let method = ReadMethod::Best { containers: 16 };
        let disk = Disk::start().expect("a thread");
        let mut watch = Self {
            sampler: Sampler::new(Arc::default(), disk, None, 100, method),
            until: Instant::now() + Duration::from_secs(60),
        };
        watch.follow(pairs);
        reads_links(&watch.sampler).then_some(watch)
    }

    fn follow(&mut self, pairs: &[Pair]) {
        let rows: Vec<ContainerRow> = pairs.iter().map(Pair::row).collect();
        self.sampler.follow(&rows, true);
    }

    fn veths(&mut self) -> &mut super::Veths {
        self.sampler
            .cgroup_program
            .as_mut()
            .expect("the program")
            .veths_mut()
    }

    /// What links have counted now: what others had counted before them stays out of it.
    fn samples(&mut self) -> Vec<ContainerSample> {
        for watched in &mut self.sampler.containers {
            watched.forget_net();
        }
        self.sampler.pass().samples.iter().collect()
    }

    /// Passes until all links come from this source and nothing has moved meanwhile; they must be what the
    /// kernel tells then.
    fn agrees(&mut self, pairs: &[Pair], source: Source) {
        let all = || -> Vec<LinkCounters> {
            pairs
                .iter()
                .map(|it| told(it.index).expect("a link"))
                .collect()
        };
        loop {
            let before = all();
            let samples = self.samples();
            let still = before == all();
            if still && samples.iter().all(|it| it.net.source == source) {
                for (sample, told) in samples.iter().zip(&before) {
                    assert_eq!(sample.net.counters, inside(told));
                }
                assert_eq!(samples.len(), pairs.len());
                return;
            }
            assert!(Instant::now() < self.until, "{samples:?} {before:?}");
        }
    }
}

#[test]
fn links_are_read_as_the_kernel_tells_them_also_while_it_does_not() {
    let pairs: Option<Vec<Pair>> = (101..104).map(|it| Pair::new("lr", it)).collect();
    let Some(mut pairs) = pairs else {
        return;
    };
    let Some(mut watch) = Watch::over(&pairs) else {
        return;
    };
    // Links that have counted nothing prove nothing.
    watch.agrees(&pairs, Source::Netlink);
    assert!(!watch.veths().proven);
    for (pair, count) in pairs.iter().zip([3, 40, 700]) {
        pair.send(count);
    }
    watch.agrees(&pairs, Source::Bpf);
    assert!(told(pairs[2].index).unwrap().tx_packets >= 700);
    // As while a question about links is out.
    let reader = watch.sampler.links.take().expect("nothing hangs");
    for pair in &pairs {
        pair.send(11);
        watch.agrees(&pairs, Source::Bpf);
    }
    // Another device of the same index is not taken for the one before.
    let old = told(pairs[0].index).unwrap();
    pairs[0].delete();
    assert_eq!(watch.samples()[0].net.source, Source::Absent);
    let index = format!("index {}", pairs[0].index);
    pairs[0].link(&index);
    assert_eq!(told(pairs[0].index).unwrap().tx_packets, 0);
    let sample = watch.samples().remove(0).net;
    assert_eq!(sample.source, Source::Absent, "{sample:?} {old:?}");
    watch.sampler.take_back(reader);
    watch.agrees(&pairs, Source::Bpf);
    // Nor when no pass was between the two; where it has all of its memory, it is read as itself.
    for count in [1, 9] {
        pairs[0].send(count);
        watch.agrees(&pairs, Source::Bpf);
        let reader = watch.sampler.links.take().expect("nothing hangs");
        pairs[0].delete();
        pairs[0].link(&index);
        let sample = watch.samples().remove(0).net;
        let told = inside(&told(pairs[0].index).unwrap());
        assert!(
            sample.source == Source::Absent || sample.counters == told,
            "{sample:?} {told:?}"
        );
        watch.sampler.take_back(reader);
    }
    watch.agrees(&pairs, Source::Bpf);
    // As of one in the memory of another that counted elsewhere.
    let at = |link: usize, of: &super::Veths| of.links[link].place * link_target::WORDS;
    for counts in link_target::COUNTS..link_target::COUNTS + 4 {
        let veths = watch.veths();
        let words = veths.targets.words();
        let others = words[at(1, veths) + counts].load(super::Relaxed);
        words[at(0, veths) + counts].store(others, super::Relaxed);
        assert_eq!(watch.samples()[0].net.source, Source::Absent, "{counts}");
        watch.agrees(&pairs, Source::Bpf);
    }
    // One that comes and goes is read like the others, each time.
    for _ in 0..5 {
        let pair = Pair::new("lr", 104).expect("as before");
        pair.send(5);
        pairs.push(pair);
        watch.follow(&pairs);
        watch.agrees(&pairs, Source::Bpf);
        let gone = pairs.pop().expect("it");
        gone.delete();
        let samples = watch.samples();
        assert_eq!(samples[3].net.source, Source::Absent, "{samples:?}");
        watch.follow(&pairs);
        watch.agrees(&pairs, Source::Bpf);
    }
    assert_eq!(watch.veths().used, 4, "places are used again");
}

#[test]
fn a_link_that_is_read_otherwise_than_the_kernel_tells_is_asked_about() {
    let pairs: Option<Vec<Pair>> = (111..113).map(|it| Pair::new("lo", it)).collect();
    let Some(pairs) = pairs else {
        return;
    };
    let Some(mut watch) = Watch::over(&pairs) else {
        return;
    };
    for pair in &pairs {
        pair.send(20);
    }
    watch.agrees(&pairs, Source::Bpf);
    // The program counts the first one's packets where there are others.
    let place = watch.veths().links[0].place;
    let finds = place * link_target::WORDS + link_target::FINDS;
    let words = watch.veths().targets.words();
    words[finds].fetch_xor(link_target::SENT_ONLY, super::Relaxed);
    watch.veths().compared = None;
    let sources = |samples: &[ContainerSample]| [samples[0].net.source, samples[1].net.source];
    let one_asked = [Source::Netlink, Source::Bpf];
    assert_eq!(sources(&watch.samples()), one_asked);
    // Once is no verdict.
    watch.veths().targets.words()[finds].fetch_xor(link_target::SENT_ONLY, super::Relaxed);
    watch.agrees(&pairs, Source::Bpf);
    watch.veths().targets.words()[finds].fetch_xor(link_target::SENT_ONLY, super::Relaxed);
    watch.veths().compared = None;
    for _ in 0..2 {
        assert_eq!(sources(&watch.samples()), one_asked);
    }
    // For good, also when it would be right again.
    let words = watch.veths().targets.words();
    words[finds].fetch_xor(link_target::SENT_ONLY, super::Relaxed);
    watch.veths().compared = None;
    watch.samples();
    let before = told(pairs[0].index).unwrap();
    let sample = watch.samples().remove(0).net;
    assert_eq!(
        (sample.source, sample.counters),
        (Source::Netlink, inside(&before))
    );
}

#[test]
fn links_are_read_whichever_of_the_two_ways_an_older_kernel_counts_by() {
    let Some(pair) = Pair::new("lk", 131) else {
        return;
    };
    pair.send(20);
    let pairs = [pair];
    let mut turned = 0;
    for guess in [0, 1] {
        let Some(mut watch) = Watch::over(&pairs) else {
            return;
        };
        // As of one that does not say which.
        let veths = watch.veths();
        veths.kind_known = false;
        let words = veths.layout.words();
        words[link_layout::KIND].store(0, super::Relaxed);
        words[link_layout::SENT_ONLY].store(guess, super::Relaxed);
        watch.agrees(&pairs, Source::Bpf);
        let veths = watch.veths();
        let found = veths.layout.words()[link_layout::SENT_ONLY].load(super::Relaxed);
        turned += found ^ guess;
    }
    assert_eq!(turned, 1, "one of them was right at once");
}
