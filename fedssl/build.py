"""Configuration nodes to objects: `_target_` names a class of an allow-list, the other keys are its typed arguments.

A job arrives over the network, so a node can name nothing but dataclasses that the packages of this project define, and
Flower's strategies: no function, no class that one of their modules has only imported, no module. Defaults are written
once, in the class.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from fedssl.errors import ConfigError

_FLOWER = "flwr.serverapp.strategy"
ALLOWED = ("fedssl", "strategies", "simulations.studies", _FLOWER)


def load(target: str) -> Any:
    """Import the class that a dotted name means.

    Raises:
        ConfigError: the name is outside the allow-list, does not exist or means no class whose objects are
            configurations, or a foreign package of the same name hides ours.
    """
    module_name, _, name = target.rpartition(".")
    if not _inside(module_name):
        raise ConfigError(f"_target_: {target!r} is outside {', '.join(ALLOWED)}: only those may be named by a job")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"_target_: {target!r} cannot be imported ({error}): correct the name") from error
    except AttributeError as error:
        raise ConfigError(f"_target_: {module_name} has no {name!r}: correct the name") from error
    root = module_name.partition(".")[0]
    if root in ("strategies", "simulations"):
        home, here = Path(module.__file__ or "").resolve(), Path(__file__).resolve().parent.parent
        if here not in home.parents:
            raise ConfigError(f"the package {root!r} is {home.parent}, not fedssl's: rename or uninstall that one")
    if not (inspect.isclass(found) and _inside(found.__module__) and (is_dataclass(found) or _strategy(found))):
        raise ConfigError(
            f"_target_: {target!r} is no class that a configuration may name: choose what `fedssl list` shows"
        )
    return found


def _inside(module: str) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in ALLOWED)


def _strategy(found: type) -> bool:
    """Whether a class is one of Flower's strategies, or made from one; it need not be imported to see that."""
    return any(base.__module__.startswith(f"{_FLOWER}.") and base.__name__ == "Strategy" for base in found.__mro__)


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    origin = typing.get_origin(kind)
    if origin is tuple:
        return f"a list of {_describe(typing.get_args(kind)[0]).removeprefix('a ')}s"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else _describe(a) for a in typing.get_args(kind))
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def coerce(value: Any, kind: Any, where: str) -> Any:
    """Convert one value of a configuration to the annotated type of a field.

    Whole numbers serve as numbers, lists as tuples, words as enum members, nodes with `_target_` as objects.

    Raises:
        ConfigError: any other difference of type; strings are never parsed into numbers here.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, Mapping) and "_target_" in value:
        return build(value, where)
    if kind is Any or kind is inspect.Parameter.empty:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            try:
                return coerce(value, option, where)
            except ConfigError:
                if option is options[-1] and len(options) == 1:
                    raise
    elif origin is tuple:
        if isinstance(value, list | tuple):
            variadic = len(args) == 2 and args[1] is Ellipsis
            if variadic or len(args) == len(value):
                kinds = [args[0]] * len(value) if variadic else args
                return tuple(coerce(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    elif origin in (dict, Mapping) or (inspect.isclass(origin) and issubclass(origin, Mapping)):
        if isinstance(value, Mapping):
            inner = args[1] if args else Any
            return {str(key): coerce(v, inner, f"{where}.{key}") for key, v in value.items()}
    elif inspect.isclass(kind) and issubclass(kind, Enum):
        if value in [member.value for member in kind]:
            return kind(value)
        raise ConfigError(f"{where}={value!r} is unknown: use one of {', '.join(str(m.value) for m in kind)}")
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif inspect.isclass(kind) and isinstance(value, kind):
        return value
    raise ConfigError(f"{where}={value!r} has the wrong type: give {_describe(kind)}")


def construct(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """Call a class with the values of a configuration section, each checked against the constructor's annotation.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing one, or a wrong type.
    """
    parameters = {
        name: p
        for name, p in inspect.signature(cls).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    hints = typing.get_type_hints(cls if is_dataclass(cls) else cls.__init__)
    for key in values:
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its options are {', '.join(parameters) or 'none'}"
            raise ConfigError(f"{where}.{key} is not an option of {cls.__name__}: {hint}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and values.get(n, "???") == "???"]
    if missing:
        raise ConfigError(f"{where}.{missing[0]} is missing: pass {where}.{missing[0]}=...")
    return cls(**{key: coerce(value, hints.get(key, Any), f"{where}.{key}") for key, value in values.items()})


def build(node: Mapping[str, Any], where: str) -> Any:
    """Build the object that a node with `_target_` describes; `where` is its place in the configuration."""
    if "_target_" not in node:
        raise ConfigError(f"{where} has no _target_: choose one of the options that `fedssl list` shows")
    return construct(load(node["_target_"]), {k: v for k, v in node.items() if k != "_target_"}, where)
