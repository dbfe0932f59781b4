"""What a merge can be told of several adapters or models."""

from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from cordee.config import Config, Execution, Input
from cordee.errors import UserError
from cordee.model_folder import ModelInput

Combination: TypeAlias = Literal[
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
PRUNING = ("ties", "dare", "magnitude")
"""What the names of the combinations begin with that keep a share of the weights alone."""


class Weighted(Config):
    """A model or an adapter, and its weight."""

    path: ModelInput
    """Its folder (`$maths`)."""
    weight: float = 1.0
    """What it is multiplied by. Of models only the weights' proportions count."""


class Combined(Config):
    """How several adapters become one, as `add_weighted_adapter` of PEFT has it."""

    combination: Combination = "cat"
    """`cat` is the exact sum; `svd` the sum cut to a rank; `linear` sums the two matrices of each adapter apart, which
    is near the sum only where the adapters are alike. TIES (arXiv 2306.01708), DARE (arXiv 2311.03099) and pruning by
    magnitude likewise act on the two matrices apart, and on their product with `_svd`."""
    density: float | None = Field(default=None, gt=0, le=1)
    """The share of weights that TIES, DARE and pruning keep; above 0, at most 1."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    """By what TIES takes a sign: the sum of the weights, or how many have it."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of the result of `svd` and `…_svd`; by default the largest of the adapters'."""

    def require_fitting(self) -> None:
        """Check that no key is without effect, and none is missing.

        Raises:
            UserError: one is.
        """
        prunes = self.combination.startswith(PRUNING)
        if prunes and self.density is None:
            hint = "the share of the weights that are kept, such as 0.5"
            raise UserError(f"{self.combination} needs it", key="density", hint=hint)
        if not prunes and self.density is not None:
            raise UserError(f"{self.combination} keeps all weights", key="density", hint="leave it out")
        if self.rank is not None and not self.combination.endswith("svd"):
            hint = "leave it out, or `combination: svd`"
            raise UserError(f"the rank that {self.combination} gives is not chosen", key="rank", hint=hint)


class MergeConfig(Combined):
    """What is merged, and what it is checked on: an adapter, several, or models of one shape."""

    adapter: ModelInput | None = None
    """The LoRA adapter (`$dpo`)."""
    adapters: list[Weighted] = Field(default=[])
    """Several of one base in its place: `[{path: $maths, weight: 0.7}, {path: $code, weight: 0.3}]`, combined as
    `combination` says."""
    models: list[Weighted] = Field(default=[])
    """Models of one shape to average, by their weights or, with `decay`, in their order."""
    checkpoints: Input | None = None
    """A training (`$sft`) in the place of `models`: all that it has published on its way, and its last."""
    decay: float | None = Field(default=None, gt=0, lt=1)
    """Of an exponential moving average over the models in their order: what stays of the average at each; 0 to 1."""
    model: Input | None = None
    """The model that the adapters were trained on (`$sft`); by default the one that the adapter's config names."""
    prompts: Input | None = None
    """Real conversations to compare on, parquet or JSON lines: column `messages`, or `prompt` and `chosen`; by default
    a few texts of many scripts."""
    rows: int = Field(default=32, ge=1)
    """The first so many conversations are scored; at least 1."""
    tolerance: float | None = Field(default=None, gt=0)
    """How far the merged model may be from base and adapter, in nats: of float32 weights the largest difference of a
    token's log-probability (0.001 if not given), of float16 and bfloat16, which round, the mean (0.01, 0.1)."""
    batch_size: Execution[int] = Field(default=8, ge=1)
    """Conversations that are scored at once."""

    def num_gpus(self) -> int:
        """One, for the model and its check."""
        return 1

    @property
    def parts(self) -> list[Weighted]:
        """The adapters."""
        return self.adapters or ([Weighted(path=self.adapter)] if self.adapter is not None else [])

    @model_validator(mode="after")
    def _fits(self) -> Self:
        given = [name for name in ("adapter", "adapters", "models", "checkpoints") if getattr(self, name)]
        if len(given) != 1:
            problem = f"{' and '.join(given)} are given" if given else "nothing is given"
            hint = "one of adapter, adapters, models and checkpoints"
            raise UserError(f"{problem}: what is merged is one of them", key=(given or ["adapter"])[-1], hint=hint)
        for name in ("adapters", "models"):
            if len(getattr(self, name)) == 1:
                raise UserError("holds one, and several are combined", key=name, hint="`adapter:` names a single one")
        if self.decay is not None and given[0] not in ("models", "checkpoints"):
            raise UserError("is for models and checkpoints", key="decay", hint="leave it out")
        if self.decay is not None and any(part.weight != 1.0 for part in self.models):
            raise UserError("gives the models their weights", key="decay", hint="leave out the weights, or decay")
        if given == ["adapters"]:
            self.require_fitting()
        elif told := [name for name in Combined.model_fields if getattr(self, name) != Combined().__dict__[name]]:
            raise UserError("is for several adapters", key=told[0], hint="leave it out")
        if self.model is not None and given[0] in ("models", "checkpoints"):
            raise UserError("is the base of adapters", key="model", hint="leave it out")
        if self.rows != type(self).model_fields["rows"].default and self.prompts is None:
            raise UserError("is for `prompts`", key="rows", hint="leave it out")
        return self
