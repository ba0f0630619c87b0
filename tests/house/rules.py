"""The house rules that one file can break: each is a function from a parsed file to its violations."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.house.source import (
    FunctionNode,
    SourceFile,
    Violation,
    classes,
    dotted,
    functions,
    violation,
)

FILE_LINES, FUNCTION_LINES, CLASS_METHODS, BOOLEAN_ATTRIBUTES = 600, 60, 25, 2

#: Bases that add an interface or a representation, not a second behaviour.
INTERFACE_BASES = {"ABC", "abc.ABC", "Protocol", "typing.Protocol", "Generic", "typing.Generic"}
LAZY_DOOR = "# lazy door: "
COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "reduce_scatter",
    "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "broadcast_object_list", "scatter_object_list",
    "monitored_barrier", "batch_isend_irecv",
}  # fmt: skip
#: multiprocessing is here for its queues and pipes: they unpickle whatever arrives.
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
PICKLING_CALLS = {"send_pyobj", "recv_pyobj", "torch.load", "torch.save"}
BROAD = {"Exception", "BaseException"}


def long_file(file: SourceFile) -> Iterator[Violation]:
    """A file of more than 600 lines is two files."""
    if len(file.lines) > FILE_LINES:
        yield Violation(file.path, FILE_LINES, f"{len(file.lines)} lines; at most {FILE_LINES}")


def missing_docstring(file: SourceFile) -> Iterator[Violation]:
    """A file that says something says first what it owns."""
    if file.tree.body and not ast.get_docstring(file.tree):
        yield Violation(file.path, 1, "no module docstring")


def long_function(file: SourceFile) -> Iterator[Violation]:
    """A function of more than 60 lines does more than one thing."""
    for _, node in functions(file):
        count = (node.end_lineno or node.lineno) - node.lineno + 1
        if count > FUNCTION_LINES:
            yield violation(file, node, f"{count} lines; at most {FUNCTION_LINES}")


def large_class(file: SourceFile) -> Iterator[Violation]:
    """A class of more than 25 methods is several rooms."""
    for _, node in classes(file):
        count = sum(isinstance(child, FunctionNode) for child in node.body)
        if count > CLASS_METHODS:
            yield violation(file, node, f"{count} methods; at most {CLASS_METHODS}")


def mixed_inheritance(file: SourceFile) -> Iterator[Violation]:
    """A mixin is a room without a constructor; two behaviours in one class cannot be read apart."""
    for _, node in classes(file):
        bases = [dotted(base.value if isinstance(base, ast.Subscript) else base) for base in node.bases]
        if any("Mixin" in name for name in [node.name, *bases]):
            yield violation(file, node, "a mixin")
        if sum(base not in INTERFACE_BASES for base in bases) > 1:
            yield violation(file, node, f"inherits from {', '.join(bases)}")


def _is_record(node: ast.ClassDef) -> bool:
    """A frozen record: configuration, a wire struct, a tuple."""
    frozen = any(
        keyword.arg == "frozen" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for source in [node, *(item for item in node.decorator_list if isinstance(item, ast.Call))]
        for keyword in source.keywords
    )
    return frozen or any(dotted(base).split(".")[-1] in {"NamedTuple", "Message", "_Record"} for base in node.bases)


def _boolean_attributes(node: ast.ClassDef) -> set[str]:
    names: set[str] = set()
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and dotted(child.annotation) == "bool":
            names.add(dotted(child.target))
    methods = [child for child in node.body if isinstance(child, FunctionNode)]
    for method in methods:
        arguments = [*method.args.args, *method.args.kwonlyargs]
        flags = {item.arg for item in arguments if item.annotation and dotted(item.annotation) == "bool"}
        for step in ast.walk(method):
            if isinstance(step, ast.AnnAssign) and dotted(step.annotation) == "bool":
                names.add(dotted(step.target).removeprefix("self."))
            if isinstance(step, ast.Assign):
                value = step.value
                truth = isinstance(value, ast.Constant) and isinstance(value.value, bool)
                if truth or (isinstance(value, ast.Name) and value.id in flags):
                    targets = [dotted(target) for target in step.targets]
                    names.update(name.removeprefix("self.") for name in targets if name.startswith("self."))
    return names


def many_booleans(file: SourceFile) -> Iterator[Violation]:
    """Three booleans are eight states, most of them never meant: that wants an enum."""
    for _, node in classes(file):
        behaves = any(isinstance(child, FunctionNode) and not child.name.startswith("__") for child in node.body)
        names = _boolean_attributes(node)
        if behaves and not _is_record(node) and len(names) > BOOLEAN_ATTRIBUTES:
            yield violation(file, node, f"boolean attributes {', '.join(sorted(names))}")


def literal_attribute_lookup(file: SourceFile) -> Iterator[Violation]:
    """An attribute whose name is known is declared, not guessed."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and dotted(node.func) in {"getattr", "hasattr", "setattr", "delattr"}:
            literal = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            if literal:
                yield violation(file, node, f"{dotted(node.func)} with a literal name")


