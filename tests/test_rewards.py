"""The pool with real processes and hostile rewards; the verifiers with real answers."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from aspo_lightning.environments.second_chance import environment as second_chance
from aspo_lightning.errors import ConfigError
from aspo_lightning.rewards import Call, RewardItem, RewardPool, RewardResult, choice, code, math
from aspo_lightning.rewards import reasoning_gym as gym
from aspo_lightning.rewards.choice import chosen_letter
from aspo_lightning.rewards.choice import reward as choice_reward
from aspo_lightning.rewards.math import accepted_answers, last_boxed
from aspo_lightning.rewards.math import reward as math_reward
from aspo_lightning.rewards.reasoning_gym import is_formula
from aspo_lightning.rewards.reasoning_gym import reward as gym_reward
from tests.support.judging import judged
from tests.support.processes import eventually


@pytest.fixture
def pool():
    pool = RewardPool(workers=2, timeout_s=1.0, memory_gib=1.0)
    yield pool
    pool.close()


def scored(reward):
    return RewardResult(reward, solved=reward >= 1, failed=False)


FAILED = RewardResult(0.0, solved=False, failed=True)


def items(*names, **row):
    return [RewardItem({f"tests.support.hostile_rewards.{name}": 1.0}, str(i), row) for i, name in enumerate(names)]


def test_scores_come_in_the_order_of_the_completions(pool):
    scores = judged(
        pool, [RewardItem({"tests.support.hostile_rewards.number": 1.0}, str(i), {"scale": 2}) for i in range(50)]
    )
    assert scores == [scored(2.0 * i) for i in range(50)]
    assert judged(pool, []) == []


def test_what_counts_as_a_full_solution(pool):
    rewards = (1.0, 1 - 1e-6, 1 - 2e-6, 0.5)
    scores = judged(
        pool, [RewardItem({"tests.support.hostile_rewards.number": 1.0}, repr(r), {"scale": 1}) for r in rewards]
    )
    assert [score.solved for score in scores] == [True, True, False, False]


@pytest.mark.parametrize(
    "name", ["hang", "crash", "leave", "fail", "nan", "text", "exhaust_memory", "recurse", "chatter", "huge"]
)
def test_a_reward_that_misbehaves_fails_and_the_rest_goes_on(pool, name):
    names = ["number"] * 8
    names[3] = name
    start = time.monotonic()
    scores = judged(pool, items(*names, scale=1))
    assert [s.failed for s in scores] == [i == 3 for i in range(8)]
    assert [s.reward for s in scores] == [0.0 if i == 3 else float(i) for i in range(8)]
    assert time.monotonic() - start < 20
    assert judged(pool, items("number", "number", scale=3)) == [scored(0.0), scored(3.0)]


@pytest.mark.parametrize("name", ["fork_and_hang", "daemon_and_hang", "daemon_and_crash"])
def test_what_a_reward_started_is_killed_with_it(pool, tmp_path, name):
    pid_file = tmp_path / "pid"
    (score,) = judged(pool, items(name, file=str(pid_file)))
    assert score == FAILED
    assert not alive(int(pid_file.read_text()))


def test_what_a_reward_left_running_ends_with_the_pool(pool, tmp_path):
    pid_file = tmp_path / "pid"
    assert judged(pool, items("daemon_and_return", file=str(pid_file))) == [scored(7.0)]
    child = int(pid_file.read_text())
    assert alive(child)
    pool.close()
    assert not alive(child)


def test_what_a_reward_started_ends_with_a_run_that_is_killed(tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "from aspo_lightning.rewards import *\n"
        f"row, rewards = {{'file': {str(pid_file)!r}}}, {{'tests.support.hostile_rewards.daemon_and_hang': 1.0}}\n"
        "item = RewardItem(rewards, '', row)\n"
        "RewardPool(workers=1, timeout_s=60).judge(item).result()"
    )
    run = subprocess.Popen([sys.executable, "-c", code])
    assert eventually(lambda: pid_file.exists() and pid_file.read_text())
    run.kill()
    run.wait()
    child = int(pid_file.read_text())
    assert eventually(lambda: not alive(child))


def test_closing_does_not_wait_for_a_supervisor_that_is_stopped(pool, monkeypatch):
    monkeypatch.setattr("aspo_lightning.rewards.pool._KILL_TIMEOUT_S", 0.2)
    judged(pool, items("number", scale=1))
    (supervisor,) = [worker._process.pid for worker in pool._workers if worker]
    os.kill(supervisor, signal.SIGSTOP)
    pool.close()
    assert not alive(supervisor)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def patient():
    """A pool in which nothing is late, however busy the machine is."""
    pool = RewardPool(workers=2, timeout_s=60.0, memory_gib=1.0)
    yield pool
    pool.close()


def test_processes_killed_from_outside_cost_nothing(patient, tmp_path):
    pool, expected = patient, [scored(float(i)) for i in range(6)]
    assert judged(pool, items(*["number"] * 6, scale=1)) == expected
    for worker in pool._workers:  # while they have nothing to do
        os.kill(worker._process.pid, signal.SIGKILL)
        assert worker.connection.poll(20)  # gone; one that is still going would die in the middle of a later call
    assert judged(pool, items(*["number"] * 6, scale=1)) == expected
    # In the middle of a call: the first time it is made, it kills its own process.
    assert judged(pool, items("crash_once", "number", scale=1, file=str(tmp_path / "crashed"))) == expected[:2]


def test_closing_leaves_no_process(pool):
    judged(pool, items("number", "number", scale=1))
    pids = [worker._process.pid for worker in pool._workers]
    pool.close()
    assert not any(alive(pid) for pid in pids)


def test_closing_drops_what_is_not_judged_yet(pool):
    """And what hangs then isn't tried again."""
    hanging = [pool.submit(Call(f"tests.support.hostile_rewards.{name}", "1", {})) for name in ["hang"] * 2]
    waiting = [pool.submit(Call("tests.support.hostile_rewards.number", "1", {"scale": 1})) for _ in range(50)]
    assert eventually(lambda: all(pool._workers))
    pool.close()
    assert all(call.done() for call in hanging)
    assert all(call.cancelled() for call in waiting)
    assert pool._workers == [None, None]
    assert judged(pool, items("number", scale=1)) == [scored(0.0)]


