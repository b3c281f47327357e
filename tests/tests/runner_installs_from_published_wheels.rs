//! The real published packages: installed, looked up, verified, made anew, pruned.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use control::kernel::request::MountPermission;
use control::runner::{
    InstallError, InstallOptions, LookupError, RunnerDirError, RunnerFiles, WheelError,
    WheelSource, install, list, pinned_version, prune, verify,
};
use harness::runner_packages;

const ARCH: &str = std::env::consts::ARCH;

fn from_wheels(directory: &Path) -> InstallOptions {
    let wheels = runner_packages::wheels().expect("the pinned wheels");
    InstallOptions {
        source: WheelSource::Directory(wheels),
        ..InstallOptions::new(directory)
    }
}

#[test]
fn the_installed_runner_has_every_file_a_kernel_mounts() {
    let directory = runner_packages::installed().unwrap();
    let runner = RunnerFiles::open(&directory, ARCH).unwrap();
    let mounts = runner.mounts("ubuntu22.04", true).unwrap();
    assert_eq!(mounts.len(), 19);
    assert!(
        mounts
            .iter()
            .all(|mount| mount.permission == MountPermission::ReadOnly)
    );
    let source = |target: &str| {
        let mount = mounts.iter().find(|mount| mount.target == target);
        PathBuf::from(
            &mount
                .unwrap_or_else(|| panic!("{target} is not mounted"))
                .source,
        )
    };
    for target in [
        "/opt/kernel/entrypoint.sh",
        "/opt/kernel/su-exec",
        "/opt/kernel/jail",
    ] {
        let mode = fs::metadata(source(target)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755, "{target}");
    }
    let environment = source("/opt/backend.ai");
    assert_eq!(
        fs::read_link(environment.join("bin/python")).unwrap(),
        Path::new("python3.13")
    );
    assert_eq!(
        fs::read_to_string(environment.join("VERSION"))
            .unwrap()
            .trim(),
        "14"
    );
    let package = "/opt/backend.ai/lib/python3.13/site-packages/ai/backend/kernel";
    assert!(source(package).join("__main__.py").is_file());
    // The mount points exist in the read-only environment.
    for name in ["kernel", "helpers"] {
        let inner = format!("lib/python3.13/site-packages/ai/backend/{name}");
        assert!(environment.join(inner).is_dir(), "{name}");
    }
    let seccomp = fs::read(runner.seccomp_profile()).unwrap();
    assert!(serde_json::from_slice::<serde_json::Value>(&seccomp).unwrap()["syscalls"].is_array());
    // Debian images must carry another label; musl images another environment.
    for distro in ["debian12", "alpine3.18"] {
        let told = runner.mounts(distro, false).unwrap_err();
        assert!(matches!(told, LookupError::Distro { .. }), "{told:?}");
        assert!(
            told.to_string().contains("ai.backend.base-distro"),
            "{told}"
        );
    }
    let newer = runner.mounts("ubuntu24.04", false).unwrap();
    assert!(
        newer
            .iter()
            .any(|mount| mount.source.ends_with("libbaihook.ubuntu22.04.x86_64.so"))
    );
}

#[test]
fn the_environment_runs_its_own_python() {
    let directory = runner_packages::installed().unwrap();
    let runner = RunnerFiles::open(&directory, ARCH).unwrap();
    let python = runner.root().join("krunner/static-gnu/bin/python");
    let run = std::process::Command::new(python)
        .args([
            "-s",
            "-B",
            "-c",
            "import zmq, msgpack, jupyter_client; print(zmq.zmq_version())",
        ])
        .output()
        .unwrap();
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
}

#[test]
fn a_second_install_finds_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let options = from_wheels(directory.path());
    let first = install(&options, |_| ()).unwrap();
    assert!(first.fresh);
    assert_eq!(first.version, pinned_version(ARCH));
    let second = install(&options, |_| ()).unwrap();
    assert!(!second.fresh);
    assert_eq!(second.path, first.path);
    let found = list(directory.path()).unwrap();
    assert_eq!(found.len(), 1);
    assert!(
        found[0].files > 5000 && found[0].bytes > 100 << 20,
        "{found:?}"
    );
    let report = verify(directory.path(), &first.version).unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert!(report.checked > 6000);
}

/// Defect 9 of the original: a half-filled runner volume was accepted for ever.
#[test]
fn defect_9_a_half_made_install_is_not_used_and_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let version = directory.path().join(pinned_version(ARCH));
    // As if a copy had been cut short: files, but no marker.
    fs::create_dir_all(version.join("runner")).unwrap();
    fs::write(version.join("runner/entrypoint.sh"), "#!/bin/sh\n").unwrap();
    fs::create_dir(
        directory
            .path()
            .join(format!(".staging-{}", pinned_version(ARCH))),
    )
    .unwrap();
    assert!(matches!(
        RunnerFiles::open(directory.path(), ARCH),
        Err(LookupError::Directory(RunnerDirError::Incomplete { .. }))
    ));
    assert!(list(directory.path()).unwrap().is_empty());
    assert!(
        install(&from_wheels(directory.path()), |_| ())
            .unwrap()
            .fresh
    );
    assert!(
        verify(directory.path(), &pinned_version(ARCH))
            .unwrap()
            .problems
            .is_empty()
    );
    let hidden = fs::read_dir(directory.path()).unwrap().flatten();
    let hidden: Vec<_> = hidden
        .map(|entry| entry.file_name())
        .filter(|name| name != ".lock")
        .collect();
    assert_eq!(hidden, [pinned_version(ARCH).as_str()]);
}

