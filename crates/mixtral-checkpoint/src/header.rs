//! Reads the header of a safetensors file as if it were hostile: every length is checked before it is used.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mixtral_model::{DType, ElemType};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The longest header that is read, which is safetensors' own limit.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the header's length, at the start of the file.
pub const LENGTH_BYTES: u64 = 8;

/// One tensor as the header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Its element type, as safetensors spells it (`F32`, `F16`, `BF16`, `I64`, …).
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub start: u64,
    /// One past its last byte.
    pub end: u64,
}

impl TensorEntry {
    /// The element type, if it is one of those that checkpoints have.
    #[must_use]
    pub fn elem(&self) -> Option<ElemType> {
        ELEM_TYPES.into_iter().find(|&elem| safetensors_name(elem) == self.dtype)
    }

    /// The element type, if it is one of the float types that models use.
    #[must_use]
    pub fn float(&self) -> Option<DType> {
        self.elem().and_then(ElemType::float)
    }

    /// Bytes of its data.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// All element types.
const ELEM_TYPES: [ElemType; 6] =
    [ElemType::F32, ElemType::F16, ElemType::Bf16, ElemType::I32, ElemType::U8, ElemType::F8E4M3];

/// safetensors' name of an element type.
#[must_use]
pub const fn safetensors_name(elem: ElemType) -> &'static str {
    match elem {
        ElemType::F32 => "F32",
        ElemType::F16 => "F16",
        ElemType::Bf16 => "BF16",
        ElemType::I32 => "I32",
        ElemType::U8 => "U8",
        ElemType::F8E4M3 => "F8_E4M3",
    }
}

/// A checked header. Its tensors fill the rest of the file without holes or overlap.
#[derive(Clone, Debug)]
pub struct Header {
    /// The free texts beside the tensors.
    pub metadata: BTreeMap<String, String>,
    /// The tensors, in the order of their data.
    pub tensors: Vec<TensorEntry>,
    /// First byte of the data, counted from the start of the file.
    pub data_start: u64,
    /// BLAKE3 of everything before the data: the length and the JSON.
    pub blake3: blake3::Hash,
}

/// A file that is damaged, or no safetensors file.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A pointer that Git LFS leaves in place of a large file.
    #[error("{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull` in its directory")]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// A file that is too short to hold the length of a header.
    #[error("{path} has {len} bytes; a safetensors file has at least 8. Download, convert or build it again")]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// The header's length is impossible.
    #[error(
        "{path} says that its header has {len} bytes; at most {max} are possible. It is damaged, or no safetensors file"
    )]
    HeaderLength {
        /// The file.
        path: PathBuf,
        /// The length that it names.
        len: u64,
        /// The longest that is possible.
        max: u64,
    },
    /// The header is not the JSON it should be.
    #[error("the header of {path} is not valid: {detail}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        detail: String,
    },
    /// A tensor whose range does not fit its shape.
    #[error("{path}: tensor `{tensor}` is {dtype} {shape:?}, which takes {expected} bytes, but its data has {found}")]
    Size {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes of that shape.
        expected: u64,
        /// Bytes of its range.
        found: u64,
    },
    /// A range that ends before it starts, or sizes that overflow 64 bits.
    #[error("{path}: tensor `{tensor}` has an impossible shape {shape:?} or data range {start}..{end}")]
    Range {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// First byte of its data.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// Two tensors share bytes.
    #[error("{path}: the data of tensors `{first}` and `{second}` overlap")]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The tensor that starts first.
        first: String,
        /// The other tensor.
        second: String,
    },
    /// Bytes that belong to no tensor.
    #[error("{path}: the {len} bytes before tensor `{before}` belong to no tensor")]
    Hole {
        /// The file.
        path: PathBuf,
        /// The tensor after them.
        before: String,
        /// How many.
        len: u64,
    },
    /// The file is shorter or longer than its tensors.
    #[error(
        "{path} has {found} bytes, but its header describes {expected}; it is truncated or damaged. Download, convert or build it again"
    )]
    FileLength {
        /// The file.
        path: PathBuf,
        /// Bytes that the header describes.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
}

