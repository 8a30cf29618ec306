"""Fractions as whole numbers, whose sums are the same in whatever order they are added."""

from torch import Tensor


def fixed(values: Tensor, unit: int) -> Tensor:
    """Every value as a whole number, int64, of which ``unit`` are 1; one that is not finite is 0."""
    return (values.double().nan_to_num(0.0, 0.0, 0.0) * unit).round().long()
