//! From options to a checked configuration.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::document::{self, Table};
use crate::host::{Host, ThisHost};
use crate::overlay::Overlay;
use crate::problem::{Effective, Errors, Note, NoteKind, Origin};
use crate::search::candidates;
use crate::section::{Gathered, Reader};
use crate::sections::Config;
use crate::{check, read};

/// Environment variables by name.
pub type Environment = Box<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// Where to load from.
pub struct LoadOptions {
    /// The file named on the command line; it must exist.
    pub explicit: Option<PathBuf>,
    /// Whether to run without etcd, bus and manager. No places are searched then: only a named
    /// file (here or in `BACKEND_CONFIG_FILE`) is read.
    pub standalone: bool,
    /// Whether it is for who only looks at a node that others may run: its run directory need not be writable.
    pub only_looks: bool,
    /// Environment variables by name.
    pub environment: Environment,
    /// Facts about the host.
    pub host: Box<dyn Host>,
}

impl LoadOptions {
    /// This process's environment and host.
    pub fn of_this_process(explicit: Option<PathBuf>, standalone: bool) -> Self {
        Self {
            explicit,
            standalone,
            only_looks: false,
            environment: Box::new(|name| std::env::var(name).ok()),
            host: Box::new(ThisHost),
        }
    }
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self::of_this_process(None, false)
    }
}

impl fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadOptions")
            .field("explicit", &self.explicit)
            .field("standalone", &self.standalone)
            .field("only_looks", &self.only_looks)
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

/// A valid configuration and how it came about.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The configuration.
    pub config: Arc<Config>,
    /// Each effective value with its origin, in the order of the sections.
    pub origins: Vec<Effective>,
    /// What was not used, not known, or is worth a warning.
    pub notes: Vec<Note>,
}

impl Loaded {
    /// Whether a setting is written somewhere, be it the file, the environment or etcd.
    #[must_use]
    pub fn is_written(&self, section: &str, key: &str) -> bool {
        let mut values = self.origins.iter();
        let value = values.find(|value| value.section == section && value.key == key);
        value.is_some_and(|value| {
            matches!(
                value.origin,
                Origin::File { .. } | Origin::Environment(_) | Origin::Etcd { .. }
            )
        })
    }
}

/// Finds, reads and checks the configuration. Reads files only: nothing is created.
///
/// # Errors
/// No file, an unreadable file, all faults of the configuration together, or a name that does not
/// resolve now.
pub fn load(options: &LoadOptions) -> Result<Loaded, Errors> {
    load_over(options, &Overlay::default())
}

/// The same for who opens no listener at `container.bind-host`: names need not resolve.
///
/// # Errors
/// As [`load`], without names.
pub fn load_but_for_names(options: &LoadOptions) -> Result<Loaded, Errors> {
    match load(options) {
        Err(Errors::Unresolved { loaded, .. }) => Ok(*loaded),
        other => other,
    }
}

/// The same with what the cluster's etcd sets. Sections of `config/agent` that can not be read are
/// left out as a whole, and said so in the notes, as in the original.
///
/// # Errors
/// As [`load`], and other values of etcd that can not be read.
pub fn load_over(options: &LoadOptions, overlay: &Overlay) -> Result<Loaded, Errors> {
    let file = find(options)?;
    let text = match &file {
        None => String::new(),
        Some(path) => std::fs::read_to_string(path).map_err(|source| Errors::Unreadable {
            path: path.clone(),
            source,
        })?,
    };
    let load = |overlay: &Overlay| {
        load_text(
            &text,
            file.as_deref(),
            (options.standalone, options.only_looks),
            &*options.environment,
            &*options.host,
            overlay,
        )
    };
    let problems = match load(overlay) {
        Err(Errors::Invalid { problems, .. }) => problems,
        other => return other,
    };
    let mut loaded = load(&overlay.without_agent_sections())?;
    for problem in problems {
        let value = problem.value.unwrap_or_default();
        loaded.notes.push(Note {
            kind: NoteKind::Warning,
            line: None,
            key: problem.key,
            text: format!(
                "= {value} in etcd is wrong, so nothing of config/agent is applied: {}; {}",
                problem.why, problem.remedy
            ),
        });
    }
    Ok(loaded)
}

