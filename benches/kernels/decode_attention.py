#!/usr/bin/env python3
"""Times decode attention alone: kernels/attention/decode_tma.cuh with 32 query heads over 8 KV heads of 128 elements, on a Hopper GPU.

    decode_attention.py [KERNELS...] [--shapes 64x4096 1x4096] [--cache bf16 fp8] [--memory GB]

KERNELS are folders like kernels/ (the default); several are variants to compare. To learn what a part costs, leave it out in a copy.
Each line has the time of a launch in a graph of launches, with dependent launch and without, in per cent of how fast the probe kernel
reads, and the error of the outputs against PyTorch. Launches go over the caches of as many layers as fit into --memory, so that
none is in L2. Needs PyTorch and NVRTC.
"""

import argparse
import ctypes as C
import glob
import math
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS, DIM, BLOCK, TILE, SPLIT, COLS = 32, 8, 128, 64, 64, 256, 6144
THREADS, PER_SM, HOPPER_SHARED = 160, 3, 228 * 1024
driver = C.CDLL("libcuda.so.1")


def check(code, what):
    if code:
        raise SystemExit(f"{what}: error {code} of the driver")


def nvrtc():
    names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    names += [path for folder in __import__("site").getsitepackages() for path in glob.glob(f"{folder}/nvidia/**/libnvrtc.so.*", recursive=True)]
    for name in names:
        try:
            return C.CDLL(name)
        except OSError:
            continue
    raise SystemExit("there is no NVRTC")


def compiled(compiler, folder, header, symbol):
    """The machine code for sm_90a of a kernel in a folder of headers."""
    headers = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.cuh")}
    texts = (C.c_char_p * len(headers))(*headers.values())
    names = (C.c_char_p * len(headers))(*(name.encode() for name in headers))
    program, size = C.c_void_p(), C.c_size_t()
    compiler.nvrtcCreateProgram(C.byref(program), f'#include "{header}"\n'.encode(), b"kernel.cu", len(headers), texts, names)
    compiler.nvrtcAddNameExpression(program, symbol.encode())
    options = (C.c_char_p * 2)(b"--std=c++17", b"--gpu-architecture=sm_90a")
    if compiler.nvrtcCompileProgram(program, 2, options):
        compiler.nvrtcGetProgramLogSize(program, C.byref(size))
        log = C.create_string_buffer(size.value)
        compiler.nvrtcGetProgramLog(program, log)
        raise SystemExit(f"{folder}/{header}: {log.value.decode()[:2000]}")
    compiler.nvrtcGetCUBINSize(program, C.byref(size))
    code = C.create_string_buffer(size.value)
    compiler.nvrtcGetCUBIN(program, code)
    return code.raw


def function(code):
    module, count = C.c_void_p(), C.c_uint()
    check(driver.cuModuleLoadData(C.byref(module), code), "loading a kernel")
    driver.cuModuleGetFunctionCount(C.byref(count), module)
    functions = (C.c_void_p * count.value)()
    driver.cuModuleEnumerateFunctions(functions, count, module)
    return C.c_void_p(functions[0])


class Attribute(C.Structure):
    _fields_ = [("id", C.c_int), ("pad", C.c_int), ("value", C.c_int), ("rest", C.c_byte * 60)]


class Config(C.Structure):
    _fields_ = [(name, C.c_uint) for name in ("grid", "y", "z", "block", "block_y", "block_z", "shared")] + [
        ("stream", C.c_void_p), ("attributes", C.c_void_p), ("count", C.c_uint)]


def launch(kernel, grid, block, shared, stream, args, dependent):
    pointers = (C.c_void_p * len(args))(*(C.cast(C.pointer(arg), C.c_void_p) for arg in args))
    early = Attribute(6, 0, 1)  # programmatic stream serialization
    config = Config(grid, 1, 1, block, 1, 1, shared, stream, C.cast(C.pointer(early), C.c_void_p), int(dependent))
    check(driver.cuLaunchKernelEx(C.byref(config), kernel, pointers, None), "a launch")


class Map(C.Structure):
    _fields_ = [("words", C.c_byte * 128)]


