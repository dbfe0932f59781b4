"""Base of every stage's `Config`: frozen, typed fields, each with its meaning below it.

Marks carry the meaning that a plan needs:

- `Input`: a reference (`$sft`, `$base/checkpoints/500`, `quickstart/base@1`) or a path. What it points to is
  part of the stage's identity by its fingerprint or its content, never by its name or place.
- `Execution[T]`: says only how to execute (processes, micro-batch, logging); no part of the identity.
- `FunctionOf("pretrain.training.losses")`: the name of a function of that module, read from its source.
- `Library("trl.SFTConfig", owned=...)`: a mapping that is handed through to a library's own dataclass and
  checked against the fields of the installed version; `owned` names those that the stage sets itself, each with the
  key to write instead.
- `Precision`, `Engine`: `auto` becomes what this machine computes with when the config is read, so that two machines
  that compute differently have two identities.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from cordee import machine, peek, yaml12
from cordee.errors import UserError, nearest


class Input(PosixPath):
    """A reference to an artifact, or a path; by the time a stage runs it is an absolute path that exists."""

    def further_files(self) -> list[Path]:
        """Files that are read because this one names them; a kind of file that does so has a class of its own."""
        return []

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls,
            core_schema.union_schema([core_schema.is_instance_schema(cls), core_schema.str_schema(min_length=1)]),
            serialization=core_schema.plain_serializer_function_ser_schema(str),
        )


class ExecutionMark:
    """Marks a field as execution only."""


T = TypeVar("T")
Execution = Annotated[T, ExecutionMark()]


PRECISION, ENGINE = "CORDEE_PRECISION", "CORDEE_ENGINE"
"""In the environment: what `auto` means, where the machine that plans is not one of those that compute."""


def _precision(asked: str) -> str:
    return (os.environ.get(PRECISION) or machine.fast_precision()) if asked == "auto" else asked


def _engine(asked: str) -> str:
    here = os.environ.get(ENGINE) or ("vllm" if peek.is_installed("vllm") else "transformers")
    return asked if asked != "auto" else here


Precision = Annotated[Literal["auto", "float32", "bfloat16"], AfterValidator(_precision), Field(validate_default=True)]
"""What matrices are multiplied in; `auto`: bfloat16 where the machine computes in it, else float32."""
Engine = Annotated[Literal["auto", "vllm", "transformers"], AfterValidator(_engine), Field(validate_default=True)]
"""What generates and scores; `auto`: vLLM where it is installed."""


@dataclass(frozen=True)
class Library:
    """Names the dataclass (`package.Class`) whose fields a mapping may hold, less those that the stage owns."""

    dataclass_name: str
    owned: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class FunctionOf:
    """Marks a text field that names a public function of a module; the names are read from the module's source."""

    module: str

    def names(self) -> list[str]:
        """What the field may hold."""
        return peek.functions(self.module)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str, info: core_schema.ValidationInfo[Any]) -> str:
        if value not in (names := self.names()):
            raise UserError(f"no {info.field_name} {value!r}", key=info.field_name or "", hint=nearest(value, names))
        return value


