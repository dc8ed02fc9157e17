"""`fedssl payload`: what a run would send, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fedssl import config
from fedssl.job import payload
from fedssl.job.setup import data_of, device_of
from fedssl.job.shards import parts_of


def main(arguments: Sequence[str]) -> int:
    """Print the payload of the run that the overrides describe, as a table or whole as JSON.

    Raises:
        ConfigError: a wrong override.
        PrivacyError: the run would send data of single examples without consent.
    """
    job = config.compose([word for word in arguments if word != "--json"]).job
    device = device_of(job)
    content = payload.manifest(job, data_of(job, device), parts_of(job, device))
    if "--json" in arguments:
        print(json.dumps(content, indent=2))
        return 0
    rows = payload.table(content)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(*payload.sentences(content), sep="\n")
    return 0