def tensor_map(address, rows, size, box):
    """Rows of 128 elements of `size` bytes, in boxes of 128 bytes of `box` rows."""
    memory = C.create_string_buffer(256)
    aligned = (C.addressof(memory) + 63) // 64 * 64
    dims, strides = (C.c_uint64 * 2)(DIM, rows), (C.c_uint64 * 1)(DIM * size)
    tile, steps = (C.c_uint32 * 2)(128 // size, box), (C.c_uint32 * 2)(1, 1)
    kind = {2: 9, 1: 0}[size]  # bf16, bytes
    check(driver.cuTensorMapEncodeTiled(C.c_void_p(aligned), kind, 2, C.c_void_p(address), dims, strides, tile, steps, 0, 3, 2, 0), "a map")
    described = Map.from_buffer(memory, aligned - C.addressof(memory))
    described.memory = memory
    return described


def timed(launches, count):
    """µs of one of `count` launches, in the fastest of four passes of a graph."""
    stream, graph, executable = torch.cuda.Stream(), C.c_void_p(), C.c_void_p()
    handle = C.c_void_p(stream.cuda_stream)
    launches(handle)
    torch.cuda.synchronize()
    check(driver.cuStreamBeginCapture_v2(handle, 2), "capturing")
    launches(handle)
    check(driver.cuStreamEndCapture(handle, C.byref(graph)), "capturing")
    check(driver.cuGraphInstantiateWithFlags(C.byref(executable), graph, C.c_ulonglong(0)), "a graph")
    best = math.inf
    for _ in range(4):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        with torch.cuda.stream(stream):
            begin.record(stream)
            check(driver.cuGraphLaunch(executable, handle), "a graph")
            end.record(stream)
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / count)
    driver.cuGraphExecDestroy(executable)
    driver.cuGraphDestroy(graph)
    return best


