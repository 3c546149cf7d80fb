"""Kills programs wherever they change a file, and damages the files that they leave.

  python benchmarks/crash.py                       # every part; hours
  python benchmarks/crash.py --points 40           # at most 40 places of each program and mode
  python benchmarks/crash.py --only train,flips --points 10  # results of the other parts stay

Each program is run once, to count its calls that change files. Then it is run repeatedly, each time
with another of these calls failing as in `faults.Faults`: the process is killed before or during
the call, or the disk is full from there on. The same command must then finish as if nothing had
happened.

`writers`: while a program is stopped at such a call, another one uses the same directory.
`flips`: a bit of a file is flipped, or its end is missing: reading it must return what was written,
or report the damage.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import logging
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faults import KILLED, Faults, start, wait
from record import RESULTS, ROOT, provenance, write

from eqx_q.errors import UsageError

MODES = ("kill", "torn", "full")
_EVERY, _CHUNK = 64, 32
_SMALL = [
    "tracker=jsonl",
    "tuned=none",
    "num_envs=4",
    "agent.rollout_length=8",
    "agent.num_minibatches=2",
    "agent.num_epochs=1",
    "agent.network_options.hidden_sizes=[8]",
    "eval.num_envs=4",
    "+env.max_steps_in_episode=20",
    "eval.time_fraction=null",
    "video.every=0",
    "log_every=1",
]
_RUN = ["total_steps=352", "eval.every=128", f"checkpoint.every={_EVERY}", *_SMALL]
_SEARCH = ["trials=4", "population=2", "total_steps=96", "devices=1", "cpu_devices=1", *_SMALL]
_SEARCH += ["eval.every=0", "metric=loss", "resume=auto", "hydra.run.dir=search"]
_OF_TIME = {"compile_seconds", "train_seconds", "wall_seconds", "steps_per_second", "eval/seconds"}
# A data writer removes these last; they are harmless.
_HARMLESS = {"data/.lock", "data/progress.json"}
_NOT_COMPARED = {"log.txt", ".lock", "multirun.yaml"}


class Program(NamedTuple):
    """A program that writes files to the working directory.

    - `run`: runs or continues it.
    - `prepare`: makes its inputs in a directory, from the reference results of other programs.
    - `whole`: the last file that it makes, which is not made again.
    - `before`: reads what a crash has left and must not get lost; `problems`: lists defects after
        the continuation, given the directory, the reference and the result of `before`.
    """

    run: Callable[[], None]
    prepare: Callable[[Path, Path], None] = lambda place, references: None
    whole: str | None = None
    before: Callable[[Path, str], Any] = lambda place, mode: None
    problems: Callable[[Path, Path, Any], list[str]] = lambda place, reference, before: (
        _differences(place, reference)
    )


def _script(name: str, *arguments: str) -> Callable[[], None]:
    """Runs a script as from the command line."""

    def run() -> None:
        path = str(ROOT / "scripts" / f"{name}.py")
        sys.argv = [path, *arguments]
        runpy.run_path(path, run_name="__main__")

    return run


# ---- programs


def _prepare_run(place: Path, references: Path) -> None:
    shutil.copytree(references / "train" / "run", place / "run")


def _prepare_games(place: Path, references: Path) -> None:
    from formats import Raw, write_rlu

    rng = np.random.default_rng(0)
    for shard, lengths in enumerate(([6, 3], [4], [2, 5])):
        episodes = [
            Raw(
                rng.integers(0, 256, (length + 1, 8, 6), np.uint8),
                rng.integers(0, 6, length),
                rng.integers(-1, 2, length).astype(np.float32),
                True,
            )
            for length in lengths
        ]
        write_rlu(place / "rlu" / "Pong", 1, shard, episodes)


def _before_train(place: Path, mode: str) -> list[str]:
    """Problems of a killed run: steps older than a checkpoint interval that have no checkpoint."""
    from eqx_q.saving.checkpoint import newest_checkpoint

    last = max([row["env_steps"] for row in _rows(place / "run" / "metrics.jsonl")], default=0)
    newest = newest_checkpoint(place / "run" / "checkpoints")
    lost = last - (0 if newest is None else int(newest.stem))
    late = lost > _EVERY + _CHUNK and mode != "full"  # on which no checkpoint fits
    return [f"{lost} steps have no checkpoint"] if late else []


def _problems_train(place: Path, reference: Path, before: list[str]) -> list[str]:
    return before + _differences(place, reference)


def _before_tune(place: Path, mode: str) -> dict[int, tuple[Any, Any]]:
    return {} if mode == "full" else _trials(place)


def _trials(place: Path) -> dict[int, tuple[Any, Any]]:
    """Values and parameters of the finished trials in a search's journal."""
    trials: dict[int, dict[str, Any]] = {}
    journal = place / "search" / "study.journal"
    for log in _rows(journal) if journal.exists() else ():
        if log["op_code"] == 4:
            trials[len(trials)] = {}
        elif log["op_code"] == 5:
            trials[log["trial_id"]][log["param_name"]] = log["param_value_internal"]
        elif log["op_code"] == 6:
            trials[log["trial_id"]]["end"] = log["state"], log["values"]
    ended = {number: trial.pop("end") for number, trial in trials.items() if "end" in trial}
    return {n: (end[1], trials[n]) for n, end in ended.items() if end[0] in (1, 2)}


