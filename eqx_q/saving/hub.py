"""Agents by name: those of the zoo, which is in the package, and those of the Hugging Face hub.

A name is `zoo:AGENT/ENV`, `hf:USER/NAME` or `hf:USER/NAME@REVISION`. It stands for a directory as
`scripts/publish.py` makes one, with the files `FILES`.
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
    """Whether this is a name, and not a path."""
    return _NAME.fullmatch(str(path)) is not None


def locate(name: str | os.PathLike) -> Path:
    """The directory that a name stands for; that of the hub is downloaded, unless it has been.

    What is no name is a path, and comes back as one.

    **Raises:** `UsageError` where there is no such agent, or the hub does not give it.
    """
    found = _NAME.fullmatch(str(name))
    if found is None:
        return Path(name)
    if found[1] == "hf":
        return _download(str(name))
    if found[2] not in zoo():
        raise UnknownNameError("agent of the zoo", found[2], zoo())
    return ZOO / found[2]


def zoo() -> list[str]:
    """All `AGENT/ENV` that `zoo:` knows."""
    return sorted(path.parent.relative_to(ZOO).as_posix() for path in ZOO.glob(f"*/*/{AGENT}"))


def name_of(directory: Path) -> str | None:
    """The name of a directory in the zoo."""
    inside = directory.resolve().is_relative_to(ZOO)
    return f"zoo:{directory.resolve().relative_to(ZOO).as_posix()}" if inside else None


def results_of(name: str | os.PathLike) -> Path:
    """The directory for what is found out about an agent: a run's own, and for a name `runs/…`."""
    found = _NAME.fullmatch(str(name))
    return Path("runs", found[1], *found[2].split("/")) if found else Path(name)


def push(directory: Path, name: str, *, private: bool = False) -> str:
    """Uploads a published agent to the hub, as one commit; makes the repository if it is not there.

    Its card gets metadata, by which the hub lists it.

    **Arguments:** `name`: `hf:USER/NAME`. `private`: whether a repository that is made is.

    **Returns:** the address of the commit.
    **Raises:** `UsageError` where the hub does not take it.
    """
    summary = json.loads((directory / "summary.json").read_bytes())
    agent, env = summary["agent"].rpartition(".")[2], summary["env"]
    afterwards = [sum(x["return_per_seed"]) for x in summary.get("evaluations", [])]  # of one
    score = [summary.get("eval_return_mean"), *afterwards][-1]
    with _explained(name):
        from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

        repository, revision = _repository(name)
        if revision is not None:
            raise UsageError(f"{name} names a revision, and this makes one: leave out @{revision}")
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
        found = snapshot_download(
            repository, revision=revision, allow_patterns=FILES, library_name="eqx_q"
        )
    if not (Path(found) / AGENT).exists():
        raise UsageError(f"{name} is no agent of eqx_q: there is no {AGENT} in it")
    return Path(found)


def _repository(name: str) -> tuple[str, str | None]:
    """Repository and revision."""
    found = _REPOSITORY.fullmatch(name.removeprefix("hf:"))
    if not name.startswith("hf:") or found is None:
        raise UsageError(f"'{name}' is no name of the hub: give hf:USER/NAME")
    return found[1], found[2]


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """What goes wrong with the hub inside is a `UsageError`, as is that its package is missing."""
    try:
        from httpx2 import TransportError  # huggingface_hub's client
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    log_in = "log in with `hf auth login`, or give a token in HF_TOKEN"
    offline = (TransportError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    try:
        yield
    except UsageError:
        raise
    except errors.HFValidationError as error:
        raise UsageError(f"'{name}' is no name of the hub: give hf:USER/NAME") from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(
            f"there is no {name} on the hub: leave out the revision, or give a commit, branch or "
            "tag that is there"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"there is no {name} on the hub, or it is not open to you: check the name, or {log_in}"
        ) from error
    except offline as error:
        raise UsageError(
            f"the hub cannot be reached for {name}: check the network, and HF_ENDPOINT and "
            "HF_HUB_OFFLINE if they are set"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        mend = f"{log_in} that may write there" if status in (401, 403) else "try again later"
        said = " ".join((error.server_message or "").split())
        raise UsageError(
            f"the hub answers {status} for {name}{f' ({said})' if said else ''}: {mend}"
        ) from error
    except (RuntimeError, OSError) as error:
        if getattr(error, "errno", None) is None:  # a transfer of a large file that breaks off
            raise UsageError(f"{name} was not transferred ({error}): try again") from error
        raise UsageError(
            f"{name} cannot be kept here ({error}): free space, or choose another place with "
            "HF_HOME"
        ) from error
