"""Charge of the batteries and heat, as Linux shows them below /sys/class."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path("/sys/class")
_POWERED = ("Charging", "Full", "Not charging")  # the last: held below full by its firmware, on mains


class Battery(NamedTuple):
    """What a device's own batteries say together."""

    charge: float  # mean over the batteries, in [0, 1]
    powered: bool  # by mains


def battery(root: Path = ROOT) -> Battery | None:
    """The device's batteries, or None if it shows none; those of its mouse or pen are left out.

    See https://docs.kernel.org/power/power_supply_class.html: `type`, `scope`, `capacity` in per cent, `status`.
    """
    charges, powered = [], False
    for supply in sorted((root / "power_supply").glob("*")):
        kind = _read(supply / "type")
        if kind in ("Mains", "USB"):
            powered |= _read(supply / "online") == "1"
        elif kind == "Battery" and _read(supply / "scope") != "Device" and _read(supply / "capacity").isdigit():
            charges.append(int(_read(supply / "capacity")) / 100)
            powered |= _read(supply / "status") in _POWERED
    return Battery(sum(charges) / len(charges), powered) if charges else None


def celsius(root: Path = ROOT) -> float | None:
    """The hottest thermal zone in degrees, or None if none can be read.

    See https://docs.kernel.org/driver-api/thermal/sysfs-api.html: `temp` in thousandths of a degree.
    """
    found = [_read(zone / "temp") for zone in (root / "thermal").glob("thermal_zone*")]
    degrees = [int(text) / 1000 for text in found if text.lstrip("-").isdigit()]
    return max(degrees, default=None)


def _read(path: Path) -> str:
    """A file's word; empty where there is none, or a sensor that sleeps."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
