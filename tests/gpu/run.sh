#!/usr/bin/env bash
# The checks that need a GPU, for a machine that has one but neither Rust nor a network. `cargo xtask gpu` makes the folder
# in which this script lies. The script needs bash, NVRTC, and Python with torch, transformers, safetensors and numpy. It
# uses compute-sanitizer if there is one.
#
#     run.sh [SECTION...]      parity tiny sanitizer bench (these by default, in about six minutes), fp8, cache, quantized, twin, load,
#                              peers, ranks, sessions, requests, long, rates, serve, calib
#
# parity     operations and decoder steps against the CPU backend, bits that may not change, and an engine of another build
# tiny       examples/tiny-mixtral and random tiny models against transformers and the CPU backend
# sanitizer  memory errors and races of the kernels
# bench      Mixtral 8x7B's shape: decode, prefill, ceilings
# fp8        operations on fp8 weights against the CPU backend, then Mixtral 8x7B's shape in fp8, built on this machine: bits that
#            may not change, decode, prefill
# cache      attention with an fp8 cache against the CPU backend, then Mixtral 8x7B's shape with a bf16 and an fp8 cache, and
#            with attention in fp8, built on this machine: bits that may not change, decode over long contexts, prefill
# quantized  Mixtral 8x7B's shape in int8 and int4, built on this machine: decode, prefill, and how fast weights are loaded
# twin       Mixtral 8x7B's shape against transformers with the same dummy weights
# load       how fast weights get onto the GPU, and how fast its bus is; writes 19 GB, in memory if there is room
# peers      transformers' own speed on this machine
# ranks      two GPUs: layouts against the CPU backend and transformers, requests that are cancelled, deaths of ranks, and Mixtral
#            8x7B's shape in two halves
# sessions   overlap, reuse, swapping and chunks change no bit in any format; 40 000 short requests to examples/tiny-mixtral
# requests   Mixtral 8x7B's shape in fp8 and int8, built on this machine: many requests, all at once and one by one, with and without
#            overlap; prompts that begin alike
# long       the same with long outputs, in fp8 with an fp8 cache, all at once; and what fills the cache
# rates      the same engine, requests at fixed rates
# serve      Mixtral 8x7B's shape in fp8, built on this machine: what a server adds to its engine; the same load by guidellm and
#            aiperf, if they are installed
# calib      calibration of Mixtral 8x7B's shape by layers and by its own text: time, memory; and that the GPU finds what the CPU finds
#
# Logs go to $OUT (default ./out), at most one for each section. The last thing printed is table.txt there, with one
# line for each check.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${OUT:-out}"
out=$(cd "${OUT:-out}" && pwd)
table=$out/table.txt
mixtral=$here/bin/mixtral
tests=$here/bin/gpu-tests
engines=$here/engines
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
# Ranks that share a GPU as threads of one process each need launch queues of their own.
export CUDA_DEVICE_MAX_CONNECTIONS=32
# NCCL does without multicast over NVLink: a program that uses it can disturb others that share the host's GPUs.
export NCCL_NVLS_ENABLE=0

# Seconds that a section may take. The default sections take about six minutes together.
declare -A limit=([parity]=260 [tiny]=120 [sanitizer]=90 [bench]=90 [fp8]=240 [cache]=300 [quantized]=240 [twin]=150 [load]=150 [peers]=420 [ranks]=560
    [sessions]=180 [requests]=360 [long]=420 [rates]=480 [serve]=420 [calib]=240)

row() { printf '%-44.44s %-5s %s\n' "$1" "$2" "$3" >>"$table"; }

# check NAME FIGURE COMMAND...: runs the command and appends its output to the section's log. FIGURE is a command that
# reads the output and prints a short form of it.
check() {
    local name=$1 figure=$2 begun=$SECONDS rc text verdict=FAIL
    shift 2
    printf '\n== %s: %s\n' "$name" "$*" >>"$log"
    text=$("$@" 2>&1 | tee -a "$log"; exit "${PIPESTATUS[0]}")
    rc=$?
    # compute-sanitizer prints this for a GPU that it cannot inspect, such as a virtual machine's.
    grep -q 'Device not supported' <<<"$text" && verdict=skip
    [ $rc = 0 ] && verdict=pass
    row "$name" $verdict "$($figure <<<"$text" | cut -c 1-220) ($((SECONDS - begun)) s)"
}

last_line() { grep -v '^ *$' | tail -n 1; }

