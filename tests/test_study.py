"""Studies: what is told from a few runs, and ``aspo study`` with ``aspo report --against`` as a user calls them."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from scipy import stats

from aspo_lightning.cli.main import main
from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.run.curves import BEFORE, by_epoch, read_run
from aspo_lightning.run.disk import file_digest, lock
from aspo_lightning.run.folder import last_run
from aspo_lightning.run.tags import TAGS
from aspo_lightning.study import statistics
from aspo_lightning.study.against import against, describe
from aspo_lightning.study.cells import CellFolder
from aspo_lightning.study.report import figure, markdown
from aspo_lightning.study.study import Cell, Measure, read_study
from aspo_lightning.study.table import last, read_table, results, to_csv
from tests.support import tiny_study
from tests.support.commands import ASPO, ROOT, aspo, aspo_forked, aspo_here


def test_intervals_by_hand():
    mean, low, high = statistics.mean([1, 2, 3, 4, 5])
    half = 2.7764451051977987 * math.sqrt(2.5 / 5)  # Student's quantile for 4 degrees of freedom
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half))
    found = statistics.difference([1.0, 2.0, 4.0, 8.0], [0.5, 0.7, 0.2])
    theirs = stats.ttest_ind([1.0, 2.0, 4.0, 8.0], [0.5, 0.7, 0.2], equal_var=False).confidence_interval()
    assert found == pytest.approx((3.75 - 1.4 / 3, theirs.low, theirs.high))
    assert math.isnan(statistics.mean([1.0]).low)
    assert math.isnan(statistics.difference([1.0], [2.0, 3.0]).high)


def column(*values):
    return np.array(values, dtype=float)[:, None]


def test_the_permutation_test_counts_splits():
    # Of the 20 splits of six numbers into three and three, two have the means as far apart as these.
    assert statistics.permutation_test(column(1, 2, 3), column(4, 5, 6)) == pytest.approx([2 / 20])
    x, y = column(0.3, 1.2, 0.1, 0.9), column(0.2, 0.25, 0.15, 0.35, 0.4)
    theirs = stats.permutation_test(
        (x[:, 0], y[:, 0]), lambda a, b, axis: abs(a.mean(axis) - b.mean(axis)), vectorized=True, alternative="greater"
    )
    assert statistics.permutation_test(x, y) == pytest.approx([theirs.pvalue])
    assert statistics.permutation_test(column(2, 2, 2), column(2, 2, 2)) == [1]


def test_several_measures_are_held_against_the_farthest_of_a_split():
    x = np.array([[1.0, 1.0], [2.0, 3.0], [3.0, 2.0]])
    y = np.array([[4.0, 2.5], [5.0, 1.5], [6.0, 3.5]])
    both = np.concatenate([x, y])
    both = (both - both.mean(0)) / both.std(0)
    far = []
    for chosen in itertools.combinations(range(6), 3):
        others = [i for i in range(6) if i not in chosen]
        far.append(np.abs(both[list(chosen)].mean(0) - both[others].mean(0)))
    by_hand = [np.mean([max(f) >= far[0][m] - 1e-9 for f in far]) for m in (0, 1)]
    assert statistics.permutation_test(x, y) == pytest.approx(by_hand)


def test_runs_of_one_kind_are_called_the_same_in_95_of_100_draws():
    """Curves that go together, with heavy tails, constants and rounding, as those of runs do."""
    generator = np.random.default_rng(1)
    draws, measures, alarms = 2000, 12, 0
    mix = generator.normal(size=(4, measures))
    for _ in range(draws):
        x = generator.standard_t(3, size=(10, 4)) @ mix
        x[:, 0] = 0.0
        x[:, 1] = np.round(x[:, 1])
        alarms += statistics.permutation_test(x[:5], x[5:]).min() <= 0.05
    assert 0.93 <= 1 - alarms / draws <= 0.97


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_too_few_runs_are_refused_before_anything_is_said():
    with pytest.raises(ConfigError, match="5 and 1 runs can't be told apart .* is 0.17"):
        statistics.check_can_tell(5, 1)
    statistics.check_can_tell(5, 2)
    with pytest.raises(ConfigError, match="is 0.10. Train with more seeds"):
        statistics.check_can_tell(3, 3)


def test_many_runs_are_split_at_random_the_given_way_first():
    weights = statistics.splits(20, 20)
    assert weights.shape == (statistics.MOST_SPLITS, 40)
    assert (weights[0] == np.array([1 / 20] * 20 + [-1 / 20] * 20)).all()
    assert len(np.unique(weights > 0, axis=0)) > statistics.MOST_SPLITS - 10
    assert np.allclose((weights > 0).mean(0), 0.5, atol=0.02)  # any run may be on either side
    assert weights.sum(1) == pytest.approx(0)


def test_curves_by_epoch():
    logged = {
        "epoch": [(0, 0.0), (3, 0.0), (7, 1.0), (7, 1.0), (11, 2.0)],
        "policy/loss": [(3, 0.5), (7, 0.4), (7, 0.3), (11, 0.2)],  # epoch 1 again, after a resume
        "eval/sums/avg@2": [(0, 0.1), (7, 0.6)],
        "time/sync_s": [(3, 9.0)],
    }
    found = results(by_epoch(logged))
    assert found == {"policy/loss": {0: 0.5, 1: 0.3, 2: 0.2}, "eval/sums/avg@2": {BEFORE: 0.1, 1: 0.6}}
    one_step = {
        "epoch": [(0, 0.0), (0, 0.0), (1, 1.0)],
        "eval/a": [(0, 0.1), (0, 0.2), (1, 0.3)],
        "b": [(0, 7), (1, 8)],
    }
    assert by_epoch(one_step)["eval/a"] == {BEFORE: 0.1, 0: 0.2, 1: 0.3}
    assert by_epoch(one_step)["b"] == {0: 7, 1: 8}
    assert by_epoch({}) == {}


float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b,c", 'd"e', "f\ng"]), st.dictionaries(st.integers(-1, 9), float32), min_size=1
    )
)
def test_a_table_is_read_as_it_was_written_to_the_bit(tmp_path_factory, curves):
    path = tmp_path_factory.mktemp("table") / "curves.csv"
    table = {"x y": {3: curves}, "z": {0: {"a": {0: 1.0}}}}
    path.write_text(to_csv(table))
    assert read_table(path).get("x y", {}).get(3, {}) == {tag: values for tag, values in curves.items() if values}


def test_a_damaged_table_is_refused_with_its_line(tmp_path):
    (tmp_path / "t.csv").write_text("arm,seed,epoch,a\nx,0,0,1.0\nx,0,one,1.0\n")
    with pytest.raises(RunError, match="t.csv is damaged in line 3"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match="isn't a study's table"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="can't be read"):
        read_table(tmp_path / "none.csv")


def test_a_changed_config_is_noticed_however_it_is_named(tmp_path):
    config = tmp_path / "run.yaml"
    for number, named in enumerate((["--config", str(config)], ["-c", str(config)], [f"--config={config}"])):
        config.write_text("{data: {group_size: 4}}")
        study = read_study(written(tmp_path, arguments=named))
        CellFolder(study, tmp_path / str(number), Cell("a", 3)).claim()
        config.write_text("{data: {group_size: 4}} # a comment")
        CellFolder(study, tmp_path / str(number), Cell("a", 3)).claim()
        config.write_text("{data: {group_size: 5}}")
        with pytest.raises(ConfigError, match="begun with other settings"):
            CellFolder(study, tmp_path / str(number), Cell("a", 3)).claim()
        config.write_text("data: [")
        with pytest.raises(ConfigError, match="A config that a names isn't YAML"):
            CellFolder(study, tmp_path / str(number), Cell("a", 3)).claim()


def test_a_report_says_of_how_many_runs_a_number_is_and_takes_tables_in_part(tmp_path):
    study = read_study(written(tmp_path))
    curves = {"eval/sums/avg@4": {0: 0.5}}
    table = {"a": {1: curves, 3: {"eval/sums/avg@4": {0: math.nan}}}}
    lines = markdown(study, table, {}).splitlines()
    assert "| a | 2 | 0.5 [nan, nan] (1 of 2) |" in lines
    assert "| b | 0 | - |" in lines
    assert "| a - b | - | - | - |" in lines
    table["b"] = {1: curves, 3: curves}
    assert "| a - b | - | - | - |" in markdown(study, table, {}).splitlines()  # of what is left of a


@pytest.mark.parametrize(("seeds", "least"), [(1, "1.00"), (3, "0.10"), (4, None), (5, None)])
def test_a_report_says_when_not_even_the_largest_difference_would_be_found(tmp_path, seeds, least):
    study = read_study(written(tmp_path, seeds=list(range(seeds))))
    far = {
        arm: {s: {"eval/sums/avg@4": {0: level + s / 100}} for s in range(seeds)}
        for arm, level in {"a": 0, "b": 1}.items()
    }
    text = markdown(study, far, {})
    p = text.split("| a - b | ")[1].split(" | ")[1]
    assert float(p) == pytest.approx(2 / math.comb(2 * seeds, seeds), abs=5e-4)  # the smallest there is
    said = (
        f"{seeds} seeds can't show a difference here, however large: the smallest p of 1 comparison of so few runs is "
    )
    assert (said in text) == (least is not None)
    if least is not None:
        assert f"{said}{least}." in text


def test_a_measure_is_of_the_last_epoch_or_of_none():
    """An evaluation that wasn't made after the last epoch is of other weights."""
    curves = {"eval/a": {-1: 0.1, 2: 0.5, 4: 0.7}, "eval/b": {-1: 0.1, 2: 0.5}, "c": {0: 1.0, 3: 2.0, 4: 4.0}}
    assert last(curves, "eval/a") == 0.7
    assert last(curves, "c", 2) == 3
    assert math.isnan(last(curves, "eval/b"))
    assert math.isnan(last(curves, "d"))


