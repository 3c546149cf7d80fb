"""Lossless conversion from and to Minari's data sets (minari.farama.org).

A Minari episode has one observation more than actions, as here. Images are stored losslessly,
unlike Minari's default, JPEG. Data that Minari has no place for, such as action masks, go into an
episode's `infos`.
"""

import contextlib
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import jax
import numpy as np
from gymnasium.envs.registration import EnvSpec
from jaxtyping import Shaped

from ..errors import CorruptFileError, MissingExtraError, UnknownNameError, UsageError
from ..spaces import Leaf, factors, leaves, of_actions, of_observations, select, without
from .conversion import Part, Source
from .dataset import Dataset, Description, Rows

_EPISODES = 100  # per part
_BYTES = 1 << 26  # of observations to pass to Minari at a time, but at least one episode
_KEY = "eqx_q"  # key of our description in Minari's metadata


def from_minari(
    dataset_id: str, *, env: str | None = None, leave_out: Sequence[str] = ()
) -> Source:
    """A local Minari data set, for `convert`.

    If `to_minari` wrote it, each frame of stacked observations is stored once again. Rewards become
    `float32`. An episode without an end is truncated.

    **Arguments:** `env`: the environment, `"<suite>/<name>"`; `None` for Minari's. `leave_out`:
    entries of `Dict` observations, by path, that the agent does not see.

    **Raises:** `UsageError` if it does not exist, or its spaces are not supported (see
    `eqx_q.spaces`). `MissingExtraError`.
    """
    minari = _minari()
    known = minari.list_local_datasets()
    if dataset_id not in known:
        error = UnknownNameError("Minari data set", dataset_id, known)
        raise UsageError(f"{error}; `minari download {dataset_id}` fetches a published one")
    data = minari.load_dataset(dataset_id)
    if not data.total_episodes:
        raise UsageError(
            f"the Minari data set '{dataset_id}' has no episodes: choose another data set"
        )
    indices = np.asarray(data.episode_indices)
    (first,) = data.storage.get_episodes(indices[:1])
    metadata, source = data.storage.metadata, {"format": "minari", "id": dataset_id}
    if data.storage.jpeg_encoding and _is_image(data.observation_space):
        source["jpeg"] = "yes"  # its images were already lossy
    if _KEY in metadata:
        description = Description.from_json(json.loads(metadata[_KEY]))
        space = of_observations(without(description.observation_space, leave_out))
        source = {**description.source, **source}
        description = description._replace(observation_space=space, source=source)
    else:
        spec = data.env_spec
        if spec is not None:
            source["env_spec"] = spec.to_json()
        actions = of_actions(data.action_space)
        description = Description(
            env=f"minari/{dataset_id}" if spec is None else f"gymnasium/{spec.id}",
            observation_space=of_observations(without(data.observation_space, leave_out)),
            action_space=actions,
            source=source,
            extras=_masks(first, actions),
        )
    parts = [
        Part(
            f"episodes {chunk[0]} to {chunk[-1]}",
            None,
            functools.partial(_blocks, data.storage, chunk, description),
        )
        for chunk in np.split(indices, range(_EPISODES, len(indices), _EPISODES))
    ]
    return Source(
        description if env is None else description._replace(env=env),
        parts,
        jax.tree.map(
            lambda x: x.dtype, select(description.observation_space, first["observations"])
        ),
    )


def _masks(episode: dict[str, Any], actions: Leaf) -> dict[str, tuple[int, ...]]:
    """`extras` for action masks, if an episode has one per observation."""
    masks = np.asarray((episode["infos"] or {}).get("action_mask"))
    shape = (sum(factors(actions)),)
    return {"action_mask": shape} if masks.shape == (len(episode["rewards"]) + 1, *shape) else {}


def to_minari(
    dataset: Dataset,
    dataset_id: str,
    *,
    on_rows: Callable[[str, int], None] = lambda part, rows: None,
) -> Any:
    """Writes a local Minari data set, and returns the `minari.MinariDataset`.

    Observations are those of the agent: frames are stacked. If it fails, it leaves nothing behind.

    **Arguments:** `dataset_id`: `"<namespace>/<name>-v<number>"`, with or without a namespace.
    `on_rows`: as in `convert`.

    **Raises:** `UsageError` if the name exists, Minari does not support such data, or the disk is
    full. `MissingExtraError`.
    """
    minari = _minari()
    _check_minari_holds(dataset)
    try:
        minari.dataset.minari_dataset.parse_dataset_id(dataset_id)
    except (TypeError, ValueError):
        raise UsageError(
            f"'{dataset_id}' is not a valid Minari name: write it like 'atari/pong-v0'"
        ) from None
    if dataset_id in minari.list_local_datasets():
        raise UsageError(f"the Minari data set '{dataset_id}' exists already: choose another name")
    description, data = dataset.description, None
    try:
        for rows in _grouped(dataset):
            buffers = [_buffer(minari, one, description) for one in rows]
            if data is None:
                with warnings.catch_warnings(action="ignore"):  # about missing authors and links
                    data = minari.create_dataset_from_buffers(
                        dataset_id,
                        buffers,
                        env=_env_spec(description),
                        observation_space=description.observation_space,
                        action_space=description.action_space,
                        description=f"{description.env}, written by eqx_q",
                        data_format="hdf5",
                        jpeg_encoding=False,
                    )
                data.storage.update_metadata({_KEY: json.dumps(description.as_json())})
            else:
                data.update_dataset_from_buffer(buffers)
            on_rows("", sum(len(one.action) for one in rows))
    except BaseException as error:
        path = minari.storage.datasets_root_dir.get_dataset_path(dataset_id)
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise UsageError(
                f"cannot write the Minari data set '{dataset_id}' ({error.strerror or error}): "
                "free space on that disk, or set MINARI_DATASETS_PATH to another place"
            ) from error
        raise
    return data


