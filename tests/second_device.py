"""A device that is not the CPU, without one: tensors that compute here and say where the CPU would have to wait."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

THERE = torch.device("meta")  # torch itself has no kernels for it that compute anything, so nothing slips through
aten = torch.ops.aten
WAITS = {  # what needs the value or the size of a result on the CPU, by its first overload
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.equal, aten.bincount, aten._linalg_check_errors, aten.is_nonzero, aten.histc, aten.repeat_interleave,
}  # fmt: skip
BY_INDEX = {aten.index, aten.index_put, aten.index_put_}  # and these for masks, whose true places they count


class Distant(Tensor):
    """A tensor of the other device, whose values are on the CPU.

    Attributes:
        here: the values.
    """

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Distant:
        made: Distant = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=THERE, requires_grad=False,
        )  # fmt: skip
        made.here = here.detach()
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Distant({self.here})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} outside of `second_device`")


class Generator(torch.Generator):
    """One of either device, whose numbers are drawn here."""

    there: bool

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls)
        made.there = torch.device(device) == THERE
        return made

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its numbers belong."""
        return THERE if self.there else torch.device("cpu")


class Device(TorchDispatchMode):
    """Carries out what is asked of its tensors.

    Attributes:
        waits: where the CPU would have waited for it while it was watched, and how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self._watched = False
        self.waits: Counter[str] = Counter()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count waits in here."""
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        values = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        distant = [value for value in values if isinstance(value, Distant)]
        asked = kwargs.get("device")
        wanted = torch.device(asked) if asked is not None else None
        if "device" in kwargs and wanted == THERE:
            kwargs["device"] = torch.device("cpu")
        there = wanted == THERE if wanted is not None else bool(distant)
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            crosses = there != bool(distant) or len(distant) not in (0, len(values))
            waits = crosses and not kwargs.get("non_blocking")
        else:
            waits = bool(distant) and func.overloadpacket in WAITS
            waits |= bool(distant) and func.overloadpacket in BY_INDEX and _masks(args[1])
            near = [value for value in values if not isinstance(value, Distant) and value.dim()]
            if distant and near:
                raise AssertionError(f"{func}: tensors of two devices")
        if waits and self._watched:
            self.waits[f"{func} in {_line()}"] += 1
        here = tree_map_only(Distant, lambda value: value.here, (tuple(args), kwargs))
        out = func(*here[0], **here[1])
        if not there:
            return out
        known = {id(value.here): value for value in distant}  # what works in place returns its argument
        return tree_map_only(Tensor, lambda value: known[id(value)] if id(value) in known else Distant(value), out)


class _Constructors(TorchFunctionMode):
    """What makes tensors of the other device from Python's numbers copies them there."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        numbers = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if numbers and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if func is Tensor.tolist and isinstance(args[0], Distant):
            return args[0].cpu().tolist()
        if func == Tensor.data.__set__ and isinstance(args[0], Distant):  # type: ignore[attr-defined]
            args[0].here = args[1].here
        return func(*args, **kwargs)


def _masks(index: Any) -> bool:
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in index)


def _line() -> str:
    """Where in fedssl or its strategies we are."""
    folders = ("/fedssl/", "/strategies/")
    own = [frame for frame in traceback.extract_stack() if any(folder in frame.filename for folder in folders)]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line}" if own else "a test"


@contextmanager
def second_device() -> Iterator[Device]:
    """Tensors can be on `THERE` in here; yields the device."""
    autocast = torch.autocast

    def cast(kind: str, *args: Any, enabled: bool = True, **rest: Any) -> Any:
        return nullcontext() if kind == THERE.type and not enabled else autocast(kind, *args, enabled=enabled, **rest)

    with (
        patch.object(torch, "Generator", Generator),
        patch.object(torch, "autocast", cast),
        _Constructors(),
        Device() as device,
    ):
        yield device
