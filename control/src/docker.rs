//! The Docker engine: the only file that knows the client library.