def shared_bytes(size):
    """(slots of the ring, bytes of shared memory), as crates/mixtral-kernels/src/lower/attention.rs has them."""
    group = HEADS // KV_HEADS
    merge, kept = 4 * group * (DIM + 4) * 4 + 2 * 4 * 16 * 4 + 2 * 16 + 16, 4 * group * DIM
    slot = TILE * size * DIM + 16
    slots = min((HOPPER_SHARED // PER_SM - 1024 - merge - kept) // slot, 8)
    return slots, slots * slot + merge + kept


def expected(pool, layer, size, blocks, table, query, scale, context):
    kind = {2: torch.bfloat16, 1: torch.float8_e4m3fn}[size]
    keys, values = (pool[i * layer : (i + 1) * layer].view(kind).view(blocks, KV_HEADS, BLOCK, DIM) for i in range(2))
    out = []
    for seq, own in enumerate(table.long()):
        k, v = (x[own].permute(1, 0, 2, 3).reshape(KV_HEADS, -1, DIM)[:, :context].float() for x in (keys, values))
        scores = query[seq, : HEADS * DIM].view(KV_HEADS, -1, DIM).float() @ k.transpose(1, 2)
        out.append((torch.softmax(scores * scale * math.log(2), -1) @ v).reshape(HEADS * DIM))
    return torch.stack(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", default=[str(ROOT / "kernels")])
    parser.add_argument("--shapes", nargs="+", default=["64x4096", "128x1500", "256x128", "1x4096", "1x32768"], help="sequences x tokens")
    parser.add_argument("--cache", nargs="+", choices=["bf16", "fp8"], default=["bf16", "fp8"])
    parser.add_argument("--memory", type=int, default=20, help="GB for caches")
    args = parser.parse_args()

    compiler = nvrtc()
    code = {}
    for cache in args.cache:
        slots, shared = shared_bytes({"bf16": 2, "fp8": 1}[cache])
        stored = {"bf16": "bf16_t", "fp8": "e4m3_t"}[cache]
        shape = f"bf16_t, {stored}, {COLS}, {HEADS}, {KV_HEADS}, {DIM}, {BLOCK}, 0, false, {slots}, {PER_SM}, {shared}"
        for folder in args.kernels:
            symbol = f"attention::decode_tma<attention::DecodeStream<{shape}>>"
            code[cache, folder] = compiled(compiler, folder, "attention/decode_tma.cuh", symbol), shared
    probe = compiled(compiler, ROOT / "kernels", "probe/read.cuh", "probe::read<8>")

    torch.zeros(1, device="cuda")
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    random = torch.Generator("cuda").manual_seed(1)
    pool = torch.empty(args.memory << 30, dtype=torch.uint8, device="cuda")
    probe, found = function(probe), torch.zeros(4, dtype=torch.int32, device="cuda")
    bytes_read = min(8 << 30, pool.numel())
    arguments = [C.c_void_p(pool.data_ptr()), C.c_uint64(bytes_read // 16), C.c_void_p(found.data_ptr())]
    passes = [timed(lambda s, n=n: launch(probe, n * multiprocessors, 512, 0, s, arguments, False), 1) for n in (2, 3, 4)]
    read = bytes_read / min(passes) / 1e6
    print(f"{torch.cuda.get_device_name()}, reads {read:.3f} TB/s")

    for cache in args.cache:
        size = {"bf16": 2, "fp8": 1}[cache]
        kind, spread = (torch.bfloat16, 1) if size == 2 else (torch.float8_e4m3fn, 8)
        part = torch.randn((1 << 28) // size, generator=random, device="cuda").mul_(spread).to(kind).view(torch.uint8)
        for at in range(0, pool.numel(), part.numel()):
            pool[at : at + part.numel()].copy_(part)
        for shape in args.shapes:
            seqs, context = map(int, shape.split("x"))
            per_seq, splits = -(-context // BLOCK), -(-context // SPLIT)
            blocks = seqs * per_seq
            layer = blocks * KV_HEADS * BLOCK * DIM * size
            layers = min(pool.numel() // (2 * layer), 32)
            if layers == 0:
                print(f"{shape} {cache}: needs {2 * layer / 1e9:.1f} GB")
                continue
            table = torch.randperm(blocks, generator=torch.Generator().manual_seed(3)).int().view(seqs, per_seq).contiguous().cuda()
            items = torch.tensor([[s, i, context, 0] for s in range(seqs) for i in range(splits)], dtype=torch.int32).cuda()
            header = torch.tensor([seqs, seqs, seqs, 0, 0, len(items)] + [0] * 10, dtype=torch.int32).cuda()
            query = torch.randn(seqs, COLS, generator=random, device="cuda").mul_(0.5).bfloat16()
            partials = torch.zeros(seqs * splits * HEADS * (DIM + 4), device="cuda")
            tickets = torch.zeros(seqs * HEADS, dtype=torch.int32, device="cuda")
            out = torch.zeros(seqs, HEADS * DIM, dtype=torch.bfloat16, device="cuda")
            scale = DIM**-0.5 * math.log2(math.e) / spread
            right = expected(pool, layer, size, blocks, table, query, scale, context) if seqs * context < 400_000 else None
            total = 2 * seqs * context * KV_HEADS * DIM * size
            for folder in args.kernels:
                machine_code, shared = code[cache, folder]
                kernel = function(machine_code)
                check(driver.cuFuncSetAttribute(kernel, 8, shared), "shared memory")
                driver.cuFuncSetAttribute(kernel, 9, 100)
                runs = []
                for number in range(layers):
                    keys = pool.data_ptr() + number * 2 * layer
                    maps = [tensor_map(at, blocks * KV_HEADS * BLOCK, size, box) for at in (keys, keys + layer) for box in (TILE, 16)]
                    step = [C.c_void_p(x.data_ptr()) for x in (header, items, table)] + [C.c_int(per_seq), C.c_void_p(query.data_ptr())]
                    rest = [C.c_void_p(out.data_ptr()), C.c_void_p(partials.data_ptr()), C.c_int(splits), C.c_void_p(tickets.data_ptr())]
                    runs.append(maps + step + [C.c_float(scale), C.c_float(1.0)] + rest + [C.c_void_p(0), C.c_void_p(0)])
                grid = PER_SM * multiprocessors
                tickets.zero_()
                launch(kernel, grid, THREADS, shared, None, runs[0], False)
                torch.cuda.synchronize()
                error = "" if right is None else f"error {((out.float() - right).norm() / right.norm()).item():.1e}"
                error += "" if int(tickets.abs().sum()) == 0 else ", tickets left"
                times = []
                for dependent in (True, False):
                    tickets.zero_()
                    times.append(timed(lambda s: [launch(kernel, grid, THREADS, shared, s, run, dependent) for run in runs], layers))
                figures = ", ".join(f"{us:.1f} us {total / us / 1e6 / read:.1%}" for us in times)
                print(f"{shape} {cache} {folder}: {figures}; {error}")


if __name__ == "__main__":
    main()
