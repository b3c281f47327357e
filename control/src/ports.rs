//! The pool of host ports.
