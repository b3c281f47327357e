//! Models of inference sessions: what is started in the container, and how it is known to serve.
//!
//! In: the request's model folder and runtime variant, the image's command. Out: the [`Model`]s, in
//! the form of the runner's `start-model-service`. Invariants: the definition
//! is a file of the user's: it is read inside the folder only, up to a size, also of what its aliases make
//! of it, and refused in words; what
//! the original takes is taken (numbers in quotes, keys without a value), and a key nobody knows is
//! refused as it does: a misspelt health check would be none.

mod extent;
mod merge;

use super::mounts;
use super::request::{KernelCreationConfig, SessionType, VfolderMount, VfolderUsage};
use super::scratch::beneath::Beneath;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use thiserror::Error;

/// Largest definition read; real ones have under a kilobyte.
const SIZE_LIMIT: u64 = 256 << 10;
/// Most models of one definition.
const MODELS_LIMIT: usize = 64;

/// One model, as the runner is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub name: String,
    /// Directory in the container in which the command runs.
    #[serde(alias = "model-path")]
    pub model_path: String,
    #[serde(default)]
    pub service: Option<ModelService>,
    #[serde(default)]
    pub metadata: Option<Value>,
}

impl Model {
    /// The container port the model serves on, if it serves.
    pub fn port(&self) -> Option<u16> {
        self.service.as_ref().map(|service| service.port)
    }
}

/// How a model is started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelService {
    /// What the runner does before, in order.
    #[serde(
        default,
        alias = "pre-start-actions",
        deserialize_with = "null_is_default"
    )]
    pub pre_start_actions: Vec<PreStartAction>,
    /// What serves the model.
    #[serde(alias = "start-command")]
    pub start_command: StartCommand,
    /// The shell of a command that is a text; a path in the container.
    #[serde(default = "default_shell")]
    pub shell: String,
    /// The container port it serves on, 1 to 65535.
    #[serde(deserialize_with = "number")]
    pub port: u16,
    /// How its health is found out; not at all without it.
    #[serde(default, alias = "health-check")]
    pub health_check: Option<HealthCheck>,
}

fn default_shell() -> String {
    "/bin/bash".to_owned()
}

/// An action of the runner before the start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreStartAction {
    /// Its name, as the runner knows it (`run_command`).
    pub action: String,
    /// Its arguments by name.
    #[serde(default)]
    pub args: serde_json::Map<String, Value>,
}

/// A shell command or a list of arguments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts is expected")]
pub enum StartCommand {
    /// For the shell.
    Shell(String),
    /// A program and its arguments.
    Arguments(Vec<String>),
}

/// How the runner finds out that a model serves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// Seconds between two tries; 10 unless set.
    #[serde(default = "ten", deserialize_with = "number_or_ten")]
    pub interval: f64,
    /// Path of the URL that is asked for.
    pub path: String,
    /// How many tries in a row may fail: with one more it is unhealthy. 10 unless set.
    #[serde(
        default = "ten_tries",
        alias = "max-retries",
        deserialize_with = "number_or_ten_tries"
    )]
    pub max_retries: u32,
    /// Seconds for one try; 15 unless set.
    #[serde(
        default = "fifteen",
        alias = "max-wait-time",
        deserialize_with = "number_or_fifteen"
    )]
    pub max_wait_time: f64,
    /// HTTP status of a healthy answer; 200 unless set.
    #[serde(
        default = "http_ok",
        alias = "expected-status-code",
        deserialize_with = "number_or_http_ok"
    )]
    pub expected_status_code: u16,
}

fn ten() -> f64 {
    10.0
}
fn ten_tries() -> u32 {
    10
}
fn fifteen() -> f64 {
    15.0
}
fn http_ok() -> u16 {
    200
}

fn number_or_ten<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(number_or_nothing(from)?.unwrap_or_else(ten))
}
fn number_or_ten_tries<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    Ok(number_or_nothing(from)?.unwrap_or_else(ten_tries))
}
fn number_or_fifteen<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(number_or_nothing(from)?.unwrap_or_else(fifteen))
}
fn number_or_http_ok<'de, D: Deserializer<'de>>(from: D) -> Result<u16, D::Error> {
    Ok(number_or_nothing(from)?.unwrap_or_else(http_ok))
}

