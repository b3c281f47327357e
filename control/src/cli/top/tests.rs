//! Rendered screens are compared with files; `BAI_BLESS=1` writes them anew for a person to read.

use std::path::PathBuf;
use std::sync::Arc;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use shared::desired::{DesiredSnapshot, PortKey, PortRow, Protocol};
use shared::ids::{ContainerId, KernelId, RegionId};
use shared::observed::{
    AcceleratorCounters, ContainerSample, CpuCounters, ForwardPath, IoCounters, Measured,
    MemoryCounters, NetCounters, NodeCounters, NodeSample, ObservedSnapshot, PidsCounters,
    PortState, PortStatus, Source,
};

use super::screen::Tab;
use super::*;
use crate::cli::region::RegionsSnapshot;
use crate::stats::fixture::card;

const SECOND: u64 = 1_000_000_000;

fn container(byte: u8, second: u64) -> ContainerSample {
    let of = |per_second: u64| Some(per_second * u64::from(byte) * second);
    ContainerSample {
        container_id: ContainerId([byte; 32]),
        kernel_id: KernelId([byte; 16]),
        tick: second,
        taken_monotonic_ns: second * SECOND,
        cpu: Measured::now(
            Source::File,
            CpuCounters {
                // Each is busier than the one before, and its load swings.
                usage_ns: of(250_000_000).map(|ns| ns + (second % 4) * 40_000_000),
                ..CpuCounters::default()
            },
        ),
        memory: Measured::now(
            Source::File,
            MemoryCounters {
                current_bytes: Some(u64::from(byte) << 28),
                limit_bytes: Some(1 << 30),
                ..MemoryCounters::default()
            },
        ),
        pids: Measured::now(
            Source::File,
            PidsCounters {
                current: Some(u64::from(byte) + 3),
                ..PidsCounters::default()
            },
        ),
        io: Measured::now(
            Source::File,
            IoCounters {
                read_bytes: of(4096),
                write_bytes: of(1_048_576),
                ..IoCounters::default()
            },
        ),
        net: Measured::now(
            Source::Netlink,
            NetCounters {
                rx_bytes: of(1500),
                tx_bytes: of(150_000),
                ..NetCounters::default()
            },
        ),
        ..ContainerSample::default()
    }
}

fn port(number: u16, byte: u8, state: PortState, reason: &str, second: u64) -> PortStatus {
    let key = PortKey {
        protocol: Protocol::Tcp,
        host_port: number,
    };
    let mut status = PortStatus::new(key, KernelId([byte; 16]), RegionId([9; 16]), state);
    status.path = ForwardPath::Relay;
    status.reason = reason.to_owned();
    status.sessions_active = 2;
    status.sessions_total = 7;
    status.bytes_in = second * 2048;
    status.bytes_out = second * 20_480;
    status
}

fn look(second: u64) -> RegionsSnapshot {
    let node = NodeSample {
        tick: second,
        taken_monotonic_ns: second * SECOND,
        counters: NodeCounters {
            cpu_total_ns: Some(second * 4 * SECOND),
            cpu_idle_ns: Some(second * 3 * SECOND),
            memory_total_bytes: Some(16 << 30),
            memory_available_bytes: Some(12 << 30),
            disk_total_bytes: Some(100 << 30),
            disk_available_bytes: Some(40 << 30),
            net_rx_bytes: Some(second * second * 1000),
            net_tx_bytes: Some(second * 3000),
            pass_ns: Some(1_400_000),
            ..NodeCounters::default()
        },
        ..NodeSample::default()
    };
    let card = card(
        0,
        AcceleratorCounters {
            memory_total_bytes: Some(80 << 30),
            memory_used_bytes: Some(20 << 30),
            utilisation_permille: Some(425),
            power_mw: Some(310_000),
            temperature_mc: Some(61_000),
            ..AcceleratorCounters::default()
        },
    );
    let service = |number, name: &str| {
        let key = PortKey {
            protocol: Protocol::Tcp,
            host_port: number,
        };
        let address = std::net::Ipv4Addr::LOCALHOST.into();
        let mut row = PortRow::new(key, KernelId([1; 16]), ContainerId([1; 32]), address, 80);
        row.service = name.to_owned();
        row
    };
    RegionsSnapshot {
        observed: Arc::new(ObservedSnapshot {
            containers: Arc::new([1, 2, 3].map(|byte| container(byte, second)).to_vec()),
            ports: vec![
                port(30_000, 1, PortState::Serving, "", second),
                port(30_001, 2, PortState::Refused, "address in use", second),
            ]
            .into(),
            accelerators: vec![card],
            node: Some(node),
            ..ObservedSnapshot::default()
        }),
        desired: Some(Arc::new(DesiredSnapshot {
            ports: vec![service(30_000, "jupyter"), service(30_001, "ttyd")],
            ..DesiredSnapshot::default()
        })),
        heartbeat_age: Some(Duration::from_millis(300)),
        now_ns: second * SECOND + SECOND / 2,
    }
}

fn model() -> Model {
    let mut model = Model::default();
    for second in 1..=20 {
        model.observe(&look(second));
    }
    model
}