def test_what_a_reward_forked_answers_for_nothing(pool):
    names = ["fork_and_return", *["number"] * 20]
    scores = judged(pool, items(*names, scale=1))
    assert scores[1:] == [scored(float(i)) for i in range(1, 21)]
    assert scores[0] == scored(7.0)


def test_an_answer_to_another_call_is_none(pool):
    (score,) = judged(pool, items("answer_for_another", scale=1))
    assert score.failed
    assert judged(pool, items("number", "number", scale=3)) == [scored(0.0), scored(3.0)]


@pytest.mark.parametrize("path", ["tests.support.dies_on_import.reward", "tests.no_such_module.reward"])
def test_a_reward_that_cannot_be_loaded_is_found_before_the_run(pool, path):
    with pytest.raises(ConfigError, match=f"{path} can't be used"):
        pool.load([path])


@pytest.mark.parametrize("path", ["tests.no_such_module.reward", "tests.support.hostile_rewards.no_such_name"])
def test_a_reward_that_cannot_be_imported_is_an_error(pool, path):
    with pytest.raises(ConfigError, match=path):
        judged(pool, [RewardItem({path: 1.0}, "", {})])


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


def test_no_verifier_of_reasoning_gym_runs_what_a_model_says(tmp_path):
    """Some hand an answer to eval, or to SymPy, which evaluates it as Python."""
    trace = tmp_path / "trace"
    path = "+".join(f"chr({ord(c)})" for c in str(trace))
    hostile = [
        f"open('{trace}', 'w')",
        f"open({path}, chr(119))",
        f"[open('{trace}', 'w')]",
        f"x.__class__.__base__.__subclasses__() or open({path}, chr(119))",
        "list(oracle_answer)",
        "[r.split() for r in valid_solutions[0].split(chr(10))]",
    ]
    judged = {}
    for name in sorted(DATASETS):
        try:
            row = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
        except Exception:  # some want settings, or data from elsewhere
            continue
        wrong = []
        for answer in hostile:
            with suppress(Exception):  # some verifiers raise: such a completion scores 0
                wrong.append(gym_reward(f"<answer>{answer}</answer>", row))
        assert not trace.exists(), name
        judged[name] = max(wrong, default=0), gym_reward(f"<answer>{row['answer']}</answer>", row)
    for name in (
        *("countdown", "puzzle24", "n_queens", "string_insertion", "spiral_matrix", "binary_matrix", "number_sorting"),
        *("polynomial_multiplication", "simple_integration", "intermediate_integration"),
    ):
        wrong, right = judged[name]
        assert wrong < 0.1, name
        assert right == 1, name


