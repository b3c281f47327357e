//! The environment of a container, and its copy for the runner in `environ.txt`.
//!
//! In: the request's variables, the user rules, the allocated devices. Out: ordered variables
//! and the text of the file. Invariant: one line per variable whatever a value
//! holds, since the runner stops reading at the first line it can't split.

use super::request::{KernelCreationConfig, TextMap};
use super::resource_text::scaled;
pub use crate::resource::AttachedDevice;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Who runs in the container, and who owns the files given to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// `LOCAL_USER_ID`; unset lets the entrypoint choose (9001).
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// The node's group, kept as an additional one when the request overrides the main group.
    pub kept_gid: Option<u32>,
}

impl Identity {
    /// Applies the node's `container.kernel-uid`/`kernel-gid` under the request's overrides.
    pub fn of(config: &KernelCreationConfig, kernel_uid: u32, kernel_gid: u32) -> Self {
        let matched = config.image.has_feature("uid-match");
        Self {
            uid: config.uid.or(matched.then_some(kernel_uid)),
            gid: config.main_gid.or(matched.then_some(kernel_gid)),
            kept_gid: (config.main_gid.is_some() && matched).then_some(kernel_gid),
        }
    }
}

/// What the variables depend on besides the request.
#[derive(Debug, Clone, Default)]
pub struct EnvironmentInputs<'a> {
    /// Number of cores allocated.
    pub cores: usize,
    /// Device plugin name to its attached devices, in allocation order.
    pub attached: &'a [(String, Vec<AttachedDevice>)],
    /// Groups that accelerators need.
    pub accelerator_gids: &'a [u32],
    /// File names of accelerator hook libraries in `/opt/kernel`.
    pub hooks: &'a [String],
    /// First and last: name of the first model, path of the last (inference).
    pub model: Option<(&'a str, &'a str)>,
}

/// The groups beside the main one that a container's variables name; what is no number is left out.
pub fn additional_gids(environ: &TextMap) -> BTreeSet<u32> {
    environ
        .get("ADDITIONAL_GIDS")
        .unwrap_or_default()
        .split(',')
        .filter_map(|gid| gid.trim().parse().ok())
        .collect()
}

/// The variables of a container, in the original's order.
pub fn variables(
    config: &KernelCreationConfig,
    identity: Identity,
    given: &EnvironmentInputs<'_>,
) -> TextMap {
    let mut environ = config.environ.clone();
    if let Some(uid) = identity.uid {
        environ.insert("LOCAL_USER_ID", uid.to_string());
    }
    if let Some(gid) = identity.gid {
        environ.insert("LOCAL_GROUP_ID", gid.to_string());
    }
    let mut gids = additional_gids(&environ);
    gids.extend(&config.supplementary_gids);
    gids.extend(identity.kept_gid);
    gids.extend(given.accelerator_gids);
    if gids.is_empty() {
        environ.remove("ADDITIONAL_GIDS");
    } else {
        let gids: Vec<String> = gids.iter().map(u32::to_string).collect();
        environ.insert("ADDITIONAL_GIDS", gids.join(","));
    }
    let hooks = given.hooks.iter().map(|hook| format!("/opt/kernel/{hook}"));
    let preload: Vec<String> = std::iter::once("/opt/kernel/libbaihook.so".to_owned())
        .chain(hooks)
        .collect();
    // A user's own LD_PRELOAD is replaced, as in the original.
    environ.insert("LD_PRELOAD", preload.join(":"));
    for name in config
        .image
        .label_or("ai.backend.envs.corecount", "")
        .split(',')
    {
        let name = name.trim();
        if !name.is_empty() && !environ.contains(name) {
            environ.insert(name, given.cores.to_string());
        }
    }
    accelerator_variables(&mut environ, given.attached);
    if let Some((name, path)) = given.model {
        if !environ.contains("BACKEND_MODEL_NAME") {
            environ.insert("BACKEND_MODEL_NAME", name);
        }
        environ.insert("BACKEND_MODEL_PATH", path);
    }
    environ
}

