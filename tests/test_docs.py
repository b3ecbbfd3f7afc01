"""Every python block of the README and the docs runs, file by file, from top to bottom."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.programs import run_script

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")


def blocks(page):
    return [code for flags, code in BLOCK.findall(page.read_text()) if "no-run" not in flags]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_code_blocks_run(page, tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    script = tmp_path / "page.py"
    # a main guard, because some pages start worker processes that import the script
    script.write_text("\n".join(blocks(page)))
    done = run_script(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_reference_is_that_of_the_code():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import make_reference
    finally:
        sys.path.pop(0)
    message = "run: python docs/make_reference.py"
    assert (ROOT / "docs" / "reference.md").read_text() == make_reference.page(), message
