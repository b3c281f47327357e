//! How each type of setting is read from a value of the document (or the text of an environment
//! variable) and how it is shown.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde_json::{Value as Json, json};

use crate::choice::{Choice, LogLevel};
use crate::document::{Kind, Value};
use crate::host::Host;
use crate::spelling::nearest;
use crate::units::{
    ByteSize, Fault, HostPort, PortRange, ProxyUrl, Secret, Subnet, interval_from_seconds,
    interval_text, mask_password, only_for_its_owner, parse_interval,
};

/// A type of setting.
pub(crate) trait Setting: Sized {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault>;
    fn text(&self) -> String;
    fn json(&self) -> Json {
        Json::String(self.text())
    }
}

fn wrong_kind(value: &Value, remedy: &str) -> Fault {
    Fault::new(format!("{} does not fit here", value.kind_words()), remedy)
}

fn from_text<T: FromStr<Err = Fault>>(value: &Value, remedy: &str) -> Result<T, Fault> {
    match &value.kind {
        Kind::Text(text) => text.parse(),
        _ => Err(wrong_kind(value, remedy)),
    }
}

impl Setting for bool {
    fn read(value: &Value, _: &dyn Host) -> Result<Self, Fault> {
        const REMEDY: &str = "write true or false";
        match &value.kind {
            Kind::Boolean(flag) => Ok(*flag),
            Kind::Integer(0) => Ok(false),
            Kind::Integer(1) => Ok(true),
            Kind::Text(text) => match text.to_ascii_lowercase().as_str() {
                "true" | "yes" | "on" | "1" | "t" | "y" => Ok(true),
                "false" | "no" | "off" | "0" | "f" | "n" => Ok(false),
                _ => Err(Fault::new("the text is not a boolean", REMEDY)),
            },
            _ => Err(wrong_kind(value, REMEDY)),
        }
    }

    fn text(&self) -> String {
        self.to_string()
    }

    fn json(&self) -> Json {
        json!(self)
    }
}

impl Setting for String {
    fn read(value: &Value, _: &dyn Host) -> Result<Self, Fault> {
        match &value.kind {
            Kind::Text(text) if text.contains('\0') => {
                Err(Fault::new("the text holds a zero byte", "remove it"))
            }
            Kind::Text(text) => Ok(text.clone()),
            _ => Err(wrong_kind(value, "write a text in quotes")),
        }
    }

    fn text(&self) -> String {
        mask_password(self)
    }
}

macro_rules! whole_number {
    ($type:ty) => {
        impl Setting for $type {
            fn read(value: &Value, _: &dyn Host) -> Result<Self, Fault> {
                const REMEDY: &str = "write a whole number, not below zero";
                let out_of_range = || Fault::new("the number is out of range", REMEDY);
                match &value.kind {
                    Kind::Integer(number) => Self::try_from(*number).map_err(|_| out_of_range()),
                    Kind::Text(text) if text.bytes().all(|b| b.is_ascii_digit()) => {
                        text.parse().map_err(|_| out_of_range())
                    }
                    Kind::Text(_) => Err(Fault::new("the text is not a whole number", REMEDY)),
                    _ => Err(wrong_kind(value, REMEDY)),
                }
            }

            fn text(&self) -> String {
                self.to_string()
            }

            fn json(&self) -> Json {
                json!(self)
            }
        }
    };
}
whole_number!(u16);
whole_number!(u32);
whole_number!(u64);

impl Setting for ByteSize {
    fn read(value: &Value, _: &dyn Host) -> Result<Self, Fault> {
        const REMEDY: &str = "write a size such as \"512m\" or a whole number of bytes";
        match &value.kind {
            Kind::Integer(number) => u64::try_from(*number)
                .map(ByteSize)
                .map_err(|_| Fault::new("a size is not below zero", REMEDY)),
            _ => from_text(value, REMEDY),
        }
    }

    fn text(&self) -> String {
        self.to_string()
    }

    fn json(&self) -> Json {
        json!(self.0)
    }
}

/// A size in the `[logging]` section, where `10 MB` is ten million bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogSize(pub ByteSize);

