"""Prints what `cordee plan` says of the recipes for models of one's own, as the table of docs/alignment/recipes.md.

    python benchmarks/model_recipes.py

Apertus 8B and 70B stand for the model: folders with their shapes, and files of weights that are holes.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from cordee import plan, recipe, show, units
from cordee.artifact import Store

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 1e8
QLORA = "sft.quantization={load_in_4bit: true, bnb_4bit_use_double_quant: true}"


def main() -> None:
    """Plan each recipe in a folder of its own, and print a row."""
    sys.path.insert(0, str(ROOT / "tests" / "stock"))
    import large_models

    print(f"| recipe | GPUs | memory of each | {units.count(TOKENS)} tokens |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        os.chdir(here)
        for name in ("configs", "eval"):
            Path(name).symlink_to(ROOT / name)
        Path("data").mkdir()
        Path("data/openai").symlink_to(ROOT / "data/openai")
        chat = [{"role": "user", "content": "x " * 750}, {"role": "assistant", "content": "x " * 750}]
        Path("data/my-chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 1000, encoding="utf-8")
        for name in ("my-prompts", "my-heldout-prompts"):
            Path(f"data/{name}.jsonl").write_text('{"prompt": "x"}\n' * 1000, encoding="utf-8")
        large_models.write(here / "models/my-reward-model", "8b")
        for path in sorted((ROOT / "configs/recipes/models").glob("*.yaml")):
            large_models.write(here / "models/my-model", "70b" if "70b" in path.stem else "8b")
            for overrides in [[], [QLORA]] if path.stem == "lora-8b" else [[]]:
                print(_row(path, overrides))


def _row(path: Path, overrides: list[str]) -> str:
    """What the plan says of a recipe's training."""
    made = plan.make(recipe.load(path, overrides), Store(Path("runs")))
    trained = next(one for one in made.stages if one.cost.memory)
    gpus, cost = trained.config.launch.num_processes, trained.cost
    seconds = cost.flops / cost.tokens * TOKENS / show.ROUGH_GPU_FLOPS_PER_S / gpus
    name = f"`{path.stem}`" + (" with `quantization`" if overrides else "")
    return f"| {name} | {gpus} | {cost.memory} | {units.duration(seconds)} |"


if __name__ == "__main__":
    main()
