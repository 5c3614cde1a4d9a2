#!/usr/bin/env python3
"""Kills or stops a rank in mid-generation, and checks what the other ranks do.

    deaths.py --mixtral PATH [--kills 20] [--stops 20] [--mpirun 20] [--seed N] [--ranks 3] [--gpu sm_90 [--apart]]

Starts a few ranks as processes (RANK and WORLD_SIZE) on an engine with dummy weights that generates for long. While they
generate, it kills (-9) or stops (-STOP) one of them, drawn at random. Every survivor must name the rank and end with exit
code 1, within 10 s of a kill and 60 s of a stop, and nothing may be left behind. mpirun ends a job if one of its ranks is
killed: the job must end within 10 s with a code other than 0. Prints the longest wait; exits 1 on a miss. With `--gpu`
the ranks run on GPUs, one each, and no process may be left there either. With `--apart` each of them calls itself a host, so
that NCCL carries what they send each other.
"""

import argparse
import concurrent.futures
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GEOMETRY = ("--vocab_size 512 --n_layer 6 --n_head 6 --n_kv_head 6 --n_embd 384 --inter_size 768 --n_positions 4096 "
            "--moe_num_experts 6 --moe_top_k 2 --dtype f32").split()
GENERATE = ["run", "--input_file", "ids.csv", "--max_output_len", "4000", "--end_id", "-1", "--streaming"]


def prepare(binary, directory, args):
    run = lambda *words: subprocess.run([binary, *words], cwd=directory, check=True, capture_output=True)
    run("convert", *GEOMETRY, "--tp_size", str(args.ranks))
    run("build", "--max-seq-len", "4096", *(["--arch", args.gpu] if args.gpu else []))
    (directory / "ids.csv").write_text("\n".join("1,2,3" for _ in range(64)))


def on_gpus():
    """Processes that run on GPUs."""
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split()


def one(binary, directory, ranks, apart, how, rank, delay, job):
    """One run in which `rank` gets the signal `how` after `delay`. Returns (seconds of the slowest survivor, problems)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI", "SLURM_"))}
    environment.update(WORLD_SIZE=str(ranks), MASTER_PORT=str(job), MASTER_ADDR="127.0.0.1", TMPDIR=str(directory / "tmp"),
                       MIXTRAL_SECRET="deaths")
    environment.pop("XDG_RUNTIME_DIR", None)
    environment.update(NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1", NCCL_NVLS_ENABLE="0")
    of_rank = lambda r: {"RANK": str(r)} | ({"NCCL_HOSTID": f"host-{r}"} if apart else {})
    command = [binary, *GENERATE, "--streaming-interval", "50"]
    processes = [subprocess.Popen(command, cwd=directory, env=environment | of_rank(r), text=True,
                                  stdout=subprocess.DEVNULL if r else subprocess.PIPE, stderr=subprocess.PIPE)
                 for r in range(ranks)]
    # Rank 0 prints when tokens come, so after its first line the ranks are generating.
    processes[0].stdout.readline()
    time.sleep(delay)
    os.kill(processes[rank].pid, how)
    start = time.monotonic()
    limit = 10 if how == signal.SIGKILL else 60
    problems, waited = [], 0.0
    for survivor in (r for r in range(ranks) if r != rank):
        try:
            # communicate() reads the output, so that no process waits on a full pipe.
            _, said = processes[survivor].communicate(timeout=max(0.1, limit - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            problems.append(f"rank {survivor} is still there {limit} s after rank {rank} got {how.name}")
            continue
        waited = max(waited, time.monotonic() - start)
        if processes[survivor].returncode != 1:
            problems.append(f"rank {survivor} ended with {processes[survivor].returncode}")
        if f"rank {rank} " not in said:
            problems.append(f"rank {survivor} does not name rank {rank}: {said!r}")
    for process in processes:
        process.kill()
        process.communicate()
    return waited, problems


def one_of_mpirun(binary, directory, num_ranks, rank, delay):
    """The same for a job of mpirun, in which one process is killed."""
    command = ["mpirun", "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "-n", str(num_ranks), binary,
               *GENERATE]
    job = subprocess.Popen(command, cwd=directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env=os.environ | {"TMPDIR": str(directory / "tmp")})
    job.stdout.readline()
    time.sleep(delay)
    ranks = {}
    for process in subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split():
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        ranks |= {int(v.split(b"=")[1]): int(process) for v in variables if v.startswith(b"OMPI_COMM_WORLD_RANK=")}
    os.kill(ranks[rank], signal.SIGKILL)
    start = time.monotonic()
    try:
        job.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        job.kill()
        return 10.0, [f"the job is still there 10 s after rank {rank} was killed"]
    problems = [] if job.returncode else ["the job ended with 0"]
    problems += [f"rank {r} is still there" for r, process in ranks.items() if Path(f"/proc/{process}/exe").exists()]
    return time.monotonic() - start, problems


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True, type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--mpirun", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--gpu", metavar="ARCH", help="run on GPUs of this architecture, e.g. sm_90")
    parser.add_argument("--apart", action="store_true", help="each rank on a host of its own")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 30))
    args = parser.parse_args()
    print(f"seed {args.seed}")
    rng = random.Random(args.seed)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "tmp").mkdir()
        binary = str(args.mixtral.resolve())
        prepare(binary, directory, args)
        # A job with a stopped rank mostly waits, so several jobs can run at a time.
        for how, count, at_once in (signal.SIGKILL, args.kills, 1), (signal.SIGSTOP, args.stops, 10 if args.gpu else 5):
            draws = [(rng.randrange(args.ranks), rng.uniform(0, 1), 29600 + i) for i in range(count)]
            with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
                results = list(pool.map(lambda d: one(binary, directory, args.ranks, args.apart, how, *d), draws))
            problems = [p for _, found in results for p in found]
            left = sorted(path.name for path in (directory / "tmp").iterdir())
            if left:
                problems.append(f"left behind: {left}")
            if args.gpu and on_gpus():
                problems.append(f"left on GPUs: {on_gpus()}")
            longest = max((waited for waited, _ in results), default=0.0)
            print(f"{how.name}: {count} runs, the slowest survivor took {longest:.1f} s, {len(problems)} problems")
            print("".join(f"  {problem}\n" for problem in problems), end="", flush=True)
            failed |= bool(problems)
        draws = [(rng.randrange(args.ranks), rng.uniform(0, 1)) for _ in range(args.mpirun)]
        results = [one_of_mpirun(binary, directory, args.ranks, *draw) for draw in draws]
        problems = [p for _, found in results for p in found]
        longest = max((waited for waited, _ in results), default=0.0)
        print(f"mpirun: {args.mpirun} kills, the slowest job took {longest:.1f} s, {len(problems)} problems")
        print("".join(f"  {problem}\n" for problem in problems), end="")
        failed |= bool(problems)
    sys.exit(failed)


if __name__ == "__main__":
    main()