fn drawn(screen: &Screen, model: &Model, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| screen.draw(frame, model)).unwrap();
    let buffer = terminal.backend().buffer();
    let mut text = String::new();
    for y in 0..height {
        let line: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn compare(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("src/cli/top/snapshots")
        .join(format!("{name}.txt"));
    if std::env::var_os("BAI_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let wanted = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, wanted, "{} differs:\n{text}", path.display());
}

fn press(screen: &mut Screen, keys: &str) -> Next {
    let mut next = Next::Continue;
    for key in keys.chars() {
        let code = match key {
            '\n' => KeyCode::Enter,
            '\t' => KeyCode::Tab,
            '\u{1b}' => KeyCode::Esc,
            other => KeyCode::Char(other),
        };
        next = screen.press(KeyEvent::new(code, KeyModifiers::NONE));
    }
    next
}

#[test]
fn kernels_are_shown_the_busiest_first() {
    compare("kernels", &drawn(&Screen::new(), &model(), 130, 14));
}

#[test]
fn ports_are_shown_with_the_reason_of_the_selected_one() {
    let mut screen = Screen::new();
    press(&mut screen, "\tj");
    compare("ports", &drawn(&screen, &model(), 130, 12));
}

#[test]
fn devices_are_shown() {
    let mut screen = Screen::new();
    press(&mut screen, "3");
    compare("devices", &drawn(&screen, &model(), 100, 10));
}

#[test]
fn a_filter_and_an_order_by_name() {
    let mut screen = Screen::new();
    // Past the last column back to the first: by name; then backwards.
    press(&mut screen, "sssssssssr/JUP\n");
    compare("filtered", &drawn(&screen, &model(), 130, 12));
    press(&mut screen, "/\u{1b}");
    let text = drawn(&screen, &model(), 130, 14);
    let place = |byte: &str| text.find(&byte.repeat(4)).unwrap();
    assert!(
        place("03") < place("02") && place("02") < place("01"),
        "{text}"
    );
}

#[test]
fn a_dead_dataplane_is_said() {
    let mut model = model();
    model.observe(&RegionsSnapshot {
        heartbeat_age: Some(Duration::from_secs(70)),
        ..look(20)
    });
    let text = drawn(&Screen::new(), &model, 100, 10);
    assert!(text.contains("dataplane NOT RUNNING"), "{text}");
}

#[test]
fn any_size_is_drawn() {
    let model = model();
    for (width, height) in [(1, 1), (3, 2), (20, 5), (400, 100)] {
        let _ = drawn(&Screen::new(), &model, width, height);
    }
    let _ = drawn(&Screen::new(), &Model::default(), 80, 24);
}

#[test]
fn keys_end_it() {
    assert_eq!(press(&mut Screen::new(), "q"), Next::Quit);
    let mut screen = Screen::new();
    assert_eq!(press(&mut screen, "/q"), Next::Continue);
    assert_eq!(screen.filter, "q");
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(screen.press(control_c), Next::Quit);
}

#[test]
fn rates_are_between_samples_of_one_container() {
    let model = model();
    let busiest = model
        .kernels
        .iter()
        .find(|line| line.kernel.starts_with("0303"))
        .unwrap();
    assert_eq!(busiest.rates[0], Some(3.0 * 4096.0));
    assert_eq!(busiest.history.len(), 19);
    assert_eq!(model.node.cpu, Some(25.0));
    let mut fresh = Model::default();
    fresh.observe(&look(1));
    assert_eq!(fresh.kernels[0].cpu, None);
}

#[test]
fn numbers_are_whole_or_not_there_on_narrow_terminals() {
    let model = model();
    let wide: Vec<String> = [Tab::Kernels, Tab::Ports, Tab::Devices]
        .map(|tab| drawn(&on(tab), &model, 300, 14))
        .into();
    for width in (2..=130).step_by(6) {
        for (tab, wide) in [Tab::Kernels, Tab::Ports, Tab::Devices]
            .into_iter()
            .zip(&wide)
        {
            let text = drawn(&on(tab), &model, width, 14);
            if width == 80 {
                compare(&format!("narrow-{}", tab as usize), &text);
            }
            // Below the sparklines and the names of the tables: the numbers with their units.
            for (line, whole) in text.lines().zip(wide.lines()).skip(7).take(3) {
                let numbers = |line: &str| -> Vec<String> {
                    let words: Vec<&str> = line.split_whitespace().collect();
                    let place = |it: &&str| it.contains('.') && it.parse::<f64>().is_ok();
                    let at = words.iter().enumerate().filter(|(_, it)| place(it));
                    let unit = |at: usize| words.get(at + 1).filter(|it| it.ends_with("iB"));
                    at.map(|(at, it)| format!("{it} {}", unit(at).unwrap_or(&"")))
                        .collect()
                };
                let whole = numbers(whole);
                for number in numbers(line) {
                    assert!(whole.contains(&number), "{width}: {number} of\n{text}");
                }
            }
        }
    }
}

fn on(tab: Tab) -> Screen {
    let mut screen = Screen::new();
    screen.tab = tab;
    screen
}

#[test]
fn ports_of_one_number_are_two() {
    let mut model = Model::default();
    for second in 1..=3 {
        let mut look = look(second);
        let observed = Arc::make_mut(&mut look.observed);
        let mut datagrams = observed.ports[0].clone();
        datagrams.key.protocol = Protocol::Udp;
        (datagrams.bytes_in, datagrams.bytes_out) = (second * 10, 0);
        Arc::make_mut(&mut observed.ports).insert(1, datagrams);
        model.observe(&look);
    }
    let rates: Vec<_> = model.ports.iter().map(|line| line.rates).collect();
    assert_eq!(rates[0], [Some(2048.0), Some(20480.0)]);
    assert_eq!(rates[1], [Some(10.0), Some(0.0)]);
    let mut screen = on(Tab::Ports);
    press(&mut screen, "/udp\n");
    let text = drawn(&screen, &model, 130, 12);
    assert!(
        text.contains("30000/udp") && !text.contains("30000/tcp"),
        "{text}"
    );
}
