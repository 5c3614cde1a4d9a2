"""Two hosts on one machine: network namespaces that a cable joins. Needs root and `ip`; without them both share the loopback."""

import os
import shutil
import subprocess
import tempfile


class Hosts:
    """Two hosts, for as long as the `with` lasts. Each has a name that NCCL and `mixtral` take for a host's."""

    def __init__(self):
        self.names = [f"mixtral-{os.getpid()}-{end}" for end in "ab"]
        self.ends = [f"mx{os.getpid()}{end}" for end in "ab"]
        self.apart = False

    def __enter__(self):
        try:
            for name in self.names:
                self._ip("netns", "add", name)
            self._ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
            for number, (name, end) in enumerate(zip(self.names, self.ends), 1):
                self._ip("link", "set", end, "netns", name)
                self._ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", end)
                self._ip("-n", name, "link", "set", end, "up")
                self._ip("-n", name, "link", "set", "lo", "up")
            self.apart = True
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            print(f"no network namespaces, so both hosts share the loopback: {said}")
            self.__exit__()
        return self

    def __exit__(self, *_):
        # The cable goes with the namespaces.
        for name in self.names if shutil.which("ip") else []:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    @staticmethod
    def _ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def run(self, command, places, cwd, port, environment, seconds=60):
        """Runs a command as ranks, each on the host `places` says. Returns what the ranks said, or exits with it."""
        if len(set(places)) != 2:
            raise ValueError("ranks on both hosts")
        started = []
        for rank, host in enumerate(places):
            prefix = ["ip", "netns", "exec", self.names[host]] if self.apart else []
            own = {"RANK": rank, "WORLD_SIZE": len(places), "MASTER_ADDR": "10.213.7.1" if self.apart else "127.0.0.1",
                   "MASTER_PORT": port, "MIXTRAL_SECRET": "hosts", "NCCL_HOSTID": self.names[host], "NCCL_IB_DISABLE": 1,
                   "NCCL_SOCKET_IFNAME": self.ends[host] if self.apart else "lo",
                   # Multicast over NVLink can disturb others that share the GPUs, and nothing here gains by it.
                   "NCCL_NVLS_ENABLE": 0}
            said = tempfile.TemporaryFile("w+")
            process = subprocess.Popen([*prefix, *command], cwd=cwd, stdout=said, stderr=subprocess.STDOUT,
                                       env=os.environ | environment | {name: str(value) for name, value in own.items()})
            started.append((process, said))
        problems, texts = [], []
        for rank, (process, said) in enumerate(started):
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                code = f"no end after {seconds} s"
            said.seek(0)
            texts.append(said.read())
            if code != 0:
                problems.append(f"rank {rank} of {len(places)}, {' '.join(command)}: {code}\n{texts[-1]}")
        if problems:
            raise SystemExit("\n".join(problems))
        return texts
