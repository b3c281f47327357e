//! Captures of the real manager and agent decode to their stated meaning, and what we write is
//! byte for byte what the original wrote wherever no pickle is involved.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use control::rpc::frame::{self, Envelope, Header, Kind, Message};
use control::rpc::msgpack::DecodeLimits;
use control::rpc::{Arguments, Failure, Value, catalogue, from_value};
use serde_json::Value as Json;

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/rpc")
}

fn load(name: &str) -> Json {
    let path = vectors().join(format!("{name}.json"));
    let text = fs::read_to_string(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()));
    serde_json::from_str(&text).expect("a vector is JSON")
}

fn unhex(text: &str) -> Bytes {
    let digits: Vec<u8> = text
        .bytes()
        .map(|digit| u8::try_from(char::from(digit).to_digit(16).expect("hex")).expect("a digit"))
        .collect();
    digits
        .as_chunks::<2>()
        .0
        .iter()
        .map(|[high, low]| high << 4 | low)
        .collect()
}

fn frames(list: &Json) -> Vec<Bytes> {
    let list = list.as_array().expect("frames");
    list.iter()
        .map(|frame| unhex(frame.as_str().expect("hex")))
        .collect()
}

/// A value of the capture's notation. Ext values are packed anew and decoded on their own; their
/// meaning is checked by `ext_values_mean_what_python_says`.
fn noted(json: &Json) -> Value {
    match json {
        Json::Null => Value::Nil,
        Json::Bool(flag) => (*flag).into(),
        Json::Number(number) => number
            .as_i64()
            .map(Value::from)
            .or_else(|| number.as_u64().map(Value::from))
            .or_else(|| number.as_f64().map(Value::from))
            .expect("a number"),
        Json::String(text) => text.as_str().into(),
        Json::Array(items) => Value::Array(items.iter().map(noted).collect()),
        Json::Object(map) => {
            if let Some(bin) = map.get("$bin") {
                return Value::Bin(unhex(bin.as_str().expect("hex")));
            }
            if let Some(code) = map.get("$ext") {
                let code = i8::try_from(code.as_i64().expect("a code")).expect("a small code");
                let payload = unhex(map["payload_hex"].as_str().expect("hex"));
                let packed = Value::Ext(code, payload).encode().expect("an ext packs");
                return Value::decode(&packed.into()).expect("a captured ext decodes");
            }
            if let Some(pairs) = map.get("$map") {
                let pairs = pairs.as_array().expect("pairs").iter();
                return Value::Map(
                    pairs
                        .map(|pair| (noted(&pair[0]), noted(&pair[1])))
                        .collect(),
                );
            }
            Value::Map(
                map.iter()
                    .map(|(key, value)| (key.as_str().into(), noted(value)))
                    .collect(),
            )
        }
    }
}

fn has_ext(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(has_ext),
        Value::Map(pairs) => pairs
            .iter()
            .any(|(key, value)| has_ext(key) || has_ext(value)),
        Value::Nil
        | Value::Bool(_)
        | Value::Int(_)
        | Value::UInt(_)
        | Value::Float(_)
        | Value::Str(_)
        | Value::Bin(_) => false,
        _ => true,
    }
}

fn call_vectors() -> Vec<(String, Json)> {
    let mut names: Vec<String> = fs::read_dir(vectors())
        .expect("vectors")
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".json").map(str::to_owned))
        .collect();
    names.sort();
    names
        .into_iter()
        .map(|name| (name.clone(), load(&name)))
        .filter(|(_, vector)| vector.get("connections").is_some())
        .collect()
}

