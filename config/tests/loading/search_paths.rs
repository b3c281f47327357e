//! Where the file is looked for, and that loading changes nothing.

use std::fs;
use std::path::Path;

use config::{Errors, LoadOptions, Loaded, load};

use crate::host::{FixedHost, SMALLEST, Setup};

fn search(host: &FixedHost, variable: Option<&str>) -> Result<Loaded, Errors> {
    let variable = variable.map(str::to_owned);
    load(&LoadOptions {
        explicit: None,
        standalone: false,
        only_looks: false,
        environment: Box::new(move |name| {
            variable.clone().filter(|_| name == "BACKEND_CONFIG_FILE")
        }),
        host: Box::new(host.clone()),
    })
}

fn put(directory: &Path, id: &str) {
    fs::create_dir_all(directory).unwrap();
    let text = SMALLEST.replace("[agent]\n", &format!("[agent]\nid = '{id}'\n"));
    fs::write(directory.join("agent.toml"), text).unwrap();
}

#[test]
fn the_first_place_that_holds_a_file_wins() {
    let root = tempfile::tempdir().unwrap();
    let home = root.path().canonicalize().unwrap().join("home");
    let working = home.join("a/b/c");
    fs::create_dir_all(&working).unwrap();
    let mut host = FixedHost::at(&working);
    host.home = Some(home.clone());
    let id = |host: &FixedHost, variable| search(host, variable).unwrap().config.agent.id.clone();

    match search(&host, None) {
        Err(Errors::NotFound { searched }) => {
            assert_eq!(searched.len(), 3, "{searched:?}");
            assert_eq!(searched[2], Path::new("/etc/backend.ai/agent.toml"));
        }
        other => panic!("{other:?}"),
    }
    put(&home.join(".config/backend.ai"), "user");
    assert_eq!(id(&host, None), "user");
    // A parent counts only with BUILD_ROOT beside the file, the nearest first.
    put(&home.join("a"), "parent");
    assert_eq!(id(&host, None), "user");
    fs::write(home.join("a/BUILD_ROOT"), "").unwrap();
    assert_eq!(id(&host, None), "parent");
    put(&home.join("a/b"), "nearer");
    fs::create_dir(home.join("a/b/BUILD_ROOT")).unwrap();
    assert_eq!(id(&host, None), "nearer");
    put(&working, "working");
    assert_eq!(id(&host, None), "working");
    put(&home.join("named"), "named");
    let named = home.join("named/agent.toml").display().to_string();
    assert_eq!(id(&host, Some(&named)), "named");
    assert_eq!(id(&host, Some("")), "working");
    // The variable leaves a single candidate.
    assert!(
        matches!(search(&host, Some("/nowhere")), Err(Errors::NotFound { searched }) if searched.len() == 1)
    );
}

#[test]
fn a_build_root_above_the_home_directory_does_not_count() {
    let root = tempfile::tempdir().unwrap();
    let top = root.path().canonicalize().unwrap();
    put(&top, "above");
    fs::write(top.join("BUILD_ROOT"), "").unwrap();
    fs::create_dir_all(top.join("home/w")).unwrap();
    let mut host = FixedHost::at(&top.join("home/w"));
    host.home = Some(top.join("home"));
    assert!(matches!(search(&host, None), Err(Errors::NotFound { .. })));
}

#[test]
fn a_named_file_must_be_readable() {
    let setup = Setup::new(SMALLEST);
    fs::remove_file(setup.directory.path().join("agent.toml")).unwrap();
    assert!(matches!(setup.load(), Err(Errors::Unreadable { .. })));
}

#[test]
fn loading_creates_nothing_and_preparing_creates_everything_once() {
    let mut setup =
        Setup::new(&SMALLEST.replace("[agent]\n", "[agent]\nipc-base-path = './ipc'\n"));
    let root = setup.directory.path().to_owned();
    let count = || fs::read_dir(&root).unwrap().count();
    setup.host.working_directory = root.canonicalize().unwrap();
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let lines = format!(
        "[node]\nrun-dir = '{}/run'\nrunner-dir = './runner'\n",
        shm.path().display()
    );
    fs::write(
        root.join("agent.toml"),
        SMALLEST.replace(
            "[agent]\n",
            "[agent]\nipc-base-path = './ipc'\nabuse-report-path = './abuse/reports'\n",
        ) + &lines,
    )
    .unwrap();
    let config = setup.loaded().config;
    assert_eq!(count(), 1, "only agent.toml is there");
    config.prepare_directories().unwrap();
    config.prepare_directories().unwrap();
    for prepared in config.directories() {
        assert!(prepared.path.is_dir(), "{prepared:?}");
    }
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&config.agent.var_base_path), 0o700);
    assert_eq!(mode(&config.container.scratch_root) & 0o700, 0o700);
    // With its parents, as the original does.
    assert_eq!(mode(&root.join("abuse/reports")) & 0o700, 0o700);
}

#[test]
fn a_file_in_the_place_of_a_directory_is_told() {
    let setup =
        Setup::new(&(SMALLEST.to_owned() + "[node]\nrun-dir = '/dev/shm/bai-config-test'\n"));
    let config = setup.loaded().config;
    fs::write(&config.container.scratch_root, "").unwrap();
    let mut config = (*config).clone();
    config.node.run_dir = setup.directory.path().join("run");
    config.node.runner_dir = setup.directory.path().join("runner");
    config.agent.ipc_base_path = setup.directory.path().join("ipc");
    let err = config.prepare_directories().unwrap_err();
    assert!(err.to_string().contains("container.scratch-root"), "{err}");
}

#[test]
fn paths_are_expanded_and_links_resolved() {
    let text = SMALLEST
        .replace("HERE/scratches", "link/x")
        .replace("[agent]\n", "[agent]\nvar-base-path = '~/var'\n");
    let mut setup = Setup::new(&text);
    let root = setup.directory.path().canonicalize().unwrap();
    fs::create_dir(root.join("real")).unwrap();
    std::os::unix::fs::symlink(root.join("real"), root.join("link")).unwrap();
    setup.host.home = Some(root.join("home"));
    let config = setup.loaded().config;
    assert_eq!(config.container.scratch_root, root.join("real/x"));
    assert_eq!(config.agent.var_base_path, root.join("home/var"));
}
