"""Pairs [low, high] in settings."""

from typing import Annotated

from pydantic import AfterValidator, Field


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"write [low, high]; {pair[0]:g} is larger than {pair[1]:g}")
    return pair


Ascending = AfterValidator(_ascending)

_Unit = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

UnitRange = Annotated[tuple[_Unit, _Unit], Ascending]
"""Two numbers within [0, 1]."""

PositiveRange = Annotated[tuple[_Positive, _Positive], Ascending]
"""Two numbers above zero."""
