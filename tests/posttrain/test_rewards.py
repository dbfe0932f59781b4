"""Each reward function gives what it says, whoever calls it: this project, a user, or TRL."""

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from reward_samples import answer, written

from cordee.config import Input
from cordee.errors import Fault, UserError
from posttrain.rewards import languages, numbers, opening
from posttrain.rewards.answers import Answer, split
from posttrain.rewards.settings import Reward

ROOT = Path(__file__).parents[2]


MINE = """
def brevity(completions, most, **kwargs):
    return [float(len(said[0]["content"]) <= most) for said in completions]

def make(power):
    def f(completions, **kwargs):
        return [len(said) ** power for said in completions]
    return f

def broken(completions, **kwargs):
    return [float("nan")] * len(completions)

def short(completions, **kwargs):
    return [1.0]

def words(completions, **kwargs):
    return ["good"] * len(completions)

def within(completions, max_length=1, batch_size=8, compare=True, **kwargs):
    return [float(len(said[0]["content"]) <= max_length) + 10 * compare + batch_size for said in completions]
"""


def think_is_of_trl() -> bool:
    """Of an installed package the manifest has the version, and the identity no file."""
    return Reward.model_validate({"function": "trl.rewards:think_format_reward"}).code is None


def opened(**keys: Any) -> opening.Opened:
    return opening.open_reward(Reward.model_validate(keys), lambda _: None)


def called(said_of: list[str], columns: dict[str, list[Any]], **keys: Any) -> list[float | None]:
    """As TRL calls a function: with messages, and with texts, which has to give the same."""
    one = opened(**keys)
    prompts = [[{"role": "user", "content": "?"}] for _ in said_of]
    said = [[{"role": "assistant", "content": text}] for text in said_of]
    found = one(prompts=prompts, completions=said, completion_ids=[[1] * len(text) for text in said_of], **columns)
    assert found == one(["?"] * len(said_of), said_of, [[1] * len(text) for text in said_of], **columns)
    return found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6 * 7 = 42\n#### 42", 42), ("#### 1,234 apples, not 5", 1234), ("#### -3.50", Fraction(-7, 2)),
        ("so it is $1,234.50.", Fraction(2469, 2)), ("\\boxed{\\frac{3}{4}} of 9", Fraction(3, 4)),
        ("\\boxed{x = \\dfrac{-1}{2}}", Fraction(-1, 2)), ("10-5 = -5", -5), ("10-5", 5),
        ("it costs \u22127", -7), ("3/4", Fraction(3, 4)),
        ("1 1/2 cups", Fraction(3, 2)), ("5km", 5), ("GPT4 has none", None), ("", None), ("1/0", None),
        ("about 1e3", 1000), ("-$3.50", Fraction(-7, 2)), ("50%", 50), ("1,2,3", 3), ("\\boxed{{7}} and 8", 7),
        ("####", None), ("\\boxed{none} 5", None),
    ],
)  # fmt: skip
def test_the_number_that_an_answer_gives(text: str, value: Any) -> None:
    assert numbers.last_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{9{,}500}", 9500), (r"$9{,}500$", 9500), (r"\boxed{10\,000}", 10000), (r"\boxed{306,\!956}", 306956),
        (r"\boxed{3{,}000}", 3000), ("12 cm^2", 12), ("15 cm^{2}", 15), ("#### - 5", -5),
        (r"\boxed{- 1/2}", Fraction(-1, 2)), (r"\boxed{\frac12}", Fraction(1, 2)), ("#### 1 000 000", 1000000),
        ("1'000'000 francs", 1000000), ("#### Step 1\nThe answer is 7.", 7), ("10 - 5", 5), ("2^3 = 8", 8),
        ("pages 5 100", 100),
    ],
)  # fmt: skip
def test_numbers_as_models_write_them(text: str, value: Any) -> None:
    assert numbers.last_number(text) == value


def test_an_answer_is_right_as_a_text() -> None:
    columns = {"answer": ["German", "German", ["German", "Deutsch"], None, 7]}
    said = [" german. ", "French", "Deutsch", "x", "7"]
    assert called(said, columns, function="exact_match") == [1, 0, 1, None, 1]


