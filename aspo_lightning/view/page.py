"""The page: one HTML file with its data, scripts and styles, which asks nothing of any network."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from aspo_lightning.view.runs import Run, page_panel, page_run, panels

FOLDER = Path(__file__).parent
SCRIPTS = ("charts.js", "tokens.js", "completions.js")


def render(runs: Sequence[Run]) -> str:
    """The page of some runs.

    Data goes in as JSON, in which ``tojson`` leaves nothing that HTML has a meaning for; scripts make text of it only.
    Of scripts the browser runs the page's own, known by their digests.
    """
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    scripts = [get_plotlyjs(), "\n".join((FOLDER / name).read_text() for name in SCRIPTS)]
    shown = [page_run(run) for run in runs]
    return environment.get_template("page.html").render(
        title=", ".join(str(run["name"]) for run in shown),
        style=(FOLDER / "page.css").read_text(),
        scripts=scripts,
        digests=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
        data={"runs": shown, "panels": [page_panel(panel) for panel in panels(run.points for run in runs)]},
        epochs=[(f"{i}-{epoch}", page) for i, run in enumerate(runs) for epoch, page in run.epochs.items()],
    )
