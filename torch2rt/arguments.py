"""What users write for an argument, as torch2rt goes on with it; anything else is an `InputError` that names it."""

from __future__ import annotations

from typing import Any

from torch2rt.errors import InputError


def whole_number(name: str, value: Any, least: int = 0, most: float = float("inf")) -> int | None:
    """A number without a fraction, such as `1e9`; `None` stays."""
    if value is None:
        return None
    try:
        number = int(value)
        fits = not isinstance(value, (bool, str)) and number == value
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise InputError(f"{name}={value!r} must be a whole number.")
    if not least <= number <= most:
        limits = f"at least {least}" if most == float("inf") else f"{least} to {most}"
        raise InputError(f"{name}={value!r} must be {limits}.")
    return number


def given_names(argument: str, value: Any) -> list[str] | None:
    """A sequence of names, or one name alone; `None` stays."""
    if value is None:
        return None
    try:
        found = [value] if isinstance(value, str) else list(value)
    except TypeError:
        found = [value]
    if not all(isinstance(name, str) for name in found):
        raise InputError(f"{argument} must be strings: {value!r}.")
    return found


def compute_capabilities(value: Any) -> list[str]:
    """Compute capabilities as `"8.6"` or `"current"`, from strings, numbers and pairs, or one of them alone."""
    if isinstance(value, (str, int, float)) or _is_pair(value):
        value = [value]
    return [f"{item[0]}.{item[1]}" if _is_pair(item) else str(item) for item in value]


def _is_pair(value: Any) -> bool:
    """Whether a value is such as `torch.cuda.get_device_capability` returns."""
    return isinstance(value, tuple) and len(value) == 2 and all(type(part) is int for part in value)


def severity(value: Any) -> int | None:
    """The number of one of TensorRT's severities, or of its name in any case; `None` stays."""
    from torch2rt.backend.tensorrt import trt

    if value is None:
        return None
    known = {name.lower(): int(level) for name, level in trt.ILogger.Severity.__members__.items()}
    if isinstance(value, str):
        found = known.get(value.lower())
    else:
        found = int(value) if isinstance(value, (int, trt.ILogger.Severity)) else None
    if found not in known.values():
        raise InputError(f"log_level={value!r} is none of TensorRT's severities {', '.join(map(repr, known))}.")
    return found
