"""The `fedssl` command: one word, then the options of that word."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from fedssl.errors import FedsslError

USAGE = """\
usage: fedssl COMMAND ...

  pretrain [key=value ...]   run federated pretraining; -m sweeps over key=a,b, --cfg job shows the configuration
  resume RUN                 continue an interrupted run; gives the same bits as no interruption
  report RUN ...             write report.html of one run, or compare several [--out FILE] [--figures FOLDER]
  study NAME [study.key=value ...] [key=value ...]
                             measure a claim of the theory, centrally and federated; study.tiny=true for a look
  probe RUN                  measure the encoder of a finished run again [--corruptions [noise,blur,contrast,shift]]
  audit RUN                  attack a finished run, hold what is found against its epsilon [--shadows 8] [--inversion 2]
  export RUN                 the encoder of a finished run with a model card [--format safetensors|onnx] [--out FOLDER]
  payload [--json] [key=value ...]
                             what would leave a client in each round of such a run, and its size; trains nothing
  fits [--memory 4GiB] [--seconds 60] [--data-dir PLACE] [key=value ...]
                             whether a client's round of such a run fits into this machine, measured in a few steps
  keys FOLDER                keys and certificates for a federation of real machines [--nodes 2] [--host NAME ...]
  submit [CONNECTION] --out FOLDER [key=value ...]
                             run on the nodes of a SuperLink and wait for the end; exit code 1 if the run fails
  list [GROUP]               what can be chosen: methods, strategies, data, partitions, encoders, engines, studies
  doctor                     what this machine can do

Try: fedssl pretrain federation.rounds=10
"""


COMMANDS = {  # the module of each, and its function
    "pretrain": ("pretrain", "main"),
    "resume": ("pretrain", "resume"),
    "report": ("inspect_runs", "report"),
    "study": ("study", "main"),
    "probe": ("inspect_runs", "probe"),
    "audit": ("inspect_audit", "main"),
    "export": ("export", "main"),
    "payload": ("inspect_payload", "main"),
    "fits": ("fits", "main"),
    "keys": ("deployment", "keys"),
    "submit": ("deployment", "submit"),
    "list": ("inspect_install", "list_options"),
    "doctor": ("inspect_install", "doctor"),
}


def dispatch(arguments: Sequence[str]) -> int:
    """Run one command; imports only what it needs, so that `fedssl --help` is quick."""
    command, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command not in COMMANDS:
        *others, last = COMMANDS
        print(f"error: {command!r} is not a command: use {', '.join(others)} or {last}", file=sys.stderr)
        return 2
    module, function = COMMANDS[command]
    return int(getattr(import_module(f"simulations.{module}"), function)(rest))


def answer(arguments: Sequence[str]) -> int:
    """Run one command; a refusal is one sentence and exit code 2, and so is an installation that is not whole."""
    try:
        return dispatch(arguments)
    except FedsslError as error:
        print(f"error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("fedssl", "strategies", "simulations"):
            raise  # nobody's installation, a mistake of ours
        print(
            f"error: {error.name} cannot be imported, which fedssl needs: its installation is not complete, install "
            "fedssl again",
            file=sys.stderr,
        )
    return 2


def main() -> None:
    """Entry point: an interruption is exit code 130."""
    try:
        code = answer(sys.argv[1:])
    except KeyboardInterrupt:
        # Worker threads may still be inside a client. All files are whole, so leaving at once loses nothing.
        print(
            "\ninterrupted; the same command, or `fedssl resume RUN`, continues from the last finished round",
            file=sys.stderr,
            flush=True,
        )
        os._exit(130)
    except BrokenPipeError:  # `fedssl list | head`
        os._exit(0)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit, also when a runtime that has crashed leaves a thread behind that would be waited for without end."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
