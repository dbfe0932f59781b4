"""Cluster files, `configs/clusters/NAME.yaml`: what a machine or a Slurm cluster has, and how jobs are started on it.

What a stage needs stands in the recipe; where it gets it stands here. No key is part of a stage's identity.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from cordee import config, recipe, yaml12
from cordee.config import AccelerateConfig, Config
from cordee.errors import UserError, nearest
from cordee.resources import Resources, require_time, seconds

FOLDER = Path("configs/clusters")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise ValueError("must be one line")
    return text


def _option(text: str) -> str:
    """What stands where no shell expands a variable: in an #SBATCH line, on srun's command line, in quotes."""
    if "$" in _one_line(text) or "`" in text:
        raise ValueError(f"{text!r} holds a shell variable, which nothing would expand")
    return text


Line = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]
Option = Annotated[str, Field(min_length=1), AfterValidator(_option)]


class Container(Config):
    """What a job's processes run in."""

    kind: Literal["pyxis", "apptainer", "edf"]
    """`pyxis`: srun's `--container-image` (with enroot); `apptainer`: `apptainer exec`; `edf`: srun's `--environment`,
    as the container engine of Alps has it."""
    image: Option
    """The image, or of `edf` the environment file; a path is absolute."""
    mounts: list[Option] = Field(default_factory=list)
    """Folders to mount, as `FROM:TO`; the current folder is mounted anyway. Those of `edf` stand in its file."""
    python: Option = "python3"
    """The Python in it that has Cordée."""

    def options(self, folder: Path) -> list[str]:
        """Those of srun."""
        if self.kind == "edf":
            return [f"--environment={self.image}"]
        if self.kind == "apptainer":
            return []
        mounts = ",".join([f"{folder}:{folder}", *self.mounts])
        return [f"--container-image={self.image}", f"--container-mounts={mounts}", f"--container-workdir={folder}"]

    def prefix(self, folder: Path, *, with_gpus: bool) -> list[str]:
        """What stands before the command that it runs."""
        if self.kind != "apptainer":
            return []
        binds = [word for mount in (f"{folder}:{folder}", *self.mounts) for word in ("--bind", mount)]
        return ["apptainer", "exec", *(["--nv"] if with_gpus else []), *binds, "--pwd", str(folder), self.image]


@dataclass(frozen=True)
class Needs:
    """What a stage takes of a cluster: so many nodes, and of each of them so much."""

    nodes: int
    gpus: int
    cores: int | None
    """None: what the cluster gives."""
    memory_gb: float | None
    time: str


