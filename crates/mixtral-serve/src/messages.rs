//! Conversations, as clients send them.

use mixtral_tokenizer::Conversation;
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::error::ApiError;

/// A message of a conversation.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said: a text, or a list of parts of text. An assistant's message that calls tools may have none.
    #[schema(value_type = Option<ContentSchema>)]
    pub content: Option<Content>,
    /// Who says it, by name.
    pub name: Option<String>,
    /// The tools that an assistant's message calls.
    pub tool_calls: Option<Vec<ToolCall>>,
    /// Which call a tool's message answers.
    pub tool_call_id: Option<String>,
    /// Null, as OpenAI's clients send it with an assistant's message. So are the next ones.
    #[schema(ignore)]
    pub refusal: Option<NotHere>,
    /// Null.
    #[schema(ignore)]
    pub audio: Option<NotHere>,
    /// Null.
    #[schema(ignore)]
    pub function_call: Option<NotHere>,
    /// Null, or an empty list.
    #[schema(ignore)]
    pub annotations: Option<[NotHere; 0]>,
}

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// What the model is told before the conversation.
    System,
    /// The same, by OpenAI's newer name.
    Developer,
    /// The user.
    User,
    /// The model.
    Assistant,
    /// A tool that the model called.
    Tool,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, serde::Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ToolCall {
    /// Its place among the calls of an answer; in streams alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// Its name.
    pub id: String,
    /// `function`.
    #[serde(rename = "type")]
    pub kind: FunctionWord,
    /// The function.
    pub function: FunctionCall,
}

/// The kind of tool that there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FunctionWord {
    /// A function.
    #[default]
    Function,
}

/// A function that is called.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, serde::Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FunctionCall {
    /// Its name.
    pub name: String,
    /// Its arguments, as the text of a JSON object.
    pub arguments: String,
}

/// A tool that the model may call.
#[derive(Clone, Debug, Deserialize, serde::Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    /// `function`.
    #[serde(rename = "type")]
    pub kind: FunctionWord,
    /// The function.
    pub function: Function,
}

/// A function that the model may call.
#[derive(Clone, Debug, Deserialize, serde::Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// What it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Its parameters, as a JSON schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Map<String, Value>>,
    /// Whether calls must fit the schema; the model is only asked to.
    #[serde(skip_serializing_if = "always")]
    pub strict: Option<bool>,
}

/// A field is not part of what templates see, though it is of the description (`skip_serializing` would hide it there).
fn always<T>(_: &T) -> bool {
    true
}

/// A field that may only be null.
#[derive(Clone, Copy, Debug)]
pub struct NotHere;

impl<'de> Deserialize<'de> for NotHere {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(de::Error::custom("it is not supported; leave it out"))
    }
}

/// What a message says: the texts of its parts, one below the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content(pub String);

/// How a message's content is written.
#[derive(Deserialize, ToSchema)]
#[schema(as = Content)]
#[serde(untagged)]
#[expect(dead_code, reason = "it is only described")]
enum ContentSchema {
    /// A text.
    #[schema(title = "Text")]
    Text(String),
    /// Parts of a text.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Part {
    /// `text`.
    #[serde(rename = "type")]
    #[allow(dead_code, reason = "it has one value")]
    kind: TextWord,
    /// The text.
    text: String,
}

/// The kind of part that there is.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum TextWord {
    /// Text.
    Text,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Content;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a text or a list of parts of text")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Content, A::Error> {
                let mut texts = Vec::new();
                while let Some(Part { text, .. }) = list.next_element()? {
                    texts.push(text);
                }
                Ok(Content(texts.join("\n")))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

/// The conversation that a chat template renders, so that the model answers next.
///
/// # Errors
/// The message that is not whole, or that calls a tool with arguments that are no JSON.
pub(crate) fn conversation(
    messages: &[Message],
    tools: Option<&[Tool]>,
    variables: Map<String, Value>,
) -> Result<Conversation, ApiError> {
    let messages = messages.iter().enumerate().map(|(at, message)| rendered(at, message));
    Ok(Conversation {
        messages: messages.collect::<Result<_, _>>()?,
        tools: tools.map(|tools| tools.iter().map(|tool| json!(tool)).collect()),
        add_generation_prompt: true,
        variables,
        ..Conversation::default()
    })
}

/// A message as templates take it.
fn rendered(at: usize, message: &Message) -> Result<Value, ApiError> {
    let Message { role, content, name, tool_calls, tool_call_id, .. } = message;
    let field = |name: &str| format!("messages[{at}].{name}");
    let calls = tool_calls.as_deref().unwrap_or_default();
    if !calls.is_empty() && *role != Role::Assistant {
        return Err(ApiError::field(field("tool_calls"), "only an assistant calls tools"));
    }
    if content.is_none() && calls.is_empty() {
        return Err(ApiError::field(field("content"), format!("`{}` is missing", field("content"))));
    }
    let role = match role {
        Role::System | Role::Developer => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    };
    // A template adds a null as it adds a text, so an assistant that only calls tools says an empty text.
    let mut rendered = json!({ "role": role, "content": content.as_ref().map_or("", |Content(text)| text) });
    let mut add =
        |name: &str, value: Value| drop(rendered.as_object_mut().map(|keys| keys.insert(name.to_owned(), value)));
    if let Some(name) = name {
        add("name", json!(name));
    }
    if let Some(id) = tool_call_id {
        add("tool_call_id", json!(id));
    }
    if !calls.is_empty() {
        let mut objects = Vec::new();
        for (number, ToolCall { id, function, .. }) in calls.iter().enumerate() {
            // Templates take the arguments as an object.
            let arguments: Map<String, Value> = serde_json::from_str(&function.arguments).map_err(|error| {
                let field = field(&format!("tool_calls[{number}].function.arguments"));
                ApiError::field(field.clone(), format!("`{field}` must be the text of a JSON object: {error}"))
            })?;
            let function = json!({ "name": function.name, "arguments": arguments });
            objects.push(json!({ "id": id, "type": "function", "function": function }));
        }
        add("tool_calls", Value::Array(objects));
    }
    Ok(rendered)
}
