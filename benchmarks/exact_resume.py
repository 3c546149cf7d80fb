"""Shows that a run on emulators that is killed repeatedly ends like an undisturbed run.

Trains once undisturbed, and once killed (SIGKILL) at random moments, each time followed by the same
command, with `exact_resume=true resume=auto`. Then compares the last checkpoints (the agent, its
optimiser, keys, counters, episodes, every action) bit by bit, and reports the cost of replaying.

  python benchmarks/exact_resume.py
  python benchmarks/exact_resume.py env.name=Breakout-v5 env.repeat_action_probability=0.25
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import RESULTS, ROOT, write

from eqx_q.saving.checkpoint import checkpoints, load

_OPTIONS = ["env=atari", "env.name=Pong-v5", "num_envs=8", "total_steps=20_000"]
_ALWAYS = ["exact_resume=true", "tracker=jsonl", "eval.every=0", "video.every=0", "log_every=1"]
_REPLAYED = re.compile(r"replaying ([\d,]+) steps.*?replayed in ([\d.]+) s", re.DOTALL)


def start(directory: Path, overrides: list[str], output: Any) -> subprocess.Popen:
    """Starts a training in `directory`, from its last checkpoint if there is one."""
    where = ["resume=auto", f"hydra.run.dir={directory}"]
    command = [sys.executable, "scripts/train.py", *overrides, *_ALWAYS, *where]
    return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def finish(directory: Path, overrides: list[str], kill_at: int | None, delay: float) -> str:
    """The output of a training, which is killed some seconds after it has reached `kill_at`."""
    with tempfile.TemporaryFile("w+") as output:
        process = start(directory, overrides, output)
        while process.poll() is None:
            if kill_at is not None and steps_of(directory) >= kill_at:
                time.sleep(delay)
                process.kill()
                process.wait()
                break
            time.sleep(0.02)
        output.seek(0)
        text = output.read()
    if process.returncode > 0:
        sys.exit(f"{text}\nerror: scripts/train.py failed")
    return text


def steps_of(directory: Path) -> int:
    """The progress of a run, from its last line of metrics."""
    return max((row.get("env_steps", 0) for row in rows(directory)), default=0)


def rows(directory: Path) -> list[dict[str, Any]]:
    """Its metrics so far, without an incomplete last line."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def newest_step(directory: Path) -> int:
    """The step of its last checkpoint."""
    found = checkpoints(directory / "checkpoints")
    return int(found[0].stem) if found else 0


def differing(ours: Any, theirs: Any) -> list[str]:
    """Paths of the arrays that differ in a bit, except for the emulators' tokens."""
    one, other = (jax.tree.leaves_with_path(tree) for tree in (ours, theirs))

    def bits(x: Any) -> bytes:
        is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x).tobytes()

    paths = [jax.tree_util.keystr(path) for path, _ in one]
    same = [bits(x) == bits(y) for (_, x), (_, y) in zip(one, other, strict=True)]
    pairs = zip(paths, same, strict=True)
    return [path for path, equal in pairs if not equal and not path.endswith(".token")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help=f"of the training, after {' '.join(_OPTIONS)}")
    parser.add_argument("--kills", type=int, default=5, help="default: 5")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, default=RESULTS / "exact_resume.json")
    args = parser.parse_args()
    overrides = [*_OPTIONS, *args.overrides]
    random = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        finish(whole, overrides, None, 0)
        summary = json.loads((whole / "summary.json").read_text())
        total = summary["env_steps"]
        moments = np.sort(random.uniform(0.1, 0.95, args.kills) * total).astype(int)
        kills: list[dict[str, Any]] = []
        outputs = []
        for moment in moments:
            outputs.append(finish(killed, overrides, int(moment), random.uniform(0, 0.5)))
            kills.append({"at": steps_of(killed), "checkpoint": newest_step(killed)})
            print(f"killed at {kills[-1]}", flush=True)
        outputs.append(finish(killed, overrides, None, 0))
        for kill, text in zip(kills, outputs[1:], strict=True):
            (found,) = _REPLAYED.finditer(text)
            steps, seconds = found.groups()
            kill["replayed_steps"] = int(steps.replace(",", ""))
            kill["replay_seconds"] = float(seconds)
            print(f"replayed {kill}", flush=True)
        ours, theirs = (load(checkpoints(x / "checkpoints")[0]) for x in (whole, killed))
        wrong = differing(ours, theirs)
        replayed = sum(kill["replayed_steps"] for kill in kills) * len(ours.timestep.first)
        seconds = sum(kill["replay_seconds"] for kill in kills)
        result = {
            "bit_identical": not wrong,
            "differing": wrong,
            "arrays": len(jax.tree.leaves(ours)),
            "episodes_ended": int(sum(row.get("episodes", 0) for row in rows(whole))),
            "kills": kills,
            "train_steps_per_second": summary["steps_per_second"],
            "replay_steps_per_second": replayed / seconds,
            "action_bytes": ours.env_state.actions.nbytes,
            "checkpoint_bytes": checkpoints(whole / "checkpoints")[0].stat().st_size,
            "env_steps": total,
        }
    write(args.out, result)
    sys.exit(f"not the same: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
