"""The proof of the masks: which tokens carry loss in the batches that fine-tuning really trains on.

    accelerate launch -m posttrain.prove_masks --config sft.yaml

Takes the same keys as `posttrain.sft` and builds the same trainer; nothing is trained. Each chat of the batches is
compared with the tokens that were checked, and with its row in the file. The certificate holds, per file, the counts
that must be 0, the share of tokens with loss, and examples of what carries loss, decoded.
"""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cordee import certificate, worker
from cordee.certificate import Certificate, Check, Conditions, at_least, at_most
from cordee.cost import Cost
from cordee.errors import Fault
from cordee.stage import Context
from posttrain import sft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.training.masks import Audit, Leak

VERSION = 3
PROVES = "posttrain.sft"
CLAIM = "what carries loss is what the rows say, and only that, and packed chats never see each other"


class Config(sft.Config, Conditions):
    """The same keys as `posttrain.sft`."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """One pass over the batches, without training."""
    return Cost(tokens=sft.cost(config, given).tokens, flops=0.0, parameters=given.get("model", Cost()).parameters)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Look at every batch of one epoch and write `certificate.json`.

    Raises:
        Fault: a check failed; the certificate is not written.
    """
    from cordee.chat.selection import files_of
    from posttrain.training import masks
    from posttrain.training.raw_rows import Rows
    from posttrain.training.reading import ROWS

    trainer, chats = sft.open_trainer(config, context)
    tokenizer = trainer.processing_class
    rows = {str(file): Rows(file, tokenizer, source) for source in config.data for file in files_of(source).documents}
    pad = tokenizer.pad_token_id
    moved: list[Leak] = []

    def batches() -> Iterator[Any]:
        loader = trainer.get_train_dataloader()
        for done, batch in enumerate(loader):
            context.stop_if_asked(f"batch {done} of {len(loader)}")
            if context.is_main and not moved and (leak := masks.leak(trainer.model, batch, pad)):
                moved.append(leak)
            context.progress(done + 1, len(loader), "batches")
            yield batch

    found = masks.gather(masks.audit(batches(), chats, pad, rows))
    texts = {str(chat.file) for chat in chats if not chat.messages}
    checks = list(_mask_checks(found, texts))
    if trainer.accelerator.num_processes == 1:
        seen = sum(audit.chats for audit in found.values())
        checks.append(Check(name="chats in one epoch", value=seen, limit=len(chats), passed=seen == len(chats)))
    used: dict[str, set[tuple[int, int]]] = {}
    for chat in chats:
        used.setdefault(str(chat.file), set()).update(rows[str(chat.file)].promised(chat))
    for file, promised in used.items():
        missing = len(promised - found[file].carried.keys())
        checks.append(at_most(f"answers without loss {_of(file)}", missing, 0))
    if context.is_main:
        checks += _attention_checks(moved, packing=trainer.args.packing)
    tokens, loss_tokens = (sum(getattr(audit, name) for audit in found.values()) for name in ("tokens", "loss_tokens"))
    if context.is_main:
        shutil.rmtree(context.out / "resume")  # nothing was trained
        (context.out / ROWS).unlink()
        examples = _examples(found, tokenizer)
        proven = Certificate(
            proof="masks", of=PROVES, claim=CLAIM, conditions=config.conditions, checks=tuple(checks), evidence=examples
        )
        certificate.write(context.out, proven)
    return {"tokens": tokens, "loss_tokens": loss_tokens, "rows": len(chats), "checks": len(checks)}


def _mask_checks(found: "dict[str, Audit]", texts: set[str]) -> Iterator[Check]:
    """The counts of each file, and the share of its tokens that carries loss; of texts, all may."""
    for file, audit in found.items():
        source = _of(file)
        for name, count in audit.faults.items():
            yield at_most(f"{name.replace('_', ' ')} {source}", count, 0)
        share = audit.loss_tokens / max(audit.tokens, 1)
        yield at_least(f"chats seen {source}", audit.chats, 1)
        yield Check(
            name=f"share of tokens with loss {source}", value=round(share, 6),
            limit="above 0, at most 1" if file in texts else "above 0, below 1",
            passed=share > 0 and (share < 1 or file in texts),
        )  # fmt: skip


def _of(file: str) -> str:
    return f"of {file.rpartition('/')[2] or 'no file'}"


def _attention_checks(moved: "list[Leak]", *, packing: bool) -> Iterator[Check]:
    """Change the first chat of a packed row: its own logits must move, and no others."""
    from posttrain.training.masks import LEAK_LIMIT

    if not packing:
        return
    if not moved:
        raise Fault(
            "packing is on, but no two chats fit into one row, so there is nothing to prove", key="trainer.packing"
        )
    own = moved[0].changed_chat
    yield Check(
        name="largest change of a logit in the chat that was changed", value=own, limit=f"above {LEAK_LIMIT}",
        passed=own > LEAK_LIMIT,
    )  # fmt: skip
    yield at_most("largest change in the chats packed behind it", moved[0].other_chats, LEAK_LIMIT)


def _examples(found: "dict[str, Audit]", tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, str]]:
    """The first chats of each file as they stood in the batches: what is only read, and what carries loss."""
    return [
        {"source": file.rpartition("/")[2], "prompt": tokenizer.decode(prompt), "with_loss": tokenizer.decode(answer)}
        for file, audit in found.items()
        for prompt, answer in audit.examples
    ]


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
