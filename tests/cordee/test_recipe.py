"""Every way in which a recipe can be wrong gives one line with file, key, problem and the nearest right name."""

import pytest

from cordee import plan, recipe
from cordee.artifact import Store
from cordee.errors import UserError

GOOD = """
name: brook
seed: 3
stages:
  spring: {uses: toys.spring, text: no}
  pool:   {uses: toys.spring, source: $spring/line.txt, number: 1e-3}
"""


def test_yaml_is_read_as_version_1_2(write):
    loaded = recipe.load(write("brook.yaml", GOOD))
    spring, pool = loaded.stages
    assert spring.config.text == "no"
    assert pool.config.number == 0.001
    assert pool.needs == ("spring",)


def test_stages_are_ordered_by_their_references_not_by_the_file(write):
    text = "name: a\nstages:\n  pool: {uses: toys.spring, source: $spring}\n  spring: {uses: toys.spring}\n"
    assert [item.name for item in recipe.load(write("a.yaml", text)).stages] == ["spring", "pool"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 3", "sead: 3", "sead: unknown key; did you mean 'seed'?"),
        ("seed: 3", "seed: three", "seed: must be a whole number, not 'three'"),
        ("seed: 3", "seed: 3\nseed: 4", "brook.yaml:4: no valid YAML: duplicate key 'seed'"),
        ("seed: 3", "seed: -1", "seed: must be at least 0 and less than 4294967296, not -1"),
        ("seed: 3", "seed: 4294967296", "seed: must be at least 0 and less than 4294967296"),
        ("seed: 3", "seed: 3 # \a", "brook.yaml:3: no valid YAML: character U+0007 is not allowed"),
        ("seed: 3", "seed: !!int three", "no valid YAML: a value is not what its tag says"),
        ("seed: 3", "seed: [3", "brook.yaml:4: no valid YAML"),
        ("name: brook", "name: ../brook", "name: must be a word"),
        ("text: no", "txet: no", "stages.spring.txet: unknown key; did you mean 'text'?"),
        ("number: 1e-3", "number: many", "stages.pool.number: Input should be a valid number"),
        ("number: 1e-3", "number: .inf", "stages.pool.number: Input should be a finite number, not inf"),
        ("number: 1e-3", "number: 1e999", "stages.pool.number: Input should be a finite number, not inf"),
        ("number: 1e-3", "number: nan", "stages.pool.number: Input should be a finite number, not 'nan'"),
        ("number: 1e-3", "number: -1", "stages.pool.number: Input should be greater than 0, not -1"),
        ("$spring/line.txt", "$sprong", "stages.pool.source: $sprong refers to no stage; did you mean 'spring'?"),
        (
            "spring: {uses: toys.spring",
            "spring: {uses: pretrain.corpsu",
            "no stage 'pretrain.corpsu'; did you mean 'pretrain.corpus'?",
        ),
        ("spring: {uses: toys.spring", "spring: {uses: json.decoder", "module 'json.decoder' is no stage"),
        (
            "spring: {uses: toys.spring",
            "spring: {use: toys.spring",
            "stages.spring: a stage needs `uses: package.module`",
        ),
        ("text: no", "source: $pool", "cycle: spring → pool → spring"),
        ("text: no", "source: $spring", "cycle: spring → spring"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(write, old, new, message):
    assert old in GOOD
    with pytest.raises(UserError) as caught:
        recipe.load(write("brook.yaml", GOOD.replace(old, new)))
    assert message in str(caught.value)
    assert "brook.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_names_the_nearest_one(write):
    path = write("brook.yaml", GOOD)
    with pytest.raises(UserError, match=r"No such file or directory; did you mean 'brook.yaml'\?"):
        recipe.load(path.with_name("brok.yaml"))


def test_a_recipe_that_is_no_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: Büchel".encode("latin-1"))
    with pytest.raises(UserError, match="no UTF-8 at byte 7"):
        recipe.load(path)


def test_overrides_are_read_as_yaml(write):
    loaded = recipe.load(write("brook.yaml", GOOD), ["pool.number=5e-4", "seed=7", "spring.text=true story"])
    assert (loaded.seed, loaded.stages[0].config.text, loaded.stages[1].config.number) == (7, "true story", 5e-4)
    assert loaded.document["stages"]["pool"]["number"] == 5e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pool", "'pool' is no key=value"),
        ("pol.number=1", "no stage 'pol'; did you mean 'pool'?"),
        ("pool.nmber=1", "stages.pool.nmber: unknown key; did you mean 'number'?"),
        ("pool.number.deep=1", "nothing to set below"),
        ("pool.text=[", "'[' is no YAML value"),
    ],
)
def test_a_wrong_override_is_one_line(write, override, message):
    with pytest.raises(UserError) as caught:
        recipe.load(write("brook.yaml", GOOD), [override])
    assert message in str(caught.value)


