"""Scripts of the project, each in a process that is forked from one which has imported the libraries already.

Importing torch, transformers and PEFT takes four seconds; most of what the tests run takes less than one. The tests of
DVC start the stages as users do. Variables that a library reads when it is imported, like HF_ENDPOINT, have no effect.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from support import ROOT

_servers: list[subprocess.Popen[str]] = []  # of this process: none, or one


def run_forked(script: str | Path, *arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What `python script arguments…` would return in the folder `cwd`, with this environment."""
    if not _servers or _servers[0].poll() is not None:
        command = [sys.executable, "-m", "support.forked"]
        pipe = subprocess.PIPE
        own = os.environ | {"TQDM_DISABLE": "1"}  # as stages set it, without a terminal, before these imports
        server = subprocess.Popen(command, cwd=ROOT / "tests", env=own, stdin=pipe, stdout=pipe, text=True)
        _servers[:] = [server]
    (server,) = _servers
    assert server.stdin
    assert server.stdout
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        request = [str(script), arguments, str(cwd), env, *map(str, printed)]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([str(script), *arguments], code, *(file.read_text() for file in printed))


def serve() -> None:
    """Run the scripts that stdin names, a line of JSON for each, and print their exit codes. Ends with stdin."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    for line in sys.stdin:
        script, arguments, folder, env, *printed = json.loads(line)
        if (child := os.fork()) == 0:
            break
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)
    else:
        return
    for descriptor, file in enumerate([os.devnull, *printed]):
        opened = os.open(file, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *arguments]
    # In place of the folder of this package
    sys.path[:1] = [str(Path(script).parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    serve()