#[test]
fn every_captured_message_decodes_to_its_stated_meaning_and_is_written_the_same() {
    let vectors = call_vectors();
    assert_eq!(vectors.len(), 53, "captured calls");
    let (mut requests, mut results, mut failures, mut same_bytes) = (0, 0, 0, 0);
    let mut bound = 0;
    for (name, vector) in &vectors {
        for message in vector["connections"]
            .as_array()
            .expect("connections")
            .iter()
            .flat_map(|connection| connection.as_array().expect("messages"))
        {
            let raw = frames(&message["frames_hex"]);
            let stated = &message["decoded"];
            let (header_frame, envelope_frame) = match Message::read(&raw) {
                Message::Ping(..) => {
                    assert_eq!(stated["tag"], "PING", "{name}");
                    continue;
                }
                Message::Pong(_) => {
                    assert_eq!(stated["tag"], "PONG", "{name}");
                    continue;
                }
                Message::Upper(header, envelope) => (header, envelope),
                Message::Other => panic!("{name}: a message without meaning"),
            };
            let header =
                Header::decode(&header_frame).unwrap_or_else(|err| panic!("{name}: {err}"));
            let noted_header = &stated["header"];
            assert_eq!(
                header.method,
                noted_header["meth"].as_str().expect("meth"),
                "{name}"
            );
            assert_eq!(header.order_key, noted(&noted_header["okey"]), "{name}");
            assert_eq!(header.sequence, noted(&noted_header["seq"]), "{name}");
            assert!(!header.zipped, "{name}");
            assert_eq!(
                format!("{:?}", header.kind).to_uppercase(),
                stated["type_name"].as_str().expect("type name"),
                "{name}"
            );
            assert_eq!(
                header.encode().expect("a header packs"),
                header_frame,
                "{name}"
            );

            let limits = DecodeLimits::default();
            let envelope = Envelope::decode(&envelope_frame).expect("an envelope");
            match header.kind {
                Kind::Function => {
                    requests += 1;
                    let (args, kwargs) = frame::read_request(&envelope_frame, &limits)
                        .unwrap_or_else(|err| panic!("{name}: {err:?}"));
                    // The catalogue knows every captured call but those of test-only methods.
                    if let Some(method) = catalogue::find(&header.method) {
                        bound += 1;
                        Arguments::bind(method, args.clone(), kwargs.clone())
                            .unwrap_or_else(|failure| panic!("{name}: {failure}"));
                    } else {
                        assert!(
                            name.contains("cancel")
                                || name.contains("error")
                                || name.contains("calls"),
                            "{name}"
                        );
                    }
                    let kwargs_value = Value::map(kwargs.clone());
                    let body = Value::map([
                        ("args", Value::Array(args.clone())),
                        ("kwargs", kwargs_value),
                    ]);
                    assert_eq!(body, noted(&stated["body"]), "{name}");
                    if !has_ext(&body) {
                        same_bytes += 1;
                        let written = header.function(args, kwargs).expect("a call packs");
                        assert_eq!(written.as_slice(), raw, "{name}");
                    }
                }
                Kind::Result => {
                    results += 1;
                    let value = envelope.body_value(&limits).expect("a result");
                    assert_eq!(value, noted(&stated["body"]), "{name}");
                    let written = header.result(&value).expect("a result packs");
                    if has_ext(&value) {
                        let again = Envelope::decode(&written[2]).expect("our envelope");
                        assert_eq!(again.body_value(&limits), Ok(value), "{name}");
                    } else {
                        same_bytes += 1;
                        assert_eq!(written.as_slice(), raw, "{name}");
                    }
                }
                Kind::Failure => {
                    failures += 1;
                    let failure = envelope.failure().expect("a failure");
                    let meta = noted(&stated["meta"]);
                    let triple = [&failure.class, &failure.repr, &failure.traceback];
                    assert_eq!(Value::array(triple.map(String::as_str)), meta, "{name}");
                    let written = header.failure(&failure).expect("a failure packs");
                    same_bytes += 1;
                    assert_eq!(written.as_slice(), raw, "{name}");
                }
                Kind::Error => {
                    assert_eq!(name, "internal_error");
                    assert_eq!(envelope.failure().expect("an error").class, "ValueError");
                }
                Kind::Cancel | Kind::Cancelled => {
                    assert!(name.contains("cancel"), "{name}");
                    assert_eq!(envelope.body, Value::Nil, "{name}");
                }
                Kind::Null => panic!("{name}: NULL is never sent"),
            }
        }
    }
    assert!(
        requests >= 50 && results >= 40 && failures >= 4,
        "{requests} {results} {failures}"
    );
    assert!(bound >= 50, "{bound} calls bound");
    assert!(
        same_bytes >= 80,
        "{same_bytes} messages compared byte for byte"
    );
}

/// What Python would print for a value we decoded, as far as the captures have such values.
fn python(value: &Value) -> String {
    let list = |items: Vec<String>| items.join(", ");
    match value {
        Value::Nil => "None".to_owned(),
        Value::Bool(flag) => if *flag { "True" } else { "False" }.to_owned(),
        Value::Int(number) => number.to_string(),
        Value::UInt(number) => number.to_string(),
        Value::Float(number) => format!("{number:?}"),
        Value::Str(text) => format!("'{text}'"),
        Value::Bin(bytes) => {
            let escaped: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("b'{escaped}'")
        }
        Value::Array(items) => format!("({})", list(items.iter().map(python).collect())),
        Value::Map(pairs) => {
            let pairs = pairs
                .iter()
                .map(|(key, value)| format!("{}: {}", python(key), python(value)));
            format!("{{{}}}", list(pairs.collect()))
        }
        Value::Uuid(uuid) => format!("UUID('{uuid}')"),
        Value::Decimal(text) => format!("Decimal('{text}')"),
        Value::Path(path) => format!("PosixPath('{path}')"),
        Value::PurePath(path) => format!("PurePosixPath('{path}')"),
        Value::AutoDirectoryPath(path) => format!("AutoDirectoryPath('{path}')"),
        Value::Enum { class, value } => {
            let (_, class) = class.split_once(':').expect("module:Class");
            format!("<{class}.*: {}>", python(value))
        }
        Value::ImageRef(image) => {
            format!(
                "<ImageRef: \"{}\" ({})>",
                image.canonical(),
                image.architecture
            )
        }
        Value::ResourceSlot(slots) => {
            let slots = slots
                .iter()
                .map(|(slot, amount)| format!("'{slot}': '{amount}'"));
            format!("{{{}}}", list(slots.collect()))
        }
        Value::BinarySize(size) => size.to_string(),
        Value::DateTime(at) => at.to_string(),
        Value::Ext(code, payload) => format!("Ext({code}, {payload:?})"),
    }
}

