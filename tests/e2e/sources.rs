//! The warnings of `convert` for a source that it accepts, but that is not all it seems to be.

use std::fs;
use std::path::Path;

use mixtral_model::DType;
use mixtral_testkit::{Layout, Tensor, TinyModel, write_safetensors};
use serde_json::{Value, json};

use crate::tool::{fast_dir, mixtral_in};

fn edit(path: &Path, key: &str, value: Value) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    json[key] = value;
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn oddities_that_are_taken_with_a_warning() {
    let dir = fast_dir();
    let at = dir.path();
    let model = TinyModel::mixtral(DType::Bf16, 21);
    let tensor = |name: &str| [Tensor::new(name, DType::F32, &[2], &[1.0; 2])];
    type Spoil<'a> = (&'a str, &'a dyn Fn(&Path));
    let spoils: [Spoil<'_>; 5] = [
        ("nothing odd", &|_| {}),
        ("tied by its configuration alone", &|dir| edit(&dir.join("config.json"), "tie_word_embeddings", json!(true))),
        ("a quantizer that is left over", &|dir| {
            edit(&dir.join("config.json"), "quantization_config", json!({ "quant_method": "hqq" }));
        }),
        ("an adapter beside it", &|dir| {
            write_safetensors(&dir.join("adapter_model.safetensors"), &tensor("a.lora_A.weight"));
        }),
        ("shards beside the single file", &|dir| {
            write_safetensors(&dir.join("model-00001-of-00002.safetensors"), &tensor("model.norm.weight"));
            let map = json!({ "model.norm.weight": "model-00001-of-00002.safetensors" });
            fs::write(dir.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
        }),
    ];
    let mut text = String::new();
    for (name, spoil) in spoils {
        let from = at.join("model");
        let _ = fs::remove_dir_all(&from);
        model.write(&from, Layout::V4, 1);
        spoil(&from);
        let said = mixtral_in(at, "convert --model_dir model --output_dir checkpoint", &[]);
        let warnings: Vec<&str> = said.err.lines().filter(|line| !line.starts_with("wrote ")).collect();
        text += &format!("# {name}\n{}\n", warnings.join("\n"));
        said.ok();
    }
    insta::assert_snapshot!(text);
}
