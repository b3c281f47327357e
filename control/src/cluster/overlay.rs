//! From trees of etcd to the overlay of the configuration.

use config::Overlay;

use super::Settings;
use crate::etcd::{Scope, Tree};

/// What the settings change in the configuration.
pub(super) fn overlay(settings: &Settings) -> Overlay {
    let mut overlay = Overlay::default();
    let scope = |found: Option<&Scope>| found.map_or("", |scope| scope.name());
    if !settings.agent.tree.members.is_empty() {
        overlay.replace_agent_sections();
    }
    for (section, tree) in &settings.agent.tree.members {
        let scope = scope(settings.agent.scopes.get(section));
        if tree.value.is_some() {
            let why =
                "is a value where a section is expected, and is ignored; write the keys below it";
            overlay.leave_out(&format!("config/agent/{section}"), scope, why);
        }
        for (key, member) in &tree.members {
            if let Some(text) = &member.value {
                overlay.set_agent(section, key, text, scope);
            }
            leave_out_below(
                &mut overlay,
                &format!("config/agent/{section}/{key}"),
                member,
                scope,
            );
        }
    }
    for (key, member) in &settings.container.tree.members {
        let scope = scope(settings.container.scopes.get(key));
        if let Some(text) = &member.value {
            overlay.set_container(key, text, scope);
        }
        leave_out_below(
            &mut overlay,
            &format!("config/container/{key}"),
            member,
            scope,
        );
    }
    let subnet = |name: &str| settings.subnet.tree.text(&[name]).map(str::to_owned);
    overlay.set_agent_subnet(subnet("agent"));
    overlay.set_container_subnet(subnet("container"));
    overlay
}

/// A setting has nothing below it: what stands there is told.
fn leave_out_below(overlay: &mut Overlay, key: &str, member: &Tree, scope: &'static str) {
    if !member.members.is_empty() {
        let names: Vec<&str> = member.members.keys().take(8).map(String::as_str).collect();
        let why = format!(
            "has keys below it ({}), which are ignored; it is a value",
            names.join(", ")
        );
        overlay.leave_out(key, scope, why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::Scoped;

    #[test]
    fn values_of_another_form_are_told() {
        let tree = |pairs: &[(&str, &str)]| Scoped {
            tree: Tree::below("/r", pairs.iter().copied()),
            ..Scoped::default()
        };
        let settings = Settings {
            agent: tree(&[
                ("/r/api", "7200"),
                ("/r/api/pull-timeout", "10"),
                ("/r/container-logs/max-length/is", "1m"),
            ]),
            container: tree(&[("/r/kernel-uid/of", "7")]),
            ..Settings::default()
        };
        let told = format!("{:?}", overlay(&settings));
        for words in [
            "\"config/agent/api\"",
            "is a value where a section is expected",
            "\"config/agent/container-logs/max-length\"",
            "has keys below it (is)",
            "\"config/container/kernel-uid\"",
            "has keys below it (of)",
        ] {
            assert!(told.contains(words), "{words} is not in {told}");
        }
    }
}
