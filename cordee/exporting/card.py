"""The model card: front matter as the hub reads it, and what a reader needs to know, each figure from an artifact."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from cordee import __version__, files, model_folder, units
from cordee.artifact import Artifact
from cordee.exporting import origin
from cordee.exporting.origin import Origin
from cordee.exporting.results import Result

METHODS = {
    "pretrain.train": "pretraining",
    "posttrain.sft": "supervised fine-tuning (SFT)",
    "posttrain.dpo": "direct preference optimization (DPO)",
    "posttrain.kto": "Kahneman-Tversky optimization (KTO)",
    "posttrain.orpo": "odds-ratio preference optimization (ORPO)",
    "posttrain.cpo": "contrastive preference optimization (CPO)",
    "posttrain.qrpo": "quantile reward policy optimization (QRPO)",
    "posttrain.merge": "merging the adapter into its base",
}
TAGS = {
    "pretrain.train": "pretraining",
    **{f"posttrain.{method}": method for method in ("sft", "dpo", "kto", "orpo", "cpo", "qrpo")},
}
SHOWN_LANGUAGES = 12
_BREAKS = re.compile(r"\s*[\r\n\v\f\x85\u2028\u2029]\s*")
_SIGNS = re.compile(r"([\\`*_\[\]<>|#~$&])")


class Ready(str):
    """Markdown, as opposed to a text from data."""

    __slots__ = ()


@dataclass(frozen=True)
class Card:
    """All that a card is made of."""

    name: str
    folder: Path
    """Of the model or the adapter."""
    origin: Origin
    results: list[Result]
    unread: list[str]
    """Benchmarks that can't be read, a line each."""
    hashes: dict[str, str]
    """The SHA-256 of each exported file."""
    licence: str | None
    """As the hub spells it; None: not given."""
    base: str | None
    """What the hub calls the model that this one was made from, if that is known."""
    gguf: bool

    def text(self) -> str:
        """The README.md."""
        loader = jinja2.PackageLoader("cordee", "exporting")
        environment = jinja2.Environment(  # noqa: S701 - Markdown: `finalize` escapes
            loader=loader, undefined=jinja2.StrictUndefined, finalize=_escaped, trim_blocks=True, lstrip_blocks=True,
            keep_trailing_newline=True,
        )  # fmt: skip
        environment.filters |= {
            "code": code, "indented": indented, "count": units.count, "duration": units.duration, "size": units.size,
            "json": lambda value: Ready(json.dumps(value, ensure_ascii=False)), "ready": Ready,
        }  # fmt: skip
        header = yaml.safe_dump(self.front_matter(), sort_keys=False, allow_unicode=True, width=1000)
        body = environment.get_template("card.md.jinja").render(card=self, **self._facts())
        return f"---\n{header}---\n\n{body}"

    @property
    def is_adapter(self) -> bool:
        """Whether it is no model of its own."""
        return model_folder.is_adapter(self.folder)

    @property
    def has_template(self) -> bool:
        """Whether its tokenizer has a chat template."""
        return model_folder.chat_template(model_folder.tokenizer_of(self.folder)) is not None

    def front_matter(self) -> dict[str, Any]:
        """What the hub reads: https://huggingface.co/docs/hub/model-cards, without what is not known."""
        uses = [stage.manifest.uses for stage in self.origin.stages]
        tags = ["cordee", *dict.fromkeys(TAGS[one] for one in uses if one in TAGS)]
        tags += ["lora"] * any(map(_lora, self.origin.stages)) + ["gguf"] * self.gguf
        datasets = dict.fromkeys(source.hub for source in self.origin.data if source.hub)
        found = {
            "license": self.licence or "unknown",
            "language": self.origin.languages,
            "base_model": self.base,
            "base_model_relation": self.base and ("adapter" if self.is_adapter else "finetune"),
            "datasets": list(datasets),
            "library_name": "peft" if self.is_adapter else "transformers",
            "pipeline_tag": "text-generation",
            "tags": tags,
            "model-index": self._model_index(),
        }
        return {key: value for key, value in found.items() if value}

    def lacks(self) -> list[str]:
        """What is not known and can be given on the command line, or measured."""
        found = [] if self.licence else ["a licence (--license)"]
        if not self.base and (self.is_adapter or self.origin.bases):
            found.append("the base model's name on the hub (--base-model)")
        return found + ([] if self.results else ["figures: no benchmark in the store measured these weights"])

    def _model_index(self) -> list[dict[str, Any]]:
        """The figures, each with the settings that it was measured with."""
        groups: dict[tuple[str, str, str], list[Result]] = {}
        for one in self.results:
            groups.setdefault((one.artifact, one.task, one.asked), []).append(one)
        results = [
            {
                "task": {"type": "text-generation", "name": "Text generation"},
                "dataset": {"name": f"{task} ({asked})", "type": task, **own[0].dataset,
                            "args": _known(num_few_shot=own[0].shots, task_version=own[0].version)},
                "metrics": [
                    {"type": one.metric, "value": one.value,
                     "name": one.metric if one.filter == "none" else f"{one.metric}, {one.filter}",
                     "args": _known(standard_error=one.standard_error, documents=one.documents, engine=one.engine)}
                    for one in own
                ],
            }
            for (_, task, asked), own in groups.items()
        ]  # fmt: skip
        return [{"name": self.name, "results": results}] if results else []

    def _facts(self) -> dict[str, Any]:
        """What the template shows."""
        base = self.folder
        if self.is_adapter:
            base = model_folder.recorded_base(self.folder) or self.folder
        config = files.read_json(base / "config.json") if (base / "config.json").is_file() else {}
        made_by = self.origin.made_by
        return {
            "config": config,
            "architecture": ", ".join(config.get("architectures") or []) or "unknown",
            "shape": model_folder.shape(config),
            "lora": files.read_json(self.folder / model_folder.ADAPTER_CONFIG) if self.is_adapter else {},
            "stages": [_stage(stage) for stage in self.origin.stages],
            "rows": [row for stage in self.origin.stages for row in origin.read_rows(stage)],
            "place": self.folder.resolve().relative_to(made_by.path.resolve()).as_posix() if made_by else "",
            "last": made_by.manifest if made_by else None,
            "weights": {name: sha for name, sha in self.hashes.items() if name.endswith(".safetensors")},
            "seeds": sorted({str(stage.manifest.identity.get("seed")) for stage in self.origin.stages}),
            "dirty": [stage.name for stage in self.origin.stages if not (git := stage.manifest.git) or git.dirty],
            "tasks": list(dict.fromkeys(result.task for result in self.results)),
            "version": __version__,
            "base": self._base(),
            "base_licence": next((one.licence for one in self.origin.bases if one.licence), None) or self._no_licence(),
            "languages": _listed(self.origin.languages) or "unknown",
        }

    def _base(self) -> str:
        """The base model in a few words, as Markdown."""
        if self.base:
            return Ready(f"[{_escaped(self.base)}](https://huggingface.co/{self.base})")
        if self.is_adapter and (below := [one for one in self.origin.stages if one != self.origin.made_by]):
            return Ready(f"the model of the artifact {code(below[-1].name)}, whose name on the hub is not known")
        if self.origin.bases:
            one = self.origin.bases[0]
            return Ready(f"{code(one.name)} (SHA-256 {code(one.sha256[:16])}), whose name on the hub is not known")
        return "none: trained from the start" if self.origin.stages else "unknown"

    def _no_licence(self) -> str:
        return (
            "no base model" if self.origin.stages and not self.origin.bases and not self.is_adapter else "not recorded"
        )


