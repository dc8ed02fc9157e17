"""Comments behind the fields of a class as their docstrings: that is how this project describes fields."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Comments(griffe.Extension):
    """`dim: int  # of the encoder's features` has the docstring "of the encoder's features"."""

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **kwargs: Any
    ) -> None:
        """Give it to a field that has none."""
        _, _, comment = attr.source.partition("  # ")
        if attr.docstring is None and comment and isinstance(attr.parent, griffe.Class):
            attr.docstring = griffe.Docstring(comment, parent=attr)
