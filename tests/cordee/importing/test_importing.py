"""`cordee import`: each key of fifty configurations is accounted for, each recipe plans, and values mean the same."""

import re
import shutil
from pathlib import Path

import fifty
import pytest

from cordee import yaml12
from cordee.errors import UserError
from cordee.importing import peers, writing
from cordee.importing.draft import UNKNOWN, leaves

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("place")


def keys(draft):
    """The training stage of the recipe that a draft becomes."""
    writing.write(draft, Path("out.yaml"))
    return yaml12.read(Path("out.yaml"))["stages"][draft.stage]


@pytest.mark.parametrize("path", fifty.CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_key_is_in_one_list_and_the_recipe_plans(path, place, planned):
    here = place / path.name
    shutil.copy(path, here)
    if (beside := path.with_name("dataset_info.json")).exists():
        shutil.copy(beside, place)
    draft = peers.read(here)
    names = {fifty.PEERS[path.parent.name], "TRL" if path.parent.name == "alignment_handbook" else ""}
    assert draft.peer in names, "the handbook's files without a mixture are TRL's"
    lists = [*draft.taken, *draft.lost, *draft.idle]
    for leaf in leaves(draft.given):
        assert sum(leaf == one or leaf.startswith(f"{one}.") for one in lists) == 1, leaf
    assert UNKNOWN not in {lost.why for lost in draft.lost.values()}
    writing.write(draft, Path("out.yaml"))
    text = Path("out.yaml").read_text()
    for felt in draft.felt():
        assert f"#   {felt}: " in text
    assert {stage.name for stage in planned(Path("out.yaml")).stages} >= {draft.stage, "report"}


def test_there_are_ten_of_each_peer():
    assert {name: len(fifty.drafts(name)) for name in fifty.PEERS} == dict.fromkeys(fifty.PEERS, 10)


def test_the_documents_tables_are_those_of_the_fifty():
    text = (ROOT / "docs/import.md").read_text(encoding="utf-8")
    assert fifty.table() in text
    assert fifty.beside() in text


AXOLOTL = """
base_model: owner/model
datasets: [{path: chats.jsonl, type: chat_template, roles_to_train: [assistant], train_on_eos: turn}]
learning_rate: "2e-4"
micro_batch_size: 3
gradient_accumulation_steps: 4
num_epochs: 2
warmup_steps: 20
sequence_len: 4_096
"""
LLAMA_FACTORY = "model_name_or_path: owner/model\nstage: sft\ndataset: chats.jsonl\ndataset_dir: nowhere\n"
TRL = "model_name_or_path: owner/model\ndataset_name: owner/chats\n"
TUNE = """
model: {_component_: torchtune.models.llama3_2.llama3_2_1b}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: models/Llama/hub}
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: t, max_seq_len: null}
dataset: {_component_: torchtune.datasets.chat_dataset, source: json, data_files: chats.jsonl,
          conversation_column: messages, conversation_style: openai, packed: true}
optimizer: {_component_: torch.optim.AdamW, lr: 3e-5}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
epochs: 2
batch_size: 2
gradient_accumulation_steps: 8
max_steps_per_epoch: 50
"""


def test_axolotls_values(write):
    stage = keys(peers.read(write("a.yaml", AXOLOTL), processes=2))
    assert stage["model"] == "hub:owner/model"
    assert stage["data"] == [{"path": "chats.jsonl"}]
    assert (stage["global_batch_size"], stage["per_device_train_batch_size"]) == (24, 3)
    assert stage["launch"] == {"num_processes": 2}
    assert stage["overlong"] == "drop"
    wanted = {"learning_rate": 2e-4, "num_train_epochs": 2, "warmup_steps": 20, "max_length": 4096}
    assert wanted.items() <= stage["trainer"].items()
    assert stage["trainer"]["lr_scheduler_type"] == "cosine", "axolotl's default; transformers' is linear"


def test_a_share_of_a_warmup_and_a_least_rate(write):
    more = AXOLOTL.replace("warmup_steps: 20", "warmup_ratio: 0.1\nlr_scheduler: cosine\ncosine_min_lr_ratio: 0.2")
    trainer = keys(peers.read(write("a.yaml", more)))["trainer"]
    assert (trainer["warmup_steps"], trainer["lr_scheduler_type"]) == (0.1, "cosine_with_min_lr")
    assert trainer["lr_scheduler_kwargs"] == {"min_lr_rate": 0.2}


def test_what_stands_for_an_unknown_schedule_is_named(write):
    draft = peers.read(write("a.yaml", f"{AXOLOTL}lr_scheduler: rex\n"))
    used = keys(draft)["trainer"]["lr_scheduler_type"]
    assert draft.felt()["lr_scheduler"] == f"transformers has no such schedule: {used} is used"


def test_without_a_warmup_axolotl_has_one(write):
    draft = peers.read(write("a.yaml", AXOLOTL.replace("warmup_steps: 20", "")))
    assert keys(draft)["trainer"]["warmup_steps"] == 0.03


def test_axolotls_defaults_are_written(write):
    few = "base_model: owner/model\ndatasets: [{path: chats.jsonl, type: chat_template}]\nlearning_rate: 1e-4\n"
    stage = keys(peers.read(write("a.yaml", few)))
    assert (stage["precision"], stage["global_batch_size"]) == ("auto", 1)
    assert {"num_train_epochs": 1, "max_length": 512, "optim": "adamw_torch_fused"}.items() <= stage["trainer"].items()


def test_llama_factorys_defaults_are_written(write):
    stage = keys(peers.read(write("a.yaml", LLAMA_FACTORY)))
    assert stage["global_batch_size"] == 8
    assert stage["lora"] == {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    wanted = {"learning_rate": 5e-5, "num_train_epochs": 3, "lr_scheduler_type": "linear", "max_length": 2048}
    assert wanted.items() <= stage["trainer"].items()


def test_llama_factorys_data_sets_are_looked_up(place, write):
    shutil.copy(fifty.HERE / "llama_factory/dataset_info.json", place)
    draft = peers.read(write("a.yaml", LLAMA_FACTORY.replace("chats.jsonl", "chats,questions")))
    columns = {"question": "instruction", "answer": "output"}
    assert keys(draft)["data"] == [
        {"path": str(place / "chats.jsonl")},
        {"path": str(place / "questions.jsonl"), "columns": columns},
    ]


def test_trls_adapter_has_trls_defaults(write):
    stage = keys(peers.read(write("a.yaml", TRL + "use_peft: true\nload_in_4bit: true\nmodel_revision: v2\n")))
    assert stage["model"] == "hub:owner/model@v2"
    assert stage["lora"] == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": None}
    assert stage["quantization"]["bnb_4bit_use_double_quant"] is False


def test_torchtunes_values(write):
    stage = keys(peers.read(write("a.yaml", TUNE)))
    assert stage["model"] == "models/Llama/hub"
    assert stage["data"] == [{"path": "chats.jsonl"}]
    assert (stage["global_batch_size"], stage["overlong"]) == (16, "error")
    trainer = stage["trainer"]
    assert trainer["weight_decay"] == 0.01, "torch's default; transformers' is 0"
    assert (trainer["max_grad_norm"], trainer["lr_scheduler_type"]) == (0, "constant")
    assert (trainer["num_train_epochs"], trainer["packing"]) == (2, True)
    assert "max_steps" not in trainer, "max_steps_per_epoch is a limit, which a short epoch does not reach"


def test_torchtunes_losses_and_optimizers_have_their_own_numbers(write):
    more = TUNE.replace("torch.optim.AdamW", "torch.optim.Adagrad").replace(
        "torchtune.modules.loss.LinearCrossEntropyLoss", "torchtune.rlhf.loss.RSOLoss, gamma: 0.3"
    )
    draft = peers.read(write("a.yaml", more.replace("chat_dataset", "preference_dataset")))
    trainer = draft.keys
    assert (trainer["trainer.loss_type"], trainer["trainer.beta"]) == (["hinge"], 0.3)
    assert trainer["trainer.weight_decay"] == 0, "torch's default for Adagrad"


def test_the_rest_of_a_split_is_held_out(write):
    more = TUNE.replace("packed: true}", "packed: true, split: 'train[:90%]'}")
    held = "dataset_val: {_component_: torchtune.datasets.chat_dataset, source: json, data_files: chats.jsonl, split: "
    assert keys(peers.read(write("a.yaml", f"{more}{held}'train[90%:]'}}\n")))["heldout"] == 0.1
    Path("out.yaml").unlink()
    other = peers.read(write("a.yaml", f"{more}{held}'train[95%:]'}}\n"))
    assert "heldout" not in keys(other)
    assert "dataset_val" in other.felt()


def test_the_first_rows_of_a_split_are_a_limit(write):
    draft = peers.read(write("a.yaml", TRL + "dataset_train_split: train[:500]\n"))
    assert keys(draft)["data"] == [{"path": "hub:datasets/owner/chats", "split": "train", "limit": 500}]


def test_a_chat_templates_text_becomes_a_file(write):
    keys(peers.read(write("a.yaml", TRL + 'chat_template: "{{ messages }}"\n')))
    assert Path("out.jinja").read_text() == "{{ messages }}"


def test_a_local_file_is_asked_about_before_and_after(write, planned):
    writing.write(peers.read(write("a.yaml", AXOLOTL)), Path("out.yaml"))
    plan = planned(Path("out.yaml"))
    assert [stage.name for stage in plan.stages] == ["sft", "answers", "report"]


def test_chatmls_tokens_are_added_where_the_file_names_them(write):
    chatml = f"{AXOLOTL}chat_template: chatml\n"
    draft = peers.read(
        write("a.yaml", f"{chatml}special_tokens: {{eos_token: <|im_end|>}}\ntokens: ['<|im_start|>']\n")
    )
    assert keys(draft)["added_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert draft.taken["special_tokens.eos_token"] == ["added_tokens", "chat_template"]
    assert "added_tokens" not in peers.read(write("a.yaml", chatml)).keys


FELT = {
    "axolotl": (AXOLOTL, "train_on_inputs: true", "train_on_inputs"),
    "an optimizer": (AXOLOTL, "optimizer: muon", "optimizer"),
    "a schedule": (AXOLOTL, "lr_scheduler: rex", "lr_scheduler"),
    "a shape": (AXOLOTL.replace("type: chat_template", "type: oasst"), "", "datasets.0.type"),
    "LLaMA-Factory": (LLAMA_FACTORY, "mask_history: true", "mask_history"),
    "bare texts": (LLAMA_FACTORY, "template: empty", "template"),
    "TRL": (TRL, "assistant_only_loss: false", "assistant_only_loss"),
    "a packing": (TRL, "packing: true\npacking_strategy: wrapped", "packing_strategy"),
    "torchtune": (TUNE, "shuffle: false", "shuffle"),
    "a limit of each epoch": (TUNE, "", "max_steps_per_epoch"),
    "an unknown key": (TRL, "moon: 1", "moon"),
    "an unknown switch": (TRL, "moon: false", "moon"),
}


@pytest.mark.parametrize("name", FELT)
def test_what_changes_results_is_told_and_written(name, write):
    text, more, key = FELT[name]
    draft = peers.read(write("a.yaml", f"{text}{more}\n"))
    assert key in draft.felt()
    assert f"#   {key}: " in (writing.write(draft, Path("out.yaml")) or Path("out.yaml").read_text())
    told = "\n".join(writing.told(draft))
    assert key in told.partition("results may differ")[2].partition("\nwithout meaning")[0]


def test_an_on_switch_that_is_on_is_no_loss(write):
    assert "shuffle" not in peers.read(write("a.yaml", f"{TUNE}shuffle: true\n")).lost


def test_noise_in_the_embedding_is_taken(write):
    assert (
        keys(peers.read(write("a.yaml", f"{AXOLOTL}neftune_noise_alpha: 5\n")))["trainer"]["neftune_noise_alpha"] == 5
    )


REFUSED = {
    "rl: kto": (AXOLOTL, "a.yaml: rl: trains by KTO, which is not here"),
    "reward_model: true": (AXOLOTL, "a.yaml: reward_model: trains by a reward model"),
    "stage: ppo": (LLAMA_FACTORY.replace("stage: sft\n", ""), "a.yaml: stage: trains by PPO"),
    "pref_loss: simpo": (LLAMA_FACTORY, "a.yaml: pref_loss: trains by SIMPO"),
    "finetuning_type: freeze": (LLAMA_FACTORY, "a.yaml: finetuning_type: trains by 'freeze'"),
    "num_generations: 8": (TRL, "a.yaml: num_generations: trains by GRPO"),
    "ppo_epochs: 1": (TUNE, "a.yaml: ppo_epochs: trains by PPO"),
    "infer_backend: vllm": (LLAMA_FACTORY.replace("dataset: chats.jsonl\n", ""), "a.yaml: starts no training"),
}


@pytest.mark.parametrize("more", REFUSED)
def test_a_method_that_is_not_here_is_named(more, write):
    text, said = REFUSED[more]
    with pytest.raises(UserError, match=re.escape(said)):
        peers.read(write("a.yaml", f"{text}{more}\n"))


def test_a_folders_name_tells_a_method(write):
    with pytest.raises(UserError, match="trains by ORPO, as its name says"):
        peers.read(write("orpo/config.yaml", f"{TRL}beta: 0.1\n"))
    assert peers.read(write("dpo/config.yaml", TRL)).stage == "dpo"
    assert peers.read(write("config.yaml", f"{TRL}beta: 0.1\n")).stage == "dpo"


def test_the_command(write, cordee):
    write("a.yaml", AXOLOTL)
    done = cordee("import", "a.yaml", "mine.yaml", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a.yaml: axolotl, supervised fine-tuning (posttrain.sft)\na step has 24 rows")
    assert "wrote mine.yaml" in done.stdout
    again = cordee("import", "a.yaml", "mine.yaml")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "mine.yaml: is there already" in again.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "model: [": "a.yaml:1: no valid YAML",
        "- 1": "a.yaml: holds no mapping",
        "name: x\nseed: 1": "a.yaml: its keys are of no trainer that is known; known: axolotl",
        "base_model: owner/model": "a.yaml: names no data to train on",
        f"{AXOLOTL}max_steps: many": "a.yaml: stages.sft.trainer.max_steps: ",
    }.items(),
)
def test_a_mistake_is_one_line(text, said, place, write, cordee):
    write("a.yaml", text)
    done = cordee("import", "a.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert not (place / "recipe.yaml").exists()
