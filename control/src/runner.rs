//! The published in-container runner: installation and lookup.
