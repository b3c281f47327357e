//! `config/redis` of etcd as the settings of the bus.

use std::path::Path;
use std::time::Duration;

use config::Secret;
use thiserror::Error;

use crate::etcd::Tree;
use crate::events::bus::{BusServer, BusSettings, BusTls, Endpoint, HostPort, HostPortError, Role};
use crate::files::plain_name;

/// What a request may be given: no less than the original's own default, and not for ever.
const REQUEST_TIMEOUT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Why the settings cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RedisError {
    /// There is neither an address nor a list of sentinels.
    #[error("neither {0}/addr nor {0}/sentinel is set; set one, such as 10.0.0.2:6379")]
    NoAddress(String),
    /// Sentinels need the name of what they watch.
    #[error("{0}/sentinel is set and {0}/service_name is not; set both")]
    NoServiceName(String),
    /// An address is none.
    #[error("{0} is not host:port, such as 10.0.0.2:6379")]
    Address(String, #[source] HostPortError),
    /// A time is no number.
    #[error("config/redis/request_timeout is {0:?}; it is a whole number of milliseconds")]
    Timeout(String),
    /// A switch is neither on nor off.
    #[error("{0} is neither true nor false")]
    Switch(String),
}

/// Reads the settings. With encryption the authorities of `ca_file` are trusted, without one the
/// system's. Keys of the original that only its experimental queue uses are left alone.
///
/// # Errors
/// What is missing or wrong.
pub fn bus_settings(
    redis: &Tree,
    agent_id: &str,
    state_dir: Option<&Path>,
    ca_file: Option<&Path>,
) -> Result<BusSettings, RedisError> {
    let mut settings = BusSettings::new(agent_id, server("config/redis", redis, ca_file)?);
    let overrides = spelt("override_configs", |key| redis.at(&[key]));
    for (name, tree) in overrides.into_iter().flat_map(|tree| &tree.members) {
        let Some(role) = Role::from_name(name) else {
            tracing::warn!(
                role = name,
                "config/redis/override_configs names no known role; it is left out"
            );
            continue;
        };
        let place = format!("config/redis/override_configs/{name}");
        settings
            .overrides
            .insert(role, server(&place, tree, ca_file)?);
    }
    if let Some(text) = spelt("request_timeout", |key| redis.text(&[key])) {
        settings.command_timeout = text
            .trim()
            .parse()
            .map(Duration::from_millis)
            .map_err(|_| RedisError::Timeout(text.to_owned()))?
            .clamp(REQUEST_TIMEOUT.0, REQUEST_TIMEOUT.1);
    }
    settings.outbox_dir = state_dir.map(|dir| dir.join("outbox").join(plain_name(agent_id)));
    Ok(settings)
}

/// What is there under a key of several words, which the original joins by `_` or else by `-`.
fn spelt<T>(key: &str, find: impl Fn(&str) -> Option<T>) -> Option<T> {
    find(key).or_else(|| find(&key.replace('_', "-")))
}

fn server(place: &str, tree: &Tree, ca_file: Option<&Path>) -> Result<BusServer, RedisError> {
    let text = |key: &str| {
        spelt(key, |key| {
            tree.text(&[key]).filter(|text| !text.trim().is_empty())
        })
    };
    let address = |key: &str, text: &str| {
        text.parse::<HostPort>()
            .map_err(|err| RedisError::Address(format!("{place}/{key}"), err))
    };
    let endpoint = match (text("sentinel"), one_address(tree)) {
        (Some(list), _) => Endpoint::Sentinels {
            addresses: list
                .split(',')
                .map(|one| address("sentinel", one))
                .collect::<Result<_, _>>()?,
            service_name: text("service_name")
                .ok_or_else(|| RedisError::NoServiceName(place.to_owned()))?
                .to_owned(),
        },
        (None, Some(one)) => Endpoint::Direct(address("addr", &one)?),
        (None, None) => return Err(RedisError::NoAddress(place.to_owned())),
    };
    let switch = |key: &str| match text(key).map(str::to_ascii_lowercase).as_deref() {
        None | Some("false" | "no" | "off" | "0" | "null" | "none") => Ok(false),
        Some("true" | "yes" | "on" | "1") => Ok(true),
        Some(_) => Err(RedisError::Switch(format!("{place}/{key}"))),
    };
    let tls = switch("use_tls")?;
    let skip_verify = switch("tls_skip_verify")?;
    Ok(BusServer {
        endpoint,
        username: None,
        password: text("password").map(Secret::new),
        tls: tls.then_some(BusTls {
            skip_verify,
            ca_file: ca_file.map(Path::to_owned),
        }),
    })
}

/// The address as `host:port`: of one value or, as the original takes it too, of two below it.
fn one_address(tree: &Tree) -> Option<String> {
    let text = |path: &[&str]| {
        let text = tree.text(path)?.trim();
        (!text.is_empty()).then_some(text)
    };
    if let Some(one) = text(&["addr"]) {
        return Some(one.to_owned());
    }
    match (text(&["addr", "host"]), text(&["addr", "port"])) {
        (None, None) => None,
        (host, port) => {
            let (host, port) = (host.unwrap_or_default(), port.unwrap_or_default());
            let bare = host.contains(':') && !host.starts_with('[');
            Some(match bare {
                true => format!("[{host}]:{port}"),
                false => format!("{host}:{port}"),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<BusSettings, RedisError> {
        let keys: Vec<(String, &str)> = pairs
            .iter()
            .map(|(key, value)| (format!("/r/{key}"), *value))
            .collect();
        let tree = Tree::below("/r", keys.iter().map(|(key, value)| (key.as_str(), *value)));
        bus_settings(
            &tree,
            "i-x",
            Some(Path::new("/state")),
            Some(Path::new("/ca.pem")),
        )
    }

    #[test]
    fn an_address_and_a_password() {
        let settings = read(&[("addr", "10.0.0.2:6379"), ("password", "p w")]).unwrap();
        assert_eq!(settings.server.endpoint.to_string(), "10.0.0.2:6379");
        assert_eq!(settings.server.password.unwrap().reveal(), "p w");
        assert!(settings.server.tls.is_none());
        assert_eq!(settings.outbox_dir.unwrap(), Path::new("/state/outbox/i-x"));
        // An empty password is none, as an operator clears it.
        let settings = read(&[("addr", "h:1"), ("password", "")]).unwrap();
        assert!(settings.server.password.is_none());
    }

    #[test]
    fn an_address_may_be_a_mapping() {
        let settings = read(&[
            ("addr/host", "10.0.0.2"),
            ("addr/port", "6379"),
            ("override_configs/stream/addr/host", "fd00::2"),
            ("override_configs/stream/addr/port", "6380"),
        ])
        .unwrap();
        assert_eq!(settings.server.endpoint.to_string(), "10.0.0.2:6379");
        let stream = settings.server_of(Role::Stream);
        assert_eq!(stream.endpoint.to_string(), "[fd00::2]:6380");
        // The value itself says it all.
        let both = read(&[("addr", "h:1"), ("addr/host", "other"), ("addr/port", "2")]);
        assert_eq!(both.unwrap().server.endpoint.to_string(), "h:1");
    }

    #[test]
    fn sentinels_win_over_the_address() {
        let settings = read(&[
            ("addr", "h:1"),
            ("sentinel", "a:26379, b:26379"),
            ("service_name", "mymaster"),
            ("use_tls", "true"),
            ("tls_skip_verify", "True"),
            ("request_timeout", "2500"),
        ])
        .unwrap();
        assert_eq!(settings.command_timeout, Duration::from_millis(2500));
        assert_eq!(
            settings.server.endpoint.to_string(),
            "mymaster of a:26379,b:26379"
        );
        let tls = settings.server.tls.unwrap();
        assert!(tls.skip_verify);
        assert_eq!(tls.ca_file.unwrap(), Path::new("/ca.pem"));
    }

    #[test]
    fn keys_of_several_words_are_spelt_in_two_ways() {
        let pairs = [
            ("sentinel", "a:1"),
            ("service-name", "m"),
            ("use-tls", "true"),
            ("tls-skip-verify", "true"),
            ("request-timeout", "2500"),
            ("override-configs/stream/addr", "s:2"),
        ];
        let settings = read(&pairs).unwrap();
        assert_eq!(settings.server.endpoint.to_string(), "m of a:1");
        assert!(settings.server.tls.as_ref().unwrap().skip_verify);
        assert_eq!(settings.command_timeout, Duration::from_millis(2500));
        assert_eq!(settings.server_of(Role::Stream).endpoint.to_string(), "s:2");
        // As in the original, the first spelling counts.
        let both = read(&[&pairs[..], &[("request_timeout", "3000")]].concat()).unwrap();
        assert_eq!(both.command_timeout, Duration::from_millis(3000));
    }

    #[test]
    fn a_role_may_have_a_server_of_its_own() {
        let settings = read(&[
            ("addr", "h:1"),
            ("override_configs/stream/addr", "s:2"),
            ("override_configs/stream/password", "x"),
            ("override_configs/nothing/addr", "n:3"),
        ])
        .unwrap();
        assert_eq!(settings.server_of(Role::Stream).endpoint.to_string(), "s:2");
        assert_eq!(
            settings.server_of(Role::Statistics).endpoint.to_string(),
            "h:1"
        );
        assert_eq!(settings.overrides.len(), 1);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases: [(&[(&str, &str)], &str); 8] = [
            (
                &[("addr", "h:1"), ("request_timeout", "1s")],
                "milliseconds",
            ),
            (&[], "config/redis/addr"),
            (&[("addr", "nothing")], "config/redis/addr"),
            (&[("addr/host", "h")], "config/redis/addr"),
            (
                &[("addr/host", "h"), ("addr/port", "x")],
                "config/redis/addr",
            ),
            (&[("sentinel", "a:1")], "service_name"),
            (&[("addr", "h:1"), ("use_tls", "perhaps")], "use_tls"),
            (
                &[("addr", "h:1"), ("override_configs/live/password", "x")],
                "override_configs/live/addr",
            ),
        ];
        for (pairs, word) in cases {
            let text = read(pairs).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
    }
}
