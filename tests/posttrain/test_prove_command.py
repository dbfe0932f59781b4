"""`cordee prove` on a recipe of one's own: the proofs that apply run, the others are named."""

from chat_samples import some_chats, write_parquet

MINE = """
name: mine
seed: 1
stages:
  sft: {{uses: posttrain.sft, model: {model}, data: [{{path: chats.parquet}}], global_batch_size: 8,
        trainer: {{learning_rate: 1e-5, max_length: 128, num_train_epochs: 1}}}}
"""


def test_a_recipe_with_one_stage_is_proven_without_a_report(cordee, write, model_folder, tmp_path):
    write_parquet(tmp_path / "chats.parquet", some_chats(8))
    write("mine.yaml", MINE.format(model=model_folder))
    proven = cordee("prove", "mine.yaml", timeout=300)
    assert proven.returncode == 0, proven.stderr
    assert "parity: not run, no stage uses posttrain.merge" in proven.stdout
    assert "resume: not run, no stage uses pretrain.train" in proven.stdout
    assert "mine/prove-masks-sft@1: " in proven.stdout
    again = cordee("prove", "mine.yaml", "masks")
    assert (again.returncode, again.stderr) == (0, "")


def test_a_proof_that_was_named_and_does_not_apply_is_a_mistake(cordee, write, model_folder, tmp_path):
    write_parquet(tmp_path / "chats.parquet", some_chats(8))
    write("mine.yaml", MINE.format(model=model_folder))
    proven = cordee("prove", "mine.yaml", "parity")
    assert proven.returncode == 2
    assert "has no stage that uses posttrain.merge, which 'parity' applies to" in proven.stderr


def test_a_recipe_that_no_proof_speaks_of_is_a_mistake(cordee, write):
    write("brook.yaml", "name: brook\nstages:\n  spring: {uses: toys.spring}\n")
    proven = cordee("prove", "brook.yaml")
    assert (proven.returncode, proven.stderr.count("\n")) == (2, 1)
    assert "brook.yaml: stages: has no stage that a proof applies to; they apply to " in proven.stderr


def test_a_merge_that_names_its_adapter_alone_can_be_proven_and_cleaned_after(cordee, write, model_folder, tmp_path):
    write_parquet(tmp_path / "chats.parquet", some_chats(8))
    merged = "  merged: {uses: posttrain.merge, adapter: $sft}\n"
    write("mine.yaml", MINE.format(model=model_folder).replace("global_batch", "lora: {r: 2}, global_batch") + merged)
    cleaned = cordee("clean", "mine.yaml")
    assert (cleaned.returncode, cleaned.stderr) == (0, "")