fn number<'de, D: Deserializer<'de>, T: FromStr>(from: D) -> Result<T, D::Error> {
    number_or_nothing(from)?.ok_or_else(|| D::Error::custom("a number is missing"))
}

/// A number, also one in quotes; `None` for a key without a value.
fn number_or_nothing<'de, D: Deserializer<'de>, T: FromStr>(
    from: D,
) -> Result<Option<T>, D::Error> {
    let value = Value::deserialize(from)?;
    let text = match &value {
        Value::Null => return Ok(None),
        Value::String(text) => text.trim().to_owned(),
        // 8000.0 is a whole number, too.
        Value::Number(number) => match (number.as_u64(), number.as_f64()) {
            (None, Some(fraction)) => fraction.to_string(),
            _ => number.to_string(),
        },
        _ => String::new(),
    };
    let parsed = text.parse().map(Some);
    parsed.map_err(|_| D::Error::custom(format!("{value} is no number that fits here")))
}

fn null_is_default<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// Why an inference session has no models. All are the request's or the folder's fault.
#[derive(Debug, Error)]
pub enum ModelDefinitionError {
    #[error("an inference session needs a folder of the usage mode `model`; none is mounted")]
    NoFolder,
    #[error(
        "the runtime variant {0:?} is not known; use custom, vllm, huggingface-tgi, nim or cmd"
    )]
    Variant(String),
    #[error(
        "the image has no command to start, which the runtime variant {0} needs; choose another image or the variant custom"
    )]
    NoCommand(String),
    #[error("the model folder {0} cannot be opened on this node")]
    Folder(PathBuf, #[source] io::Error),
    #[error("the model folder has no {0}; add the model definition or name its path")]
    NoFile(String),
    #[error("{path} of the model folder cannot be read")]
    Read {
        path: String,
        #[source]
        cause: io::Error,
    },
    #[error("{path} of the model folder is not a model definition")]
    Yaml {
        path: String,
        #[source]
        cause: serde_yaml_ng::Error,
    },
    #[error("{path} of the model folder is not a model definition: {wrong}")]
    Content { path: String, wrong: String },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Definition {
    models: Vec<Model>,
}

/// The folder that an inference session has its model in.
pub fn folder(config: &KernelCreationConfig) -> Option<&VfolderMount> {
    config
        .mounts
        .iter()
        .find(|mount| mount.usage_mode == VfolderUsage::Model)
}

/// The models of a request; none unless it is an inference session. Reads the folder: blocks.
///
/// # Errors
/// See [`ModelDefinitionError`].
pub fn read(
    config: &KernelCreationConfig,
    image_command: &[String],
) -> Result<Vec<Model>, ModelDefinitionError> {
    if config.session_type != SessionType::Inference {
        return Ok(Vec::new());
    }
    let folder = folder(config).ok_or(ModelDefinitionError::NoFolder)?;
    let variant = config.internal_data.runtime_variant.as_deref();
    let variant = variant
        .filter(|variant| !variant.is_empty())
        .unwrap_or("custom");
    // Name, port and health path of the variants that need no file.
    let (name, port, path) = match variant {
        "custom" => {
            let wanted = config.internal_data.model_definition_path.as_deref();
            return custom(folder, wanted.filter(|path| !path.is_empty()));
        }
        "vllm" => ("vllm-model", 8000, Some("/health")),
        "huggingface-tgi" => ("tgi-model", 3000, Some("/info")),
        "nim" => ("nim-model", 8000, Some("/v1/health/ready")),
        "cmd" => ("image-model", 8000, None),
        other => return Err(ModelDefinitionError::Variant(other.to_owned())),
    };
    if image_command.is_empty() {
        return Err(ModelDefinitionError::NoCommand(variant.to_owned()));
    }
    let service = ModelService {
        pre_start_actions: Vec::new(),
        start_command: StartCommand::Arguments(image_command.to_vec()),
        shell: default_shell(),
        port,
        health_check: path.map(|path| HealthCheck {
            interval: ten(),
            path: path.to_owned(),
            max_retries: ten_tries(),
            max_wait_time: fifteen(),
            expected_status_code: http_ok(),
        }),
    };
    Ok(vec![Model {
        name: name.to_owned(),
        model_path: folder.kernel_path.clone(),
        service: Some(service),
        metadata: None,
    }])
}

fn custom(folder: &VfolderMount, wanted: Option<&str>) -> Result<Vec<Model>, ModelDefinitionError> {
    let path = Path::new(&folder.host_path);
    let inner = mounts::inner(folder).unwrap_or_default();
    let inside = match mounts::part(path, inner) {
        Some(part) => Beneath::open(&part.folder).and_then(|it| it.below(&part.below)),
        None => Beneath::open(path),
    };
    let inside = inside.map_err(|cause| ModelDefinitionError::Folder(path.to_owned(), cause))?;
    let usual = ["model-definition.yaml", "model-definition.yml"];
    let paths = wanted.map_or(usual.to_vec(), |path| vec![path]);
    for path in &paths {
        match inside.read(Path::new(path.trim_start_matches('/')), SIZE_LIMIT) {
            Ok(text) => return parse(path, &text),
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            Err(cause) => {
                return Err(ModelDefinitionError::Read {
                    path: (*path).to_owned(),
                    cause,
                });
            }
        }
    }
    Err(ModelDefinitionError::NoFile(paths.join(" or ")))
}

fn definition(text: &[u8]) -> Result<Definition, serde_yaml_ng::Error> {
    extent::check(text)?;
    if text.windows(2).any(|two| two == b"<<") {
        let mut value: serde_yaml_ng::Value = serde_yaml_ng::from_slice(text)?;
        if merge::fold(&mut value)? {
            return serde_yaml_ng::from_value(value);
        }
    }
    // As it is: of keys that come twice the last one counts, and errors name the line.
    serde_yaml_ng::from_slice(text)
}

fn parse(path: &str, text: &[u8]) -> Result<Vec<Model>, ModelDefinitionError> {
    let definition = definition(text).map_err(|cause| ModelDefinitionError::Yaml {
        path: path.to_owned(),
        cause,
    })?;
    let refuse = |wrong: String| ModelDefinitionError::Content {
        path: path.to_owned(),
        wrong,
    };
    let models = definition.models;
    if models.len() > MODELS_LIMIT {
        return Err(refuse(format!("it has more than {MODELS_LIMIT} models")));
    }
    for model in &models {
        let name = &model.name;
        if name.is_empty() {
            return Err(refuse("a model has no name".to_owned()));
        }
        if let Some(service) = &model.service {
            if service.port == 0 {
                return Err(refuse(format!("the port of {name} is 0")));
            }
            let health = service.health_check.as_ref();
            let seconds = |value: f64| value.is_finite() && value > 0.0;
            if health.is_some_and(|check| !seconds(check.interval) || !seconds(check.max_wait_time))
            {
                return Err(refuse(format!(
                    "the times of the health check of {name} are not above 0"
                )));
            }
            if health.is_some_and(|check| check.max_retries == 0) {
                return Err(refuse(format!(
                    "max_retries of the health check of {name} is 0; it needs 1 at least"
                )));
            }
            if health.is_some_and(|check| check.expected_status_code < 100) {
                return Err(refuse(format!(
                    "expected_status_code of the health check of {name} is below 100"
                )));
            }
        }
    }
    Ok(models)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    fn request(folder: &Path, internal: Value) -> KernelCreationConfig {
        serde_json::from_value(json!({
            "image": {"canonical": "a/b:c"},
            "kernel_id": "44843cf7-7964-4cd9-8c60-f8e4fdc69e3a",
            "session_id": "a61cd3c8-03c5-4ac1-abcd-0246dc7e82f8",
            "session_type": "inference",
            "internal_data": internal,
            "mounts": [
                {"name": "d", "host_path": "/x", "kernel_path": "/home/work/d", "mount_perm": "ro"},
                {"name": "m", "host_path": folder, "kernel_path": "/models", "mount_perm": "ro", "usage_mode": "model"},
            ],
        }))
        .unwrap()
    }

    #[test]
    fn a_custom_definition_becomes_the_captured_message() {
        let folder = tempfile::tempdir().unwrap();
        let yaml = "models:\n- name: m1\n  model_path: /models\n  service:\n    start_command: [python3, -m, http.server, '8500']\n    port: 8500\n    health_check:\n      path: /\n      interval: 1\n      max_retries: 3\n      max_wait_time: 5\n";
        fs::write(folder.path().join("model-definition.yml"), yaml).unwrap();
        let models = read(&request(folder.path(), Value::Null), &[]).unwrap();
        assert_eq!(models[0].port(), Some(8500));
        assert_eq!(
            serde_json::to_value(&models[0]).unwrap(),
            json!({"name": "m1", "model_path": "/models", "service": {"pre_start_actions": [], "start_command": ["python3", "-m", "http.server", "8500"], "shell": "/bin/bash", "port": 8500, "health_check": {"interval": 1.0, "path": "/", "max_retries": 3, "max_wait_time": 5.0, "expected_status_code": 200}}, "metadata": null})
        );
    }

    #[test]
    fn variants_use_the_images_command() {
        let folder = Path::new("/nowhere");
        let command = ["serve".to_owned(), "--all".to_owned()];
        for (variant, name, port, path) in [
            ("vllm", "vllm-model", 8000, Some("/health")),
            ("huggingface-tgi", "tgi-model", 3000, Some("/info")),
            ("nim", "nim-model", 8000, Some("/v1/health/ready")),
            ("cmd", "image-model", 8000, None),
        ] {
            let config = request(folder, json!({"runtime_variant": variant}));
            let models = read(&config, &command).unwrap();
            let service = models[0].service.clone().unwrap();
            assert_eq!((models[0].name.as_str(), service.port), (name, port));
            assert_eq!(models[0].model_path, "/models");
            assert_eq!(
                service.health_check.map(|check| check.path).as_deref(),
                path
            );
            assert!(matches!(
                read(&config, &[]),
                Err(ModelDefinitionError::NoCommand(_))
            ));
        }
        let config = request(folder, json!({"runtime_variant": "magic"}));
        assert!(matches!(
            read(&config, &command),
            Err(ModelDefinitionError::Variant(_))
        ));
    }

    #[test]
    fn a_definition_outside_the_folder_is_not_read() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("f");
        fs::create_dir(&folder).unwrap();
        let secret = outer.path().join("secret.yaml");
        fs::write(&secret, "models: []\n").unwrap();
        std::os::unix::fs::symlink(&secret, folder.join("model-definition.yaml")).unwrap();
        for path in [Value::Null, json!("../secret.yaml")] {
            let config = request(&folder, json!({"model_definition_path": path}));
            assert!(matches!(
                read(&config, &[]),
                Err(ModelDefinitionError::Read { .. })
            ));
        }
        let config = request(&folder, json!({"model_definition_path": "other.yaml"}));
        let told = read(&config, &[]).unwrap_err().to_string();
        assert!(told.contains("other.yaml"), "{told}");
    }

    #[test]
    fn broken_and_huge_definitions_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model-definition.yaml");
        let config = request(folder.path(), Value::Null);
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nmodels:\n- name: m\n  model_path: /m\n  metadata: [*g,*g,*g,*g,*g,*g,*g,*g]\n";
        for text in [
            "",
            "models: 3",
            "models:\n- name: m\n",
            "models:\n- {name: m, model_path: /m, service: {start_command: x, port: 99999}}",
            "models:\n- {name: m, model_path: /m, service: {start_command: x, port: 0}}",
            "models:\n- {name: m, model_path: /m, service: {start_command: x, port: 8000, health_check: {path: /, max_retries: 0}}}",
            "models:\n- {name: m, model_path: /m, service: {start_command: x, port: 8000, health_check: {path: /, expected_status_code: 99}}}",
            "models:\n- {name: m, model_path: /m, <<: 3}",
            "models:\n- {name: '', model_path: /m}",
            "models:\n- {name: m, model_path: /m, service: {start_command: x, port: 8000, health_check: {path: /, interval: 0}}}",
            "\0\u{1}",
            bomb,
        ] {
            fs::write(&file, text).unwrap();
            assert!(read(&config, &[]).is_err(), "{text}");
        }
        fs::write(&file, vec![b' '; 300 << 10]).unwrap();
        let told = read(&config, &[]).unwrap_err();
        assert!(
            matches!(told, ModelDefinitionError::Read { .. }),
            "{told:?}"
        );
    }

    #[test]
    fn aliases_do_not_make_more_of_a_file_than_fits() {
        let long = "x".repeat(128 << 10);
        for (name, times) in [
            (format!("\"{long}\""), 43_000),
            ("[[]]".to_owned(), 80_000),
            ("!a [{b: !c d}, 1, true, null, 1.5]".to_owned(), 20_000),
        ] {
            let aliases = "*a,".repeat(times);
            let text = format!("models: [{{model_path: &a {name}, metadata: [{aliases}]}}]");
            assert!(text.len() < 1 << 19, "{}", text.len());
            let told = extent::check(text.as_bytes()).map_err(|err| err.to_string());
            let told = told.expect_err(&name[..20.min(name.len())]);
            assert!(told.contains("aliases"), "{told}");
            let err = parse("a.yaml", text.as_bytes()).unwrap_err();
            assert!(matches!(err, ModelDefinitionError::Yaml { .. }), "{err:?}");
        }
        // Numbers are no text, and may be as long to read.
        let told = extent::within(b"models: [1]", std::time::Duration::ZERO);
        assert!(told.unwrap_err().to_string().contains("in 2 s"));
        let text =
            "models:\n- &m {name: !t m, model_path: &p /m}\n- {name: n, model_path: *p}\n- *m\n";
        assert_eq!(parse("a.yaml", text.as_bytes()).unwrap().len(), 3);
    }

    #[test]
    fn maps_may_be_merged() {
        let text = "models:\n- &m {name: m, model_path: /m, service: &s {start_command: serve, port: 80}}\n- {<<: *m, name: n, service: {<<: *s, port: 81}}\n";
        let models = parse("a.yaml", text.as_bytes()).unwrap();
        let told: Vec<_> = models
            .iter()
            .map(|model| (model.name.as_str(), model.port()))
            .collect();
        assert_eq!(told, [("m", Some(80)), ("n", Some(81))]);
        assert_eq!(models[1].model_path, "/m");
        // A key that nobody knows is none in what is merged either.
        let text = format!("{text}- {{<<: *m, extra: 1}}\n");
        let told = crate::causes::chain(&parse("a.yaml", text.as_bytes()).unwrap_err());
        assert!(told.contains("extra"), "{told}");
    }

    #[test]
    fn numbers_may_stand_in_quotes_and_keys_without_a_value() {
        let text = "models:\n- name: m\n  model_path: /m\n  metadata:\n  service:\n    pre_start_actions:\n    start_command: serve\n    port: '8000'\n    health_check:\n      path: /up\n      interval:\n      max_retries: '3'\n      max_wait_time: 2.5\n      expected_status_code:\n";
        let models = parse("a.yaml", text.as_bytes()).unwrap();
        assert_eq!(
            serde_json::to_value(&models[0]).unwrap(),
            json!({"name": "m", "model_path": "/m", "metadata": null, "service": {
                "pre_start_actions": [], "start_command": "serve", "shell": "/bin/bash", "port": 8000,
                "health_check": {"interval": 10.0, "path": "/up", "max_retries": 3, "max_wait_time": 2.5, "expected_status_code": 200},
            }})
        );
        let text = "models:\n- name: m\n  model_path: /m\n  service:\n    start_command: serve\n    port: 8000.0\n    health_check:\n";
        let models = parse("a.yaml", text.as_bytes()).unwrap();
        assert_eq!(models[0].port(), Some(8000));
    }

    #[test]
    fn what_is_wrong_in_a_definition_is_named() {
        let service = "models:\n- name: m\n  model_path: /m\n  service:\n    ";
        for (rest, word) in [
            (
                "start_command: x\n    port: 80\n    health_chek: {path: /}",
                "health_chek",
            ),
            ("start_command: x\n    port: many", "many"),
            ("start_command: x\n    port:", "missing"),
            ("start_command: x\n    port: 80.5", "80.5"),
            ("start_command: [x, 1]\n    port: 80", "list of texts"),
            (
                "start_command: x\n    port: 80\n    pre_start_actions: [{action: mkdir, args: {}, reff: y}]",
                "reff",
            ),
        ] {
            let err = parse("a.yaml", format!("{service}{rest}\n").as_bytes()).unwrap_err();
            let told = crate::causes::chain(&err);
            assert!(told.contains(word) && told.contains("a.yaml"), "{told}");
        }
    }

    #[test]
    fn other_sessions_have_no_models() {
        let mut config = request(Path::new("/nowhere"), Value::Null);
        config.mounts.clear();
        assert!(matches!(
            read(&config, &[]),
            Err(ModelDefinitionError::NoFolder)
        ));
        config.session_type = SessionType::Interactive;
        assert!(read(&config, &[]).unwrap().is_empty());
    }
}
