"""What ``aspo view`` takes of a run, and what it refuses."""

import json

import pytest

from aspo_lightning.cli import view
from aspo_lightning.errors import ConfigError
from aspo_lightning.run.rollout_files import rollout_path
from aspo_lightning.view import completions
from aspo_lightning.view.completions import choose, read_epoch
from aspo_lightning.view.weights import COMPARED, Standout, objectives
from tests.support.commands import aspo_here
from tests.support.viewed_runs import record, tokens, write_epoch


def test_the_page_takes_the_worst_those_with_tokens_and_the_longest():
    some = tokens(("a", 1.0))
    records = [
        record(s, reward=float(s), length=100 * (s == 5), tokens=some if s in (6, 7, 8) else None) for s in range(20)
    ]
    assert choose(records, 8, Standout(8, 0, 1.0)) == [0, 1, 2, 5, 6, 7, 8, 19]
    assert choose(records, 4, Standout(8, 0, 1.0)) == [0, 1, 2, 8]
    assert choose(records, 100, None) == list(range(20))


def test_of_a_long_completion_the_tokens_around_the_most_different_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "MAX_TOKENS", 10)
    many = tokens(*[(str(i), 0.5 if i == 70 else 1.0) for i in range(100)])
    write_epoch(tmp_path, 0, [record(0, 1.0, tokens=many)])
    page = read_epoch(rollout_path(tmp_path, 0), 64, COMPARED).page
    kept = page["completions"][0]["tokens"]
    assert page["standout"] == {"completion": 0, "token": 70, "difference": 1.5}
    assert (kept["first"], kept["total"], kept["text"]) == (65, 100, [str(i) for i in range(65, 75)])
    assert kept["weights"]["ASPO"]["weight"] == [1.0] * 5 + [2.0] + [1.0] * 4


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"class_path": "my_package.Gone"}, "No module named 'my_package'"),
        ({"class_path": "json.JSONDecoder"}, "it isn't an Objective"),
        ({"class_path": "aspo_lightning.objectives.ASPO", "init_args": {"dual_clip": 0.5}}, "must be > 1"),
    ],
)
def test_an_objective_that_cannot_be_made_is_told_on_the_page(tmp_path, objective, said):
    write_epoch(tmp_path, 0, [record(0, 1.0)])
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"objective": objective}}))
    view.main([str(tmp_path)])
    data = (tmp_path / "view.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    notes = json.loads(data)["runs"][0]["notes"]
    assert objective["class_path"] in notes[0]
    assert said in notes[0]


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    def refused(*arguments):
        error = aspo_here(monkeypatch, "view", *map(str, arguments))
        assert error.startswith("aspo: error: ")
        assert "\n" not in error
        return error

    run = tmp_path / "version_0"
    assert f"{run} isn't a run's folder" in refused(run)
    run.mkdir()
    assert f"{run} isn't a run's folder" in refused(run)
    (run / "checkpoints").mkdir()
    assert "neither TensorBoard events nor rollouts yet" in refused(run)

    for epoch in range(3):
        write_epoch(run, epoch, [record(0, 1.0)])
    assert "--completions is 3; it must be at least 4" in refused(run, "--completions", 3)
    path = rollout_path(run, 2)
    whole = path.read_bytes()
    for damage in (whole[:-20], whole[:40] + b"\0\0\0\0" + whole[44:], b"no archive"):
        path.write_bytes(damage)
        assert f"{path} is damaged" in refused(run)
    write_epoch(run, 2, [record(0, 1.0), {"prompt_id": "x"}])
    assert f"{path} is damaged: line 2 isn't a completion" in refused(run)
    write_epoch(run, 2, [record(0, 1.0, tokens={"text": ["a"], "ratio": [], "entropy": [1.0]})])
    assert f"{path} is damaged: line 1 isn't a completion" in refused(run)
    path.write_bytes(whole)

    assert not (run / "view.html").exists()
    (tmp_path / "file").write_text("mine")
    assert "file exists. Remove it, or choose another place with --out." in refused(run, "--out", tmp_path / "file")
    assert "can't be written to" in refused(run, "--out", tmp_path / "file" / "view.html")
    assert (tmp_path / "file").read_text() == "mine"
    assert {p.name for p in run.iterdir()} == {"checkpoints", "rollouts"}


def test_names_of_folders_are_text_too(tmp_path):
    run = tmp_path / "<script>alert(1)<" / "version_0"
    write_epoch(run, 0, [record(0, 1.0)])
    view.main([str(run)])
    page = (run / "view.html").read_text()
    assert "<script>alert" not in page
    assert "<h1>&lt;script&gt;alert(1)&lt;/version_0</h1>" in page


def test_an_objective_that_needs_more_than_is_kept_is_named_and_the_two_are_shown():
    config = {"model": {"objective": {"class_path": "aspo_lightning.objectives.DPPO", "init_args": {"delta": 0.1}}}}
    with pytest.raises(ConfigError, match="objectives.DPPO can't weigh the tokens here: the objective needs logprobs"):
        objectives(config)