def _env_spec(description: Description) -> EnvSpec | None:
    """The environment's specification, if it came from Minari or is one of Gymnasium's."""
    told = description.source.get("env_spec")
    if told is not None:
        return EnvSpec.from_json(told)
    suite, _, name = description.env.partition("/")
    with contextlib.suppress(gymnasium.error.Error):
        return gymnasium.spec(name) if suite == "gymnasium" else None


def _check_minari_holds(dataset: Dataset) -> None:
    description = dataset.description
    if description.num_agents is not None:
        raise UsageError(
            f"'{dataset.path}' is of a team of {description.num_agents}, but Minari's data sets "
            "are of one agent: share the directory itself"
        )
    for path, _ in leaves(description.observation_space):
        if "/" in path:  # which separates groups in HDF5
            raise UsageError(
                f"Minari does not support the observation '{path}', whose name has a slash: rename "
                "it in the environment"
            )


def stacked(
    frames: Shaped[np.ndarray, "L height width"], stack: int, start: str
) -> Shaped[np.ndarray, "L stack height width"]:
    """The stacked observations of an episode of these frames.

    **Arguments:** `start`: see `Description.stack_start`.
    """
    first = frames[:1] if start == "repeat" else np.zeros_like(frames[:1])
    padded = np.concatenate([first] * (stack - 1) + [frames])
    return np.stack([padded[k : k + len(frames)] for k in range(stack)], axis=1)


def _blocks(
    storage: Any, indices: np.ndarray, description: Description
) -> Iterator[Callable[[], Rows]]:
    for episode in storage.get_episodes(indices):
        if len(episode["rewards"]):
            yield functools.partial(_rows, episode, description)


def _rows(episode: dict[str, Any], description: Description) -> Rows:
    """The rows of a Minari episode."""
    obs = select(description.observation_space, episode["observations"])
    action = np.asarray(episode["actions"])
    number, length = episode["id"], len(action)
    (seen, *others) = {len(x) for x in jax.tree.leaves(obs)}
    if others or seen != length + 1 or len(episode["rewards"]) != length:
        raise CorruptFileError(
            f"episode {number} has {seen} observations for {length} actions and "
            f"{len(episode['rewards'])} rewards: make the Minari data set again"
        )
    terminated, truncated = (np.asarray(episode[x]) for x in ("terminations", "truncations"))
    if np.any((terminated | truncated)[:-1]):
        raise UsageError(
            f"episode {number} continues after step {int(np.argmax(terminated | truncated))}, "
            "which ends it: split it in the Minari data set"
        )
    if description.stack is not None:
        frames = obs[:, -1]
        if not np.array_equal(stacked(frames, description.stack, description.stack_start), obs):
            raise CorruptFileError(
                f"the observations of episode {number} are not stacks of frames: make the Minari "
                "data set again"
            )
        obs = frames
    rows = Rows.of_episode(obs, action, episode["rewards"], terminated=bool(terminated[-1]))
    infos = episode["infos"] or {}
    extras = {name: infos[name] for name in description.extras if name in infos}
    if "action_mask" in extras:
        extras["action_mask"] = np.asarray(extras["action_mask"]).astype(bool)
    return rows._replace(**extras)


def _buffer(minari: Any, rows: Rows, description: Description) -> Any:
    """A Minari episode from rows."""
    obs = jax.tree.map(np.asarray, rows.obs)
    if description.stack is not None:
        obs = stacked(obs, description.stack, description.stack_start)
    return minari.data_collector.EpisodeBuffer(
        observations=obs,
        actions=rows.action[:-1].astype(description.action_space.dtype),
        rewards=rows.reward[:-1],
        terminations=rows.terminated[:-1],
        truncations=rows.truncated[:-1],
        infos={name: np.asarray(getattr(rows, name)) for name in description.extras} or None,
    )


def _grouped(dataset: Dataset) -> Iterator[list[Rows]]:
    """Yields episodes, a few at a time."""
    group, size, stack = [], 0, dataset.description.stack or 1
    for rows in dataset.episodes():
        group.append(rows)
        size += sum(x.nbytes for x in jax.tree.leaves(rows.obs)) * stack
        if size >= _BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _is_image(space: Any) -> bool:
    """Whether any part of a space is an image."""
    from minari.dataset.minari_storage import is_image_space

    return any(is_image_space(leaf) for _, leaf in leaves(space))


def _minari() -> Any:
    try:
        import h5py  # noqa: F401  (Minari imports it late)
        import minari
    except ImportError:
        raise MissingExtraError("minari", "offline") from None
    return minari
