//! What is accepted without effect is said, and so is what nobody knows.

use config::NoteKind;

use crate::host::{SMALLEST, Setup, with_line};

#[test]
fn rare_keys_are_accepted_and_reported() {
    for (section, line) in [
        ("agent", "ssl-enabled = true"),
        ("agent", "instance-type = 'a1'"),
        ("agent", "mount_path_uid_gid = 'a:b'"),
        ("agent", "event-loop = 'uvloop'"),
        ("agent", "aiomonitor-port = 38200"),
        ("agent", "mount-path-uid-gid = 'a:b'"),
        ("agent", "use-experimental-redis-event-dispatcher = false"),
        ("container", "swarm-enabled = false"),
        ("container", "scratch-nfs-address = 'x'"),
        ("resource", "reserved-disk = '8g'"),
        ("debug", "enabled = true"),
        ("debug", "log-alloc-map = true"),
        ("debug", "asyncio = true"),
        ("logging", "version = 1"),
        ("logging.logstash", "endpoint = { host = 'x', port = 1 }"),
        ("watcher", "ssl-enabled = false"),
        ("pyroscope", "enabled = false"),
        ("otel", "endpoint = 'http://me:hunter2@x'"),
    ] {
        let loaded = Setup::new(&with_line(section, line)).loaded();
        assert_eq!(loaded.notes.len(), 1, "{line}: {:?}", loaded.notes);
        assert_eq!(loaded.notes[0].kind, NoteKind::NotUsed, "{line}");
        assert!(loaded.notes[0].line.is_some(), "{line}");
        assert!(!loaded.render_notes().contains("hunter2"));
    }
}

#[test]
fn what_this_release_reads_and_does_not_use_is_told() {
    for (section, line, told) in [
        ("agent", "agent-sock-port = 6017", true),
        ("agent", "pid-file = '/tmp/x.pid'", false),
        ("container-logs", "chunk-size = '32k'", false),
        ("agent", "allow_compute_plugins = ['a']", false),
        ("api", "push-timeout = 60", false),
        ("logging", "drivers = ['console', 'file']", true),
        ("logging", "drivers = ['console']", false),
        ("container", "port-range = [31000, 31010]", false),
    ] {
        let text = with_line(section, line);
        let file = "\n[logging.file]\npath = '/tmp'\nfilename = 'x.log'\n";
        let text = match line.contains("'file'") {
            true => text + file,
            false => text,
        };
        let notes = Setup::new(&text).loaded().notes;
        let key = line.split(' ').next().unwrap();
        let found = notes
            .iter()
            .find(|note| note.key == format!("{section}.{key}"));
        assert_eq!(found.is_some(), told, "{line}: {notes:?}");
        assert!(found.is_none_or(|note| note.kind == NoteKind::NotUsed && note.line.is_some()));
    }
}

#[test]
fn what_is_not_used_is_in_nobodys_way() {
    // The port of the RPC, and a directory that is nowhere.
    let text = with_line("agent", "agent-sock-port = 6001")
        + "\n[logging]\ndrivers = ['console', 'file']\n\
        [logging.file]\npath = '/nowhere/log'\nfilename = 'x.log'\n";
    let config = Setup::new(&text).loaded().config;
    assert_eq!(
        config.agent.agent_sock_port,
        config.agent.rpc_listen_addr.port
    );
    let made = config.directories();
    assert!(made.iter().all(|it| !it.path.starts_with("/nowhere")));
}

#[test]
fn unknown_keys_are_never_an_error_and_get_a_suggestion() {
    for (section, line, suggestion) in [
        ("container", "port-rnage = [1, 2]", Some("port-range")),
        ("agent", "rpc_listen_adr = 'x'", Some("rpc-listen-addr")),
        ("node", "publsh = 'rows'", Some("publish")),
        ("conatiner", "x = 1", Some("[container]")),
        ("agent", "favourite-colour = 'blue'", None),
        ("plugin-x", "y = 1", None),
    ] {
        let loaded = Setup::new(&with_line(section, line)).loaded();
        assert_eq!(loaded.notes.len(), 1, "{line}: {:?}", loaded.notes);
        let note = &loaded.notes[0];
        assert_eq!(note.kind, NoteKind::Unknown, "{line}");
        match suggestion {
            Some(word) => assert!(note.text.contains(word), "{}", note.text),
            None => assert!(!note.text.contains("did you mean"), "{}", note.text),
        }
    }
}

