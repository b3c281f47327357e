//! The manager's own client (published packages, libzmq underneath) drives a whole node.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use control::kernel::model_definition;
use control::rpc::KeyPair;
use harness::images::{self, Image};
use harness::node::{Node, NodeOptions, program};
use harness::python;
use serde_json::{Value, json};

/// What the manager knows of an image, taken from the engine.
fn image_record(name: &str) -> Result<String> {
    let output = Command::new("docker")
        .args(["image", "inspect", name])
        .output()
        .context("docker can't be started")?;
    ensure!(
        output.status.success(),
        "docker image inspect {name}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let inspected: Value = serde_json::from_slice(&output.stdout)?;
    let image = &inspected[0];
    let architecture = if image["Architecture"] == "arm64" {
        "aarch64"
    } else {
        "x86_64"
    };
    Ok(json!({ "canonical": name, "digest": image["Id"], "architecture": architecture, "labels": image["Config"]["Labels"] }).to_string())
}

#[tokio::test]
async fn the_managers_client_lives_a_kernels_life_over_null() -> Result<()> {
    let Some(python) = python::interpreter("published_client")? else {
        return Ok(());
    };
    let image = image_record(&images::image(Image::Runner)?)?;
    let node = Node::start(NodeOptions::default()).await?;
    let address = node.address().to_owned();
    let said = tokio::task::spawn_blocking(move || {
        python::check(&python, "node_peer.py", &[&address, &image])
    })
    .await??;
    ensure!(
        said.lines().filter(|line| line.starts_with("ok ")).count() >= 15,
        "too few checks ran:\n{said}"
    );
    ensure!(node.containers()?.is_empty(), "a container is left");
    Ok(())
}

#[tokio::test]
async fn the_managers_client_lives_a_kernels_life_over_curve_and_nobody_else_is_let_in()
-> Result<()> {
    let Some(python) = python::interpreter("published_client")? else {
        return Ok(());
    };
    let image = image_record(&images::image(Image::Runner)?)?;
    let keys = tempfile::tempdir()?;
    let (agent, manager) = (KeyPair::generate(), KeyPair::generate());
    let file = |name: &str| keys.path().join(name).display().to_string();
    std::fs::write(file("agent.key_secret"), agent.secret_file_text())?;
    std::fs::write(file("manager.key_secret"), manager.secret_file_text())?;
    // The agent lets its own key in only where nobody else can have it.
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(file("agent.key_secret"), private)?;
    let options = NodeOptions {
        agent: format!(
            "rpc-auth-agent-keypair = \"{}\"\nrpc-auth-manager-public-key = \"{}\"\n",
            file("agent.key_secret"),
            file("manager.key_secret")
        ),
        curve: Some((manager.clone(), agent.public)),
        ..NodeOptions::default()
    };
    let node = Node::start(options).await?;
    // An operator on the node needs no key of the manager.
    let listed = Command::new(program("bai-agent")?)
        .args(["kernel", "list", "--standalone", "--config"])
        .arg(node.config_file())
        .env_remove("BAI_AGENT_ADDRESS")
        .output()?;
    ensure!(listed.status.success(), "{listed:?}");
    let (address, public, secret) = (
        node.address().to_owned(),
        agent.public.to_z85(),
        file("manager.key_secret"),
    );
    tokio::task::spawn_blocking(move || {
        python::check(
            &python,
            "node_peer.py",
            &["--refused", &address, &public, &secret],
        )?;
        python::check(
            &python,
            "node_peer.py",
            &[&address, &image, &public, &secret],
        )
    })
    .await??;
    ensure!(node.containers()?.is_empty(), "a container is left");
    Ok(())
}

#[test]
fn model_definitions_are_read_as_the_published_agent_reads_them() -> Result<()> {
    let Some(python) = python::interpreter("published_client")? else {
        return Ok(());
    };
    let model = "models:\n- name: m\n  model_path: /m\n";
    let service = format!("{model}  service:\n    start_command: serve --all\n");
    let check = format!("{service}    port: 80\n    health_check:\n      path: /\n");
    let definitions = [
        model.to_owned(),
        format!("{model}  service:\n  metadata:\n"),
        format!("{service}    port: 8000\n"),
        format!("{service}    port: '8000'\n    shell: /bin/sh\n"),
        format!("{service}    port: 8000.0\n    pre_start_actions:\n    health_check:\n"),
        format!(
            "{service}    port: 80\n    pre_start_actions: [{{action: mkdir, args: {{path: /x}}}}]\n"
        ),
        format!("{check}      interval: 5\n      max_retries: '3'\n"),
        format!("{check}      interval: 2.5\n      expected_status_code: 204\n"),
        format!("{check}      max_retries: 1\n      expected_status_code: 100\n"),
        format!("{service}    port: 1\n"),
        format!(
            "{model}  service: &s\n    start_command: serve\n    port: 80\n- &n\n  name: n\n  model_path: /n\n  service: &t\n    <<: *s\n    port: 81\n- <<: *n\n  service:\n    <<: [{{shell: /bin/a, port: 82}}, *t]\n"
        ),
        format!("{model}  <<: []\n"),
        // Refused.
        format!("{check}      max_retries: 0\n"),
        format!("{check}      expected_status_code: 99\n"),
        format!("{service}    port: 0\n"),
        format!("{model}  <<: 3\n"),
        "models: 3\n".to_owned(),
        format!("{model}extra: 1\n"),
        format!("{model}  extra: 1\n"),
        format!("{service}    port: 80\n    health_chek: {{path: /}}\n"),
        format!("{service}    port: many\n"),
        format!("{service}    port:\n"),
        service.clone(),
        format!("{check}      intervall: 5\n"),
        format!("{check}      interval: soon\n"),
        format!(
            "{service}    port: 80\n    pre_start_actions: [{{action: mkdir, args: {{}}, reff: x}}]\n"
        ),
        format!("{model}  service:\n    start_command: [serve, 1]\n    port: 80\n"),
    ];
    let folder = tempfile::tempdir()?;
    let mut files = Vec::new();
    for (number, text) in definitions.iter().enumerate() {
        let file = folder.path().join(format!("{number}.yaml"));
        std::fs::write(&file, text)?;
        files.push(file.display().to_string());
    }
    let arguments: Vec<&str> = files.iter().map(String::as_str).collect();
    let said = python::check(&python, "model_definitions.py", &arguments)?;
    ensure!(said.lines().count() == definitions.len(), "{said}");
    let mut taken = 0;
    for (number, (definition, theirs)) in definitions.iter().zip(said.lines()).enumerate() {
        let config = serde_json::from_value(json!({
            "image": {"canonical": "a/b:c"},
            "kernel_id": "44843cf7-7964-4cd9-8c60-f8e4fdc69e3a",
            "session_id": "a61cd3c8-03c5-4ac1-abcd-0246dc7e82f8",
            "session_type": "inference",
            "internal_data": {"runtime_variant": "custom", "model_definition_path": format!("{number}.yaml")},
            "mounts": [{"name": "m", "host_path": folder.path(), "kernel_path": "/m", "mount_perm": "ro", "usage_mode": "model"}],
        }))?;
        match (model_definition::read(&config, &[]), theirs) {
            (Err(_), "refused") => {}
            (Ok(models), theirs) if theirs != "refused" => {
                let mut ours = serde_json::to_value(&models)?;
                let mut theirs: Value = serde_json::from_str(theirs)?;
                for models in [&mut ours, &mut theirs] {
                    // The runner takes nothing for no actions, and the metadata is nobody's here.
                    for model in models.as_array_mut().into_iter().flatten() {
                        model["metadata"] = Value::Null;
                        if model["service"]["pre_start_actions"].is_null()
                            && model["service"].is_object()
                        {
                            model["service"]["pre_start_actions"] = json!([]);
                        }
                    }
                }
                ensure!(ours == theirs, "{definition}\nours {ours}\ntheirs {theirs}");
                taken += 1;
            }
            (ours, theirs) => anyhow::bail!("{definition}\nours {ours:?}\ntheirs {theirs}"),
        }
    }
    ensure!(taken == 12, "{taken} were taken:\n{said}");
    Ok(())
}