def test_an_answer_is_right_by_a_pattern() -> None:
    columns = {"answer": ["B", "B", "B", None]}
    said = ["(A) no, (B)", "(B) no, (A)", "B", "(B)"]
    assert called(said, columns, function="regex_match", pattern=r"\((\w)\)") == [1, 0, 0, None]
    assert called(["A7", "7"], {"answer": ["A7", "A7"]}, function="regex_match", pattern=r"[A-Z]\d") == [1, 0]
    assert called(["Label: 0", "Label: 1"], {"answer": [0, 0]}, function="regex_match", pattern=r"\d") == [1, 0]


def test_an_answer_is_right_as_a_number() -> None:
    columns = {"answer": ["x\n#### 1,000", "0.5", "no number", None, "3"]}
    said = ["#### 1000.0", "a half is 1/2", "7", "7", "I don't know"]
    assert called(said, columns, function="number_match") == [1, 1, None, None, 0]
    assert called(["3.14", "3.0"], {"answer": ["3.14159"] * 2}, function="number_match", tolerance=0.01) == [1, 0]


def test_an_answer_has_a_form_and_a_length() -> None:
    said = ["<think>a\nb</think> c", "c <think></think>"]
    assert called(said, {}, function="format_match", pattern="<think>.*</think> .+") == [1, 0]
    assert called(["one two", "one", ""], {}, function="length_between", least=1, most=1) == [0, 1, 0]
    assert called(["äöü"], {}, function="length_between", most=3, unit="characters") == [1]
    assert called(["äöü"], {}, function="length_between", most=2, unit="tokens") == [0]
    row = answer(1, "7", "7", tokens=3)
    one = Answer(Path("a"), 1, row, *split(row, as_text=False), 0)
    assert opened(function="length_between", most=3, unit="tokens").of([one]) == [{"reward": 1.0}]
    (row.pop("tokens"),)
    with pytest.raises(UserError, match="the rows have no column `tokens`"):
        opened(function="length_between", most=3, unit="tokens").of([one])


def test_code_passes_its_tests_in_the_sandbox(tmp_path: Path) -> None:
    good = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    bad = good.replace("a + b", "a - b")
    leaves = f"```python\nopen({str(tmp_path / 'x')!r}, 'w')\ndef add(a, b): return a + b\n```"
    loop = "```\nwhile True: pass\n```"
    columns = {"tests": ["assert add(1, 2) == 3"] * 4 + [None]}
    found = called([good, bad, leaves, loop, good], columns, function="passes_tests", seconds=2)
    assert found == [1, 0, 0, 0, None]
    assert list(tmp_path.iterdir()) == []


def test_math_without_math_verify_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="math-verify is not installed; pip install math-verify; number_match"):
        opened(function="math_match")


def test_math_is_compared_by_math_verify() -> None:
    pytest.importorskip("math_verify", reason="pip install math-verify")
    said = [r"$\frac{1}{2}$", r"$\{3, 1\}$", "$x=4$"]
    columns = {"answer": ["$0.5$", r"$\{1, 3\}$", "$5$"]}
    assert called(said, columns, function="math_match") == [1, 1, 0]