#[test]
fn entries_that_mean_no_plugin_are_told() {
    let notes = |line: &str| Setup::new(&with_line("agent", line)).loaded().notes;
    let told = notes(
        "allow-compute-plugins = ['ai.backend.accelerator.cuda_open', 'ai.backend.accelerator.ipu', 'x']",
    );
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0].kind, NoteKind::Warning);
    let text = &told[0].text;
    assert!(
        text.contains("accelerator.ipu, x mean no") && !text.contains("cuda_open"),
        "{text}"
    );
    assert_eq!(
        notes("block-compute-plugins = ['ai.backend', 'rocm', 'mock']"),
        []
    );
}

#[test]
fn a_setting_given_twice_is_told_and_the_canonical_form_wins() {
    let text = with_line("agent", "scaling_group = 'b'\nscaling-group = 'a'");
    let loaded = Setup::new(&text).loaded();
    assert_eq!(loaded.config.agent.scaling_group, "a");
    assert_eq!(loaded.notes.len(), 1);
    assert_eq!(loaded.notes[0].kind, NoteKind::Warning);
}

#[test]
fn a_port_range_over_an_own_port_is_a_warning() {
    let loaded = Setup::new(&with_line("container", "port-range = [6000, 6002]")).loaded();
    assert!(loaded.notes[0].text.contains("6001"), "{:?}", loaded.notes);
    assert_eq!(Setup::new(SMALLEST).loaded().notes, []);
}

#[test]
fn the_unit_of_the_python_agent_is_a_warning() {
    let note = |unit: &str| {
        let line = format!("target-service = '{unit}'");
        Setup::new(&with_line("watcher", &line)).loaded().notes
    };
    let told = note("backendai-agent.service");
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0].kind, NoteKind::Warning);
    assert_eq!(told[0].key, "watcher.target-service");
    assert!(told[0].line.is_some() && told[0].text.contains("\"bai-agent.service\""));
    assert_eq!(note("bai-agent.service"), []);
}

#[test]
fn a_blank_id_or_pid_file_is_none_as_the_original_s_sample_says() {
    for line in ["id = ''", "pid-file = ''", "pid_file = ''"] {
        let loaded = Setup::new(&with_line("agent", line)).loaded();
        assert_eq!(loaded.config.agent.id, "i-node-1", "{line}");
        let pid_file = loaded.config.agent.pid_file.to_str();
        assert_eq!(pid_file, Some("/dev/null"), "{line}");
        assert_eq!(loaded.notes, [], "{line}");
    }
    let text = with_line("agent", "pid-file = '/run/x.pid'");
    let loaded = Setup::new(&text).env("BACKEND_PID_FILE", "").loaded();
    assert_eq!(loaded.config.agent.pid_file.to_str(), Some("/dev/null"));
}

#[test]
fn a_relative_path_is_a_warning_as_units_start_in_the_root() {
    for (section, line, unit) in [
        ("container", "scratch-root = './scratches'", "/scratches"),
        ("container", "scratch_root = 'a/b'", "/a/b"),
        ("agent", "var-base-path = './var'", "/var"),
    ] {
        let setup = Setup::new(&with_line(section, line));
        let notes = setup.loaded().notes;
        assert_eq!(notes.len(), 1, "{line}: {notes:?}");
        assert_eq!(notes[0].kind, NoteKind::Warning);
        assert!(notes[0].line.is_some());
        let here = setup.host.working_directory.join(&unit[1..]);
        let told = format!("{} from here, {unit} for the units", here.display());
        assert!(notes[0].text.contains(&told), "{}", notes[0].text);
    }
    for line in ["scratch-root = '/scratches'", "scratch-type = 'memory'"] {
        assert_eq!(Setup::new(&with_line("container", line)).loaded().notes, []);
    }
}

