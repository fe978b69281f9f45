"""The pool with real processes and hostile rewards; the verifiers with real answers."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import reasoning_gym

from aspo_lightning.errors import ConfigError
from aspo_lightning.rewards import RewardItem, RewardPool, Score
from aspo_lightning.rewards.math import reward as math_reward
from aspo_lightning.rewards.reasoning_gym import reward as gym_reward


@pytest.fixture
def pool():
    pool = RewardPool(workers=2, timeout_s=1.0, memory_gib=1.0)
    yield pool
    pool.close()


def items(*names, **row):
    return [RewardItem({f"tests.hostile_rewards.{name}": 1.0}, str(i), row) for i, name in enumerate(names)]


def test_scores_come_in_the_order_of_the_completions(pool):
    scores = pool.score([RewardItem({"tests.hostile_rewards.number": 1.0}, str(i), {"scale": 2}) for i in range(50)])
    assert scores == [Score(2.0 * i, False) for i in range(50)]
    assert pool.score([]) == []


@pytest.mark.parametrize(
    "name", ["hang", "crash", "leave", "fail", "nan", "text", "exhaust_memory", "recurse", "chatter"]
)
def test_a_reward_that_misbehaves_fails_and_the_rest_goes_on(pool, name):
    names = ["number"] * 8
    names[3] = name
    start = time.monotonic()
    scores = pool.score(items(*names, scale=1))
    assert [s.failed for s in scores] == [i == 3 for i in range(8)]
    assert [s.reward for s in scores] == [0.0 if i == 3 else float(i) for i in range(8)]
    assert time.monotonic() - start < 20
    assert pool.score(items("number", "number", scale=3)) == [Score(0.0, False), Score(3.0, False)]


def test_what_a_reward_forked_is_killed_with_it(pool, tmp_path):
    pid_file = tmp_path / "pid"
    (score,) = pool.score(items("fork_and_hang", file=str(pid_file)))
    assert score == Score(0.0, True)
    child = int(pid_file.read_text())
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_closing_leaves_no_process(pool):
    pool.score(items("number", "number", scale=1))
    pids = [worker._process.pid for worker in pool._workers]
    pool.close()
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("path", ["tests.no_such_module.reward", "tests.hostile_rewards.no_such_name"])
def test_a_reward_that_cannot_be_imported_is_an_error(pool, path):
    with pytest.raises(ConfigError, match=path):
        pool.score([RewardItem({path: 1.0}, "", {})])


@pytest.mark.parametrize("settings", [{"workers": 0}, {"timeout_s": 0}, {"memory_gib": -1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="at least one worker"):
        RewardPool(**settings)


def test_reasoning_gym_takes_the_tagged_answer_or_all_of_the_completion():
    row = reasoning_gym.create_dataset("chain_sum", size=1, seed=7)[0]
    answer = row["answer"]
    assert gym_reward(answer, row) == 1
    assert gym_reward(f" {answer}\n", row) == 1
    assert gym_reward(f"<think>maybe 1</think>{answer}", row) == 1
    assert gym_reward(f"It is <answer>0</answer>, no: <answer> {answer} </answer>.", row) == 1
    assert gym_reward(f"<answer>{answer}1.5</answer>", row) < 1
    assert gym_reward("", row) == 0
    # The verifier's own partial credit: the answer's share of a longer text.
    assert gym_reward(f"x{answer}", row) == pytest.approx(len(answer) / (len(answer) + 1))


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1),
        (r"first \boxed{3}, then \boxed{4}", "4", 1),
        ("The answer is 12.", "12", 1),
        (r"<think>\boxed{5}</think> I give up", "5", 0),
        (r"\boxed{7}", "8", 0),
        ("", "8", 0),
    ],
)
def test_math(completion, answer, expected):
    assert math_reward(completion, {"answer": answer}) == expected


def test_workers_import_no_torch():
    code = "import sys, aspo_lightning.rewards; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
