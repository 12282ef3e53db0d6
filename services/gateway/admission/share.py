"""A limit on what one tenant, or one key, takes of a model's places."""

from __future__ import annotations

from services.mesh.errors import ConcurrencyLimit


class Share:
    """Counts the places that each holder has taken or waits for. Who has none may always take some."""

    def __init__(self, holder: str, share: float) -> None:
        """`holder` is what it is called in an error; a share of 1 limits nothing."""
        self._holder = holder
        self._share = share
        self._taken: dict[tuple[str, str], int] = {}

    def take(self, model: str, name: str, places: int, capacity: int | None) -> None:
        """Raises ConcurrencyLimit."""
        if self._share >= 1:
            return
        taken = self._taken.get((model, name), 0)
        if capacity is not None and taken and taken + places > self._share * capacity:
            raise ConcurrencyLimit(
                f"The {self._holder} has {taken} answers of this model running or waiting, and may have "
                f"{self._share:.0%} of what it can do at once, {capacity}."
            )
        self._taken[model, name] = taken + places

    def give(self, model: str, name: str, places: int) -> None:
        """What was taken."""
        if self._share >= 1:
            return
        left = self._taken[model, name] - places
        if left:
            self._taken[model, name] = left
        else:
            del self._taken[model, name]