/// `GPU_*` of the first accelerator with attached devices; zero counts when there is none.
///
/// The original looks only at the first accelerator plugin and reports 0 for a second one that is
/// used; here the first *used* one counts.
fn accelerator_variables(environ: &mut TextMap, attached: &[(String, Vec<AttachedDevice>)]) {
    let accelerator = attached
        .iter()
        .find(|(name, devices)| !matches!(name.as_str(), "cpu" | "mem") && !devices.is_empty());
    let Some((name, devices)) = accelerator else {
        environ.insert("GPU_COUNT", "0");
        environ.insert("N_GPUS", "0");
        return;
    };
    environ.insert("GPU_TYPE", name.as_str());
    environ.insert("GPU_MODEL_NAME", devices[0].model_name.as_str());
    let memory: Vec<u64> = devices.iter().map(device_memory).collect();
    let list = |text: fn(u64) -> String| {
        let entries = memory.iter().enumerate();
        entries
            .map(|(index, bytes)| format!("{index}:{}", text(*bytes)))
            .collect::<Vec<_>>()
            .join(",")
    };
    environ.insert("GPU_CONFIG", list(scaled));
    environ.insert(
        "TF_GPU_MEMORY_ALLOC",
        list(|bytes| (bytes >> 20).to_string()),
    );
    environ.insert("GPU_COUNT", devices.len().to_string());
    environ.insert("N_GPUS", devices.len().to_string());
}

fn device_memory(device: &AttachedDevice) -> u64 {
    let memory = device.data.get("mem");
    memory
        .and_then(|memory| match memory {
            serde_json::Value::String(text) => super::resource_text::parse_binary_size(text),
            other => other.as_u64(),
        })
        .unwrap_or(0)
}

/// The variables as Docker's `Env` list, with the device plugins' own entries after them.
pub fn env_list(environ: &TextMap, device_env: &[String]) -> Vec<String> {
    let entries = environ
        .iter()
        .map(|(name, value)| format!("{name}={value}"));
    entries.chain(device_env.iter().cloned()).collect()
}

/// The text of `environ.txt`: `NAME=value` lines without quoting. What fits on no line is left out, as names
/// that are none: the runner has it from the container's own environment (Docker's `Env`), which the file would
/// overrule.
pub fn render(environ: &TextMap, device_env: &[String]) -> String {
    let mut text = String::new();
    for entry in env_list(environ, device_env) {
        let Some((name, value)) = entry.split_once('=') else {
            continue;
        };
        let is_name =
            !name.is_empty() && !name.chars().any(|c| c.is_whitespace() || c.is_control());
        if is_name && !value.contains(breaks_a_line) {
            text.push_str(&entry);
            text.push('\n');
        }
    }
    text
}

/// Python splits lines at more characters than LF.
fn breaks_a_line(c: char) -> bool {
    matches!(
        c,
        '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}' | '\0'
    )
}