impl Setting for LogSize {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        match &value.kind {
            Kind::Text(text) => ByteSize::parse_decimal(text).map(Self),
            _ => ByteSize::read(value, host).map(Self),
        }
    }

    fn text(&self) -> String {
        self.0.text()
    }

    fn json(&self) -> Json {
        self.0.json()
    }
}

impl Setting for Duration {
    fn read(value: &Value, _: &dyn Host) -> Result<Self, Fault> {
        match &value.kind {
            // Exact up to 2^53 seconds, far beyond the longest interval accepted.
            #[allow(clippy::cast_precision_loss)]
            Kind::Integer(seconds) => interval_from_seconds(*seconds as f64),
            Kind::Float(seconds) => interval_from_seconds(*seconds),
            Kind::Text(text) => parse_interval(text),
            _ => Err(wrong_kind(
                value,
                "write a number of seconds or a text such as \"500ms\"",
            )),
        }
    }

    fn text(&self) -> String {
        interval_text(*self)
    }

    fn json(&self) -> Json {
        json!(self.as_secs_f64())
    }
}

const ADDRESS: &str = "write { host = \"10.0.0.5\", port = 6001 } or \"10.0.0.5:6001\"";

impl Setting for HostPort {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        match &value.kind {
            Kind::Table(table) => {
                let find = |name: &str| {
                    let found = table.entries.iter().find(|entry| entry.key == name);
                    found.map(|entry| &entry.value)
                };
                if let Some(extra) = table
                    .entries
                    .iter()
                    .find(|e| e.key != "host" && e.key != "port")
                {
                    let why = format!("an address has no key {:?}", extra.key);
                    return Err(Fault::new(why, ADDRESS));
                }
                match (find("host"), find("port")) {
                    (Some(name), Some(port)) => address(name, port, host),
                    (None, _) => Err(Fault::new("the host is missing", ADDRESS)),
                    (_, None) => Err(Fault::new("the port is missing", ADDRESS)),
                }
            }
            Kind::Array(items) => match items.as_slice() {
                [name, port] => address(name, port, host),
                _ => Err(Fault::new(
                    "an address as an array is [host, port]",
                    ADDRESS,
                )),
            },
            _ => from_text(value, ADDRESS),
        }
    }

    fn text(&self) -> String {
        self.to_string()
    }

    fn json(&self) -> Json {
        json!({"host": self.host, "port": self.port})
    }
}

fn address(name: &Value, port: &Value, host: &dyn Host) -> Result<HostPort, Fault> {
    Ok(HostPort {
        host: HostPort::parse_host(&String::read(name, host)?)?,
        port: match &port.kind {
            Kind::Integer(number) => HostPort::parse_port(&number.to_string())?,
            Kind::Text(text) => HostPort::parse_port(text)?,
            _ => return Err(wrong_kind(port, ADDRESS)),
        },
    })
}

/// `etcd.addr`: one address, or an array of them.
#[derive(Debug, Clone)]
pub(crate) struct Addresses(pub Vec<HostPort>);

impl Setting for Addresses {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        const REMEDY: &str = "write { host = \"127.0.0.1\", port = 2379 } or a list of such tables";
        match &value.kind {
            Kind::Array(items) if items.is_empty() => {
                Err(Fault::new("the list of addresses is empty", REMEDY))
            }
            Kind::Array(items) => items
                .iter()
                .map(|item| HostPort::read(item, host).map_err(|f| Fault::new(f.why, REMEDY)))
                .collect::<Result<_, _>>()
                .map(Self),
            _ => HostPort::read(value, host)
                .map(|one| Self(vec![one]))
                .map_err(|fault| Fault::new(fault.why, REMEDY)),
        }
    }

    fn text(&self) -> String {
        let all: Vec<String> = self.0.iter().map(HostPort::to_string).collect();
        all.join(", ")
    }

    fn json(&self) -> Json {
        self.0.iter().map(Setting::json).collect()
    }
}

