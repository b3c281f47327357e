//! No way out for a secret: errors, notes, the table, JSON, Debug.

use crate::host::{SMALLEST, Setup, with_line};

const PASSWORD: &str = "hunter2-the-password";

#[test]
fn a_loaded_password_is_shown_nowhere() {
    let text = with_line("etcd", &format!("user = 'me'\npassword = '{PASSWORD}'"))
        + &format!("[node.engine]\nhost = 'tcp://me:{PASSWORD}@h:1'\n");
    let loaded = Setup::new(&text).loaded();
    assert_eq!(
        loaded.config.node.engine.host.as_deref(),
        Some(&*format!("tcp://me:{PASSWORD}@h:1"))
    );
    let shown = format!(
        "{}{}{}{:?}",
        loaded.render_text(),
        loaded.render_json(),
        loaded.render_notes(),
        loaded.origins
    );
    assert!(
        shown.contains("***") && !shown.contains(PASSWORD),
        "{shown}"
    );
    assert!(
        !format!("{:?}", loaded.config).contains(PASSWORD),
        "{:?}",
        loaded.config
    );
}

#[test]
fn a_refused_password_is_shown_nowhere() {
    for (section, line) in [
        ("etcd", format!("password = ['{PASSWORD}']")),
        ("etcd", format!("password = {PASSWORD}")),
        ("etcd", format!("addr = 'http://me:{PASSWORD}@h:1'")),
        ("etcd", format!("addr = 'me:{PASSWORD}@h'")),
        (
            "etcd",
            format!("addr = {{ host = 'me:{PASSWORD}@h', port = 1 }}"),
        ),
        ("etcd", format!("addr = ['me:{PASSWORD}@h']")),
        ("node.engine", format!("host = 'ssh://me:{PASSWORD}@h'")),
        (
            "agent",
            format!("advertised-rpc-addr = 'me:{PASSWORD}@h:1'"),
        ),
        ("etcd", format!("pasword = '{PASSWORD}'\naddr = 3")),
    ] {
        let errors = Setup::new(&with_line(section, &line)).load().unwrap_err();
        assert!(
            !format!("{errors} {errors:?}").contains(PASSWORD),
            "{line}: {errors}"
        );
    }
    let variable =
        Setup::new(SMALLEST).env("BACKEND_ETCD_ADDR", &format!("http://me:{PASSWORD}@h"));
    let errors = variable.load().unwrap_err();
    assert!(!errors.to_string().contains(PASSWORD), "{errors}");
}
