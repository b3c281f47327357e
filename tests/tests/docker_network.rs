//! Local networks and the host-side ends of containers' links, against the real engine and kernel.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step fails the test

use std::collections::HashMap;
use std::process::Command;
use std::time::Duration;

use control::docker::{ContainerCreateBody, Docker, HostConfig};
use control::network::{self, CLUSTER_NETWORK_LABEL};
use harness::engine::{engine, unique};
use harness::images::{Image, image};

/// Removes a container and networks when the test ends, however it ends.
struct Leftovers {
    container: String,
    networks: Vec<String>,
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        let quiet = |args: &[&str]| {
            let _ = Command::new("docker").args(args).output();
        };
        quiet(&["rm", "-f", "-v", &self.container]);
        for network in &self.networks {
            quiet(&["network", "rm", network]);
        }
    }
}

async fn sleeper(docker: &Docker, name: &str, network_mode: &str) {
    let body = ContainerCreateBody {
        image: Some(image(Image::Bare).unwrap()),
        cmd: Some(vec!["/bin/sleep".into(), "300".into()]),
        host_config: Some(HostConfig {
            network_mode: Some(network_mode.into()),
            ..Default::default()
        }),
        ..Default::default()
    };
    docker.create(name, &body).await.unwrap();
    docker.start(name).await.unwrap();
}

#[tokio::test]
async fn an_existing_network_is_a_success_and_so_is_a_missing_one() {
    let docker = engine().await;
    let name = unique("net");
    let _leftovers = Leftovers {
        container: unique("none"),
        networks: vec![name.clone()],
    };
    network::create_local_network(&docker, &name).await.unwrap();
    network::create_local_network(&docker, &name).await.unwrap();
    let made = docker.inspect_network(&name).await.unwrap();
    assert_eq!(made.driver.as_deref(), Some("bridge"));
    let labels: HashMap<String, String> = made.labels.unwrap();
    assert_eq!(labels[CLUSTER_NETWORK_LABEL], "1");
    network::destroy_local_network(&docker, &name)
        .await
        .unwrap();
    assert!(
        docker
            .inspect_network(&name)
            .await
            .unwrap_err()
            .is_not_found()
    );
    network::destroy_local_network(&docker, &name)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_network_is_removed_once_its_last_container_has_left() {
    let docker = engine().await;
    let (name, container) = (unique("net"), unique("leaver"));
    let _leftovers = Leftovers {
        container: container.clone(),
        networks: vec![name.clone()],
    };
    network::create_local_network(&docker, &name).await.unwrap();
    sleeper(&docker, &container, &name).await;
    let removal = network::destroy_local_network(&docker, &name);
    let leaving = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        docker.remove(&container, true).await.unwrap();
    };
    let (removed, ()) = tokio::join!(removal, leaving);
    removed.unwrap();
}

#[tokio::test]
async fn links_are_found_on_the_default_and_on_own_bridges() {
    let docker = engine().await;
    let (own, container) = (unique("net"), unique("linked"));
    let _leftovers = Leftovers {
        container: container.clone(),
        networks: vec![own.clone()],
    };
    network::create_local_network(&docker, &own).await.unwrap();
    sleeper(&docker, &container, "bridge").await;
    harness::kernels::docker(&["network", "connect", &own, &container]).unwrap();
    let inspected = docker.inspect(&container).await.unwrap();
    let links = network::links(&inspected).await.unwrap().here;
    assert_eq!(links.len(), 2, "{links:?}");
    let mut names: Vec<&str> = links.iter().map(|link| link.network.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["bridge", own.as_str()]);
    for link in &links {
        // The oracle: what sysfs says about the interface of that index.
        let held: Vec<String> = std::fs::read_dir("/sys/class/net")
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| {
                std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))
                    .is_ok_and(|text| text.trim() == link.ifindex.to_string())
            })
            .collect();
        let [host_end] = &held[..] else {
            panic!("no interface has index {}", link.ifindex)
        };
        let read = |file: &str| {
            std::fs::read_to_string(format!("/sys/class/net/{host_end}/{file}"))
                .unwrap()
                .trim()
                .to_owned()
        };
        assert!(host_end.starts_with("veth"), "{host_end}");
        assert_eq!(
            read("master/ifindex"),
            link.bridge_ifindex.unwrap().to_string()
        );
        // And what the container itself sees.
        let seen = docker
            .exec(
                &container,
                &control::docker::ExecRequest::new([
                    "/bin/ip",
                    "-o",
                    "addr",
                    "show",
                    "dev",
                    &link.interface,
                ]),
            )
            .await
            .unwrap();
        let seen = String::from_utf8(seen.stdout).unwrap();
        assert!(seen.contains(&link.ipv4.unwrap().to_string()), "{seen}");
        let iflink = docker
            .exec(
                &container,
                &control::docker::ExecRequest::new([
                    "/bin/cat",
                    &format!("/sys/class/net/{}/iflink", link.interface),
                ]),
            )
            .await
            .unwrap();
        assert_eq!(
            String::from_utf8(iflink.stdout).unwrap().trim(),
            link.ifindex.to_string()
        );
    }
    docker.kill(&container, "SIGKILL").await.unwrap();
    docker
        .wait(&container, Duration::from_secs(10))
        .await
        .unwrap();
    let stopped = docker.inspect(&container).await.unwrap();
    assert!(matches!(
        network::links(&stopped).await.unwrap_err(),
        network::NetworkError::NotRunning { .. }
    ));
}

#[tokio::test]
async fn containers_without_a_link_of_their_own_have_none() {
    let docker = engine().await;
    for mode in ["host", "none"] {
        let container = unique("unlinked");
        let _leftovers = Leftovers {
            container: container.clone(),
            networks: Vec::new(),
        };
        sleeper(&docker, &container, mode).await;
        let inspected = docker.inspect(&container).await.unwrap();
        assert_eq!(
            network::links(&inspected).await.unwrap(),
            network::Links::default()
        );
        assert_eq!(network::endpoints(&inspected), Vec::new());
    }
}

#[tokio::test]
async fn a_macvlan_leads_past_the_host_and_has_no_end_here() {
    let docker = engine().await;
    let (outer, own, container) = (unique("macvlan"), unique("net"), unique("linked"));
    let _leftovers = Leftovers {
        container: container.clone(),
        networks: vec![outer.clone(), own.clone()],
    };
    // Upon a bridge of its own.
    network::create_local_network(&docker, &own).await.unwrap();
    let id = docker.inspect_network(&own).await.unwrap().id.unwrap();
    let parent = format!("parent=br-{}", &id[..12]);
    let create = ["network", "create", "-d", "macvlan", "-o", &parent, &outer];
    if let Err(err) = harness::kernels::docker(&create) {
        harness::skip::here(format!("no macvlan: {err}"), false);
        return;
    }
    sleeper(&docker, &container, "bridge").await;
    let inspected = docker.inspect(&container).await.unwrap();
    let before = network::links(&inspected).await.unwrap();
    assert_eq!(
        (before.here.len(), before.past_host.len()),
        (1, 0),
        "{before:?}"
    );
    harness::kernels::docker(&["network", "connect", &outer, &container]).unwrap();
    let inspected = docker.inspect(&container).await.unwrap();
    let links = network::links(&inspected).await.unwrap();
    assert_eq!(links.here, before.here);
    assert_eq!(links.past_host, ["eth1"]);
}