def test_a_report_counts_comparisons_for_that(tmp_path):
    five = {"seeds": [1, 2, 3, 4], "arms": {"a": [], "b": [], "c": []}, "comparisons": [["a", "b"], ["a", "c"]]}
    assert "smallest p of 2 comparisons of so few runs is 0.06." in markdown(
        read_study(written(tmp_path, **five)), {}, {}
    )


def test_the_figure_has_the_comparisons_and_every_arm_by_its_own_line(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    arms = {f"arm_{i:02}": [] for i in range(12)}
    asked = {"arms": arms, "comparisons": [["arm_00", "arm_11"], ["arm_02", "arm_01"]], "seeds": [0, 1]}
    study = read_study(written(tmp_path, **asked))
    table = {f"arm_{i:02}": {s: {"eval/sums/avg@4": {0: 0.0, 1: i + s / 10}} for s in (0, 1)} for i in range(12)}
    figure(study, table, tmp_path / "f.png")
    compared, curves = drawn[0].axes
    assert [label.get_text() for label in compared.get_yticklabels()] == ["arm_00 - arm_11", "arm_02 - arm_01"]
    dots = [container.lines[0].get_xydata().tolist() for container in compared.containers]
    assert np.allclose(dots, [[[-11, 0]], [[1, 1]]])
    ends = [container.lines[2][0].get_segments()[0][:, 0] for container in compared.containers]
    expected = [statistics.difference([0, 0.1], [11, 11.1]), statistics.difference([2, 2.1], [1, 1.1])]
    assert np.allclose(ends, [[e.low, e.high] for e in expected])
    assert compared.get_ylim()[0] > compared.get_ylim()[1]  # the first is at the top
    lacking = table | {"arm_00": table["arm_00"] | {1: {"eval/sums/avg@4": {0: 0.0, 1: math.nan}}}}
    figure(study, lacking, tmp_path / "f.png")
    dots = [container.lines[0].get_xydata().tolist() for container in drawn[1].axes[0].containers]
    assert np.allclose(dots, [[[1, 1]]])  # of all runs or none
    lines = curves.get_lines()
    assert np.allclose(lines[3].get_ydata(), [0, 3.05])
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == list(arms)


def run(level, epochs=4, **other):
    return {"a": {e: level + 0.1 * e for e in range(epochs)}, **other}


def test_against_names_what_differs_and_what_it_couldnt_compare():
    levels = [0.01, 0.03, 0.02, 0.05, 0.04]
    rounding = {"mismatch/kl": {0: 1e-9}}, {"mismatch/kl": {0: 1e-7}}
    reference = [run(x, b={0: 1.0 - x}, c={0: 1.0}, **rounding[0]) for x in levels]
    verdict = against(reference, [run(1 + x, b={0: 1.0 - x}, **rounding[1]) for x in levels])
    assert not verdict.same
    assert [m.name for m in verdict.measures if m.chance <= 0.05] == [*("a, whole", "a, end", "c, finite values")]
    assert verdict.measures[0].reference == pytest.approx(0.03 + 0.15)
    assert verdict.measures[1].new == pytest.approx(1.03 + 0.3)
    assert verdict.left_out == ["c"]
    without = [
        m.name for m in against(reference, [run(x, b={0: 1.0 - x}) for x in levels]).measures if m.chance <= 0.05
    ]
    assert without == ["c, finite values"]
    steady = [run(x, b={0: x, 1: x}) for x in levels]
    wild = [run(x, b={0: 50 + x, 1: math.nan if x == 0.05 else 50.0}) for x in levels]  # a step was skipped
    assert [m.name for m in against(steady, wild).measures if m.chance <= 0.05] == ["b, whole", "b, end"]
    assert against(reference, reference[::-1]).same
    later = against(reference, [one | {"d": {0: 5.0}} for one in reference])  # logged since
    assert (later.same, later.unknown) == (True, ["d"])
    assert "The reference has no d." in describe(later, "it", 5, 5)
    with pytest.raises(ConfigError, match="reference's runs have 4 epochs and these 3"):
        against(reference, [run(x, epochs=3) for x in levels])
    with pytest.raises(ConfigError, match="no curve in common"):
        against(reference, [{"d": {3: 1.0}}] * 5)


ASKED = {
    "question": "Which?",
    "arguments": ["--config", "sums"],
    "arms": {"a": [], "b": ["--model.objective", "GRPO"]},
    "seeds": [3, 1],
    "primary": {"tag": "eval/sums/avg@4"},
    "comparisons": [["a", "b"]],
    "curves": ["eval/sums/avg@4"],
}


def written(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**ASKED, **changes}.items() if v is not None}))
    return path


