//! The etcd client against real servers: key layout, scopes, log-in, TLS, and what it does when servers restart, hang,
//! change their leader, compact, or lose their data.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use control::etcd::{Etcd, EtcdError, Followed, Health, Scope, Seen};
use etcd_client::{CompactionOptions, Permission};
use harness::etcd::{EtcdOptions, EtcdServer};
use harness::wait;

const LIMIT: Duration = Duration::from_secs(60);

fn settings(section: &str) -> config::Etcd {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("agent.toml");
    let text = format!(
        "{section}\n[agent]\nmode = \"docker\"\nrpc-listen-addr = \"127.0.0.1:6001\"\n[container]\nscratch-type = \"hostdir\"\n[resource]\n"
    );
    std::fs::write(&file, text).unwrap();
    let options = config::LoadOptions {
        environment: Box::new(|_| None),
        ..config::LoadOptions::of_this_process(Some(file), false)
    };
    let loaded = config::load(&options).unwrap();
    loaded.config.etcd.clone().unwrap()
}

fn client(server: &EtcdServer, namespace: &str) -> Etcd {
    Etcd::new(&settings(&server.section(namespace)), "i-node", "gpu").unwrap()
}

async fn seen(followed: &mut Followed, what: &str, wanted: impl Fn(&Seen) -> bool) -> Result<()> {
    let arrived = async {
        while !wanted(&followed.now()) {
            followed.changed().await;
        }
    };
    tokio::time::timeout(LIMIT, arrived)
        .await
        .with_context(|| format!("{what}; now {:?}", followed.now()))
}

