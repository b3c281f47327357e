//! Compiles the kernel programs with clang and hands the objects to the library.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Names clang goes by on the distributions of today, best known first.
const COMPILERS: [&str; 8] = [
    "clang", "clang-19", "clang-18", "clang-17", "clang-16", "clang-15", "clang-14", "clang-20",
];

fn compiler() -> Option<String> {
    println!("cargo:rerun-if-env-changed=BPF_CLANG");
    if let Ok(named) = env::var("BPF_CLANG") {
        return Some(named);
    }
    COMPILERS
        .into_iter()
        .find(|name| {
            Command::new(name)
                .arg("--version")
                .output()
                .is_ok_and(|output| output.status.success())
        })
        .map(str::to_owned)
}

fn compile(source: &Path, object: &Path) -> Result<(), String> {
    let clang = compiler().ok_or(
        "clang is missing; it compiles the dataplane's kernel programs.\n\
         Install it with `deploy/setup build` (Debian: apt-get install clang), \
         or name one in BPF_CLANG.",
    )?;
    let target = match env::var("CARGO_CFG_TARGET_ENDIAN").as_deref() {
        Ok("big") => "bpfeb",
        _ => "bpfel",
    };
    let output = Command::new(&clang)
        .args(["-target", target])
        .args(["-O2", "-g", "-mcpu=v3", "-Wall", "-Wextra", "-Werror"])
        // Paths of the build machine have no place in the object.
        .arg("-ffile-prefix-map=.=ebpf")
        .arg("-c")
        .arg(source)
        .arg("-o")
        .arg(object)
        .output()
        .map_err(|err| format!("{clang} can't be started: {err}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{clang} can't compile {} for the kernel (it needs the bpf target):\n{}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    ))
}

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-changed=build.rs");
    let Some(out) = env::var_os("OUT_DIR") else {
        eprintln!("this build script is run by cargo");
        return ExitCode::FAILURE;
    };
    let out = PathBuf::from(out);
    for name in ["nat", "connect", "cgroup_stats", "task_stats"] {
        let source = PathBuf::from(format!("bpf/{name}.bpf.c"));
        if let Err(words) = compile(&source, &out.join(format!("{name}.bpf.o"))) {
            eprintln!("{words}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