def _caught(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return {"BaseException"}
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {dotted(kind) for kind in kinds}


def broad_except(file: SourceFile) -> Iterator[Violation]:
    """A broad handler turns a defect into a mystery; only lane wrappers and process edges report and go on."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ExceptHandler):
            body = node.body[0]
            if _caught(node) & BROAD:
                yield violation(file, node, "catches everything")
            silent = isinstance(body, ast.Pass) or (isinstance(body, ast.Expr) and isinstance(body.value, ast.Constant))
            if len(node.body) == 1 and silent:
                yield violation(file, node, "swallows an error; contextlib.suppress names what is expected")
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "suppress":
            if {dotted(argument) for argument in node.args} & BROAD:
                yield violation(file, node, "suppresses everything")


def hidden_import(file: SourceFile) -> Iterator[Violation]:
    """An import inside a function hides a dependency; a lazy door says on its line why it is one."""
    hidden = {
        node.lineno: node
        for _, function in functions(file)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    doors: set[int] = set()
    for line, node in sorted(hidden.items()):
        own = file.lines[line - 1 : node.end_lineno]
        if any(LAZY_DOOR in text for text in own) or line - 1 in doors:  # the next import goes through the same door
            doors.add(node.end_lineno or line)
        else:
            yield violation(file, node, f"import inside a function without `{LAZY_DOOR.strip()} <reason>`")


def sleep(file: SourceFile) -> Iterator[Violation]:
    """Sleeping until something has probably happened is wrong on a slower machine; wait for the event."""
    imported = {
        alias.asname or alias.name
        for node in ast.walk(file.tree)
        if isinstance(node, ast.ImportFrom) and node.module in {"time", "asyncio"}
        for alias in node.names
        if alias.name == "sleep"
    }
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and dotted(node.func) in {"time.sleep", "asyncio.sleep", *imported}:
            yields = node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
            if not yields:
                yield violation(file, node, "sleeps")


def pickling(file: SourceFile) -> Iterator[Violation]:
    """Unpickling runs what the sender likes."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] in PICKLERS:
                    yield violation(file, node, f"imports {module}")
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            allow = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
            if name in PICKLING_CALLS or name.split(".")[-1] in PICKLING_CALLS or allow:
                yield violation(file, node, f"{name} pickles")


def collective(file: SourceFile) -> Iterator[Violation]:
    """Ranks agree through the plan: a collective elsewhere waits for ranks that may not come."""
    if file.path.startswith(("workers/", "tests/", "scripts/")):
        return
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import) and any(alias.name.startswith("torch.distributed") for alias in node.names):
            yield violation(file, node, "imports torch.distributed")
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {alias.name for alias in node.names}
            if module.startswith("torch.distributed") or (module == "torch" and "distributed" in names):
                yield violation(file, node, "imports torch.distributed")
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name.split(".")[-1] in COLLECTIVES or name.startswith(("dist.", "torch.distributed.")):
                yield violation(file, node, f"calls {name}")


def flag_comparison(file: SourceFile) -> Iterator[Violation]:
    """A connector has several kinds at once: one that can more than was asked for is not equal to it.  Ask with `&`."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Compare):
            for side in [node.left, *node.comparators]:
                if any(dotted(part).split(".")[-2:-1] == ["ConnectorType"] for part in ast.walk(side)):
                    yield violation(file, node, "compares a ConnectorType")


#: Files whose state every rank must reach alike, in whatever interpreter it runs.
DETERMINISTIC = ("scheduler/", "sglang_hicache/cache/", "sglang_hicache/storage/attachment", "snippet")


def _set_names(file: SourceFile) -> set[str]:
    """Names and attributes that the file itself shows to be sets."""

    def is_set(value: ast.AST | None) -> bool:
        return isinstance(value, ast.Set | ast.SetComp) or (
            isinstance(value, ast.Call) and dotted(value.func) in {"set", "frozenset"}
        )

    names: set[str] = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Assign) and is_set(node.value):
            names.update(dotted(target) for target in node.targets)
        if isinstance(node, ast.AnnAssign):
            annotated = node.annotation.value if isinstance(node.annotation, ast.Subscript) else node.annotation
            if dotted(annotated) in {"set", "frozenset"} or is_set(node.value):
                name = dotted(node.target)
                names.update({name, f"self.{name}"})
    return names - {""}


def unordered(file: SourceFile) -> Iterator[Violation]:
    """The order of a set depends on PYTHONHASHSEED, an id() on the allocator: two ranks would differ."""
    if not file.path.startswith(DETERMINISTIC):
        return
    sets = _set_names(file)
    for node in ast.walk(file.tree):
        if isinstance(node, ast.For | ast.comprehension):
            literal = isinstance(node.iter, ast.Set | ast.SetComp)
            if (
                literal
                or dotted(node.iter) in sets
                or (isinstance(node.iter, ast.Call) and dotted(node.iter.func) == "set")
            ):
                yield violation(file, node.iter, "iterates a set")
        if isinstance(node, ast.Call) and dotted(node.func) in {"id", "hash"}:
            yield violation(file, node, f"{dotted(node.func)}() differs between interpreters")
        if isinstance(node, ast.Call) and dotted(node.func) in {"list", "tuple", "next", "iter"} and node.args:
            if dotted(node.args[0]) in sets:
                yield violation(file, node, "takes the elements of a set in its own order")
