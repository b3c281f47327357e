//! What holds for ports when their rows do not say otherwise.
//!
//! In: the configuration and the region's row of the node. Out: rules per port, limits of the
//! process. Invariant: a row overrides the region, the region the configuration.

use std::time::Duration;

use shared::desired::{ClientNetwork, NodeRow, PortRow};

use super::networks;
use crate::forward::relay::port::Rules;

/// What holds when neither row nor region says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// Client networks that may use ports at all; none means all.
    pub allowed: Vec<ClientNetwork>,
    /// Sessions of one port; 0 means no limit.
    pub max_sessions: u32,
    /// Sessions of all ports; 0 means no limit but that of descriptors.
    pub total_sessions: u32,
    /// Idle timeout; zero means none.
    pub idle_timeout: Duration,
    /// Connect timeout.
    pub connect_timeout: Duration,
    /// Time for sessions to end when the process stops; zero cuts them.
    pub drain: Duration,
    /// Distance of two passes of the collector.
    pub sample_interval: Duration,
}

fn or_ms(ms: u32, default: Duration) -> Duration {
    if ms == 0 {
        default
    } else {
        Duration::from_millis(u64::from(ms))
    }
}

fn or_count(count: u32, default: u32) -> u32 {
    if count == 0 { default } else { count }
}

impl Defaults {
    /// These, overridden by what the region says of the node.
    pub fn with(&self, node: Option<&NodeRow>) -> Self {
        let Some(node) = node else {
            return self.clone();
        };
        Self {
            allowed: self.allowed.clone(),
            max_sessions: or_count(node.default_max_sessions, self.max_sessions),
            total_sessions: or_count(node.total_max_sessions, self.total_sessions),
            idle_timeout: or_ms(node.idle_timeout_ms, self.idle_timeout),
            connect_timeout: or_ms(node.connect_timeout_ms, self.connect_timeout),
            drain: or_ms(node.drain_ms, self.drain),
            sample_interval: or_ms(node.sample_interval_ms, self.sample_interval),
        }
    }

    pub(super) fn rules(&self, row: &PortRow) -> Rules {
        let idle = or_ms(row.idle_timeout_ms, self.idle_timeout);
        Rules {
            max_sessions: or_count(row.max_sessions, self.max_sessions),
            connect_timeout: or_ms(row.connect_timeout_ms, self.connect_timeout),
            idle_timeout: (!idle.is_zero()).then_some(idle),
            allowed: networks::both(&self.allowed, &row.networks),
            local_only: row.local_only,
            new_per_second: row.new_per_second,
        }
    }
}

/// Descriptors kept for other things than sessions: a quarter, half of which the collector may
/// hold, the rest for listeners, pipes and accidents.
pub fn kept_descriptors(descriptors: u64) -> u64 {
    (descriptors / 4).clamp(32, 65_536)
}

/// Descriptors of programs, maps and links of the kernel path: 46 with one uplink.
const KERNEL_PATH: u64 = 49;

/// Sessions that the limit of descriptors has room for, each with two. What is kept must do for
/// `own`, which are listeners and namespaces of containers, and, where the limit is low, for the kernel path too.
pub(super) fn session_room(descriptors: u64, own: usize, kernel_path: bool) -> u32 {
    let own = u64::try_from(own).unwrap_or(u64::MAX);
    let kernel = if kernel_path { KERNEL_PATH } else { 0 };
    let own = own.saturating_add(32 + kernel);
    let kept = kept_descriptors(descriptors).max(own);
    u32::try_from(descriptors.saturating_sub(kept) / 2)
        .unwrap_or(u32::MAX)
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::desired::{PortKey, Protocol};
    use shared::ids::KernelId;

    #[test]
    fn rows_override_the_region_and_the_region_overrides_the_defaults() {
        let defaults = Defaults {
            allowed: Vec::new(),
            max_sessions: 10,
            total_sessions: 100,
            idle_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(5),
            drain: Duration::from_secs(1),
            sample_interval: Duration::from_secs(5),
        };
        let node = NodeRow {
            default_max_sessions: 20,
            sample_interval_ms: 250,
            ..NodeRow::default()
        };
        let settings = defaults.with(Some(&node));
        assert_eq!(settings.max_sessions, 20);
        assert_eq!(settings.total_sessions, 100);
        assert_eq!(settings.sample_interval, Duration::from_millis(250));
        let mut row = PortRow::new(
            PortKey {
                protocol: Protocol::Tcp,
                host_port: 1,
            },
            KernelId::default(),
            shared::ids::ContainerId::default(),
            "127.0.0.1".parse().unwrap(),
            80,
        );
        assert_eq!(settings.rules(&row).max_sessions, 20);
        assert_eq!(
            settings.rules(&row).idle_timeout,
            Some(Duration::from_secs(60))
        );
        row.max_sessions = 3;
        row.idle_timeout_ms = 1500;
        assert_eq!(settings.rules(&row).max_sessions, 3);
        assert_eq!(
            settings.rules(&row).idle_timeout,
            Some(Duration::from_millis(1500))
        );
    }

    #[test]
    fn sessions_never_take_all_descriptors() {
        for descriptors in [64, 256, 1024, 20_000, 1 << 20] {
            let sessions = u64::from(session_room(descriptors, 0, false));
            assert!(
                sessions * 2 + 16 <= descriptors,
                "{descriptors}: {sessions}"
            );
            assert!(sessions >= 1);
        }
        assert!(session_room(u64::MAX, 1000, true) > 1_000_000);
        assert_eq!(session_room(96, 1, false), 31);
        assert_eq!(session_room(112, 1, true), 15);
        assert_eq!(session_room(1024, 700, true), 121);
        assert_eq!(session_room(64, 100, true), 1);
    }
}
