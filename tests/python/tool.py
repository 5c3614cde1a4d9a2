"""Running the tool."""

import subprocess
import sys


def run_tool(binary, *args):
    """Runs the tool. If it fails, prints its output and ends the check."""
    command = [str(binary), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
