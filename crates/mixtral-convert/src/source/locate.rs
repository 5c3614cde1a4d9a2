//! Finds the model's tensors among those that are stored.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use mixtral_checkpoint::TensorEntry;
use mixtral_checkpoint::header::safetensors_name;
use mixtral_checkpoint::names::part_name;
use mixtral_model::{DType, ElemType, Formats, ModelConfig, PartKind, Quantization, WeightFormat};

use super::config::SourceConfig;
use super::diagnosis::{Misfits, diagnose, quantized};
use super::files::{self, Dialect};
use super::quantized::{Beside, MustBe, Quantized, Scheme, StoredPart};
use super::view::View;
use super::{Layout, Located, Stored};
use crate::error::ConvertError;
use crate::names::{HfTensor, Matrix, cache_scales};

/// The stored tensors by name, each with the index of its file.
pub type Entries = HashMap<String, (usize, TensorEntry)>;

/// How a model is stored.
#[derive(Clone, Debug)]
pub struct Form {
    /// Its directory's conventions.
    pub dialect: Dialect,
    /// How its tensors are laid out.
    pub layout: &'static dyn Layout,
    /// Whether lm_head is the embedding.
    pub tied: bool,
    /// The ways in which its linears may be quantized.
    pub schemes: Vec<Scheme>,
    /// How attention's linears are quantized; `None` if they are plain.
    pub attention: Option<Quantized>,
    /// The same of the feed-forward's.
    pub feed_forward: Option<Quantized>,
}

/// The model's tensors, and those that were only there to be checked.
#[derive(Debug, Default)]
pub struct Found {
    /// By transformers 4's names. Parts of quantized linears have the names that a checkpoint would give them.
    pub tensors: HashMap<String, Located>,
    /// Tensors whose elements must be something, by their names.
    pub to_check: Vec<(String, MustBe)>,
    /// Stored tensors that are one number, by the names that a checkpoint would give them, or by transformers' for scales of caches.
    pub numbers: HashMap<String, String>,
}

impl Form {
    /// Finds out from the first linears of attention and of the feed-forward how these are stored. `schemes` are the ways
    /// in which they may be quantized.
    pub fn new(
        dialect: Dialect,
        layout: &'static dyn Layout,
        tied: bool,
        model: &ModelConfig,
        schemes: Vec<Scheme>,
        stored: &Entries,
    ) -> Self {
        let mut form = Form { dialect, layout, tied, schemes, attention: None, feed_forward: None };
        let [query, gate] = firsts(model);
        form.attention = form.quantized(model, query, stored);
        form.feed_forward = form.quantized(model, gate, stored);
        form
    }

    /// How the linear `tensor` is quantized, unless it is plain.
    fn quantized(&self, model: &ModelConfig, tensor: HfTensor, stored: &Entries) -> Option<Quantized> {
        let (shape, linear) = (tensor.matrix_shape(model), self.linear(model, tensor));
        if is_plain(&linear, stored) {
            return None;
        }
        let find = |suffix: &str| stored.get(&format!("{linear}.{suffix}")).map(|(_, entry)| entry);
        let fits = |scheme: &&Scheme| {
            let parts = scheme.parts(shape);
            parts.iter().all(|part| find(part.suffix).is_some_and(|entry| is_shape(&part.shape, &entry.shape)))
        };
        // The first of those that explain most tensors. If none fits, the first says what is expected.
        let fitting = self.schemes.iter().rev().filter(fits).max_by_key(|scheme| scheme.parts(shape).len());
        let scheme = fitting.or(self.schemes.first())?.clone();
        let parts = scheme.parts(shape);
        let scales = parts.iter().find(|part| part.kind == PartKind::Scales).and_then(|part| find(part.suffix));
        let format = scheme.format(scales.and_then(TensorEntry::float).unwrap_or(DType::F16));
        Some(Quantized { scheme, format })
    }

