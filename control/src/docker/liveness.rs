//! Whether a container lives: the one place that reads the engine's words for it.

use super::{ContainerInspectResponse, ContainerSummary};

/// A container's state, as far as it matters to kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// Created and never started.
    Created,
    /// Running, restarting or paused.
    Active,
    /// Exited, dead, being removed, or in a state without a name.
    Dead,
}

impl Liveness {
    /// Of a container that was inspected.
    pub fn of(found: &ContainerInspectResponse) -> Liveness {
        let state = found.state.as_ref().and_then(|state| state.status);
        Liveness::of_word(state.map(|state| state.to_string()))
    }

    /// Of one in a list.
    pub fn of_listed(listed: &ContainerSummary) -> Liveness {
        Liveness::of_word(listed.state.map(|state| state.to_string()))
    }

    /// The client's models have a type for each of the two.
    fn of_word(state: Option<String>) -> Liveness {
        match state.as_deref() {
            Some("created") => Liveness::Created,
            Some("running" | "restarting" | "paused") => Liveness::Active,
            _ => Liveness::Dead,
        }
    }
}
