import json

import pytest
from matplotlib import pyplot
from torch.utils.tensorboard import SummaryWriter

from aspo_lightning.cli import report
from aspo_lightning.errors import ConfigError
from aspo_lightning.run.curves import read_run


def write_run(folder, accuracy, before, after):
    with SummaryWriter(str(folder)) as writer:
        for epoch, value in enumerate(accuracy):
            writer.add_scalar("rollout/accuracy", value, 2 * epoch + 1)
            writer.add_scalar("policy/entropy", 1.0, 2 * epoch + 1)
        writer.add_scalar("eval/sums/avg@4", before, 0)
        writer.add_scalar("eval/sums/avg@4", after, 20)


def test_the_table_has_both_ends_of_the_curve_and_of_each_benchmark(tmp_path, capsys):
    write_run(tmp_path / "name" / "version_0", [0.0] * 5 + [9.0] * 3 + [0.5] * 5, 0.25, 0.75)
    report.main([str(tmp_path / "name" / "version_0"), "--figure", str(tmp_path / "f.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| run | accuracy, first 5 → last 5 epochs | sums/avg@4 |"
    assert lines[2] == "| name/version_0 | 0.00 → 0.50 (+0.50) | 0.25 → 0.75 (+0.50) |"
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_goes_where_it_can_or_is_refused_before_anything_is_read(tmp_path, capsys):
    write_run(tmp_path / "version_0", [0.0] * 5, 0.25, 0.75)
    report.main([str(tmp_path / "version_0"), "--figure", str(tmp_path / "new" / "f.svg")])
    assert (tmp_path / "new" / "f.svg").read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match=r"f\.foo; its name must end with one of \.png, \.pdf, \.svg, \.jpg"):
        report.main([str(tmp_path / "nothing"), "--figure", str(tmp_path / "f.foo")])


def test_runs_of_one_name_are_told_apart_and_drawn_with_the_curves_asked_for(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    runs = [tmp_path / arm / "seed_0" / "version_0" for arm in ("a", "b")]
    for run, after in zip(runs, (0.5, 0.75), strict=True):
        write_run(run, [0.0] * 5, 0.25, after)
    report.main([*map(str, runs), "--figure", str(tmp_path / "f.png"), "--curves", "policy/entropy"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| a/seed_0/version_0", "| b/seed_0/version_0"]
    assert [line.split(" | ")[2] for line in lines[2:4]] == ["0.25 → 0.50 (+0.25) |", "0.25 → 0.75 (+0.50) |"]
    assert [axis.get_title() for axis in drawn[0].axes] == ["policy/entropy"]
    assert [line.get_ydata().tolist() for line in drawn[0].axes[0].get_lines()] == [[1.0] * 5] * 2
    with pytest.raises(ConfigError, match="version_0 is given twice"):
        report.main([str(runs[0]), str(runs[0])])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no TensorBoard events"):
        read_run(tmp_path)


def write_result(folder, solved, k=4, settings=None, name="aime24", prompts="same"):
    """An evaluation with these numbers of solutions, each of k completions."""
    folder.mkdir()
    problems = [
        {"id": str(i), "solved": [True] * n + [False] * (k - n), "answers": ["1"] * n + ["x"] * (k - n)}
        for i, n in enumerate(solved)
    ]
    mean = sum(solved) / k / len(solved)
    result = {
        "settings": {"model": folder.name, "benchmarks": {name: {"prompts": prompts}}, **(settings or {})},
        "benchmarks": {
            name: {
                "measurements": {f"avg@{k}": {"value": mean, "low": mean - 0.1, "high": mean + 0.1}},
                "problems": problems,
            }
        },
    }
    (folder / "settings.json").write_text("{}")
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def test_evaluations_side_by_side(tmp_path, capsys):
    base = write_result(tmp_path / "base", [16, 32, 0, 16] * 10, k=64)
    # As good on the whole as the base, up and down by problem; better on every problem; other problems.
    same = write_result(tmp_path / "same", [17, 31, 1, 15] * 10, k=64)
    better = write_result(tmp_path / "better", [18, 34, 2, 18] * 10, k=64, settings={"temperature": 1.0})
    other = write_result(tmp_path / "other", [16, 32, 0, 16] * 10, k=64, prompts="another")
    report.main([base, same, better, other + "/result.json", "--figure", str(tmp_path / "f.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | aime24/avg@64 |"
    assert lines[2:6] == [
        f"| {base} | 25.0 (15.0-35.0) |",
        f"| {same} | 25.0 (15.0-35.0) ≈ |",
        f"| {better} | 28.1 (18.1-38.1) |",
        f"| {other} | 25.0 (15.0-35.0) |",
    ]
    assert "| paper: Qwen3-4B + ASPO | 50.5 |" in lines
    assert "| paper: Qwen3-4B | 23.6 ≈ |" in lines  # in the first row's interval
    assert "| paper: DeepSeek-R1-Distill-Qwen-1.5B + GRPO | 42.1 |" in lines  # in none
    assert "| paper: DeepSeek-R1-Distill-Qwen-1.5B | 30.6 ≈ |" in lines
    assert "Not the same: temperature is None, None, 1.0, None." in lines
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_result_is_told(tmp_path):
    result = write_result(tmp_path / "a", [1, 2])
    with pytest.raises(ConfigError, match="--curves is of runs and studies, and .*a is an evaluation"):
        report.main([result, "--curves", "policy/kl"])
    (tmp_path / "going_on").mkdir()
    (tmp_path / "going_on" / "settings.json").write_text("{}")
    with pytest.raises(ConfigError, match="isn't finished. Run the same command again"):
        report.main([str(tmp_path / "going_on")])
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ConfigError, match="x.json isn't a result of `aspo test`"):
        report.main([result, str(tmp_path / "x.json")])
    older = tmp_path / "older.json"
    older.write_text((tmp_path / "a" / "result.json").read_text().replace('"solved"', '"rewards"'))
    with pytest.raises(ConfigError, match="older.json isn't a result of `aspo test`"):
        report.main([result, str(older)])
    with pytest.raises(ConfigError, match="is an evaluation and .* is not"):
        report.main([result, str(tmp_path)])
