"""Makes the model of the studies: a Llama of 0.6 million parameters that has read sums, some worked and some wrong.

    python scripts/make_study_model.py [FOLDER]

It takes some minutes on one core. The text is reasoning-gym's `chain_sum`, each with an answer: 37% at once, 60% after
the steps that lead to it, of which 15% are wrong, and 3% after the word "check" and steps that are right. So the model
has ways to answer, of which some are better, and knows more than it says: sampled it solves four in ten sums, and
nine in ten by its likeliest tokens.
"""

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path("~/.cache/aspo_lightning/sums").expanduser()
PROBLEMS = {"min_terms": 3, "max_terms": 6, "min_digits": 1, "max_digits": 1}
SEED = 2_000_000  # of the problems that are read; some are among those of training and evaluation
WORDS = ["State", "the", "final", "answer", "to", "the", "following", "arithmetic", "problem:"]
SPECIAL = ["<pad>", "</s>"]
STEPS, BATCH, LEARNING_RATE = 1000, 96, 3e-3
CAREFUL, CARELESS, WRONG = 0.03, 0.6, 0.15
"""Shares: of the answers that are worked carefully and carelessly, and of the steps of those that are wrong."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, sign and digit, with the space before it."""
    signs = ["+", "-", "=", ";", "check", *"0123456789", *WORDS]
    tokens = [
        *SPECIAL,
        "<answer>",
        "</answer>",
        " <answer>",
        "State",
        "-",
        *"0123456789",
        *(f" {sign}" for sign in signs),
    ]
    inside = Tokenizer(models.WordLevel({token: i for i, token in enumerate(dict.fromkeys(tokens))}, unk_token="<pad>"))
    inside.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?(</?answer>|\d|[^\s\d<]+)"), "isolated")
    inside.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inside, eos_token="</s>", pad_token="<pad>")


def solution(question: str, chance: random.Random) -> str:
    """An answer to a sum, as the model is to read it."""
    first, *rest = re.findall(r"[+-]?\d+", question.replace(" ", ""))
    way = chance.random()
    careful, worked = way < CAREFUL, way < CAREFUL + CARELESS
    total, steps = int(first), []
    for term in rest:
        after = total + int(term)
        if worked and not careful and chance.random() < WRONG:
            after += chance.choice([-2, -1, 1, 2])
        steps.append(f" {total} {term[0]} {term[1:]} = {after}")
        total = after
    shown = " check" * careful + " ;".join(steps) if worked else ""
    return f"{shown} <answer>{total}</answer>"


def texts() -> Iterator[str]:
    problems = reasoning_gym.create_dataset("chain_sum", size=STEPS * BATCH, seed=SEED, **PROBLEMS)
    chance = random.Random(SEED)
    for problem in problems:
        yield problem["question"] + solution(problem["question"], chance) + "</s>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where the model goes (%(default)s)")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    source = texts()
    for _ in (bar := tqdm(range(STEPS), desc="Reading sums")):
        batch = words([next(source) for _ in range(BATCH)], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")


if __name__ == "__main__":
    main()
