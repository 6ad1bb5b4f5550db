//! What a request body may hold: checked against a table, refused in the words of the resource provider concerned.

use serde_json::{Map, Value};

use super::refusal::Refusal;

/// What a value has to look like.
#[derive(Debug)]
pub(super) enum Shape {
    /// Any string.
    Text,
    /// One of these strings; case doesn't matter.
    OneOf(&'static [&'static str]),
    /// An integer in this range, both ends included.
    Number(i64, i64),
    /// `true` or `false`.
    Flag,
    /// `{"id": "/subscriptions/.../<this type>/..."}`, the type as `virtualNetworks/subnets`.
    Reference(&'static str),
    /// An object of the named type with these fields and no others.
    Object(&'static str, &'static [Field]),
    /// A list of such values.
    List(&'static Shape),
    /// An object whose values are strings: tags.
    Strings,
    /// An object whose keys are resource ids and whose values are empty objects.
    Identities,
    /// Whatever it is, it's left alone.
    Any,
}

/// One field of an object.
#[derive(Debug)]
pub(super) struct Field {
    name: &'static str,
    need: Need,
    shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Required,
    Optional,
    /// Accepted, so that what was read can be written back, and ignored.
    ReadOnly,
}

/// A field that has to be there.
pub(super) const fn required(name: &'static str, shape: Shape) -> Field {
    let need = Need::Required;
    Field { name, need, shape }
}

/// A field that may be left out.
pub(super) const fn optional(name: &'static str, shape: Shape) -> Field {
    let need = Need::Optional;
    Field { name, need, shape }
}

/// A field of answers, ignored in requests.
pub(super) const fn read_only(name: &'static str) -> Field {
    let need = Need::ReadOnly;
    let shape = Shape::Any;
    Field { name, need, shape }
}

/// Which resource provider reads the body: each refuses in words of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Resources,
    Network,
    Compute,
}

/// Checks a body, and returns it without what is read-only or null.
///
/// An `etag`, `id` or `name` that an answer holds may come back: Azure's clients send whole objects.
pub(super) fn check(shape: &Shape, body: &Value, dialect: Dialect) -> Result<Value, Refusal> {
    let reader = Reader { dialect };
    if !body.is_object() {
        return Err(Refusal::new(
            400,
            "InvalidRequestContent",
            "The request content was invalid and could not be deserialized: the body is no JSON object.",
        ));
    }
    Ok(reader.read(shape, body, "")?.unwrap_or(Value::Null))
}

struct Reader {
    dialect: Dialect,
}

