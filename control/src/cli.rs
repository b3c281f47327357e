//! The command line of bai-agent.
