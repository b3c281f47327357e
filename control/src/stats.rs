//! From the dataplane's samples to the manager's records.
