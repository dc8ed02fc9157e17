"""A model card: what an exported encoder was trained on and how, what it is worth, what is promised, how it is loaded.

The format is that of the Hugging Face hub: markdown behind a head of yaml.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from fedssl.files import number
from fedssl.report.record import Record

_WORDS = {"timeseries": "time series"}
_MEASURES = (
    ("linear_accuracy", "linear probe, all labels"),
    ("knn_accuracy", "kNN"),
    ("five_labels_accuracy", "linear probe, five labels a class"),
    ("one_label_accuracy", "linear probe, one label a class"),
)


def model_card(
    record: Record, about: Mapping[str, Any], modality: str, privacy: Mapping[str, Any], files: Collection[str]
) -> str:
    """The text of README.md.

    Args:
        record: of the finished run.
        about: what the run's encoder.json says.
        modality: of what it reads.
        privacy: what its privacy.json says.
        files: names of the encoder's files beside the card.
    """
    parts = (
        _head(record),
        f"# {record.name}\n",
        f"An encoder of {_WORDS.get(modality, modality)}, pretrained by federated self-supervised learning with "
        "fedssl. It gives features, not classes.\n",
        _training(record),
        _measures(record),
        _privacy(privacy),
        _payload(record),
        _use(about, files),
        "## Licence\n\nNot stated. Whoever publishes this encoder sets `license` at the top of this page; the "
        "terms of the data it was trained on may bind it.\n",
    )
    return "\n".join(parts)


def _head(record: Record) -> str:
    tags = ["self-supervised-learning", "federated-learning", record.kind("method").lower()]
    head = {"license": "unknown", "library_name": "fedssl", "tags": tags, "pipeline_tag": "feature-extraction"}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def _training(record: Record) -> str:
    examples, split = record.manifest.get("examples", {}), record.manifest.get("split", {})
    partition = record.partition if "/" not in record.partition else record.kind("partition")  # a path is nobody's
    rows = {
        "data set": f"{record.kind('data')}, {examples.get('train')} training examples",
        "method": record.kind("method"),
        "encoder": record.kind("encoder"),
        "strategy": record.kind("strategy"),
        "aggregation": record.kind("aggregation"),
        "clients": record.of("federation", "clients"),
        "split": partition,
        "split, SHA-256": split.get("fingerprint"),
        "rounds": record.summary.get("rounds"),
        "begun with": "another encoder, see `start` of the run" if record.of("start") else "random weights",
        "seed": record.of("seed"),
        "fedssl": record.manifest.get("fedssl"),
        "torch": record.manifest.get("versions", {}).get("torch"),
        "configuration": record.manifest.get("job"),
    }
    return f"## Training\n\n{_table(('what', 'value'), [(key, str(value)) for key, value in rows.items()])}"


def _measures(record: Record) -> str:
    numbers = record.summary
    rows = [
        (name, _percent(numbers.get(key)), _percent(numbers.get(f"random_encoder_{key}")))
        for key, name in _MEASURES
        if number(numbers.get(key)) is not None
    ]
    alarms = "; ".join(alarm.name for alarm in record.lasting)
    collapse = f"Alarms of collapse at the end: {alarms}." if alarms else "No alarm of collapse stands at its end."
    if not rows:
        return (
            f"## Measures\n\nAccuracy was not measured: there were no labels, or `evaluate.final=false`. {collapse}\n"
        )
    heads = ("accuracy on the held-out examples", "this encoder", "the same network, not trained")
    read = "One run, one seed; probes read the labels of the training examples."
    return f"## Measures\n\n{_table(heads, rows)}\n{read} {collapse}\n"


def _privacy(privacy: Mapping[str, Any]) -> str:
    if privacy.get("unit") is None:
        return (
            "## Privacy\n\nNone is claimed: no differential privacy. Assume that single training examples can be found "
            "out from the weights.\n"
        )
    lines = [f"Unit: {privacy['unit']}. {_sentence(privacy['says'])}"]
    record = privacy.get("record")
    if isinstance(record, Mapping) and record.get("says"):
        lines.append(_sentence(record["says"]))
    holes = [f"- {hole}" for hole in privacy.get("not_covered", ())]
    return "## Privacy\n\n" + "\n".join([*lines, "", "Not covered:", "", *holes]) + "\n"


def _payload(record: Record) -> str:
    up: dict[str, list[int]] = {}
    for entry in record.payload.get("up", ()):
        if entry["part"]:
            up.setdefault(entry["part"], []).append(int(entry["bytes"]))
    rows = [(part, str(len(sizes)), f"{sum(sizes):,}") for part, sizes in up.items()]
    scalars = [f"`{entry['name']}`" for entry in record.payload.get("up", ()) if not entry["part"]]
    also = f"\nAnd these numbers: {', '.join(scalars)}.\n" if scalars else ""
    heads = ("part", "arrays", "bytes, uncoded")
    return f"## What left each client in each round\n\n{_table(heads, rows)}{also}"


def _use(about: Mapping[str, Any], files: Collection[str]) -> str:
    one = f"one example has the shape {_shape(about['shape'])}. Normalisation is inside."
    text = f"## Use\n\nInput: {about['input']}; {one}\n"
    if "model.safetensors" in files:
        text += (
            "\n```python\nimport fedssl\n\n"
            'encoder = fedssl.load_encoder("this/folder")  # torch, evaluation mode; encoder.network to fine-tune\n'
            "features = encoder(x)\n```\n"
        )
    for name in sorted(name for name in files if name.endswith(".onnx")):
        text += (
            "\n```python\nimport onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{name}")\n'
            '(features,) = session.run(None, {"x": x})  # float32, any number of examples\n```\n'
        )
    return text


def _shape(shape: Any) -> str:
    return str(tuple(tuple(side) if isinstance(side, list) else side for side in shape)).replace(",)", ")")


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _percent(value: object) -> str:
    found = number(value)
    return "not measured" if found is None else f"{100 * found:.1f} %"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, tuple("---" for _ in heads), *rows)]
    return "\n".join(lines) + "\n"