def _problems_tune(place: Path, reference: Path, before: dict[int, tuple[Any, Any]]) -> list[str]:
    found, trials = [], _trials(place)
    if not before.items() <= trials.items():
        found.append("a trial that was finished is missing")
    if len(trials) != 4:
        found.append(f"{len(trials)} trials are finished, not 4")
    table = (place / "search" / "trials.csv").read_text().splitlines()
    if [int(line.partition(",")[0]) for line in table[1:]] != sorted(trials):
        found.append("the table has other trials")
    summary = json.loads((place / "search" / "summary.json").read_text())
    if (summary["status"], summary["trials"]) != ("done", 4):
        found.append("the summary has other trials")
    return found + _left(place, reference)


def _files(place: Path) -> dict[str, Path]:
    return {str(p.relative_to(place)): p for p in sorted(place.rglob("*")) if not p.is_dir()}


def _left(place: Path, reference: Path) -> list[str]:
    ours, theirs = _files(place), _files(reference)
    more = [name for name in ours if name not in theirs and name not in _HARMLESS]
    if sum(name.endswith(".ckpt") for name in more) == 1:  # the next one would have removed it
        more = [name for name in more if not name.endswith(".ckpt")]
    return [
        *(f"{name} is left" for name in more),
        *(f"{name} is missing" for name in theirs if name not in ours),
    ]


def _differences(place: Path, reference: Path) -> list[str]:
    """Differences between the files of two programs, apart from speed."""
    ours, theirs = _files(place), _files(reference)
    return _left(place, reference) + [
        f"{name} differs"
        for name in ours.keys() & theirs.keys()
        if Path(name).name not in _NOT_COMPARED and _content(ours[name]) != _content(theirs[name])
    ]


def _content(path: Path) -> Any:
    if path.name == "metrics.jsonl":
        return [_timeless(row) for row in _rows(path)]
    if path.name == "summary.json":
        return _timeless(json.loads(path.read_text()))
    return path.read_bytes()


def _timeless(content: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in content.items() if name not in {*_OF_TIME, "crc32", "commit"}}


