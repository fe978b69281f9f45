"""Every shipped recipe runs, its GRPO twin, and one of each architecture with a lag.

On two ranks, with fsdp2, bf16-mixed and vLLM. What a recipe names on the hub is in a cache made here: a tiny random
model of its model's architecture, and rows in the real schema of its datasets. On top of a recipe comes what a CPU and
a test need, see ``needs``; all else is as it says.
"""

import json
import math
from pathlib import Path

import pytest
import yaml

from tests.support.benchmark_rows import ROWS as BENCHMARK_ROWS
from tests.support.commands import ROOT
from tests.support.configs import write_config
from tests.support.dataset_rows import ROWS, dapo_row, verl_row
from tests.support.hub_cache import REVISION, add_dataset, add_model
from tests.support.published_models import MODELS
from tests.support.ranks import Ranks
from tests.support.servers import ready

RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs" / "recipes").glob("*.yaml")}
PUBLISHED = {recipe: config for recipe, (config, _) in MODELS.items()}
BENCHMARKS = {"code": ("humaneval", 1), "math": ("math500", 4)}  # that a recipe's model is evaluated on, completions

# |log-prob in the trainer - in the engine| of the median token, both in bfloat16. Measured: 0.013 to 0.028, and 0.12 to
# 0.35 if the engine keeps the weights of the phase before.
MISMATCH = 0.06

# Those of the models, but for the roles' names, and without system prompts, tools and earlier thoughts.
R1_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
QWEN3_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

PROGRAM = """
def add(a, b):
    return a + b
class Solution:
    add = staticmethod(add)
if __name__ == "__main__":
    print(add(*map(int, input().split())))
"""
TOKEN = "a-secret-of-these-tests"
ANSWERS = {"code": f"\n```python{PROGRAM}```\n", "math": "\\boxed{42}"}
# Right answers are tokens: a random model hits one in a third of its completions, and so the recipe's own reward makes
# groups with spread.
WORDS = ["\n", *(f"</think>{answer}" + " " * i for answer in ANSWERS.values() for i in range(8))]


def varied(row: dict, column: str, count: int, name: str = "", **changed) -> list[dict]:
    """Rows that differ in their problem."""
    return [{**row, column: f"{row[column]} ({name}{i})", **changed} for i in range(count)]


CODER = "agentica-org/DeepCoder-Preview-Dataset"
DATASETS = {
    ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"): varied(
        ROWS["deepscaler"][0], "problem", 6, answer="42"
    ),
    ("Skywork/Skywork-OR1-RL-Data", None, "math"): [verl_row(f"What is 6*7? ({i})", '["42"]', i) for i in range(6)],
    ("open-r1/DAPO-Math-17k-Processed", "all", "train"): [dapo_row(f"6*7 ({i})", "42", str(i)) for i in range(18)],
    **{
        (CODER, name, "train"): varied(ROWS["deepcoder"][name][0], "problem", 4, name)
        for name in ("primeintellect", "taco", "lcbv5")
    },
    ("deepmind/code_contests", None, "train"): varied(ROWS["code_contests"][0], "description", 4, "code_contests"),
    ("open-r1/codeforces", "verifiable", "train"): [
        row | {"id": f"{i}/A"} for i, row in enumerate(varied(ROWS["codeforces"][0], "description", 4, "codeforces"))
    ],
    ("HuggingFaceH4/MATH-500", None, "test"): [
        row | {"unique_id": str(i)}
        for i, row in enumerate(varied(BENCHMARK_ROWS["math500"][0][0], "problem", 3, answer="42"))
    ],
    ("openai/openai_humaneval", None, "test"): [
        row | {"task_id": str(i), "prompt": f"# {i}\n{row['prompt']}"}
        for i, row in enumerate([BENCHMARK_ROWS["humaneval"][0][0]] * 3)
    ],
}


