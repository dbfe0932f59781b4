"""A stage's context that asks for a stop."""

from dataclasses import dataclass, field

from cordee.stage import Context


@dataclass(frozen=True)
class StopsAfter(Context):
    """Asks for a stop from the call on that has this number."""

    steps: int = 3
    calls: list[int] = field(default_factory=list)

    def stop_requested(self) -> bool:
        self.calls.append(1)
        return len(self.calls) >= self.steps
