//! The `bai-agent` program: arguments in, exit code out.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    control::cli::main()
}
