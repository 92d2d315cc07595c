"""Target returns: a number, or `max` for the highest return that can be reached, kept as infinity."""

from __future__ import annotations

import math
from typing import Annotated, Any

AS_MUCH_AS_CAN_BE_HAD = "max"
AUTO = "auto"  # what estimates from the log recommend: a word of commands, never of a configuration


def read_target(value: Any) -> Any:
    """A target return as users write it, as a number; what is no target is left to whoever checks numbers.

    Raises:
        ValueError: NaN, or minus infinity.
    """
    if isinstance(value, str) and value.strip() == AS_MUCH_AS_CAN_BE_HAD:
        return math.inf
    number = float(value) if isinstance(value, int | float | str) else value
    if isinstance(number, float) and (math.isnan(number) or number == -math.inf):
        raise ValueError(f"a target return is a number or {AS_MUCH_AS_CAN_BE_HAD}")
    return number


def show_target(target: float) -> str:
    """The same as users write it."""
    return AS_MUCH_AS_CAN_BE_HAD if target == math.inf else f"{target:g}"


class _AsUsersWriteIt:
    """Has pydantic read and write target returns by the functions above; pydantic is imported when it asks."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        written = core_schema.plain_serializer_function_ser_schema(as_json, when_used="json")
        return core_schema.no_info_before_validator_function(read_target, handler(source), serialization=written)


def as_json(target: float) -> float | str:
    """The same in JSON, which has no infinity."""
    return AS_MUCH_AS_CAN_BE_HAD if target == math.inf else target


TargetReturn = Annotated[float, _AsUsersWriteIt()]