def needs(recipe: str, folder: Path) -> dict:
    """What a CPU needs, and a test."""
    engine = {"dtype": "bfloat16", "kv_cache_gib": 0.05}  # as on a GPU; on a CPU it is float32 unless told
    if "tensor_parallel_size" in RECIPES[recipe]["data"]["engine"]["init_args"]:
        engine["tensor_parallel_size"] = 2
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "num_nodes": 1,
            "max_epochs": 2,
            "default_root_dir": str(folder / "runs"),
            "callbacks": [
                {
                    "class_path": "tests.support.config_recorder.ConfigRecorder",
                    "init_args": {"folder": str(folder / "arrived")},
                }
            ],
        },
        "model": {
            # A phase moves the weights so far that an engine without the new ones would be seen.
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}},
        },
        "data": {
            "engine": {"class_path": "VLLMEngine", "init_args": engine},
            "prompts_per_phase": 6,
            "group_size": 6,  # so that hardly a group has no spread
            "max_prompt_length": 700,
            "max_completion_length": 16,
            "eval_max_completion_length": 16,
            "reward_workers": 1,
        },
        "checkpoint": {"every_n_epochs": 1},
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    home = tmp_path_factory.mktemp("hub")
    models = {RECIPES[recipe]["model"]["model_name_or_path"]: config for recipe, config in PUBLISHED.items()}
    for name, published in models.items():
        template = QWEN3_TEMPLATE if name.startswith("Qwen/") else R1_TEMPLATE
        add_model(home, name, published, words=WORDS, chat_template=template)
    for (name, subset, split), rows in DATASETS.items():
        add_dataset(home, name, subset, split, rows)
    return home


@pytest.fixture(scope="module")
def ranks(hub, tmp_path_factory):
    with Ranks(2, tmp_path_factory.mktemp("logs"), HF_HOME=str(hub), HF_HUB_OFFLINE="1", VLLM_API_KEY=TOKEN) as ranks:
        yield ranks


class Run:
    """A recipe's run, and what its ranks have written down."""

    def __init__(self, ranks: Ranks, recipe: str, folder: Path, *overlays: str, last: tuple[str, ...] = ()) -> None:
        self.ranks, self.recipe, self.overlays, self.folder, self.last = ranks, recipe, overlays, folder, last
        self.says = RECIPES[recipe]
        self.kind = "code" if recipe.startswith("code") else "math"
        self.path = folder / "runs" / "version_0"
        self.records = self.fit()

    def command(self, subcommand: str, *args: str, overlays: tuple[str, ...] = ()) -> None:
        path = write_config(self.folder / "needs.yaml", needs(self.recipe, self.folder))
        configs = [f"configs/recipes/{self.recipe}.yaml", *self.overlays, *overlays, path, *self.last]
        self.ranks.run(self.folder.name, [subcommand, *(a for c in configs for a in ("--config", c)), *args])

    def fit(self, *args: str) -> list[dict]:
        self.command("fit", *args)
        return [json.loads((self.folder / "arrived" / f"rank_{rank}.json").read_text()) for rank in (0, 1)]

    def right(self, text: str) -> bool:
        return text.rpartition("</think>")[2].startswith(ANSWERS[self.kind])

    def check_phase(self, phase: dict) -> None:
        """Asserts that a phase was scored by the recipe's reward and trained on as planned, as what sampled it."""
        for group in phase["groups"]:
            assert group["scores"] == [float(self.right(text)) for text in group["texts"]]
            assert group["failed"] == 0
        kept = sum(len(set(group["scores"])) == 2 for group in phase["groups"])
        steps = phase["last_step"] - phase["first_step"]
        assert steps == min(4, kept) > 0
        assert phase["micro_batches"] == steps * phase["accumulate"] == len(phase["losses"])
        assert all(map(math.isfinite, phase["losses"]))
        # Until the first update the policy is the one that was scored; on a CPU, in bfloat16 nearly to the bit.
        assert phase["canary"] < 1e-2
        assert phase["metrics"]["policy/skipped_steps"] == 0
        assert 0.1 < phase["metrics"]["policy/grad_norm"] < math.inf
        assert 1e-4 < phase["mismatch"] < MISMATCH


@pytest.fixture(scope="module", params=sorted(RECIPES))
def run(request, ranks, tmp_path_factory):
    return Run(ranks, request.param, tmp_path_factory.mktemp(request.param))


def test_what_a_recipe_says_arrives(run):
    for record in run.records:
        strategy = run.says["trainer"]["strategy"]
        assert record["ranks"] == 2
        assert record["strategy"] == "FSDP2Strategy"
        assert record["reduce_each_micro_batch"] == (strategy != "fsdp2")
        assert record["sharded"]
        assert (record["model"], record["tied"]) == (PUBLISHED[run.recipe].model_type, run.recipe == "qwen3_4b")
        assert record["objective"] == "ASPO"
        assert record["tensor_parallel_size"] == (2 if run.recipe == "qwen3_30b_a3b" else 1)
        # bf16-mixed: float32 weights, a bfloat16 forward. Gradient checkpointing: a second one in backward.
        assert record["dtypes"] == ["torch.float32"]
        for phase in record["phases"]:
            assert phase["inputs"] == [["torch.bfloat16"] * 2] * phase["micro_batches"]
    task = run.says["data"]["train"]["init_args"]
    for group in (group for phase in run.records[0]["phases"] for group in phase["groups"]):
        settings = task["tasks"][group["id"].partition("/")[0]]["init_args"] if "tasks" in task else task
        assert group["rewards"] == {f"aspo_lightning.rewards.{run.kind}.reward": 1.0}
        assert all(part in group["prompt"] for part in settings.get("template", "").split("{question}"))
        unthought = "<think>\n\n</think>\n\n"
        assert group["prompt"].endswith(unthought if settings.get("thinking") is False else "<|assistant|><think>\n")


