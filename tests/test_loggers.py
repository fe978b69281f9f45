"""What a run gives its loggers besides curves, read back from what they wrote."""

import json
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar import layout_pb2

from aspo_lightning.cli.fit import RUN
from aspo_lightning.errors import ConfigError
from aspo_lightning.run.loggers import COLUMNS, LAYOUT, LoggerSetup, Samples, chosen, markdown
from aspo_lightning.run.tags import TAGS
from aspo_lightning.types import Phase, Prompt, Rollout, RolloutGroup
from tests.support.commands import aspo
from tests.support.configs import tiny_config, write_config

LOGGERS = "lightning.pytorch.loggers."


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """Two epochs with TensorBoard, W&B and MLflow, stopped after one and resumed."""
    folder = tmp_path_factory.mktemp("loggers")
    config = tiny_config(tiny_model, folder, engine={"class_path": "TransformersEngine"})
    config["trainer"]["check_val_every_n_epoch"] = 1
    config["trainer"]["logger"] = [
        {"class_path": LOGGERS + "TensorBoardLogger", "init_args": {"save_dir": RUN, "default_hp_metric": False}},
        {"class_path": LOGGERS + "WandbLogger", "init_args": {"save_dir": RUN, "offline": True}},
        {
            "class_path": LOGGERS + "MLFlowLogger",
            "init_args": {"tracking_uri": f"sqlite:///{RUN}/mlflow.db", "artifact_location": f"{RUN}/artifacts"},
        },
    ]
    path = write_config(folder / "config.yaml", config)
    for epochs, resume in (("1", []), ("2", ["--ckpt_path", "last"])):
        result = aspo("fit", "--config", path, "--trainer.max_epochs", epochs, "--samples.every_n_epochs", "1", *resume)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder / "tiny" / "version_0"


@pytest.fixture(scope="module")
def events(run):
    events = EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0})
    return events.Reload()


def test_tensorboards_first_screen_has_the_charts_that_matter(events):
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    shown = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }
    assert shown == LAYOUT
    tags = {tag for charts in LAYOUT.values() for chart in charts.values() for tag in chart}
    assert tags <= TAGS.keys()
    assert tags - {"rollout/length_right", "rollout/length_wrong"} <= set(events.Tags()["scalars"]) | {
        f"rollout/repetition_rate_{of}" for of in ("right", "wrong")
    }


def test_samples_are_shown_once_an_epoch_as_text(events):
    samples = events.Tensors("samples/text_summary")
    assert [sample.step for sample in samples] == [2, 4]
    for sample in samples:
        text = sample.tensor_proto.string_val[0].decode()
        titles = [line for line in text.splitlines() if line.startswith("###")]
        assert [title.split()[1] for title in titles] == ["best:", "worst:", "longest:", "random:"]
        assert " tokens" in titles[0]


def test_tensorboard_has_the_settings_with_what_came_of_them(events, run):
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings = HParamsPluginData.FromString(plugin.content).session_start_info.hparams
    assert settings["model.kl_coef"].number_value == 0.001
    assert settings["data.prompts_per_phase"].number_value == 4
    curve = events.Scalars("rollout/accuracy")
    assert events.Scalars("final/rollout/accuracy")[-1].value == curve[-1].value
    assert any(tag.startswith("final/eval/sums/avg@") for tag in events.Tags()["scalars"])
    assert "hp_metric" not in events.Tags()["scalars"]


def test_what_no_epoch_since_the_resume_has_measured_is_still_among_the_results():
    def ended(callback, **metrics):
        callback.on_train_epoch_end(SimpleNamespace(callback_metrics=metrics), None)

    before, after = LoggerSetup(), LoggerSetup()
    ended(before, **{"policy/entropy": torch.tensor(0.5), "rollout/reward": torch.tensor(1.0), "policy/kl": 2.0})
    after.load_state_dict(before.state_dict())
    ended(after, **{"rollout/reward": torch.tensor(3.0)})  # a phase without a useful group
    assert after.last == {"final/policy/entropy": 0.5, "final/rollout/reward": 3.0}


def test_wandb_has_settings_curves_and_tables(run):
    folders = sorted(run.glob("wandb/offline-run-*"))
    assert len(folders) == 2
    for folder in folders:
        (table,) = folder.glob("files/media/table/samples_*.json")
        found = json.loads(table.read_text())
        assert tuple(found["columns"]) == COLUMNS
        assert [row[0] for row in found["data"]] == ["best", "worst", "longest", "random"]
        (file,) = folder.glob("*.wandb")
        assert b"prompts_per_phase" in file.read_bytes()


def test_mlflow_has_settings_curves_and_tables(run):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(found) == 2
    assert all(one.data.params["model.kl_coef"] == "0.001" for one in found)
    steps = sorted(m.step for one in found for m in client.get_metric_history(one.info.run_id, "rollout/reward"))
    assert steps == [1, 3]
    tables = [path for path in run.glob("artifacts/**/samples.json") if path.is_file()]
    assert len(tables) == 2
    for table in tables:
        content = json.loads(table.read_text())
        assert content["columns"] == ["step", *COLUMNS]
        assert len(content["data"]) == 4


def rollout(reward, length, text="text", **settings):
    return Rollout((7,) * length, (-1.0,) * length, False, text, reward, reward == 1, **settings)


def phase(*rollouts, epoch=0):
    prompt = Prompt("p0", (5, 6), "Q", "how many?", {"x.reward": 1.0}, {})
    return Phase(epoch, [], 1, [RolloutGroup(prompt, tuple(rollouts))])


def test_samples_are_the_best_the_worst_the_longest_and_the_same_random_one():
    found = phase(rollout(0.5, 3), rollout(1.0, 2), rollout(1.0, 9), rollout(-1.0, 1), rollout(-1.0, 9))
    picked = {which: found.groups[0].rollouts.index(rollout) for which, (_, rollout) in chosen(found).items()}
    assert (picked["best"], picked["worst"], picked["longest"]) == (1, 3, 2)
    assert chosen(found) == chosen(phase(*found.groups[0].rollouts))
    assert len({id(chosen(phase(*found.groups[0].rollouts, epoch=e))["random"][1]) for e in range(20)}) > 2


HOSTILE = (
    "<script>window.pwned=1</script>\n# title\n[link](javascript:x) ![](http://x)\r\n\x00\u2028- item\u2029`a` "
    "\u202e\ud800"
)


def test_what_a_model_writes_is_shown_as_text():
    row = ("best", "p0", HOSTILE, HOSTILE, 1.0, 3, True)
    html = markdown_to_safe_html(markdown([row]).encode())
    assert html.count("<h3>") == 1
    assert not any(f"<{tag}" in html for tag in ("script", "a ", "img", "h1", "li", "ul"))
    assert html.count("&lt;script&gt;window.pwned=1&lt;/script&gt;") == 2
    assert "best: reward 1, 3 tokens, truncated" in html
    assert not set(html) & set("\x00\u2028\u2029\u202e")


def test_a_long_completion_is_cut():
    assert Samples(max_characters=5)._cut("abcdefg") == "abcde [2 more characters]"
    assert Samples(max_characters=7)._cut("abcdefg") == "abcdefg"


@pytest.mark.parametrize("settings", [{"every_n_epochs": -1}, {"max_characters": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError, match="samples.every_n_epochs is"):
        Samples(**settings)
