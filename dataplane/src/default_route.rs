//! Default routes, by the texts of procfs.
//!
//! Invariant: a route that is down, or that leads nowhere (it answers "unreachable"), is none.

/// linux/route.h.
const RTF_UP: u32 = 1;
const RTF_REJECT: u32 = 0x200;

/// The interface of the first default route in `/proc/net/route`.
pub fn ipv4(text: &str) -> Option<&str> {
    text.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [name, "00000000", _, flags, _, _, _, "00000000", ..] = words[..] else {
            return None;
        };
        leads(flags).then_some(name)
    })
}

/// The interface of the best default route in `/proc/net/ipv6_route`.
pub fn ipv6(text: &str) -> Option<&str> {
    let all = text.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [to, "00", _, _, _, metric, _, _, flags, name] = words[..] else {
            return None;
        };
        let all_zero = to.bytes().all(|digit| digit == b'0');
        (leads(flags) && all_zero && name != "lo").then_some((hex(metric)?, name))
    });
    all.min_by_key(|(metric, _)| *metric).map(|(_, name)| name)
}

fn leads(flags: &str) -> bool {
    hex(flags).is_some_and(|flags| flags & (RTF_UP | RTF_REJECT) == RTF_UP)
}

fn hex(word: &str) -> Option<u32> {
    u32::from_str_radix(word, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_route_has_an_interface() {
        let net = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
                   br0\t000011AC\t0\t1\t0\t0\t0\t0000FFFF\t0\n\
                   *\t00000000\t0\t0201\t0\t0\t0\t00000000\t0\n";
        assert_eq!(ipv4(net), None);
        let default = "eth9\t00000000\t0100A8C0\t3\t0\t0\t0\t00000000\t0\n";
        assert_eq!(ipv4(&(net.to_owned() + default)), Some("eth9"));
        assert_eq!(ipv4(""), None);
    }

    #[test]
    fn the_default_route_of_ipv6_has_an_interface() {
        let zero = "0".repeat(32);
        let line = |to: &str, length: &str, metric: &str, flags: &str, name: &str| {
            format!("{to} {length} {zero} 00 {zero} {metric} 00000001 00000000 {flags} {name:>8}\n")
        };
        let net = format!("2001{}", &zero[4..]);
        let mut text = line(&net, "40", "00000100", "00000001", "eth0")
            + &line(&zero, "00", "ffffffff", "00200200", "lo")
            // One that answers "unreachable".
            + &line(&zero, "00", "00000010", "00000201", "eth8");
        assert_eq!(ipv6(&text), None);
        text += &line(&zero, "00", "00000400", "00000003", "eth1");
        assert_eq!(ipv6(&text), Some("eth1"));
        text += &line(&zero, "00", "00000064", "00450003", "eth2");
        assert_eq!(ipv6(&text), Some("eth2"));
        assert_eq!(ipv6("not a table\n"), None);
    }
}
