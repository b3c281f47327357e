//! Arguments bound to the parameters of a method, like a Python call binds them.
//!
//! In: positional and keyword values; out: one value per parameter, or the `TypeError` Python
//! would raise. Every parameter is accepted by position and by name.

use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::catalogue::Method;
use super::deserialize::from_value;
use super::failure::Failure;
use super::value::Value;

/// One value per parameter of a method.
#[derive(Clone, Debug, PartialEq)]
pub struct Arguments {
    method: &'static Method,
    values: Vec<Value>,
}

impl Arguments {
    /// Binds like Python: positions first, then names, then defaults.
    ///
    /// # Errors
    /// As Python's `TypeError`: too many, unknown or missing ones.
    pub fn bind(
        method: &'static Method,
        args: Vec<Value>,
        kwargs: Vec<(String, Value)>,
    ) -> Result<Self, Failure> {
        let parameters = method.parameters;
        if args.len() > parameters.len() {
            return Err(too_many(method, args.len()));
        }
        let mut slots: Vec<Option<Value>> = args.into_iter().map(Some).collect();
        slots.resize(parameters.len(), None);
        for (name, value) in kwargs {
            let Some(index) = parameters
                .iter()
                .position(|parameter| parameter.name == name)
            else {
                return Err(raise(
                    method,
                    format!("got an unexpected keyword argument '{name}'"),
                ));
            };
            if slots[index].replace(value).is_some() {
                return Err(raise(
                    method,
                    format!("got multiple values for argument '{name}'"),
                ));
            }
        }
        let mut missing = Vec::new();
        let mut values = Vec::with_capacity(parameters.len());
        for (parameter, slot) in parameters.iter().zip(slots) {
            match (slot, parameter.default) {
                (Some(value), _) => values.push(value),
                (None, Some(default)) => values.push(default.value()),
                (None, None) => missing.push(parameter.name),
            }
        }
        if missing.is_empty() {
            Ok(Self { method, values })
        } else {
            Err(missing_arguments(method, &missing))
        }
    }

    /// The method these arguments belong to.
    #[must_use]
    pub fn method(&self) -> &'static Method {
        self.method
    }

    /// The value of a parameter; nil for a name the method doesn't have.
    #[must_use]
    pub fn value(&self, name: &str) -> &Value {
        self.index(name)
            .map_or(&Value::Nil, |index| &self.values[index])
    }

    /// Takes the value of a parameter out, leaving nil.
    pub fn take(&mut self, name: &str) -> Value {
        self.index(name).map_or(Value::Nil, |index| {
            std::mem::replace(&mut self.values[index], Value::Nil)
        })
    }

    /// Takes a parameter as a typed value; a misfit is a `TypeError` that names the parameter.
    ///
    /// # Errors
    /// A `TypeError`.
    pub fn get<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, Failure> {
        let value = self.take(name);
        from_value(value).map_err(|err| {
            raise(
                self.method,
                format!("argument '{name}' does not fit: {err}"),
            )
        })
    }

    /// A parameter that names a kernel or session: UUID text in any of Python's spellings, or
    /// ext 1. Anything else is the `ValueError` of Python's `UUID`.
    ///
    /// # Errors
    /// A `ValueError`.
    pub fn uuid(&self, name: &str) -> Result<Uuid, Failure> {
        match self.value(name) {
            Value::Uuid(uuid) => Ok(*uuid),
            Value::Str(text) => parse_uuid(text).ok_or_else(Failure::bad_uuid),
            other => Err(raise(
                self.method,
                format!("argument '{name}' must be a UUID, not {}", other.kind()),
            )),
        }
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.method
            .parameters
            .iter()
            .position(|parameter| parameter.name == name)
    }
}

/// Reads UUID text the way Python's `UUID` does: prefixes, braces and hyphens don't matter.
#[must_use]
pub fn parse_uuid(text: &str) -> Option<Uuid> {
    let text = text.replace("urn:", "").replace("uuid:", "");
    let digits = text.trim_matches(['{', '}']).replace('-', "");
    let hexadecimal = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    hexadecimal.then(|| Uuid::try_parse(&digits).ok()).flatten()
}

fn raise(method: &Method, what: impl std::fmt::Display) -> Failure {
    // The class is the original's: its texts are what people find when they search.
    Failure::type_error(format!("AgentRPCServer.{}() {what}", method.name))
}

fn too_many(method: &Method, given: usize) -> Failure {
    // Python counts `self`.
    let (most, given) = (method.parameters.len() + 1, given + 1);
    let least = 1 + method
        .parameters
        .iter()
        .filter(|p| p.default.is_none())
        .count();
    let takes = if least == most {
        most.to_string()
    } else {
        format!("from {least} to {most}")
    };
    let plural = if most == 1 { "" } else { "s" };
    raise(
        method,
        format!("takes {takes} positional argument{plural} but {given} were given"),
    )
}

