"""A drawn picture, or why there is none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """`svg` and `png` are whole files; `alt` is for those who cannot see them."""

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class LeftOut:
    """One that the records have nothing for, and why."""

    name: str
    caption: str
    why: str
