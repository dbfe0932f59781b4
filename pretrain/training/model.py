"""The model to train: built from a YAML or opened from a folder, and wrapped with its loss."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cordee import files, yaml12
from cordee.compute.model import open_model
from cordee.compute.tokenizer import copy_tokenizer, open_tokenizer, tokenizer_folder, tokenizer_remark
from cordee.errors import Fault, UserError, nearest
from pretrain.data.loader import IGNORED
from pretrain.training import losses
from pretrain.training.settings import Settings

LEAK = 1e-4
"""How much logits may depend on a neighbouring document, as a share of the largest: rounding only."""


class Objective(nn.Module):
    """A language model with its loss, compiled and wrapped as one module."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.loss = getattr(losses, settings.loss)
        self._no_split_modules = model._no_split_modules  # noqa: SLF001 - accelerate shards the class named here

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What each label costs by the loss, whether it counts, and its plain nats.

        Each `[rows, sequence_length]`; the costs and nats in float32, 0 where there is no label. Only the costs have a
        gradient.
        """
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        logits = logits.float()
        nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        nats = nats.view_as(labels)
        loss, counts = self.loss(losses.Labels(nats, logits, input_ids, position_ids, labels), self.settings)
        return loss, counts, nats.detach()

    @property
    def is_random(self) -> bool:
        """Whether the model draws random numbers while it trains."""
        fields = self.model.config.to_dict()
        return any(value for name, value in fields.items() if "dropout" in name or "jitter" in name)

    @property
    def pad_token_id(self) -> int:
        """What fills a row: the model's pad token where it has one with an embedding, else 0."""
        pad = self.model.config.get_text_config().pad_token_id
        return pad if pad is not None and 0 <= pad < self.model.get_input_embeddings().num_embeddings else 0

    @property
    def is_compiled(self) -> bool:
        """Whether it runs compiled."""
        return self._compiled_call_impl is not None


def build(source: Path, tokens: Path, sequence_length: int, seed: int) -> PreTrainedModel:
    """A model in float32 on the CPU: new, with weights drawn from `seed`, or the one in a folder to go on from.

    Args:
        source: a YAML with the fields of a transformers config, or a Hugging Face model folder.
        tokens: the tokens artifact that it will be trained on; gives the vocabulary's size and special tokens.
        sequence_length: of a row; the model has to take as many positions.
        seed: of the new weights.

    Raises:
        UserError: a field is unknown, or the model does not fit the tokens.
    """
    tokenizer = tokens / "tokenizer"
    if source.is_dir():
        model = open_model(source, dtype=torch.float32, key="model")
        open_tokenizer(source, key="model")
        if files.sha256(source / "tokenizer.json") != files.sha256(tokenizer / "tokenizer.json"):
            raise UserError(f"its tokenizer is not that of {tokens}", file=source / "tokenizer.json", key="model")
        _require_positions(model.config, source, sequence_length)
        _require_no_loss_of_its_own(model.config, source)
        return model.train()
    config = _read_config(source, tokens)
    special = open_tokenizer(tokenizer, key="data.0.tokens")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(special, name))
    _require_positions(config, source, sequence_length)
    _require_no_loss_of_its_own(config, source)
    _require_opens_beside(config, source, tokenizer)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def shape(source: Path, tokens: Path) -> PreTrainedModel:
    """The model that `build` gives, without weights.

    Raises:
        UserError: a field is unknown, or the model does not fit the tokens.
    """
    config = AutoConfig.from_pretrained(source) if source.is_dir() else _read_config(source, tokens)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _require_positions(config: PreTrainedConfig, source: Path, sequence_length: int) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)  # some architectures have no limit
    if positions is not None and positions < sequence_length:
        problem = f"{positions} positions do not hold a sequence_length of {sequence_length}"
        raise UserError(problem, file=source, key="max_position_embeddings")


def _require_no_loss_of_its_own(config: PreTrainedConfig, source: Path) -> None:
    """See that a mixture of experts asks for no auxiliary loss, which this training does not add."""
    shape = config.get_text_config()
    if getattr(shape, "output_router_logits", False) and getattr(shape, "router_aux_loss_coef", 0.0):
        problem = f"the auxiliary loss of the router ({shape.router_aux_loss_coef:g}) is not added in pretraining"
        raise UserError(problem, file=source, key="output_router_logits", hint="say false")


def _require_opens_beside(config: PreTrainedConfig, source: Path, tokenizer: Path) -> None:
    """See that the tokenizer that will be published beside a new model's config is opened as it is.

    For a few types of models transformers takes a class of its own, whatever `tokenizer_config.json` names.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config.save_pretrained(folder)
        copy_tokenizer(tokenizer, folder)
        if tokenizer_folder(folder) != folder:
            problem = f"beside a {config.model_type} model {tokenizer_remark(folder)}"
            raise UserError(problem, file=source, key="model_type", hint="take another architecture or tokenizer")


def _read_config(source: Path, tokens: Path) -> PreTrainedConfig:
    """The config that a YAML describes; `vocab_size` defaults to that of the tokens."""
    fields = yaml12.read(source, key="model")
    kind = fields.pop("model_type", "apertus")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"no architecture {kind!r}", file=source, key="model_type", hint=nearest(kind, CONFIG_MAPPING))
    # transformers keeps a misspelt field as an attribute that nothing reads
    known = set(CONFIG_MAPPING[kind]().to_dict())
    for name in fields:
        if name not in known:
            raise UserError(f"{kind} has no field {name!r}", file=source, key=name, hint=nearest(name, known))
    vocab_size = files.read_json(tokens / "tokens.json")["vocab_size"]
    if "vocab_size" in known:
        fields.setdefault("vocab_size", vocab_size)
    try:
        config = CONFIG_MAPPING[kind](**fields)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{kind} refuses it: {error}", file=source, key="model") from error
    if (given := config.get_text_config().vocab_size) < vocab_size:
        problem = f"the model's vocabulary of {given} does not hold the {vocab_size} of {tokens}"
        raise UserError(problem, file=source, key="vocab_size")
    return config


@torch.no_grad()
def require_documents_apart(model: PreTrainedModel) -> None:
    """Check on two short documents in one row that neither attends to the other.

    Raises:
        Fault: the architecture does not take documents packed by their positions.
    """
    model.eval()  # no dropout
    first, second = torch.arange(5, 12), torch.arange(3, 14)  # any ids: what is seen of the other is what matters
    vocab_size = model.config.get_text_config().vocab_size
    documents = [ids.remainder(vocab_size).unsqueeze(0) for ids in (first, second)]
    positions = [torch.arange(ids.shape[1]).unsqueeze(0) for ids in documents]
    apart = [
        model(input_ids=ids, position_ids=at, use_cache=False).logits
        for ids, at in zip(documents, positions, strict=True)
    ]
    packed = model(input_ids=torch.cat(documents, 1), position_ids=torch.cat(positions, 1), use_cache=False).logits
    difference = (packed - torch.cat(apart, 1)).abs().max() / packed.abs().max()
    if not difference <= LEAK:
        problem = f"{type(model).__name__} lets documents of one row see each other: logits differ by {difference:.1e}"
        raise Fault(problem, key="model")
    model.train()
