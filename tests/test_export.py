"""What ``aspo export`` makes of a checkpoint. That an exported folder is the policy: test_fsdp.py."""

import html
import json
import re

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aspo_lightning import ASPOModule
from aspo_lightning.cli.card import model_card
from aspo_lightning.cli.export import main
from aspo_lightning.policy import default_model
from aspo_lightning.run.checkpoints import AtomicCheckpointIO
from aspo_lightning.run.folder import RunFolder
from tests.support.models import BIAS, CHAT_TEMPLATE, save_experts_with_bias, save_model, save_tokenizer

# As some models on the hub have it: transformers warns when it reads this, and refuses to write it.
GENERATION = {"do_sample": False, "eos_token_id": [1, 3], "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9}


def save_checkpoint(model, path, steps=0):
    module = ASPOModule(str(model))
    module.configure_model()
    assert module.policy.lm.config.attention_dropout == 0  # it trains without
    content = {"state_dict": module.state_dict(), "global_step": steps}
    module.on_save_checkpoint(content)
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    """Of a model that is published with dropout."""
    save_model(tmp_path / "model", attention_dropout=0.1)
    save_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(GENERATION))
    return save_checkpoint(tmp_path / "model", tmp_path / "epoch_00000.ckpt")


def test_the_config_is_the_models_own_but_for_the_dtype(checkpoint, tmp_path):
    original = json.loads((tmp_path / "model" / "config.json").read_text())
    assert original["attention_dropout"] == 0.1
    assert original["dtype"] == "float32"
    for arguments, dtype in (([], "float32"), (["--dtype", "bfloat16"], "bfloat16")):
        main([str(checkpoint), str(tmp_path / dtype), *arguments])
        assert json.loads((tmp_path / dtype / "config.json").read_text()) == {**original, "dtype": dtype}


def test_an_empty_folder_one_is_in_can_be_exported_to(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    main([str(checkpoint), "."])
    assert "# here" in (tmp_path / "here" / "README.md").read_text()
    assert (tmp_path / "here" / "config.json").is_file()


def test_weights_that_are_buffers_are_exported_too_and_stay_in_their_own_dtype(tmp_path):
    """As of GLM's router, whose bias chooses the experts."""
    model = save_experts_with_bias(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    main([str(save_checkpoint(tmp_path / "model", tmp_path / "epoch.ckpt")), str(tmp_path / "out")])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.get_buffer(BIAS).tolist() == model.get_buffer(BIAS).tolist()
    ids = torch.randint(128, (1, 12))
    assert torch.equal(exported(ids).logits, model.eval()(ids).logits)
    main([str(tmp_path / "epoch.ckpt"), str(tmp_path / "half"), "--dtype", "bfloat16"])
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert half[BIAS].dtype == torch.float32
    assert half["lm_head.weight"].dtype == torch.bfloat16


def test_an_export_has_all_that_plain_transformers_needs_to_chat(checkpoint, tmp_path):
    main([str(checkpoint), str(tmp_path / "out")])
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: written[key] for key in GENERATION} == GENERATION
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert tokenizer.decode(prompt["input_ids"][0]) == "<|user|>1+1<|assistant|>"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits, original(**prompt).logits)


def result(score):
    measured = {"value": score, "low": score - 0.1, "high": score + 0.1}
    return {
        "settings": {"benchmarks": {}},
        "versions": {},
        "benchmarks": {"sums": {"measurements": {"avg@4": measured, "length": measured}, "problems": []}},
    }


def save_run(folder, model, steps, train, scores, **more):
    """A run's folder as ``aspo fit`` leaves it, with evaluations by the name of their folder."""
    config = {
        "model": {"model_name_or_path": str(model), "objective": {"class_path": "aspo_lightning.objectives.GRPO"}},
        "data": {"train": train},
        **more,
    }
    RunFolder(folder).path.mkdir()
    RunFolder(folder).record(yaml.safe_dump(config, sort_keys=False), ranks=1)
    for name, score in scores.items():
        (folder / "eval" / name).mkdir(parents=True)
        if score is not None:
            (folder / "eval" / name / "result.json").write_text(json.dumps(result(score)))
    return save_checkpoint(model, folder / "checkpoints" / "epoch_00001.ckpt", steps)


def task(**settings):
    return {"class_path": "aspo_lightning.tasks.Dataset", "init_args": settings}


def test_the_card_says_from_what_on_what_and_how_well(tmp_path):
    save_model(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    train = {"class_path": "Mixture", "init_args": {"tasks": {"a": task(path="org/one"), "b": task(path="two.jsonl")}}}
    scores = {
        "step_000000": 0.25,
        "step_000004": 0.5,
        "step_000008": 0.6,
        "step_000008.1": 0.75,  # after a resume
        "step_000009": None,  # not finished
        "step_000012": 0.9,  # later than what is exported
    }
    save_run(tmp_path / "run", tmp_path / "model", 10, train, scores)
    main([str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bfloat16"])
    card = (tmp_path / "out" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "transformers"
    assert "aspo" in head["tags"]
    assert "base_model" not in head  # a folder of this machine is no model of the hub
    shown = re.sub(r"\\(.)", r"\1", body)
    for line in (
        "# out",
        "| trained from | model |",
        "| trained on | Dataset org/one, Dataset two.jsonl |",
        "| objective | GRPO |",
        "| optimizer steps | 10 |",
        "| weights | bfloat16 |",
        "| benchmark | before | after 8 steps |",
        "| sums, avg@4 | 25.0 (15.0-35.0) | 75.0 (65.0-85.0) |",
        f"| torch | {torch.__version__} |",
    ):
        assert line in shown.splitlines(), line
    assert "length" not in body.partition("<details>")[0]
    (settings,) = re.findall(
        r"<summary>Settings of the run</summary>\n\n```yaml\n(.*)\n```\n\n</details>", body, re.DOTALL
    )
    assert yaml.safe_load(settings)["data"]["train"] == train


def test_the_card_of_a_checkpoint_alone_says_what_it_holds(checkpoint, monkeypatch):
    monkeypatch.setattr(default_model, "FOLDER", checkpoint.parent / "model")
    card = model_card("out", checkpoint, torch.float32)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.count("##") == 0
    assert "<details>" not in card


HOSTILE = (
    "a<script>alert(1)</script>|b\n# h\n```\n</details><img src=x onerror=alert(2)>"
    "[x](javascript:alert(3))*_`&lt;\u202e\x00"
)


def test_nothing_in_a_card_is_taken_for_markup(tmp_path):
    save_model(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    checkpoint = save_run(tmp_path / "run", tmp_path / "model", 1, task(path=HOSTILE), {}, own="a\n```\n</details><b>b")
    page = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(model_card(HOSTILE, checkpoint, torch.float32).split("---\n", 2)[2])
    )
    tags = {tag.strip("/ ") for tag in re.findall(r"<([^ >]+)", page)}
    assert tags == {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre", "code"}
    assert page.count("<h1>") == page.count("<details>") == page.count("<pre>") == 1
    assert "\u202e" not in page
    assert "\x00" not in page
    shown = "".join(c if c.isprintable() else " " for c in HOSTILE)
    assert f"<h1>{html.escape(shown).strip()}</h1>" in page.replace("&#x27;", "'")
    assert f"<td>Dataset {html.escape(shown).strip()}</td>" in page
