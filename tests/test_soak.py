"""A small soak with real processes: a node killed, one cut off, the SuperLink killed, and the simulation's bits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import soak


@pytest.mark.slow
@mock.patch.dict(os.environ)  # the soak sets what Flower's command needs
def test_a_federation_outlives_two_kills_and_a_cut(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    assert soak.main(["--nodes", "3", "--rounds", "8", "--cut", "5", "--minutes", "8", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["equal"]
    told = out.with_suffix(".md").read_text()
    for fault in ("node 1 killed", "network of node 2 cut", "SuperLink killed"):
        assert fault in told, told
