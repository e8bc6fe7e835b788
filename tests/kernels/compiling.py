"""Python in which kernels are compiled, not interpreted: what stands in one process, forked for each command, so that
torch and Triton are imported once."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SERVER = """
import json, os, runpy, sys
import torch, triton, triton.compiler
from mdm_kernels.aot import __main__, keys

for line in sys.stdin:
    script, arguments, out, err = json.loads(line)
    if (child := os.fork()) == 0:
        for stream, path in ((sys.stdout, out), (sys.stderr, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        sys.stdin = open(os.devnull)
        sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

Compiling = Callable[..., subprocess.CompletedProcess]


@contextlib.contextmanager
def compiling_python(folder: Path) -> Iterator[Compiling]:
    """run(code, *arguments) runs a script in a process without the interpreter, as subprocess.run would."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
            script = folder / "script.py"
            script.write_text(code)
            said = [folder / "out", folder / "err"]
            print(json.dumps([str(script), arguments, *map(str, said)]), file=server.stdin, flush=True)
            code = int(server.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in said))

        yield run
        server.stdin.close()
