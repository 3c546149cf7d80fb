"""Times CleanRL's `pqn.py` by the last steps per second that it prints. Runs under its Python.

The argument is JSON: `path`, `script`, `arguments` (by name), `seed`.
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

request = json.loads(sys.argv[1])
script = Path(request["path"], "cleanrl", request["script"]).resolve()
flags = [f"--{name.replace('_', '-')}={value}" for name, value in request["arguments"].items()]
with tempfile.TemporaryDirectory() as directory:  # for its TensorBoard files
    process = subprocess.run(
        [sys.executable, script, f"--seed={request['seed']}", *flags],
        cwd=directory,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
env_steps = request["arguments"]["total_timesteps"]
result = {
    "env_steps": env_steps,
    "seconds": env_steps / int(re.findall(r"^SPS: (\d+)", process.stdout, re.MULTILINE)[-1]),
    "compile_seconds": 0.0,
    "peak_memory_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    "versions": {package: version(package) for package in ("torch", "gymnasium")},
    "config": request["arguments"],
}
print(json.dumps(result))