    /// The formats of the checkpoint's weights.
    pub fn formats(&self) -> Formats {
        let format = |of: &Option<Quantized>| of.as_ref().map_or(WeightFormat::Plain, |of| of.format);
        Formats { attention: format(&self.attention), feed_forward: format(&self.feed_forward) }
    }

    /// For messages and the report. `formats` are those of the checkpoint.
    pub fn name(&self, formats: Formats) -> String {
        let mut name = self.layout.name().to_owned();
        let Some(of) = self.attention.as_ref().or(self.feed_forward.as_ref()) else { return name };
        let Formats { attention, feed_forward } = formats;
        name += ", quantized by ";
        name += of.scheme.name();
        name += &match attention == feed_forward {
            true => format!(": {attention}"),
            false => format!(": attention {attention}, feed-forward {feed_forward}"),
        };
        name
    }

    /// The stored name of a linear, without that of its weight.
    fn linear(&self, model: &ModelConfig, tensor: HfTensor) -> String {
        let name = self.layout.stored(model, tensor).name;
        name.strip_suffix(".weight").unwrap_or(&name).to_owned()
    }

    /// Finds every tensor of the model.
    ///
    /// # Errors
    /// All tensors that are missing, have another shape or type, or have no place in the model; or what is wrong with all
    /// of them.
    pub fn locate(&self, dir: &Path, config: &SourceConfig, stored: &Entries) -> Result<Found, ConvertError> {
        let model = &config.model;
        let mut search = Search::new(stored);
        // The one matrix of a tied model may be stored under either name.
        let head = self.layout.stored(model, HfTensor::LmHead);
        let embedding_is_head = self.tied && stored.contains_key(&head.name);
        let [query, gate] = firsts(model);
        for tensor in HfTensor::all(model, self.tied) {
            // A linear, and the first of its part.
            let (quantized, first) = match tensor {
                HfTensor::Query(_) | HfTensor::Key(_) | HfTensor::Value(_) | HfTensor::Output(_) => {
                    (self.attention.as_ref(), Some(query))
                }
                HfTensor::Expert { .. } | HfTensor::Mlp { .. } => (self.feed_forward.as_ref(), Some(gate)),
                _ => (None, None),
            };
            let (name, linear) = (tensor.to_string(), self.linear(model, tensor));
            if let Some(names) = self.unlike(model, tensor, quantized.is_some(), stored) {
                let first = first.map(|first| self.linear(model, first));
                search.unlike(names, &linear, first.as_deref(), quantized.is_some());
            } else if let Some(Quantized { scheme, format }) = quantized {
                for StoredPart { kind, suffix, dtype, shape, view } in scheme.parts(tensor.matrix_shape(model)) {
                    let (key, stored) = (part_name(&name, kind), format!("{linear}.{suffix}"));
                    let Some(view) = view else {
                        search.number(key, stored);
                        continue;
                    };
                    let dtype = dtype.or(if let WeightFormat::Quantized(Quantization { scale, .. }) = *format {
                        Some(safetensors_name(scale.into()))
                    } else {
                        None
                    });
                    search.take(key, stored.clone(), Stored { name: stored, shape, view }, dtype);
                }
                for beside in scheme.beside(tensor.matrix_shape(model)) {
                    search.check(format!("{linear}.{}", beside.suffix), &beside);
                }
            } else {
                let at = match tensor {
                    HfTensor::EmbedTokens if embedding_is_head => head.clone(),
                    _ => self.layout.stored(model, tensor),
                };
                search.take(name.clone(), name, at, None);
            }
        }
        if self.dialect == Dialect::HuggingFace {
            search.cache_scales(model.num_layers);
        }
        let Search { found, mut problems, mut misfits, seen, .. } = search;
        misfits.extra = stored.keys().map(String::as_str).filter(|n| !seen.contains(*n) && !is_harmless(n)).collect();
        misfits.extra.sort_unstable();
        problems.extend(misfits.extra.iter().map(|name| format!("  `{name}`: the model has no place for it")));
        if problems.is_empty() {
            return Ok(found);
        }
        let method = || config.quantization.clone().or_else(|| files::quantizer(dir));
        let diagnosis = if self.schemes.is_empty() { quantized(stored, method) } else { None };
        let diagnosis = diagnosis.or_else(|| diagnose(self.dialect, self.layout, model, stored, &misfits));
        let dir = dir.to_owned();
        if let Some(diagnosis) = diagnosis {
            return Err(ConvertError::Diagnosed { dir, diagnosis: Box::new(diagnosis) });
        }
        Err(ConvertError::Tensors {
            dir,
            config: self.dialect.config_file(),
            layout: self.name(self.formats()),
            problems,
        })
    }

