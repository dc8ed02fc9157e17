"""What leaves a client: the manifest says it before the run, the client checks it, the logs measure it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import execute, final_arrays, tiny
from flwr.app import ConfigRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from test_pair_runs import paired_plan
from torch import nn

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError, PrivacyError
from fedssl.flower import codec
from fedssl.flower.client_app import app
from fedssl.flower.exchange import instruct
from fedssl.flower.in_process import InProcessGrid
from fedssl.job import Job, payload
from fedssl.job.setup import build_model
from fedssl.method import Sizes
from fedssl.methods.simclr import SimCLR
from fedssl.model import Model, layout_of, to_arrays
from fedssl.report import finish_report
from simulations.cli import dispatch
from strategies.fedavg import FedAvg

Compose = Callable[..., Plan]
SHAPE = (3, 8, 8)


def job_of(*overrides: str) -> Job:
    return config.compose(tiny(*overrides)).job


@pytest.mark.parametrize("method", config.options_of("method"))
def test_the_manifest_says_what_the_clients_then_send(method: str, tmp_path: Path) -> None:
    """Names, shapes and bytes of every array and number, before anything is trained."""
    modality = "pairs" if method in ("clip", "sigmoid") else "images"
    options = tiny(f"method={method}", "federation.rounds=1", "compression=int8", modality=modality)
    rundir = execute(config.compose([*options, f"out={tmp_path}", "name=run"]))
    content = rundir.read("payload.json")
    arrays = {entry["name"]: entry for entry in content["up"] if entry["part"]}
    down = {entry["name"]: entry for entry in content["down"]}
    told = {k: (list(v.shape), str(v.dtype), v.nbytes) for k, v in final_arrays(rundir).items()}
    assert {k: (e["shape"], e["dtype"], e["bytes"]) for k, e in down.items()} == told
    job = config.compose(options).job
    received = {part.name for part in job.method.parts if part.share == "received"}
    assert list(arrays) == [k for k, entry in down.items() if entry["part"] not in received]
    assert {entry["part"] for entry in content["up"] if entry["per_example"]} == set(job.consent.allow)
    assert not any(entry["differentially_private"] for entry in content["up"])
    assert all(entry["why"] for key in ("up", "down") for entry in content[key])
    told = {entry["part"] for entry in content["up"] if "is a summary of the client's data" in entry["why"]}
    sent = {"fedsc": "correlation", "orchestra": "local_centroids", "fedca": "projections", "flesd": "public"}
    assert told == ({sent[method]} if method in sent else set())
    numbers = {entry["name"] for entry in content["up"] if not entry["part"]}
    (row,) = rundir.rows()
    clients = rundir.rows("clients.jsonl")
    assert numbers == {"num-examples", "partition-id"} | set(clients[0]) - {"round", "client", "examples", "bytes_up"}
    assert {client["bytes_up"] for client in clients} == {content["bytes_up"]}
    assert (row["bytes_up"], row["bytes_down"]) == (3 * content["bytes_up"], 3 * content["bytes_down"])


@pytest.mark.parametrize("name", config.options_of("compression"))
def test_the_bytes_of_the_logs_are_those_on_flowers_wire(name: str) -> None:
    """But for what Flower and numpy add, about half a kilobyte an array."""
    job = job_of("method=byol", f"compression={name}", "compression.down=float16")
    model = build_model(job, SHAPE)
    now, parameters = to_arrays(model), layout_of(model, job.method.parts).parameters
    now = {key: value for key, value in now.items() if not key.startswith("teacher")}
    with InProcessGrid(app, 3, 1) as grid:
        messages = list(FedAvg().configure_train(1, codec.encode(now), ConfigRecord({"job": job.text}), grid))
        size = instruct(messages, lambda arrays: job.compression.pack_down(arrays, parameters))
        assert size == 3 * job.compression.down_bytes(now, parameters)
        for message in [*messages, *grid.send_and_receive(messages)]:
            record = message.content.array_records[codec.ARRAYS]
            counted = sum(value.nbytes for value in codec.decode(record).values())
            wired = sum(len(part.deflate()) for part in get_all_nested_objects(record).values())
            assert counted < wired < counted + 600 * len(record)
            assert len(record) < len(now)
            if message in messages:
                assert counted == size / 3
            else:
                assert counted <= job.compression.up_bytes(now, parameters)


def test_clients_without_a_modality_send_less(tmp_path: Path) -> None:
    options = ("data.holds=[both,first]", "federation.rounds=2", "compression=topk_int8", "compression.keep=0.2")
    rundir = execute(paired_plan(tmp_path, "simclr", *options))
    content = rundir.read("payload.json")
    assert list(content["left_out"]) == ["1"]
    assert all(name.startswith("encoder.second.") for name in content["left_out"]["1"])
    size = {row["client"]: row["bytes_up"] for row in rundir.rows("clients.jsonl")}
    assert size[1] < size[0] <= content["bytes_up"]
    assert size[2] > size[1]


def test_compressed_runs_learn_nearly_the_same(plan: Compose) -> None:
    options = ("federation.rounds=4", "data.train=120", "local.lr=0.0005")  # larger steps amplify any rounding
    exact = execute(plan(*options, name="none"))
    for name, share, near in (("float16", 0.55, 0.02), ("int8", 0.32, 0.02), ("topk", 0.2, 0.1)):
        coded = execute(plan(*options, f"compression={name}", name=name))
        assert coded.rows()[0]["loss"] == exact.rows()[0]["loss"], "the first round starts from the same arrays"
        assert coded.rows()[-1]["loss"] == pytest.approx(exact.rows()[-1]["loss"], rel=near), name
        assert coded.rows()[0]["bytes_up"] < share * exact.rows()[0]["bytes_up"]
        assert coded.rows()[0]["bytes_down"] == exact.rows()[0]["bytes_down"]
        assert coded.rows()[0]["drift"] == exact.rows()[0]["drift"]


def test_error_feedback_is_state_of_the_client(plan: Compose) -> None:
    from fedssl.flower import state_files

    for feedback in (True, False):
        chosen = plan("compression=topk", f"compression.error_feedback={feedback}", name=f"feedback{feedback}")
        rundir = execute(chosen)
        path = state_files.newest(rundir.clients, 1, 99)
        assert (path is not None) == feedback
        if path is not None:
            left = state_files.read(path).residual
            assert 0.85 < np.mean(np.concatenate([v.ravel() for v in left.values()]) != 0) < 0.95


# --- consent


@dataclass(frozen=True)
class Leaky(SimCLR):
    """A user's method that keeps a number of each example where the clients' weights are."""

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        model = super().init(encoder, sizes)
        model["projector"].register_buffer("seen", torch.zeros(max(1, sizes.examples)))
        return model


def leaky() -> Job:
    job = Job(job_of().tree)
    job.__dict__["method"] = Leaky(hidden=16, out=8)
    return job


def test_a_shape_that_follows_the_examples_is_found() -> None:
    with pytest.raises(PrivacyError, match=r"'projector' would be uploaded and the size of 'projector.seen'") as caught:
        payload.uploads(leaky(), SHAPE)
    assert "payload.allow=[projector]" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_that_hold_examples_leave_only_with_consent(plan: Compose) -> None:
    options = ("method=moco", "method.queue=16", "strategy.share.queue=merge")
    with pytest.raises(PrivacyError, match=r"part 'queue' holds.*payload.allow=\[queue\]"):
        execute(plan(*options, name="refused"))
    content = execute(plan(*options, "payload.allow=[queue]", name="allowed")).read("payload.json")
    assert {e["part"] for e in content["up"] if e["per_example"]} == {"queue"}
    assert {e["part"] for e in content["down"] if e["per_example"]} == {"queue"}
    assert [row[3] for row in payload.table(content)] == ["of single examples", "no", "no", "yes", "no"]
    with pytest.raises(ConfigError, match="'bank' has one entry an example"):
        execute(plan("method=instance", "strategy.share.bank=merge", "payload.allow=[bank]", name="sized"))


@pytest.mark.parametrize(
    ("arrays", "metrics", "said"),
    [
        ({"queue.keys": np.zeros((4, 2), np.float32)}, {}, "'queue.keys' that is not in the payload manifest"),
        ({"projector.0.weight": np.zeros((20, 8), np.float32)}, {}, r"of shape \(20, 8\)"),
        ({"projector.0.weight": np.zeros((16, 8))}, {}, "float64"),
        ({}, {"loss_of_example_7": 0.5}, "'loss_of_example_7' that is not in"),
        ({}, {"loss": [0.5, 0.25]}, "'loss' of the reply is a list"),
        ({}, {"loss": True}, "'loss' of the reply is a bool"),
    ],
)
def test_a_reply_that_is_not_in_the_manifest_is_not_sent(
    arrays: dict[str, np.ndarray], metrics: dict[str, Any], said: str
) -> None:
    known = payload.uploads(job_of(), SHAPE)
    good = {"projector.0.weight": np.zeros((16, 8), np.float32)}
    payload.check_reply(known, good, {"loss": 0.5, "num-examples": 3, "temperature": 0.1}, {"temperature"})
    with pytest.raises(PrivacyError, match=said) as caught:
        payload.check_reply(known, arrays, metrics, ())
    assert "\n" not in str(caught.value)


def test_a_server_that_asks_for_more_gets_nothing() -> None:
    """A strategy of one's own could put the name of a local part into the instruction: the client does not follow."""
    job = job_of("method=moco", "method.queue=16")
    now = {k: v for k, v in to_arrays(build_model(job, SHAPE)).items() if not k.startswith("teacher")}
    assert any(key.startswith("queue.") for key in now)
    with InProcessGrid(app, 3, 1) as grid:
        messages = FedAvg().configure_train(1, codec.encode(now), ConfigRecord({"job": job.text}), grid)
        with pytest.raises(PrivacyError, match="'queue"):
            list(grid.send_and_receive(messages))


# --- for people


def test_the_command_trains_nothing_and_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    options = [o for o in tiny("method=byol", "compression=topk_int8") if not o.startswith("engine")]
    assert dispatch(["payload", *options]) == 0
    shown = capsys.readouterr().out
    assert dispatch(["payload", "--json", *options]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [line.split()[0] for line in shown.splitlines()] == [
        "what",
        "encoder",
        "projector",
        "predictor",
        "numbers",
        "A",
    ]
    assert f"up to {content['bytes_up']:,} bytes" in shown
    assert content["compression"]["keep"] == 0.01
    with pytest.raises(PrivacyError):
        dispatch(["payload", *options, "method=moco", "strategy.share.queue=merge"])


def test_the_report_shows_it(plan: Compose) -> None:
    page = finish_report(execute(plan("method=byol"))).read_text()
    section = page.partition("What leaves a client")[2].partition("</section>")[0]
    assert section.count("<tr>") == 5
    assert "predictor is merged on the server by FedAvg" in section
    assert "num-examples, partition-id, loss" in section