class Config(BaseModel):
    """Base of every stage's `Config` and of the mappings nested in it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )

    def num_gpus(self) -> int:
        """How many GPUs a stage with these keys computes on, where there are any; 0: it computes without torch."""
        return 0


class Launch(Config):
    """How `accelerate launch` starts a training stage."""

    num_processes: int = Field(default=1, ge=1)
    """Processes over all machines, one per device."""
    config_file: str | None = None
    """An accelerate configuration (FSDP, several machines); `num_processes` above still holds."""

    @field_validator("config_file")
    @classmethod
    def _can_be_read(cls, name: str | None) -> str | None:
        """Check that the file is YAML with a mapping; accelerate would end in a stack trace."""
        file = Path(name) if name is not None else None
        if file and not file.is_file():
            beside = [str(path) for path in file.parent.glob("*.yaml")]
            hint = nearest(str(file), beside) if beside else f"looked in {Path.cwd()}"
            raise UserError(f"no file {name!r}", key="launch.config_file", hint=hint)
        if file:
            yaml12.read(file, key="launch.config_file")
        return name

    def devices(self) -> "Devices":
        """What the training computes on, as its accelerate configuration says it, or with this machine's own."""
        if self.config_file is None:
            return Devices(self.num_processes, are_gpus=machine.has_gpu())
        told = yaml12.read(Path(self.config_file), key="launch.config_file")
        fsdp = told.get("fsdp_config")
        sharding = fsdp if told.get("distributed_type") == "FSDP" and isinstance(fsdp, dict) else {}
        return Devices(
            self.num_processes,
            are_gpus=told.get("use_cpu", not machine.has_gpu()) is False,
            sharded=bool(sharding),
            reshards=sharding.get("fsdp_reshard_after_forward", True) is True,
            checkpoints=sharding.get("fsdp_activation_checkpointing", False) is True,
        )


@dataclass(frozen=True)
class Devices:
    """What a training computes on."""

    count: int
    """One for each process."""
    are_gpus: bool
    sharded: bool = False
    """Whether weights, gradients and moments are divided over them (FSDP)."""
    reshards: bool = True
    """Whether a layer's weights are given back between its forward and its backward pass."""
    checkpoints: bool = False
    """Whether the backward pass computes each layer again."""


class AccelerateConfig(Config):
    """Base of the stages that are started by `accelerate launch`."""

    is_launched: ClassVar[bool] = True
    """False for a stage with the keys of a training that does not train itself, but starts trainings."""
    launch: Execution[Launch] = Launch()
    """Processes and devices; the result is the same, to tolerance, at any of them."""

    @property
    def processes(self) -> int:
        """The processes that its launcher starts."""
        return self.launch.num_processes if self.is_launched else 1

    def num_gpus(self) -> int:
        """One for each process, those of the trainings that it starts included."""
        return self.launch.num_processes


class Keep(Config):
    """Which checkpoints are kept: those of any of these kinds."""

    last: int = Field(default=1, ge=0)
    """The newest ones."""
    every: int | None = Field(default=None, ge=1)
    """Those of steps that this divides."""
    best: int = Field(default=0, ge=0)
    """Those that were best on what is held out: by bits per byte, loss or reward, as measured at `eval_steps`."""


class TrainingConfig(AccelerateConfig):
    """Base of the stages that train: how torch computes, what is published on the way, and what a kill can cost."""

    compile: Execution[Literal["auto", "on", "off"]] = "auto"
    """Whether torch compiles the model; `auto`: where the training is long enough to win the time back."""
    deterministic: bool = True
    """Whether torch may run only algorithms that give the same bits twice; without it no resume is exact."""
    save_steps: int | list[int] = Field(default_factory=list)
    """Steps whose model or adapter is published under `checkpoints/<step>/`, from 1 to the last: a list, or an
    interval."""
    keep_checkpoints: Execution[Keep | None] = None
    """Which of these are kept; left out: all."""
    resume_steps: Execution[int] = Field(default=100, ge=1)
    """Steps from one resume point to the next: what a kill can cost."""
    eval_steps: int = Field(default=0, ge=0)
    """Steps between two measurements of held-out data; 0: only at the end."""
    report_to: Execution[list[str]] = Field(default_factory=list)
    """Trackers of accelerate that are used too, such as `tensorboard`; their files go to `logs/`."""

    @model_validator(mode="before")
    @classmethod
    def _fitting_batch(cls, given: Any) -> Any:
        """Without `per_device_train_batch_size`, the largest one up to its default that divides a global batch."""
        name, fields = "per_device_train_batch_size", cls.model_fields
        if not isinstance(given, dict) or name in given or name not in fields:
            return given
        launch, rows = given.get("launch", {}), given.get("global_batch_size", fields["global_batch_size"].default)
        processes = launch.get("num_processes", 1) if isinstance(launch, dict) else getattr(launch, "num_processes", 1)
        if not all(isinstance(number, int) and number > 0 for number in (rows, processes)) or rows % processes:
            return given
        each = rows // processes
        fits = next(size for size in range(min(fields[name].default, each), 0, -1) if each % size == 0)
        return {**given, name: fits}

    def saves_at(self, step: int) -> bool:
        """Whether the model is published at this step."""
        return step % self.save_steps == 0 if isinstance(self.save_steps, int) else step in self.save_steps

    def require_steps(self, last: int | None) -> None:
        """Check `save_steps` against the number of steps, where it is known.

        Raises:
            UserError: the training has no such step.
        """
        for step in [self.save_steps] if isinstance(self.save_steps, int) else self.save_steps:
            if step < 1 or (last is not None and step > last):
                known = "" if last is None else f", {last}"
                raise UserError(f"{step} is not from 1 to the last step{known}", key="save_steps")
        if self.keep_checkpoints and self.keep_checkpoints.best and not self.eval_steps:
            hint = "set eval_steps to the steps between checkpoints"
            raise UserError("nothing is measured at the checkpoints", key="keep_checkpoints.best", hint=hint)