def _rows(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON, without an incomplete last one."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _save() -> None:
    """Saves checkpoints, each with all earlier steps."""
    from eqx_q.saving.checkpoint import checkpoints, load_latest, save_checkpoint

    tree = {"steps": np.arange(0)}
    if checkpoints("run"):
        tree, _ = load_latest("run")
    for step in range(len(tree["steps"]), 5):
        save_checkpoint("run", {"steps": np.arange(step + 1)}, step)


def _record() -> None:
    """Records a data set whose second shard does not fit into bytes."""
    import gymnasium

    from eqx_q.data import Description, Rows, Writer

    space = gymnasium.spaces.Box(0, 1000, (3,), np.float32)
    description = Description("own/game", space, gymnasium.spaces.Discrete(2))
    with Writer("data", description, narrow=True) as writer:
        for shard, high in enumerate((255, 1000, 1000)):
            if str(shard) not in writer.done:
                for length in (3, 2):
                    obs = np.linspace(0, high, 3 * (length + 1), dtype=np.int32).reshape(-1, 3)
                    action, reward = np.ones(length, np.int32), np.ones(length, np.float32)
                    obs = obs.astype(np.float32)
                    writer.append(Rows.of_episode(obs, action, reward, terminated=True))
                writer.commit(str(shard))
        writer.finish()


def _log() -> None:
    from eqx_q.tracking import JsonlTracker, read_metrics

    path = Path("run/metrics.jsonl")
    done = max([row["env_steps"] for row in read_metrics(path)], default=0)
    tracker = JsonlTracker(path, resume_step=done)
    for step in range(done + 1, 6):
        tracker.log({"loss": step / 8}, step)
    tracker.close()


PROGRAMS = {
    "save": Program(_save),
    "record": Program(_record, whole="data"),
    "log": Program(_log),
    "convert": Program(
        _script("convert", "format=rlu", "source=rlu/Pong", "out=data", "num_actions=6"),
        _prepare_games,
        "data",
    ),
    "train": Program(
        _script("train", *_RUN, "resume=auto", "hydra.run.dir=run"),
        before=_before_train,
        problems=_problems_train,
    ),
    "sweep": Program(
        _script("train", "-m", *_RUN, "eval.every=0", "seed=0,1", "hydra.sweep.dir=sweep")
    ),
    "collect": Program(
        _script("collect", "run=run", "out=data", "epsilon=[0,0.5,1]", "steps=300", "num_envs=2"),
        _prepare_run,
        "data",
    ),
    "tune": Program(_script("tune", *_SEARCH), before=_before_tune, problems=_problems_tune),
}
_OF_PYTHON = {"save", "record", "log"}  # the others are scripts


# ---- crashes


class Harness:
    """Runs programs in a separate directory."""

    def __init__(self, work: Path, seed: int, points: int | None):
        self.work, self.seed, self.points = work, seed, points
        self.references = work / "references"
        self.place = work / "place"  # the same for all, since data sets record their origin
        self._traces: dict[str, list[str]] = {}

    def prepare(self, name: str) -> None:
        """Makes only the inputs of a program."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        if (self.references / name).exists():
            base = self.work / "bases" / name
            shutil.copytree(base, self.place, dirs_exist_ok=True)
            return
        PROGRAMS[name].prepare(self.place, self.references)
        shutil.copytree(self.place, self.work / "bases" / name, dirs_exist_ok=True)

    def start(self, name: str, output: str, faults: Faults | None = None) -> int:
        """Starts a program with faults; returns its process id."""

        def action() -> None:
            os.chdir(self.place)
            try:
                PROGRAMS[name].run()
            except UsageError as error:  # like the scripts
                raise SystemExit(f"error: {error}") from None

        return start(action, faults, self.work / output)

    def said(self, output: str) -> str:
        return (self.work / output).read_text()

    def calls(self, name: str) -> list[str]:
        """The calls that change files in an undisturbed run, whose results are the reference."""
        if name not in self._traces:
            for needed in ("train",) if name == "collect" else ():
                self.calls(needed)
            self.prepare(name)
            trace = self.work / f"{name}.trace"
            began = time.perf_counter()
            if not (self.references / name).exists():
                status = wait(self.start(name, "out", Faults(self.place, trace=trace)))
                if status:
                    raise SystemExit(f"{name} does not run: {self.said('out')}")
                shutil.copytree(self.place, self.references / name)
            self._traces[name] = trace.read_text().replace(f"{self.place}/", "").splitlines()
            seconds = time.perf_counter() - began
            print(f"{name}: {len(self._traces[name])} calls, {seconds:.1f} s", flush=True)
        return self._traces[name]

    def chosen(self, name: str, mode: str) -> list[int]:
        number = len(self.calls(name))
        if self.points is None or number <= self.points:
            return list(range(number))
        rng = random.Random(f"{self.seed} {name} {mode}")
        return sorted(rng.sample(range(number), self.points))

    def crash(self, name: str, mode: str, point: int) -> list[str] | None:
        """Makes one call fail, then repeats the command; returns the problems.

        `None` if the call did not occur, since the order of threads varies.
        """
        program = PROGRAMS[name]
        self.prepare(name)
        status = wait(self.start(name, "crash", Faults(self.place, point, mode)))
        if mode != "full" and status == 0:
            return None
        found = []
        if mode == "full":
            said = self.said("crash")
            found += _unclear(status, said)
            if status == 1 and "no space" not in said.lower():
                found.append("nothing says that the disk is full")
        elif status != KILLED:
            found.append(f"ended with status {status}")
        return found + self.mend(name, program.before(self.place, mode))

    def mend(self, name: str, before: Any) -> list[str]:
        """Repeats the command; returns the problems."""
        program, found = PROGRAMS[name], []
        if program.whole is not None and (self.place / program.whole).exists():
            pass  # a file at its final place is complete
        elif status := wait(self.start(name, "again")):
            lines = self.said("again").strip().splitlines()
            return [f"the same command ended with status {status}: {lines[-1:]}"]
        elif "Traceback" in self.said("again"):
            found.append("the same command ended with a traceback")
        return found + program.problems(self.place, self.references / name, before)


def _unclear(status: int, said: str) -> list[str]:
    """The problems with how a program ended; success or a one-line error is fine."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    found = []
    if "Traceback" in said:
        found.append(f"a traceback: {said.strip().splitlines()[-1]}")
    if status not in (0, 1):
        found.append(f"ended with status {status}")
    if status == 1 and not errors:
        found.append("no line says why")
    return found


def crashes(harness: Harness, name: str) -> dict[str, Any]:
    """Tests all places of a program, or a sample of them."""
    calls = harness.calls(name)
    told: dict[str, Any] = {"calls": len(calls), "kinds": Counter(x.split()[0] for x in calls)}
    for mode in MODES:
        points, recovered, absent, failed = harness.chosen(name, mode), 0, 0, []
        for number, point in enumerate(points):
            found = harness.crash(name, mode, point)
            absent += found is None
            recovered += found == []
            if found:
                failed.append({"call": f"{point} {calls[point]}", "found": found})
                print(f"\n{name} {mode} {failed[-1]}", flush=True)
            print(f"\r{name} {mode} {number + 1}/{len(points)}", end="", flush=True)
        print(f": {recovered} recovered, {absent} did not come", flush=True)
        told[mode] = {"tried": len(points) - absent, "recovered": recovered, "failed": failed}
    return told


# ---- two writers


def writers(harness: Harness, name: str) -> dict[str, Any]:
    """Runs the same command in the same directory while a program is stopped at a call."""
    calls, failed, refused = harness.calls(name), [], 0
    points = harness.chosen(name, "stop")
    for number, point in enumerate(points):
        harness.prepare(name)
        first = harness.start(name, "crash", Faults(harness.place, point, "stop"))
        _, status = os.waitpid(first, os.WUNTRACED)
        found = []
        if os.WIFSTOPPED(status):
            second = wait(harness.start(name, "again"))
            refused += second == 1
            found += _unclear(second, harness.said("again"))
            os.kill(first, signal.SIGCONT)
            # It may find that the other one has finished.
            found += _unclear(wait(first), harness.said("crash"))
        found += harness.mend(name, PROGRAMS[name].before(harness.place, "full"))
        if found:
            failed.append({"call": f"{point} {calls[point]}", "found": found})
            print(f"\n{name} {failed[-1]}", flush=True)
        print(f"\r{name} writers {number + 1}/{len(points)}", end="", flush=True)
    print(f": {refused} refused", flush=True)
    return {"tried": len(points), "refused": refused, "failed": failed}


# ---- damage


def _digest(tree: Any) -> str:
    import jax
    import jax.numpy as jnp

    digest = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        digest.update(np.asarray(x).tobytes() if hasattr(x, "dtype") else repr(x).encode())
    return digest.hexdigest()


def _read_data(directory: Path) -> Any:
    from eqx_q.data import Dataset

    dataset = Dataset(directory)
    dataset.verify()
    return dataset.description.as_json(), dataset.shards, _digest(dataset.rows)


def _stored(directory: Path) -> Any:
    """The configuration of a run, read like the scripts do."""
    app: Any = importlib.import_module("_app")
    return app.settings(app.stored_config(directory))


def _read_run(directory: Path) -> Any:
    """Reads everything of a run that training, evaluating, recording and other scripts read."""
    from eqx_q.run import finished
    from eqx_q.run.evaluation import trained_agent
    from eqx_q.saving.checkpoint import load_latest
    from eqx_q.tracking import read_metrics

    config = _stored(directory)
    summary = finished(directory)
    state, path = load_latest(directory / "checkpoints")
    rows = list(read_metrics(directory / "metrics.jsonl", int(path.stem)))
    return config, summary, _digest(trained_agent(directory)), _digest(state), path.name, rows


def _read_search(directory: Path) -> Any:
    from eqx_q.run import finished
    from eqx_q.run.space import read_space
    from eqx_q.run.study import SharedStudy

    config = _stored(directory)
    study = SharedStudy(directory, read_space(config), sampler="tpe", maximize=False)
    try:
        trials = [(t.number, t.value, t.params, t.state.name) for t in study.finished]
    finally:
        study.close()
    return config, finished(directory), trials


_READS = {  # shares of the flips in data and in a run; those in a search are more
    "collect/data": (_read_data, lambda number: number // 2),
    "train/run": (_read_run, lambda number: number - number // 2),
    "tune/search": (_read_search, lambda number: number // 4),
}


def flips(harness: Harness, number: int) -> dict[str, Any]:
    """Damages files, one at a time, and reads them like the programs do."""
    for name in ("train", "collect", "tune"):
        harness.calls(name)
    result = harness.work / "flips.json"
    process = start(lambda: _flip_all(harness, number, result), output=harness.work / "flips")
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        time.sleep(2)
        lines = harness.said("flips").splitlines()
        print(f"\rflips {lines[-1] if lines else ''}", end="", flush=True)
    print(flush=True)
    if not result.exists():
        raise SystemExit(harness.said("flips"))
    return json.loads(result.read_text())


def _flip_all(harness: Harness, number: int, result: Path) -> None:
    told: dict[str, Any] = {}
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # pyright: ignore[reportAttributeAccessIssue]
    logging.getLogger().addHandler(handler)
    for name, (read, share) in _READS.items():
        directory = harness.references / name
        files = {p: p.read_bytes() for p in _files(directory).values() if p.stat().st_size}
        before = read(directory)
        rng = random.Random(f"{harness.seed} {name}")
        outcomes: dict[str, Counter[str]] = {"flipped": Counter(), "truncated": Counter()}
        defects = []
        asked = ["flipped"] * share(number) + ["truncated"] * (number // 10)
        for trial, how in enumerate(asked):
            path, whole = rng.choice(list(files.items()))
            at = rng.randrange(8 * len(whole))
            data = bytearray(whole[: at // 8] if how == "truncated" else whole)
            if how == "flipped":
                data[at // 8] ^= 1 << at % 8
            path.write_bytes(data)
            records.clear()
            outcome = _outcome(read, directory, before, records)
            for one, content in files.items():  # reading a search writes to it
                if one == path or one.stat().st_size != len(content):
                    one.write_bytes(content)
            outcomes[how][outcome] += 1
            if outcome not in ("found", "warned", "harmless"):
                where = f"{how} {path.relative_to(directory)} at bit {at}: {outcome}"
                defects.append(where)
            print(f"{name} {trial + 1}/{len(asked)} {len(defects)} {defects[-1:]}", flush=True)
        told[name] = {"files": len(files), **outcomes, "defects": defects}
    result.write_text(json.dumps(told))


def _agrees(after: Any, before: Any) -> bool:
    """Whether both are equal, apart from unknown keys, which no program reads."""
    if isinstance(before, dict) and isinstance(after, dict):
        return all(name in after and _agrees(after[name], x) for name, x in before.items())
    if isinstance(before, list | tuple) and isinstance(after, list | tuple):
        return len(after) == len(before) and all(map(_agrees, after, before))
    return after == before


def _outcome(read: Callable[[Path], Any], directory: Path, before: Any, records: list) -> str:
    try:
        after = read(directory)
    except UsageError:
        return "found"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if _agrees(after, before):
        return "harmless"
    return "warned" if records else "silently different"


def warm() -> None:
    """Imports what programs need without starting JAX, so that every fork has it."""
    sys.path.insert(0, str(ROOT / "scripts"))
    warnings.filterwarnings("ignore", "os.fork")
    import flax  # noqa: F401
    import hydra._internal.core_plugins.basic_sweeper  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import optuna.visualization.matplotlib  # noqa: F401
    import pandas  # noqa: F401
    import scipy.stats  # noqa: F401
    import seaborn  # noqa: F401

    import eqx_q.run  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join([*PROGRAMS, "writers", "flips"]))
    parser.add_argument("--points", type=int, help="places tested of each program and mode")
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "crash.json")
    parser.add_argument("--work", help="where; its references and compiled programs are used again")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = asked.work or stack.enter_context(tempfile.TemporaryDirectory())
        # All processes share one compilation cache.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{work}/cache"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        os.environ["JAX_PLATFORMS"] = "cpu"
        parts = asked.only.split(",")
        if not _OF_PYTHON.issuperset(parts):
            warm()
        harness = Harness(Path(work).resolve(), asked.seed, asked.points)
        told: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {}
        for part in parts:
            began = time.perf_counter()
            if part == "flips":
                told[part] = flips(harness, asked.flips)
            elif part == "writers":
                told[part] = {
                    name: writers(harness, name) for name in PROGRAMS if name not in _OF_PYTHON
                }
            else:
                told[part] = crashes(harness, part)
            how = {"seed": asked.seed, "seconds": round(time.perf_counter() - began)}
            told[part] = how | told[part]
            for name in provenance():  # of the latest parts
                told.pop(name, None)
            write(asked.out, told)


if __name__ == "__main__":
    main()
