from typing import Any

class Group:
    def __getattr__(self, name: str) -> Any: ...