impl Setting for PortRange {
    fn read(value: &Value, _: &dyn Host) -> Result<Self, Fault> {
        const REMEDY: &str = "write [30000, 31000] or \"30000-31000\"";
        let Kind::Array(items) = &value.kind else {
            return from_text(value, REMEDY);
        };
        let end = |item: &Value| match &item.kind {
            Kind::Integer(number) => PortRange::parse_end(&number.to_string()),
            Kind::Text(text) => PortRange::parse_end(text),
            _ => Err(wrong_kind(item, REMEDY)),
        };
        match items.as_slice() {
            [first, last] => PortRange::new(end(first)?, end(last)?),
            _ => Err(Fault::new("a port range has two ends", REMEDY)),
        }
    }

    fn text(&self) -> String {
        self.to_string()
    }

    fn json(&self) -> Json {
        json!([self.first, self.last])
    }
}

impl Setting for Secret {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        String::read(value, host).map(Secret::new)
    }

    fn text(&self) -> String {
        self.to_string()
    }
}

/// A user number: `-1` or empty is the user of this process; names are looked up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UserId(pub u32, pub Chosen);
/// A group number: like a user number; a *user* name stands for that user's group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupId(pub u32, pub Chosen);

/// Who chose an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// Nobody: it is the account that this process runs as.
    ByProcess,
    /// Whoever wrote the configuration.
    ByName,
}

enum Account {
    Process,
    Number(u32),
    Named(crate::host::UserEntry),
}

fn account(value: &Value, host: &dyn Host) -> Result<Account, Fault> {
    const REMEDY: &str = "write a number, a user name, or -1 for the user this agent runs as";
    let number = |number: i64| match u32::try_from(number) {
        // The highest number means "no change" to chown.
        Ok(id) if id != u32::MAX => Ok(Account::Number(id)),
        _ if number == -1 => Ok(Account::Process),
        _ => Err(Fault::new(
            "the number is not a user or group number",
            REMEDY,
        )),
    };
    match &value.kind {
        Kind::Integer(id) => number(*id),
        Kind::Text(text) if text.is_empty() => Ok(Account::Process),
        Kind::Text(text) => match text.parse::<i64>() {
            Ok(id) => number(id),
            Err(_) => host
                .user(text)
                .map(Account::Named)
                .ok_or_else(|| Fault::new("there is no user of this name", REMEDY)),
        },
        _ => Err(wrong_kind(value, REMEDY)),
    }
}

impl Setting for UserId {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        Ok(match account(value, host)? {
            Account::Process => Self(host.process_user().uid, Chosen::ByProcess),
            Account::Number(id) => Self(id, Chosen::ByName),
            Account::Named(user) => Self(user.uid, Chosen::ByName),
        })
    }

    fn text(&self) -> String {
        self.0.to_string()
    }

    fn json(&self) -> Json {
        json!(self.0)
    }
}

impl Setting for GroupId {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        Ok(match account(value, host)? {
            Account::Process => Self(host.process_user().gid, Chosen::ByProcess),
            Account::Number(id) => Self(id, Chosen::ByName),
            Account::Named(user) => Self(user.gid, Chosen::ByName),
        })
    }

    fn text(&self) -> String {
        self.0.to_string()
    }

    fn json(&self) -> Json {
        json!(self.0)
    }
}

/// Expands `~`, makes the path absolute from the working directory and resolves the part of it
/// that exists, with no `..` left behind. Changes nothing on disk.
pub(crate) fn absolute(text: &str, host: &dyn Host) -> Result<PathBuf, Fault> {
    if text.is_empty() {
        return Err(Fault::new(
            "the path is empty",
            "write a path, absolute or from the working directory",
        ));
    }
    let path = match text.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            let home = host.home().ok_or_else(|| {
                Fault::new(
                    "the home directory is not known",
                    "write the path without ~",
                )
            })?;
            home.join(rest.trim_start_matches('/'))
        }
        _ => host.working_directory().join(text),
    };
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean = resolved(&clean);
                clean.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    Ok(resolved(&clean))
}

/// Resolves symbolic links of the longest existing part.
fn resolved(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let Ok(real) = ancestor.canonicalize() {
            return match path.strip_prefix(ancestor) {
                Ok(rest) if rest.as_os_str().is_empty() => real,
                Ok(rest) => real.join(rest),
                Err(_) => path.to_owned(),
            };
        }
    }
    path.to_owned()
}

