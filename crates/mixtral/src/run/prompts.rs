//! Prompts from the command line or a file, as token ids.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use mixtral_model::TokenId;
use mixtral_runtime::Tokenizer;

use crate::args::run::{Prompts, RunOptions};

/// A prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Its text, if it was given or can be decoded.
    pub text: Option<String>,
    /// Its ids.
    pub ids: Vec<TokenId>,
}

/// A prompt file larger than this is refused.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Whether the prompts are texts, which need a tokenizer.
pub fn are_texts(prompts: &Prompts) -> bool {
    match prompts {
        Prompts::Texts(_) => true,
        Prompts::File(path) => extension(path) == "txt",
    }
}

/// Reads and encodes the prompts. Those longer than `--max-input-length` are cut on the left.
pub fn read(options: &RunOptions, tokenizer: Option<&Tokenizer>) -> Result<Vec<Prompt>> {
    let special = !options.args.no_add_special_tokens;
    let encode = |text: String| -> Result<Prompt> {
        let Some(tokenizer) = tokenizer else { bail!("a text needs a tokenizer") };
        let ids = tokenizer.encode(&text, special)?;
        Ok(Prompt { text: Some(text), ids })
    };
    let from_ids = |ids: Vec<TokenId>| -> Result<Prompt> {
        let text = tokenizer.map(|t| t.decode(&ids)).transpose()?;
        Ok(Prompt { text, ids })
    };
    let mut prompts = match &options.prompts {
        Prompts::Texts(texts) => texts.iter().cloned().map(encode).collect::<Result<Vec<_>>>()?,
        Prompts::File(path) => match extension(path).as_str() {
            "txt" => text_lines(path)?.into_iter().map(encode).collect::<Result<Vec<_>>>()?,
            "csv" => csv_ids(path)?.into_iter().map(from_ids).collect::<Result<Vec<_>>>()?,
            "npy" => npy_ids(path)?.into_iter().map(from_ids).collect::<Result<Vec<_>>>()?,
            other => bail!(
                "{}: a prompt file ends in .txt (a prompt a line), .csv (token ids a line) or .npy (2-D token ids), not `.{other}`",
                path.display()
            ),
        },
    };
    if prompts.is_empty() {
        bail!("there is no prompt in {}; give at least one", describe(&options.prompts));
    }
    if let Some(limit) = options.args.max_input_length {
        for prompt in &mut prompts {
            let cut = prompt.ids.len().saturating_sub(limit);
            prompt.ids.drain(..cut);
        }
    }
    Ok(prompts)
}

fn describe(prompts: &Prompts) -> String {
    match prompts {
        Prompts::Texts(_) => "--input-text".to_owned(),
        Prompts::File(path) => path.display().to_string(),
    }
}

fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

fn check_size(path: &Path) -> Result<()> {
    let len = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    if len > MAX_FILE_BYTES {
        bail!("{} is {len} bytes; a prompt file has at most {MAX_FILE_BYTES}", path.display());
    }
    Ok(())
}

fn text_lines(path: &Path) -> Result<Vec<String>> {
    check_size(path)?;
    let text = fs::read_to_string(path)
        .with_context(|| format!("cannot read {} as UTF-8 text, a prompt a line", path.display()))?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn csv_ids(path: &Path) -> Result<Vec<Vec<TokenId>>> {
    check_size(path)?;
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .trim(csv::Trim::All)
        .from_path(path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let mut prompts = Vec::new();
    for (line, record) in reader.records().enumerate() {
        let record = record.with_context(|| format!("{}: line {}", path.display(), line + 1))?;
        let ids = record
            .iter()
            .filter(|field| !field.is_empty())
            .map(|field| match field.parse::<u32>() {
                Ok(id) => Ok(TokenId(id)),
                Err(_) => bail!("{}: line {}: `{field}` is not a token id; expected whole numbers separated by commas, a prompt a line", path.display(), line + 1),
            })
            .collect::<Result<Vec<_>>>()?;
        prompts.push(ids);
    }
    Ok(prompts)
}

fn npy_ids(path: &Path) -> Result<Vec<Vec<TokenId>>> {
    check_size(path)?;
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = npyz::NpyFile::new(&bytes[..]).with_context(|| format!("{} is not a .npy file", path.display()))?;
    let shape: Vec<u64> = file.shape().to_vec();
    let [rows, columns] = shape[..] else {
        bail!("{}: the array has shape {shape:?}; expected 2-D token ids, a prompt a row", path.display());
    };
    if file.order() != npyz::Order::C {
        bail!("{}: the array is in Fortran order; save it in C order (numpy.ascontiguousarray)", path.display());
    }
    let needed = rows.checked_mul(columns).filter(|n| *n <= bytes.len() as u64);
    if needed.is_none() {
        bail!("{}: the header says {shape:?}, but the file is {} bytes", path.display(), bytes.len());
    }
    let wrong = || format!("{}: expected an array of int32 or int64", path.display());
    let kind = file.dtype().descr();
    let values: Vec<i64> = if kind.contains("i4") {
        file.into_vec::<i32>().with_context(wrong)?.into_iter().map(i64::from).collect()
    } else {
        file.into_vec::<i64>().with_context(wrong)?
    };
    let columns = usize::try_from(columns)?;
    if columns == 0 {
        return Ok(vec![Vec::new(); usize::try_from(rows)?]);
    }
    values
        .chunks(columns)
        .map(|row| {
            row.iter()
                .filter(|id| **id >= 0)
                .map(|id| match u32::try_from(*id) {
                    Ok(id) => Ok(TokenId(id)),
                    Err(_) => bail!("{}: {id} is not a token id", path.display()),
                })
                .collect()
        })
        .collect()
}
