"""Counts in messages: "1 image", "3,000 images"."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """`number` with `noun`, or with `plural` (by default the noun and an s) unless the number is 1."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or noun + 's'}"
