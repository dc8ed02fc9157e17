"""What the site is built with: README.md and CONTRIBUTING.md as pages of it, and docstrings read as they are meant."""

from __future__ import annotations

import re
from pathlib import Path

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}  # at the top -> in the site


class NoQuotations(Extension):
    """Markdown without block quotations: "temperature: > 0" in a docstring is a bound, and no page quotes."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 (Markdown's name)
        """Forget what reads them."""
        md.parser.blockprocessors.deregister("quote")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """For pages and docstrings alike."""
    config.markdown_extensions.append(NoQuotations())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the top, their links as seen from docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_from_top(text)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the other pages' links to the top to where these pages are in the site."""
    up = "../" * page.file.src_uri.count("/")
    for name, to in PAGES.items():
        markdown = markdown.replace(f"]({up}../{name}", f"]({up}{to}")
    return markdown


def _from_top(text: str) -> str:
    text = re.sub(r"\]\(docs/", "](", text)
    for name, page in PAGES.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text
