"""What agents check when they are created."""

from ..errors import UsageError


def check_sizes(sizes: dict[str, int]) -> None:
    """Refuses what is not a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {size!r}")