LIBRARY = """
name: tune
stages:
  sft: {uses: posttrain.sft, model: somewhere, data: [{path: chats.parquet}], global_batch_size: 8, trainer: {TRAINER}}
"""


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("learning_rtae: 1.0e-3", "stages.sft.trainer.learning_rtae: unknown key; did you mean 'learning_rate'?"),
        ("learning_rate: fast", "stages.sft.trainer.learning_rate: Input should be a valid number"),
        ("output_dir: elsewhere", "stages.sft.trainer.output_dir: the stage sets this itself"),
        ("packing: no", "stages.sft.trainer.packing: Input should be a valid boolean, not 'no'; write true or false"),
        ("packing: 1", "stages.sft.trainer.packing: Input should be a valid boolean, not 1; write true or false"),
        ('max_steps: "100"', "stages.sft.trainer.max_steps: Input should be a valid integer, not '100'"),
        ("learning_rate: .nan", "stages.sft.trainer.learning_rate: must be a finite number"),
        ("lr_scheduler_kwargs: {min_lr: .inf}", "stages.sft.trainer.lr_scheduler_kwargs: must be a finite number"),
        ("optim: !!binary YWRhbQ==", "stages.sft.trainer.optim: must be a finite number, a word, a list or a mapping"),
        ("learning_rate: 1", None),
        ("max_length: null, packing: false, lr_scheduler_kwargs: {min_lr: 1e-5}, optim_target_modules: [q, k]", None),
    ],
)
def test_a_librarys_keys_are_checked_against_its_own_dataclass(write, trainer, message):
    file = write("tune.yaml", LIBRARY.replace("TRAINER", trainer))
    if message is None:
        assert recipe.load(file).stages
        return
    with pytest.raises(UserError) as caught:
        recipe.load(file)
    assert message in str(caught.value)


def test_a_list_is_a_tuple_to_a_library(write):
    text = LIBRARY.replace("posttrain.sft", "posttrain.dpo").replace("TRAINER", "")
    lora = "}, lora: {layer_replication: [[0, 2], [1, 3]]}}"
    assert recipe.load(write("tune.yaml", text.replace("}}", lora))).stages[0].config.lora
    with pytest.raises(UserError, match=r"lora\.layer_replication: Input should be a valid array, not 2"):
        recipe.load(write("tune.yaml", text.replace("}}", "}, lora: {layer_replication: 2}}")))


def test_what_a_stages_own_check_says_is_the_whole_line(write):
    text = "name: a\nstages:\n  corpus: {uses: pretrain.corpus, source: data}\n"
    with pytest.raises(UserError, match=r"a\.yaml: stages\.corpus: give one of holdout and holdout_fraction$"):
        recipe.load(write("a.yaml", text))