#[test]
fn damage_is_found_and_repaired_by_force_only() {
    let directory = tempfile::tempdir().unwrap();
    let mut options = from_wheels(directory.path());
    let installed = install(&options, |_| ()).unwrap();
    let entrypoint = installed.path.join("runner/entrypoint.sh");
    fs::write(&entrypoint, "#!/bin/sh\nexit 1\n").unwrap();
    fs::set_permissions(
        installed.path.join("runner/words.json"),
        fs::Permissions::from_mode(0o600),
    )
    .unwrap();
    fs::remove_file(installed.path.join("krunner/static-gnu/bin/python")).unwrap();
    let report = verify(directory.path(), &installed.version).unwrap();
    assert_eq!(report.problems.len(), 3, "{:?}", report.problems);
    assert!(!install(&options, |_| ()).unwrap().fresh);
    options.force = true;
    assert!(install(&options, |_| ()).unwrap().fresh);
    assert!(
        verify(directory.path(), &installed.version)
            .unwrap()
            .problems
            .is_empty()
    );
}

#[test]
fn versions_in_use_survive_pruning() {
    let directory = tempfile::tempdir().unwrap();
    let installed = install(&from_wheels(directory.path()), |_| ()).unwrap();
    let old = directory.path().join("0.0.1-x");
    fs::create_dir(&old).unwrap();
    fs::copy(
        installed.path.join("manifest.json"),
        old.join("manifest.json"),
    )
    .unwrap();
    let stranger = directory.path().join("notes");
    fs::create_dir(&stranger).unwrap();
    assert!(
        prune(directory.path(), &[&installed.version], |path| path == old)
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        prune(directory.path(), &[&installed.version], |_| false).unwrap(),
        ["0.0.1-x"]
    );
    assert!(!old.exists() && stranger.exists() && installed.path.exists());
}

#[test]
fn a_changed_wheel_is_refused_and_leaves_nothing() {
    let wheels = runner_packages::wheels().unwrap();
    let changed = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&wheels).unwrap().flatten() {
        if entry
            .path()
            .extension()
            .is_some_and(|extension| extension == "whl")
        {
            fs::hard_link(entry.path(), changed.path().join(entry.file_name()))
                .or_else(|_| {
                    fs::copy(entry.path(), changed.path().join(entry.file_name())).map(drop)
                })
                .unwrap();
        }
    }
    let name = fs::read_dir(changed.path())
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    let name = name
        .into_iter()
        .find(|path| path.to_string_lossy().contains("kernel_helper"))
        .unwrap();
    let mut content = fs::read(&name).unwrap();
    // The first member's data follows its 30-byte header, its name and its extra field.
    let length = |at: usize| usize::from(u16::from_le_bytes([content[at], content[at + 1]]));
    let data = 30 + length(26) + length(28);
    content[data] ^= 0xff;
    fs::remove_file(&name).unwrap();
    fs::write(&name, content).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let options = InstallOptions {
        source: WheelSource::Directory(changed.path().to_owned()),
        ..InstallOptions::new(directory.path())
    };
    let err = install(&options, |_| ()).unwrap_err();
    assert!(
        matches!(
            err,
            InstallError::Wheel(
                WheelError::Mismatch { .. } | WheelError::Member { .. } | WheelError::Zip { .. }
            )
        ),
        "{err:?}"
    );
    let left: Vec<_> = fs::read_dir(directory.path())
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    assert_eq!(left, [".lock"]);
}

#[test]
fn a_missing_wheel_and_a_missing_python_are_told_in_words() {
    let directory = tempfile::tempdir().unwrap();
    let empty = tempfile::tempdir().unwrap();
    let mut options = InstallOptions {
        source: WheelSource::Directory(empty.path().to_owned()),
        ..InstallOptions::new(directory.path())
    };
    let told = install(&options, |_| ()).unwrap_err().to_string();
    assert!(
        told.contains("backend.ai-kernel 25.15.8") && told.contains("pip download"),
        "{told}"
    );
    options.source = WheelSource::Pip {
        python: "/nowhere/python3".into(),
        arguments: Vec::new(),
    };
    let told = install(&options, |_| ()).unwrap_err().to_string();
    assert!(
        told.contains("/nowhere/python3") && told.contains("--wheels"),
        "{told}"
    );
    options.source = WheelSource::Pip {
        python: "false".into(),
        arguments: Vec::new(),
    };
    assert!(matches!(
        install(&options, |_| ()),
        Err(InstallError::Pip { .. })
    ));
    assert!(list(directory.path()).unwrap().is_empty());
}