def test_languages_are_told_apart_by_texts_that_are_given(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    tags = {"de", "fr", "it", "en", "rm-sursilv", "ru", "uk", "el", "zh", "ja", "ar", "fa", "hi", "tr", "fi", "vi"}
    rows = pq.read_table(ROOT / "data" / "udhr.parquet").to_pylist()
    known, asked = (
        [row for row in rows if row["language"] in tags and ((row["article"] or 0) >= 25) == late]
        for late in (False, True)
    )
    file = written(tmp_path / "texts.jsonl", [{"text": row["text"], "language": row["language"]} for row in known])
    keys = {"function": "language_match", "texts": str(file)}
    said, right = [row["text"][:100] for row in asked], [row["language"] for row in asked]
    found = called(said, {"language": right}, **keys)
    assert sum(found) / len(found) > 0.97
    wrong = called(said, {"language": ["fi"] * len(said)}, **keys)
    assert sum(wrong) == pytest.approx(right.count("fi"), abs=2)
    assert called(["12 + 3", ""], {"language": ["de", "de"]}, **keys) == [None, None]
    with pytest.raises(UserError, match="has no text in 'rm'"):
        called(["x"], {"language": ["rm"]}, **keys)
    assert languages.known(Input(file)) is languages.known(Input(file)), "read once"


def test_a_file_among_arguments_is_part_of_the_identity() -> None:
    reward = Reward.model_validate({"function": "language_match", "texts": "$corpus/train.parquet"})
    assert reward.arguments == {"texts": Input("$corpus/train.parquet")}
    assert Reward.model_validate(reward.model_dump(mode="json")) == reward


def test_functions_of_trl_and_of_a_user_work_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    said = [[{"role": "assistant", "content": "<think>\na\n</think>\nb"}], [{"role": "assistant", "content": "b"}]]
    think = opened(function="trl.rewards:think_format_reward", name="think")
    assert (think(["?"] * 2, said), think.__name__) == ([1.0, 0.0], "think")
    punished = opened(function="trl.rewards:get_soft_overlong_punishment", max_completion_len=4, soft_punish_cache=2)
    assert punished(["?"] * 3, said + said[:1], [[1] * 2, [1] * 3, [1] * 5]) == [0, -0.5, -1]
    rows = [answer(1, "7", "7")]
    one = Answer(Path("a"), 1, rows[0], *split(rows[0], as_text=False), 0)
    with pytest.raises(UserError, match="needs the column 'completion_ids'"):
        punished.of([one])
    assert Reward.model_validate({"function": "mine:brevity"}).code == Input(tmp_path / "mine.py")
    assert think_is_of_trl()
    assert opened(function="mine:brevity", most=2)(["?"] * 2, said) == [0.0, 1.0]
    assert opened(function="mine:make", power=2)(["?"], said[:1]) == [1.0]
    for name, message in (
        ("broken", "gives nan"),
        ("short", "1 values for 2"),
        ("words", "that is not a number"),
    ):
        with pytest.raises(Fault, match=message):
            opened(function=f"mine:{name}")(["?"] * 2, said)


def test_an_argument_that_models_have_a_key_for_reaches_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    said = [[{"role": "assistant", "content": "four"}]]
    keys = {"function": "own:within", "max_length": 200, "batch_size": 16, "compare": False}  # 16: a model's default
    assert opened(**keys)(["?"], said) == [17.0]
    assert opened(function="own:within")(["?"], said) == [18.0]
    for given in (keys, {"function": "own:within"}):
        reward = Reward.model_validate(given)
        assert Reward.model_validate(reward.model_dump(mode="json")) == reward, "as job.json is read"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"function": "exact_match", "dtype": "float32"}, "dtype: exact_match has no such argument"),
        ({"function": "exact_match", "batch_size": 4}, "batch_size: exact_match has no such argument"),
        ({"function": "exact_match", "compare": True}, "compare: exact_match has no such argument"),
        ({"model": "m", "arguments": {"most": 3}}, "arguments is for a function, and this is a model"),
        ({"judge": "m", "arguments": {"most": 3}}, "arguments is for a function, and this is a judge"),
        ({"judge": "m", "code": "mine.py"}, "code is for a function, and this is a judge"),
        ({"model": "m", "compare": True}, "compare is for a judge, and this is a model"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reward.model_validate(keys)


def test_rewards_are_summed_by_weight_where_they_apply() -> None:
    weights = {"a": 1.0, "b": 0.5, "c": -2.0}
    assert opening.total({"a": 1.0, "b": None, "c": 0.25}, weights) == 0.5
    assert opening.total(dict.fromkeys(weights), weights) is None
    assert opening.total({"a": None, "d": 1.0}, {**weights, "d": 0.0}) is None, (
        "a reward without weight decides nothing"
    )


def test_trl_calls_them_in_its_own_trainer(model_folder: Path, tmp_path: Path) -> None:
    """It takes a reward's name for its logs, and hands over the rows' columns and its own; None is NaN there."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": [{"role": "user", "content": "?"}], "answer": right} for right in ("7", "8", "none")]
    keys = {"per_device_train_batch_size": 2, "num_generations": 2, "bf16": False, "use_cpu": True, "report_to": []}
    trainer = GRPOTrainer(
        str(model_folder), [opened(function="number_match", name="correct"), opened(function="exact_match")],
        GRPOConfig(str(tmp_path), **keys), Dataset.from_list(rows),
    )  # fmt: skip
    said = [[{"role": "assistant", "content": "7"}]] * 3
    found = trainer._calculate_rewards(rows, [row["prompt"] for row in rows], said, [[1]] * 3)
    assert trainer.reward_func_names == ["correct", "exact_match"]
    assert found.nan_to_num(-1.0).tolist() == [[1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]]
