//! `mixtral inspect`: what a checkpoint or an engine holds.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use anyhow::Result;
use mixtral_build::explain::{bytes, kernel_table};
use mixtral_checkpoint::{Checkpoint, rank_tensors};
use mixtral_engine::{EngineDir, EngineError};
use mixtral_kernels::{Code, KernelImages};
use mixtral_model::{Formats, Mapping, ModelConfig, Rank};
use serde_json::json;

use crate::args::inspect::InspectArgs;

/// Runs the command.
pub fn main(args: &InspectArgs) -> Result<()> {
    let mut out = std::io::stdout().lock();
    // The directory's config.json says what it is. If it is neither, the error is that of the reader of checkpoints.
    match EngineDir::open(&args.dir) {
        Ok(engine) => inspect_engine(&engine, args, &mut out),
        Err(EngineError::NotAnEngine { .. } | EngineError::NoConfig { .. } | EngineError::NoDirectory { .. }) => {
            inspect_checkpoint(&Checkpoint::open(&args.dir)?, args, &mut out)
        }
        Err(error) => Err(error.into()),
    }
}

fn describe(out: &mut dyn Write, what: &str, dir: &Path, model: &ModelConfig, mapping: &Mapping) -> Result<()> {
    let Mapping { tp_size, pp_size, moe_tp_size, moe_ep_size } = mapping;
    writeln!(out, "{what} {}", dir.display())?;
    writeln!(out, "model    {:?}, {model}", model.family)?;
    writeln!(
        out,
        "         {} parameters, rope theta {}, norm eps {}, positions {}, window {}, normalization mode {}",
        model.num_parameters(),
        model.rope_theta,
        model.norm_eps,
        model.max_position_embeddings,
        model.sliding_window.map_or("none".to_owned(), |w| w.to_string()),
        model.moe.normalization.mode(),
    )?;
    if model.formats != Formats::default() {
        let Formats { attention, feed_forward } = model.formats;
        writeln!(out, "formats  {feed_forward}, attention {attention}")?;
    }
    writeln!(out, "mapping  tp {tp_size} (experts: tp {moe_tp_size} × ep {moe_ep_size}), pp {pp_size}")?;
    Ok(())
}

fn inspect_checkpoint(checkpoint: &Checkpoint, args: &InspectArgs, out: &mut dyn Write) -> Result<()> {
    let config = checkpoint.config();
    let mut ranks = Vec::new();
    for rank in config.mapping.ranks() {
        // Opening the file checks its header against the config.
        let file = if checkpoint.has_weights() { Some(checkpoint.rank(rank)?) } else { None };
        let tensors: Vec<_> = rank_tensors(config, rank)
            .into_iter()
            .map(|t| {
                let hash = file.as_ref().and_then(|f| f.hash(&t.name)).map(str::to_owned);
                (t, hash)
            })
            .collect();
        ranks.push(tensors);
    }
    if args.json {
        let ranks: Vec<_> = ranks
            .iter()
            .map(|tensors| {
                let list: Vec<_> = tensors
                    .iter()
                    .map(|(t, hash)| {
                        let dtype = t.elem.float().map_or_else(|| json!(t.elem), |dtype| json!(dtype));
                        json!({ "name": t.name, "dtype": dtype, "shape": t.shape, "bytes": t.num_bytes(), "blake3": hash })
                    })
                    .collect();
                json!({ "bytes": tensors.iter().map(|(t, _)| t.num_bytes()).sum::<u64>(), "tensors": list })
            })
            .collect();
        let object = json!({
            "kind": "checkpoint",
            "model": config.model,
            "mapping": config.mapping,
            "use_parallel_embedding": config.use_parallel_embedding,
            "embedding_sharding_dim": config.embedding_sharding_dim,
            "run_id": config.run_id,
            "tool_version": config.tool_version,
            "has_weights": checkpoint.has_weights(),
            "ranks": ranks,
        });
        writeln!(out, "{object:#}")?;
        return Ok(());
    }
    describe(out, "checkpoint", checkpoint.dir(), &config.model, &config.mapping)?;
    writeln!(out, "run      {}", config.run_id.as_deref().unwrap_or("unknown"))?;
    if !checkpoint.has_weights() {
        writeln!(out, "weights  none: an engine built from it has dummy weights")?;
    }
    for (rank, tensors) in ranks.iter().enumerate() {
        let total: u64 = tensors.iter().map(|(t, _)| t.num_bytes()).sum();
        writeln!(out, "rank {rank}: {} tensors, {}", tensors.len(), size(total))?;
        for (tensor, _) in tensors.iter().filter(|_| !args.summary) {
            let shape = format!("{:?}", tensor.shape);
            writeln!(
                out,
                "  {:<52} {:<4} {shape:<22} {}",
                tensor.name,
                tensor.elem.to_string(),
                size(tensor.num_bytes())
            )?;
        }
    }
    Ok(())
}

