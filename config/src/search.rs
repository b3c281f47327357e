//! Finding the configuration file in the original's places.

use std::path::PathBuf;

use crate::host::Host;

const FILE: &str = "agent.toml";

/// The candidate files in order; the first regular file wins. `BACKEND_CONFIG_FILE` leaves one.
pub fn candidates(environment: &dyn Fn(&str) -> Option<String>, host: &dyn Host) -> Vec<PathBuf> {
    let working = host.working_directory();
    if let Some(only) = environment("BACKEND_CONFIG_FILE").filter(|path| !path.is_empty()) {
        return vec![working.join(only)];
    }
    let mut found = vec![working.join(FILE)];
    let home = host.home();
    if let Some(home) = &home {
        let parents = working
            .ancestors()
            .skip(1)
            .filter(|dir| dir.starts_with(home));
        found.extend(
            parents
                .filter(|dir| dir.join("BUILD_ROOT").exists())
                .map(|dir| dir.join(FILE)),
        );
        found.push(home.join(".config/backend.ai").join(FILE));
    }
    found.push(PathBuf::from("/etc/backend.ai").join(FILE));
    found
}
