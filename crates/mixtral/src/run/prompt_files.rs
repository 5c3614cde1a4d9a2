//! Files of prompts. The `fuzz` package includes this module too, so it uses nothing else of the binary.

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use mixtral_model::TokenId;
use mixtral_tokenizer::Conversation;
use serde::Deserialize;
use serde_json::{Map, Value};

/// A prompt file larger than this is refused.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// The header of an array of numbers has about 128 bytes.
const MAX_NPY_HEADER_BYTES: usize = 1024;

fn check_size(path: &Path) -> Result<()> {
    let len = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    if len > MAX_FILE_BYTES {
        bail!("{} is {len} bytes; a prompt file has at most {MAX_FILE_BYTES}", path.display());
    }
    Ok(())
}

/// Whether the header is that of an array of plain numbers. Others are refused here, because npyz allocates as many
/// bytes as the file claims, and its parser of Python literals takes time that grows exponentially with their nesting.
fn is_plain_npy(bytes: &[u8]) -> bool {
    let (start, length) = match bytes.get(6) {
        Some(1) => (10, bytes.get(8..10).map(|b| usize::from(b[0]) | usize::from(b[1]) << 8)),
        Some(2 | 3) => {
            (12, bytes.get(8..12).and_then(|b| usize::try_from(u32::from_le_bytes(b.try_into().ok()?)).ok()))
        }
        _ => return false,
    };
    let Some(header) = length.and_then(|length| bytes.get(start..)?.get(..length)) else { return false };
    let count = |byte: u8| header.iter().filter(|&&b| b == byte).count();
    header.len() <= MAX_NPY_HEADER_BYTES && count(b'(') <= 1 && count(b'{') <= 1 && count(b'[') == 0
}

/// A text file: UTF-8, or UTF-16 with a byte-order mark, as Windows writes it. `-` is standard input.
pub fn whole_text(path: &Path) -> Result<String> {
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().take(MAX_FILE_BYTES).read_to_end(&mut bytes).context("cannot read standard input")?;
        bytes
    } else {
        check_size(path)?;
        fs::read(path).with_context(|| format!("cannot read {}", path.display()))?
    };
    let units = |pair: fn([u8; 2]) -> u16| bytes[2..].chunks_exact(2).map(move |b| pair([b[0], b[1]]));
    let is_even = bytes.len().is_multiple_of(2);
    let text = match bytes.get(..2) {
        Some([0xFF, 0xFE]) if is_even => {
            char::decode_utf16(units(u16::from_le_bytes)).collect::<Result<String, _>>().ok()
        }
        Some([0xFE, 0xFF]) if is_even => {
            char::decode_utf16(units(u16::from_be_bytes)).collect::<Result<String, _>>().ok()
        }
        _ => String::from_utf8(bytes).ok(),
    };
    let text = text.with_context(|| {
        format!("{} is not UTF-8 text (nor UTF-16 with a byte-order mark); save it as UTF-8", path.display())
    })?;
    Ok(text.strip_prefix('\u{FEFF}').map_or_else(|| text.clone(), str::to_owned))
}

/// The lines of a text file, each of which is a prompt. A line ends with a line feed, a carriage return, or both.
pub fn text_lines(path: &Path) -> Result<Vec<String>> {
    let text = whole_text(path)?.replace("\r\n", "\n").replace('\r', "\n");
    Ok(text.lines().map(str::to_owned).collect())
}

/// A conversation's keys, with the names that transformers has.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Messages {
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    documents: Option<Vec<Value>>,
    #[serde(default)]
    continue_final_message: bool,
    #[serde(default)]
    chat_template_kwargs: Map<String, Value>,
}

/// A conversation that the model is to answer, or whose last message it is to continue: a list of messages, or an object
/// that also says what else the template gets.
pub fn conversation(path: &Path) -> Result<Conversation> {
    let wrong =
        || format!("{}: expected a list of messages (role, content), or an object with `messages`", path.display());
    let keys = match serde_json::from_str(&whole_text(path)?).with_context(wrong)? {
        Value::Array(messages) => Messages { messages, ..Messages::default() },
        object => serde_json::from_value(object).with_context(wrong)?,
    };
    Ok(keys.into())
}

impl From<Messages> for Conversation {
    fn from(keys: Messages) -> Conversation {
        Conversation {
            messages: keys.messages,
            tools: keys.tools,
            documents: keys.documents,
            add_generation_prompt: !keys.continue_final_message,
            continue_final_message: keys.continue_final_message,
            template: None,
            variables: keys.chat_template_kwargs,
        }
    }
}

/// A request of a file that has one a line.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its prompt.
    pub prompt: RecordPrompt,
    /// Texts that end it; those of the command line if they are absent.
    pub stop_words: Option<Vec<String>>,
    /// Texts that may not come up in it; those of the command line if they are absent.
    pub bad_words: Option<Vec<String>>,
    /// The flags that it has itself, by their names.
    pub flags: Map<String, Value>,
}

/// The prompt of a [`Record`].
#[derive(Clone, Debug, PartialEq)]
pub enum RecordPrompt {
    /// A text.
    Text(String),
    /// Token ids.
    Ids(Vec<TokenId>),
    /// Messages.
    Conversation(Conversation),
}

/// Requests, a JSON object a line. Empty lines are left out.
pub fn records(path: &Path) -> Result<Vec<Record>> {
    let lines = text_lines(path)?;
    let lines = lines.iter().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(at, line)| record(line).with_context(|| format!("{}: line {}", path.display(), at + 1))).collect()
}

