"""The site that mkdocs makes of docs/ and the docstrings."""

import html
import inspect
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest

from aspo_lightning import objectives
from aspo_lightning.cli.parser import subclass_names
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.rollouts.settings import RolloutSettings
from tests.support.commands import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built with --strict, where nothing outside of this machine can be reached."""
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def text(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        loads = re.findall(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?([^"'\s>]+)""", page.read_text())
        assert loads, page
        assert not [url for url in loads if url.startswith(("http:", "https:", "//"))], page
    styles = "".join(style.read_text() for style in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import)\s*[\"']?https?:", styles)


@pytest.mark.parametrize("name", sorted(subclass_names(objectives.Objective)))
def test_the_equation_of_each_objective_stands_beside_its_code(site, name):
    page = text(site / "objectives.html")
    objective = getattr(objectives, name)
    rule = vars(objective).get("weigh", objective)  # or the class, where it only has another default
    assert textwrap.dedent(inspect.getsource(rule)).strip().removeprefix("@dataclass(frozen=True)\n") in page
    assert f"`{name}`" in (ROOT / "docs/objectives.md").read_text()


def test_links_to_files_of_the_repository_lead_to_their_text(site):
    link = '<a href="source/aspo_lightning/rollouts/loop.py.html"><code>rollouts/loop.py</code></a>'
    assert link in (site / "concepts.html").read_text()
    shown = text(site / "source/aspo_lightning/rollouts/loop.py.html")
    assert (ROOT / "aspo_lightning/rollouts/loop.py").read_text().strip() in shown
    for config in (ROOT / "configs/data").iterdir():  # a folder
        assert config.read_text().strip() in text(site / "source/configs/data.html")


@pytest.mark.parametrize("settings", [RolloutSettings, ModelSettings])
def test_each_setting_is_in_the_reference(site, settings):
    page = (site / "reference/settings.html").read_text()
    missing = [f.name for f in fields(settings) if not re.search(rf'id="[\w.]+Settings\.{f.name}"', page)]
    assert missing == []
