"""Code that the scripts share: Hydra integration, and one line on stderr for a user's error."""

import contextlib
import functools
import hashlib
import importlib
import logging
import os
import re
import signal
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, cast

try:  # the scripts take `hydra` from here, so that this comes first
    import hydra
except ModuleNotFoundError:
    sys.exit("error: the scripts need Hydra: run `pip install 'eqx_q[train]'`")
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eqx_q.errors import MissingExtraError, UnknownNameError, UsageError
from eqx_q.processes import abandon, is_first_process, join_processes, requeue
from eqx_q.run import changeable, whole_or_none
from eqx_q.run.parts import check_of_chosen, full_overrides
from eqx_q.saving.files import alone_in, write_whole

_CPU_DEVICES = "--xla_force_host_platform_device_count"
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
CONF = Path(__file__).resolve().parent.parent / "conf"
logger = logging.getLogger("eqx_q")

# Options that may be one number or a list.
_OF_MANY_KINDS = {"agent.bins"}

_SEAL = re.compile(rb"# crc32 ([0-9a-f]{8})")  # first line of a stored configuration

AUTO = "auto"  # value of `resume`

# A resumed run cannot change these.
_FIXED = {"agent", "env", "tuned", "sampling", "num_envs", "seed", "num_seeds", "pbt"}
_FREE = {"sampling.memory_gb"}
# These may differ each time a run is started.
_OF_NO_RUN = {"distributed", "resume", "tracker"}

_INTERRUPTED = (
    "interrupted; saved data are kept: continue a run with resume=DIR, a sweep with the same "
    "command and hydra.sweep.dir=DIR"
)

_KINDS: list[tuple[Any, str]] = [
    (bool, "true or false"),
    ((int, float), "a number"),
    (ListConfig, "a list"),
]


class LogFile(logging.FileHandler):
    """A log file that ignores failed writes (a full disk), since the terminal has the messages."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes if possible."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignores errors."""


def launch(main: Callable[[], Any]) -> None:
    """Runs a Hydra entry point; errors in the command line end it with one line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # makes Hydra raise its errors
    # Runs of a sweep that a launcher starts import this file by its name.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv[1:] = [full for each in sys.argv[1:] for full in full_overrides(each)]
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, [here, *paths])))
    # Like Ctrl-C, with which joblib ends those runs, too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    noticed = signal.signal(signal.SIGUSR1, _notice)
    try:
        main()
    except _RunFailed:
        _fail(
            "some runs of the sweep failed: see the messages above (for submitit jobs, those in "
            ".submitit/ of the sweep's directory)"
        )
    except _TaskError as failure:
        raise failure.args[0] from None  # a bug: it keeps its traceback
    except (HydraException, OmegaConfBaseException, ValueError, RuntimeError) as error:
        _fail(_explain(error))  # RuntimeError: from a launcher, for example without Slurm
    except OSError as error:
        _fail(_unwritable(error.filename, error))
    except KeyboardInterrupt as interruption:
        _fail(str(interruption) or _INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, noticed)


def _notice(number: int, frame: object) -> None:
    """Handles a preemption notice while there is nothing to save: requeues the job."""
    if f"resume={AUTO}" in sys.argv and os.environ.get("SLURM_PROCID", "0") == "0":
        with contextlib.suppress(UsageError):
            requeue()
    raise KeyboardInterrupt


def task(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Decorates the function for `hydra.main`: a `UsageError` ends the process with its one line.

    In a sweep, an error ends only its run; the others continue.
    """

    @functools.wraps(function)
    def wrapped(config: DictConfig) -> Any:
        try:
            _check_launcher()
            _check_kinds(config)
            _import_own(config)
            return function(config)
        except UsageError as error:
            if not is_sweep():
                _forget(Path(HydraConfig.get().runtime.output_dir))
                _fail(str(error))
            _say(f"run {HydraConfig.get().job.num}: {error}")
            raise _RunFailed from None
        except Exception as error:
            if not is_sweep():
                raise _TaskError(error) from error
            traceback.print_exc()  # the traceback does not reach the parent process
            raise _RunFailed from None

    return wrapped


def end_preempted(summary: Mapping[str, Any], *, goes_on: bool) -> None:
    """Requeues the job if Slurm gave notice that it will end it.

    Only if the same command `goes_on`, instead of starting over.
    """
    if not summary["preempted"]:
        return
    if not goes_on:
        logger.warning("not requeued, since the command would start over: add resume=auto")
        return
    try:
        requeue()
        logger.info("requeued")
    except UsageError as error:
        logger.warning("not requeued: %s", error)