impl Reader {
    fn read(&self, shape: &Shape, value: &Value, path: &str) -> Result<Option<Value>, Refusal> {
        if value.is_null() {
            return Ok(None);
        }
        let good = match shape {
            Shape::Any => true,
            Shape::Text => value.is_string(),
            Shape::Flag => value.is_boolean(),
            Shape::Number(low, high) => value.as_i64().is_some_and(|n| (*low..=*high).contains(&n)),
            Shape::OneOf(allowed) => value
                .as_str()
                .is_some_and(|v| allowed.iter().any(|a| a.eq_ignore_ascii_case(v))),
            Shape::Strings => value.as_object().is_some_and(|m| m.values().all(Value::is_string)),
            Shape::Identities => value.as_object().is_some_and(|m| m.keys().all(|k| is_resource_id(k))),
            Shape::List(inner) => {
                let Some(items) = value.as_array() else {
                    return Err(self.wrong(shape, value, path));
                };
                let mut read = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    read.extend(self.read(inner, item, &format!("{path}[{index}]"))?);
                }
                return Ok(Some(Value::Array(read)));
            }
            Shape::Object(name, fields) => return self.object(name, fields, value, path).map(Some),
            Shape::Reference(kind) => {
                self.reference(kind, value, path)?;
                true
            }
        };
        if good {
            Ok(Some(value.clone()))
        } else {
            Err(self.wrong(shape, value, path))
        }
    }

    fn object(&self, name: &str, fields: &[Field], value: &Value, path: &str) -> Result<Value, Refusal> {
        let Some(object) = value.as_object() else {
            return Err(self.not_a(name, value, path));
        };
        for key in object.keys() {
            if !fields.iter().any(|f| f.name.eq_ignore_ascii_case(key)) {
                return Err(self.unknown(key, name, &joined(path, key)));
            }
        }
        let mut read = Map::new();
        for field in fields {
            let path = joined(path, field.name);
            let value = object
                .iter()
                .find(|(key, _)| key.eq_ignore_ascii_case(field.name))
                .map_or(&Value::Null, |(_, value)| value);
            let value = match field.need {
                Need::ReadOnly => continue,
                Need::Required if value.is_null() => return Err(self.missing(field.name, &path)),
                Need::Required | Need::Optional => self.read(&field.shape, value, &path)?,
            };
            if let Some(value) = value {
                read.insert(field.name.to_owned(), value);
            }
        }
        Ok(Value::Object(read))
    }

    fn reference(&self, kind: &str, value: &Value, path: &str) -> Result<(), Refusal> {
        let Some(object) = value.as_object() else {
            return Err(self.not_a("SubResource", value, path));
        };
        if let Some(key) = object.keys().find(|k| k.as_str() != "id") {
            return Err(self.unknown(key, "SubResource", &joined(path, key)));
        }
        let path = joined(path, "id");
        let Some(id) = object.get("id").and_then(Value::as_str) else {
            return Err(self.missing("id", &path));
        };
        if is_resource_id(id) && type_of(id).eq_ignore_ascii_case(kind) {
            return Ok(());
        }
        Err(Refusal::new(
            400,
            "LinkedInvalidPropertyId",
            format!(
                "Property id '{id}' at path '{path}' is invalid. Expect fully qualified resource Id that start with \
                 '/subscriptions/{{subscriptionId}}' or '/providers/{{resourceProviderNamespace}}/'."
            ),
        ))
    }

    fn unknown(&self, key: &str, object: &str, path: &str) -> Refusal {
        let what =
            format!("Could not find member '{key}' on object of type '{object}'. Path '{path}', line 1, position 1.");
        if !path.contains('.') {
            let message = format!("The request content was invalid and could not be deserialized: '{what}'.");
            return Refusal::new(400, "InvalidRequestContent", message);
        }
        self.unreadable(what)
    }

    fn unreadable(&self, what: String) -> Refusal {
        match self.dialect {
            Dialect::Network => {
                Refusal::new(400, "InvalidRequestFormat", "Cannot parse the request.").detail("InvalidJson", what)
            }
            Dialect::Compute => Refusal::new(400, "BadRequest", what),
            Dialect::Resources => Refusal::new(
                400,
                "InvalidRequestContent",
                format!("The request content was invalid and could not be deserialized: '{what}'."),
            ),
        }
    }

    fn missing(&self, field: &str, path: &str) -> Refusal {
        if path == "location" {
            return Refusal::new(
                400,
                "LocationRequired",
                "The location property is required for this definition.",
            );
        }
        match self.dialect {
            Dialect::Compute => Refusal::new(
                400,
                "InvalidParameter",
                format!("Required parameter '{field}' is missing (null)."),
            )
            .target(path.strip_prefix("properties.").unwrap_or(path)),
            Dialect::Network | Dialect::Resources => self.unreadable(format!(
                "Value for the required property '{field}' is missing. Path '{path}'."
            )),
        }
    }

    fn not_a(&self, kind: &str, value: &Value, path: &str) -> Refusal {
        self.unreadable(format!(
            "Error converting value {value} to type '{kind}'. Path '{path}', line 1, position 1."
        ))
    }

    fn wrong(&self, shape: &Shape, value: &Value, path: &str) -> Refusal {
        let kind = match shape {
            Shape::OneOf(allowed) => {
                if self.dialect == Dialect::Compute {
                    let given = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                    return Refusal::new(
                        400,
                        "InvalidParameter",
                        format!(
                            "The value '{given}' of parameter '{path}' is not allowed. Allowed values are {}.",
                            allowed.join(",")
                        ),
                    )
                    .target(path.strip_prefix("properties.").unwrap_or(path));
                }
                format!("one of {}", allowed.join(", "))
            }
            Shape::Number(low, high) => format!("integer from {low} to {high}"),
            Shape::Text => "string".to_owned(),
            Shape::Flag => "boolean".to_owned(),
            Shape::List(_) => "list".to_owned(),
            Shape::Strings => "dictionary of strings".to_owned(),
            Shape::Identities => "dictionary of identities".to_owned(),
            Shape::Any | Shape::Object(..) | Shape::Reference(_) => "object".to_owned(),
        };
        self.not_a(&kind, value, path)
    }
}

fn joined(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// Whether this is the full id of a resource in a group.
fn is_resource_id(id: &str) -> bool {
    let parts: Vec<&str> = id.split('/').collect();
    parts.len() >= 9
        && parts.len() % 2 == 1
        && parts[0].is_empty()
        && parts[1].eq_ignore_ascii_case("subscriptions")
        && parts[3].eq_ignore_ascii_case("resourceGroups")
        && parts[5].eq_ignore_ascii_case("providers")
        && parts[1..].iter().all(|p| !p.is_empty())
}

/// The type of the resource that an id names, without its namespace: `virtualNetworks/subnets`.
pub(super) fn type_of(id: &str) -> String {
    let parts: Vec<&str> = id.split('/').skip(7).collect();
    parts.chunks(2).map(|c| c[0]).collect::<Vec<_>>().join("/")
}
