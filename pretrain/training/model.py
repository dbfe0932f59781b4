"""The model to train: built from a YAML or opened from a folder, and wrapped with its loss."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cordee import files, model_folder, yaml12
from cordee.compute import meta, shards
from cordee.compute.model import attention, open_config, open_model
from cordee.compute.tokenizer import copy_tokenizer, open_tokenizer, tokenizer_folder, tokenizer_remark
from cordee.errors import Fault, UserError, nearest
from pretrain.data.loader import IGNORED
from pretrain.training import losses
from pretrain.training.recomputation import recompute
from pretrain.training.settings import Settings

LEAK = 1e-4
"""How much logits may depend on a neighbouring document, as a share of the largest: rounding only."""


class Objective(nn.Module):
    """A language model with its loss, compiled and wrapped as one module."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        super().__init__()
        recompute(model, settings.activation_checkpointing)
        self.model = model
        self.settings = settings
        self.loss = getattr(losses, settings.loss)
        self._no_split_modules = model._no_split_modules  # noqa: SLF001 - accelerate shards the class named here

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What each label costs by the loss, whether it counts, and its plain nats; without labels, float32's logits.

        Each `[rows, sequence_length]`; the costs and nats in float32, 0 where there is no label. Only the costs have a
        gradient.
        """
        if labels is None:
            logits: torch.Tensor = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            return logits
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
    if source.is_dir():
        model = open_model(source, dtype=torch.float32, key="model")
        _require_fit(model.config, source, tokens, sequence_length)
        return model.train()
    make = blueprint(source, tokens, sequence_length)
    torch.manual_seed(seed)
    return make().train()


def blueprint(source: Path, tokens: Path, sequence_length: int) -> Callable[[], PreTrainedModel]:
    """What makes the model that `build` gives, with weights that are drawn anew; the arguments are those of `build`.

    Raises:
        UserError: a field is unknown, or the model does not fit the tokens.
    """
    if source.is_dir():
        model_folder.require(source, "model")
        config, options = open_config(source), attention(source)
    else:
        config, options = _read_config(source, tokens), {}
        special = open_tokenizer(tokens / "tokenizer", key="data.0.tokens")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(special, name))
    _require_fit(config, source, tokens, sequence_length)
    return lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)


def fill(model: PreTrainedModel, source: Path, tokens: Path, sequence_length: int, seed: int) -> bool:
    """Give a model, each of whose weights may lie in shards, the values that `build` gives, with the same arguments.

    Returns:
        Whether each process held no more than a module of the model at once.
    """
    make = blueprint(source, tokens, sequence_length)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def put(name: str, whole: torch.Tensor) -> None:
        if name in tensors:  # a head that is the embedding has no name of its own
            shards.put(whole, tensors[name])

    try:
        if source.is_dir():
            meta.read(make, source, tensors)
        else:
            meta.draw(make, seed, put)
    except meta.NotByModule:
        whole = build(source, tokens, sequence_length, seed)
        for name, value in (*whole.named_parameters(), *whole.named_buffers()):
            put(name, value.detach())
        return False
    return True


def _require_fit(config: PreTrainedConfig, source: Path, tokens: Path, sequence_length: int) -> None:
    """See that a model fits the tokens that it will be trained on, and this training."""
    tokenizer = tokens / "tokenizer"
    if source.is_dir():
        open_tokenizer(source, key="model")
        if files.sha256(source / "tokenizer.json") != files.sha256(tokenizer / "tokenizer.json"):
            raise UserError(f"its tokenizer is not that of {tokens}", file=source / "tokenizer.json", key="model")
    else:
        _require_opens_beside(config, source, tokenizer)
    _require_positions(config, source, sequence_length)
    _require_no_loss_of_its_own(config, source)


def shape(source: Path, tokens: Path) -> PreTrainedModel:
    """The model that `build` gives, without weights.

    Raises:
        UserError: a field is unknown, or the model does not fit the tokens.
    """
    config = open_config(source) if source.is_dir() else _read_config(source, tokens)
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
def require_documents_apart(objective: Objective, where: torch.device) -> None:
    """Check on two short documents in one row that neither attends to the other; in shards, all processes call this.

    Raises:
        Fault: the architecture does not take documents packed by their positions.
    """
    objective.eval()  # no dropout
    first, second = torch.arange(5, 12, device=where), torch.arange(3, 14, device=where)
    vocab_size = objective.model.config.get_text_config().vocab_size  # any ids do: what is seen of the other matters
    documents = [ids.remainder(vocab_size).unsqueeze(0) for ids in (first, second)]
    positions = [torch.arange(ids.shape[1], device=where).unsqueeze(0) for ids in documents]
    apart = torch.cat([objective(ids, at) for ids, at in zip(documents, positions, strict=True)], 1)
    packed = objective(torch.cat(documents, 1), torch.cat(positions, 1))
    shards.reshard(objective)
    difference = (packed - apart).abs().max() / packed.abs().max()
    if not difference <= LEAK:
        kind = type(objective.model).__name__
        problem = f"{kind} lets documents of one row see each other: logits differ by {difference:.1e}"
        raise Fault(problem, key="model")
    objective.train()
