"""Agents by name: from the zoo in the package, and from the Hugging Face hub.

A name is `zoo:AGENT/ENV`, `hf:USER/NAME` or `hf:USER/NAME@REVISION`. It stands for a directory with
the files `FILES`, as `scripts/publish.py` makes it.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import MissingExtraError, UnknownNameError, UsageError

ZOO = Path(__file__).parents[1] / "zoo"
AGENT = "agent.eqx"
FILES = [AGENT, "config.yaml", "summary.json", "README.md"]
_NAME = re.compile(r"(zoo|hf):(.*)")
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


def is_name(path: str | os.PathLike) -> bool:
    """Whether this is a name, not a path."""
    return _NAME.fullmatch(str(path)) is not None


def locate(name: str | os.PathLike) -> Path:
    """The directory of a name, downloaded from the hub if needed; a path is returned as it is.

    **Raises:** `UsageError` if there is no such agent, or the hub does not deliver it.
    """
    match = _NAME.fullmatch(str(name))
    if match is None:
        return Path(name)
    if match[1] == "hf":
        return _download(str(name))
    if match[2] not in zoo():
        raise UnknownNameError("agent of the zoo", match[2], zoo())
    return ZOO / match[2]


def zoo() -> list[str]:
    """The agents of the zoo, as `AGENT/ENV`."""
    return sorted(path.parent.relative_to(ZOO).as_posix() for path in ZOO.glob(f"*/*/{AGENT}"))


def name_of(directory: Path) -> str | None:
    """The name of a directory in the zoo, else `None`."""
    directory = directory.resolve()
    inside = directory.is_relative_to(ZOO)
    return f"zoo:{directory.relative_to(ZOO).as_posix()}" if inside else None


def results_of(name: str | os.PathLike) -> Path:
    """The directory for results about an agent: that of a run itself; for a name, in `runs/`."""
    match = _NAME.fullmatch(str(name))
    return Path("runs", match[1], *match[2].split("/")) if match else Path(name)


def push(directory: Path, name: str, *, private: bool = False) -> str:
    """Uploads a published agent to the hub as one commit, and creates the repository if needed.

    Adds metadata for the hub's listings to the model card.

    **Arguments:** `name`: `hf:USER/NAME`. `private`: whether a new repository is private.

    **Returns:** the URL of the commit.
    **Raises:** `UsageError` if the hub does not accept it.
    """
    summary = json.loads((directory / "summary.json").read_bytes())
    agent, env = summary["agent"].rpartition(".")[2], summary["env"]
    later = [result["return_per_seed"][0] for result in summary["evaluations"]]
    score = [summary.get("eval_return_mean"), *later][-1]
    with _explained(name):
        from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

        repository, revision = _repository(name)
        if revision is not None:
            raise UsageError(f"a push creates a revision itself: leave out @{revision} of {name}")
        result = EvalResult(
            task_type="reinforcement-learning",
            dataset_type=env,
            dataset_name=env,
            metric_type="mean_reward",
            metric_value=score,
        )
        metadata = ModelCardData(
            library_name="eqx_q",
            tags=["reinforcement-learning", "q-learning", "jax", agent, env],
            model_name=agent,
            eval_results=None if score is None else [result],
        )
        text = (directory / "README.md").read_text()
        ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}").save(directory / "README.md")
        api = HfApi(library_name="eqx_q")
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=FILES,
            commit_message=f"{agent} in {env}",
        )
    return commit.commit_url


def _download(name: str) -> Path:
    with _explained(name):
        from huggingface_hub import snapshot_download

        repository, revision = _repository(name)
        directory = snapshot_download(
            repository, revision=revision, allow_patterns=FILES, library_name="eqx_q"
        )
    if not (Path(directory) / AGENT).exists():
        raise UsageError(f"{name} has no {AGENT}: give a repository of scripts/publish.py")
    return Path(directory)


def _repository(name: str) -> tuple[str, str | None]:
    """The repository and revision of a name."""
    match = _REPOSITORY.fullmatch(name.removeprefix("hf:"))
    if not name.startswith("hf:") or match is None:
        raise UsageError(f"'{name}' is not a name on the hub: give hf:USER/NAME")
    return match[1], match[2]


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns errors of the hub's client, and its absence, into `UsageError`s."""
    try:
        from httpx2 import TransportError  # a dependency of huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    offline = (TransportError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    try:
        yield
    except UsageError:
        raise
    except errors.HFValidationError as error:
        raise UsageError(f"'{name}' is not a name on the hub: give hf:USER/NAME") from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(
            f"{name} has no such revision: give a commit, branch or tag, or leave it out"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{name} does not exist on the hub, or you have no access: check the name, or {log_in}"
        ) from error
    except offline as error:
        raise UsageError(
            f"cannot reach the hub for {name}: check the network, and HF_ENDPOINT and "
            "HF_HUB_OFFLINE if they are set"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        mend = f"{log_in}, with write access" if status in (401, 403) else "try again later"
        said = " ".join((error.server_message or "").split())
        raise UsageError(
            f"the hub refused {name} with status {status}{f' ({said})' if said else ''}: {mend}"
        ) from error
    except (RuntimeError, OSError) as error:
        if getattr(error, "errno", None) is None:  # an interrupted upload or download
            raise UsageError(f"the transfer of {name} failed ({error}): try again") from error
        raise UsageError(
            f"cannot store {name} ({error}): free space, or choose another cache with HF_HOME"
        ) from error