def test_a_study_is_read_with_its_cells_seed_by_seed(tmp_path):
    study = read_study(written(tmp_path, secondary=[{"tag": "x", "epochs": 3}]))
    assert study.cells == [Cell("a", 3), Cell("b", 3), Cell("a", 1), Cell("b", 1)]
    assert study.secondary == [Measure("x", 3)]
    assert study.comparisons == [("a", "b")]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": "x"}, "seeds"),
        ({"seeds": []}, "seeds are \\[\\]"),
        ({"curves": []}, "curves are \\[\\]. Give at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seed": 1}, "'seed'"),
        ({"primary": None}, "primary"),
        ({"primary": {"tag": "x", "epochs": 0}}, "epochs is 0; it must be at least 1"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"comparisons": [["a", "c"]]}, "'c', which isn't an arm. Arms are a, b"),
        ({"comparisons": [["a", "b"], ["b", "a"]]}, "a pair twice"),
        ({"comparisons": [["a", "a"]]}, "'a' against itself"),
        ({"arms": {"../a": []}}, "can't name a folder"),
        ({"arms": {"results": []}, "comparisons": []}, "can't name a folder"),
        ({"arguments": ["--seed_everything", "1"]}, "--seed_everything is what the study gives each run itself"),
        ({"arms": {"a": ["--trainer.default_root_dir=x"], "b": []}}, "--trainer.default_root_dir=x is what the study"),
        ({"arms": {"a": "x"}}, "arms"),
    ],
)
def test_a_study_that_cant_be_made_is_refused(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=f"study.yaml isn't a study: .*{says}"):
        read_study(written(tmp_path, **changes))


