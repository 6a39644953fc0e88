//! Tables of fields into JSON Schema. Must not know any field.

use serde_json::{Map, Value, json};

/// What a value can be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Type {
    /// Anything; of a request's field it means that the field is accepted and not looked at.
    Any,
    Bool,
    /// From, to.
    Int(i64, Option<i64>),
    /// From, to.
    Number(Option<f64>, Option<f64>),
    /// More than, at most.
    Above(f64, f64),
    Text,
    /// One of these strings.
    OneOf(&'static [&'static str]),
    List(&'static Type),
    /// A list with at least and at most so many items.
    Items(&'static Type, usize, Option<usize>),
    /// An object whose values are of one type.
    Map(&'static Type),
    /// An object that is passed on as it is.
    Object,
    /// An object of these fields.
    Of(&'static [Field]),
    /// A named object of the document.
    Ref(&'static str),
    Either(&'static [Type]),
    OrNull(&'static Type),
}

/// Whether a field must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    Required,
    /// It is there, and may be null.
    RequiredOrNull,
    /// It may be absent; null means the same.
    Optional,
}

/// A field of an object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    ty: Type,
    need: Need,
    /// What an absent field means, as JSON; empty where that is told in words.
    default: &'static str,
    doc: &'static str,
}

/// A field that must be there.
pub(crate) const fn must(name: &'static str, ty: Type, doc: &'static str) -> Field {
    Field { name, ty, need: Need::Required, default: "", doc }
}

/// A field that is there and may be null.
pub(crate) const fn nullable(name: &'static str, ty: Type, doc: &'static str) -> Field {
    Field { name, ty, need: Need::RequiredOrNull, default: "", doc }
}

/// A field that may be absent.
pub(crate) const fn may(name: &'static str, ty: Type, doc: &'static str) -> Field {
    Field { name, ty, need: Need::Optional, default: "", doc }
}

/// A field that may be absent, which means the same as `default`.
pub(crate) const fn defaults(
    name: &'static str,
    ty: Type,
    default: &'static str,
    doc: &'static str,
) -> Field {
    Field { name, ty, need: Need::Optional, default, doc }
}

/// A named object of the document. Unknown fields are ignored, so every object is open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Object {
    pub(crate) name: &'static str,
    pub(crate) doc: &'static str,
    /// Groups of fields that objects share.
    pub(crate) fields: &'static [&'static [Field]],
}

impl Type {
    /// The type as JSON Schema 2020-12.
    fn schema(&self) -> Value {
        match *self {
            Self::Any => json!({}),
            Self::Bool => json!({"type": "boolean"}),
            Self::Int(from, to) => ranged("integer", "minimum", Some(json!(from)), to.map(|to| json!(to))),
            Self::Number(from, to) => {
                ranged("number", "minimum", from.map(|from| json!(from)), to.map(|to| json!(to)))
            }
            Self::Above(from, to) => ranged("number", "exclusiveMinimum", Some(json!(from)), Some(json!(to))),
            Self::Text => json!({"type": "string"}),
            Self::OneOf(values) => json!({"type": "string", "enum": values}),
            Self::List(item) => json!({"type": "array", "items": item.schema()}),
            Self::Items(item, least, most) => {
                let mut schema = json!({"type": "array", "items": item.schema()});
                if least > 0 {
                    schema["minItems"] = json!(least);
                }
                if let Some(most) = most {
                    schema["maxItems"] = json!(most);
                }
                schema
            }
            Self::Map(value) => json!({"type": "object", "additionalProperties": value.schema()}),
            Self::Object => json!({"type": "object"}),
            Self::Of(fields) => object(&[fields]),
            Self::Ref(name) => json!({"$ref": format!("#/components/schemas/{name}")}),
            Self::Either(types) => json!({"anyOf": types.iter().map(Self::schema).collect::<Vec<_>>()}),
            Self::OrNull(ty) => or_null(ty.schema()),
        }
    }
}

fn ranged(kind: &str, low: &str, from: Option<Value>, to: Option<Value>) -> Value {
    let mut schema = json!({"type": kind});
    for (name, bound) in [(low, from), ("maximum", to)] {
        if let Some(bound) = bound {
            schema[name] = bound;
        }
    }
    schema
}

fn or_null(mut schema: Value) -> Value {
    if schema == json!({}) {
        return schema;
    }
    if let Some(options) = schema.get_mut("anyOf").and_then(Value::as_array_mut) {
        options.push(json!({"type": "null"}));
        return schema;
    }
    match schema.get("type") {
        Some(kind) if schema.get("enum").is_none() => {
            schema["type"] = json!([kind, "null"]);
            schema
        }
        _ => json!({"anyOf": [schema, {"type": "null"}]}),
    }
}

impl Field {
    /// The field's value as JSON Schema 2020-12.
    pub(crate) fn schema(&self) -> Value {
        let schema = self.ty.schema();
        self.described(if self.need == Need::Required { schema } else { or_null(schema) })
    }

    /// As [`schema`](Self::schema) for what stands in a URL, which has no null.
    pub(crate) fn schema_in_url(&self) -> Value {
        self.described(self.ty.schema())
    }

    fn described(&self, mut schema: Value) -> Value {
        if !self.default.is_empty() {
            schema["default"] = serde_json::from_str(self.default).expect("tables hold JSON");
        }
        if !self.doc.is_empty() {
            schema["description"] = json!(self.doc);
        }
        schema
    }
}

fn object(groups: &[&[Field]]) -> Value {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for field in groups.iter().copied().flatten() {
        properties.insert(field.name.to_owned(), field.schema());
        if field.need != Need::Optional {
            required.push(field.name);
        }
    }
    let mut schema = json!({"type": "object", "properties": properties});
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

impl Object {
    /// The object as JSON Schema 2020-12.
    pub(crate) fn schema(&self) -> Value {
        let mut schema = object(self.fields);
        schema["description"] = json!(self.doc);
        schema
    }
}