/// Removes the member name from `<Class.NAME: 'value'>`, which the wire does not carry.
fn without_member_names(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('<') {
        out.push_str(before);
        out.push('<');
        match (after.split_once('.'), after.split_once(": ")) {
            (Some((class, _)), Some((head, value)))
                if head.starts_with(class)
                    && head[class.len() + 1..]
                        .chars()
                        .all(|c| c.is_ascii_uppercase() || c == '_') =>
            {
                out.push_str(class);
                out.push_str(".*: ");
                rest = value;
            }
            _ => rest = after,
        }
    }
    out + rest
}

/// `datetime.datetime(2025, 9, 7, 22, ...)` as ISO 8601.
fn iso_of_python(text: &str) -> String {
    let aware = text.contains("tzinfo");
    let numbers: Vec<u32> = text
        .trim_start_matches("datetime.datetime(")
        .split(", ")
        .map_while(|part| part.trim_end_matches(')').parse().ok())
        .collect();
    let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
    let mut iso = format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
        at(0),
        at(1),
        at(2),
        at(3),
        at(4),
        at(5)
    );
    if at(6) != 0 {
        iso += &format!(".{:06}", at(6));
    }
    if aware { iso + "+00:00" } else { iso }
}

#[test]
fn ext_values_mean_what_python_says() {
    let vector = load("msgpack_ext_types");
    let values = vector["values"].as_array().expect("values");
    assert_eq!(values.len(), 63);
    for case in values {
        let name = case["name"].as_str().expect("name");
        let packed = unhex(case["packed_hex"].as_str().expect("hex"));
        let value = Value::decode(&packed).unwrap_or_else(|err| panic!("{name}: {err:?}"));
        let stated = case["roundtrip_repr"].as_str().expect("repr");
        let ours = python(&value);
        match &value {
            Value::DateTime(_) => assert_eq!(ours, iso_of_python(stated), "{name}"),
            Value::Bin(_) => assert_eq!(ours, "b'\\x00\\xff'", "{name}"),
            Value::ResourceSlot(_) => {
                let plain = stated.replace("Decimal('", "'").replace("')", "'");
                assert_eq!(ours, plain, "{name}");
            }
            _ => {
                let stated = without_member_names(stated).replace(",)", ")");
                assert_eq!(ours, stated, "{name}");
            }
        }
        if let Some(code) = case["ext_code"].as_i64() {
            assert!(
                has_ext(&value) && !matches!(value, Value::Ext(..)),
                "{name}: ext {code}"
            );
        }
        // What we write is read as the same value; without pickles it is the same bytes.
        let written = Bytes::from(value.encode().unwrap_or_else(|err| panic!("{name}: {err}")));
        assert_eq!(Value::decode(&written).as_ref(), Ok(&value), "{name}");
        if case.get("pickle_ops").is_none() && !has_pickle(&value) {
            assert_eq!(written, packed, "{name}");
        }
    }
}

fn has_pickle(value: &Value) -> bool {
    match value {
        Value::Map(pairs) => pairs
            .iter()
            .any(|(key, value)| has_pickle(key) || has_pickle(value)),
        Value::Array(items) => items.iter().any(has_pickle),
        other => matches!(
            other,
            Value::Enum { .. }
                | Value::Decimal(_)
                | Value::ImageRef(_)
                | Value::ResourceSlot(_)
                | Value::BinarySize(_)
        ),
    }
}

