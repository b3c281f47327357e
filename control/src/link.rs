//! Control's end of the two shared-memory regions.