TRAINING = """
name: training
stages:
  base: {uses: pretrain.train, model: model.yaml, data: [{tokens: tokens}], max_steps: 240, sequence_length: 256,
         global_batch_size: 16, learning_rate: 2e-3}
  sft:  {uses: posttrain.sft, model: $base, data: [{path: chats.jsonl}], global_batch_size: 8}
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "base.per_device_train_batch_size=32",
            "16 rows can't be divided by 32 rows in each of 1 process; per_device_train_batch_size=16 would do",
        ),
        (
            "base.per_device_train_batch_size=7",
            "stages.base.global_batch_size: 16 rows can't be divided by 7 rows in each of 1 process",
        ),
        (
            "sft.launch.num_processes=3",
            "stages.sft.global_batch_size: 8 rows can't be divided by 8 rows in each of 3 processes; no per_device",
        ),
        ("sft.launch.num_processes=16", "16 processes have to divide it"),
        ("base.save_steps=0", "stages.base.save_steps: 0 is not from 1 to the last step, 240"),
        ("base.save_steps=[120, 500]", "stages.base.save_steps: 500 is not from 1 to the last step, 240"),
        ("base.launch.config_file=fdsp2.yaml", "stages.base.launch.config_file: no file 'fdsp2.yaml'; did you mean"),
        ("base.launch.config_file=list.yaml", "list.yaml: launch.config_file: holds no mapping"),
        ("base.launch.config_file=broken.yaml", "broken.yaml:1: launch.config_file: no valid YAML"),
    ],
)
def test_keys_that_do_not_fit_each_other_are_found_before_anything_starts(
    write, tmp_path, monkeypatch, override, message
):
    monkeypatch.chdir(tmp_path)
    for name, text in (("fsdp2.yaml", "num_processes: 4"), ("list.yaml", "[1]"), ("broken.yaml", "a: [")):
        write(name, text)
    file = write("training.yaml", TRAINING)
    assert recipe.load(file, ["base.launch={num_processes: 4, config_file: fsdp2.yaml}",
                              "base.per_device_train_batch_size=4", "base.save_steps=[80, 240]"]).stages  # fmt: skip
    with pytest.raises(UserError) as caught:
        recipe.load(file, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("hidden_size: [", "model.yaml:1: model: no valid YAML"),
        ("- 256", "model.yaml: model: holds no mapping"),
        ("hidden_size: 256\nhidden_size: 128", "model.yaml:2: model: no valid YAML: duplicate key 'hidden_size'"),
        ("hidden_size: wide", "model.yaml: hidden_size: must be a whole number of at least 1, not 'wide'"),
        ("num_attention_heads: 0", "model.yaml: num_attention_heads: must be a whole number of at least 1, not 0"),
        (b"\xff\xfe", "model.yaml: model: no UTF-8 at byte 0"),
    ],
)
def test_a_models_yaml_that_is_wrong_is_one_line_in_the_plan(write, cordee, tmp_path, model, message):
    write("tokens/tokens.json", '{"vocab_size": 512}')
    write("chats.jsonl", '{"messages": []}\n')
    write("training.yaml", TRAINING)
    (tmp_path / "model.yaml").write_bytes(model if isinstance(model, bytes) else model.encode())
    planned = cordee("plan", "training.yaml")
    assert (planned.returncode, planned.stderr.count("\n")) == (2, 1), planned.stderr
    assert message in planned.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sft.model=tokens",
            "training.yaml: stages.sft: {}/tokens: model: is no Hugging Face model: it has no config.",
        ),
        ("sft.data.0.path=training.yaml", "training.yaml: stages.sft: {}/training.yaml: path: is no .parquet,"),
    ],
)
def test_what_a_stage_can_not_use_is_one_line_in_the_plan_before_anything_starts(
    write, cordee, tmp_path, override, message
):
    write("tokens/tokens.json", '{"vocab_size": 512}')
    write("chats.jsonl", '{"messages": []}\n')
    write("model.yaml", "hidden_size: 256")
    write("training.yaml", TRAINING)
    planned = cordee("plan", "training.yaml", override)
    assert (planned.returncode, planned.stderr.count("\n")) == (2, 1), planned.stderr
    assert planned.stderr.startswith(f"cordee: {message.format(tmp_path)}")


def test_a_models_yaml_that_leaves_fields_to_transformers_is_planned_without_its_size(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("tokens/tokens.json", '{"vocab_size": 512}')
    write("chats.jsonl", '{"messages": []}\n')
    write("model.yaml", "hidden_size: 256\nrms_norm_eps: 1e-5")
    base = plan.make(recipe.load(write("training.yaml", TRAINING)), Store(tmp_path / "runs")).stage("base")
    assert (base.cost.tokens, base.cost.vocab_size, base.cost.parameters) == (240 * 16 * 256, 512, None)


def test_the_fields_that_are_read_from_source_are_those_of_the_imported_dataclass():
    import dataclasses

    from peft import LoraConfig
    from trl import DPOConfig, SFTConfig

    from cordee.peek import dataclass_fields

    for library, name in ((SFTConfig, "trl.SFTConfig"), (DPOConfig, "trl.DPOConfig"), (LoraConfig, "peft.LoraConfig")):
        assert set(dataclass_fields(name)) == {field.name for field in dataclasses.fields(library)}
