"""What a run tells the world, and what it asks it: nothing at all, or a workdir."""

from typing import Any


class Output:
    """Watches a run. This one keeps quiet, saves nothing and never stops it; `train.workdir` has the other.

    Attributes:
      saves: whether `save` wants the state.
    """

    saves = False

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Return state and meta to go on from, None to begin; `like` holds the shapes of the state."""
        del like
        return None

    def stop_requested(self, step: int) -> int | None:
        """Return the signal to stop for after `step`, or None."""
        del step
        return None

    def interrupted(self) -> int | None:
        """Return the signal to stop for as soon as possible, within an evaluation too, or None."""
        return None

    def checkpoint_due(self, step: int) -> bool:
        """Return whether `step` is to be saved although no epoch ends there."""
        del step
        return False

    def step(self, step: int, row: dict[str, float], waited: float) -> None:
        """See the figures of a step, and the seconds that it waited for data."""

    def log(self, row: dict[str, Any]) -> None:
        """See the means since the last such row."""

    def diagnose(self, step: int, figures: dict[str, dict[str, Any]]) -> None:
        """See the figures of every whitened layer."""

    def epoch(self, row: dict[str, Any]) -> None:
        """See the figures of an epoch and its evaluation."""

    def save(self, step: int, state: Any, meta: dict[str, Any], row: dict[str, Any] | None) -> None:
        """Save a state in NumPy; `row` is that of the epoch that ends there."""

    def finish(self, variables: Any) -> None:
        """Leave what a finished run leaves, of its variables in NumPy."""