def end_sweep() -> None:
    """Ends a sweep after one of its runs was stopped by hand."""
    if is_sweep():
        raise KeyboardInterrupt(
            "the sweep was stopped: continue it with the same command and hydra.sweep.dir="
            f"{HydraConfig.get().sweep.dir}"
        )


def begin(config: DictConfig) -> None:
    """Prepares a new run: records the chosen groups, and logs the tuned values in use.

    **Raises:** `UsageError` if the command line has an option of a part that is not chosen. Files
    and sweeps may have such options, since they serve several parts.
    """
    _log_tuned_values()
    for key in [] if is_sweep() else map(_key, overridden()):
        group, _, path = key.partition(".")
        if group == "agent" and OmegaConf.select(config, key) is not None:
            check_of_chosen(settings(config)["agent"], path)
    choices = HydraConfig.get().runtime.choices
    chosen = {group: choices.get(group) for group in ("agent", "env", "tuned", "protocol")}
    OmegaConf.update(config, "chosen", chosen, force_add=True)  # for the record


def overridden() -> list[str]:
    """The overrides on the command line."""
    return list(HydraConfig.get().overrides.task)


def run_directory(config: DictConfig, *, resume: bool, record: str = "metrics.jsonl") -> Path:
    """The directory that Hydra made for this run, checked to be writable and unused.

    If `goes_on` is true, it may hold a run with the same configuration.

    **Arguments:** `resume`: whether to continue the run in it. `record`: the file that marks a
    directory as used.

    **Raises:** `UsageError` if it is not writable or holds another run, or for `resume` in a sweep.
    """
    if is_sweep() and (resume or config.resume):
        raise UsageError(
            "resume continues one run, in its own directory: leave out -m (a sweep continues with "
            "the same command and hydra.sweep.dir=DIR)"
        )
    directory = Path(HydraConfig.get().runtime.output_dir)
    if not is_first_process():
        return directory
    try:
        probe = directory / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(_unwritable(str(directory), error)) from None
    if goes_on(config) and (directory / "config.yaml").exists():
        _check_same(config, directory)
        return directory
    file = directory / record
    if not resume and file.exists() and file.stat().st_size:
        begun = record != "metrics.jsonl" or any((directory / "checkpoints").glob("*.ckpt"))
        mend = f"continue it with resume={directory}" if begun else "delete it"
        raise UsageError(
            f"'{directory}' already holds a run: {mend}, "
            "or choose another directory with hydra.run.dir=DIR"
        )
    return directory


def goes_on(config: DictConfig) -> bool:
    """Whether repeating the command continues its runs: in a sweep, or with `resume=auto`."""
    return is_sweep() or config.resume == AUTO


def prepare_jax(config: DictConfig) -> None:
    """Sets options that JAX reads before it touches a device; then joins other processes.

    **Raises:** `UsageError` for an invalid `cpu_devices`, or if a process is not found.
    """
    flags = [os.environ.get("XLA_FLAGS", "")]
    asked = {"cpu_devices": config.get("cpu_devices", 1)}  # older runs do not have it
    number = whole_or_none(asked, "cpu_devices") or len(os.sched_getaffinity(0))
    if number > 1 and _CPU_DEVICES not in flags[0]:
        flags.append(f"{_CPU_DEVICES}={number}")
    if config.deterministic and _DETERMINISTIC not in flags[0]:
        flags.append(_DETERMINISTIC)
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    if config.get("distributed"):
        join_processes(**config.distributed)


def store_config(config: DictConfig, directory: Path) -> None:
    """Writes the configuration of a run with a checksum, which older runs do not have."""
    text = OmegaConf.to_yaml(config, resolve=True).encode()
    text = b"\n" + text
    write_whole(directory / "config.yaml", [b"# crc32 %08x" % zlib.crc32(text), text])


