"""A study of the tiny model, and what five other seeds of it gave: ``reference/``.

``python -m tests.support.tiny_study`` makes those again, where a change of the algorithm is meant.
"""

import shutil
import tempfile
from pathlib import Path

import yaml

from tests.support.commands import aspo
from tests.support.configs import tiny_config, write_config
from tests.support.models import save_model, save_tokenizer

REFERENCE = Path(__file__).parent / "reference"


def asked(model: str, folder: Path) -> dict:
    """The study, as its file says it; ``folder`` is for the run's config and data."""
    config = tiny_config(model, folder, engine={"class_path": "TransformersEngine"})
    config["trainer"] |= {"enable_progress_bar": False, "max_epochs": 6, "check_val_every_n_epoch": 3}
    return {
        "question": "Which?",
        "arguments": ["--config", write_config(folder / "run.yaml", config)],
        "arms": {"a": [], "faster": ["--model.optimizer.init_args.lr", "5e-3"]},
        "seeds": [3, 1],
        "primary": {"tag": "rollout/reward", "epochs": 2},
        "comparisons": [["a", "faster"]],
        "secondary": [{"tag": "policy/entropy", "epochs": 2}],
        "curves": ["rollout/reward", "policy/entropy", "eval/sums/avg@2"],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        save_tokenizer(folder / "model")
        study = asked(str(folder / "model"), folder) | {"arms": {"a": []}, "seeds": [10, 11, 12, 13, 14]}
        (folder / "study.yaml").write_text(yaml.safe_dump(study | {"comparisons": []}))
        result = aspo("study", str(folder / "study.yaml"), "--folder", str(folder / "runs"))
        assert result.returncode == 0, result.stderr
        REFERENCE.mkdir(exist_ok=True)
        for file in ("study.yaml", "curves.csv"):
            shutil.copyfile(folder / "runs" / "results" / file, REFERENCE / file)


if __name__ == "__main__":
    main()
