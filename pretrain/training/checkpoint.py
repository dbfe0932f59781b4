"""Models that a training publishes, at `save_steps` and at its end: Hugging Face folders."""

import shutil
from pathlib import Path

from accelerate import PartialState
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cordee.compute.model import save_model
from cordee.stage import Context


def save(model: PreTrainedModel, context: Context, place: str, tokenizer: Path) -> None:
    """Write the model to `<out>/<place>`, with its tokenizer's files; every process has to call this.

    What a killed attempt left there is replaced. Weights in shards are gathered one by one, and the main process alone
    keeps them, in host memory.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if context.is_main:
            weights[name] = whole.detach().cpu().contiguous()
    if context.is_main:
        folder = context.out / place
        if folder != context.out:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
        save_model(model, folder, tokenizer=tokenizer, state_dict=weights)
    PartialState().wait_for_everyone()
