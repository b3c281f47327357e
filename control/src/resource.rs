//! Slots, devices, allocation maps and the reservation ledger.