@pytest.mark.parametrize(
    ("answer", "formula"),
    [
        ("(1 + 2)*3.5 - 4**2 / x", True),
        ("exp(2*x)*sin(y) + C", True),
        ("alpha + 1", True),  # a name of the expected answer
        ("beta + 1", False),
        ("x.real", False),
        ("1 .real", False),
        ("eval(x)", False),
        ("__import__(x)", False),
        ("'x'", False),
        ("[x]", False),
        ("x\n+ 1", True),
    ],
)
def test_what_sympy_may_read(answer, formula):
    assert is_formula(answer, "2*alpha + x") == formula


GYM_ROW = reasoning_gym.create_dataset("chain_sum", size=1, seed=7)[0]
THINKERS = {
    "math": (math, r"\boxed{7}", {"answer": "7"}),
    "choice": (choice, r"\boxed{B}", {"answer": "B"}),
    "code": (code, "```python\nprint(7)\n```", {"answer": {"input": "", "output": "7"}}),
    "reasoning_gym": (gym, f"<answer>{GYM_ROW['answer']}</answer>", GYM_ROW),
}


@pytest.mark.parametrize("name", THINKERS)
def test_thinking_that_was_never_closed_has_no_answer(name):
    module, right, row = THINKERS[name]
    texts = {
        f"{right}": 1,
        f"<think>hm</think>{right}": 1,
        f"hm</think>{right}": 1,
        f"<think>first {right} but let me check": 0,
        f"<think>a</think>{right}<think>or": 0,
        f"{right}<think>": 0,
    }
    assert {text: module.reward(text, row) for text in texts} == texts
    if hasattr(module.reward, "answer"):
        assert [text for text in texts if module.reward.answer(text, row) is None] == list(texts)[3:]


def math_pairs():
    for line in (Path(__file__).parent / "support" / "math_pairs.tsv").read_text().splitlines():
        if not line.startswith("#"):
            completion, reference, verdict = line.split("\t")
            yield completion, reference, float(verdict)


def test_math_gives_a_mathematicians_verdict():
    pairs = list(math_pairs())
    assert len(pairs) >= 200
    wrong = [(c, r) for c, r, verdict in pairs if math_reward(c, {"answer": r}) != verdict]
    assert wrong == []


def test_boxes_that_stand_together_are_one_vote():
    texts = [
        r"\boxed{1} and \boxed{2}",
        r"$\boxed{2}$, $\boxed{1}$",
        r"\boxed{1}. Or \boxed{2}",
        r"\boxed{2} or \boxed{2.0}",
    ]
    assert [math.reward.answer(text, {}) for text in texts] == ["{1, 2}", "{1, 2}", "2", "2"]


