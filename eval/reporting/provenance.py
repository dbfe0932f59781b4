"""Sources, software and machines behind a report, and the limits of what it shows."""

import json
import re
from typing import Any

from cordee import units
from cordee.manifest import named
from eval.reporting.records import Record


def collect(records: list[Record], missing: list[str], licences: dict[str, int]) -> dict[str, Any]:
    """Sources, software and machines of all artifacts; `licences`: documents of the corpus per licence."""
    versions: dict[str, list[str]] = {}
    for record in records:
        for name, version in [*record.manifest.packages.items(), ("python", record.manifest.python),
                              ("cordee", record.manifest.cordee)]:  # fmt: skip
            if version and version not in versions.setdefault(name, []):
                versions[name].append(version)
    sources = {
        (source.file, source.sha256): {"file": source.file, "sha256": source.sha256, "stage": record.manifest.stage}
        for record in records
        for source in record.manifest.inputs
        if source.file
    }
    hosts = {record.manifest.host.model_dump_json(): record.manifest.host.model_dump() for record in records}
    commits = {(git.commit, git.dirty): git.model_dump() for record in records if (git := record.manifest.git)}
    return {
        "recipe": listing(records),
        "artifacts": [
            {
                "artifact": record.name,
                "fingerprint": record.manifest.fingerprint,
                "files": len(record.manifest.files),
                "bytes": sum(item.bytes for item in record.manifest.files),
                "started": record.manifest.started,
            }
            for record in records
        ],
        "missing": missing,
        "sources": list(sources.values()),
        "licences": licences,
        "hosts": list(hosts.values()),
        "packages": dict(sorted(versions.items())),
        "git": list(commits.values()),
        "without_git": [record.name for record in records if not record.manifest.git],
    }


def listing(records: list[Record]) -> str:
    """The resolved settings of every stage as YAML; inputs are shown by the name of their artifact or file."""
    lines = []
    for record in records:
        manifest = record.manifest
        lines += [
            f"{manifest.stage}:",
            f"  uses: {manifest.uses}",
            f"  seed: {json.dumps(manifest.identity.get('seed'))}",
        ]
        settings = {**manifest.identity.get("config", {}), **manifest.execution}
        lines += [f"  {line}" for line in (_yaml(settings, manifest.names()) if settings else [])]
    return "\n".join(lines)


_PLAIN_KEY = re.compile(r"[A-Za-z_][\w.-]*")


def _yaml(value: Any, names: dict[str, str]) -> list[str]:
    """A JSON value as lines of YAML; `names` maps fingerprints to artifacts and files."""
    if isinstance(value, dict) and value:
        pairs = [(key if _PLAIN_KEY.fullmatch(key) else json.dumps(key), item) for key, item in value.items()]
        return [line for key, item in pairs for line in _entry(f"{key}:", _yaml(item, names), _nests(item))]
    if isinstance(value, list) and value:
        return [line for item in value for line in _dashed(_yaml(item, names))]
    if (name := named(value, names)) is not None:
        return [name]
    return [json.dumps(value, ensure_ascii=False)]


def _nests(value: Any) -> bool:
    return isinstance(value, dict | list) and bool(value)


def _entry(key: str, lines: list[str], nests: bool) -> list[str]:
    return [key, *(f"  {line}" for line in lines)] if nests else [f"{key} {lines[0]}"]


def _dashed(lines: list[str]) -> list[str]:
    return [f"- {lines[0]}", *(f"  {line}" for line in lines[1:])]


def limits(records: list[Record], figures: dict[str, Any]) -> list[str]:
    """The limits of the report, as far as the artifacts tell them."""
    found = []
    metrics = [record.manifest.metrics for record in records]
    parameters = max((m["parameters"] for m in metrics if m.get("parameters")), default=None)
    if parameters and parameters < 1e9:
        found.append(
            f"The largest model here has {units.count(parameters)} parameters. Its scores do not predict those of a "
            "model of practical size; they show that the pipeline works and what it costs."
        )
    if figures["benchmarks"]:
        tasks = ", ".join(dict.fromkeys(table["task"] for table in figures["benchmarks"]))
        found.append(f"Only these tasks were measured: {tasks}.")
        found.append(
            "Standard errors treat documents as independent samples. Translations of one text are not independent, "
            "so the true uncertainty is larger than stated."
        )
        if any(
            row["change"] and not row["change"]["paired"] for table in figures["benchmarks"] for row in table["rows"]
        ):
            found.append(
                "Some changes could not be paired by document; their standard errors, where known, are larger than "
                "those of paired changes."
            )
    seeds = {record.manifest.identity.get("seed") for record in records}
    if len(seeds) == 1:
        found.append(f"All stages used one seed ({seeds.pop()}); the variance between seeds is not known.")
    if figures["provenance"]["missing"]:
        found.append(f"Missing or damaged, and therefore not shown: {', '.join(figures['provenance']['missing'])}.")
    if any(git["dirty"] for git in figures["provenance"]["git"]):
        found.append("The code had uncommitted changes: the commit alone does not reproduce it.")
    if not figures["certificates"]:
        found.append("No certificates are listed: nothing was verified beyond the hashes of the files.")
    return found
