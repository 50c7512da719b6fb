"""The texts to search: one short description for each public function and class of Paddle.

The names come from ``__all__`` of `paddle`, `paddle.nn` and `paddle.nn.functional` of the Paddle that is installed, the
descriptions from the opening paragraphs of their docstrings, without the markup. Openings are found better than whole
docstrings, whose details blur the embedding.
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from typing import Iterator

MODULES = ("paddle", "paddle.nn", "paddle.nn.functional")
MINIMUM_LENGTH = 40

_SECTION = re.compile(
    r"(Args|Arguments|Parameters|Call [Pp]arameters|Keyword [Aa]rgs|Attributes?|Inputs?|Outputs?|Shapes?|Returns?"
    r"|Raises|Return [Tt]ype|Variables|Members|(Code )?Examples?|For [Ee]xample)\s*:+\s*$"
)
_DIRECTIVE = re.compile(r"\.\.\s*[\w-]+::")
_MARKUP = (
    (re.compile(r":ref:`(?:api_guide_|api_|cn_api_)?([^`<]*?)\s*(?:<[^`]*>)?`"), r"\1"),
    (re.compile(r":[\w:]+:`([^`]*)`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_+"), r"\1"),
    (re.compile(r"`+([^`]*)`+_*"), r"\1"),
    (re.compile(r"\\(?=_)"), ""),
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"\.\. _[^:]+: \S+"), ""),
    (re.compile(r"\b(The )?[Ee]quation( is)?\s*:"), ""),
    (re.compile(r"\s+"), " "),
)
_WORD = re.compile(r"\d+[A-Za-z]?(?![a-z])|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class Entry:
    """One documented API: its first public name, the other names of the same thing, and what it does."""

    name: str
    aliases: tuple[str, ...]
    description: str

    @property
    def text(self) -> str:
        """What is embedded: the words of the name, and the description."""
        return f"{spell_out(self.name)}: {self.description}"


def spell_out(name: str) -> str:
    """Return the words of an API's last name: ``paddle.nn.ClipGradByNorm`` gives ``clip grad by norm``.

    The tokenizer knows lower-case words; it would cut a name in camel case into meaningless pieces.
    """
    return " ".join(word.lower() for word in _WORD.findall(name.rsplit(".", 1)[-1]))


def describe(docstring: str) -> str:
    """Return the opening of a docstring as one line of plain text; "" if a section comes first.

    That is its first paragraph, and the next ones as long as it has fewer than 40 characters.
    """
    description = ""
    for paragraph in _paragraphs(docstring):
        description = f"{description} {_plain(paragraph)}".strip()
        if len(description) >= MINIMUM_LENGTH:
            break
    return description


def _paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs before the first section, without directives such as formulas and pictures."""
    paragraph: list[str] = []
    directive_indent: int | None = None
    for line in inspect.cleandoc(docstring).splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if directive_indent is not None and (not text or indent > directive_indent):
            continue
        directive_indent = indent if _DIRECTIVE.match(text) else None
        if text and directive_indent is None and not _SECTION.match(text):
            paragraph.append(text)
            continue
        if paragraph:
            yield " ".join(paragraph)
            paragraph = []
        if _SECTION.match(text):
            return
    if paragraph:
        yield " ".join(paragraph)


def _plain(text: str) -> str:
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def load_corpus(modules: tuple[str, ...] = MODULES) -> list[Entry]:
    """Describe every public function and class of the named modules, each once, in the order of `modules`.

    Things without a docstring, or whose docstring opens with a section, are left out. Several names of one object, or
    names that differ in spelling alone (``Conv2D``, ``Conv2d``) and share their description, are one entry.

    Raises:
        ImportError: a module is not there.
    """
    names: dict[tuple[str, str], list[tuple[bool, str]]] = {}
    keys: dict[int, tuple[str, str]] = {}
    for module_name in modules:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name, None)
            if not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            description = describe(value.__doc__ or "")
            if not description:
                continue
            key = keys.setdefault(id(value), (name.replace("_", "").lower(), description))
            is_alias = name != getattr(value, "__name__", name)
            names.setdefault(key, []).append((is_alias, f"{module_name}.{name}"))
    entries = []
    for (_, description), same in names.items():
        name, *aliases = (name for _, name in sorted(same, key=lambda pair: pair[0]))
        entries.append(Entry(name, tuple(aliases), description))
    return entries