    /// The names of the tensors of a linear that is plain and should be quantized, or the other way round.
    fn unlike(&self, model: &ModelConfig, tensor: HfTensor, quantized: bool, stored: &Entries) -> Option<Vec<String>> {
        let (shape, linear) = (tensor.matrix_shape(model), self.linear(model, tensor));
        let suffixes = self.schemes.iter().flat_map(|scheme| {
            let parts = scheme.parts(shape).into_iter().map(|part| part.suffix);
            parts.chain(scheme.beside(shape).into_iter().map(|beside| beside.suffix))
        });
        let names = suffixes.chain(["weight"]).map(|suffix| format!("{linear}.{suffix}"));
        let names: Vec<String> = names.filter(|name| stored.contains_key(name)).collect();
        let is_unlike = !self.schemes.is_empty() && !names.is_empty() && quantized == is_plain(&linear, stored);
        is_unlike.then_some(names)
    }
}

/// The search for a model's tensors.
struct Search<'a> {
    stored: &'a Entries,
    found: Found,
    problems: Vec<String>,
    misfits: Misfits<'a>,
    /// Names of stored tensors that have been asked for.
    seen: BTreeSet<String>,
}

impl<'a> Search<'a> {
    fn new(stored: &'a Entries) -> Self {
        let (found, misfits) = (Found::default(), Misfits::default());
        Search { stored, found, problems: Vec::new(), misfits, seen: BTreeSet::new() }
    }

    /// Takes the tensor that is stored at `at`, of the type `dtype` or else of any float type, as the model's tensor
    /// `key`. Messages call it `name`.
    fn take(&mut self, key: String, name: String, at: Stored, dtype: Option<&'static str>) {
        let Stored { name: stored, shape, view } = at;
        let entry = self.stored.get(&stored);
        let problem = match entry {
            None => format!("missing, expected shape {shape:?}"),
            Some((_, entry)) if !is_shape(&shape, &entry.shape) => {
                format!("expected shape {shape:?}, found {:?}", entry.shape)
            }
            Some((_, entry)) if dtype.map_or(entry.float().is_none(), |dtype| dtype != entry.dtype) => {
                format!("expected type {}, found {}", dtype.unwrap_or("F32, F16 or BF16"), entry.dtype)
            }
            Some((file, entry)) => {
                self.found.tensors.insert(key, located(name, *file, entry, &shape, view));
                self.seen.insert(stored);
                return;
            }
        };
        // One stored tensor may hold many experts; its problem is listed once.
        if self.seen.insert(stored.clone()) {
            self.problems.push(format!("  `{stored}`: {problem}"));
            if entry.is_some() { &mut self.misfits.wrong } else { &mut self.misfits.missing }.push(stored);
        }
    }

    /// Takes the one number of the tensor `stored`, which is a float of any type.
    fn number(&mut self, key: String, stored: String) {
        let problem = match self.stored.get(&stored) {
            None => "missing, expected one number".to_owned(),
            Some((_, entry)) if entry.float().is_none() || entry.shape.iter().product::<usize>() != 1 => {
                format!("expected one number (F32, F16 or BF16), found {} {:?}", entry.dtype, entry.shape)
            }
            Some(_) => {
                self.seen.insert(stored.clone());
                self.found.numbers.insert(key, stored);
                return;
            }
        };
        self.problems.push(format!("  `{stored}`: {problem}"));
        self.seen.insert(stored);
    }

