"""setuptools' build backend. Without setuptools it ends in one line, where pip before 25 prints a traceback."""

try:
    from setuptools.build_meta import *  # noqa: F403
except ModuleNotFoundError as error:
    if error.name not in ("setuptools", "setuptools.build_meta"):
        raise
    raise SystemExit("setuptools 62 or later and wheel are needed: pip install -U setuptools wheel") from None
