"""RL Unplugged's Atari games (arXiv 2006.13888): compressed TFRecords, read without TensorFlow.

    <game>/run_<r>-<shard>-of-00050    gzip; one tf.train.Example per episode

The last entry of an episode is only an observation. The reward at index t is that of action t, and
the discount at index t belongs to the observation there. TensorFlow Datasets reads them so
(`rl_unplugged/atari_utils.py`): it shifts the discounts back by one, and keeps rewards and actions
in place. A discount of 0 in the last entry means that the game was over.
"""

import functools
import gzip
import itertools
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from ..errors import CorruptFileError, MissingExtraError, UsageError
from . import atari
from .conversion import Part, Source
from .dataset import Description, Rows

_PATTERN = "run_*-of-*"
_NAME = re.compile(r"run_(\d+)-(\d+)-of-\d+")
_BLOCK = 512  # frames to decode at a time
_LONGEST_RECORD = 1 << 31  # bytes; a larger length means damage
_FEATURES = {
    "observations": "bytes_list",
    "actions": "int64_list",
    "unclipped_rewards": "float_list",
    "discounts": "float_list",
}


class Episode(NamedTuple):
    """An episode as stored in a file. Frames are PNGs. Padding in the last entry is left out: it
    has only an observation.
    """

    frames: Sequence[bytes]
    action: Int64[np.ndarray, " L"]
    reward: Float32[np.ndarray, " L"]
    terminated: bool


def from_rlu(
    source: str | os.PathLike,
    *,
    run: int | Sequence[int] | None = None,
    shards: Sequence[int] | None = None,
    rows_per_shard: int | None = None,
    env: str | None = None,
    num_actions: int | None = None,
) -> Source:
    """The data in a game's folder, for `convert`.

    **Arguments:** `source`: the folder, named after the game. `run`, `shards`: numbers, `None` for
    all. `rows_per_shard`: convert only the first rows; an episode is cut there. `env`: the expected
    environment. `num_actions`: of the game, if EnvPool is not installed.

    **Raises:** `UsageError` if the files are missing, or are of another game.
    """
    atari.check_limit(rows_per_shard)
    folder = atari.game_folder(Path(source), _PATTERN)
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob(_PATTERN):
        if name := _NAME.fullmatch(path.name):
            found.setdefault(int(name[1]), {})[int(name[2])] = path
    chosen = atari.choose(found, folder, run, shards)
    first = chosen[0][2]
    episode = next(read_episodes(first))
    description = atari.describe(
        folder,
        decode_frames(episode.frames[:1], first).shape[1:],
        env=env,
        num_actions=num_actions,
        reward_clip=False,
        source={"format": "rlu", "rows_per_shard": rows_per_shard},
    )
    parts = [
        Part(path.name, one, functools.partial(_blocks, path, description, rows_per_shard))
        for one, _, path in chosen
    ]
    return Source(description, parts)


def read_episodes(path: str | os.PathLike) -> Iterator[Episode]:
    """Yields the episodes of a file, with compressed frames.

    **Raises:** `CorruptFileError` if the file is damaged or empty, `MissingExtraError`.
    """
    path = Path(path)
    number = -1
    for number, record in enumerate(read_records(path)):
        columns = _parse(record, path)
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1 or not lengths["discounts"]:
            raise CorruptFileError(
                f"episode {number} of '{path}' has columns of different lengths ({lengths}): "
                "give a file of RL Unplugged's Atari games"
            )
        discount = np.array(columns["discounts"], np.float32)
        if not np.all(discount[1:-1]):
            raise CorruptFileError(
                f"episode {number} of '{path}' has a discount of 0 before its end: fetch it again"
            )
        yield Episode(
            frames=columns["observations"],
            action=np.array(columns["actions"], np.int64)[:-1],
            reward=np.array(columns["unclipped_rewards"], np.float32)[:-1],
            terminated=bool(discount[-1] == 0),
        )
    if number < 0:
        raise CorruptFileError(f"'{path}' has no episodes: fetch it again, or leave it out")


def read_records(path: str | os.PathLike) -> Iterator[bytes]:
    """Yields the records of a compressed TFRecord file: length and data, each with a checksum.

    **Raises:** `CorruptFileError` if the file is truncated or damaged, `MissingExtraError`.
    """
    checksum = _crc32c()

    def checked(file, size: int) -> bytes:
        data = file.read(size + 4)
        if len(data) < size + 4:
            raise EOFError("it ends in the middle of a record")
        data, expected = data[:size], struct.unpack("<I", data[size:])[0]
        crc = checksum(data)
        # TFRecords mask checksums (rotate and add), since checksums of checksums are unreliable.
        if (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF) != expected:
            raise ValueError("a checksum is wrong")
        return data

    try:
        with gzip.open(path) as file:
            while file.peek(1):
                (length,) = struct.unpack("<Q", checked(file, 8))
                if length > _LONGEST_RECORD:
                    raise ValueError("a record is too long")
                yield checked(file, length)
    except (EOFError, ValueError, OSError, zlib.error) as error:
        raise CorruptFileError(f"'{path}' is damaged ({error}): fetch it again") from error


