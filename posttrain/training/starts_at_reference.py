"""Before its first update the policy *is* the reference: their divergence and all rewards are 0.

Where they are not, another reference than the model that was asked for is in use (or an adapter that does not start
without effect), and everything after would be measured from there.
"""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cordee.errors import Fault


class StartsAtReference(TrainerCallback):
    """Checks the figures of step 1, which were computed before the first update."""

    def __init__(self, expected: Mapping[str, tuple[float, float]]) -> None:
        """Expect figures.

        Args:
            expected: by name: what a figure has to be, and by how much it may be off.
        """
        self.expected = expected

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the library's signature
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - the library's signature
        logs: Mapping[str, Any],
        **_: Any,
    ) -> None:
        """Compare them.

        Raises:
            Fault: one is another.
        """
        if state.global_step != 1 or "loss" not in logs:
            return
        for name, (value, tolerance) in self.expected.items():
            if name == "loss" and "aux_loss" in logs:  # that of a model's experts is part of it
                continue
            if name in logs and not abs(logs[name] - value) <= tolerance:
                raise Fault(
                    f"before the first update {name} is {logs[name]:.4g} and not {value:.4g}: the model does not start "
                    "as its reference",
                    hint="an adapter has to start without effect (lora.init_lora_weights), and dropout has to be off",
                )
