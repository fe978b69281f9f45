"""Anything at all as input: a clear error or a correct result, no hang, no bare traceback, no damaged file.

Together more than 2,000 cases.
"""

import copy
import json
import math
import pickle
import string
from dataclasses import fields

import pytest
import reasoning_gym
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aspo_lightning import ASPOModule, RolloutDataModule
from aspo_lightning.cli.export import export
from aspo_lightning.cli.parser import Parser
from aspo_lightning.cli.report import read_result
from aspo_lightning.errors import AspoError
from aspo_lightning.evaluation.results import check_folder, read_known
from aspo_lightning.rewards import RewardItem, RewardPool
from aspo_lightning.rollouts.settings import RolloutSettings
from aspo_lightning.run.checkpoints import AtomicCheckpointIO, trained_from
from aspo_lightning.run.disk import digest_path
from aspo_lightning.tasks import Dataset, MultipleChoice
from tests.support.configs import tiny_config
from tests.support.judging import judged

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["ASPO", "Shuffled", "drop", "auto", "", "../..", "nan", "1e400", "{}", "[", "null", "\0", "\ud800"]
    ),
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3))


def cases(count, seconds=10):
    """So many, each of which may take so long."""
    return settings(max_examples=count, deadline=1000 * seconds, suppress_health_check=list(HealthCheck), database=None)


def clear(error: AspoError) -> None:
    assert len(str(error)) > 20
    assert "Traceback" not in str(error)


@pytest.fixture(scope="module")
def parser():
    parser = Parser()
    parser.add_class_arguments(ASPOModule, "model", instantiate=True)
    parser.add_class_arguments(RolloutDataModule, "data", instantiate=True)
    return parser


MODEL = {"kl_coef", "kl_estimator", "entropy_coef", "dtype", "chunk_size", "lora_rank", "lora_alpha", "temperature"}
DATA = {"train", "val", "engine", "curriculum", *(f.name for f in fields(RolloutSettings))} - {"seed"}


@cases(400)
@given(section=st.sampled_from(["model", "data"]), draw=st.data())
def test_a_config_works_or_is_refused(parser, tiny_model, tmp_path_factory, section, draw):
    folder = tmp_path_factory.mktemp("fuzz")
    config = {k: v for k, v in tiny_config(tiny_model, folder).items() if k != "trainer"}
    config["data"]["model_name_or_path"] = tiny_model
    key = draw.draw(st.sampled_from(sorted(MODEL if section == "model" else DATA)))
    config[section][key] = value = draw.draw(VALUES)
    try:
        made = parser.instantiate(parser.parse_object(copy.deepcopy(config)))
    except AspoError as error:
        clear(error)
        return
    # What was taken is what was said, and no number that can't be computed with.
    assert not (isinstance(value, float) and not math.isfinite(value)), (key, value)
    assert made.data.settings.group_size >= 2
    assert made.data.settings.longest_sequence <= made.data.settings.micro_batch_tokens


ROW = st.dictionaries(st.sampled_from(["question", "answer", "id", "level", "x"]), VALUES, max_size=5)


@cases(500)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.lists(ROW, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
        st.lists(VALUES, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ),
    kind=st.sampled_from(["jsonl", "json", "jsonl.gz", "parquet"]),
    options=st.sampled_from(
        [{}, {"level": "level"}, {"id": "id"}, {"between": {"x": (1, 5)}}, {"answer": ["answer", "x"]}]
    ),
)
def test_a_task_file_is_read_or_refused(tmp_path_factory, content, kind, options):
    file = tmp_path_factory.mktemp("rows") / f"rows.{kind}"
    file.write_bytes(content)
    for task in (Dataset(str(file), **options), MultipleChoice(str(file), options="x", answer="answer")):
        try:
            rows = list(task.rows())
        except AspoError as error:
            clear(error)
            continue
        assert rows
        assert len({id for id, _, _ in rows}) == len(rows)
        assert all(question.strip() and row["answer"] is not None for _, question, row in rows)
    assert file.read_bytes() == content


PIECES = st.sampled_from(
    [
        *(
            "\\boxed{",
            "\\frac{",
            "}",
            "{",
            "$",
            "\\[",
            "^",
            "_",
            "1",
            "-7",
            "10^{",
            "9" * 50,
            "e9",
            "!",
            "\\sqrt",
            "\\text{",
        ),
        *(
            "</think>",
            "<answer>",
            "</answer>",
            "```python\n",
            "```",
            "print(",
            "(",
            ")",
            ",",
            "\n",
            " ",
            "A",
            "B.",
            "x",
        ),
        *("factorial(", "**" * 8, "\\int_{", "\\sum", "\0", "\u202e", "0" * 3000),
    ]
)
COMPLETIONS = st.lists(PIECES | st.text(string.printable, max_size=5), max_size=30).map("".join)


@pytest.fixture(scope="module")
def pool():
    pool = RewardPool(workers=2, timeout_s=5.0)
    yield pool
    pool.close()


@cases(50, seconds=120)  # 24 calls of up to 5 s, and processes that are started again, on two workers
@given(texts=st.lists(COMPLETIONS, min_size=8, max_size=8))
def test_any_completion_is_scored(pool, texts):
    """50 x 8 x 3 cases."""
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=7)[0]
    rows = {"math": {"answer": "7"}, "choice": {"answer": "B"}, "reasoning_gym": entry}
    items = [
        RewardItem({f"aspo_lightning.rewards.{name}.reward": 1.0}, text, row)
        for text in texts
        for name, row in rows.items()
    ]
    scores = judged(pool, items)
    assert len(scores) == len(items)
    assert all(0 <= score.reward <= 1 for score in scores)


@cases(300)
@given(rest=st.dictionaries(st.sampled_from(["model", "state_dict", "epoch"]), VALUES, max_size=3), cut=st.floats(0, 1))
def test_any_checkpoint_is_used_or_refused(tmp_path_factory, rest, cut):
    folder = tmp_path_factory.mktemp("checkpoint")
    path = folder / "epoch_0.ckpt"
    AtomicCheckpointIO().save_checkpoint(rest, path)
    if cut < 0.5:
        content = path.read_bytes()
        path.write_bytes(content[: int(2 * cut * len(content))] + pickle.dumps(rest) * (cut < 0.1))
        digest_path(path).unlink()
    before = path.read_bytes()
    for use in (trained_from, lambda p: export(p, folder / "out")):
        with pytest.raises(AspoError) as error:
            use(path)
        clear(error.value)
    assert path.read_bytes() == before
    assert not (folder / "out").exists()


@cases(300)
@given(
    content=st.binary(max_size=100) | VALUES.map(json.dumps).map(str.encode),
    name=st.sampled_from(["result", "settings"]),
)
def test_any_result_is_read_or_refused(tmp_path_factory, content, name):
    folder = tmp_path_factory.mktemp("results")
    file = folder / f"{name}.json"
    file.write_bytes(content)
    (folder / "journal").mkdir()
    (folder / "journal" / "rank_0.jsonl").write_bytes(content)
    for use in (read_result, lambda f: check_folder(f, {"seed": 0})):
        try:
            use(folder)
        except AspoError as error:
            clear(error)
    assert file.read_bytes() == content
    assert read_known(folder) == {} or all(len(key) == 3 for key in read_known(folder))
