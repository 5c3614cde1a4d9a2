//! What calibration text was like: at the inputs of a model's linears, and in its cache.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use mixtral_model::ModelConfig;

use crate::names::{HfTensor, Matrix};

/// Moments are kept for pairs of inputs in blocks of this many neighbours.
pub const BLOCK: usize = 128;

/// The input of some linears. Layers and experts are counted over the whole model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearInput {
    /// That of the query, key and value projections.
    Attention(usize),
    /// That of attention's output projection.
    Output(usize),
    /// That of an expert's gate and up projections: the tokens that were sent to it.
    FeedForward {
        /// Layer.
        layer: usize,
        /// Expert; 0 in a dense model.
        expert: usize,
    },
    /// That of an expert's down projection.
    Down {
        /// Layer.
        layer: usize,
        /// Expert; 0 in a dense model.
        expert: usize,
    },
}

impl LinearInput {
    /// All of a layer.
    #[must_use]
    pub fn of_layer(model: &ModelConfig, layer: usize) -> Vec<Self> {
        let mut inputs = vec![LinearInput::Attention(layer), LinearInput::Output(layer)];
        for expert in 0..model.moe.num_experts {
            inputs.extend([LinearInput::FeedForward { layer, expert }, LinearInput::Down { layer, expert }]);
        }
        inputs
    }

    /// The source's tensors that multiply it.
    fn readers(self, model: &ModelConfig) -> Vec<HfTensor> {
        let matrix = |layer, expert, matrix| HfTensor::feed_forward(model, layer, expert, matrix);
        match self {
            LinearInput::Attention(layer) => {
                vec![HfTensor::Query(layer), HfTensor::Key(layer), HfTensor::Value(layer)]
            }
            LinearInput::Output(layer) => vec![HfTensor::Output(layer)],
            LinearInput::FeedForward { layer, expert } => {
                vec![matrix(layer, expert, Matrix::Gate), matrix(layer, expert, Matrix::Up)]
            }
            LinearInput::Down { layer, expert } => vec![matrix(layer, expert, Matrix::Down)],
        }
    }

    /// Whether the two are the same input, or that of the same matrix of two experts of a layer.
    fn is_like(&self, other: &LinearInput) -> bool {
        match (self, other) {
            (LinearInput::FeedForward { layer: a, .. }, LinearInput::FeedForward { layer: b, .. })
            | (LinearInput::Down { layer: a, .. }, LinearInput::Down { layer: b, .. }) => a == b,
            _ => self == other,
        }
    }

    /// Its elements.
    #[must_use]
    pub fn width(self, model: &ModelConfig) -> usize {
        match self {
            LinearInput::Attention(_) | LinearInput::FeedForward { .. } => model.hidden_size,
            LinearInput::Output(_) => model.num_heads * model.head_dim,
            LinearInput::Down { .. } => model.intermediate_size,
        }
    }
}

/// `layers.3.attention`, `layers.3.output`, `layers.3.experts.5`, `layers.3.experts.5.down`.
impl fmt::Display for LinearInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LinearInput::Attention(layer) => write!(f, "layers.{layer}.attention"),
            LinearInput::Output(layer) => write!(f, "layers.{layer}.output"),
            LinearInput::FeedForward { layer, expert } => write!(f, "layers.{layer}.experts.{expert}"),
            LinearInput::Down { layer, expert } => write!(f, "layers.{layer}.experts.{expert}.down"),
        }
    }
}

/// What was seen at one input.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InputStatistics {
    /// How many tokens were seen.
    pub tokens: u64,
    /// The largest magnitude of any element.
    pub amax: f32,
    /// Means of products of two elements: for each block of [`BLOCK`] neighbours the upper triangle of its matrix, row
    /// by row. The diagonals are the mean squares.
    pub moments: Vec<f32>,
}

/// How many moments an input of `width` elements has.
#[must_use]
pub fn num_moments(width: usize) -> usize {
    let triangle = |n: usize| n * (n + 1) / 2;
    width / BLOCK * triangle(BLOCK) + triangle(width % BLOCK)
}

impl InputStatistics {
    /// The moments of block `block` of an input of `width` elements, as a square matrix with equal halves.
    #[must_use]
    pub fn block(&self, width: usize, block: usize) -> Vec<f64> {
        let n = BLOCK.min(width - block * BLOCK);
        let mut moments = self.moments[num_moments(block * BLOCK)..].iter();
        let mut matrix = vec![0.0; n * n];
        for i in 0..n {
            for j in i..n {
                let moment = f64::from(moments.next().copied().unwrap_or(0.0));
                (matrix[i * n + j], matrix[j * n + i]) = (moment, moment);
            }
        }
        matrix
    }

    /// Whether so few tokens were seen that nothing can be said of pairs in a block.
    #[must_use]
    pub fn is_rare(&self) -> bool {
        self.tokens < BLOCK as u64
    }
}

/// What calibration text was like.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statistics {
    inputs: BTreeMap<LinearInput, InputStatistics>,
    /// Which input a tensor of the source multiplies.
    readers: HashMap<String, LinearInput>,
    /// For each layer, the largest magnitude of a key (after its rotation) and of a value.
    pub cache_amax: Vec<[f32; 2]>,
}