/// A directory that may not exist yet.
#[derive(Debug, Clone)]
pub(crate) struct Directory(pub PathBuf);

impl Setting for Directory {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        let path = absolute(&String::read(value, host)?, host)?;
        match path.ancestors().find(|ancestor| ancestor.exists()) {
            Some(existing) if !existing.is_dir() => Err(Fault::new(
                format!("{} is not a directory", existing.display()),
                "name a directory; it may not exist yet",
            )),
            _ => Ok(Self(path)),
        }
    }

    fn text(&self) -> String {
        self.0.display().to_string()
    }
}

/// A file that must exist.
#[derive(Debug, Clone)]
pub(crate) struct ExistingFile(pub PathBuf);

impl Setting for ExistingFile {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        let path = absolute(&String::read(value, host)?, host)?;
        match path.metadata() {
            Ok(found) if found.is_file() => Ok(Self(path)),
            Err(err) if err.kind() == std::io::ErrorKind::PermissionDenied => Err(Fault::new(
                "this user may not look at it",
                "run this as root, or name a file this user may read",
            )),
            _ => Err(Fault::new(
                "there is no such file",
                "name an existing file this user may read",
            )),
        }
    }

    fn text(&self) -> String {
        self.0.display().to_string()
    }
}

/// A file with a secret, which only its owner may read. It is not opened here: of the programs that
/// read a configuration one needs what is in it.
#[derive(Debug, Clone)]
pub(crate) struct SecretFile(pub PathBuf);

impl Setting for SecretFile {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        let ExistingFile(path) = ExistingFile::read(value, host)?;
        let facts = path
            .metadata()
            .map_err(|err| Fault::new(format!("cannot be looked at: {err}"), "see to it"))?;
        only_for_its_owner(&facts)?;
        Ok(Self(path))
    }

    fn text(&self) -> String {
        self.0.display().to_string()
    }
}

impl Setting for ProxyUrl {
    fn read(value: &Value, _: &dyn Host) -> Result<Self, Fault> {
        from_text(value, "write \"https://10.0.0.5:6022\"")
    }

    fn text(&self) -> String {
        self.to_string()
    }
}

/// A path of any kind, existing or not.
#[derive(Debug, Clone)]
pub(crate) struct AnyPath(pub PathBuf);

impl Setting for AnyPath {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        absolute(&String::read(value, host)?, host).map(Self)
    }

    fn text(&self) -> String {
        self.0.display().to_string()
    }
}

const LIST: &str = "write a list of texts, such as [\"a\", \"b\"]";

impl Setting for Vec<String> {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        match &value.kind {
            Kind::Array(items) => items
                .iter()
                .map(|item| String::read(item, host).map_err(|_| wrong_kind(item, LIST)))
                .collect(),
            _ => Err(wrong_kind(value, LIST)),
        }
    }

    fn text(&self) -> String {
        self.join(", ")
    }

    fn json(&self) -> Json {
        json!(self)
    }
}

impl Setting for Vec<Subnet> {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        let list = Vec::<String>::read(value, host)?;
        list.iter().map(|text| text.parse()).collect()
    }

    fn text(&self) -> String {
        let all: Vec<String> = self.iter().map(Subnet::to_string).collect();
        all.join(", ")
    }

    fn json(&self) -> Json {
        self.iter()
            .map(|item| Json::String(item.to_string()))
            .collect()
    }
}

impl Setting for BTreeSet<String> {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        Vec::<String>::read(value, host).map(|list| list.into_iter().collect())
    }

    fn text(&self) -> String {
        let all: Vec<&str> = self.iter().map(String::as_str).collect();
        all.join(", ")
    }

    fn json(&self) -> Json {
        json!(self)
    }
}

impl<T: Choice + std::fmt::Display> Setting for Vec<T>
where
    T: ChoiceSetting,
{
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        match &value.kind {
            Kind::Array(items) => items.iter().map(|item| T::read(item, host)).collect(),
            _ => Err(wrong_kind(value, &expected::<T>())),
        }
    }

    fn text(&self) -> String {
        let all: Vec<String> = self.iter().map(T::to_string).collect();
        all.join(", ")
    }

    fn json(&self) -> Json {
        self.iter()
            .map(|item| Json::String(item.to_string()))
            .collect()
    }
}