fn missing_arguments(method: &Method, names: &[&str]) -> Failure {
    let quoted: Vec<String> = names.iter().map(|name| format!("'{name}'")).collect();
    let list = match &quoted[..] {
        [one] => one.clone(),
        [first, second] => format!("{first} and {second}"),
        [most @ .., last] => format!("{}, and {last}", most.join(", ")),
        [] => String::new(),
    };
    let plural = if names.len() == 1 { "" } else { "s" };
    let count = names.len();
    raise(
        method,
        format!("missing {count} required positional argument{plural}: {list}"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::find;
    use super::*;

    fn bind(method: &str, args: &[Value], kwargs: &[(&str, Value)]) -> Result<Arguments, Failure> {
        let kwargs = kwargs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()));
        Arguments::bind(find(method).unwrap(), args.to_vec(), kwargs.collect())
    }

    #[test]
    fn positions_names_and_defaults() {
        let mut bound = bind(
            "destroy_kernel",
            &["k".into(), "s".into()],
            &[("suppress_events", true.into())],
        )
        .unwrap();
        assert_eq!(bound.get::<String>("kernel_id").unwrap(), "k");
        assert_eq!(bound.value("reason"), &Value::Nil);
        assert!(bound.get::<bool>("suppress_events").unwrap());
        assert_eq!(bound.get::<Option<String>>("reason").unwrap(), None);
    }

    #[test]
    fn misfits_read_like_python() {
        let text = |outcome: Result<Arguments, Failure>| outcome.unwrap_err().repr;
        assert_eq!(
            text(bind("ping", &[], &[])),
            "TypeError(\"AgentRPCServer.ping() missing 1 required positional argument: 'msg'\")"
        );
        assert_eq!(
            text(bind("ping", &["a".into(), "b".into()], &[])),
            "TypeError('AgentRPCServer.ping() takes 2 positional arguments but 3 were given')"
        );
        assert_eq!(
            text(bind("ping", &["a".into()], &[("zzz", 1.into())])),
            "TypeError(\"AgentRPCServer.ping() got an unexpected keyword argument 'zzz'\")"
        );
        assert_eq!(
            text(bind("ping", &["a".into()], &[("msg", 1.into())])),
            "TypeError(\"AgentRPCServer.ping() got multiple values for argument 'msg'\")"
        );
        assert_eq!(
            text(bind("list_files", &[], &[])),
            "TypeError(\"AgentRPCServer.list_files() missing 2 required positional arguments: \
             'kernel_id' and 'path'\")"
        );
        assert_eq!(
            text(bind("get_completions", &[], &[])),
            "TypeError(\"AgentRPCServer.get_completions() missing 3 required positional \
             arguments: 'kernel_id', 'text', and 'opts'\")"
        );
        assert_eq!(
            text(bind("reset_agent", &[1.into()], &[])),
            "TypeError('AgentRPCServer.reset_agent() takes 1 positional argument but 2 were given')"
        );
        assert_eq!(
            text(bind("destroy_kernel", &vec![Value::Nil; 5], &[])),
            "TypeError('AgentRPCServer.destroy_kernel() takes from 3 to 5 positional arguments \
             but 6 were given')"
        );
    }

    #[test]
    fn ids_in_all_spellings() {
        let id = Uuid::from_u128(0x5d5f_6a40_3d9c_4f0e_9a55_0b1c_2d3e_4f50);
        for text in [
            "5d5f6a40-3d9c-4f0e-9a55-0b1c2d3e4f50",
            "5D5F6A403D9C4F0E9A550B1C2D3E4F50",
            "{5d5f6a40-3d9c-4f0e-9a55-0b1c2d3e4f50}",
            "urn:uuid:5d5f6a40-3d9c-4f0e-9a55-0b1c2d3e4f50",
        ] {
            assert_eq!(
                bind("get_logs", &[text.into()], &[])
                    .unwrap()
                    .uuid("kernel_id"),
                Ok(id)
            );
        }
        assert_eq!(
            bind("get_logs", &[id.into()], &[])
                .unwrap()
                .uuid("kernel_id"),
            Ok(id)
        );
        let bad = bind("get_logs", &["not-a-uuid".into()], &[]).unwrap();
        assert_eq!(
            bad.uuid("kernel_id").unwrap_err().repr,
            "ValueError('badly formed hexadecimal UUID string')"
        );
    }
}