/// The original's defaults are relative, too.
#[test]
fn a_path_that_is_not_set_is_told_where_sessions_live_and_safe_where_archives_do() {
    let text = SMALLEST.replace("scratch-root = 'HERE/scratches'\n", "");
    let mut setup = Setup::new(&text);
    let loaded = setup.loaded();
    assert_eq!(loaded.notes.len(), 1, "{:?}", loaded.notes);
    let note = &loaded.notes[0];
    assert_eq!(
        (note.kind, note.key.as_str(), note.line),
        (NoteKind::Warning, "container.scratch-root", None)
    );
    let here = setup.host.working_directory.join("scratches");
    let told = format!("{} from here, /scratches for the units", here.display());
    assert!(note.text.contains(&told), "{}", note.text);
    let agent = &loaded.config.agent;
    assert_eq!(agent.image_commit_path, agent.var_base_path.join("commit"));
    let written = Setup::new(&text).env("BACKEND_SCRATCH_ROOT", "/srv/scratches");
    assert_eq!(written.loaded().notes, []);
    setup.standalone = true;
    let loaded = setup.loaded();
    assert!(
        !loaded
            .notes
            .iter()
            .any(|note| note.key == "container.scratch-root")
    );
    let state = loaded.config.node.state_dir.join("commit");
    assert_eq!(loaded.config.agent.image_commit_path, state);
    let placed = with_line("agent", "var-base-path = '/srv/bai'");
    let commits = Setup::new(&placed)
        .loaded()
        .config
        .agent
        .image_commit_path
        .clone();
    assert_eq!(commits.to_str(), Some("/srv/bai/commit"));
}

#[test]
fn kernels_that_come_out_as_root_s_are_a_warning() {
    let told = |uid: &str, gid: &str| -> Vec<String> {
        let text = SMALLEST
            .replace("kernel-uid = 1000\n", uid)
            .replace("kernel-gid = 1000\n", gid);
        let notes = Setup::new(&text).loaded().notes;
        assert!(notes.iter().all(|note| note.kind == NoteKind::Warning));
        notes.into_iter().map(|note| note.key).collect()
    };
    let uid = ["container.kernel-uid"];
    assert_eq!(told("kernel-uid = -1\n", "kernel-gid = -1\n"), uid);
    assert_eq!(told("", ""), uid);
    assert_eq!(told("", "kernel-gid = 1000\n"), uid);
    assert_eq!(
        told("kernel-uid = 1000\n", "kernel-gid = ''\n"),
        ["container.kernel-gid"]
    );
    // Whoever writes it means it.
    assert!(told("kernel-uid = 0\n", "kernel-gid = 0\n").is_empty());
    let mut plain = Setup::new(&SMALLEST.replace("kernel-uid = 1000\n", ""));
    plain.host.user.uid = 1000;
    assert_eq!(plain.loaded().notes, []);
}

/// The table shows every section once, in the file's order, and the remarks after it.
#[test]
fn the_table_is_in_order_and_ends_with_the_remarks() {
    let text = with_line("container", "port-rnage = [1, 2]")
        .replace("[resource]\n", "[resource]\nreserved-cpu = 0\n");
    let loaded = Setup::new(&text).env("BACKEND_REGION", "here").loaded();
    let shown = loaded.render_text();
    let mut headings: Vec<&str> = shown.lines().filter(|line| line.starts_with('[')).collect();
    assert_eq!(
        (headings[0], headings[headings.len() - 1]),
        ("[agent]", "[overcommit]")
    );
    let all = headings.len();
    headings.sort_unstable();
    headings.dedup();
    assert_eq!(headings.len(), all, "{shown}");
    let line = |key: &str| {
        shown
            .lines()
            .find(|line| line.trim_start().starts_with(key))
            .unwrap()
            .to_owned()
    };
    assert!(
        line("region").ends_with("environment BACKEND_REGION"),
        "{shown}"
    );
    assert!(line("reserved-cpu").contains("line 13"), "{shown}");
    assert!(
        shown.trim_end().ends_with("did you mean \"port-range\"?"),
        "{shown}"
    );
}
