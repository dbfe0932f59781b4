"""Runs a package's proof on a user's own recipe: `cordee prove RECIPE masks`.

A proof is a stage, `<package>/prove_<name>.py`, whose module names in `PROVES` the stages that it examines. Of the keys
of such a stage, its `Config` gets those that it has too; its key `artifact`, if it has one, is the stage's artifact.
Its key `conditions` is what else a certificate holds for: the proof is made anew when that changes. It publishes
`certificate.json`, which the report shows.
"""

import ast
import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee import files, identity, machine, plan, provenance, recipe, stage
from cordee.artifact import Store
from cordee.errors import UserError, nearest
from cordee.recipe import Recipe


@dataclass(frozen=True)
class Proof:
    """A proof that a package holds."""

    name: str
    uses: str
    proves: str
    """The module of the stages that it examines."""


def find() -> dict[str, Proof]:
    """The proofs of all packages by name, read from the source."""
    found = {}
    for package in stage.STAGE_PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).glob("prove_*.py")):
                name = path.stem.removeprefix("prove_")
                found[name] = Proof(name, f"{package}.{path.stem}", _constant(path, "PROVES"))
    return found


def _constant(path: Path, name: str) -> str:
    """The value of a module's constant."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return str(ast.literal_eval(node.value))
    raise TypeError(f"{path} holds no {name}")


def sort(of: Recipe) -> tuple[list[Proof], list[Proof]]:
    """The proofs that apply to a stage of this recipe, and the others.

    Raises:
        UserError: none does.
    """
    used = {item.stage.uses for item in of.stages}
    proofs = [proof for _, proof in sorted(find().items())]
    apply, others = [one for one in proofs if one.proves in used], [one for one in proofs if one.proves not in used]
    if not apply:
        known = ", ".join(proof.proves for proof in others)
        raise UserError(
            "has no stage that a proof applies to", file=of.file, key="stages", hint=f"they apply to {known}"
        )
    return apply, others


def plans(of: Recipe, store: Store, name: str) -> list[tuple[plan.Plan, str]]:
    """For each stage that a proof applies to: the recipe up to it with the proof as last stage, and its fingerprint.

    Raises:
        UserError: there is no such proof, or the recipe has no stage that it applies to.
    """
    proofs = find()
    if name not in proofs:
        raise UserError(f"no proof {name!r}", hint=nearest(name, proofs))
    proof = proofs[name]
    proven = [item for item in of.stages if item.stage.uses == proof.proves]
    if not proven:
        raise UserError(f"has no stage that uses {proof.proves}, which {name!r} applies to", file=of.file, key="stages")
    whole = plan.make(of, store)
    stages = [whole.stage(item.name) for item in proven]
    return [(_with_proof(of, store, proof, planned), planned.fingerprint) for planned in stages]


def _with_proof(of: Recipe, store: Store, proof: Proof, planned: plan.Planned) -> plan.Plan:
    """The plan of what one proof needs, and the proof."""
    document: dict[str, Any] = copy.deepcopy(of.document)
    keys, item = stage.load(proof.uses).config.model_fields, planned.item
    values = {key: value for key, value in document["stages"][item.name].items() if key in keys}
    values["conditions"] = _conditions(planned)
    needed = _ancestors(of, item)
    if "artifact" in keys:
        values["artifact"] = f"${item.name}"
        needed.add(item.name)
    document["stages"] = {name: document["stages"][name] for name in document["stages"] if name in needed}
    document["stages"][f"prove-{proof.name}-{item.name}"] = {"uses": proof.uses, **values}
    return plan.make(recipe.check(document, of.file), store)


def _conditions(planned: plan.Planned) -> dict[str, Any]:
    """What a certificate of a stage holds for, besides the keys that change the stage's result.

    Of the machine, what decides which kernels compute: models of processor and GPU, and packages; not its name, since
    the nodes of a cluster are alike.
    """
    launch = getattr(planned.config, "launch", None)
    return {
        "version": planned.item.stage.version,
        "execution": identity.execution(planned.config),
        **({"config_file": files.sha256(Path(launch.config_file))} if launch and launch.config_file else {}),
        "cpu": machine.cpu(),
        "gpu": machine.gpu() if machine.has_gpu() else None,
        "packages": provenance.packages(),
    }


def _ancestors(of: Recipe, item: recipe.RecipeStage) -> set[str]:
    """The stages that a stage needs, directly or through others."""
    by_name = {other.name: other for other in of.stages}
    found: set[str] = set()
    waiting = list(item.needs)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += by_name[name].needs
    return found