class Cluster(Config):
    """A machine, or a Slurm cluster; each key has its meaning below it."""

    kind: Literal["local", "slurm"]
    """`local`: stages are processes of this machine. `slurm`: each stage is a batch job."""
    account: Option | None = None
    """sbatch's `--account`."""
    partition: Option | None = None
    """sbatch's `--partition`; several with commas between."""
    qos: Option | None = None
    """sbatch's `--qos`."""
    gpus_per_node: int = Field(default=0, ge=0)
    """0: the nodes have none."""
    cores_per_node: int | None = Field(default=None, ge=1)
    """What a stage gets that takes a whole node; with fewer GPUs it gets their share."""
    memory_gb_per_node: float | None = Field(default=None, gt=0)
    """Likewise, in GB (1e9 bytes)."""
    processes_per_node: int | None = Field(default=None, ge=1)
    """Processes of a training on one node; left out: one for each GPU, and without GPUs all of them."""
    time_limit: str = "24:00:00"
    """Of a job, `HH:MM:SS` or `D-HH:MM:SS`, where the stage's `resources` say no other."""
    save_before_s: int = Field(default=300, ge=2)
    """Seconds before the time limit at which a stage saves and ends; its job is then requeued and continues."""
    modules: list[Line] = Field(default_factory=list)
    """Environment modules to load."""
    setup: list[Line] = Field(default_factory=list)
    """Lines of shell that a job runs before its command, such as `source venv/bin/activate`."""
    container: Container | None = None
    """What processes run in; left out: none."""
    python: Option | None = None
    """The Python that has Cordée, outside a container; left out: the one that submits."""
    environment: dict[str, Option] = Field(default_factory=dict)
    """Variables of a job and its processes, as they stand: NCCL's, libfabric's. One that a shell has to work out is
    for `setup`, as `export NAME=…`."""
    runs: Line | None = None
    """The folder of the artifacts, where `--runs` says no other; variables of the shell that submits are expanded."""
    cache: Line | None = None
    """The folder for compiled code and other caches (default: beside the artifacts); expanded likewise."""
    precision: Literal["float32", "bfloat16"] | None = None
    """What a recipe's `precision: auto` means on the nodes; left out: what it means where the recipe is read."""
    engine: Literal["vllm", "transformers"] | None = None
    """What `engine: auto` means on the nodes, likewise."""
    options: list[Option] = Field(default_factory=list)
    """Further options of sbatch, such as `--constraint=gpu`."""
    srun: list[Option] = Field(default_factory=list)
    """Further options of srun, such as `--cpu-bind=ldoms` and `--mem-bind=local`."""
    template: str | None = None
    """A jinja2 template of the job script, in place of Cordée's own."""

    @field_validator("time_limit")
    @classmethod
    def _is_time(cls, text: str) -> str:
        return require_time(text, "time_limit")

    @field_validator("environment")
    @classmethod
    def _has_names(cls, values: dict[str, str]) -> dict[str, str]:
        for name in values:
            if not _VARIABLE.fullmatch(name):
                raise UserError(f"{name!r} is no name of a variable", key="environment")
        return values

    @field_validator("template")
    @classmethod
    def _is_there(cls, name: str | None) -> str | None:
        if name is not None and not Path(name).is_file():
            raise UserError(f"no file {name!r}", key="template", hint=f"looked in {Path.cwd()}")
        return name

    def variables(self) -> dict[str, str]:
        """What is set in the environment of jobs and of whoever reads a recipe for this cluster."""
        meant = {config.PRECISION: self.precision, config.ENGINE: self.engine}
        return {**self.environment, **{name: value for name, value in meant.items() if value}}

    def needs(self, stage: Config, told: Resources, place: tuple[object, str]) -> Needs:
        """The nodes that a stage gets, and what of each.

        Args:
            stage: its keys.
            told: its `resources`.
            place: its recipe's file, and its own key there.

        Raises:
            UserError: it asks for what no node has, or its processes can't be divided among nodes.
        """
        file, key = place
        processes = stage.processes if isinstance(stage, AccelerateConfig) else 1
        each = self.processes_per_node or self.gpus_per_node or processes
        nodes = math.ceil(processes / each) if self.kind == "slurm" else 1
        if processes % nodes:
            hint = f"{processes - processes % nodes} would do"
            problem = f"{processes} processes can't be divided among {nodes} nodes of {each}"
            raise UserError(problem, file=file, key=f"{key}.launch.num_processes", hint=hint)
        asked = told.gpus if told.gpus is not None else stage.num_gpus() if self.gpus_per_node else 0
        gpus = math.ceil(asked / nodes)
        if self.kind == "slurm":
            self._require(gpus, told, file, key)
        time = told.time or self.time_limit
        if self.kind == "slurm" and seconds(time) <= self.save_before_s:
            hint = f"more than save_before_s of the cluster file, {self.save_before_s} s"
            raise UserError(f"{time} is no time to work in", file=file, key=f"{key}.resources.time", hint=hint)
        share = gpus / self.gpus_per_node if gpus and self.gpus_per_node else 1.0
        cores = told.cores or (self.cores_per_node and max(1, math.floor(self.cores_per_node * share)))
        memory = told.memory_gb or (self.memory_gb_per_node and self.memory_gb_per_node * share)
        return Needs(nodes, gpus, cores, memory, time)

    def _require(self, gpus: int, told: Resources, file: object, key: str) -> None:
        """Check that a node has what a stage asks of each."""
        has = {
            "gpus": (gpus, self.gpus_per_node),
            "cores": (told.cores or 0, self.cores_per_node or math.inf),
            "memory_gb": (told.memory_gb or 0, self.memory_gb_per_node or math.inf),
        }
        for name, (asked, there) in has.items():
            if asked > there:
                problem = f"{asked:g} are asked of each node, which has {there:g}"
                raise UserError(problem, file=file, key=f"{key}.resources.{name}")


HERE = Cluster(kind="local")
"""This machine, where no cluster file was named."""


def load(name: str, folder: Path = FOLDER) -> Cluster:
    """Read a cluster file by its name, or by its path.

    Raises:
        UserError: there is none, or anything in it is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in folder.glob("*.yaml")]
        hint = nearest(name, known) if known else f"looked in {folder.absolute()}; a path to a file is taken as well"
        raise UserError(f"no cluster file {str(path)!r}", key="--cluster", hint=hint)
    document = yaml12.read(path)
    recipe.require_no_credential(document, path, "")
    return recipe.validate(Cluster, document, path, "")


def expanded(path: str, environment: Mapping[str, str] = os.environ) -> Path:
    """A storage path with the variables of the environment in it.

    Raises:
        UserError: one is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in environment:
            raise UserError(f"{path!r}: ${name} is not set here", key="--cluster")
        return environment[name]

    return Path(re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, path))