#[test]
fn hand_made_pickles_are_read_and_ours_are_the_same_bytes() {
    let vector = load("msgpack_ext_types");
    for case in vector["minimal_pickles_accepted"]
        .as_array()
        .expect("pickles")
    {
        let name = case["name"].as_str().expect("name");
        let packed = unhex(case["packed_hex"].as_str().expect("hex"));
        let value = Value::decode(&packed).unwrap_or_else(|err| panic!("{name}: {err:?}"));
        let written = Bytes::from(value.encode().expect("packs"));
        assert_eq!(Value::decode(&written), Ok(value.clone()), "{name}");
        // Two of the captures show another way to write the same value.
        if !name.contains("via REDUCE(cls,(dict,))") {
            assert_eq!(written, packed, "{name}");
        }
    }
}

#[test]
fn replies_the_manager_takes_are_read_by_our_client_and_ours_is_the_baseline() {
    let vector = load("manager_acceptance");
    let cases = vector["cases"].as_array().expect("cases");
    let mut taken = 0;
    for case in cases {
        let label = case["label"].as_str().expect("label");
        let outcome = case["outcome"].as_str().expect("outcome");
        // Noise before the reply is skipped; of two replies the first counts.
        let Some(replies) = case["reply_frames_hex"].as_array() else {
            assert!(label.starts_with("PONG"), "{label}");
            continue;
        };
        let read = replies
            .iter()
            .map(frames)
            .find_map(|raw| match Message::read(&raw) {
                Message::Upper(header, envelope) if Header::decode(&header).is_ok() => {
                    Some((raw, header, envelope))
                }
                _ => None,
            });
        let Some((raw, header_frame, envelope_frame)) = read else {
            assert!(!outcome.starts_with("ok"), "{label}");
            continue;
        };
        let envelope = Envelope::decode(&envelope_frame);
        if label == "baseline" {
            let header = Header::decode(&header_frame).expect("a header");
            assert_eq!(header.result(&"ok".into()).expect("packs").as_slice(), raw);
        }
        if let Some(stated) = outcome.strip_prefix("ok: ") {
            taken += 1;
            let header = Header::decode(&header_frame).expect(label);
            assert_eq!(
                (header.kind, header.zipped),
                (Kind::Result, false),
                "{label}"
            );
            let value = envelope
                .expect(label)
                .body_value(&DecodeLimits::default())
                .expect(label);
            match label {
                "RESULT with unknown ext 99" => {
                    let ext = Value::Ext(99, Bytes::from_static(b"zz"));
                    assert_eq!(value, Value::map([("x", ext)]), "{label}");
                }
                "RESULT non-str map keys" => {
                    let bin = Value::Bin(Bytes::from_static(b"b"));
                    let pairs = vec![(1.into(), 2.into()), (bin, 3.into())];
                    assert_eq!(value, Value::Map(pairs), "{label}");
                }
                _ => assert_eq!(python(&value), stated, "{label}"),
            }
        } else if outcome.contains("AgentError") {
            taken += 1;
            let failure: Failure = envelope.expect(label).failure().expect(label);
            assert!(outcome.contains(&failure.class), "{label}: {failure:?}");
        }
    }
    assert_eq!(taken, 19);
}

#[test]
fn a_captured_creation_decodes_into_typed_fields() {
    #[derive(serde::Deserialize)]
    struct Config {
        kernel_id: uuid::Uuid,
        session_type: String,
        cluster_mode: String,
        resource_slots: std::collections::BTreeMap<String, String>,
        idle_timeout: Option<f64>,
        uid: Option<u32>,
        image: Image,
    }
    #[derive(serde::Deserialize)]
    struct Image {
        auto_pull: String,
        project: Option<String>,
    }
    let vector = load("create_kernels");
    let message = vector["connections"][0]
        .as_array()
        .expect("messages")
        .iter()
        .find(|message| message["decoded"]["type_name"] == "FUNCTION")
        .expect("a call");
    let raw = frames(&message["frames_hex"]);
    let (args, _) = frame::read_request(&raw[2], &DecodeLimits::default()).expect("a request");
    let configs: Vec<Config> = from_value(args[2].clone()).expect("typed configs");
    let config = &configs[0];
    assert_eq!(
        config.kernel_id.to_string(),
        "5d5f6a40-3d9c-4f0e-9a55-0b1c2d3e4f50"
    );
    assert_eq!(
        (&*config.session_type, &*config.cluster_mode),
        ("interactive", "single-node")
    );
    assert_eq!(config.resource_slots["mem"], "1073741824");
    assert_eq!((config.idle_timeout, config.uid), (Some(600.0), None));
    assert_eq!(
        (&*config.image.auto_pull, config.image.project.as_deref()),
        ("digest", Some("stable"))
    );
    let references = args[4].as_map().expect("image references");
    assert_eq!(references[0].0, Value::Uuid(config.kernel_id));
    let Value::ImageRef(image) = &references[0].1 else {
        panic!("an image reference")
    };
    assert_eq!(
        image.canonical(),
        "registry.example/stable/python:3.9-ubuntu20.04"
    );
}
