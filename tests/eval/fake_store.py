"""A store of made-up artifacts in the shape that the stages write: 48 languages, 5 checkpoints, 2 certificates."""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import manifests

from eval.measuring import statistics

MODELS = ("base-100", "base-200", "base", "sft", "dpo")
BITS = (4.62, 3.41, 2.94, 3.02, 3.11)
ACCURACY = (0.25, 0.26, 0.25, 0.86, 0.90)
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)>&\"'"
LANGUAGES = {
    "am": ("Amharic", "Ethi"), "ar": ("Arabic", "Arab"), "bg": ("Bulgarian", "Cyrl"), "bn": ("Bengali", "Beng"),
    "br": ("Breton", "Latn"), "cs": ("Czech", "Latn"), "cy": ("Welsh", "Latn"), "da": ("Danish", "Latn"),
    "de": ("German", "Latn"), "el": ("Greek", "Grek"), "en": ("English", "Latn"), "es": ("Spanish", "Latn"),
    "et": ("Estonian", "Latn"), "eu": ("Basque", "Latn"), "fa": ("Persian", "Arab"), "fi": ("Finnish", "Latn"),
    "fr": ("French", "Latn"), "fur": ("Friulian", "Latn"), "ga": ("Irish", "Latn"), "he": ("Hebrew", "Hebr"),
    "hi": ("Hindi", "Deva"), "hu": ("Hungarian", "Latn"), "hy": ("Armenian", "Armn"), "id": ("Indonesian", "Latn"),
    "is": ("Icelandic", "Latn"), "it": ("Italian", "Latn"), "ja": ("Japanese", "Jpan"), "ka": ("Georgian", "Geor"),
    "ko": ("Korean", "Kore"), "lt": ("Lithuanian", "Latn"), "lv": ("Latvian", "Latn"), "mn": ("Mongolian", "Cyrl"),
    "nb": ("Norwegian Bokmål", "Latn"), "nl": ("Dutch", "Latn"), "pl": ("Polish", "Latn"), "pt": ("Portuguese", "Latn"),
    "rm-sursilv": ("Romansh (Sursilvan)", "Latn"), "ro": ("Romanian", "Latn"), "ru": ("Russian", "Cyrl"),
    "sr": ("Serbian", "Cyrl"),
    "sw": ("Swahili", "Latn"), "ta": ("Tamil", "Taml"), "th": ("Thai", "Thai"), "tr": ("Turkish", "Latn"),
    "uk": ("Ukrainian", "Cyrl"), "vi": ("Vietnamese", "Latn"), "yo": ("Yoruba", "Latn"), "zh": ("Chinese", "Hans"),
}  # fmt: skip
TASKS = [
    {
        "task": "language_identification", "asked": "plain", "metric": "acc", "filter": "none", "version": 1.0,
        "higher_is_better": {"acc": True, "acc_norm": True}, "chance": 0.25, "shots": 0,
        "description": "Which of four languages is an article that no model was trained on?",
    },
    {
        "task": "heldout_text", "asked": "plain", "metric": "bits_per_byte", "filter": "none", "version": 1.0,
        "higher_is_better": {"bits_per_byte": False}, "chance": None, "shots": 0,
        "description": "How many bits the model needs for each byte of held-out articles",
    },
]  # fmt: skip
SOURCES = [
    {
        "path": "/data/chats.jsonl", "rows": 7473, "sequences": 7470, "tokens": 1_620_444, "loss_tokens": 938_237,
        "left_out": [{"problem": f"messages is empty {HOSTILE}", "rows": 3, "first": [
            {"file": "chats.jsonl", "row": row, "shown_by": "message 2", "text": f'{{"messages": "{HOSTILE}"}}'}
            for row in (4, 9, 12)
        ]}],
        "notes": [], "digest": "0",
    },
    {"path": "/data/pairs", "rows": 20, "sequences": 20, "tokens": 999, "left_out": [], "notes": [], "digest": "0"},
]  # fmt: skip
"""What a training has read: chats, of which some were left out, and pairs."""
PROMPTS = {
    "ar": ("لكل فرد حق في الحياة والحرية والأمان على شخصه.", "Arabic"),
    "rm-sursilv": ("Mintga uman ha il dretg da viver en libertad e segirezza.", "Romansh"),
    "de": ("Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person.", "German"),
    "he": ("כל אדם יש לו הזכות לחיים, לחרות ולבטחון אישי.", "Hebrew"),
    "ta": ("வாழ்வதற்கும், சுதந்திரத்தையும் பாதுகாப்பையும் அனுபவிப்பதற்கும் சகலருக்கும் உரிமையுண்டு.", "Tamil"),
    "zh": ("人人有权享有生命、自由和人身安全。", "Chinese"),
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class FakeStore:
    """Writes artifacts below `root`; each knows its inputs by name."""

    def __init__(self, root: Path) -> None:
        self.root, self.random, self.clock = root, random.Random(7), 0  # noqa: S311 - no secret

    def publish(self, stage: str, uses: str, contents: dict[str, Any], **given: Any) -> Path:
        """Write one artifact; `contents` maps a file's name to JSON, to a list of rows, or to text."""
        folder = self.root / "quickstart" / f"{stage}@1"
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_text(name, content), encoding="utf-8")
        sources = [
            {"key": key, "artifact": f"quickstart/{name}@1", "fingerprint": digest(name)}
            for key, name in given.get("inputs", {}).items()
        ]
        sources += [{"key": "source", "file": name, "sha256": digest(name)} for name in given.get("sources", ())]
        self.clock += 61
        manifests.seal(
            folder, recipe="quickstart", stage=stage, uses=uses, fingerprint=digest(stage), inputs=sources,
            execution=given.get("execution", {}), metrics=given.get("metrics", {}),
            identity={"uses": uses, "seed": 17, "config": given.get("config", {})},
            started=f"2026-11-23T04:{self.clock // 60:02}:{self.clock % 60:02}+00:00",
            seconds=given.get("seconds", 1.5), peak_memory_bytes=given.get("memory", 212_000_000),
            host={"name": "node-1", "cpu": "Example CPU @ 2.60GHz", "cores": 2, "memory_bytes": 25_276_502_016,
                  "gpu": None, "platform": "Linux-6.1-x86_64"},
            packages={"torch": "2.13.0", "transformers": "5.17.0", "trl": "1.16.0", "lm-eval": "0.4.13"},
            git={"commit": digest("git")[:40], "dirty": True},
        )  # fmt: skip
        return folder

    def curve(self, steps: int, first: float, last: float, *, heldout: bool) -> list[dict[str, Any]]:
        """Losses that fall like a learning curve, with noise."""
        rows = []
        for step in range(1, steps + 1):
            share = math.exp(-step / (steps / 5))
            loss = last + (first - last) * share + self.random.gauss(0, 0.05)
            row: dict[str, Any] = {
                "step": step,
                "loss": loss,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "tokens_per_s": 4100,
            }
            if heldout and (step % 20 == 0 or step == 1):
                row["heldout_bits_per_byte"] = 2.9 + 4.2 * math.exp(-step / (steps / 4))
            rows.append(row)
        return rows


