"""Bounds on the numbers that nodes and coordinators send each other: well above what honest ones come to."""

LARGEST = 1e6
"""The size of the values of a state or an update: well above what any training has led to."""
HEAVIEST = 2.0**31
"""The weight of an update: it counts examples, or is declared."""
