"""A phase of ours against one of TRL's GRPOTrainer: the same work, in turn, in processes of their own.

    python scripts/bench_trl.py [--repeats 3 --phases 4 --work chat long --precision bf16 float32]

Installs TRL, pinned and without its dependencies, in a temporary folder; both sides run on this environment's torch and
transformers. A phase is: weights to the engine, sampling, rewards, old and reference log-probs, two optimizer steps.
TRL samples with its own generate. Each phase's seconds are from one beginning to the next; the first isn't counted.
Reported are medians, each pair's ratio, and the peak of memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import yaml
from lightning.pytorch import Callback

from aspo_lightning.run.curves import read_run
from aspo_lightning.run.memory import peak_memory

ROOT = Path(__file__).parent.parent
TRL = "trl==1.16.0"
PARTS = ("sync", "generate", "reward", "score", "update")
WORK = {
    # prompts, completions of each, tokens of a completion, words of few-shot text before the question
    "chat": (8, 8, 16, 0),
    "long": (8, 16, 64, 192),
}
TRL_SEQUENCES = {"chat": 32, "long": 8}
"""TRL's sequences in a micro-batch: those of an optimizer step, or as many as fit in 16 GB. Ours has 2,048 tokens."""
LR, KL = 1e-6, 0.001


def reward(completion: str, row: object) -> float:
    """Tells completions apart, by nothing that costs time."""
    return float(sum(map(ord, completion)) % 2)