def _text(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if name.endswith(".jsonl"):
        return lines(content)
    return json.dumps(content, ensure_ascii=False)


def lines(rows: list[dict[str, Any]]) -> str:
    """JSON lines as the stages write them."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rehash(folder: Path) -> None:
    """Make a manifest agree with files that a test has changed."""
    manifests.change(folder, files=manifests.listed(folder))


def benchmark(store: FakeStore) -> dict[str, Any]:
    """The files of a benchmark: four held-out articles per language, results that the sample rows add up to."""
    models, contents = [], {}
    articles = [(tag, number) for tag in LANGUAGES for number in range(4)]
    difficulty = [store.random.random() for _ in articles]
    skill = {tag: store.random.uniform(-0.3, 0.3) for tag in LANGUAGES}
    for name, accuracy, bits in zip(MODELS, ACCURACY, BITS, strict=True):
        right = [float(0.8 * hard + 0.2 * store.random.random() < accuracy) for hard in difficulty]
        sizes = [180 + 37 * number for _, number in articles]
        need = [
            size * (bits + skill[tag] + store.random.gauss(0, 0.1)) * math.log(2)
            for (tag, _), size in zip(articles, sizes, strict=True)
        ]
        mean, total = sum(right) / len(right), sum(need) / math.log(2) / sum(sizes)
        error = math.sqrt(mean * (1 - mean) / (len(right) - 1))
        bits_error = statistics.ratio_mean([nats / math.log(2) for nats in need], sizes)[1]
        by_tag: dict[str, list[int]] = {}
        for index, (tag, _) in enumerate(articles):
            by_tag.setdefault(tag, []).append(index)
        by_language = {
            "acc": {t: sum(right[i] for i in rows) / 4 for t, rows in by_tag.items()},
            "bits_per_byte": {
                t: sum(need[i] for i in rows) / math.log(2) / sum(sizes[i] for i in rows) for t, rows in by_tag.items()
            },
        }
        figures = [
            ("language_identification", "acc", mean, error),
            ("language_identification", "acc_norm", mean / 2, error / 2),
            ("heldout_text", "bits_per_byte", total, bits_error),
        ]
        models.append({
            "name": name, "seconds": 14.2, "tasks": TASKS,
            "results": [
                {"task": task, "asked": "plain", "metric": metric, "filter": "none", "value": value,
                 "standard_error": own, "documents": len(right), "by_language": by_language.get(metric, {})}
                for task, metric, value, own in figures
            ],
        })  # fmt: skip
        for task, metric, values in (
            ("language_identification", "acc", right),
            ("heldout_text", "bits_per_byte", [[-n, s] for n, s in zip(need, sizes, strict=True)]),
        ):
            contents[f"lm_eval/{name}/plain/samples_{task}_2026-11-23T04-00-00.000000.jsonl"] = [
                {"doc_id": i, "doc_hash": digest(f"{task}{i}"), "filter": "none", metric: value}
                for i, value in enumerate(values)
            ]
    engine = {"name": "vllm", "version": "0.31.0+cpu", "device": "cpu", "mode": "eager", "dtype": "bfloat16"}
    return {"results.json": {"engine": engine, "models": models}, **contents}


def samples() -> list[dict[str, Any]]:
    """Generated answers; the first prompt and one answer try to be HTML."""
    rows: list[dict[str, Any]] = []
    for tag, (text, name) in PROMPTS.items():
        outputs = {
            "base": text[: len(text) // 2] + "…", "sft": name if name != "Romansh" else "Friulian", "dpo": name,
        }  # fmt: skip
        rows.append({"prompt": f"Which language is this?\n{text}", "reference": name, "kind": "identification",
                     "language": tag, "outputs": outputs})  # fmt: skip
    rows.insert(1, {"prompt": HOSTILE, "reference": "Hostile", "kind": HOSTILE, "language": "en\" onload=\"alert(1)",
                    "outputs": {"base": HOSTILE, "sft": HOSTILE, "dpo": "Hostile."}})  # fmt: skip
    rows.append({"prompt": "Continue: All human beings are born free", "reference": None, "kind": "continuation",
                 "language": "en",
                 "outputs": {"base": "and equal in dignity and rights.", "sft": "", "dpo": "and free."}})  # fmt: skip
    return rows


def make(root: Path) -> dict[str, Path]:
    """A whole store; returns each artifact's folder by its stage."""
    store, made = FakeStore(root), {}

    def publish(stage: str, uses: str, contents: dict[str, Any], **given: Any) -> None:
        made[stage] = store.publish(stage, uses, contents, **given)

    corpus = {
        "languages": {
            tag: {"name": name, "script": script, "train_documents": 26, "train_bytes": 9000, "heldout_documents": 4,
                  "heldout_bytes": 1400} for tag, (name, script) in LANGUAGES.items()
        },
        "licences": {"Public domain": 1440}, "sources": 1, "heldout_byte_entropy": 4.93,
    }  # fmt: skip
    publish(
        "corpus",
        "pretrain.corpus",
        {"corpus.json": corpus, "train.parquet": "x"},
        sources=["data/udhr.parquet"],
        metrics={"rows": 1440},
        seconds=1.2,
        config={"source": f"content {digest('data/udhr.parquet')}", "holdout": 4},
    )
    publish(
        "tokenizer",
        "pretrain.tokenizer",
        {"tokenizer.json": "{}"},
        inputs={"corpus": "corpus"},
        metrics={"vocab_size": 8192},
        seconds=3.4,
    )
    publish(
        "tokens",
        "pretrain.tokens",
        {"tokens.json": "{}"},
        inputs={"corpus": "corpus", "tokenizer": "tokenizer"},
        metrics={"tokens": 312_455, "rows": 1440},
        seconds=1.1,
    )
    publish("base", "pretrain.train", {"config.json": "{}", "metrics.jsonl": store.curve(300, 9.0, 4.1, heldout=True)},
            inputs={"data.0.tokens": "tokens"}, seconds=272, memory=2_100_000_000,
            config={"data": [{"tokens": f"artifact {digest('tokens')}", "weight": 1.0}], "optimizer": {"name": "adamw",
                    "learning_rate": 1e-3}, "steps": 300},
            metrics={"tokens": 614_400, "flops": 2.1e13, "parameters": 5_408_768, "loss": 4.1})  # fmt: skip
    publish("chats", "udhr.chats", {"heldout.jsonl": "{}\n"}, inputs={"corpus": "corpus"}, metrics={"rows": 5200})
    publish("sft", "posttrain.sft", {"config.json": "{}", "metrics.jsonl": store.curve(80, 4.0, 1.2, heldout=False),
                                     "rows.json": json.dumps({"sources": SOURCES})},
            inputs={"model": "base", "data": "chats"}, seconds=96, memory=2_400_000_000,
            metrics={"tokens": 163_840, "flops": 5.6e12, "parameters": 5_408_768})  # fmt: skip
    publish("dpo", "posttrain.dpo", {"adapter_config.json": "{}",
            "metrics.jsonl": store.curve(40, 0.693, 0.4, heldout=False)}, inputs={"model": "sft", "data": "chats"},
            seconds=64, memory=2_700_000_000,
            metrics={"tokens": 81_920, "flops": 3.9e12, "parameters": 5_408_768})  # fmt: skip
    said = [{"step": step, "prompt": [{"role": "user", "content": f"How many? {HOSTILE}"}],
             "completion": [{"role": "assistant", "content": f"{number} of step {step} {HOSTILE}"}],
             "rewards": {"correct": float(number == 3), "form": None if number else 0.5}, "reward": number / 4,
             "advantage": 0.0} for step in range(1, 11) for number in range(4)]  # fmt: skip
    said.append({**said[0], "step": 10, "heldout": True})
    publish("grpo", "posttrain.grpo", {"adapter_config.json": "{}", "completions.jsonl": said,
            "metrics.jsonl": store.curve(10, 0.1, 0.2, heldout=False)}, inputs={"model": "sft", "data": "chats"},
            metrics={"tokens": 9_000, "collapse": f"entropy fell {HOSTILE}"})  # fmt: skip
    publish(
        "merged",
        "posttrain.merge",
        {"config.json": "{}"},
        inputs={"model": "sft", "adapter": "dpo"},
        seconds=4.6,
        metrics={"parameters": 5_408_768},
    )
    publish(
        "benchmark",
        "eval.benchmark",
        benchmark(store),
        inputs={"models.0.model": "base", "models.1.model": "merged"},
        seconds=71,
        memory=3_900_000_000,
        metrics={"tokens": 240_000},
    )
    publish(
        "samples",
        "eval.generate",
        {"samples.jsonl": samples(), "engine.json": {"name": "vllm"}},
        inputs={"models.0.model": "base", "models.1.model": "merged"},
        seconds=33,
        metrics={"rows": 8},
    )
    for proof, of, claim in (
        ("masks", "sft", "Loss lies on the assistant's tokens and on nothing else."),
        ("resume", "base", "Killed and continued, training ends in the same bits."),
    ):
        checks = [{"name": "prompt tokens with loss", "value": 0, "limit": 0, "passed": True},
                  {"name": "largest difference", "value": 2.4e-7, "limit": 1e-5, "passed": True}]  # fmt: skip
        document = {"proof": proof, "of": f"quickstart/{of}@1", "claim": claim, "checks": checks}
        publish(f"prove-{proof}", f"pretrain.prove_{proof}", {"certificate.json": {**document, "evidence": []}},
                inputs={"tokens": "tokens"}, seconds=9.8)  # fmt: skip
    return made


def figures(folder):
    """What a report's page shows."""
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def change_json(folder, file, change):
    """Change a JSON file of an artifact; `change` gets the document."""
    document = json.loads((folder / file).read_text(encoding="utf-8"))
    change(document)
    (folder / file).write_text(json.dumps(document), encoding="utf-8")
    rehash(folder)
