//! From trees of etcd to the overlay of the configuration.

use config::Overlay;

use super::Settings;
use crate::etcd::Scope;

/// What the settings change in the configuration.
pub(super) fn overlay(settings: &Settings) -> Overlay {
    let mut overlay = Overlay::default();
    let scope = |found: Option<&Scope>| found.map_or("", |scope| scope.name());
    if !settings.agent.tree.members.is_empty() {
        overlay.replace_agent_sections();
    }
    for (section, tree) in &settings.agent.tree.members {
        for (key, member) in &tree.members {
            if let Some(text) = &member.value {
                let scope = scope(settings.agent.scopes.get(section));
                overlay.set_agent(section, key, text, scope);
            }
        }
    }
    for (key, member) in &settings.container.tree.members {
        if let Some(text) = &member.value {
            let scope = scope(settings.container.scopes.get(key));
            overlay.set_container(key, text, scope);
        }
    }
    let subnet = |name: &str| settings.subnet.tree.text(&[name]).map(str::to_owned);
    overlay.set_agent_subnet(subnet("agent"));
    overlay.set_container_subnet(subnet("container"));
    overlay
}