def test_a_recipe_trains(run):
    (first, second), other = run.records[0]["phases"], run.records[1]["phases"]
    assert [phase["groups"] for phase in other] == [first["groups"], second["groups"]]
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert second["first_step"] == first["last_step"]
    for record in run.records:
        for phase in record["phases"]:
            run.check_phase(phase)
    assert second["metrics"]["policy/kl"] > 1e-3


def test_a_recipe_is_resumed_and_evaluated(run):
    first, second = run.records[0]["phases"]
    assert saved(run) == [0, 1]
    (third,), (other,) = (
        record["phases"] for record in run.fit("--ckpt_path", str(run.path), "--trainer.max_epochs", "3")
    )
    run.check_phase(third)
    run.check_phase(other)
    assert (third["epoch"], third["first_step"]) == (2, second["last_step"])
    drawn = [group["id"] for phase in (first, second, third) for group in phase["groups"]]
    assert len(set(drawn)) == 18  # none twice: the tasks have 18 problems or more
    assert saved(run) == [1, 2]

    benchmark, completions = BENCHMARKS[run.kind]
    out = run.folder / "results"
    run.command(
        "test",
        *("--model", str(run.path), "--only", f"[{benchmark}]", "--out", str(out)),
        overlays=(f"configs/eval/{run.kind}.yaml",),
    )
    result = json.loads((out / "result.json").read_text())["benchmarks"][benchmark]
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert len(result["problems"]) == 3
    solved = [solved for problem in result["problems"] for solved in problem["solved"]]
    assert solved == [run.right(line["text"]) for line in lines]
    assert len(solved) == 3 * completions
    assert result["measurements"][f"avg@{completions}"]["value"] == pytest.approx(sum(solved) / len(solved))


def saved(run: Run) -> list[int]:
    """The epochs of a run's checkpoints, to which each rank has written."""
    folders = [path for path in (run.path / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink()]
    for folder in folders:
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt"} <= {path.name for path in folder.iterdir()}
    return sorted(int(folder.stem.removeprefix("epoch_")) for folder in folders)


def test_its_grpo_twin_differs_in_the_objective_alone(run, ranks, tmp_path):
    twin = Run(ranks, run.recipe, tmp_path, "configs/objectives/grpo.yaml")
    for record, theirs in zip(twin.records, run.records, strict=True):
        assert record["objective"] == "GRPO"
        assert {k: v for k, v in record.items() if k not in ("objective", "phases")} == {
            k: v for k, v in theirs.items() if k not in ("objective", "phases")
        }
        for phase in record["phases"]:
            twin.check_phase(phase)
        ours, its = record["phases"][0], theirs["phases"][0]
        assert ours["groups"] == its["groups"]
        # Both weigh a token by 1 while the ratio is 1, and not after that.
        step = ours["accumulate"]
        assert ours["losses"][:step] == its["losses"][:step]
        assert ours["losses"][step:] != its["losses"][step:]


@pytest.mark.parametrize("run", ["code_1.5b", "qwen3_30b_a3b", "qwen3_4b"], indirect=True)
def test_a_recipe_of_each_architecture_samples_ahead_of_its_training(
    run, hub, ranks, quick_server, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_API_KEY", TOKEN)
    name = run.says["model"]["model_name_or_path"].replace("/", "--")
    model = hub / "hub" / f"models--{name}" / "snapshots" / REVISION
    with ready(quick_server(str(model), "--max-model-len", "1024", "--dtype", "bfloat16")) as (server,):
        engine = {"class_path": "VLLMServers", "init_args": {"urls": [server.url]}}
        lag = write_config(tmp_path / "lag.yaml", {"data": {"lag": 1, "engine": engine}})
        ahead = Run(ranks, run.recipe, tmp_path, last=(lag,))
    for record in ahead.records:
        first, second = record["phases"]
        assert (first["metrics"]["rollout/lag"], second["metrics"]["rollout/lag"]) == (0, 1)
        ahead.check_phase(first)
        assert second["mismatch"] > MISMATCH  # it was sampled by the weights of the first
        assert all(map(math.isfinite, second["losses"]))
