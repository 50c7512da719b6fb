"""What a conversion did with each layer it met that computes attention or a feed-forward."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """``converted`` and ``left_alone`` by layer name: what the layer was, and why it was left alone."""

    converted: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: {what}" for name, what in self.converted.items()]
        return "\n".join([*lines, *self.lines_of_left_alone()])

    def lines_of_left_alone(self) -> list[str]:
        return [f"{name or '(the model)'}: left alone, {why}" for name, why in self.left_alone.items()]