def test_any_of_several_accepted_answers_is_right():
    for reference in (["1", "\\frac{2}{3}"], '["1", "\\\\frac{2}{3}"]'):
        verdicts = [math_reward(f"\\boxed{{{a}}}", {"answer": reference}) for a in ("1", "2/3", "2")]
        assert verdicts == [1, 1, 0]
    assert accepted_answers("[1, 2]") == ["[1, 2]"]
    assert accepted_answers(5) == ["5"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{a{b}c} \boxed{d", "a{b}c"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"{\boxed{1}", "1"),
        (r"}\boxed{1}}", "1"),
        (r"\\boxed {1}", None),
        ("boxed{1}", None),
    ],
)
def test_the_last_complete_box(text, expected):
    assert last_boxed(text) == expected


HOSTILE = {
    "open braces": "\\boxed{" + "{" * 10**6,
    "nested braces": "\\boxed{" + "{" * 10**6 + "1" + "}" * 10**6 + "}",
    "open boxes": "\\boxed{" * 10**5,
    "tower": "\\boxed{9^{9^{9^9}}}",
    "tower of factorials": "\\boxed{((((9!)!)!)!)!}",
    "10 MB of digits": "\\boxed{" + "7" * 10**7 + "}",
    "10 MB of digits, unboxed": "7" * 10**7,
    "nested fractions": "\\boxed{" + "\\frac{1}{" * 180 + "2" + "}" * 180 + "}",
    "long sum": "\\boxed{" + "x+" * 900 + "1}",
    "many boxes": "".join(f"\\boxed{{{i}}}, " for i in range(10**5)),
    "many equal boxes": "\\boxed{4}, " * 10**5,
    "boxes in boxes": "\\boxed{1}, \\boxed{" * 10**5 + "}" * 10**5,
    "null bytes": "\\boxed{\0\0}",
    "surrogates": "\\boxed{\ud800}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_fail_within_the_limit_and_the_pool_goes_on(name):
    path = {"aspo_lightning.rewards.math.reward": 1.0}
    pool = RewardPool(workers=1, timeout_s=3)
    try:
        pool.load(path)
        start = time.monotonic()
        (score,) = judged(pool, [RewardItem(path, HOSTILE[name], {"answer": "5"})])
        assert score.reward == 0
        assert time.monotonic() - start < 5
        assert judged(pool, [RewardItem(path, "\\boxed{5}", {"answer": "5"})]) == [scored(1.0)]
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(B) 5 cm}}", "B"),
        (r"\boxed{B. Because}", "B"),
        (r"\boxed{A} or rather \boxed{C}", "C"),
        (r"\boxed{Because}", None),
        (r"\boxed{\mathbf{B}}", "B"),
        (r"\boxed{b) five}", "B"),
        (r"\boxed{a cat}", None),
        ("The answer is a prime number.", None),
        (r"\boxed{}", None),
        ("<think>The answer is A.</think>The answer is (D).", "D"),
        ("Answer: C", "C"),
        ("**Answer: C**", "C"),
        ("the answer is A, no, the answer is B", "B"),
        ("answer" + "\n" * 5000 + "x Answer: B", "B"),
        ("\\boxed{" + " " * 10_000 + "}", None),
        ("B", "B"),
        ("(B).", "B"),
        ("A cat", None),
        ("", None),
    ],
)
def test_multiple_choice(completion, letter):
    assert chosen_letter(completion) == letter
    assert choice_reward(completion, {"answer": "B"}) == (letter == "B")


@pytest.mark.parametrize(
    ("turns", "reply"),
    [
        (["7"], None),
        ([" 7.0"], None),
        (["6"], "Too low. 3 + 4 ="),
        (["It is 8"], "Too high. 3 + 4 ="),
        (["-7"], "Too low. 3 + 4 ="),
        (["seven"], "That is no number. 3 + 4 ="),
        (["6", "8"], None),
    ],
)
def test_second_chance(turns, reply):
    assert second_chance(turns, {"question": "3 + 4 =", "answer": "7"}) == reply


def test_rewards_are_summed_by_their_weights(pool):
    double = {"tests.support.hostile_rewards.number": 0.5, "tests.support.rewards.parity": 2.0}
    scores = judged(pool, [RewardItem(double, text, {"scale": 3}) for text in ("1", "2")])
    assert [s.reward for s in scores] == [0.5 * 3 + 2.0 * 1, 0.5 * 6 + 0.0]
    broken = {"tests.support.hostile_rewards.number": 1.0, "tests.support.hostile_rewards.fail": 1.0}
    assert judged(pool, [RewardItem(broken, "1", {"scale": 3})]) == [FAILED]


@pytest.mark.parametrize("weights", [(0.9, 0.05), (1.0, 1.0), (0.1, 2.0), (2.0, -1.0), (0.0, 1.0)])
def test_what_is_solved_is_the_first_rewards_to_say_whatever_the_weights(pool, weights):
    first, second = "tests.support.rewards.parity", "tests.support.hostile_rewards.number"
    rewards = dict(zip((first, second), weights, strict=True))
    items = [RewardItem(rewards, text, {"scale": scale}) for text, scale in (("1", 1), ("1", 0), ("2", 1), ("2", 0))]
    assert [s.solved for s in judged(pool, items)] == [True, True, False, False]
    fails = RewardItem({first: 1.0, "tests.support.hostile_rewards.fail": 0.0}, "1", {})
    assert judged(pool, [fails]) == [FAILED]


def test_a_phase_with_hanging_rewards_ends_within_its_limit(pool):
    names = ["hang" if i % 20 == 7 else "number" for i in range(100)]
    start = time.monotonic()
    scores = judged(pool, items(*names, scale=1))
    assert time.monotonic() - start < 3 * (1.0 + 2.0) + 1  # five limits of a second on two workers, and new workers
    assert [s.failed for s in scores] == [name == "hang" for name in names]


def test_workers_import_no_torch():
    code = "import sys, aspo_lightning.rewards; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
