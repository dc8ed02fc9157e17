"""docs/ as a site: built as `make docs` builds it, with links and anchors checked, and nothing asked of the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from test_reference import shown

ROOT = Path(__file__).resolve().parent.parent
# What a browser fetches by itself; links that a reader may click are none of it.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=["']?(?P<src>[^"'\s>]+)"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*?\bhref=["']?(?P<href>[^"'\s>]+)"""
    r"""|(?:url\(|@import\s)["']?(?P<css>[^"')\s;]+)""",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_has_every_page_and_asks_the_network_for_nothing(site: Path) -> None:
    sources = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    for page in ("index.html", "contributing.html", *(str(path.with_suffix(".html")) for path in sources)):
        assert (site / page).exists(), page
    assert not list(site.rglob("*.py"))
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        for match in FETCHED.finditer(path.read_text(encoding="utf-8")):
            place = match[match.lastgroup or 0]
            assert not re.match(r"(?:https?:)?//", place), f"{path.relative_to(site)} fetches {place}"


def test_the_reference_is_built_as_it_is_asked_for(site: Path) -> None:
    _, _, content = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    built = {line.split(" ")[0] for line in zlib.decompress(content).decode().splitlines()}
    missing = [
        name for name, value in shown().items() if not {name, f"{value.__module__}.{value.__qualname__}"} & built
    ]
    assert not missing, f"mkdocstrings leaves out {', '.join(missing)}"
    assert {"fedssl.method.Sizes.dim", "fedssl.parts.Share.derived"} <= built, "fields are described by their comments"
    assert "<blockquote>" not in (site / "reference" / "losses.html").read_text(), "'> 0' is a bound, no quotation"
