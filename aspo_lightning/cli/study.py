"""``aspo study STUDY``: makes the runs of a study, several at a time, and reports what they show."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from aspo_lightning.errors import ConfigError
from aspo_lightning.run.disk import check_writable, lock
from aspo_lightning.shipped import find_config
from aspo_lightning.study.cells import CellFolder, fit_all
from aspo_lightning.study.folder import StudyResults, origins
from aspo_lightning.study.study import RESULTS, Study, read_study


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="aspo study",
        description=f"{__doc__} A run that was cut off is resumed, one that is finished is not made again.",
    )
    parser.add_argument("study", metavar="STUDY", help="a study's YAML file, or the name of one that is shipped")
    parser.add_argument("--folder", type=Path, help="where its runs go (runs/studies/NAME)")
    parser.add_argument(
        "--jobs", type=int, help="how many runs at a time (1 with a GPU, or as many as the processor has room for)"
    )
    options = parser.parse_args(arguments)
    source = Path(find_config(options.study))
    study, text = read_study(source), source.read_text()
    folder = options.folder or Path("runs") / "studies" / source.stem
    at_a_time = 1 if torch.cuda.is_available() else max(1, len(os.sched_getaffinity(0)) // study.threads)
    jobs = at_a_time if options.jobs is None else options.jobs
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; it must be at least 1.")
    check_writable(folder, "--folder")
    for number in (signal.SIGTERM, signal.SIGHUP):  # its runs end with it
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    with lock(folder):
        make(study, text, folder, jobs)


def make(study: Study, text: str, folder: Path, jobs: int) -> None:
    """Trains what isn't finished, and reports; ``text`` is that of the study's file."""
    cells = [CellFolder(study, folder, cell) for cell in study.cells]
    results = StudyResults(folder / RESULTS)
    results.check(study)
    for cell in cells:
        cell.claim()
    try:
        fit_all(cells, jobs)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command resumes the study.")
    results.write(text, study, cells)
    print(f"{results.report()}\n\nTable, figure and origin: {results.path}")
    if len(origins(cells)) > 1:
        print("Not all runs come from the same code, versions, processor and weights: origin.json says which do.")
