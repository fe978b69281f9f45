"""Tasks: what rows become, and which rows are refused, in one line with file and row."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from aspo_lightning.errors import ConfigError
from aspo_lightning.policy.hub import load_config, load_tokenizer, resolve_model
from aspo_lightning.tasks import Dataset, Mixture, MultipleChoice, ReasoningGym
from aspo_lightning.tasks.base import training_prompts, without_long

SUMS = {"min_terms": 2, "max_terms": 2}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_reasoning_gym_rows_become_prompts_in_the_chat_format(tokenizer):
    task = ReasoningGym("chain_sum", size=3, seed=5, config=SUMS, system_prompt="Add.")
    prompts = task.prompts(tokenizer)
    assert [p.id for p in prompts] == ["chain_sum/5/0", "chain_sum/5/1", "chain_sum/5/2"]
    for prompt in prompts:
        assert prompt.text == f"<|system|>Add.<|user|>{prompt.row['question']}<|assistant|>"
        assert tokenizer.decode(prompt.prompt_ids) == prompt.text
        assert prompt.row["metadata"]["num_terms"] == 2
        assert prompt.rewards == {"aspo_lightning.rewards.reasoning_gym.reward": 1.0}
    assert [p.prompt_ids for p in task.prompts(tokenizer)] == [p.prompt_ids for p in prompts]


def test_levels_make_a_task_harder(tokenizer):
    levels = [{"min_digits": d, "max_digits": d} for d in (1, 3)]
    prompts = ReasoningGym("chain_sum", size=2, config=SUMS, levels=levels).prompts(tokenizer)
    assert [(p.id, p.level) for p in prompts] == [(f"chain_sum/0/{i}/level{v}", v) for v in (0, 1) for i in (0, 1)]
    digits = [max(len(w) for w in p.row["question"].split() if w.isdigit()) for p in prompts]
    assert digits == [1, 1, 3, 3]


def test_without_chat_a_prompt_is_plain_text(tokenizer):
    (prompt,) = ReasoningGym("chain_sum", size=1, chat=False).prompts(tokenizer)
    assert prompt.text == prompt.row["question"]
    (prompt,) = ReasoningGym("chain_sum", size=1, chat=False, system_prompt="Add.").prompts(tokenizer)
    assert prompt.text == f"Add.\n\n{prompt.row['question']}"


def test_thinking_is_the_templates_to_switch(tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}[no thinking]{% endif %}"
    )
    path = write(tmp_path / "a.jsonl", {"question": "1+1", "answer": 2})
    texts = [Dataset(path, thinking=thinking).prompts(tokenizer)[0].text for thinking in (None, True, False)]
    assert texts == ["1+1", "1+1", "1+1[no thinking]"]


def test_replies_of_an_environment_are_framed_as_the_template_frames_them(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "1+1", "answer": 2})
    (chat,) = Dataset(path, environment="tests.support.guessing_game.environment").prompts(tokenizer)
    assert (chat.before_reply, chat.after_reply) == ("<|user|>", "<|assistant|>")
    (plain,) = Dataset(path, environment="tests.support.guessing_game.environment", chat=False).prompts(tokenizer)
    assert (plain.before_reply, plain.after_reply) == ("\n", "\n")
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (chat,) = Dataset(path, environment="tests.support.guessing_game.environment").prompts(other)
    assert (chat.before_reply, chat.after_reply) == ("\n[user]", "</s>\n[assistant]")  # </s> is sampled


ROWS = [{"problem": "1+1", "solution": 2, "source": "x"}, {"problem": "2+2", "solution": 4, "source": "y"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "saved splits"])
def test_rows_of_a_dataset(tokenizer, tmp_path, kind):
    if kind == "jsonl":
        path = write(tmp_path / "sums.jsonl", *ROWS)
    elif kind == "parquet":
        path = str(tmp_path / "sums.parquet")
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path = str(tmp_path / "sums")
        saved = datasets.Dataset.from_list(ROWS)
        (datasets.DatasetDict({"train": saved}) if kind == "saved splits" else saved).save_to_disk(path)
    prompts = Dataset(path, "problem", "solution", template="{question} = \\boxed{}", chat=False).prompts(tokenizer)
    name = path.rpartition("/")[2]
    assert [(p.id, p.text) for p in prompts] == [(f"{name}/1", r"1+1 = \boxed{}"), (f"{name}/2", r"2+2 = \boxed{}")]
    assert prompts[0].row == {**ROWS[0], "answer": 2}


def test_columns_are_paths_and_may_be_several(tokenizer, tmp_path):
    row = {
        "prompt": [{"content": "What is 1+1?"}],
        "note": "Think.",
        "nothing": None,
        "tests": {"public": [1], "private": [2], "hidden": []},
        "name": "a",
    }
    task = Dataset(
        write(tmp_path / "a.jsonl", row),
        question=["prompt.0.content", "nothing", "note"],
        answer=["tests.public", "tests.private", "tests.hidden"],
        id="name",
        chat=False,
    )
    (prompt,) = task.prompts(tokenizer)
    assert (prompt.id, prompt.text, prompt.row["answer"]) == ("a", "What is 1+1?\n\nThink.", [[1], [2]])


def test_options_of_multiple_choice(tokenizer, tmp_path):
    gpqa = {"Question": "Which?", "Correct Answer": "yes\n", "Incorrect Answer 1": "no", "Incorrect Answer 2": "maybe"}
    columns = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2"]
    rows = [{**gpqa, "Question": f"Which {i}?"} for i in range(30)]
    task = MultipleChoice(write(tmp_path / "a.jsonl", *rows), options=columns, question="Question", chat=False)
    prompts = task.prompts(tokenizer)
    letters = [p.row["answer"] for p in prompts]
    assert set(letters) == {"A", "B", "C"}
    for prompt, letter in zip(prompts, letters, strict=True):
        lines = prompt.text.splitlines()
        assert f"{letter}. yes" in lines
        assert [line[:3] for line in lines[2:5]] == ["A. ", "B. ", "C. "]
    assert [p.row["answer"] for p in task.prompts(tokenizer)] == letters
    listed = {"question": "Which?", "options": ["a", "b", "c"]}
    for answer, letter in (("B", "B"), (1, "B"), ("2", "B"), ("c", "C")):
        path = write(tmp_path / "b.jsonl", {**listed, "key": answer})
        (prompt,) = MultipleChoice(path, options="options", answer="key", chat=False).prompts(tokenizer)
        assert prompt.row["answer"] == letter
        assert "A. a\nB. b\nC. c\n" in prompt.text
    for broken in ({"Question": "\ud835"}, {"Incorrect Answer 1": "\ud835"}):
        task = MultipleChoice(write(tmp_path / "d.jsonl", {**gpqa, **broken}), options=columns, question="Question")
        with pytest.raises(ConfigError, match=r"d.jsonl:1 has half of a surrogate pair"):
            task.prompts(tokenizer)
    path = write(tmp_path / "e.jsonl", {"question": "x", "answer": "1", "name": "\ud835"})
    with pytest.raises(ConfigError, match=r"e.jsonl:1 has half of a surrogate pair"):
        Dataset(path, id="name").prompts(tokenizer)
    path = write(tmp_path / "c.jsonl", {**listed, "key": "D"})
    with pytest.raises(ConfigError, match=r"c.jsonl:1: 'key' is 'D', which is none of the options"):
        MultipleChoice(path, options="options", answer="key").prompts(tokenizer)
    path = write(tmp_path / "d.jsonl", {**listed, "key": -1})
    with pytest.raises(ConfigError, match=r"'key' is -1, which is none of the options"):
        MultipleChoice(path, options="options", answer="key").prompts(tokenizer)
    with pytest.raises(ConfigError, match="Give either a list of columns"):
        MultipleChoice(path, options="options")


def test_mixtures_go_through_their_tasks_by_weight(tokenizer, tmp_path):
    rows = [{"question": f"{i}+1", "answer": i + 1} for i in range(8)]
    one = Dataset(write(tmp_path / "a.jsonl", *rows[:4]))
    two = Dataset(write(tmp_path / "b.jsonl", *rows[4:]), reward={"tests.support.rewards.parity": 0.5})
    mixture = Mixture({"one": one, "two": two}, {"one": 2.5})
    prompts = mixture.prompts(tokenizer)
    ids = [p.id for p in prompts]
    assert len(set(ids)) == len(ids) == 2 * 4 + 2 + 4
    counts = [sum(p.text == first.text and p.id.startswith("one") for p in prompts) for first in prompts[:4]]
    assert sorted(counts) == [2, 2, 3, 3]
    assert ids == [p.id for p in mixture.prompts(tokenizer)]
    assert [p.rewards for p in prompts if p.id.startswith("two")] == [{"tests.support.rewards.parity": 0.5}] * 4
    assert mixture.functions() == {"aspo_lightning.rewards.math.reward", "tests.support.rewards.parity"}
    with pytest.raises(ConfigError, match=r"names \['three'\]"):
        Mixture({"one": one}, {"three": 1})
    with pytest.raises(ConfigError, match=r"weights.one is -1"):
        Mixture({"one": one}, {"one": -1})
    with pytest.raises(ConfigError, match=r"weights.one is inf; it must be finite"):
        Mixture({"one": one}, {"one": float("inf")})


def dropped(caplog):
    """What was told of dropped prompts."""
    return [message for message in caplog.messages if message.startswith("Dropped")]


def test_equal_prompts_are_dropped_before_they_are_tokenized(tokenizer, tmp_path, caplog):
    calls = []

    class Counting(type(tokenizer)):
        def __call__(self, *args, **kwargs):
            calls.append(args)
            return super().__call__(*args, **kwargs)

    counting = Counting.from_pretrained(tokenizer.name_or_path)
    rows = [{"question": f"{i % 3}+1", "answer": i} for i in range(300)]
    with caplog.at_level("INFO"):
        prompts = Dataset(write(tmp_path / "a.jsonl", *rows)).prompts(counting)
    assert [(p.id, p.row["answer"]) for p in prompts] == [("a.jsonl/1", 0), ("a.jsonl/2", 1), ("a.jsonl/3", 2)]
    assert len(calls) == 3
    assert dropped(caplog) == ["Dropped 297 of 300 prompts: the same as an earlier one"]


def test_a_mixture_has_each_prompt_once_unless_its_weights_repeat_it(tokenizer, tmp_path, caplog):
    def task(name, *questions):
        return Dataset(write(tmp_path / f"{name}.jsonl", *({"question": q, "answer": 1} for q in questions)))

    a, b, c = task("a", "1+1", "1+1", "2+2"), task("b", "2+2", "3+3"), task("c", "1+1", "3+3", "4+4")
    inner = Mixture({"a": a, "b": b}, {"a": 2})
    with caplog.at_level("INFO"):
        prompts = Mixture({"inner": inner, "c": c}).prompts(tokenizer)
    assert [(p.id, p.question) for p in prompts] == [
        ("inner/a/a.jsonl/1", "1+1"),
        ("inner/a/a.jsonl/3", "2+2"),
        ("inner/a/a.jsonl/1#1", "1+1"),
        ("inner/a/a.jsonl/3#1", "2+2"),
        ("inner/b/b.jsonl/2", "3+3"),
        ("c/c.jsonl/3", "4+4"),
    ]
    assert dropped(caplog) == [
        "Dropped 1 of 3 prompts: the same as an earlier one",
        "Dropped 1 of 2 prompts: b shares them with tasks before it in the mixture",
        "Dropped 2 of 3 prompts: c shares them with tasks before it in the mixture",
    ]
    # What is left out of the mixture takes nothing from the rest of it.
    assert [p.question for p in Mixture({"a": a, "b": b}, {"a": 0}).prompts(tokenizer)] == ["2+2", "3+3"]


def test_held_out_problems_are_known_again_whatever_is_around_them(tokenizer, tmp_path, caplog):
    questions = ["What is  $2+2$ ?", "what is $2 + 2$?", "What is $2+3$?", "Is 12 = 1 2?", "Is 1 2 = 12?"]
    path = write(tmp_path / "a.jsonl", *({"question": q, "answer": 4} for q in questions))
    train = Mixture({"a": Dataset(path, template="{question} Think.", system_prompt="Solve.")}, {"a": 2})
    held_out = Dataset(
        write(
            tmp_path / "b.jsonl", {"problem": "WHAT is $2+2$?\n", "answer": "4"}, {"problem": "Is 12=12?", "answer": 1}
        ),
        question="problem",
        template="Problem: {question}",
        chat=False,
    )
    prompts = train.prompts(tokenizer)
    with caplog.at_level("INFO"):
        left = training_prompts(prompts, [[], held_out.prompts(tokenizer)])
    assert [p.question for p in left] == questions[2:] * 2
    assert dropped(caplog) == ["Dropped 4 of 10 prompts: their problems are held out for evaluation"]
    options = MultipleChoice(
        write(tmp_path / "c.jsonl", {"question": "Which?", "options": ["a", "b"], "answer": "A"}),
        options="options",
        answer="answer",
        template="{question}\n\nEnd with the letter.",
    )
    assert [p.question for p in options.prompts(tokenizer)] == ["Which?\n\nA. a\nB. b"]


def test_long_prompts_are_dropped_and_a_task_of_nothing_else_is_refused(tokenizer, tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", *({"question": "1" * n, "answer": 1} for n in (3, 8, 9)))
    prompts = Dataset(path, chat=False).prompts(tokenizer)
    with caplog.at_level("INFO"):
        assert [len(p.prompt_ids) for p in without_long(prompts, 8, "data.train")] == [3, 8]
    assert dropped(caplog) == ["Dropped 1 of 3 prompts: over 8 tokens"]
    message = "All 3 prompts of data.val.sums are over data.max_prompt_length 2: the shortest has 3 tokens. Raise it."
    with pytest.raises(ConfigError, match=message):
        without_long(prompts, 2, "data.val.sums")
    with pytest.raises(ConfigError, match="data.train has no prompts: an empty task"):
        without_long([], 2, "data.train")


BAD_ROWS = {
    "empty file": (b"", "has no rows: an empty task"),
    "missing column": (b'{"question": "1+1"}', "sums.jsonl:1 has no 'answer'. Its columns are question"),
    "empty answer": (b'{"question": "1+1", "answer": " "}', "sums.jsonl:1: 'answer' is empty"),
    "null answer": (b'{"question": "1+1", "answer": null}', "sums.jsonl:1: 'answer' is empty"),
    "NaN answer": (b'{"question": "1+1", "answer": NaN}', "sums.jsonl:1: 'answer' is empty"),
    "wrong type": (b'{"question": 5, "answer": "5"}', "sums.jsonl:1: 'question' is a int"),
    "no object": (b'{"question": "1+1", "answer": 2}\n[1]', "sums.jsonl:2 is a list"),
    "no JSON": (b'{"question": "1+1", "answer": 2}\n{', "sums.jsonl:2 isn't JSON"),
    "deep": (b"[" * 200_000, "sums.jsonl:1 isn't JSON"),
    "half a surrogate pair": (b'{"question": "\\ud835 x", "answer": 2}', "sums.jsonl:1 has half of a surrogate pair"),
    "half of one in an answer": (b'{"question": "x", "answer": ["\\ud835"]}', "sums.jsonl:1 has half of a surrogate"),
    "half of one in a list": (
        b'{"question": "x", "answer": {"a": ["\\ud835"]}}',
        "sums.jsonl:1 has half of a surrogate",
    ),
    "no UTF-8": (b'{"question": "1+1", "answer": 2}\n\n{"question": "\xff"}', "sums.jsonl:3 isn't UTF-8"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_with_their_place(tokenizer, tmp_path, name):
    content, message = BAD_ROWS[name]
    path = tmp_path / "sums.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        Dataset(str(path)).prompts(tokenizer)
    assert "\n" not in str(error.value)


def test_levels_of_a_dataset(tokenizer, tmp_path):
    rows = [{"question": "1+1", "answer": 2, "level": "Level 5", "hard": 3}]
    (prompt,) = Dataset(write(tmp_path / "a.jsonl", *rows)).prompts(tokenizer)
    assert prompt.level == 0
    (prompt,) = Dataset(write(tmp_path / "a.jsonl", *rows), level="hard").prompts(tokenizer)
    assert prompt.level == 3
    with pytest.raises(ConfigError, match=r"a.jsonl:1: 'level' is 'Level 5'; a level must be a whole number"):
        Dataset(write(tmp_path / "a.jsonl", *rows), level="level").prompts(tokenizer)


def test_double_ids_are_refused(tokenizer, tmp_path):
    rows = [{"question": "1+1", "answer": 2, "name": name} for name in ("a", "b", "a")]
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(ConfigError, match=r"a.jsonl:3 has the id 'a', which .*a.jsonl:1 has too"):
        Dataset(path, id="name").prompts(tokenizer)


@pytest.mark.parametrize("size", [0, 10, 700])
def test_a_truncated_parquet_file_is_refused(tokenizer, tmp_path, size):
    path = tmp_path / "sums.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": f"{i}+1", "answer": i} for i in range(100)]), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match="sums.parquet can't be read") as error:
        Dataset(str(path)).prompts(tokenizer)
    assert "\n" not in str(error.value)


def test_unusable_tasks_are_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="doesn't exist"):
        Dataset(str(tmp_path / "none.jsonl")).prompts(tokenizer)
    with pytest.raises(ConfigError, match=r"The dataset 'some/name' .* can't be loaded"):
        Dataset("some/name").prompts(tokenizer)
    for path in ("hf://datasets/x", "hf://owner/name/file.jsonl", "hf://datasets/owner/name/file.csv"):
        with pytest.raises(ConfigError, match="must be like hf://datasets/OWNER/NAME/FILE.jsonl"):
            Dataset(path).prompts(tokenizer)
    with pytest.raises(ConfigError, match="must hold {question}"):
        Dataset("a.jsonl", template="Solve it.")
    with pytest.raises(ConfigError, match="at least one reward"):
        Dataset("a.jsonl", reward={})
    with pytest.raises(ConfigError, match="empty task"):
        ReasoningGym("chain_sum", size=0)
    with pytest.raises(ConfigError, match="levels is an empty list"):
        ReasoningGym("chain_sum", size=1, levels=[])
    with pytest.raises(ConfigError, match="'no_such_task'"):
        ReasoningGym("no_such_task", size=1).prompts(tokenizer)
    with pytest.raises(ConfigError, match="no_such_key"):
        ReasoningGym("chain_sum", size=1, config={"no_such_key": 1}).prompts(tokenizer)


def test_models_are_found_before_they_are_loaded(tiny_model, tmp_path):
    assert resolve_model(tiny_model) == tiny_model
    assert resolve_model("some/hub-name") == "some/hub-name"
    with pytest.raises(ConfigError, match="doesn't exist"):
        resolve_model(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_config(str(tmp_path))
    assert load_config(tiny_model).hidden_size == 64
