from dataclasses import dataclass


@dataclass
class Separability:
    threshold: float | None
    reason: str


def separate(values):
    return Separability(0.9, "placeholder")