impl Setting for BTreeMap<String, LogLevel> {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        match &value.kind {
            Kind::Table(table) => table
                .entries
                .iter()
                .map(|entry| Ok((entry.key.clone(), LogLevel::read(&entry.value, host)?)))
                .collect(),
            _ => Err(wrong_kind(
                value,
                "write a table of logger names and levels",
            )),
        }
    }

    fn text(&self) -> String {
        let all: Vec<String> = self
            .iter()
            .map(|(name, level)| format!("{name:?}={level}"))
            .collect();
        all.join(", ")
    }

    fn json(&self) -> Json {
        self.iter()
            .map(|(name, level)| (name.clone(), Json::String(level.to_string())))
            .collect()
    }
}

impl Setting for BTreeMap<String, Vec<Subnet>> {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        let Kind::Table(table) = &value.kind else {
            return Err(wrong_kind(
                value,
                "write a table of names and lists of networks",
            ));
        };
        let entries = table.entries.iter();
        entries
            .map(|entry| Ok((entry.key.clone(), Vec::read(&entry.value, host)?)))
            .collect()
    }

    fn text(&self) -> String {
        let all = self
            .iter()
            .map(|(name, list)| format!("{name}: {}", list.text()));
        all.collect::<Vec<_>>().join("; ")
    }

    fn json(&self) -> Json {
        let all = self.iter().map(|(name, list)| (name.clone(), list.json()));
        Json::Object(all.collect())
    }
}

impl Setting for BTreeMap<String, String> {
    fn read(value: &Value, host: &dyn Host) -> Result<Self, Fault> {
        match &value.kind {
            Kind::Table(table) => table
                .entries
                .iter()
                .map(|entry| Ok((entry.key.clone(), String::read(&entry.value, host)?)))
                .collect(),
            _ => Err(wrong_kind(value, "write a table of names and texts")),
        }
    }

    fn text(&self) -> String {
        let all: Vec<String> = self
            .iter()
            .map(|(name, text)| format!("{name:?}={text:?}"))
            .collect();
        all.join(", ")
    }

    fn json(&self) -> Json {
        json!(self)
    }
}

/// Marks the types whose settings are words, so lists of them can be read.
pub(crate) trait ChoiceSetting: Setting {}

fn expected<T: Choice>() -> String {
    let words: Vec<String> = T::WORDS
        .iter()
        .map(|(word, _)| format!("{word:?}"))
        .collect();
    format!("write one of {}", words.join(", "))
}

fn read_choice<T: Choice>(value: &Value) -> Result<T, Fault> {
    let Kind::Text(text) = &value.kind else {
        return Err(wrong_kind(value, &expected::<T>()));
    };
    let same = |word: &str| {
        if T::ANY_CASE {
            word.eq_ignore_ascii_case(text)
        } else {
            word == text
        }
    };
    if let Some((_, choice)) = T::WORDS.iter().find(|(word, _)| same(word)) {
        return Ok(*choice);
    }
    let words = T::WORDS.iter().map(|(word, _)| *word);
    let why = match nearest(text, words) {
        Some(word) => format!("the word is not known (did you mean {word:?}?)"),
        None => "the word is not known".to_owned(),
    };
    Err(Fault::new(why, expected::<T>()))
}

macro_rules! choice_settings {
    ($($type:ident),*) => {$(
        impl Setting for crate::choice::$type {
            fn read(value: &Value, _: &dyn Host) -> Result<Self, Fault> {
                read_choice(value)
            }

            fn text(&self) -> String {
                self.word().to_owned()
            }
        }

        impl ChoiceSetting for crate::choice::$type {}
    )*};
}
choice_settings!(
    Backend,
    ScalingGroupType,
    StatsType,
    SandboxType,
    ScratchType,
    AffinityPolicy,
    LogLevel,
    LogDriver,
    LogFormat,
    DiscoveryType,
    Forward,
    KernelAttach,
    RelayEngine,
    RelayFrom,
    Publish,
    AllocationMode,
    CudaInjection
);
