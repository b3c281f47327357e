//! Lifecycle events: their types, their journal and where they go.