/// The compiled kernels of a rank.
fn kernels(engine: &EngineDir, rank: Rank) -> Result<Vec<KernelImages>> {
    let codes: BTreeSet<Code> = engine.images(rank)?.into_iter().filter_map(Code::of_image).collect();
    codes
        .into_iter()
        .map(|code| Ok(KernelImages::from_bytes(code, &engine.image(rank, &code.image_name())?)?))
        .collect()
}

fn inspect_engine(engine: &EngineDir, args: &InspectArgs, out: &mut dyn Write) -> Result<()> {
    let config = engine.config();
    let programs = config.mapping.ranks().map(|rank| engine.program(rank)).collect::<Result<Vec<_>, _>>()?;
    let kernels = config.mapping.ranks().map(|rank| kernels(engine, rank)).collect::<Result<Vec<_>>>()?;
    if args.json {
        let ranks: Vec<_> = programs
            .iter()
            .zip(&kernels)
            .map(|(program, kernels)| {
                let tensors: Vec<_> = program
                    .weights
                    .iter()
                    .map(|w| json!({ "name": w.name, "dtype": w.dtype, "format": w.format, "shape": w.shape, "bytes": w.num_bytes() }))
                    .collect();
                let kernels: Vec<_> = kernels
                    .iter()
                    .map(|images| {
                        let list: Vec<_> = images
                            .iter()
                            .map(|k| {
                                json!({
                                    "symbol": k.symbol, "threads": k.threads, "shared_bytes": k.shared_bytes,
                                    "bytes": k.code.len(), "resources": k.resources,
                                })
                            })
                            .collect();
                        json!({ "target": images.code.to_string(), "kernels": list })
                    })
                    .collect();
                json!({
                    "memory": program.memory_plan(),
                    "bytes": program.weight_bytes(),
                    "tensors": tensors,
                    "program": program.to_text(),
                    "kernels": kernels,
                })
            })
            .collect();
        let object = json!({ "kind": "engine", "config": config, "ranks": ranks });
        writeln!(out, "{object:#}")?;
        return Ok(());
    }
    describe(out, "engine", engine.dir(), &config.model, &config.mapping)?;
    let limits = config.limits;
    writeln!(
        out,
        "run      {}, built by mixtral {} for {}",
        config.run_id,
        config.tool_version,
        config.targets.join(", ")
    )?;
    writeln!(
        out,
        "limits   {} sequences, {} tokens a step, {} tokens a sequence, blocks of {}{}{}",
        limits.max_batch_size,
        limits.max_num_tokens,
        limits.max_seq_len,
        limits.block_size,
        if config.gather_context_logits { ", context logits" } else { "" },
        if programs.iter().any(|program| program.attends_in_fp8()) { ", attention of prompts in fp8" } else { "" }
    )?;
    writeln!(out, "weights  {:?}", config.weights)?;
    for (rank, program) in programs.iter().enumerate() {
        let memory = program.memory_plan();
        writeln!(
            out,
            "rank {rank}: {} operations, weights {}, activations {}, KV cache {} a block",
            program.ops.len(),
            bytes(memory.weights),
            bytes(memory.arena),
            bytes(memory.kv_block)
        )?;
        if !config.ranks[Rank(rank).0].weights_header_blake3.is_empty() {
            engine.weight_file(Rank(rank))?;
        }
        for images in &kernels[rank] {
            let table = kernel_table(images);
            // The first line of the table is its total.
            let shown = if args.summary { table.split_inclusive('\n').next().unwrap_or_default() } else { &table };
            write!(out, "{shown}")?;
        }
        if !args.summary {
            write!(out, "{}", program.to_text())?;
        }
    }
    Ok(())
}

fn size(n: u64) -> String {
    bytes(usize::try_from(n).unwrap_or(usize::MAX))
}