def require_whole_batches(global_batch_size: int, at_once: int, num_processes: int) -> None:
    """Check that so many processes, each with `at_once` rows, divide a global batch.

    Raises:
        UserError: they don't; the hint names a value that does.
    """
    if global_batch_size % (at_once * num_processes) == 0:
        return
    each, left = divmod(global_batch_size, num_processes)
    if left or not each:
        hint = f"no per_device_train_batch_size does: {num_processes} processes have to divide it"
    else:
        fits = next(rows for rows in range(min(at_once, each), 0, -1) if each % rows == 0)
        hint = f"per_device_train_batch_size={fits} would do"
    processes = f"{num_processes} process{'es' if num_processes > 1 else ''}"
    problem = f"{global_batch_size} rows can't be divided by {at_once} rows in each of {processes}"
    raise UserError(problem, key="global_batch_size", hint=hint)


def is_written(config: Config, name: str) -> bool:
    """Whether a recipe has a key. A config that was dumped (job.json) and is read again has them all: False of each."""
    given = config.model_fields_set
    return name in given and given != type(config).model_fields.keys()


def is_execution(model: type[Config], field: str) -> bool:
    """Whether a field of a config says only how to execute."""
    return any(isinstance(mark, ExecutionMark) for mark in model.model_fields[field].metadata)


def config_in(annotation: Any) -> type[Config] | None:
    """The config class inside an annotation such as `list[Source] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    found = (config_in(item) for item in getattr(annotation, "__args__", ()))
    return next((config for config in found if config), None)


def libraries(model: type[Config]) -> Iterator[tuple[str, Library]]:
    """The fields of a config that are passed to a library: name and mark."""
    for name, field in model.model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, Library):
                yield name, mark


def inputs(value: Any, key: str = "") -> Iterator[tuple[str, Input]]:
    """Every `Input` in a config, with its key's path (`data.0.tokens`)."""
    if isinstance(value, Input):
        yield key, value
    elif isinstance(value, Config):
        for name in type(value).model_fields:
            yield from inputs(getattr(value, name), f"{key}.{name}".lstrip("."))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from inputs(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from inputs(item, f"{key}.{index}".lstrip("."))


def resolved(value: Any, paths: Mapping[str, str], key: str = "") -> Any:
    """A config as JSON, with the path of each input (by its key) in its place."""
    if isinstance(value, Input):
        return paths[key]
    if isinstance(value, Config):
        return {
            name: resolved(getattr(value, name), paths, f"{key}.{name}".lstrip("."))
            for name in type(value).model_fields
        }
    if isinstance(value, dict):
        return {name: resolved(item, paths, f"{key}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(item, paths, f"{key}.{index}".lstrip(".")) for index, item in enumerate(value)]
    return value