def _stage(made: Artifact) -> dict[str, Any]:
    """A stage as the procedure shows it."""
    told = made.manifest
    method = METHODS.get(told.uses, told.uses)
    return {
        "name": made.name,
        "method": f"{method}, LoRA" if _lora(made) else method,
        "uses": told.uses,
        "settings": origin.settings(made),
        "steps": told.metrics.get("steps") or told.identity.get("config", {}).get("max_steps"),
        "tokens": told.metrics.get("tokens") if "loss" in told.metrics else None,  # else of a check
        "loss": told.metrics.get("loss"),
        "seconds": told.seconds,
        "hardware": told.host.gpu or f"{told.host.cpu}, {told.host.cores} cores",
        "packages": told.packages,
        "started": told.started[:10],
    }


def _lora(made: Artifact) -> bool:
    return bool(made.manifest.identity.get("config", {}).get("lora"))


def _listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - SHOWN_LANGUAGES
    return ", ".join(names[:SHOWN_LANGUAGES]) + (f" and {more} more" if more > 0 else "")


def _known(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _escaped(value: Any) -> Any:
    """A text from data as Markdown that shows it: in one line, its signs without their meaning."""
    if isinstance(value, Ready) or not isinstance(value, str):
        return value
    return _SIGNS.sub(r"\\\1", _BREAKS.sub(" ", value))


def code(value: object) -> Ready:
    """A text as inline code, also within a table."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Ready(f"{fence} {text} {fence}" if "`" in text else f"`{text}`")


def indented(text: str) -> Ready:
    """Lines as a block of code."""
    return Ready("\n".join(f"    {line}" for line in text.splitlines()))
