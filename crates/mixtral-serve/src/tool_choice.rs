//! Whether the model calls tools, and what form its answer then has.

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::error::ApiError;
use crate::guide::Form;
use crate::messages::{FunctionWord, Tool};

/// Whether the model calls tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// If it wants to.
    Auto,
    /// No; it is not told of them.
    None,
    /// One or more of them.
    Required,
    /// This one.
    Function(String),
}

/// How a choice is written.
#[derive(Deserialize, ToSchema)]
#[schema(as = ToolChoice)]
#[serde(untagged)]
#[expect(dead_code, reason = "it is only described")]
pub(crate) enum ToolChoiceSchema {
    /// `auto`, `none` or `required`.
    #[schema(title = "Word")]
    Word(ToolWord),
    /// A function.
    Function(NamedTool),
}

/// A choice that is a word.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToolWord {
    /// If it wants to.
    Auto,
    /// It is not told of them.
    None,
    /// One or more of them.
    Required,
}

/// A function by its name.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamedTool {
    /// `function`.
    #[serde(rename = "type")]
    #[allow(dead_code, reason = "it has one value")]
    kind: FunctionWord,
    /// The function.
    function: NamedFunction,
}

/// A function's name.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NamedFunction {
    /// It.
    name: String,
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = ToolChoice;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("`auto`, `none`, `required` or a function")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<ToolChoice, E> {
                Ok(match ToolWord::deserialize(de::value::StrDeserializer::<E>::new(word))? {
                    ToolWord::Auto => ToolChoice::Auto,
                    ToolWord::None => ToolChoice::None,
                    ToolWord::Required => ToolChoice::Required,
                })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ToolChoice, A::Error> {
                let NamedTool { function, .. } = NamedTool::deserialize(MapAccessDeserializer::new(map))?;
                Ok(ToolChoice::Function(function.name))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl ToolChoice {
    /// The form of an answer that must call one of `tools`: the arguments of the one that was named, or a list of calls.
    /// `several` says whether the list may have more than one.
    ///
    /// # Errors
    /// If there is no such tool, or none at all.
    pub(crate) fn form(&self, tools: &[Tool], several: bool) -> Result<Option<Form>, ApiError> {
        let schema = match self {
            ToolChoice::Auto | ToolChoice::None => return Ok(None),
            ToolChoice::Function(name) => {
                let tool = tools.iter().find(|tool| tool.function.name == *name);
                let missing = || ApiError::field("tool_choice", format!("`{name}` is not one of `tools`"));
                Value::Object(parameters(tool.ok_or_else(missing)?))
            }
            ToolChoice::Required if tools.is_empty() => {
                return Err(ApiError::field("tool_choice", "`required` needs `tools`"));
            }
            ToolChoice::Required => {
                let call = |(index, tool): (usize, &Tool)| {
                    let mut arguments = Value::Object(parameters(tool));
                    move_references(&mut arguments, &format!("#/items/anyOf/{index}/properties/arguments"));
                    json!({
                        "type": "object",
                        "properties": { "name": { "const": tool.function.name }, "arguments": arguments },
                        "required": ["name", "arguments"],
                        "additionalProperties": false,
                    })
                };
                let calls: Vec<Value> = tools.iter().enumerate().map(call).collect();
                let mut list = json!({ "type": "array", "items": { "anyOf": calls }, "minItems": 1 });
                if !several {
                    list["maxItems"] = json!(1);
                }
                list
            }
        };
        Ok(Some(Form::Json(schema)))
    }
}

/// The schema of a tool's arguments. If it lists its properties and says nothing of others, there are no others: no
/// function has a use for an argument that it does not know.
fn parameters(tool: &Tool) -> Map<String, Value> {
    let any = || Map::from_iter([("type".to_owned(), json!("object"))]);
    let mut schema = tool.function.parameters.clone().unwrap_or_else(any);
    let of_others =
        ["additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"];
    if schema.contains_key("properties") && !of_others.iter().any(|key| schema.contains_key(*key)) {
        schema.insert("additionalProperties".to_owned(), json!(false));
    }
    schema
}

/// Moves the references of a schema that becomes a part of another one. References are from the root of the whole, and
/// `root` is where this schema's own root lies there.
fn move_references(schema: &mut Value, root: &str) {
    let keys = match schema {
        Value::Object(keys) => keys,
        Value::Array(schemas) => return schemas.iter_mut().for_each(|schema| move_references(schema, root)),
        _ => return,
    };
    for (key, value) in keys {
        match (key.as_str(), value) {
            ("$ref", Value::String(reference)) => {
                if let Some(path) = reference.strip_prefix('#').filter(|path| path.is_empty() || path.starts_with('/'))
                {
                    *reference = format!("{root}{}", path.trim_end_matches('/'));
                }
            }
            // Values, which are no schemas whatever they look like.
            ("const" | "enum" | "default" | "examples", _) => {}
            // Schemas by names, which are no keywords whatever they look like.
            (
                "properties" | "patternProperties" | "dependentSchemas" | "$defs" | "definitions",
                Value::Object(named),
            ) => {
                named.values_mut().for_each(|schema| move_references(schema, root));
            }
            (_, value) => move_references(value, root),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_lead_to_what_they_did_in_the_tool() {
        let of = |size: &str| {
            json!({
                "type": "object",
                "$defs": { "size": { "type": size }, "const": { "items": { "$ref": "#/definitions/leaf" } } },
                "definitions": { "leaf": { "enum": ["a", "b"] } },
                "properties": {
                    "default": { "$ref": "#/$defs/size" },
                    "leaves": { "anyOf": [{ "$ref": "#/$defs/const" }, { "$ref": "#/properties/leaves/anyOf/0" }] },
                    "child": { "$ref": "#" },
                    "value": { "const": { "$ref": "#" }, "enum": [{ "$ref": "#" }] },
                    "far": { "$ref": "https://example.com/#/$defs/size" },
                },
                "additionalProperties": false,
            })
        };
        let schemas = [of("integer"), of("string")];
        let tool = |schema: &Value| json!({ "type": "function", "function": { "name": "f", "parameters": schema } });
        let tools: Vec<Tool> = serde_json::from_value(schemas.iter().map(tool).collect()).unwrap();
        let Ok(Some(Form::Json(list))) = ToolChoice::Required.form(&tools, true) else { panic!("it is a form") };
        for (index, schema) in schemas.iter().enumerate() {
            let root = format!("/items/anyOf/{index}/properties/arguments");
            let moved = list.pointer(&root).unwrap().to_string();
            let (there, back) = (format!(r##""$ref":"#{root}"##), r##""$ref":"#"##);
            assert_eq!(moved.matches(&there).count(), 5, "{moved}");
            assert_eq!(moved.replace(&there, back), schema.to_string());
        }
    }
}
