import json

import pytest
from transformers import AutoTokenizer

from aspo_lightning.errors import ConfigError
from aspo_lightning.models import load_config, load_tokenizer, resolve_model
from aspo_lightning.tasks import JSONLines, ReasoningGym


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def test_reasoning_gym_rows_become_prompts_in_the_chat_format(tokenizer):
    task = ReasoningGym("chain_sum", size=3, seed=5, config={"min_terms": 2, "max_terms": 2}, system_prompt="Add.")
    prompts = task.prompts(tokenizer)
    assert [p.id for p in prompts] == ["chain_sum/5/0", "chain_sum/5/1", "chain_sum/5/2"]
    for prompt in prompts:
        assert prompt.text == f"<|system|>Add.<|user|>{prompt.row['question']}<|assistant|>"
        assert tokenizer.decode(prompt.prompt_ids) == prompt.text
        assert prompt.row["metadata"]["num_terms"] == 2
        assert prompt.reward == "aspo_lightning.rewards.reasoning_gym.reward"
    assert [p.prompt_ids for p in task.prompts(tokenizer)] == [p.prompt_ids for p in prompts]


def test_without_chat_a_prompt_is_plain_text(tokenizer):
    (prompt,) = ReasoningGym("chain_sum", size=1, chat=False).prompts(tokenizer)
    assert prompt.text == prompt.row["question"]
    (prompt,) = ReasoningGym("chain_sum", size=1, chat=False, system_prompt="Add.").prompts(tokenizer)
    assert prompt.text == f"Add.\n\n{prompt.row['question']}"


def test_json_lines(tokenizer, tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"problem": "1+1", "solution": 2, "source": "x"}) + "\n\n")
    (prompt,) = JSONLines(str(path), question="problem", answer="solution", chat=False).prompts(tokenizer)
    assert (prompt.id, prompt.text) == ("sums.jsonl/1", "1+1")
    assert prompt.row == {"problem": "1+1", "solution": 2, "source": "x", "answer": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"question": "1+1"}', "sums.jsonl:1 has no 'answer'"),
        ('{"question": "1+1", "answer": ""}', "sums.jsonl:1 has no 'answer'"),
        ('{"question": "1+1", "answer": 2}\n[1]', "sums.jsonl:2 has no 'question'"),
        ("{", "sums.jsonl:1 isn't JSON"),
    ],
)
def test_unusable_files_are_refused(tokenizer, tmp_path, content, message):
    path = tmp_path / "sums.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        JSONLines(str(path)).prompts(tokenizer)


def test_unusable_tasks_are_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="doesn't exist"):
        JSONLines(str(tmp_path / "none.jsonl")).prompts(tokenizer)
    with pytest.raises(ConfigError, match="empty task"):
        ReasoningGym("chain_sum", size=0)
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
