# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Every public name is documented in one format, the format of Transformers, and the documentation agrees with the signature:

    Args:
        name (`type` of shape `(...)`, *optional*, defaults to `x`): text
    Returns:
        `type`: text
    Raises:
        ValueError: text
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator

import pytest

from gma_hf.cache_argument import CACHE_NAME


pytestmark = pytest.mark.quick
MODULES = ("", ".ops", ".conversion", ".training", ".analysis", ".parallel")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples")
ENTRY = re.compile(r"(?P<name>\w+) \((?P<type>.*?)\):(?=\s|$)", re.DOTALL)


def public_names() -> dict[str, object]:
    """Functions, classes, methods and properties, by the name under which a user finds each first."""
    found, seen = {}, set()
    for ending in MODULES:
        module = importlib.import_module(f"gma_hf{ending}")
        for name in module.__all__:
            value = getattr(module, name)
            if id(value) in seen or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            seen.add(id(value))
            found[f"{module.__name__}.{name}"] = value
            if inspect.isclass(value):
                for method, function in members(value):
                    found[f"{module.__name__}.{name}.{method}"] = function
    return found


def function_of(value: object) -> object:
    """What a property, a class method or a static method calls."""
    return value.fget if isinstance(value, property) else getattr(value, "__func__", value)


def members(cls: type) -> Iterator[tuple[str, object]]:
    """The public methods and properties that a class of the package defines itself."""
    for name, value in vars(cls).items():
        function = function_of(value)
        if not name.startswith("_") and inspect.isfunction(function) and function.__module__.startswith("gma_hf"):
            if function.__qualname__ == f"{cls.__name__}.{name}":
                yield name, value


NAMES = public_names()
CLASSES = [value for value in NAMES.values() if inspect.isclass(value)]


def sections(value: object) -> dict[str, str]:
    """The sections of a docstring, by their titles; the text before the first section is that of the title `""`."""
    text = re.sub(r"^```python$.*?^```$", "", inspect.cleandoc(value.__doc__ or ""), flags=re.MULTILINE | re.DOTALL)
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", text, flags=re.MULTILINE)
    return {
        "": parts[0].strip(),
        **{title: textwrap.dedent(body.strip("\n")) for title, body in zip(parts[1::2], parts[2::2], strict=True)},
    }


def entries(section: str) -> list[str]:
    """The entries of a section: each begins at the margin, and its further lines are indented."""
    return [entry.strip() for entry in re.split(r"\n(?=\S)", section) if entry.strip()]


def own_parameters(value: object) -> dict[str, inspect.Parameter]:
    """The arguments that belong into the docstring: those of a call; of a class of options, the fields that the package adds."""
    function = function_of(value)
    if inspect.isclass(value):
        if issubclass(value, BaseException):
            return {}
        parameters = inspect.signature(function).parameters
        bases = [base for base in value.__mro__ if base.__module__.startswith("gma_hf")]
        if dataclasses.is_dataclass(value) or hasattr(value, "model_type"):
            own = {name for base in bases for name in vars(base).get("__annotations__", {})}
            return {name: parameter for name, parameter in parameters.items() if name in own}
        return dict(parameters)
    is_method = "." in function.__qualname__ and not isinstance(value, staticmethod)
    parameters = dict(list(inspect.signature(function).parameters.items())[int(is_method) :])
    # Before Transformers 5.24, signatures have another name for the cache
    return {"cache" if name == CACHE_NAME else name: parameter for name, parameter in parameters.items()}


def keeps_a_promise_of_others(name: str, value: object) -> bool:
    """Whether a method overrides one of a library, whose documentation describes its arguments; `forward` is our own."""
    *_, cls, method = name.split(".")
    owner = next((owner for owner in CLASSES if owner.__name__ == cls), None)
    return (
        owner is not None
        and method != "forward"
        and any(method in vars(base) for base in owner.__mro__ if not base.__module__.startswith("gma_hf"))
    )


def problems(name: str, value: object) -> Iterator[str]:
    """What is wrong with a docstring."""
    found = sections(value)
    summary = found[""].split("\n\n")[0]
    if not summary:
        yield "no docstring, or no summary before its first section"
        return
    if not summary.rstrip().endswith((".", ":")):
        yield f"the summary does not end like a sentence: {summary[-40:]!r}"
    if not keeps_a_promise_of_others(name, value) or "Args" in found or "Returns" in found:
        yield from problems_of_a_call(value, found)
    errors = [entry.split(":")[0].strip("`[]") for entry in entries(found.get("Raises", ""))]
    for error in sorted(raised(function_of(value)) - set(errors)):
        yield f"{error} is raised and not documented"


