"""Which models a stage asks, and in which engine: the keys that generation and benchmarks share."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cordee import machine
from cordee.config import Config, Engine
from cordee.errors import UserError
from cordee.model_folder import ModelInput
from cordee.stage import Context

if TYPE_CHECKING:
    from cordee.compute.engine import Settings


class ModelsConfig(Config):
    """Base of the stages that ask several models the same."""

    models: dict[str, ModelInput] = Field(min_length=1)
    """Checkpoints and LoRA adapters by name, in the order in which they were trained. An adapter is measured on its
    base, which its `adapter_config.json` names, without being merged. Models of different shapes have a vLLM each, one
    after the other."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest request with its answer, in tokens: a longer one is an error, never cut; without it, all positions of the
    model. Only documents that a task scores whole may be longer: they are read in windows of this length."""
    engine: Engine = "auto"
    """`auto` takes vLLM where it is installed; which one answered stands beside the results."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What is computed in. `auto`, as the `lm_eval` command has it: each model's stored dtype, but bfloat16 where vLLM
    is given float32; it stands beside the results."""
    enforce_eager: bool = False
    """Whether vLLM runs without compiling: it starts sooner, generates more slowly, and log-probabilities move a
    little."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share one model in vLLM, where it is too large for one; log-probabilities move a little."""

    def num_gpus(self) -> int:
        """Those that one model is divided among."""
        return self.tensor_parallel_size

    def settings(self, context: Context) -> "Settings":
        """The engine's settings, once the models are known to be such as it can serve.

        Raises:
            UserError: a model is none, or vLLM is not installed or does not serve an adapter of its kind; or there are
                fewer GPUs than one model is to be divided among.
        """
        from cordee.compute import adapter, serving
        from cordee.compute.engine import Settings

        if self.tensor_parallel_size > 1 and self.engine == "transformers":
            raise UserError("is for vLLM", key="tensor_parallel_size", hint="engine: vllm")
        if self.tensor_parallel_size > max(1, gpus := len(machine.gpus())):
            raise UserError(
                f"{self.tensor_parallel_size} GPUs are asked for, and this machine has {gpus}",
                key="tensor_parallel_size",
            )
        settings = Settings(self.engine, self.max_length, self.dtype, self.enforce_eager, self.tensor_parallel_size)
        serving.require_served(self.models, settings)
        if self.engine == "transformers":
            context.note("vLLM is not used: transformers computes")
        if self.engine == "vllm" and self.dtype in ("auto", "bfloat16") and machine.fast_precision() != "bfloat16":
            context.note("this machine computes bfloat16 many times slower than float32; `dtype: float32` avoids it")
        for name, folder in self.models.items():
            if remark := adapter.remark(folder):
                context.note(f"{name}: {remark}")
        return settings