fn find(options: &LoadOptions) -> Result<Option<PathBuf>, Errors> {
    let working = options.host.working_directory();
    if let Some(explicit) = &options.explicit {
        return Ok(Some(working.join(explicit)));
    }
    let named = (options.environment)("BACKEND_CONFIG_FILE").is_some_and(|path| !path.is_empty());
    if options.standalone && !named {
        return Ok(None);
    }
    let searched = candidates(&*options.environment, &*options.host);
    match searched.iter().find(|path| path.is_file()) {
        Some(path) => Ok(Some(path.clone())),
        None => Err(Errors::NotFound { searched }),
    }
}

pub(crate) fn load_text(
    text: &str,
    file: Option<&Path>,
    (standalone, only_looks): (bool, bool),
    environment: &dyn Fn(&str) -> Option<String>,
    host: &dyn Host,
    overlay: &Overlay,
) -> Result<Loaded, Errors> {
    let invalid = |problems, unknown| Errors::Invalid {
        file: file.map(Path::to_owned),
        problems,
        unknown,
    };
    let root: Table = document::parse(text).map_err(|problems| invalid(problems, Vec::new()))?;
    let mut reader = Reader {
        environment,
        host,
        standalone,
        only_looks,
        overlay,
        gathered: Gathered::default(),
    };
    let config = read::config(&mut reader, &root, file);
    for unread in overlay.unread() {
        let key = format!("{} ({}) of etcd", unread.key, unread.scope);
        reader.note(NoteKind::Unknown, None, key, &unread.why);
    }
    check::all(&mut reader, &config);
    let Gathered {
        mut problems,
        unresolved,
        mut notes,
        mut values,
        order,
    } = reader.gathered;
    if !problems.is_empty() {
        problems.extend(unresolved);
        notes.retain(|note| note.kind == NoteKind::Unknown);
        return Err(invalid(problems, notes));
    }
    // Values that depend on others are recorded late, and shown in their place.
    let section = |name: &str| {
        let first = name.split('.').next().unwrap_or(name);
        read::SECTIONS
            .iter()
            .position(|known| *known == first)
            .unwrap_or(usize::MAX)
    };
    let place = |value: &Effective| {
        let found = order
            .iter()
            .position(|(s, k)| *s == value.section && *k == value.key);
        (section(&value.section), value.section.clone(), found)
    };
    values.sort_by_cached_key(place);
    let loaded = Loaded {
        config: Arc::new(config),
        origins: values,
        notes,
    };
    if unresolved.is_empty() {
        return Ok(loaded);
    }
    Err(Errors::Unresolved {
        file: file.map(Path::to_owned),
        problems: unresolved,
        loaded: Box::new(loaded),
    })
}

/// Loads a text against a host that touches nothing; for fuzzing.
pub(crate) fn load_text_for_fuzzing(text: &str) -> Result<Loaded, Errors> {
    #[derive(Debug)]
    struct Still;

    impl Host for Still {
        fn process_user(&self) -> crate::host::UserEntry {
            crate::host::UserEntry {
                uid: 1000,
                gid: 1000,
            }
        }
        fn user(&self, _: &str) -> Option<crate::host::UserEntry> {
            None
        }
        fn hostname(&self) -> String {
            "still".to_owned()
        }
        fn architecture(&self) -> &str {
            "x86_64"
        }
        fn working_directory(&self) -> PathBuf {
            PathBuf::from("/nonexistent")
        }
        fn home(&self) -> Option<PathBuf> {
            None
        }
        fn is_writable_tmpfs(&self, _: &Path) -> bool {
            true
        }
        fn resolve(&self, _: &str) -> Vec<std::net::IpAddr> {
            Vec::new()
        }
        fn core_pattern(&self) -> String {
            "core".to_owned()
        }
    }

    let overlay = Overlay::default();
    let cluster = load_text(text, None, (false, false), &|_| None, &Still, &overlay);
    cluster.or_else(|_| load_text(text, None, (true, false), &|_| None, &Still, &overlay))
}
