"""Every way in which a recipe can be wrong gives one line with file, key, problem and the nearest right name."""

import pytest

from cordee import recipe
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
        ("seed: 3", "seed: 3\nseed: 4", "brook.yaml:4: no valid YAML: key 'seed' stands twice"),
        ("seed: 3", "seed: [3", "brook.yaml:4: no valid YAML"),
        ("name: brook", "name: ../brook", "name: must be a word"),
        ("text: no", "txet: no", "stages.spring.txet: unknown key; did you mean 'text'?"),
        ("number: 1e-3", "number: many", "stages.pool.number: Input should be a valid number"),
        ("number: 1e-3", "number: -1", "stages.pool.number: Input should be greater than 0, not -1"),
        ("$spring/line.txt", "$sprong", "stages.pool.source: $sprong refers to no stage; did you mean 'spring'?"),
        (
            "spring: {uses: toys.spring",
            "spring: {uses: pretrain.corpsu",
            "no stage 'pretrain.corpsu'; did you mean 'pretrain.corpus'?",
        ),
        ("spring: {uses: toys.spring", "spring: {uses: json.decoder", "module 'json.decoder' is no stage"),
        ("spring: {uses: toys.spring", "spring: {use: toys.spring", "stages.spring: a stage needs `uses: room.module`"),
        ("text: no", "source: $pool", "circle: spring → pool → spring"),
        ("text: no", "source: $spring", "circle: spring → spring"),
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
    ],
)
def test_a_librarys_keys_are_checked_against_its_own_dataclass(write, trainer, message):
    with pytest.raises(UserError) as caught:
        recipe.load(write("tune.yaml", LIBRARY.replace("TRAINER", trainer)))
    assert message in str(caught.value)


def test_the_fields_that_are_read_from_source_are_those_of_the_imported_dataclass():
    import dataclasses

    from peft import LoraConfig
    from trl import DPOConfig, SFTConfig

    from cordee.peek import dataclass_fields

    for library, name in ((SFTConfig, "trl.SFTConfig"), (DPOConfig, "trl.DPOConfig"), (LoraConfig, "peft.LoraConfig")):
        assert set(dataclass_fields(name)) == {field.name for field in dataclasses.fields(library)}
