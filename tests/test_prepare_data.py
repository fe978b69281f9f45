"""scripts/prepare_data.py: what goes and why, near duplicates, and going on after a kill."""

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import eventually

SCRIPT = str(Path(__file__).parent.parent / "scripts" / "prepare_data.py")

LONG = "A train leaves the station at noon and travels at sixty miles per hour for three hours, how far does it get"


@pytest.fixture
def prepare(monkeypatch, capsys):
    """What the script does in this process, which has imported most of what it needs."""

    def called(*args):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *args])
        code: object = 0
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as end:
            code = end.code
        stdout, stderr = capsys.readouterr()
        if isinstance(code, str):
            code, stderr = 1, stderr + code
        return subprocess.CompletedProcess(args, code, stdout, stderr)

    return called


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_goes_and_why(prepare, tmp_path, tiny_model):
    rows = [
        {"name": "a", "problem": LONG + "?", "solution": "180", "flag": ""},
        {"name": "b", "problem": "  " + LONG.upper() + " ?", "solution": "180", "flag": ""},  # the same words
        {"name": "c", "problem": LONG + " by then?", "solution": "180", "flag": ""},  # nearly
        {"name": "d", "problem": "What is 1+1?", "solution": "", "flag": ""},
        {"name": "e", "problem": "What is 2+2?", "solution": "4", "flag": "yes"},
        {"name": "f", "problem": "What is 3+3?" + " Think." * 40, "solution": "6", "flag": ""},
        {"name": "g", "problem": "What is 4+4?", "solution": "8", "flag": ""},
        {"name": "g", "problem": "What is 5+5?", "solution": "10", "flag": ""},
        {"name": "h", "problem": "What is the capital of France?", "solution": "Paris", "flag": ""},
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    held_out = write(tmp_path / "eval.jsonl", [{"question": "What is the capital of  France ?"}])
    columns = ["--source", source, "--question", "problem", "--answer", "solution", "--id", "name"]
    limits = ["--drop_if", "[flag]", "--model", tiny_model, "--max_prompt_length", "200"]
    result = prepare(*columns, *limits, "--held_out", f"[{held_out}]", "--near", "0.8", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert read(out) == [
        {"id": "a", "question": LONG + "?", "answer": "180"},
        {"id": "g", "question": "What is 4+4?", "answer": "8"},
    ]
    assert "9 rows read, 2 kept" in result.stdout
    for reason in ("exact duplicate", "near duplicate", "bad row", "has flag", "over-long prompt", "id taken"):
        count = 2 if reason == "exact duplicate" else 1
        assert f"{count} dropped: {reason}" in result.stdout
    assert "9row" in result.stderr.replace(" ", "")  # the progress bar

    again = prepare(*columns, *limits, "--held_out", f"[{held_out}]", "--near", "0.8", "--out", str(out))
    assert again.returncode != 0
    assert "is finished" in again.stderr
    misspelt = prepare(*columns, "--drop_if", "[flags]", "--out", str(tmp_path / "x.jsonl"))
    assert "in.jsonl:1 has no 'flags'" in misspelt.stderr
    other = prepare(*columns, "--out", str(out))
    assert "was begun with other values of drop_if" in other.stderr


@pytest.mark.parametrize(("near", "fewest", "most"), [(0.8, 0, 2), (0.87, 60, 60)])
def test_near_duplicates_are_as_near_as_asked(prepare, tmp_path, near, fewest, most):
    """Pairs of 40 word triples each, 37 of them the same: a similarity of 37 / 43 = 0.86."""
    rows = []
    for t in range(60):
        base = [f"{t}w{i}" for i in range(42)]
        rows += [" ".join(base), " ".join([*base[:39], *(f"{t}v{i}" for i in range(3))])]
    source = write(tmp_path / "in.jsonl", [{"question": q, "answer": "1"} for q in rows])
    result = prepare("--source", source, "--near", str(near), "--out", str(tmp_path / "out.jsonl"))
    assert result.returncode == 0, result.stderr
    questions = [row["question"] for row in read(tmp_path / "out.jsonl")]
    assert [q for q in questions if "v0" not in q] == rows[::2]
    assert fewest <= len(questions) - 60 <= most  # some signatures are too far apart to be looked at


def test_a_file_that_is_there_is_not_overwritten(prepare, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"question": "1+1", "answer": "2"}])
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    result = prepare("--source", source, "--out", str(out))
    assert result.returncode != 0
    assert "exists and isn't from an interrupted run" in result.stderr
    assert out.read_text() == "precious"
    bad = prepare("--source", source, "--out", str(tmp_path / "other.jsonl"), "--near", "0")
    assert "near is 0" in bad.stderr
    packed = prepare("--source", source, "--out", str(tmp_path / "out.jsonl.gz"))
    assert "its name must end with .jsonl" in packed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_killed_and_started_again_it_writes_the_same_file(prepare, tmp_path):
    words = ["apple", "pear", "plum", "fig", "kiwi", "lime", "date"]
    rows = [
        {"question": " ".join(words[(i * k) % 7] for k in range(1, 9)) + f" {i % 4000}", "answer": str(i)}
        for i in range(8_000)
    ]
    source = write(tmp_path / "in.jsonl", rows)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert prepare("--source", source, "--out", str(whole)).returncode == 0
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--source", source, "--out", str(part)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    progress = tmp_path / "part.jsonl.progress"

    def rows_saved():
        return json.loads(progress.read_text())["read"] if progress.exists() else 0

    assert eventually(rows_saved, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = json.loads((tmp_path / "part.jsonl.progress").read_text())
    assert 0 < state["read"] < 8_000
    with part.open("ab") as file:
        file.write(b'{"id": "torn')  # what a kill in the middle of a write leaves
    result = prepare("--source", source, "--out", str(part))
    assert f"Resuming after row {state['read']}" in result.stdout
    assert part.read_bytes() == whole.read_bytes()
