"""What a recipe states of a figure: '>= 0.8', '< 12.5', '<= 5%'."""

import re

EXPECTATION = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(%?)\s*")


def meets(expectation: str, value: float) -> bool:
    """Whether a measured value satisfies an expectation such as '>= 0.8' or '< 12.5'."""
    match = EXPECTATION.fullmatch(expectation)
    assert match is not None  # the schema let it through
    sign, bound = match[1], float(match[2]) / (100 if match[3] else 1)
    return {">=": value >= bound, ">": value > bound, "<=": value <= bound, "<": value < bound}[sign]
