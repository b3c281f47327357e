//! The bus behind TLS.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use control::events::bus::BusTls;
use harness::redis::{Redis, RedisOptions};

use super::{LIMIT, bus, drained, ended, numbers, settings};

fn certificate(directory: &Path) -> Result<()> {
    let made = Command::new("openssl")
        .current_dir(directory)
        .args("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout key.pem -out cert.pem".split(' '))
        .args(["-subj", "/CN=bus.test", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .output()
        .context("openssl can't be started; try: apt-get install openssl")?;
    ensure!(
        made.status.success(),
        "openssl: {}",
        String::from_utf8_lossy(&made.stderr)
    );
    Ok(())
}

#[tokio::test]
async fn a_server_with_a_certificate_is_trusted_only_as_told() -> Result<()> {
    let directory = tempfile::tempdir()?;
    certificate(directory.path())?;
    let cert = directory.path().join("cert.pem");
    let key = directory.path().join("key.pem");
    let tls_port = std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port();
    let redis = Redis::start_with(RedisOptions {
        lines: vec![
            format!("tls-port {tls_port}"),
            format!("tls-cert-file {}", cert.display()),
            format!("tls-key-file {}", key.display()),
            format!("tls-ca-cert-file {}", cert.display()),
            "tls-auth-clients no".into(),
        ],
        ..RedisOptions::default()
    })?;
    let trusts = [
        BusTls {
            skip_verify: false,
            ca_file: Some(cert),
        },
        BusTls {
            skip_verify: true,
            ca_file: None,
        },
    ];
    for (n, tls) in (1..).zip(trusts) {
        let mut wanted = settings(tls_port);
        wanted.server.tls = Some(tls);
        let (bus, events) = bus(&wanted)?;
        events.emit(ended(n));
        drained(&bus).await?;
    }
    // The authorities of the system do not know it.
    let mut wanted = settings(tls_port);
    wanted.server.tls = Some(BusTls::default());
    let (bus, events) = bus(&wanted)?;
    events.emit(ended(3));
    let mut state = bus.state();
    tokio::time::timeout(LIMIT, state.wait_for(|state| state.trouble.is_some())).await??;
    assert_eq!(numbers(&redis.stream()?), [1, 2]);
    Ok(())
}
