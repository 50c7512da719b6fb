from typing import Any

from . import communication as communication

def __getattr__(name: str) -> Any: ...
