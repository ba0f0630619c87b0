"""The source tree as the house rules read it: parsed files, and violations that say where they are."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

#: The four folders of the server.  sglang_hicache/ holds links to the other three, which are not followed.
PRODUCT_FOLDERS = ("sglang_hicache", "scheduler", "tokenizer", "workers")
ALL_FOLDERS = (*PRODUCT_FOLDERS, "scripts", "tests")


class SourceFile(NamedTuple):
    """One parsed file."""

    #: Path from the root of the repository, with forward slashes.
    path: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        """The text line by line, without line ends."""
        return self.text.splitlines()


class Violation(NamedTuple):
    """Something a rule does not allow."""

    #: "path::name", stable under edits elsewhere in the file, so that an exception can name it.
    place: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.place} (line {self.line}): {self.what}"


def parse(text: str, path: str = "snippet.py") -> SourceFile:
    """A file from its text."""
    return SourceFile(path, text, ast.parse(text))


def _paths_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and path.name != "__pycache__":
            yield from _paths_below(path)
        elif path.suffix == ".py":
            yield path


@functools.cache
def files(*folders: str) -> tuple[SourceFile, ...]:
    """Every Python file below these folders of the repository."""
    paths = [path for folder in folders for path in _paths_below(ROOT / folder)]
    return tuple(parse(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) for path in paths)


FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def scopes(file: SourceFile) -> Iterator[tuple[str, FunctionNode | ast.ClassDef]]:
    """Every function and class of a file, with its dotted name."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, FunctionNode | ast.ClassDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FunctionNode | ast.ClassDef):
                name = f"{prefix}{child.name}"
                yield name, child
                yield from walk(child, f"{name}.")
            else:
                yield from walk(child, prefix)

    yield from walk(file.tree, "")


def functions(file: SourceFile) -> Iterator[tuple[str, FunctionNode]]:
    """Every function and method of a file, with its dotted name."""
    return ((name, node) for name, node in scopes(file) if isinstance(node, FunctionNode))


def classes(file: SourceFile) -> Iterator[tuple[str, ast.ClassDef]]:
    """Every class of a file, with its dotted name."""
    return ((name, node) for name, node in scopes(file) if isinstance(node, ast.ClassDef))


def place_of(file: SourceFile, node: ast.AST) -> str:
    """ "path::name" of the innermost function or class around a node, or the path alone at module level."""
    around = [(name, scope) for name, scope in scopes(file) if scope.lineno <= node.lineno <= (scope.end_lineno or 0)]
    return f"{file.path}::{around[-1][0]}" if around else file.path


def violation(file: SourceFile, node: ast.AST, what: str) -> Violation:
    """A violation at a node."""
    return Violation(place_of(file, node), node.lineno, what)


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes on a name, "" for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""
