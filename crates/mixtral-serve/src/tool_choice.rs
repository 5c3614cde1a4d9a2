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
    /// If there is no such tool, or two of them give one name to two definitions.
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
                // References in a schema are from its root, so definitions move there.
                let (mut calls, mut definitions) = (Vec::new(), Map::new());
                for tool in tools {
                    let mut parameters = parameters(tool);
                    if let Some(Value::Object(own)) = parameters.remove("$defs") {
                        let differs = |name: &String| definitions.get(name).is_some_and(|other| *other != own[name]);
                        if let Some(name) = own.keys().find(|name| differs(name)) {
                            let message = format!("two of `tools` define `{name}` differently; rename one");
                            return Err(ApiError::field("tools", message));
                        }
                        definitions.extend(own);
                    }
                    calls.push(json!({
                        "type": "object",
                        "properties": { "name": { "const": tool.function.name }, "arguments": parameters },
                        "required": ["name", "arguments"],
                        "additionalProperties": false,
                    }));
                }
                let mut list = json!({ "type": "array", "items": { "anyOf": calls }, "minItems": 1 });
                if !several {
                    list["maxItems"] = json!(1);
                }
                list["$defs"] = Value::Object(definitions);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_definition_in_all_tools() {
        let form = |definitions: [Value; 2]| {
            let tool = |(name, definition)| {
                let parameters = json!({ "type": "object", "$defs": { "Item": definition } });
                json!({ "type": "function", "function": { "name": name, "parameters": parameters } })
            };
            let tools: Vec<Value> = ["f", "g"].into_iter().zip(definitions).map(tool).collect();
            let tools: Vec<Tool> = serde_json::from_value(Value::Array(tools)).unwrap();
            ToolChoice::Required.form(&tools, true)
        };
        let (text, number) = (json!({ "type": "string" }), json!({ "type": "number" }));
        let Ok(Some(Form::Json(schema))) = form([text.clone(), text.clone()]) else { panic!("it is a form") };
        assert_eq!(schema["$defs"], json!({ "Item": text }));
        let error = form([text, number]).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tools"));
        insta::assert_snapshot!(error.message, @"two of `tools` define `Item` differently; rename one");
    }
}
