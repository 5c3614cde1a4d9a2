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


class Server:
    """A server on a free port, of an engine of the example model."""

    def __init__(self, mixtral, folder, *flags):
        run = lambda *args: subprocess.run([mixtral, *args], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        run("-q", "convert", "--model-dir", ROOT / "examples/tiny-mixtral", "--dtype", "f32")
        run("-q", "build", "--max-batch-size", "4")
        (folder / "chat.jinja").write_text(TEMPLATE)
        self.process = subprocess.Popen(
            [mixtral, "-q", "serve", "--port", "0", "--served-model-name", "tiny", "--api-key", KEY,
             "--chat-template", "chat.jinja", *flags],
            cwd=folder, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        ended = self.process.wait(timeout=60)
        assert ended == 0, f"the server ended with {ended}"
