"""A running `mixtral serve`, for the checks that talk to it."""

import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEY = "a key"
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}assistant:"
)


def example_engine(mixtral, folder, convert="--dtype f32", build="--max-batch-size 4"):
    """An engine of the example model, made with these flags."""
    run = lambda *args: subprocess.run([mixtral, "-q", *args], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    run("convert", "--model-dir", ROOT / "examples/tiny-mixtral", *convert.split())
    run("build", *build.split())
    return folder / "engine_outputs"


class Server:
    """A server on a free port."""

    def __init__(self, mixtral, engine, *flags):
        command = [mixtral, "-q", "serve", "--engine-dir", engine, "--port", "0", *flags]
        self.process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        ended = self.process.wait(timeout=60)
        assert ended == 0, f"the server ended with {ended}"


def tiny(mixtral, folder, *flags, **how):
    """A server of the example model, with a key and a chat template."""
    engine = example_engine(mixtral, folder, **how)
    (folder / "chat.jinja").write_text(TEMPLATE)
    return Server(mixtral, engine, "--served-model-name", "tiny", "--api-key", KEY, "--chat-template", folder / "chat.jinja", *flags)
