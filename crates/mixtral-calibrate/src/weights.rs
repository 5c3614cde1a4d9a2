//! A model's weights for a backend: in memory, or read when they are wanted.

use std::collections::HashMap;
use std::sync::Arc;

use mixtral_checkpoint::TensorSpec;
use mixtral_convert::FloatModel;
use mixtral_convert::plan::TensorRecipe;
use mixtral_engine::{BackendError, Program, WeightSource, WeightView, Weights};
use mixtral_model::ElemType;

use crate::error::CalibrateError;

/// The tensors that a program reads.
pub(crate) struct Tensors {
    model: Arc<FloatModel>,
    recipes: Vec<TensorRecipe>,
}

impl Tensors {
    /// Those of `recipes` that `program` reads.
    pub(crate) fn of(program: &Program, model: &Arc<FloatModel>, mut recipes: Vec<TensorRecipe>) -> Tensors {
        let specs: Vec<_> = program.weights.iter().flat_map(|weight| weight.tensors()).collect();
        recipes.retain(|recipe| specs.iter().any(|spec| spec.name == recipe.spec.name));
        Tensors { model: Arc::clone(model), recipes }
    }

    /// Reads all of them, for a backend that keeps them where they are.
    pub(crate) fn in_memory(self, threads: usize) -> Result<Weights, CalibrateError> {
        let read = self.model.read_all(self.recipes, threads)?;
        let held = read.into_iter().map(|(spec, bytes)| (spec.name.clone(), (spec, bytes)));
        Ok(Weights::Source(Arc::new(Held(held.collect()))))
    }

    /// For a backend that copies each to a memory of its own, piece by piece.
    pub(crate) fn streamed(self) -> Weights {
        let recipes = self.recipes.into_iter().map(|recipe| (recipe.spec.name.clone(), recipe)).collect();
        Weights::Source(Arc::new(Streamed { model: self.model, recipes }))
    }
}

/// Weights in memory.
struct Held(HashMap<String, (TensorSpec, Vec<u8>)>);

impl WeightSource for Held {
    fn weight(&self, name: &str) -> Option<WeightView<'_>> {
        let (spec, bytes) = self.0.get(name)?;
        Some(WeightView { elem: spec.elem, shape: &spec.shape, bytes })
    }
}

/// Weights in the model's files.
struct Streamed {
    model: Arc<FloatModel>,
    recipes: HashMap<String, TensorRecipe>,
}

impl WeightSource for Streamed {
    /// None of them is in memory.
    fn weight(&self, _: &str) -> Option<WeightView<'_>> {
        None
    }

    fn shape(&self, name: &str) -> Option<(ElemType, &[usize])> {
        let spec = &self.recipes.get(name)?.spec;
        Some((spec.elem, &spec.shape))
    }

    fn read(&self, name: &str, offset: usize, into: &mut [u8]) -> Result<(), BackendError> {
        let missing = || BackendError::MissingWeight { name: name.to_owned() };
        let recipe = self.recipes.get(name).ok_or_else(missing)?;
        self.model.read(recipe, offset, into).map_err(|error| BackendError::Other(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use mixtral_build::lower;
    use mixtral_convert::{ConvertOptions, Input};
    use mixtral_model::{DType, Mapping, Rank};
    use mixtral_testkit::{Layout, TinyModel};
    use tempfile::TempDir;

    use super::*;
    use crate::step;

    fn model(dir: &Path) -> Arc<FloatModel> {
        TinyModel::mixtral(DType::Bf16, 3).write(dir, Layout::V4, 1);
        let options = ConvertOptions::new(Input::Directory(dir.to_owned()), dir.join("unused"));
        Arc::new(FloatModel::open(&options).unwrap().unwrap())
    }

    #[test]
    fn what_is_streamed_is_what_is_read_whole() {
        let dir = TempDir::new().unwrap();
        let model = model(dir.path());
        let program = lower(&model.config(Mapping::single()), Rank(0), step::limits(1, 8, 8));
        let tensors = || Tensors::of(&program, &model, model.tensors());
        let (Weights::Source(whole), Weights::Source(streamed)) =
            (tensors().in_memory(1).unwrap(), tensors().streamed())
        else {
            panic!("weights of a file");
        };
        for tensor in program.weights.iter().flat_map(|weight| weight.tensors()) {
            let expected = whole.weight(&tensor.name).unwrap();
            assert_eq!(streamed.shape(&tensor.name), Some((expected.elem, expected.shape)));
            // Parts that begin and end within rows, and cross from one source tensor to the next.
            for length in [1 + expected.bytes.len() / 7, 1 + expected.bytes.len() / 2, expected.bytes.len()] {
                for start in (0..expected.bytes.len()).step_by(length) {
                    let expected = &expected.bytes[start..expected.bytes.len().min(start + length)];
                    let mut found = vec![1; expected.len()];
                    streamed.read(&tensor.name, start, &mut found).unwrap();
                    assert!(found == expected, "{} from {start}", tensor.name);
                }
            }
        }
        assert!(streamed.read("nothing", 0, &mut []).is_err());
    }

    /// The tensors of a layer are those of the whole model, under the names of a model of one layer.
    #[test]
    fn a_layer_has_its_own_tensors() {
        let dir = TempDir::new().unwrap();
        let model = model(dir.path());
        let read = |tensors| model.read_all(tensors, 1).unwrap();
        let whole = read(model.tensors());
        let find = |name: &str| whole.iter().find(|(spec, _)| spec.name == name).map(|(_, bytes)| bytes);
        for layer in 0..2 {
            let of_layer = read(model.tensors_of_layer(layer));
            let inner = of_layer.iter().filter(|(spec, _)| spec.name.contains("layers.0."));
            assert!(inner.clone().count() > 5);
            for (spec, bytes) in inner {
                let name = spec.name.replace("layers.0.", &format!("layers.{layer}."));
                assert!(find(&name) == Some(bytes), "{name}");
            }
            let tables: Vec<_> = of_layer.iter().filter(|(spec, _)| spec.name.contains("embedding")).collect();
            assert!(tables.len() == 1 && find(&tables[0].0.name) == Some(&tables[0].1));
        }
    }
}