def decode_frames(
    frames: Sequence[bytes], path: str | os.PathLike
) -> UInt8[np.ndarray, "B height width"]:
    """Decodes PNGs of grey frames of one size.

    **Arguments:** `path`: their file, for error messages.

    **Raises:** `CorruptFileError` if one is damaged, `UsageError` if one is not grey or differs in
    size, `MissingExtraError`.
    """
    try:
        from imagecodecs import PngError, png_decode
    except ImportError:
        raise MissingExtraError("imagecodecs", "offline") from None
    try:
        images = [png_decode(frame) for frame in frames]
    except (PngError, ValueError) as error:
        raise CorruptFileError(
            f"'{path}' has a frame that is not a PNG ({error}): fetch it again"
        ) from error
    kinds = {(image.dtype, image.shape) for image in images}
    if len(kinds) > 1 or images[0].ndim != 2 or images[0].dtype != np.uint8:
        found = " and ".join(sorted(f"{dtype}{list(shape)}" for dtype, shape in kinds))
        raise UsageError(
            f"'{path}' has frames of {found}, not all of one uint8[height, width]: give a file of "
            "RL Unplugged's Atari games"
        )
    return np.stack(images)


def _blocks(
    path: Path, description: Description, limit: int | None
) -> Iterator[Callable[[], Rows]]:
    """Yields the rows of a file, a few at a time."""
    left = limit
    for episode in read_episodes(path):
        length = len(episode.frames)
        size = length if left is None else min(length, left)
        if size > 1:  # a single observation is not a transition
            atari.check_actions(episode.action, description, path)
            # In an episode that is cut, the last remaining observation is the final one.
            rows = Rows.of_episode(
                np.arange(size),
                episode.action[: size - 1],
                episode.reward[: size - 1],
                terminated=episode.terminated and size == length,
            )
            for start in range(0, size, _BLOCK):
                part = rows.part(start, start + _BLOCK)
                frames = episode.frames[start : start + len(part.action)]
                yield functools.partial(_decoded, frames, part, description.row_shape, path)
        if left is not None:
            left -= size
            if left < 2:
                return


def _decoded(frames: Sequence[bytes], rows: Rows, shape: tuple[int, ...], path: Path) -> Rows:
    images = decode_frames(frames, path)
    if images.shape[1:] != shape:
        raise UsageError(
            f"'{path}' has frames of {list(images.shape[1:])}, but earlier ones are of "
            f"{list(shape)}: convert data with different preprocessing separately"
        )
    return rows._replace(obs=images)


def _parse(record: bytes, path: Path) -> dict[str, Any]:
    """The columns of an episode."""
    example = _example_class()()
    try:
        example.ParseFromString(record)
    except Exception as error:  # each implementation of protobuf has its own exception
        raise CorruptFileError(f"'{path}' is damaged ({error}): fetch it again") from error
    features = example.features.feature
    missing = [name for name in _FEATURES if name not in features]
    if missing:
        raise CorruptFileError(
            f"an episode in '{path}' has no {', '.join(missing)}: give a file of RL Unplugged's "
            "Atari games"
        )
    return {name: getattr(features[name], kind).value for name, kind in _FEATURES.items()}


def _crc32c() -> Callable[[bytes], int]:
    try:
        import google_crc32c
    except ImportError:
        raise MissingExtraError("google-crc32c", "offline") from None
    return google_crc32c.value


@functools.cache
def _example_class() -> Any:
    """tf.train.Example: a map from names to lists of one of three kinds."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise MissingExtraError("protobuf", "offline") from None
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example", package="e", syntax="proto3")

    def message(parent, name: str, **fields: Any):
        """Adds a message type with fields numbered from 1: name=(type, is repeated)."""
        new = parent.add(name=name)
        for number, (key, (kind, repeated)) in zip(itertools.count(1), fields.items()):
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            own = isinstance(kind, str)
            new.field.add(
                name=key,
                number=number,
                label=label,
                type=field.TYPE_MESSAGE if own else kind,
                type_name=f".e.{kind}" if own else None,
            )
        return new

    types = file.message_type
    message(types, "BytesList", value=(field.TYPE_BYTES, True))
    message(types, "FloatList", value=(field.TYPE_FLOAT, True))
    message(types, "Int64List", value=(field.TYPE_INT64, True))
    kinds = {"bytes_list": "BytesList", "float_list": "FloatList", "int64_list": "Int64List"}
    message(types, "Feature", **{key: (kind, False) for key, kind in kinds.items()})
    features = message(types, "Features", feature=("Features.FeatureEntry", True))
    entry = message(
        features.nested_type,
        "FeatureEntry",
        key=(field.TYPE_STRING, False),
        value=("Feature", False),
    )
    entry.options.map_entry = True
    message(types, "Example", features=("Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("e.Example"))
