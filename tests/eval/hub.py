"""Data sets in the hub's layout: the folders that lm-eval's own tasks read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "def one():\n    return 1\n\n\n"
XCOPA = ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")


def make(folder: Path) -> Path:
    """GSM8K, 24 problems of each split; made up: XCOPA in each of its languages, HumanEval and HumanEval-Infilling.

    In HumanEval-Infilling, what a model writes stands in a text of a program, of which every second one is right.
    """
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
    for name, config, prompt in (
        ("openai/openai_humaneval", "openai_humaneval", f"{PROGRAM}def two():\n    return ("),
        ("loubnabnl/humaneval_infilling", "HumanEval-SingleLineInfilling", f"{PROGRAM}text = r'''"),
    ):
        rows = pa.Table.from_pylist([
            {"task_id": f"made up/{row}", "entry_point": "one", "prompt": prompt, "suffix": " '''\n",
             "test": f"def check(candidate):\n    assert candidate() == {1 + row % 2}\n"}
            for row in range(4)
        ])  # fmt: skip
        _write(folder / name / config, "test", rows)
        _readme(folder / name, [config], ("test",))
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