def stored_config(directory: Path) -> DictConfig:
    """The configuration of a run. Raises `UsageError` if the directory has none."""
    path = Path(directory) / "config.yaml"
    if not path.exists():
        below = sorted(Path(directory).glob("*/config.yaml"))
        hint = f"; the newest run below it is '{below[-1].parent}'" if below else ""
        raise UsageError(f"'{directory}' is not a run directory: it has no config.yaml{hint}")
    try:
        text = path.read_bytes()
        seal = _SEAL.match(text)
        if seal is not None and zlib.crc32(text[seal.end() :]) != int(seal[1], 16):
            raise UsageError(
                f"'{path}' is damaged or was edited, since its checksum is wrong: undo that, or "
                "delete its first line, which has the checksum"
            )
        config = OmegaConf.load(path)
    except UsageError:
        raise
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    if not isinstance(config, DictConfig) or "env" not in config:
        raise UsageError(
            f"'{path}' is damaged: copy it from a run with the same options, or start a new run"
        )
    return config


def resumed(config: DictConfig) -> DictConfig:
    """The configuration of the run that `resume` names, with changes from the command line.

    **Raises:** `UsageError` if there is no such run, or a change is not allowed.
    """
    stored = stored_config(config.resume)
    before, changed = settings(stored), {}
    for override in overridden():
        key = _key(override)
        if key == "resume":  # not part of the run's configuration
            continue
        group, _, name = key.partition(".")
        if group == "agent" and name:
            changed[name] = override
        elif group in _FIXED and key not in _FREE:
            raise UsageError(f"resume continues a run with its own options: leave out '{override}'")
        adopt(override, config, stored)
    OmegaConf.update(stored, "distributed", config.distributed, force_add=True)
    OmegaConf.update(stored, "resume", None)
    prepare_jax(stored)
    free = changeable(before)
    for override in (override for name, override in changed.items() if name not in free):
        raise UsageError(
            f"resume continues a run with its own options: leave out '{override}' (the agent's "
            f"options that may change are {', '.join(sorted(free))})"
        )
    return stored


def adopt(override: str, config: DictConfig, stored: DictConfig) -> None:
    """Puts what an override made of `config` into a stored one, where a choice replaces another."""
    value, merge = OmegaConf.select(config, _key(override)), not _is_choice(override)
    OmegaConf.update(stored, _key(override), value, merge=merge, force_add=True)


