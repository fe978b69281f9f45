"""What the site has of the repository outside of docs/. mkdocs.yml names this file, so that `mkdocs` runs it.

Pages link to files by their paths in the repository (../configs/quickstart.yaml), which works wherever one reads the
repository. On the site each file that is linked, or each file of a folder, is shown on a page of its own, and the links
lead there. A line `<!-- code: FILE NAME -->` in a page stands for the source of that class or function.
"""

import ast
import os
import re
import textwrap
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()[^)#\s]+(?=[)#])")
CODE = re.compile(r"^<!-- code: (\S+) (\S+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages of the files that are linked."""
    pages = list(files.documentation_pages())
    linked = {outside(page, target) for page in pages for target in LINK.findall(page.content_string)}
    for path in sorted(path for path in linked if path):
        files.append(File.generated(config, source_uri(path), content=source_page(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Has links lead to those pages, and puts in the code."""
    if page.file.generated_by:
        return markdown
    here = Path(page.file.src_uri).parent

    def on_site(found: re.Match[str]) -> str:
        path = outside(page.file, found[0])
        return os.path.relpath(source_uri(path), here) if path else found[0]

    markdown = LINK.sub(on_site, markdown)
    return CODE.sub(lambda found: fenced(definition(ROOT / found[1], found[2]), "py"), markdown)


def outside(page: File, target: str) -> Path | None:
    """What a link leads to, from the repository's root, if it is there and not in docs/."""
    path = (Path(page.abs_src_path or "").parent / target).resolve()
    elsewhere = path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT) or not path.exists()
    return None if elsewhere else path.relative_to(ROOT)


def source_uri(path: Path) -> str:
    return f"source/{path.as_posix()}.md"


def source_page(path: Path) -> str:
    """The text of a file, or of each file in a folder."""
    parts = ["---\nsearch: {exclude: true}\nhide: [navigation]\n---", f"# {path.as_posix()}"]
    if (ROOT / path).is_dir():
        for file in sorted(p for p in (ROOT / path).iterdir() if p.is_file()):
            parts += [f"## {file.name}", fenced(file.read_text(), file.suffix[1:])]
    else:
        parts.append(fenced((ROOT / path).read_text(), path.suffix[1:]))
    return "\n\n".join(parts)


def fenced(text: str, language: str) -> str:
    return f"~~~~~~~~ {language}\n{text}\n~~~~~~~~"


def definition(file: Path, name: str) -> str:
    """The source of a class or function, by its name with those of the classes around it."""
    text = file.read_text()
    lines: tuple[int, int | None] = (1, None)
    body: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        named = (n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part)
        if (found := next(named, None)) is None:
            raise PluginError(f"A page shows {name} of {file.relative_to(ROOT)}, which has none.")
        body, lines = found.body, (found.lineno, found.end_lineno)
    return textwrap.dedent("\n".join(text.splitlines()[lines[0] - 1 : lines[1]]))