impl Statistics {
    /// Adds what was seen in the next layer. Where an expert saw too few tokens, it gets what the layer's other experts saw: the
    /// largest of their magnitudes, and the means of their moments. Its count of tokens stays.
    pub fn add_layer(
        &mut self,
        model: &ModelConfig,
        mut layer: BTreeMap<LinearInput, InputStatistics>,
        cache: [f32; 2],
    ) {
        let seen = layer.clone();
        for (input, found) in layer.iter_mut().filter(|(_, found)| found.is_rare()) {
            let alike = seen.iter().filter(|(other, _)| input.is_like(other));
            let alike: Vec<&InputStatistics> = alike.map(|(_, seen)| seen).collect();
            found.amax = alike.iter().fold(0.0, |amax, seen| seen.amax.max(amax));
            found.moments = mean_moments(&alike);
        }
        self.add_kept_layer(model, layer, cache);
    }

    /// Adds the next layer of statistics that were complete when they were kept.
    pub fn add_kept_layer(
        &mut self,
        model: &ModelConfig,
        layer: BTreeMap<LinearInput, InputStatistics>,
        cache: [f32; 2],
    ) {
        for (input, found) in layer {
            self.readers.extend(input.readers(model).into_iter().map(|tensor| (tensor.to_string(), input)));
            self.inputs.insert(input, found);
        }
        self.cache_amax.push(cache);
    }

    /// What was seen at the input of the linear whose weight is the source's tensor `source`.
    #[must_use]
    pub fn of(&self, source: &str) -> Option<&InputStatistics> {
        self.inputs.get(self.readers.get(source)?)
    }

    /// The largest magnitude at the inputs of all linears that share an input scale with that of the source's tensor `source`:
    /// all experts of a layer have one.
    #[must_use]
    pub fn shared_amax(&self, source: &str) -> Option<f32> {
        let input = self.readers.get(source)?;
        let alike = self.inputs.iter().filter(|(other, _)| input.is_like(other));
        Some(alike.fold(0.0, |amax, (_, seen)| seen.amax.max(amax)))
    }

    /// Everything that was seen, in the order of the model.
    pub fn iter(&self) -> impl Iterator<Item = (LinearInput, &InputStatistics)> {
        self.inputs.iter().map(|(input, seen)| (*input, seen))
    }

    /// The inputs that saw too few tokens, with their number.
    #[must_use]
    pub fn rare(&self) -> Vec<(LinearInput, u64)> {
        self.iter().filter(|(_, seen)| seen.is_rare()).map(|(input, seen)| (input, seen.tokens)).collect()
    }
}

/// The means over all tokens of several inputs.
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "means, kept as f32")]
fn mean_moments(seen: &[&InputStatistics]) -> Vec<f32> {
    let tokens = seen.iter().map(|seen| seen.tokens).sum::<u64>().max(1) as f64;
    let mut sums = vec![0f64; seen.first().map_or(0, |seen| seen.moments.len())];
    for seen in seen {
        for (sum, moment) in sums.iter_mut().zip(&seen.moments) {
            *sum += f64::from(*moment) * seen.tokens as f64;
        }
    }
    sums.into_iter().map(|sum| (sum / tokens) as f32).collect()
}

#[cfg(test)]
mod tests {
    use mixtral_model::DType;

    use super::*;

    fn seen(tokens: u64, amax: f32, moment: f32) -> InputStatistics {
        InputStatistics { tokens, amax, moments: vec![moment; num_moments(130)] }
    }

    #[test]
    fn an_expert_that_saw_too_little_gets_what_its_neighbours_saw() {
        let model = ModelConfig::mixtral_8x7b(DType::F32);
        let input = |expert| LinearInput::FeedForward { layer: 0, expert };
        let layer = [
            (LinearInput::Attention(0), seen(1000, 99.0, 7.0)),
            (input(0), seen(300, 2.0, 1.0)),
            (input(1), seen(100, 5.0, 9.0)),
            (input(2), seen(0, 0.0, 0.0)),
        ];
        let mut statistics = Statistics::default();
        statistics.add_layer(&model, layer.into_iter().collect(), [1.0, 2.0]);
        assert_eq!(statistics.rare(), [(input(1), 100), (input(2), 0)]);
        let of = |expert, matrix| {
            let name = HfTensor::feed_forward(&model, 0, expert, matrix).to_string();
            let found = statistics.of(&name).unwrap();
            (found.amax, found.moments[0])
        };
        assert_eq!(of(0, Matrix::Up), (2.0, 1.0));
        assert_eq!(of(1, Matrix::Gate), (5.0, 3.0));
        assert_eq!(of(2, Matrix::Up), (5.0, 3.0));
        assert_eq!(statistics.of("lm_head.weight"), None);
        let shared = |tensor: HfTensor| statistics.shared_amax(&tensor.to_string());
        assert_eq!(shared(HfTensor::feed_forward(&model, 0, 0, Matrix::Up)), Some(5.0));
        assert_eq!((shared(HfTensor::Key(0)), shared(HfTensor::LmHead)), (Some(99.0), None));
    }

    #[test]
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    fn a_block_is_a_symmetric_matrix() {
        let moments = (0..num_moments(130)).map(|index| index as f32).collect();
        let seen = InputStatistics { tokens: 1, amax: 1.0, moments };
        let (first, last) = (seen.block(130, 0), seen.block(130, 1));
        assert_eq!((first.len(), first[1], first[BLOCK], first[BLOCK + 1]), (BLOCK * BLOCK, 1.0, 1.0, BLOCK as f64));
        let start = num_moments(BLOCK) as f64;
        assert_eq!(last, [start, start + 1.0, start + 1.0, start + 2.0]);
    }
}
