"""Recipes: YAML files that hold only what differs from the defaults. Unknown keys and wrong values are errors."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from pathlib import Path

import yaml

from fastssl.config import Config, replace

RECIPES = Path(__file__).parent / "recipes"


def find_recipe(name: str) -> Path:
    """The file of a recipe, given by path or by the name of one that comes with the package."""
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    raise ValueError(
        f"there is no file and no recipe {name!r}{nearest(name, shipped)}; the recipes are {', '.join(shipped)}"
    )


def load_recipe(name: str) -> Config:
    """The configuration of a recipe. Raises ValueError naming the file, the line, the key and the fix."""
    path = find_recipe(name)
    known = option_types()
    values = {}
    for key, (node, line) in read_mapping(path).items():
        place = f"{path}, line {line}"
        if key not in known:
            raise ValueError(f"{place}: unknown key {key!r}{nearest(key, known)}")
        values[key] = convert(node, known[key], f"{place}: {key}")
    try:
        return replace(Config(), **values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_mapping(path: Path) -> dict[str, tuple[yaml.Node, int]]:
    """The value and the line of each key in a YAML file that is one mapping. Raises ValueError for a repeated key.

    The values stay YAML nodes, which keep the text: YAML 1.1 reads 5e-5 as a string and `no` as false.
    """
    try:
        root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must consist of `option: value` lines")
    result: dict[str, tuple[yaml.Node, int]] = {}
    for key, value in root.value if root else []:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{path}, line {line}: a key must be the name of an option, not a list or a mapping")
        if key.value in result:
            raise ValueError(f"{path}, line {line}: {key.value!r} is there twice; remove one of them")
        result[key.value] = (value, line)
    return result


def option_types() -> dict[str, object]:
    """The type of every option, by field name."""
    result: dict[str, object] = {}
    for name, hint in typing.get_type_hints(Config).items():
        result.update(typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {name: hint})
    return result


def convert(node: yaml.Node, hint: object, where: str) -> object:
    """The value of a YAML node, of the type `hint`. Raises ValueError, beginning with `where`, if it has another."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if node.value in ("", "null", "~") and not node.style:  # unquoted
            return None
        return convert(node, next(c for c in choices if c is not type(None)), where)
    if origin is tuple:
        any_length = choices[-1] is Ellipsis
        if not isinstance(node, yaml.SequenceNode) or not (any_length or len(node.value) == len(choices)):
            example = {int: "[120, 160]", float: "[0.2, 1.0]", str: "[flip_p=0, hue=0.2]"}[choices[0]]
            raise ValueError(f"{where} must be a list like {example}")
        return tuple(convert(item, choices[0], where) for item in node.value)
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{where} must be one value, not a list or a mapping")
    text = node.value
    if origin is typing.Literal:
        if text not in choices:
            raise ValueError(f"{where} must be one of {', '.join(choices)}, got {text!r}{nearest(text, choices)}")
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where} must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        name = {int: "a whole number", float: "a number"}[hint]
        raise ValueError(f"{where} must be {name}, got {text!r}") from None


def to_yaml(config: Config) -> str:
    """Every option as YAML, grouped as in config.py: a recipe that repeats the run."""
    lines = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        options = {f.name: value}
        if dataclasses.is_dataclass(value):
            lines.append(f"\n# {f.name}\n")
            options = vars(value)
        for key, option in options.items():
            plain = list(option) if isinstance(option, tuple) else option
            lines.append(yaml.safe_dump({key: plain}, default_flow_style=None if isinstance(plain, list) else False))
    return "".join(lines)


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean X?', or ''."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
