"""Freed memory is kept: in a process that trains in process, a block of a step costs no page of the system twice."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back")

FAULTS = """
import resource, sys, threading
import torch
from fedssl.flower.workers.heap import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(4):
        torch.zeros(10 << 20)  # 40 MiB: above all that glibc keeps unasked
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

found = {}
def count(name):
    for _ in range(6):  # until the heap has grown to what is needed
        faults()
    found[name] = faults()

torch.set_num_threads(1)
count("given back")
assert keep_freed()
count("kept")
other = threading.Thread(target=count, args=("thread",))
other.start()
other.join()
print(found["given back"], found["kept"], found["thread"])
"""


SEATS = """
import threading
import torch
from fedssl.flower.workers.heap import keep_freed

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

def one(number, freed):
    torch.ones((40 - number) << 17)  # 20 MiB or somewhat less, freed at once
    freed.set()
    there.wait()

torch.set_num_threads(1)
assert keep_freed()
there, before = threading.Barrier(9), resident_mib()
for number in range(8):
    freed = threading.Event()
    threading.Thread(target=one, args=(number, freed)).start()
    freed.wait()
there.wait()
print(resident_mib() - before)
"""


@needs_glibc
def test_threads_that_take_turns_hold_the_memory_of_one() -> None:
    made = subprocess.run([sys.executable, "-c", SEATS], capture_output=True, text=True, check=True)
    assert int(made.stdout) < 80, "of 8 times 18 to 20"


@needs_glibc
def test_steps_ask_the_system_for_no_memory_again() -> None:
    made = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept, thread = map(int, made.stdout.split())
    assert given_back > 4 * 5000, "without it every block is cleared anew, or this test sees nothing"
    assert kept < 100
    assert thread < 100, "a thread takes its memory from the same heap"


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedssl.flower.workers.heap import keep_freed

    monkeypatch.setattr(sys, "platform", "darwin")
    keep_freed.cache_clear()
    assert not keep_freed()
    monkeypatch.undo()
    keep_freed.cache_clear()
