"""Minari's data sets (minari.farama.org), to and from ours, losslessly.

An episode there has one observation more than actions, as here. Images are stored as they are:
Minari's default is JPEG. What it has no place for, as action masks, is among an episode's `infos`.
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

_EPISODES = 100  # of a part
_BYTES = 1 << 26  # of observations that Minari is given at a time, or one episode's
_KEY = "eqx_q"  # in Minari's metadata: our description


def from_minari(
    dataset_id: str, *, env: str | None = None, leave_out: Sequence[str] = ()
) -> Source:
    """A local Minari data set, to be given to `convert`.

    Of one that `to_minari` wrote, the frames of stacked observations are stored once, as they were.
    Rewards become `float32`. An episode that was left before its end is truncated.

    **Arguments:** `env`: the environment, `"<suite>/<name>"`; `None` for what Minari says.
    `leave_out`: paths of what nothing is to be learnt from in observations that are a `Dict`.

    **Raises:** `UsageError` where there is none of this name, or its spaces are not among those
    that can be learnt from (see `eqx_q.spaces`). `MissingExtraError`.
    """
    minari = _minari()
    known = minari.list_local_datasets()
    if dataset_id not in known:
        error = UnknownNameError("Minari data set", dataset_id, known)
        raise UsageError(f"{error}; `minari download {dataset_id}` fetches what is published")
    data = minari.load_dataset(dataset_id)
    if not data.total_episodes:
        raise UsageError(f"there is no episode in the Minari data set '{dataset_id}'")
    indices = np.asarray(data.episode_indices)
    (first,) = data.storage.get_episodes(indices[:1])
    metadata, source = data.storage.metadata, {"format": "minari", "id": dataset_id}
    if data.storage.jpeg_encoding and _is_image(data.observation_space):
        source["jpeg"] = "yes"  # it had lost something before it came here
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
    """The extra that masks of actions are, where an episode has them for each observation."""
    masks = np.asarray((episode["infos"] or {}).get("action_mask"))
    shape = (sum(factors(actions)),)
    return {"action_mask": shape} if masks.shape == (len(episode["rewards"]) + 1, *shape) else {}


def to_minari(
    dataset: Dataset,
    dataset_id: str,
    *,
    on_rows: Callable[[str, int], None] = lambda part, rows: None,
) -> Any:
    """Writes a data set into Minari's local ones, and returns that `minari.MinariDataset`.

    Observations are what an agent sees: frames are stacked. Where it fails, nothing is left.

    **Arguments:** `dataset_id`: `"<namespace>/<name>-v<number>"`, with or without a namespace.
    `on_rows`: as of `convert`.

    **Raises:** `UsageError` where there is one of this name, where Minari has no place for such
    data, or the disk is full. `MissingExtraError`.
    """
    minari = _minari()
    _check_minari_holds(dataset)
    try:
        minari.dataset.minari_dataset.parse_dataset_id(dataset_id)
    except (TypeError, ValueError):
        raise UsageError(
            f"'{dataset_id}' is no name of a Minari data set: write it like 'atari/pong-v0'"
        ) from None
    if dataset_id in minari.list_local_datasets():
        raise UsageError(f"there is a Minari data set '{dataset_id}' already: choose another name")
    description, data = dataset.description, None
    try:
        for rows in _grouped(dataset):
            buffers = [_buffer(minari, one, description) for one in rows]
            if data is None:
                with warnings.catch_warnings(action="ignore"):  # authors, links: it has none
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
    """Of the environment, where Minari told it or it is one of Gymnasium's."""
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
            f"'{dataset.path}' is of a team of {description.num_agents}, and Minari's data sets "
            "are of one agent: hand on the directory itself"
        )
    for path, _ in leaves(description.observation_space):
        if "/" in path:  # which parts groups of HDF5
            raise UsageError(f"Minari has no place for a part of observations called '{path}'")


def stacked(
    frames: Shaped[np.ndarray, "L height width"], stack: int, start: str
) -> Shaped[np.ndarray, "L stack height width"]:
    """What an agent sees in an episode of these frames.

    **Arguments:** `start`: as `Description.stack_start`.
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
    """Of an episode of Minari's."""
    obs = select(description.observation_space, episode["observations"])
    action = np.asarray(episode["actions"])
    number, length = episode["id"], len(action)
    (seen, *others) = {len(x) for x in jax.tree.leaves(obs)}
    if others or seen != length + 1 or len(episode["rewards"]) != length:
        raise CorruptFileError(
            f"episode {number} has {seen} observations for {length} actions and "
            f"{len(episode['rewards'])} rewards: make the Minari data set anew"
        )
    terminated, truncated = (np.asarray(episode[x]) for x in ("terminations", "truncations"))
    if np.any((terminated | truncated)[:-1]):
        raise UsageError(
            f"episode {number} goes on after step {int(np.argmax(terminated | truncated))}, which "
            "ends it: split it in the Minari data set"
        )
    if description.stack is not None:
        frames = obs[:, -1]
        if not np.array_equal(stacked(frames, description.stack, description.stack_start), obs):
            raise CorruptFileError(
                f"the observations of episode {number} are no stacks of frames: make the Minari "
                "data set anew"
            )
        obs = frames
    rows = Rows.of_episode(obs, action, episode["rewards"], terminated=bool(terminated[-1]))
    infos = episode["infos"] or {}
    extras = {name: infos[name] for name in description.extras if name in infos}
    if "action_mask" in extras:
        extras["action_mask"] = np.asarray(extras["action_mask"]).astype(bool)
    return rows._replace(**extras)


def _buffer(minari: Any, rows: Rows, description: Description) -> Any:
    """An episode for Minari."""
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
    """Episodes, a few at a time."""
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
    """Whether any part of it is one."""
    from minari.dataset.minari_storage import is_image_space

    return any(is_image_space(leaf) for _, leaf in leaves(space))


def _minari() -> Any:
    try:
        import h5py  # noqa: F401  (Minari asks for it late)
        import minari
    except ImportError:
        raise MissingExtraError("minari", "offline") from None
    return minari