fn record(line: &str) -> Result<Record> {
    let mut flags: Map<String, Value> = serde_json::from_str(line).context("expected an object")?;
    let words = |value: Option<Value>| value.map(serde_json::from_value).transpose();
    let stop_words = words(flags.remove("stop_words")).context("stop_words is a list of texts")?;
    let bad_words = words(flags.remove("bad_words")).context("bad_words is a list of texts")?;
    let of_messages = ["messages", "tools", "documents", "continue_final_message", "chat_template_kwargs"];
    let messages: Map<String, Value> =
        of_messages.iter().filter_map(|key| Some(((*key).to_owned(), flags.remove(*key)?))).collect();
    let prompt = match (flags.remove("prompt"), messages.is_empty()) {
        (Some(Value::String(text)), true) => RecordPrompt::Text(text),
        (Some(ids), true) => RecordPrompt::Ids(serde_json::from_value(ids).context("prompt is a text or token ids")?),
        (None, false) => RecordPrompt::Conversation(serde_json::from_value::<Messages>(messages.into())?.into()),
        _ => bail!("a request has either prompt (a text, or token ids) or messages"),
    };
    Ok(Record { prompt, stop_words, bad_words, flags })
}

/// Token ids separated by commas, one prompt a line. Ids may have the form in which numpy.savetxt writes whole numbers.
pub fn csv_ids(path: &Path) -> Result<Vec<Vec<TokenId>>> {
    let text = whole_text(path)?;
    let mut reader =
        csv::ReaderBuilder::new().has_headers(false).flexible(true).trim(csv::Trim::All).from_reader(text.as_bytes());
    let wrong = |field: &str, line: usize| -> Result<TokenId> {
        bail!(
            "{}: line {}: `{field}` is not a token id; expected whole numbers separated by commas, a prompt a line",
            path.display(),
            line + 1
        )
    };
    let mut prompts = Vec::new();
    for (line, record) in reader.records().enumerate() {
        let record = record.with_context(|| format!("{}: line {}", path.display(), line + 1))?;
        let ids = record
            .iter()
            .filter(|field| !field.is_empty())
            .map(|field| match whole_number(field).and_then(|id| u32::try_from(id).ok()) {
                Some(id) => Ok(TokenId(id)),
                None => wrong(field, line),
            })
            .collect::<Result<Vec<_>>>()?;
        prompts.push(ids);
    }
    Ok(prompts)
}

/// `7`, or `7.000000e+00`.
#[expect(clippy::cast_possible_truncation, reason = "whole, and within bounds")]
fn whole_number(field: &str) -> Option<i64> {
    let whole = |number: &f64| number.fract() == 0.0 && number.abs() <= f64::from(u32::MAX);
    field.parse().ok().or_else(|| field.parse::<f64>().ok().filter(whole).map(|number| number as i64))
}

/// A 2-D array of token ids, one prompt a row. Negative ids are padding.
pub fn npy_ids(path: &Path) -> Result<Vec<Vec<TokenId>>> {
    check_size(path)?;
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if bytes.starts_with(b"\x93NUMPY") && !is_plain_npy(&bytes) {
        bail!("{}: expected an array of int32 or int64, as numpy.save writes it", path.display());
    }
    let file = npyz::NpyFile::new(&bytes[..]).with_context(|| format!("{} is not a .npy file", path.display()))?;
    let shape: Vec<u64> = file.shape().to_vec();
    let [rows, columns] = shape[..] else {
        bail!("{}: the array has shape {shape:?}; expected 2-D token ids, a prompt a row", path.display());
    };
    let needed = rows.checked_mul(columns).filter(|n| *n <= bytes.len() as u64);
    if needed.is_none() {
        bail!("{}: the header says {shape:?}, but the file is {} bytes", path.display(), bytes.len());
    }
    let by_column = file.order() == npyz::Order::Fortran;
    let wrong = || format!("{}: expected an array of whole numbers (int32, int64 …)", path.display());
    let descr = file.dtype().descr();
    let values: Vec<i64> = match descr.trim_matches(['\'', '<', '>', '|', '=']) {
        "i2" => numbers::<i16>(file),
        "u2" => numbers::<u16>(file),
        "i4" => numbers::<i32>(file),
        "u4" => numbers::<u32>(file),
        "i8" => file.into_vec::<i64>().map_err(Into::into),
        "u8" => numbers::<u64>(file),
        other => bail!("{}, not `{other}`", wrong()),
    }
    .with_context(wrong)?;
    let columns = usize::try_from(columns)?;
    if columns == 0 {
        return Ok(vec![Vec::new(); usize::try_from(rows)?]);
    }
    let rows = usize::try_from(rows)?;
    let at = |row: usize, column: usize| if by_column { column * rows + row } else { row * columns + column };
    let id = |id: i64| match u32::try_from(id) {
        Ok(id) => Ok(TokenId(id)),
        Err(_) => bail!("{}: {id} is not a token id", path.display()),
    };
    (0..rows)
        .map(|row| (0..columns).map(|column| values[at(row, column)]).filter(|id| *id >= 0).map(id).collect())
        .collect()
}

/// All numbers of an array, in the order in which they are stored.
fn numbers<T: npyz::Deserialize + TryInto<i64>>(file: npyz::NpyFile<&[u8]>) -> Result<Vec<i64>>
where
    T::Error: std::error::Error + Send + Sync + 'static,
{
    file.into_vec::<T>()?.into_iter().map(|number| Ok(number.try_into()?)).collect()
}