def problems_of_a_call(value: object, found: dict[str, str]) -> Iterator[str]:
    """What is wrong with the arguments and the result in a docstring."""
    parameters = own_parameters(value)
    documented = {}
    for entry in entries(found.get("Args", "")):
        match = ENTRY.match(entry)
        if match is None:
            yield f"not `name (`type`): text`: {entry[:60]!r}"
            continue
        documented[match["name"]] = match["type"]
        if not entry[match.end() :].strip():
            yield f"{match['name']} has no text"
    for argument in sorted(parameters.keys() - documented.keys()):
        yield f"the argument {argument} is not documented"
    for argument in sorted(documented.keys() - parameters.keys()):
        yield f"the documented argument {argument} does not exist"
    for argument in sorted(documented.keys() & parameters.keys()):
        yield from type_problems(argument, documented[argument], parameters[argument])
    function = function_of(value)
    if not inspect.isclass(value):
        result = inspect.signature(function).return_annotation
        is_nothing = result in (None, "None", inspect.Signature.empty) and not returns_a_value(function)
        title = "Returns" if "Returns" in found else "Yields"
        if not isinstance(value, property):
            if not is_nothing and title not in found:
                yield "what it returns is not documented"
            if is_nothing and title in found:
                yield "it returns nothing, and documents a result"
        if title in found and not found[title].startswith(("`", "[`")):
            yield f"the result does not begin with its type: {found[title][:60]!r}"


def type_problems(name: str, described: str, parameter: inspect.Parameter) -> Iterator[str]:
    if not described.startswith(("`", "[`")):
        yield f"{name}: the type is not in backticks: {described!r}"
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return
    default = parameter.default
    if ("*optional*" in described) != (default is not parameter.empty):
        yield f"{name}: *optional* must stand exactly where there is a default"
    stated = re.search(r"defaults to `(.*?)`(?:,|$)", described)
    plain = isinstance(default, (bool, int, float, str))
    if plain and stated is None:
        yield f"{name}: the default {default!r} is not documented"
    elif plain and ast.literal_eval(stated[1]) != default:
        yield f"{name}: the default is {default!r}, not {stated[1]}"


def body_of(function: object) -> ast.AST | None:
    function = inspect.unwrap(function)
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


def own_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions and classes inside."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            yield node
            yield from own_nodes(node)


def returns_a_value(function: object) -> bool:
    tree = body_of(function)
    return tree is not None and any(
        (isinstance(node, ast.Return) and node.value is not None) or isinstance(node, (ast.Yield, ast.YieldFrom))
        for node in own_nodes(tree)
    )


def raised(function: object) -> set[str]:
    """The names of the errors that a function raises in its own body; those of a class, in its constructor."""
    if inspect.isclass(function):
        function = vars(function).get("__post_init__") or vars(function).get("__init__")
        if not inspect.isfunction(function) or not function.__module__.startswith("gma_hf"):
            return set()
    tree = body_of(function)
    calls = (node.exc for node in own_nodes(tree) if isinstance(node, ast.Raise)) if tree is not None else ()
    return {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_names_are_documented_in_one_format(name):
    assert list(problems(name, NAMES[name])) == []


def well_documented(x: float, *, scale: float = 2.0, **kwargs) -> float:
    """
    Scale a number.

    Args:
        x (`float`): the number.
        scale (`float`, *optional*, defaults to `2.0`): the factor.
        kwargs (`Any`, *optional*): not used.

    Returns:
        `float`: the product.

    Raises:
        ValueError: if the factor is 0.
    """
    if scale == 0:
        raise ValueError("The factor must not be 0.")
    return x * scale


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("        x (`float`): the number.\n", "", "the argument x is not documented"),
        ("x (`float`): the", "y (`float`): the", "the documented argument y does not exist"),
        ("x (`float`): the", "x: the", "not `name (`type`): text`"),
        ("x (`float`): the", "x (float): the", "x: the type is not in backticks"),
        ("*optional*, defaults to `2.0`", "defaults to `2.0`", "scale: *optional* must stand"),
        ("defaults to `2.0`", "defaults to `1.0`", "scale: the default is 2.0, not 1.0"),
        (", defaults to `2.0`", "", "scale: the default 2.0 is not documented"),
        ("`float`: the product", "the product", "the result does not begin with its type"),
        ("Returns:\n        `float`: the product.", "", "what it returns is not documented"),
        ("Raises:\n        ValueError: if the factor is 0.", "", "ValueError is raised and not documented"),
        ("Scale a number.", "", "no docstring, or no summary"),
        ("Scale a number.", "Scale a number", "does not end like a sentence"),
    ],
)
def test_each_mistake_is_found(right, wrong, message, monkeypatch):
    assert list(problems("tests.well_documented", well_documented)) == []
    assert right in well_documented.__doc__
    monkeypatch.setattr(well_documented, "__doc__", well_documented.__doc__.replace(right, wrong))
    assert any(message in problem for problem in problems("tests.well_documented", well_documented))