/// The variables of a rendered file, for a journal that was lost.
pub fn parse(text: &str) -> TextMap {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn request(extra: serde_json::Value) -> KernelCreationConfig {
        let mut config = json!({
            "image": {"canonical": "a/b:c", "labels": {"ai.backend.envs.corecount": "OPENBLAS_NUM_THREADS,OMP_NUM_THREADS"}},
            "kernel_id": "44843cf7-7964-4cd9-8c60-f8e4fdc69e3a",
            "session_id": "a61cd3c8-03c5-4ac1-abcd-0246dc7e82f8",
        });
        for (name, value) in extra.as_object().unwrap() {
            config[name] = value.clone();
        }
        serde_json::from_value(config).unwrap()
    }

    fn list(config: &KernelCreationConfig, given: &EnvironmentInputs<'_>) -> Vec<String> {
        env_list(
            &variables(config, Identity::of(config, 1000, 1000), given),
            &[],
        )
    }

    #[test]
    fn user_and_group_follow_the_rules() {
        let plain = request(json!({}));
        assert_eq!(
            Identity::of(&plain, 1000, 1001),
            Identity {
                uid: Some(1000),
                gid: Some(1001),
                kept_gid: None
            }
        );
        let other = request(json!({"uid": 1500, "main_gid": 1600}));
        assert_eq!(
            Identity::of(&other, 1000, 1001),
            Identity {
                uid: Some(1500),
                gid: Some(1600),
                kept_gid: Some(1001)
            }
        );
        let unmatched = request(
            json!({"uid": 1500, "image": {"canonical": "a", "labels": {"ai.backend.features": "batch"}}}),
        );
        assert_eq!(
            Identity::of(&unmatched, 1000, 1001),
            Identity {
                uid: Some(1500),
                gid: None,
                kept_gid: None
            }
        );
    }

    #[test]
    fn variables_follow_the_originals_order() {
        let config = request(json!({
            "environ": {"LD_PRELOAD": "/evil.so", "OMP_NUM_THREADS": "8"},
            "uid": 1500, "main_gid": 1600, "supplementary_gids": [1701, 1700],
        }));
        assert_eq!(
            list(
                &config,
                &EnvironmentInputs {
                    cores: 2,
                    hooks: &["libcudahook.so".into()],
                    ..EnvironmentInputs::default()
                }
            ),
            [
                "LD_PRELOAD=/opt/kernel/libbaihook.so:/opt/kernel/libcudahook.so",
                "OMP_NUM_THREADS=8",
                "LOCAL_USER_ID=1500",
                "LOCAL_GROUP_ID=1600",
                "ADDITIONAL_GIDS=1000,1700,1701",
                "OPENBLAS_NUM_THREADS=2",
                "GPU_COUNT=0",
                "N_GPUS=0",
            ]
        );
    }

    #[test]
    fn accelerators_are_described() {
        let device = |id: &str| AttachedDevice {
            device_id: id.into(),
            model_name: "H".into(),
            data: serde_json::from_value(json!({"mem": 85_899_345_920_u64})).unwrap(),
        };
        let attached = [
            (
                "cpu".to_owned(),
                vec![AttachedDevice {
                    device_id: "0".into(),
                    model_name: String::new(),
                    data: Default::default(),
                }],
            ),
            ("rocm".to_owned(), vec![]),
            ("cuda".to_owned(), vec![device("a"), device("b")]),
        ];
        let environ = variables(
            &request(json!({})),
            Identity {
                uid: None,
                gid: None,
                kept_gid: None,
            },
            &EnvironmentInputs {
                attached: &attached,
                ..EnvironmentInputs::default()
            },
        );
        assert_eq!(environ.get("GPU_TYPE"), Some("cuda"));
        assert_eq!(environ.get("GPU_MODEL_NAME"), Some("H"));
        assert_eq!(environ.get("GPU_CONFIG"), Some("0:80g,1:80g"));
        assert_eq!(environ.get("TF_GPU_MEMORY_ALLOC"), Some("0:81920,1:81920"));
        assert_eq!(environ.get("GPU_COUNT"), Some("2"));
        assert_eq!(environ.get("N_GPUS"), Some("2"));
        assert_eq!(environ.get("LOCAL_USER_ID"), None);
    }

    #[test]
    fn what_fits_on_no_line_is_left_to_the_container() {
        let environ: TextMap = [
            ("A", "x\ny"),
            ("B C", "1"),
            ("D", "e=f"),
            ("E", "g\r"),
            ("F", "h\u{2028}i"),
        ]
        .into_iter()
        .collect();
        let text = render(
            &environ,
            &["NVIDIA_VISIBLE_DEVICES=0".into(), "broken".into()],
        );
        assert_eq!(text, "D=e=f\nNVIDIA_VISIBLE_DEVICES=0\n");
        assert_eq!(parse(&text).get("D"), Some("e=f"));
        assert_eq!(env_list(&environ, &[])[0], "A=x\ny");
    }

    #[test]
    fn model_variables() {
        let config = request(json!({"environ": {"BACKEND_MODEL_NAME": "mine"}}));
        let environ = variables(
            &config,
            Identity::of(&config, 1, 1),
            &EnvironmentInputs {
                model: Some(("m", "/models")),
                ..EnvironmentInputs::default()
            },
        );
        assert_eq!(environ.get("BACKEND_MODEL_NAME"), Some("mine"));
        assert_eq!(environ.get("BACKEND_MODEL_PATH"), Some("/models"));
    }
}
