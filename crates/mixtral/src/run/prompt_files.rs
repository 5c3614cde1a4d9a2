//! Files of prompts. Also a module of the `fuzz` package, so it uses nothing of the binary.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use mixtral_model::TokenId;

/// A prompt file larger than this is refused.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// A header of an array of numbers has some 128 bytes.
const MAX_NPY_HEADER_BYTES: usize = 1024;

fn check_size(path: &Path) -> Result<()> {
    let len = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    if len > MAX_FILE_BYTES {
        bail!("{} is {len} bytes; a prompt file has at most {MAX_FILE_BYTES}", path.display());
    }
    Ok(())
}

/// Whether the header is one of plain numbers. npyz allocates by the length that the file names, and its reader of
/// Python's literals takes exponential time by how deep they are nested.
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

/// The lines of a text: a prompt each.
pub fn text_lines(path: &Path) -> Result<Vec<String>> {
    check_size(path)?;
    let text = fs::read_to_string(path)
        .with_context(|| format!("cannot read {} as UTF-8 text, a prompt a line", path.display()))?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Token ids separated by commas: a prompt a line.
pub fn csv_ids(path: &Path) -> Result<Vec<Vec<TokenId>>> {
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

/// A 2-D array of token ids: a prompt a row, negative ids being padding.
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