def questions(count: int, words: int) -> list[str]:
    before = " ".join(f"Note {i}." for i in range(words // 2))
    return [f"{before} What is {i} + {7 * i % 10}?".strip() for i in range(count)]


class Clock(Callback):
    """Ours: writes the seconds from phase to phase, and the peak of memory."""

    def __init__(self, path: str) -> None:
        self.path, self.starts = Path(path), [time.perf_counter()]

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.starts.append(time.perf_counter())

    def on_train_end(self, trainer, pl_module) -> None:
        tokens = [len(r.completion_ids) for g in trainer.datamodule.phase.groups for r in g.rollouts]
        prompt = len(trainer.datamodule.phase.groups[0].prompt.prompt_ids)
        write(self.path, self.starts, prompt, statistics.mean(tokens))


def write(path: Path, starts: list[float], prompt: float, completion: float) -> None:
    seconds = [b - a for a, b in pairwise(starts)][1:]
    record = {"seconds": seconds, "gb": peak_memory() / 1e9, "prompt": prompt, "completion": completion}
    path.write_text(json.dumps(record))


def ours(model: str, work: str, precision: str, phases: int, folder: Path) -> dict:
    prompts, group, length, words = WORK[work]
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"question": q, "answer": "0"}) for q in questions(prompts, words)))
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": phases + 1,
            "precision": "bf16-mixed" if precision == "bf16" else "32-true",
            "default_root_dir": str(folder / "runs"),
            "callbacks": [{"class_path": "scripts.bench_trl.Clock", "init_args": {"path": str(folder / "record")}}],
        },
        "checkpoint": {"every_n_epochs": phases + 1},
        "model": {
            "model_name_or_path": model,
            "kl_coef": KL,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": LR, "fused": True}},
        },
        "data": {
            "train": {"class_path": "Dataset", "init_args": {"path": str(rows), "reward": "scripts.bench_trl.reward"}},
            "engine": {
                "class_path": "VLLMEngine",
                "init_args": {
                    "dtype": "bfloat16" if precision == "bf16" else "float32",
                    "kv_cache_gib": 0.5,
                    "max_num_seqs": prompts * group,
                },
            },
            "prompts_per_phase": prompts,
            "group_size": group,
            "optimizer_steps": 2,
            "no_spread": "keep",
            "max_prompt_length": 1024,
            "max_completion_length": length,
            "token_budget": 2048,
            "reward_workers": 1,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    call([str(Path(sys.executable).with_name("aspo")), "fit", "--config", str(path)], {"PYTHONPATH": str(ROOT)})
    record = json.loads((folder / "record").read_text())
    curves = read_run(folder / "runs" / "version_0")
    return {
        **record,
        "parts": {part: statistics.median(v for _, v in curves[f"time/{part}_s"][1:]) for part in PARTS},
    }


def theirs(model: str, work: str, precision: str, phases: int, folder: Path) -> dict:
    record = folder / "record"
    command = [sys.executable, "-m", "scripts.bench_trl", "--trl", str(record), "--model", model, "--work", work]
    libraries = os.pathsep.join([str(ROOT), os.environ["ASPO_TRL"]])
    call([*command, "--precision", precision, "--phases", str(phases)], {"PYTHONPATH": libraries})
    return json.loads(record.read_text())


def run_trl(model: str, work: str, precision: str, phases: int, record: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    prompts, group, length, words = WORK[work]
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths: list[int] = []

    def parity(completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [reward(completion[0]["content"], None) for completion in completions]

    class Steps(TrainerCallback):
        def __init__(self):
            self.starts = [time.perf_counter()]

        def on_step_end(self, args, state, control, **_):
            if state.global_step % 2 == 0:
                self.starts.append(time.perf_counter())

    steps = Steps()
    messages = [[{"role": "user", "content": q}] for q in questions(prompts, words)]
    dtype = "float32"  # the weights; with bf16 they are cast under autocast, as ours are
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        reward_funcs=parity,
        args=GRPOConfig(
            output_dir=str(record.parent / "trl"),
            per_device_train_batch_size=TRL_SEQUENCES[work],
            gradient_accumulation_steps=prompts * group // 2 // TRL_SEQUENCES[work],
            steps_per_generation=prompts * group // TRL_SEQUENCES[work],
            num_generations=group,
            max_completion_length=length,
            max_steps=2 * (phases + 1),
            learning_rate=LR,
            lr_scheduler_type="constant",
            beta=KL,
            temperature=1.0,
            bf16=precision == "bf16",
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
        ),
        train_dataset=Dataset.from_dict({"prompt": messages * (2 * phases + 2)}),
        processing_class=tokenizer,
        callbacks=[steps],
    )
    trainer.train()
    tokens = tokenizer.apply_chat_template(messages[-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    write(record, steps.starts, len(tokens), statistics.mean(lengths[-prompts * group :]))


def call(command: list[str], environment: dict[str, str]) -> None:
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-3000:])


def compare(model: str, work: str, precision: str, phases: int, repeats: int) -> None:
    ratios, records = [], []
    for _ in range(repeats):
        pair = []
        for side in (ours, theirs):
            with tempfile.TemporaryDirectory() as folder:
                pair.append(side(model, work, precision, phases, Path(folder)))
        records.append(pair)
        ratios.append(statistics.median(pair[0]["seconds"]) / statistics.median(pair[1]["seconds"]))
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"\n{work}, {precision}: {statistics.median(ratios):.2f} of TRL's time ({each})")
    for name, side in zip(("ours", "TRL"), zip(*records, strict=True), strict=True):
        seconds = [s for record in side for s in record["seconds"]]
        spread = f"{statistics.median(seconds):.2f} s a phase ({min(seconds):.2f} to {max(seconds):.2f})"
        work_done = f"prompts of {side[-1]['prompt']:.0f} tokens, completions of {side[-1]['completion']:.1f}"
        print(f"  {name}: {spread}, peak {max(record['gb'] for record in side):.2f} GB; {work_done}")
    parts = {part: statistics.median(record["parts"][part] for record, _ in records) for part in PARTS}
    print("  ours by part: " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/aspo_lightning/SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--phases", type=int, default=4)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--precision", nargs="+", choices=("bf16", "float32"), default=["bf16", "float32"])
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)  # this process is TRL's side: where it writes
    options = parser.parse_args()
    model = str(Path(options.model).expanduser())
    if options.trl:
        run_trl(model, options.work[0], options.precision[0], options.phases, options.trl)
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, TRL]
        subprocess.run(pip, check=True)
        os.environ["ASPO_TRL"] = folder
        for work in options.work:
            for precision in options.precision:
                compare(model, work, precision, options.phases, options.repeats)


if __name__ == "__main__":
    main()