fn values(seen: &Seen) -> Vec<&str> {
    seen.entries.values().map(String::as_str).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_lie_where_the_original_has_them_and_scopes_hide_each_other() -> Result<()> {
    let server = EtcdServer::start().await?;
    let etcd = client(&server, "local");
    let other = client(&server, "other");
    etcd.put(Scope::Node, "", "starting").await?;
    etcd.put(Scope::Node, "ip", "10.0.0.5").await?;
    etcd.put(Scope::ScalingGroup, "config/agent/api/pull-timeout", "1")
        .await?;
    etcd.put(Scope::Global, "/config/agent/api/push-timeout", "2")
        .await?;
    etcd.put(Scope::Global, "config/agent/container-logs/max-length", "3")
        .await?;
    other
        .put(Scope::Global, "config/agent/api/x", "not ours")
        .await?;
    let physical: Vec<(String, String)> = [
        ("/sorna/local/config/agent/api/push-timeout", "2"),
        ("/sorna/local/config/agent/container-logs/max-length", "3"),
        ("/sorna/local/nodes/agents/i-node/", "starting"),
        ("/sorna/local/nodes/agents/i-node/ip", "10.0.0.5"),
        ("/sorna/local/sgroup/gpu/config/agent/api/pull-timeout", "1"),
        ("/sorna/other/config/agent/api/x", "not ours"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .to_vec();
    assert_eq!(server.dump().await?, physical);

    let agent = etcd.tree("config/agent").await?;
    assert_eq!(agent.tree.text(&["api", "pull-timeout"]), Some("1"));
    // The narrower scope's `api` hides the whole of the wider one's.
    assert_eq!(agent.tree.text(&["api", "push-timeout"]), None);
    assert_eq!(
        agent.tree.text(&["container-logs", "max-length"]),
        Some("3")
    );
    assert_eq!(agent.scopes["api"], Scope::ScalingGroup);

    // Another scaling group at run time: its keys count from then on.
    etcd.set_scaling_group("cpu");
    let agent = etcd.tree("config/agent").await?;
    assert_eq!(agent.tree.text(&["api", "push-timeout"]), Some("2"));

    etcd.put(Scope::Global, "k", "global").await?;
    assert_eq!(etcd.get("k").await?.as_deref(), Some("global"));
    etcd.put(Scope::Node, "k", "").await?;
    // An empty text is a value.
    assert_eq!(etcd.get("k").await?.as_deref(), Some(""));
    etcd.delete(Scope::Node, "k").await?;
    assert_eq!(etcd.get("k").await?.as_deref(), Some("global"));
    assert_eq!(etcd.get("absent").await?, None);

    let many: Vec<(String, String)> = (0..300)
        .map(|n| (format!("many/{n}"), n.to_string()))
        .collect();
    etcd.put_all(Scope::Global, &many).await?;
    assert_eq!(etcd.tree("many").await?.tree.members.len(), 300);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_logged_in_and_what_is_wrong_is_said() -> Result<()> {
    let mut server = EtcdServer::start().await?;
    let mut admin = server.client().await?;
    for user in ["root", "agent"] {
        admin.user_add(user, "secret", None).await?;
    }
    admin.role_add("root").await?;
    admin.role_add("agent").await?;
    admin
        .role_grant_permission(
            "agent",
            Permission::read_write("/sorna/local/").with_prefix(),
        )
        .await?;
    admin.user_grant_role("root", "root").await?;
    admin.user_grant_role("agent", "agent").await?;
    admin.auth_enable().await?;

    let of = |namespace: &str, user: &str, password: &str| {
        let section = format!(
            "{}user = \"{user}\"\npassword = \"{password}\"\n",
            server.section(namespace)
        );
        Etcd::new(&settings(&section), "i-node", "gpu").unwrap()
    };
    let told = |result: Result<Option<String>, EtcdError>, word: &str| {
        let err = result.unwrap_err();
        assert!(!err.is_transient(), "{err}");
        assert!(err.to_string().contains(word), "{err}");
        assert!(!format!("{err:?}").contains("secret"), "{err:?}");
    };
    told(client(&server, "local").get("k").await, "etcd.user");
    told(
        of("local", "agent", "wrong-secret").get("k").await,
        "etcd.password",
    );
    told(of("foreign", "agent", "secret").get("k").await, "rights");
    let etcd = of("local", "agent", "secret");
    etcd.put(Scope::Global, "k", "v").await?;
    let mut followed = etcd.follow(etcd.physical(Scope::Global, "k"));
    seen(&mut followed, "the key is read", |seen| {
        seen.live && values(seen) == ["v"]
    })
    .await?;

    // A member that lets nobody in like this is left for the next; alone, it is named.
    let plain = EtcdServer::start().await?;
    let [refusing, serving] = [&plain, &server].map(|server| server.addresses().concat());
    let of_addresses = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|address| {
            let (host, port) = address.rsplit_once(':').unwrap();
            format!("{{ host = \"{host}\", port = {port} }}")
        });
        let section = format!(
            "[etcd]\nnamespace = \"local\"\naddr = [{}]\nuser = \"agent\"\npassword = \"secret\"\n",
            addresses.collect::<Vec<_>>().join(", ")
        );
        Etcd::new(&settings(&section), "i-node", "gpu").unwrap()
    };
    let both = of_addresses(&[&refusing, &serving]);
    both.put(Scope::Global, "by", "the second").await?;
    assert_eq!(etcd.get("by").await?.as_deref(), Some("the second"));
    assert!(both.asked().ends_with(&serving), "{}", both.asked());
    for addresses in [&[refusing.as_str()][..], &[&refusing, &refusing]] {
        let alone = of_addresses(addresses);
        told(alone.get("k").await, &refusing);
        told(alone.get("k").await, "remove etcd.user");
        let state = alone.health().borrow().clone();
        assert!(matches!(state, Health::Refused { .. }), "{state:?}");
    }
    // As long as another may serve, the node waits, and says what the one that answers has said.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let waits = of_addresses(&[&refusing, &nobody.to_string()]);
    let err = waits.get("k").await.unwrap_err();
    assert!(err.is_transient(), "{err}");
    for word in [refusing.as_str(), "remove etcd.user", "os error"] {
        assert!(err.to_string().contains(word), "{err}");
    }
    let state = waits.health().borrow().clone();
    assert!(matches!(state, Health::Refused { .. }), "{state:?}");

    // A restarted server knows no token any more.
    server.stop(0);
    server.restart(0).await?;
    wait::until("the client logs in again", LIMIT, || async {
        etcd.put(Scope::Global, "k", "w").await.ok()
    })
    .await?;
    seen(&mut followed, "the watch goes on", |seen| {
        values(seen) == ["w"]
    })
    .await?;

    // Rights that are taken away and given back while it runs.
    let health = etcd.health();
    assert!(matches!(*health.borrow(), Health::Reachable { .. }));
    let mut admin = server.client_as("root", "secret").await?;
    admin.user_revoke_role("agent", "agent").await?;
    wait::until("it is refused", LIMIT, || async {
        etcd.get("k").await.is_err().then_some(())
    })
    .await?;
    let state = health.borrow().clone();
    let Health::Refused { error, .. } = state else {
        anyhow::bail!("{state:?}");
    };
    assert!(error.contains("rights"), "{error}");
    admin.user_grant_role("agent", "agent").await?;
    wait::until("it is let in again", LIMIT, || async {
        etcd.get("k").await.ok()
    })
    .await?;
    assert!(matches!(*health.borrow(), Health::Reachable { .. }));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_checks_the_server_and_shows_our_certificate() -> Result<()> {
    let server = EtcdServer::start_with(EtcdOptions {
        tls: true,
        members: 1,
    })
    .await?;
    let etcd = client(&server, "local");
    etcd.put(Scope::Global, "k", "v").await?;
    assert_eq!(
        server.dump().await?,
        [("/sorna/local/k".to_owned(), "v".to_owned())]
    );

    let section = server.section("local");
    // By the name of the certificate instead of the address.
    let named = Etcd::new(
        &settings(&format!("{section}tls-server-name = \"etcd.test\"\n")),
        "i",
        "g",
    )?;
    assert_eq!(named.get("k").await?.as_deref(), Some("v"));
    for wrong in [
        format!("{section}tls-server-name = \"elsewhere.test\"\n"),
        // Another authority: the client's own certificate signs nothing.
        section.replace("ca.pem", "client.pem"),
        // No certificate of ours.
        section
            .lines()
            .filter(|line| !line.contains("tls-cert") && !line.contains("tls-key"))
            .collect::<Vec<_>>()
            .join("\n"),
        // No encryption at all.
        section
            .lines()
            .filter(|line| !line.starts_with("tls"))
            .collect::<Vec<_>>()
            .join("\n"),
    ] {
        let etcd = Etcd::new(&settings(&wrong), "i", "g")?;
        let answer = etcd.get("k").await;
        assert!(
            matches!(&answer, Err(EtcdError::Unreachable { .. })),
            "{answer:?}"
        );
    }
    let gone = section.replace("ca.pem", "absent.pem");
    std::fs::write(server.certificate("absent.pem"), "")?;
    let loaded = settings(&gone);
    std::fs::remove_file(server.certificate("absent.pem"))?;
    assert!(matches!(
        Etcd::new(&loaded, "i", "g"),
        Err(EtcdError::Certificate { .. })
    ));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_after_a_restart_and_reads_again_after_compaction() -> Result<()> {
    let mut server = EtcdServer::start().await?;
    let etcd = client(&server, "local");
    let mut health = etcd.health();
    assert_eq!(*health.borrow(), Health::Untried);
    etcd.put(Scope::Global, "w/a", "1").await?;
    let mut followed = etcd.follow(etcd.physical(Scope::Global, "w/"));
    seen(&mut followed, "read", |seen| {
        seen.live && values(seen) == ["1"]
    })
    .await?;
    assert!(matches!(
        &*health.borrow_and_update(),
        Health::Reachable { .. }
    ));
    etcd.put(Scope::Global, "w/b", "2").await?;
    etcd.delete(Scope::Global, "w/a").await?;
    seen(&mut followed, "changes arrive", |seen| {
        values(seen) == ["2"]
    })
    .await?;

    // Away: the last state stays, and it is known that etcd is away.
    server.stop(0);
    tokio::time::timeout(
        LIMIT,
        health.wait_for(|health| matches!(health, Health::Lost { .. })),
    )
    .await??;
    seen(&mut followed, "the watch is known to be broken", |seen| {
        !seen.live
    })
    .await?;
    assert_eq!(values(&followed.now()), ["2"]);
    let refused = etcd.get("w/b").await.unwrap_err();
    assert!(refused.is_transient(), "{refused}");

    server.restart(0).await?;
    // What happened before the watch is back is told by the watch, without reading again.
    let mut outside = server.client().await?;
    outside.put("/sorna/local/w/c", "3", None).await?;
    seen(&mut followed, "goes on", |seen| {
        seen.live && values(seen) == ["2", "3"]
    })
    .await?;
    assert_eq!(followed.now().readings, 1);
    tokio::time::timeout(
        LIMIT,
        health.wait_for(|health| matches!(health, Health::Reachable { .. })),
    )
    .await??;

    // Compacted while we were cut off.
    server.stop(0);
    seen(&mut followed, "broken again", |seen| !seen.live).await?;
    // The follower looks for the server under its old address; changes are made under another.
    let mut outside = server.moved_aside(0).await?;
    outside.put("/sorna/local/w/d", "4", None).await?;
    let last = outside.put("/sorna/local/w/b", "5", None).await?;
    let revision = last.header().context("a header")?.revision();
    outside
        .compact(revision, Some(CompactionOptions::new().with_physical()))
        .await?;
    server.stop(0);
    server.restart(0).await?;
    seen(&mut followed, "read again", |seen| {
        seen.live && values(seen) == ["5", "3", "4"]
    })
    .await?;
    assert_eq!(followed.now().readings, 2);

    // A server made anew: its revisions begin again, and its keys are the ones that count.
    server.wipe(0)?;
    server.restart(0).await?;
    let mut outside = server.client().await?;
    outside.put("/sorna/local/w/z", "new", None).await?;
    seen(&mut followed, "another history", |seen| {
        seen.live && values(seen) == ["new"]
    })
    .await?;

    // Another cluster, whose revisions have passed those that were seen while nobody looked.
    server.make_anew(0)?;
    seen(&mut followed, "broken by the end", |seen| !seen.live).await?;
    let readings = followed.now().readings;
    let mut outside = server.moved_aside(0).await?;
    while outside
        .put("/sorna/local/w/y", "other", None)
        .await?
        .header()
        .context("a header")?
        .revision()
        <= followed.now().revision
    {}
    server.stop(0);
    server.restart(0).await?;
    seen(&mut followed, "another cluster", |seen| {
        seen.live && values(seen) == ["other"]
    })
    .await?;
    assert_eq!(followed.now().readings, readings + 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_or_dead_member_is_left_for_another() -> Result<()> {
    let mut server = EtcdServer::start_with(EtcdOptions {
        members: 3,
        tls: false,
    })
    .await?;
    let etcd = client(&server, "local");
    etcd.put(Scope::Global, "w/a", "1").await?;
    let mut followed = etcd.follow(etcd.physical(Scope::Global, "w/"));
    seen(&mut followed, "read", |seen| seen.live).await?;

    // The member that we talk to is killed; if it led, another is elected.
    server.stop(0);
    wait::until("another member takes the write", LIMIT, || async {
        etcd.put(Scope::Global, "w/b", "2").await.ok()
    })
    .await?;
    seen(&mut followed, "the watch goes on elsewhere", |seen| {
        values(seen) == ["1", "2"]
    })
    .await?;
    server.restart(0).await?;

    // The leader hangs: a new one is elected, and whoever asked the old one asks another.
    let leader = server.leader().await?;
    server.pause(leader)?;
    let written = wait::until("the write bypasses the hanging leader", LIMIT, || async {
        etcd.put(Scope::Global, "w/c", "3").await.ok()
    })
    .await;
    let told = seen(&mut followed, "the watch bypasses it", |seen| {
        values(seen) == ["1", "2", "3"]
    })
    .await;
    server.resume(leader)?;
    written?;
    told?;
    assert_eq!(followed.now().readings, 1);
    let expected: BTreeMap<String, String> = [("a", "1"), ("b", "2"), ("c", "3")]
        .map(|(key, value)| (format!("/sorna/local/w/{key}"), value.to_owned()))
        .into();
    assert_eq!(followed.now().entries, expected);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_setting_is_refused_or_left_out_and_named() -> Result<()> {
    let server = EtcdServer::start().await?;
    let etcd = client(&server, "local");
    let mut raw = server.client().await?;
    etcd.put(Scope::Global, "config/redis/addr", "10.0.0.2:6379")
        .await?;

    // Bytes that are no text, where settings are and beside them.
    raw.put("/sorna/local/config/redisx", &b"\xff\xfe"[..], None)
        .await?;
    assert_eq!(
        etcd.tree("config/redis").await?.tree.text(&["addr"]),
        Some("10.0.0.2:6379")
    );
    let key = "/sorna/local/config/redis/password";
    raw.put(key, &b"\x80\x81\xff"[..], None).await?;
    for refused in [
        etcd.tree("config/redis").await.unwrap_err(),
        etcd.get("config/redis/password").await.unwrap_err(),
    ] {
        assert!(
            refused.is_transient(),
            "it can be mended while the node waits"
        );
        let words = refused.to_string();
        assert!(words.contains(key) && words.contains("UTF-8"), "{words}");
    }
    raw.delete(key, None).await?;

    // A key as deep as etcd takes it.
    let deep = "/sorna/local/config/redis".to_owned() + &"/".repeat(1 << 20);
    raw.put(deep, "v", None).await?;
    let tree = etcd.tree("config/redis").await?.tree;
    assert_eq!(tree.members.len(), 1, "{:?}", tree.members.keys());

    // More than is read at once.
    for number in 0..5 {
        let key = format!("/sorna/local/config/redis/x{number}");
        raw.put(key, vec![b'x'; 1 << 20], None).await?;
    }
    let refused = etcd.tree("config/redis").await.unwrap_err();
    let words = control::causes::chain(&refused);
    assert!(words.contains("4 MiB"), "{words}");
    assert!(matches!(*etcd.health().borrow(), Health::Reachable { .. }));
    assert_eq!(
        etcd.get("config/redis/addr").await?.as_deref(),
        Some("10.0.0.2:6379")
    );
    Ok(())
}
