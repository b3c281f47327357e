//! The manager's RPC: transport, framing, codec, server and client.
