//! A host with fixed answers, and loading a text against it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use config::{Errors, Host, LoadOptions, Loaded, Problem, UserEntry, load};

/// Every answer as a field.
#[derive(Debug, Clone)]
pub struct FixedHost {
    pub user: UserEntry,
    pub architecture: &'static str,
    pub working_directory: PathBuf,
    pub home: Option<PathBuf>,
    pub hostname: String,
    pub tmpfs: Vec<&'static str>,
    pub read_only: Vec<&'static str>,
    /// What is there on a tmpfs, writable or not.
    pub there: Vec<&'static str>,
    pub core_pattern: &'static str,
    /// What the host's name leads to.
    pub named: Vec<IpAddr>,
    /// Its own addresses.
    pub own: Vec<IpAddr>,
    /// Targets and the addresses they are reached from.
    pub routes: Vec<(IpAddr, IpAddr)>,
}

impl FixedHost {
    pub fn at(working_directory: &Path) -> Self {
        Self {
            user: UserEntry { uid: 0, gid: 0 },
            architecture: "x86_64",
            working_directory: working_directory.canonicalize().unwrap(),
            home: None,
            hostname: "node-1".to_owned(),
            tmpfs: vec!["/run", "/dev/shm"],
            read_only: Vec::new(),
            there: Vec::new(),
            core_pattern: "/var/crash/core.%p",
            named: vec![IpAddr::from([192, 0, 2, 7])],
            own: vec![IpAddr::from([192, 0, 2, 7])],
            routes: Vec::new(),
        }
    }
}

impl Host for FixedHost {
    fn process_user(&self) -> UserEntry {
        self.user
    }

    fn user(&self, name: &str) -> Option<UserEntry> {
        (name == "work").then_some(UserEntry {
            uid: 1100,
            gid: 1200,
        })
    }

    fn hostname(&self) -> String {
        self.hostname.clone()
    }

    fn architecture(&self) -> &str {
        self.architecture
    }

    fn working_directory(&self) -> PathBuf {
        self.working_directory.clone()
    }

    fn home(&self) -> Option<PathBuf> {
        self.home.clone()
    }

    fn is_writable_tmpfs(&self, path: &Path) -> bool {
        self.tmpfs.iter().any(|place| path.starts_with(place))
    }

    fn is_on_tmpfs(&self, path: &Path) -> bool {
        self.there.iter().any(|place| path == Path::new(place))
    }

    fn is_read_only(&self, path: &Path) -> bool {
        self.read_only.iter().any(|place| path.starts_with(place))
    }

    fn outer_addresses(&self) -> Vec<IpAddr> {
        self.own.clone()
    }

    fn address_towards(&self, target: IpAddr) -> Option<IpAddr> {
        let mut routes = self.routes.iter();
        routes.find(|(to, _)| *to == target).map(|(_, from)| *from)
    }

    fn resolve(&self, name: &str) -> Vec<IpAddr> {
        match name {
            "node-1.example" => vec![IpAddr::from([192, 0, 2, 8])],
            name if name == self.hostname => self.named.clone(),
            _ => Vec::new(),
        }
    }

    fn core_pattern(&self) -> String {
        self.core_pattern.to_owned()
    }
}

/// The smallest valid file without a remark, below the directory `HERE`.
pub const SMALLEST: &str = "[etcd]\nnamespace = 'local'\naddr = { host = '127.0.0.1', port = 2379 }\n\
    [agent]\nmode = 'docker'\n[container]\nscratch-type = 'hostdir'\nscratch-root = 'HERE/scratches'\n\
    kernel-uid = 1000\nkernel-gid = 1000\n[resource]\n";

/// A directory with an `agent.toml`, and how to load it.
pub struct Setup {
    pub directory: tempfile::TempDir,
    pub host: FixedHost,
    pub environment: BTreeMap<&'static str, String>,
    pub standalone: bool,
    pub only_looks: bool,
}

impl Setup {
    pub fn new(text: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let text = text.replace("HERE", &directory.path().display().to_string());
        std::fs::write(directory.path().join("agent.toml"), text).unwrap();
        let host = FixedHost::at(directory.path());
        Self {
            directory,
            host,
            environment: BTreeMap::new(),
            standalone: false,
            only_looks: false,
        }
    }

    pub fn env(mut self, variable: &'static str, value: &str) -> Self {
        self.environment.insert(variable, value.to_owned());
        self
    }

    pub fn load(&self) -> Result<Loaded, Errors> {
        let environment = self.environment.clone();
        load(&LoadOptions {
            explicit: Some("agent.toml".into()),
            standalone: self.standalone,
            only_looks: self.only_looks,
            environment: Box::new(move |name| environment.get(name).cloned()),
            host: Box::new(self.host.clone()),
        })
    }

    pub fn loaded(&self) -> Loaded {
        self.load().unwrap_or_else(|errors| panic!("{errors}"))
    }

    pub fn problems(&self) -> Vec<Problem> {
        match self.load() {
            Err(Errors::Invalid { problems, .. }) => problems,
            other => panic!("not invalid: {other:?}"),
        }
    }
}

/// The smallest file with one more line in a section, which is added when it is not there.
pub fn with_line(section: &str, line: &str) -> String {
    let heading = format!("[{section}]\n");
    // The key given replaces the one of the smallest file.
    let key = line.split(" = ").next().unwrap_or(line).replace('_', "-");
    let kept: Vec<&str> = SMALLEST
        .lines()
        .filter(|kept| kept.split(" = ").next() != Some(key.as_str()))
        .collect();
    let base = kept.join("\n") + "\n";
    if base.contains(&heading) {
        base.replace(&heading, &format!("{heading}{line}\n"))
    } else {
        format!("{base}{heading}{line}\n")
    }
}