    /// Takes the scales of keys and values, those of an e4m3 cache. All layers have them, or none has.
    fn cache_scales(&mut self, num_layers: usize) {
        let all: Vec<[String; 4]> = (0..num_layers).flat_map(cache_scales).collect();
        let find = |spellings: &[String; 4]| spellings.iter().find(|name| self.stored.contains_key(*name)).cloned();
        let found: Vec<Option<String>> = all.iter().map(find).collect();
        if found.iter().any(Option::is_some) {
            for (spellings, name) in all.into_iter().zip(found) {
                let key = spellings[0].clone();
                self.number(key.clone(), name.unwrap_or(key));
            }
        }
    }

    /// Notes what the tensor `name` must hold, if it is stored.
    fn check(&mut self, name: String, beside: &Beside) {
        let Some((_, entry)) = self.stored.get(&name) else { return };
        let Beside { dtype, shape, must_be, .. } = beside;
        if entry.shape != *shape || entry.dtype != *dtype {
            let (found, of) = (&entry.dtype, &entry.shape);
            self.problems.push(format!("  `{name}`: expected {dtype} {shape:?}, found {found} {of:?}"));
        } else {
            self.found.to_check.push((name.clone(), *must_be));
        }
        self.seen.insert(name);
    }

    /// Notes that the matrix `name`, whose tensors are `names`, is quantized and must be plain, or the other way round.
    /// `first` is the linear that must be stored alike; if there is none, it must be plain.
    fn unlike(&mut self, names: Vec<String>, name: &str, first: Option<&str>, quantized: bool) {
        let (is, first_is) = if quantized { ("plain", "quantized") } else { ("quantized", "plain") };
        let rule = match first {
            Some(first) => format!(
                "and `{first}` is {first_is}; attention's linears must be stored alike, and so must the feed-forward's"
            ),
            None => "and only attention's and the feed-forward's linears may be".to_owned(),
        };
        self.problems.push(format!("  `{name}`: it is {is}, {rule}"));
        self.seen.extend(names);
    }
}

/// Whether a stored tensor has the shape `expected`, whose last dimension may be left out if it is one.
fn is_shape(expected: &[usize], found: &[usize]) -> bool {
    expected == found || matches!(expected, [rows @ .., 1] if rows == found)
}

fn located(name: String, file: usize, entry: &TensorEntry, shape: &[usize], view: View) -> Located {
    let elem = entry.elem().filter(|elem| elem.float().is_some() || *elem == ElemType::F8E4M3).unwrap_or(ElemType::U8);
    let mut located = Located { name, file, elem, start: entry.start, stored_cols: 1, view };
    let rows: usize = shape.iter().rev().skip(1).product();
    // The header's check has shown that the file has so many bytes.
    let row_bytes = usize::try_from(entry.num_bytes()).expect("a file that is addressed") / rows.max(1);
    located.stored_cols = row_bytes / located.stored_size();
    located
}

/// The first linears of attention and of the feed-forward.
fn firsts(model: &ModelConfig) -> [HfTensor; 2] {
    [HfTensor::Query(0), HfTensor::feed_forward(model, 0, 0, Matrix::Gate)]
}

/// Whether a linear is stored as floats.
fn is_plain(linear: &str, stored: &Entries) -> bool {
    stored.get(&format!("{linear}.weight")).is_some_and(|(_, entry)| entry.float().is_some())
}

/// Whether a tensor may be left out: published models carry tables of the rotary embedding, which follow from its base.
fn is_harmless(name: &str) -> bool {
    [".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"].iter().any(|end| name.ends_with(end))
        || name == "rope.freqs"
}