def test_what_isnt_a_study_at_all_is_refused(tmp_path):
    for text in ("[1, 2]", "", "a: [", "\x00"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match="isn't a study"):
            read_study(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        read_study(tmp_path / "none.yaml")


def under_way(folder):
    """Whether a run is in its first epochs."""
    logs = [p.read_text() for p in folder.rglob("log.txt") if not (p.parent / "curves.csv").exists()]
    return any("epoch    0 |" in text and "epoch    2 |" not in text for text in logs)


@pytest.fixture(scope="module")
def study(tiny_model, tmp_path_factory):
    """Two arms and two seeds of the tiny model, interrupted once."""
    folder = tmp_path_factory.mktemp("study")
    path = written(folder, **tiny_study.asked(tiny_model, folder))
    command = [ASPO, "study", str(path), "--folder", str(folder / "runs"), "--jobs", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while not (list(folder.glob("runs/*/*/curves.csv")) and under_way(folder)):  # one of four is finished
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    said, _ = process.communicate(timeout=60)
    assert said.endswith("Stopped. The same command resumes the study.\n")
    assert "SIGTERM: stopping when this epoch has ended" in "".join(p.read_text() for p in folder.rglob("log.txt"))
    done = {p: p.read_bytes() for p in folder.glob("runs/*/*/curves.csv")}
    assert len(done) < len(list(folder.glob("runs/*/*/log.txt")))  # what was under way has ended early
    assert not subprocess.run(["pgrep", "-f", f"fit.*{folder}"], capture_output=True).stdout  # none goes on alone
    finished = aspo(*command[1:])
    assert finished.returncode == 0, finished.stderr
    resumed = [p for p in folder.rglob("log.txt") if "Resuming from" in p.read_text()]
    assert resumed
    assert all(len(list(p.parent.glob("version_*"))) == 1 for p in resumed)
    return folder, path, done, finished.stdout


def run_of(folder, arm, seed):
    """The finished run: a second one where the first was interrupted before it had a checkpoint."""
    return last_run(folder / "runs" / arm / f"seed_{seed}").path


def test_a_study_makes_each_run_once_and_keeps_what_is_small(study, tiny_model):
    folder, path, done, shown = study
    for file, before in done.items():
        assert file.read_bytes() == before
        assert len(list(file.parent.glob("version_*"))) == 1
    kept = folder / "runs" / "results"
    assert {str(p.relative_to(kept)) for p in kept.rglob("*") if p.is_file()} == {
        *("study.yaml", "curves.csv", "seconds.csv", "report.md", "figure.png", "origin.json"),
        *("configs/a.yaml", "configs/faster.yaml"),
    }
    assert (kept / "study.yaml").read_bytes() == path.read_bytes()
    (origin,) = json.loads((kept / "origin.json").read_text())
    assert origin["runs"] == {"a": [3, 1], "faster": [3, 1]}
    assert origin["origin"]["versions"]["torch"] == torch.__version__
    assert origin["origin"]["weights"] == {"model.safetensors": file_digest(Path(tiny_model) / "model.safetensors")}
    assert "Not all runs" not in shown
    table = read_table(kept / "curves.csv")
    assert {arm: set(seeds) for arm, seeds in table.items()} == {"a": {1, 3}, "faster": {1, 3}}
    config = yaml.safe_load((kept / "configs" / "faster.yaml").read_text())
    assert config["model"]["optimizer"]["init_args"]["lr"] == 5e-3
    reward = {arm: [np.mean(list(c["rollout/reward"].values())[-2:]) for c in s.values()] for arm, s in table.items()}
    row = next(line for line in shown.splitlines() if line.startswith("| a - faster |"))
    assert f"{np.mean(reward['a']) - np.mean(reward['faster']):.3g} [" in row
    assert shown.startswith("Which?\n")
    logged = [by_epoch(read_run(run_of(folder, "a", seed))) for seed in (3, 1)]
    took = [sum(v for tag, at in run.items() if tag.startswith("time/") for v in at.values()) for run in logged]
    row = next(line for line in shown.splitlines() if line.startswith("| a | 2 |"))
    assert row.split(" | ")[-1].startswith(f"{np.mean(took):.3g} [")


def test_a_cell_made_again_alone_has_the_same_curves_to_the_bit(study, tmp_path):
    alone = yaml.safe_load(study[1].read_text()) | {"arms": {"a": []}, "seeds": [3], "comparisons": []}
    result = aspo("study", str(written(tmp_path, **alone)), "--folder", str(tmp_path / "runs"))
    assert result.returncode == 0, result.stderr
    before, after = (read_table(f / "runs" / "results" / "curves.csv")["a"][3] for f in (study[0], tmp_path))
    assert len(before) > 20
    assert before == after


def test_figure_and_report_are_made_again_from_the_table(study, tmp_path):
    kept = study[0] / "runs" / "results"
    result = aspo_forked("report", str(kept), "--figure", str(tmp_path / "f.png"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "f.png").read_bytes() == (kept / "figure.png").read_bytes()
    assert result.stdout == f"{(kept / 'report.md').read_text()}\nFigure: {tmp_path / 'f.png'}\n"


def test_other_curves_of_a_study_are_drawn(study, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    kept = str(study[0] / "runs" / "results")
    monkeypatch.setattr(
        sys, "argv", ["aspo", "report", kept, "--figure", str(tmp_path / "f.png"), "--curves", "policy/kl"]
    )
    main()
    assert [axis.get_title() for axis in drawn[0].axes] == ["difference of rollout/reward, last 2", "policy/kl"]
    for arguments in ([kept], [str(run_of(study[0], "a", 3))]):
        said = aspo_here(monkeypatch, "report", *arguments, "--curves", "policy/kl", "x")
        assert said.startswith("aspo: error: --curves has x, which isn't logged here. There are ")


def test_results_are_written_from_what_a_finished_run_left(study, tmp_path, monkeypatch, capsys):
    """Its run isn't needed any more; and runs of other origins are told apart."""
    shutil.copytree(study[0] / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("version_*", "results"))
    file = tmp_path / "runs/faster/seed_1/origin.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor": "another"}))
    asked = tmp_path / study[1].name
    shutil.copy(study[1], asked)
    changed = lambda cells, jobs: asked.write_text("# of another study")  # noqa: E731 (while it runs)
    monkeypatch.setattr("aspo_lightning.cli.study.fit_all", changed)
    monkeypatch.setattr(sys, "argv", ["aspo", "study", str(asked), "--folder", str(tmp_path / "runs")])
    main()
    assert capsys.readouterr().out.endswith(
        "Not all runs come from the same code, versions, processor and weights: origin.json says which do.\n"
    )
    kept, before = (folder / "runs" / "results" for folder in (tmp_path, study[0]))
    assert (kept / "study.yaml").read_text() == study[1].read_text()
    for name in ("curves.csv", "report.md", "figure.png", "configs/a.yaml"):
        assert (kept / name).read_bytes() == (before / name).read_bytes()
    found = json.loads((kept / "origin.json").read_text())
    assert [one["runs"] for one in found] == [{"a": [3, 1], "faster": [3]}, {"faster": [1]}]


def test_settings_that_have_changed_are_refused(study, tmp_path, monkeypatch):
    folder, path, _, _ = study
    changed = written(tmp_path, **yaml.safe_load(path.read_text().replace("5e-3", "4e-3")))
    assert aspo_here(monkeypatch, "study", str(changed), "--folder", str(folder / "runs")).startswith(
        f"aspo: error: {folder}/runs/faster/seed_3 was begun with other settings than the study has now"
    )
    fewer = written(tmp_path, **yaml.safe_load(path.read_text()) | {"seeds": [3]})
    assert "has a, seed 1, which this study doesn't" in aspo_here(
        monkeypatch, "study", str(fewer), "--folder", str(folder / "runs")
    )
    assert "--jobs is 0; it must be at least 1" in aspo_here(monkeypatch, "study", str(path), "--jobs", "0")


def test_a_folder_takes_one_study_at_a_time(study, monkeypatch):
    folder, path, _, _ = study
    with lock(folder / "runs"):
        said = aspo_here(monkeypatch, "study", str(path), "--folder", str(folder / "runs"))
    assert said.startswith(f"aspo: error: Another run is writing to {folder}/runs.")


def test_a_run_that_fails_is_named_and_the_others_are_made(study, tmp_path):
    asked = yaml.safe_load(study[1].read_text())
    asked |= {"arms": {"bad": ["--data.group_size", "1"], "good": []}, "seeds": [3], "comparisons": []}
    result = aspo("study", str(written(tmp_path, **asked)), "--folder", str(tmp_path / "runs"))
    assert result.returncode == 1
    log = tmp_path / "runs" / "bad" / "seed_3" / "log.txt"
    assert f"1 of 2 runs failed: bad, seed 3: `aspo fit` failed (1); see {log}." in result.stderr
    assert "data.group_size is 1" in log.read_text()
    assert (tmp_path / "runs/good/seed_3/curves.csv").exists()


def test_runs_are_held_against_a_reference(study, monkeypatch, capsys):
    """Other seeds are the same; five times the learning rate isn't."""
    kept = study[0] / "runs" / "results"

    def report(arm, *arguments, seeds=(3, 1)):
        runs = [str(run_of(study[0], arm, seed)) for seed in seeds]
        monkeypatch.setattr(sys, "argv", ["aspo", "report", *runs, *arguments])
        try:
            main()
        except SystemExit as exit:
            return exit.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    code, text = report("a", "--against", str(tiny_study.REFERENCE))
    assert (code, text.split(" (")[0]) == (0, f"Same as {tiny_study.REFERENCE}, a")
    code, text = report("faster", "--against", str(tiny_study.REFERENCE))
    assert (code, text.split(" (")[0]) == (3, f"Different from {tiny_study.REFERENCE}, a")
    assert "5 and 1 runs can't be told apart" in report("a", "--against", str(tiny_study.REFERENCE), seeds=[3])[0]
    assert "has the arms a, faster. Choose one with --arm" in report("a", "--against", str(kept))[0]
    assert "has no arm 'c'. It has a, faster" in report("a", "--against", str(kept), "--arm", "c")[0]
    assert "holds no study.yaml" in report("a", "--against", str(kept.parent))[0]
    assert "--arm is of --against" in report("a", "--arm", "a")[0]
    assert "is given twice" in report("a", "--against", str(tiny_study.REFERENCE), seeds=[3, 3])[0]
    assert "--against draws none" in report("a", "--against", str(kept), "--figure", "f.png")[0]
    assert "--against draws none" in report("a", "--against", str(kept), "--curves", "policy/kl")[0]


STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_a_shipped_study_has_settings_and_curves_that_are_there(path, parsers, monkeypatch, capsys):
    study = read_study(path)
    for arguments in study.arms.values():
        assert aspo_here(monkeypatch, "fit", *study.arguments, *arguments, "--print_config") == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        trainer, data = printed["trainer"], printed["data"]
        assert trainer["max_epochs"] % trainer["check_val_every_n_epoch"] == 0  # or the last weights aren't evaluated
        evaluated = {f"eval/{task}/{m}@{data['eval_group_size']}" for task in data["val"] for m in ("avg", "pass")}
        for tag in (study.primary.tag, *(m.tag for m in study.secondary), *study.curves):
            assert tag in TAGS.keys() | evaluated


REFERENCES = sorted((ROOT / "docs" / "reference").glob("*/study.yaml"))


@pytest.mark.parametrize("path", REFERENCES, ids=lambda p: p.parent.name)
def test_a_reference_is_of_its_study_and_its_report_of_its_table(path, monkeypatch, capsys, tmp_path):
    folder = path.parent
    assert path.read_bytes() == (ROOT / "configs" / "studies" / f"{folder.name}.yaml").read_bytes()
    study, table = read_study(path), read_table(folder / "curves.csv")
    assert {(arm, seed) for arm, seeds in table.items() for seed in seeds} == set(study.cells)
    assert {p.stem for p in (folder / "configs").iterdir()} == set(study.arms)
    monkeypatch.setattr(sys, "argv", ["aspo", "report", str(folder), "--figure", str(tmp_path / "f.png")])
    monkeypatch.chdir(ROOT)
    main()
    assert capsys.readouterr().out == f"{(folder / 'report.md').read_text()}\nFigure: {tmp_path / 'f.png'}\n"
    runs = [one["runs"] for one in json.loads((folder / "origin.json").read_text())]
    assert {(arm, seed) for one in runs for arm, seeds in one.items() for seed in seeds} == set(study.cells)
