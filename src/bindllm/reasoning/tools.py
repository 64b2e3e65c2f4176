"""Tools: typed functions that a planner may call. One record serves OpenAI's API, chat templates, and MCP.

A planner names media by opaque handles (``image1``) and results of earlier calls by number (``result2``). It never
writes a path, and nothing that it writes is evaluated.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from bindllm.errors import InputError, did_you_mean, needs_extra
from bindllm.media import Media

Arguments = Mapping[str, Any]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
REFERENCE = r"result[1-9][0-9]{0,3}"
"""Pattern of the name of a result."""

_WHOLE, _INSIDE = re.compile(REFERENCE), re.compile(rf"\{{({REFERENCE})\}}")
_LONGEST_FAULT = 200
# A docstring describes its parameters after an empty line, or at once.
_END_OF_ABOUT = re.compile(r"\n\s*(?:\n|[:@]\w|[A-Z]\w+:\s*\n)")


@dataclass(frozen=True)
class Tool:
    """A function that a planner may call.

    Args:
        name: name of the tool, by the rule of OpenAI's API: letters, digits, ``_`` and ``-``, at most 64.
        description: purpose of the tool, for the planner.
        parameters: JSON Schema of the arguments, an object; media are strings.
        run: gets the arguments by name, media as `Media`, in a thread of its own.
        media: modalities that each argument for media takes; an empty tuple takes all.
        returns: modalities of the media that it may return.

    Raises:
        InputError: another name, or parameters whose type is not object.

    Examples:
        >>> @tool
        ... def repeat(text: str, times: int = 2) -> str:
        ...     '''Repeat a text.'''
        ...     return text * times
        >>> repeat("ab"), repeat.parameters["required"]
        ('abab', ['text'])
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., Any]
    media: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    returns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"a tool has the name {self.name!r}, expected letters, digits, _ and -, at most 64"
            )
        if self.parameters.get("type") != "object":
            raise InputError(f"the parameters of the tool {self.name} are not a JSON Schema of type object")

    def __call__(self, *values: Any, **arguments: Any) -> Any:
        """Call the function itself."""
        return self.run(*values, **arguments)

    def can_use(self, modalities: Sequence[str]) -> bool:
        """Whether each argument for media can get one of these modalities."""
        return all(not takes or not {*takes}.isdisjoint(modalities) for takes in self.media.values()) and (
            not self.media or bool(modalities)
        )

    def takes(self, modality: str) -> bool:
        """Whether an argument takes media of this modality."""
        return any(not known or modality in known for known in self.media.values())

    def for_openai(self, handles: Mapping[str, Media]) -> dict[str, Any]:
        """Return the tool for OpenAI's API and chat templates, with the handles and references that it may get."""
        parameters = dict(self.parameters)
        parameters["properties"] = {
            name: self._offered(name, schema, handles)
            for name, schema in self.parameters.get("properties", {}).items()
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def _offered(self, name: str, schema: Any, handles: Mapping[str, Media]) -> Any:
        if name in self.media:
            names = [*self._fitting(name, handles), REFERENCE]
            return {**schema, "pattern": f"^({'|'.join(names)})$"}
        if not isinstance(schema, Mapping) or schema.get("type") in (None, "string", "object"):
            return schema
        # Other values may be results of earlier calls.
        reference = {"type": "string", "pattern": f"^{REFERENCE}$"}
        about = {"description": schema["description"]} if "description" in schema else {}
        own = {key: value for key, value in schema.items() if key not in ("description", "default")}
        return {**about, "anyOf": [own, reference]}

    def _fitting(self, name: str, handles: Mapping[str, Media]) -> list[str]:
        takes = self.media[name]
        return [handle for handle, item in handles.items() if not takes or item.modality in takes]

    def problem(self, arguments: Arguments, handles: Mapping[str, Media]) -> str:
        """Return why a planner's arguments cannot be used, as far as it shows before the call; "" if they can."""
        for name in self.media.keys() & arguments.keys():
            value, fitting = arguments[name], self._fitting(name, handles)
            if not isinstance(value, str) or not (value in fitting or _WHOLE.fullmatch(value)):
                kinds = " or ".join(self.media[name]) or "media"
                hint = did_you_mean(str(value)[:_LONGEST_FAULT], fitting)
                return f"{name} is {_short(value)}, expected a handle of {kinds}. {hint}"
        return _fault(self.for_openai(handles)["function"]["parameters"], arguments)

    def resolve(
        self, arguments: Arguments, handles: Mapping[str, Media], results: Mapping[int, Any]
    ) -> dict[str, Any]:
        """Return the arguments with media instead of handles, and results instead of references.

        Raises:
            InputError: a result of another type than the argument.
        """
        found: dict[str, Any] = {}
        for name, value in arguments.items():
            schema = self.parameters.get("properties", {}).get(name, {})
            resolved = handles.get(value) if name in self.media else None
            found[name] = _replace(value, results) if resolved is None else resolved
            wants_text = isinstance(schema, Mapping) and schema.get("type") == "string"
            if wants_text and name not in self.media and not isinstance(found[name], str | Media):
                found[name] = as_text(found[name])
        for name, value in found.items():
            takes = self.media.get(name, ())
            if (name in self.media) != isinstance(value, Media) or (takes and value.modality not in takes):
                kinds = (" or ".join(takes) or "media") if name in self.media else "no media"
                raise InputError(f"{name} is {_short(value)}, expected {kinds}")
        plain = {name: "" if isinstance(value, Media) else value for name, value in found.items()}
        if fault := _fault(self.parameters, plain):
            raise InputError(fault)
        return found


def tool(function: Callable[..., Any]) -> Tool:
    """Declare a typed function as a tool.

    Parameters are ``str``, ``int``, ``float``, ``bool``, ``Literal``, lists of these, or media: `Media` of any
    modality, or ``Annotated[Media, "image", "video"]``. A parameter with a default may be left out. The first
    paragraph of the docstring describes the tool, its ``Args`` the parameters.

    Raises:
        InputError: not a plain function, no docstring, or a parameter of another type.
    """
    from docstring_parser import parse

    name = getattr(function, "__name__", "")
    if not callable(function) or isinstance(function, type) or not name:
        raise InputError(f"a tool is {_short(function)}, expected a function; write one that calls it")
    if inspect.iscoroutinefunction(function):
        raise InputError(f"the tool {name} is asynchronous; write a function without async that waits for it")
    text = inspect.getdoc(function) or ""
    about, description = parse(text), " ".join(_END_OF_ABOUT.split(text, maxsplit=1)[0].split())
    if not description:
        raise InputError(
            f"the tool {name} has no docstring; its first paragraph tells the planner its purpose"
        )
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise InputError(
            f"the types of the tool {name} cannot be read ({error}); use types that its module imports"
        ) from error
    described = {one.arg_name: " ".join((one.description or "").split()) for one in about.params}
    properties, required, media = {}, [], {}
    for parameter in inspect.signature(function).parameters.values():
        kind = hints.get(parameter.name)
        # A planner gives arguments by name.
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InputError(f"the parameter {parameter} of the tool {name} cannot be given by its name")
        if (modalities := _modalities(kind)) is not None:
            schema, media[parameter.name] = {"type": "string"}, modalities
        elif (schema := _schema(kind)) is None:
            raise InputError(
                f"the parameter {parameter.name} of the tool {name} has the type {kind}, expected str, int, float, "
                "bool, Literal, a list of these, or Media"
            )
        if text := described.get(parameter.name):
            schema["description"] = text
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    return Tool(name, description, parameters, function, media, _modalities(hints.get("return")) or ())


def check_tools(tools: Sequence[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    """Return tools by their names; a plain function is declared as one.

    Raises:
        InputError: two tools of one name, or parameters that are not a JSON Schema.
        MissingExtraError: jsonschema is not installed.
    """
    with needs_extra("jsonschema", extra="solve", purpose="check the arguments of tools"):
        from jsonschema import Draft202012Validator, SchemaError
    found: dict[str, Tool] = {}
    for one in tools:
        one = one if isinstance(one, Tool) else tool(one)
        if one.name in found:
            raise InputError(f"two tools have the name {one.name!r}; give one of them another name")
        try:
            Draft202012Validator.check_schema(one.parameters)
        except SchemaError as error:
            raise InputError(
                f"the parameters of the tool {one.name} are not a JSON Schema: {error.message[:_LONGEST_FAULT]}"
            ) from error
        found[one.name] = one
    return found


def references(value: Any) -> Iterator[int]:
    """Yield the numbers of the results that arguments name, as a whole value or in braces inside a text.

    Examples:
        >>> [*references({"a": "result2", "b": ["is {result1} a cat?", "result of 3"]})]
        [2, 1]
    """
    if isinstance(value, str):
        names = [value] if _WHOLE.fullmatch(value) else _INSIDE.findall(value)
        yield from (int(name.removeprefix("result")) for name in names)
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from references(one)


def as_text(value: Any) -> str:
    """Return a result as a planner reads it: a text itself, anything else as JSON.

    Raises:
        InputError: media, which no text can hold.

    Examples:
        >>> as_text("a cat"), as_text([1, True])
        ('a cat', '[1, true]')
    """
    if isinstance(value, Media):
        raise InputError(f"a text cannot hold {value.modality}; give the result to an argument for media")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _replace(value: Any, results: Mapping[int, Any]) -> Any:
    """Return a value with results instead of references."""
    if isinstance(value, str):
        if _WHOLE.fullmatch(value):
            return results[int(value.removeprefix("result"))]
        return _INSIDE.sub(lambda found: as_text(results[int(found[1].removeprefix("result"))]), value)
    if isinstance(value, Mapping):
        return {key: _replace(one, results) for key, one in value.items()}
    return [_replace(one, results) for one in value] if isinstance(value, list) else value


def _fault(schema: Mapping[str, Any], value: Any) -> str:
    """Return why a value does not follow a schema, "" if it does."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # An empty registry: the schema of an MCP server must not make this machine open an address.
    try:
        error = best_match(Draft202012Validator(schema, registry=Registry()).iter_errors(value))
    except Unresolvable as missing:
        return f"the schema refers to {missing.ref}, which is not in it"
    if error is None:
        return ""
    where = ".".join(map(str, error.absolute_path))
    return (f"{where}: " if where else "") + error.message[:_LONGEST_FAULT]


def _short(value: Any) -> str:
    return repr(value)[:_LONGEST_FAULT]


def _modalities(kind: Any) -> tuple[str, ...] | None:
    """Return the modalities of a type of media; None for any other type."""
    kind = _without_none(kind)
    if kind is Media:
        return ()
    if get_origin(kind) is Annotated and get_args(kind)[0] is Media:
        return tuple(one for one in get_args(kind)[1:] if isinstance(one, str))
    return None


def _schema(kind: Any) -> dict[str, Any] | None:
    """Return the JSON Schema of a type, or None if it cannot be a parameter."""
    kind = _without_none(kind)
    if kind in _TYPES:
        return {"type": _TYPES[kind]}
    if get_origin(kind) is Literal:
        options = list(get_args(kind))
        return {"enum": options} if all(isinstance(one, str | int | None) for one in options) else None
    if get_origin(kind) is list and (items := _schema(get_args(kind)[0])) is not None:
        return {"type": "array", "items": items}
    return None


def _without_none(kind: Any) -> Any:
    """Return ``X`` for ``X | None``: such a parameter is omitted, not null."""
    if get_origin(kind) in (Union, UnionType):
        others = [one for one in get_args(kind) if one is not NoneType]
        return others[0] if len(others) == 1 else kind
    return kind