def settings(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, for the library."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _log_tuned_values() -> None:
    """Logs which tuned file is in use; one that is given by name must exist."""
    choices: dict[str, Any] = HydraConfig.get().runtime.choices
    shipped = {path.stem for path in (CONF / "tuned").glob("*.yaml")}
    tuned = str(choices.get("tuned"))
    if tuned in shipped:
        logger.info("tuned values: conf/tuned/%s.yaml", tuned)
    elif "tuned" in map(_key, overridden()):
        raise UnknownNameError("tuned", tuned, shipped)
    else:
        logger.info("tuned values: none for agent=%s env=%s", choices["agent"], choices["env"])


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


class _TaskError(Exception):
    """Marks an error inside the task, as opposed to before it."""


class _RunFailed(Exception):
    """A run of a sweep failed and has printed why."""


def _new_run_directory(resume: str | None, agent: str, env: str, seed: int) -> str:
    name = re.sub(r"[^\w.-]+", "-", f"{agent}_{env}_{seed}")
    if resume == AUTO:  # a directory that depends only on the command
        same = sorted(o for o in sys.argv[1:] if not o.startswith("distributed."))
        return f"runs/{name}/{hashlib.sha256(repr(same).encode()).hexdigest()[:12]}"
    if resume:
        stored_config(Path(resume))  # raises before Hydra makes the directory
        return resume
    return f"runs/{name}/{datetime.now():%Y-%m-%d_%H-%M-%S}"


# At module level, since a launcher's processes import this file and do not call `launch`.
OmegaConf.register_new_resolver("run_directory", _new_run_directory, use_cache=True, replace=True)


def is_sweep() -> bool:
    """Whether this run is one of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _check_same(config: DictConfig, directory: Path) -> None:
    """Raises `UsageError` if the run in a directory has another configuration."""
    default = _composed(HydraConfig.get().overrides.task)
    of_default, now, then = (
        dict(_leaves(settings(each), "")) for each in (default, config, stored_config(directory))
    )
    # Keys that were added to the configuration since then had their defaults.
    then = {key: of_default[key] for key in now.keys() & of_default.keys() - then.keys()} | then
    other = sorted(
        key
        for key in now | then
        if now.get(key) != then.get(key) and key.partition(".")[0] not in _OF_NO_RUN
    )
    if other:
        key = other[0]
        raise UsageError(
            f"'{directory}' holds a run with {key}={then.get(key)}, not {now.get(key)}: "
            + (
                "choose another hydra.sweep.dir, or a hydra.sweep.subdir that separates them"
                if is_sweep()
                else f"continue it with its own options by resume={directory}, or choose another "
                "hydra.run.dir"
            )
        )


def _forget(directory: Path) -> None:
    """Removes the directory of a run that failed before it wrote anything there."""
    if any(each.startswith("hydra.run.dir=") for each in HydraConfig.get().overrides.hydra):
        return  # the user may have made it
    here, unused = Path.cwd(), {"log.txt", ".lock"}
    if directory in (here, *here.parents) or {x.name for x in directory.glob("*")} - unused:
        return
    with contextlib.suppress(UsageError, OSError), alone_in(directory):
        for name in unused:
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()
        for parent in directory.parents:
            if here in parent.parents:
                parent.rmdir()


def _say(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _fail(message: str) -> NoReturn:
    _say(message)
    abandon()
    sys.exit(1)


def _unwritable(path: str | None, error: OSError) -> str:
    reason = (error.strerror or type(error).__name__).lower()
    return (
        f"cannot write to the run directory '{path}' ({reason}): "
        "choose another with hydra.run.dir=DIR"
    )


def _explain(error: Exception) -> str:
    """The message of Hydra or OmegaConf, with the nearest names if one is unknown."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        plugin = name.partition("_")[0]
        if group == "hydra/launcher" and plugin in ("joblib", "submitit"):
            return str(MissingExtraError(f"hydra-{plugin}-launcher", "sweep"))
        return str(UnknownNameError(group, name, error.options or []))
    reasons = list(_reasons(error))
    for reason in reasons:
        if isinstance(reason, UsageError):
            return str(reason)
    key = getattr(reasons[1], "full_key", None) if reasons[1:] else None
    if key:
        return str(UnknownNameError("option", key, _known_keys(key.startswith("hydra."))))
    return str(error)


def _reasons(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes: Hydra and OmegaConf wrap errors more than once."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check_launcher() -> None:
    """Raises `UsageError` if a launcher is chosen for a single run, since Hydra ignores it."""
    launcher = HydraConfig.get().runtime.choices.get("hydra/launcher")
    if launcher != "basic" and not is_sweep():
        raise UsageError(f"hydra/launcher={launcher} starts the runs of a sweep: add -m")


def _import_own(config: DictConfig) -> None:
    """Imports modules named on the command line, which configurations and agents may need."""
    of_env = OmegaConf.select(config, "env.import")
    for module in [*(config.get("imports") or []), *([of_env] if of_env else [])]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(
                f"cannot import '{module}' ({error}): add its directory to PYTHONPATH"
            ) from error


def _check_kinds(config: DictConfig) -> None:
    """Raises `UsageError` if an override has another type than the value that it replaces."""
    overrides = HydraConfig.get().overrides.task
    values = [o for o in overrides if "=" in o and not _is_choice(o)]
    default = _composed(overrides)
    for key in {override.split("=")[0] for override in values} - _OF_MANY_KINDS:
        before, after = OmegaConf.select(default, key), OmegaConf.select(config, key)
        for types, kind in _KINDS:
            if isinstance(before, types):
                if after is not None and not isinstance(after, types):
                    raise UsageError(f"{key}={after}: give {kind}, such as {before}")
                break


def _known_keys(of_hydra: bool) -> set[str]:
    """All keys, ours or Hydra's, of the configuration with the chosen groups."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(
            Path(sys.argv[0]).stem.replace("train", "config"),
            _choices(sys.argv[1:]),
            return_hydra_config=True,
        )
    keys = {key for key, _ in _leaves(OmegaConf.to_container(config), "")}
    keys |= {key.rpartition(".")[0] for key in keys} - {""}
    keys |= {path.name for path in CONF.iterdir() if path.is_dir()}
    return {key for key in keys if key.startswith("hydra.") == of_hydra}


def _composed(overrides: Iterable[str]) -> DictConfig:
    """The configuration with only the group choices among the overrides."""
    return hydra.compose(str(HydraConfig.get().job.config_name), _choices(overrides))


def _choices(overrides: Iterable[str]) -> list[str]:
    """The overrides that choose a file of a group, without those of a sweep."""
    lists = re.compile(r"\[.*?\]")
    return [o for o in overrides if _is_choice(o) and "," not in lists.sub("", o)]


def _is_choice(override: str) -> bool:
    return (CONF / override.lstrip("+~").split("=")[0]).is_dir()


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
