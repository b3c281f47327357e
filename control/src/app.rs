//! Construction and wiring of the control process.
