"""Data sets in the hub's layout: the folders that lm-eval's own tasks read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
XCOPA = ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")


def make(folder: Path) -> Path:
    """GSM8K, 24 problems of each split, and XCOPA, three made-up questions in each of its languages."""
    for split in ("train", "test"):
        rows = pq.read_table(ROOT / "data/openai/gsm8k/main" / f"{split}-00000-of-00001.parquet").slice(0, 24)
        _write(folder / "openai" / "gsm8k" / "main", split, rows)
    _readme(folder / "openai" / "gsm8k", ["main"], ("train", "test"))
    for language in XCOPA:
        rows = pa.Table.from_pylist([
            {"premise": f"Number {row} in {language}.", "choice1": "It was one.", "choice2": "It was many.",
             "question": ["cause", "effect"][row % 2], "label": row % 2, "idx": row, "changed": False}
            for row in range(3)
        ])  # fmt: skip
        for split in ("validation", "test"):
            _write(folder / "cambridgeltl" / "xcopa" / language, split, rows)
    _readme(folder / "cambridgeltl" / "xcopa", XCOPA, ("validation", "test"))
    return folder


def _write(folder: Path, split: str, rows: pa.Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, folder / f"{split}-00000-of-00001.parquet")


def _readme(folder: Path, configs: "list[str] | tuple[str, ...]", splits: tuple[str, ...]) -> None:
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
