//! The old commands' spelling, and their flags that mean nothing here.

use std::ffi::OsString;

/// A flag of the old commands that is accepted without effect.
struct Ignored {
    /// The subcommand.
    command: &'static str,
    /// The flag, in kebab-case.
    flag: &'static str,
    /// Whether a value follows it.
    takes_value: bool,
}

const fn switch(command: &'static str, flag: &'static str) -> Ignored {
    Ignored { command, flag, takes_value: false }
}

const fn valued(command: &'static str, flag: &'static str) -> Ignored {
    Ignored { command, flag, takes_value: true }
}

/// The written list.
const IGNORED: &[Ignored] = &[
    // Loading is always streamed and never on a GPU.
    switch("convert", "--load-by-shard"),
    switch("convert", "--load-model-on-cpu"),
    switch("convert", "--disable-weight-only-quant-plugin"),
    switch("convert", "--use-embedding-sharing"),
    valued("convert", "--dataset-cache-dir"),
    valued("convert", "--log-level"),
    // Input is always packed, the cache always paged, attention always fused, types always strict.
    valued("build", "--remove-input-padding"),
    valued("build", "--paged-kv-cache"),
    valued("build", "--context-fmha"),
    valued("build", "--context-fmha-fp32-acc"),
    valued("build", "--multi-block-mode"),
    valued("build", "--enable-xqa"),
    valued("build", "--use-custom-all-reduce"),
    valued("build", "--use-paged-context-fmha"),
    valued("build", "--nccl-plugin"),
    valued("build", "--lookup-plugin"),
    valued("build", "--bert-attention-plugin"),
    valued("build", "--logits-dtype"),
    valued("build", "--profiling-verbosity"),
    valued("build", "--builder-opt"),
    valued("build", "--input-timing-cache"),
    valued("build", "--output-timing-cache"),
    valued("build", "--opt-num-tokens"),
    valued("build", "--gpus-per-node"),
    valued("build", "--log-level"),
    switch("build", "--strongly-typed"),
    switch("build", "--enable-debug-output"),
    switch("build", "--use-fused-mlp"),
    switch("run", "--use-py-session"),
    switch("run", "--debug-mode"),
    switch("run", "--no-prompt-template"),
    valued("run", "--log-level"),
    valued("run", "--tokenizer-type"),
];

/// `--moe_tp_mode=1` → `--moe-tp-mode=1`, for every flag; values stay as they are.
pub fn hyphenate(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let rename = |arg: OsString| {
        let Some(text) = arg.to_str().filter(|t| t.starts_with("--")) else { return arg };
        match text.split_once('=') {
            Some((flag, value)) => format!("{}={value}", flag.replace('_', "-")).into(),
            None => text.replace('_', "-").into(),
        }
    };
    args.into_iter().map(rename).collect()
}

/// Takes the flags of the list, with their values, out of a command line.
pub fn take_out(args: Vec<OsString>) -> (Vec<OsString>, Vec<String>) {
    let command = args.get(1).and_then(|a| a.to_str()).unwrap_or_default();
    let command = if command == "quantize" { "convert" } else { command }.to_owned();
    let (mut kept, mut ignored) = (Vec::new(), Vec::new());
    let mut args = args.into_iter().peekable();
    while let Some(arg) = args.next() {
        let text = arg.to_str().unwrap_or_default();
        let (flag, inline) = text.split_once('=').map_or((text, false), |(flag, _)| (flag, true));
        match IGNORED.iter().find(|i| i.command == command && i.flag == flag) {
            None => kept.push(arg),
            Some(found) => {
                ignored.push(found.flag.to_owned());
                // A flag that takes a value may have stood alone in other versions of the old commands.
                let value_follows = args.peek().and_then(|a| a.to_str()).is_some_and(|a| !a.starts_with('-'));
                if found.takes_value && !inline && value_follows {
                    args.next();
                }
            }
        }
    }
    (kept, ignored)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(line: &str) -> (String, Vec<String>) {
        let (kept, ignored) = take_out(hyphenate(line.split(' ').map(OsString::from)));
        let kept: Vec<_> = kept.iter().map(|a| a.to_string_lossy().into_owned()).collect();
        (kept.join(" "), ignored)
    }

    #[test]
    fn old_command_lines_are_understood() {
        let (kept, ignored) = taken(
            "mixtral build --checkpoint_dir a_b --remove_input_padding enable --strongly_typed --gemm_plugin=float16",
        );
        assert_eq!(kept, "mixtral build --checkpoint-dir a_b --gemm-plugin=float16");
        assert_eq!(ignored, ["--remove-input-padding", "--strongly-typed"]);
    }

    #[test]
    fn a_flag_is_only_ignored_where_it_was_known() {
        assert_eq!(taken("mixtral run --strongly_typed").1, Vec::<String>::new());
        assert_eq!(taken("mixtral quantize --log_level=info x").0, "mixtral quantize x");
    }
}