# gpu_test NAME [UNDER...]: runs a test of the GPU test binary. Without a GPU the test passes and prints that it was
# skipped; here that is a failure.
gpu_test() {
    local rc
    "${@:2}" "$tests" --exact "$1" --nocapture --test-threads 1 2>&1 | tee "$scratch/said"
    rc=${PIPESTATUS[0]}
    ! grep -q ': skipped (' "$scratch/said" && return "$rc"
}

# Prints the cases that passed, or the largest error of each data type, or else the verdict.
gpu_figure() {
    awk '/ cases$/ { cases = cases (cases ? "; " : "") $0 }
        / NMSE / { type = $1; gsub(",", ""); for (i = 1; i < NF; i++) if ($i == "median" && $(i + 1) > e[type]) e[type] = $(i + 1) }
        / failures:|panicked at|: skipped/ { failed = failed " " $0 }
        /^test result/ { verdict = $0 }
        END {
            for (type in e) errors = errors (errors ? ", " : "median NMSE at most ") type " " e[type]
            sub(/ finished in.*/, "", verdict)
            print (failed ? failed : cases ? cases : errors ? errors : verdict)
        }'
}

parity() {
    local test name
    for test in $("$tests" --list 2>/dev/null | sed -n 's/: test$//p'); do
        name=${test##*::}
        check "${name//_/ }" gpu_figure gpu_test "$test"
    done
    check "same bits: 8x7b" last_line "$python" "$here/tests/python/determinism.py" --mixtral "$mixtral" \
        --engine "$engines/8x7b" --backend cuda
}

tiny() {
    check "tiny models against transformers" last_line "$python" "$here/tests/python/parity.py" --mixtral "$mixtral" \
        --backend cuda --models 20 --example "$here/examples/tiny-mixtral" --jobs "$(nproc)"
}

sanitizer_figure() { grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|Device not supported|cases$' | tr -s '\n=' ' ' ; }

sanitizer() {
    local code
    PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
    if ! command -v compute-sanitizer >/dev/null; then
        row "compute-sanitizer" skip "neither on the path nor in a toolkit"
        return
    fi
    # One data type is enough: it has all operations, also in the tensor cores' kernels.
    export MIXTRAL_CASES=" bf16"
    # Loading asks the driver for each kernel's parameters until it answers that there are no more, which is no error.
    check "memcheck: operations" sanitizer_figure gpu_test cases::all_cases_are_within_their_limits \
        compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9
    # Racecheck sees only what threads write to shared memory. It would report nothing about kernels for which TMA
    # writes there and wgmma reads, right or wrong. (In decode_tma with rope, threads write the newest key and value; it checks those.)
    code=sm_$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    MIXTRAL_CODE=$code check "racecheck: operations, $code" sanitizer_figure gpu_test \
        cases::all_cases_are_within_their_limits compute-sanitizer --tool racecheck --error-exitcode 9
    row "racecheck: what TMA and wgmma work for" skip "linear/wgmma, attention/prefill_wgmma, attention/decode_tma"
}

# bench_engine NAME ENGINE FLAGS...: writes a row for each figure, or those of requests alone if $only is set, and the JSON to
# $out/bench.json.
bench_engine() {
    local name=$1 engine=$2
    shift 2
    if ! "$mixtral" bench --engine-dir "$engines/$engine" --backend cuda --json "$@" >"$scratch/bench" 2>>"$log"; then
        row "bench $name" FAIL "$(last_line <"$log" | cut -c 1-150)"
        return
    fi
    "$python" - "$name" "${only:-}" "$out/bench.json" "$scratch/bench" "$table" <<'PYTHON'
import json, pathlib, sys
name, only, kept, found, table = *sys.argv[1:3], *map(pathlib.Path, sys.argv[3:])
bench = json.loads(found.read_text())
runs = json.loads(kept.read_text()) if kept.exists() else {}
kept.write_text(json.dumps(runs | {name: bench}, indent=1) + "\n")
rows = [("ceilings", f"read {bench['read_gb_per_s']:.0f} GB/s, {(bench['gflop_per_s'] or 0) / 1e3:.0f} TFLOP/s; "
                     f"loaded in {bench['load_s']:.1f} s, first token after {bench['first_token_s']:.1f} s")]
rows += [(f"decode {d['batch_size']}", f"{d['median_ms']:.2f} ms, {d['tokens_per_s']:.1f} tok/s, "
          f"{d['bandwidth_percent']:.0f} % of read") for d in bench["decode"]]
rows += [(f"prefill {p['prompts']} x {p['tokens']}", f"{p['median_ms']:.1f} ms, {p['tokens_per_s']:.0f} tok/s, "
          f"{p['compute_percent'] or 0:.0f} % of compute") for p in bench["prefill"]]
rows = [] if only else rows
if t := bench["throughput"]:
    rows.append(("" if only else f"{t['requests']} requests", f"{t['output_tokens_per_s']:.0f} output tok/s in {t['seconds']:.1f} s; first token "
                 f"{t['first_token_ms_median']:.0f} ms, p99 {t['first_token_ms_p99']:.0f}; each token {t['per_token_ms_median']:.2f} ms, "
                 f"p99 {t['per_token_ms_p99']:.2f}; GPU idle {bench['requests_gpu_idle_percent'] or 0:.1f} %"))
with table.open("a") as table:
    for what, figure in rows:
        print(f"{f'bench {name}: {what}'.removesuffix(': '):44.44} pass  {figure}", file=table)
PYTHON
}

bench() {
    rm -f "$out/bench.json"
    bench_engine 8x7b 8x7b --batch-size 1,8,64,256,512 --context 128 --prefill 2048 --requests 512 --input-len 128 \
        --output-len 128
    bench_engine "8x7b, 8 prompts" 8x7b --batch-size 1 --steps 4 --prefill 2048 --prefill-batch 8 --quick
    bench_engine "8x7b cublaslt" 8x7b-cublaslt --batch-size 1 --context 128 --steps 4 --prefill 2048 --quick
    bench_engine "8x7b portable" 8x7b-portable --batch-size 1,64 --context 128 --steps 8 --prefill 2048 --quick
}

cache() {
    local kind algo
    rm -f "$out/bench.json"
    MIXTRAL_CASES=Fp8 check "fp8 cache: operations" gpu_figure gpu_test cases::all_cases_are_within_their_limits
    MIXTRAL_CASES="fp8 cache" check "fp8 cache: long contexts" gpu_figure gpu_test cases::large_cases_are_within_their_limits
    for kind in bf16 fp8; do
        algo=null
        [ $kind = fp8 ] && algo='"FP8", "kv_cache_key_directions": true'
        mkdir "$scratch/$kind"
        cat >"$scratch/$kind/config.json" <<JSON
{"architecture": "MixtralForCausalLM", "dtype": "bfloat16", "vocab_size": 32000, "hidden_size": 4096,
 "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
 "max_position_embeddings": 65536, "norm_epsilon": 1e-5, "rotary_base": 1e6, "moe_num_experts": 8, "moe_top_k": 2,
 "quantization": {"kv_cache_quant_algo": $algo}}
JSON
        check "build: 8x7b, $kind cache" last_line "$mixtral" build --model-config "$scratch/$kind/config.json" --backend cuda \
            --max-batch-size 64 --max-num-tokens 16384 --max-seq-len 32800 --output-dir "$engines/8x7b-cache-$kind"
        bench_engine "8x7b, $kind cache, 4096" "8x7b-cache-$kind" --batch-size 1,64 --context 4096 --prefill 2048 --quick
        bench_engine "8x7b, $kind cache, 32768" "8x7b-cache-$kind" --batch-size 1 --context 32768 --steps 8 --quick
        bench_engine "8x7b, $kind cache, 8 prompts" "8x7b-cache-$kind" --batch-size 1 --steps 4 --prefill 2048 \
            --prefill-batch 8 --quick
    done
    check "build: 8x7b, attention in fp8" last_line "$mixtral" build --model-config "$scratch/fp8/config.json" --backend cuda \
        --max-batch-size 64 --max-num-tokens 16384 --max-seq-len 32800 --use-fp8-context-fmha enable \
        --output-dir "$engines/8x7b-attention-fp8"
    bench_engine "8x7b, attention in fp8, 8 prompts" 8x7b-attention-fp8 --batch-size 1 --steps 4 --prefill 2048 \
        --prefill-batch 8 --quick
    for kind in cache attention; do
        check "same bits: 8x7b, fp8 $kind" last_line "$python" "$here/tests/python/determinism.py" --mixtral "$mixtral" \
            --engine "$engines/8x7b-$kind-fp8" --backend cuda
    done
}

quantized() {
    local precision
    rm -f "$out/bench.json"
    for precision in int8 int4; do
        build_8x7b "$precision"
        bench_engine "8x7b $precision" "8x7b-$precision" --batch-size 1,8,32,64,256 --context 128 --prefill 2048 --quick
        check "load: $precision" last_line "$python" "$here/tests/python/load.py" --mixtral "$mixtral" \
            --convert "--qformat ${precision}_wo"
    done
}

# build_8x7b FORMAT: Mixtral 8x7B's shape in fp8, int8 or int4, unless an earlier section has built it. fp8-cache is fp8 with an
# fp8 cache, attention of prompts in fp8, and room for 2 048 sequences.
build_8x7b() {
    local what=(--model-config mixtral-8x7b --dtype bfloat16 --weight-only-precision "$1") batch=512 cache=null
    [ -d "$engines/8x7b-$1" ] && return
    if [ "$1" = fp8-cache ]; then
        batch=2048 cache='"FP8", "kv_cache_key_directions": true'
    fi
    if [[ $1 = fp8* ]]; then
        what=(--model-config "$scratch/8x7b-$1/config.json")
        [ "$1" = fp8-cache ] && what+=(--use-fp8-context-fmha enable)
        mkdir -p "$scratch/8x7b-$1"
        cat >"$scratch/8x7b-$1/config.json" <<JSON
{"architecture": "MixtralForCausalLM", "dtype": "bfloat16", "vocab_size": 32000, "hidden_size": 4096,
 "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
 "max_position_embeddings": 32768, "norm_epsilon": 1e-5, "rotary_base": 1e6, "moe_num_experts": 8, "moe_top_k": 2,
 "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": $cache}}
JSON
    fi
    check "build: 8x7b $1" last_line "$mixtral" build "${what[@]}" --backend cuda --max-batch-size $batch --max-num-tokens 16384 \
        --max-seq-len 4608 --output-dir "$engines/8x7b-$1"
}

fp8() {
    rm -f "$out/bench.json"
    MIXTRAL_CASES=fp8 check "fp8: operations" gpu_figure gpu_test cases::all_cases_are_within_their_limits
    build_8x7b fp8
    check "same bits: 8x7b fp8" last_line "$python" "$here/tests/python/determinism.py" --mixtral "$mixtral" \
        --engine "$engines/8x7b-fp8" --backend cuda
    bench_engine "8x7b fp8" 8x7b-fp8 --batch-size 1,8,64,256,512 --context 128 --prefill 2048 --quick
    bench_engine "8x7b fp8, 8 prompts" 8x7b-fp8 --batch-size 1 --steps 4 --prefill 2048 --prefill-batch 8 --quick
}

twin() {
    local engine
    for engine in 8x7b-logits 8x7b-portable-logits; do
        check "twin: $engine" last_line "$python" "$here/tests/python/twin.py" --mixtral "$mixtral" \
            --engine "$engines/$engine" --backend cuda
    done
}

load() {
    check "load: weights" last_line "$python" "$here/tests/python/load.py" --mixtral "$mixtral"
}

ranks() {
    local layout layouts=("--tp_size 2" "--pp_size 2" "--tp_size 2 --moe_tp_mode 1")
    check "16-bit logits of ranks" last_line "$python" "$here/tests/python/parity.py" --mixtral "$mixtral" --backend cuda \
        --models 4 --dtypes bfloat16 float16 --jobs 4 "${layouts[@]/#/--layout=}"
    for layout in "${layouts[@]:0:2}"; do
        check "requests that are cancelled, $layout" last_line "$python" "$here/tests/python/soak.py" --mixtral "$mixtral" \
            --backend cuda --convert "--dtype bf16 $layout" --max-batch-size 16 --requests 1000 --leave 0.4 --connections 0
    done
    check "layouts of ranks" last_line "$python" "$here/tests/python/gpu_ranks.py" --mixtral "$mixtral" \
        --launchers threads mpirun hosts
    check "same bits: 8x7b, two ranks" last_line "$python" "$here/tests/python/determinism.py" --mixtral "$mixtral" \
        --engine "$engines/8x7b-tp2" --backend cuda
    check "sessions: 8x7b, two ranks" last_line "$python" "$here/tests/python/sessions.py" --mixtral "$mixtral" \
        --engine "$engines/8x7b-tp2" --backend cuda
    rm -f "$out/bench.json"
    bench_engine "8x7b tp2" 8x7b-tp2 --batch-size 1,8,64,256 --prefill 2048 --requests 512 --input-len 128 \
        --output-len 128
    bench_engine "8x7b tp2, 8 prompts" 8x7b-tp2 --batch-size 1 --steps 4 --prefill 2048 --prefill-batch 8 --quick
    check "deaths of ranks" last_line "$python" "$here/tests/python/deaths.py" --mixtral "$mixtral" --gpu sm_90 --ranks 2
}

sessions() {
    check "sessions: same bits" last_line "$python" "$here/tests/python/sessions.py" --mixtral "$mixtral" --backend cuda
    check "sessions: many short requests" last_line "$python" "$here/tests/python/crowd.py" --mixtral "$mixtral" --backend cuda
}

# requests_of FORMAT REQUESTS INPUT OUTPUT FLAGS...: the throughput of an engine of Mixtral 8x7B's shape.
requests_of() {
    local only=1 how
    how=$(sed -E 's|--arrival-rate ([0-9]+)|, \1/s|; s| ?--no-overlap|, no overlap|' <<<"${*:5}")
    bench_engine "$1, $2 of $3/$4$how" "8x7b-$1" --batch-size 1 --context 16 --steps 1 --warmup 0 --prefill 16 --quick \
        --requests "$2" --input-len "$3" --output-len "$4" "${@:5}"
}

requests() {
    local overlap
    rm -f "$out/bench.json"
    build_8x7b fp8
    for overlap in "" --no-overlap; do requests_of fp8 512 128 128 $overlap; done
    check "prompts that begin alike: 8x7b fp8" last_line "$python" "$here/tests/python/prefixes.py" --mixtral "$mixtral" \
        --engine "$engines/8x7b-fp8" --backend cuda
    for overlap in "" --no-overlap; do requests_of fp8 400 128 128 --arrival-rate 40 $overlap; done
    check "sessions: 8x7b fp8" last_line "$python" "$here/tests/python/sessions.py" --mixtral "$mixtral" \
        --engine "$engines/8x7b-fp8" --backend cuda
    for overlap in "" --no-overlap; do requests_of fp8 256 2048 128 $overlap; done
    requests_of fp8 128 2048 128 --arrival-rate 8
    build_8x7b int8
    for overlap in "" --no-overlap; do requests_of int8 512 128 128 $overlap; done
    check "prompts that begin alike: 8x7b int8" last_line "$python" "$here/tests/python/prefixes.py" --mixtral "$mixtral" \
        --engine "$engines/8x7b-int8" --backend cuda
    requests_of int8 256 2048 128
}

long() {
    local overlap
    rm -f "$out/bench.json"
    build_8x7b fp8-cache
    for overlap in "" --no-overlap; do requests_of fp8-cache 512 1000 1000 $overlap; done
    for overlap in "" --no-overlap; do requests_of fp8-cache 256 128 2048 $overlap; done
    requests_of fp8-cache 560 128 2048
    requests_of fp8-cache 4096 128 128
}

rates() {
    local overlap
    rm -f "$out/bench.json"
    build_8x7b fp8-cache
    for overlap in "" --no-overlap; do requests_of fp8-cache 512 128 128 --arrival-rate 40 $overlap; done
    for overlap in "" --no-overlap; do requests_of fp8-cache 512 1000 1000 --arrival-rate 10 $overlap; done
    for overlap in "" --no-overlap; do requests_of fp8-cache 256 128 2048 --arrival-rate 6 $overlap; done
}

serve() {
    build_8x7b fp8
    check "server: 8x7b fp8" last_line "$python" "$here/tests/python/serving.py" --mixtral "$mixtral" --engine "$engines/8x7b-fp8" \
        --backend cuda
    check "server: requests that are cancelled" last_line "$python" "$here/tests/python/soak.py" --mixtral "$mixtral" --backend cuda \
        --convert "--dtype bf16" --max-batch-size 16 --requests 2000 --leave 0.3 --connections 0
}

calib() {
    check "calibration" last_line "$python" "$here/tests/python/calib_gpu.py" --mixtral "$mixtral"
}

peers() {
    check "peer: transformers" last_line "$python" "$here/benches/peers/transformers_mixtral.py" --compile
}

if [ "${1:-}" = --section ]; then
    log=$out/$2.log
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    : >"$log"
    "$2"
    exit
fi

[ $# -gt 0 ] || set -- parity tiny sanitizer bench
for section; do
    if [ -z "${limit[$section]:-}" ]; then
        echo "there is no section $section; there are ${!limit[*]}" >&2
        exit 2
    fi
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$table" || echo "no nvidia-smi" >"$table"
begun=$SECONDS
for section; do
    echo "== $section, at most ${limit[$section]} s"
    timeout --kill-after 5 "${limit[$section]}" bash "${BASH_SOURCE[0]}" --section "$section"
    rc=$?
    [ $rc = 0 ] || row "$section" FAIL "$([ $rc = 124 ] && echo "not done in ${limit[$section]} s" || echo "ended with $rc")"
done
echo
cat "$table"
echo "$((SECONDS - begun)) s; logs in $out"
! grep -qE '^.{44} FAIL ' "$table"
