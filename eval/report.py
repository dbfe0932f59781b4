"""Writes a self-contained HTML page about a recipe's artifacts: stages, curves, benchmarks, samples, provenance.

    python -m eval.report --config FILE

Reads artifacts and nothing else. Writes `index.html` (no network, no scripts) and `report.json` (the same figures).
Needs neither torch nor transformers.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

from pydantic import Field

from cordee import files, units, worker
from cordee.config import Config as BaseConfig
from cordee.config import Input
from cordee.stage import Context

VERSION = 4
PAGES = Path(__file__).parent / "reporting" / "pages"


class Config(BaseConfig):
    """What the report shows."""

    title: str = ""
    """The heading; empty: the recipe's name."""
    artifacts: list[Input] = Field(min_length=1)
    """The artifacts to show, in the order in which they were trained; their inputs are found through manifests."""
    certificates: list[Input] = Field(default=[])
    """Certificates to show."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write the page and its figures.

    Raises:
        Fault: an artifact is damaged, or is not what its manifest says.
    """
    figures = collect(config)
    files.write_json(context.out / "report.json", figures)
    page = render(figures)
    files.write_text(context.out / "index.html", page)
    return {"artifacts": len(figures["provenance"]["artifacts"]), "page_bytes": len(page.encode())}


def collect(config: Config) -> dict[str, Any]:
    """All figures of the report, as JSON.

    Raises:
        Fault: an artifact is damaged, or is not what its manifest says.
    """
    from eval.reporting import alignment, comparison, provenance, records, rollouts, sections

    listed = [records.open_record(path) for path in [*config.artifacts, *config.certificates]]
    everything, missing = records.pipeline(listed)
    with_corpus = [record for record in everything if record.holds("corpus.json")]
    corpus = with_corpus[0].read("corpus.json", records.Corpus) if with_corpus else None
    tables = comparison.benchmarks(listed, everything)
    by_language = comparison.languages(listed, corpus)
    stages = sections.pipeline(everything)
    curves = sections.curves(everything, corpus)
    figures: dict[str, Any] = {
        "title": config.title,
        "recipe": listed[-1].manifest.recipe if listed else "",
        "date": max((record.manifest.started for record in everything), default=""),
        "verdict": sections.verdict(tables, curves),
        "pipeline": stages,
        "goodput": sections.goodput(everything),
        "training_data": sections.training_data(everything),
        "curves": curves,
        "benchmarks": tables,
        "further_metrics": comparison.further(tables),
        "languages": by_language,
        "checkpoints": comparison.checkpoints(tables, by_language),
        "rewards": alignment.collect(everything),
        "samples": sections.samples(listed),
        "completions": rollouts.completions(everything),
        "certificates": sections.certificates(listed),
        "provenance": provenance.collect(everything, missing, corpus.licences if corpus else {}),
    }
    return {**figures, "limits": provenance.limits(everything, figures)}


def render(figures: dict[str, Any]) -> str:
    """The page; its content security policy forbids scripts and external resources."""
    import jinja2
    from markupsafe import Markup

    from eval.reporting import charts

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(units=units, charts=charts)
    style = (PAGES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(**figures, style=Markup(style), style_hash=digest)  # noqa: S704 - our own file


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