impl Header {
    /// Reads and checks the header of `file`; `path` is for messages.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn read(file: &File, path: &Path) -> Result<Header, HeaderError> {
        let path = path.to_owned();
        let io = |source| HeaderError::Io { path: path.clone(), source };
        let file_len = file.metadata().map_err(io)?.len();
        let mut start = [0u8; 40];
        let known = usize::try_from(file_len.min(40)).expect("at most 40");
        file.read_exact_at(&mut start[..known], 0).map_err(io)?;
        if start.starts_with(b"version https://git-lfs") {
            return Err(HeaderError::LfsPointer { path });
        }
        if file_len < LENGTH_BYTES {
            return Err(HeaderError::TooShort { path, len: file_len });
        }
        let len = u64::from_le_bytes(start[..8].try_into().expect("8 bytes"));
        let max = MAX_HEADER_BYTES.min(file_len - LENGTH_BYTES);
        if len > max {
            return Err(HeaderError::HeaderLength { path, len, max });
        }
        let mut text = vec![0; usize::try_from(len).expect("at most MAX_HEADER_BYTES")];
        file.read_exact_at(&mut text, LENGTH_BYTES).map_err(io)?;
        Self::parse(&text, file_len, &path)
    }

    /// Checks the JSON `text` of a header against the length of its file.
    fn parse(text: &[u8], file_len: u64, path: &Path) -> Result<Header, HeaderError> {
        let path = || path.to_owned();
        let raw: RawHeader =
            serde_json::from_slice(text).map_err(|e| HeaderError::Json { path: path(), detail: e.to_string() })?;
        let data_start = LENGTH_BYTES + text.len() as u64;
        let mut tensors = Vec::with_capacity(raw.tensors.len());
        for (name, RawEntry { dtype, shape, data_offsets: (start, end) }) in raw.tensors {
            let range = |shape| HeaderError::Range { path: path(), tensor: name.clone(), shape, start, end };
            let elements = shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64));
            let bytes = elements.and_then(|n| n.checked_mul(bits_of(&dtype).unwrap_or(0)));
            let absolute = start.checked_add(data_start).zip(end.checked_add(data_start));
            let (Some(bits), Some((from, to))) = (bytes, absolute) else { return Err(range(shape)) };
            if to < from {
                return Err(range(shape));
            }
            let expected = bits.div_ceil(8);
            // The size of an unknown type is not checked. Nothing in this project reads tensors of such types.
            if bits_of(&dtype).is_some() && expected != to - from {
                return Err(HeaderError::Size { path: path(), tensor: name, dtype, shape, expected, found: to - from });
            }
            tensors.push(TensorEntry { name, dtype, shape, start: from, end: to });
        }
        tensors.sort_by(|a, b| (a.start, a.end, &a.name).cmp(&(b.start, b.end, &b.name)));
        let mut at = data_start;
        let mut previous = "";
        for tensor in &tensors {
            if tensor.start < at {
                let (first, second) = (previous.to_owned(), tensor.name.clone());
                return Err(HeaderError::Overlap { path: path(), first, second });
            }
            if tensor.start > at {
                let (before, len) = (tensor.name.clone(), tensor.start - at);
                return Err(HeaderError::Hole { path: path(), before, len });
            }
            at = tensor.end;
            previous = &tensor.name;
        }
        if at != file_len {
            return Err(HeaderError::FileLength { path: path(), expected: at, found: file_len });
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text);
        Ok(Header { metadata: raw.metadata, tensors, data_start, blake3: hasher.finalize() })
    }
}

/// Bits of one element of a safetensors type.
fn bits_of(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The header before it is checked. It is read entry by entry, so a hostile header takes no more memory than a real one
/// of its length.
#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, RawEntry>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                    } else if header.tensors.insert(name.clone(), map.next_value()?).is_some() {
                        return Err(A::Error::custom(format_args!("tensor `{name}` is there twice")));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Header, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        std::fs::write(&path, bytes).unwrap();
        Header::read(&File::open(&path).unwrap(), Path::new("x.safetensors")).map_err(|e| e.to_string())
    }

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn a_good_header_is_sorted_by_offset() {
        let header = r#"{"__metadata__":{"a":"b"},"y":{"dtype":"F16","shape":[2,1],"data_offsets":[4,8]},
            "x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"none":{"dtype":"I8","shape":[0],"data_offsets":[4,4]}}"#;
        let header = read(&file(header, 8)).unwrap();
        assert_eq!(header.metadata["a"], "b");
        assert_eq!(header.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["x", "none", "y"]);
        assert_eq!(header.tensors[2].float(), Some(DType::F16));
        assert_eq!(header.tensors[2].start, header.data_start + 4);
    }

    #[test]
    fn each_malformed_file_has_its_message() {
        let one = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let mut cases: Vec<Vec<u8>> = vec![
            b"1234".to_vec(),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n".to_vec(),
            [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat(),
            file("{", 0),
            file("[]", 0),
            file(r#"{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4),
            file(one, 3),
            file(one, 5),
        ];
        for (shape_x, offsets_x, shape_y, offsets_y) in [
            ("[1]", "[0,4]", "[1]", "[2,6]"),
            ("[1]", "[0,4]", "[1]", "[8,12]"),
            ("[1]", "[4,0]", "[1]", "[0,4]"),
            ("[2]", "[0,4]", "[1]", "[4,8]"),
            ("[4294967296,4294967296]", "[0,4]", "[1]", "[4,8]"),
            ("[1]", "[18446744073709551612,18446744073709551615]", "[1]", "[0,4]"),
        ] {
            let header = format!(
                r#"{{"x":{{"dtype":"F32","shape":{shape_x},"data_offsets":{offsets_x}}},"y":{{"dtype":"F32","shape":{shape_y},"data_offsets":{offsets_y}}}}}"#
            );
            cases.push(file(&header, 8));
        }
        cases.push(file(
            r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            4,
        ));
        let messages: Vec<String> = cases.iter().map(|bytes| read(bytes).unwrap_err()).collect();
        insta::assert_snapshot!(messages.join("\n"));
    }
}
