"""Validates parameters by a schema, and says in one error, in plain words, everything that is wrong with them.

The sentences do not contain the values that were sent, which may be long or secret.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stable_diffusion_server.errors import InvalidInput, number_text
from stable_diffusion_server.types import GenerationRequest

_NAME_SHOWN = 100
# Type of an error that holds the faults within the entries of a list, by their names.
NESTED = "nested_faults"
# What a parameter must be, by Pydantic's error types; `_expected` has those that depend on a value.
_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type"), "an object"),
    **dict.fromkeys(("dataclass_type", "dataclass_exact_type", "is_instance_of"), "sent as a file of a multipart form"),
    "image_source": "sent as a file of a multipart form, or in JSON as an address or a data URL",
    "string_type": "a text",
    "int_parsing_size": "a smaller number",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "greater_than": ("gt", "above"),
    "less_than": ("lt", "below"),
}


class RequestParams(BaseModel):
    """Parameters that `params_from_request` can read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    # Parameters that may be files of a multipart form, and parameters that may be repeated.
    files: ClassVar[frozenset[str]] = frozenset()
    lists: ClassVar[frozenset[str]] = frozenset()
    # Parameters that may hold an image as base64 text.
    pictures: ClassVar[frozenset[str]] = frozenset()
    # Parameters of a query that are dropped, repeated or not.
    ignored: ClassVar[frozenset[str]] = frozenset()
    # Names of other servers for parameters of this schema.
    other_names: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def type_faults(cls, parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return (parameter, sentence) of each value whose type Pydantic would convert, and this server refuses."""
        return []


class RequestedGeneration(RequestParams, ABC):
    """Parameters that describe a `GenerationRequest`."""

    @abstractmethod
    def to_request_fields(self) -> dict[str, Any]:
        """Return the fields of the request, without its images."""

    @abstractmethod
    def to_request(self) -> GenerationRequest:
        """Return the request these parameters describe. Raises `InvalidInput`."""


P = TypeVar("P", bound=RequestParams)
# Returns (parameter, sentence) of each value that is valid by its type and out of its bounds.
FaultsOf = Callable[[P], Sequence[tuple[str, str]]]


def validated(schema: type[P], sent: Mapping[str, Any], faults_of: FaultsOf[P] | None = None) -> P:
    """Validate parameters by a schema; null is the same as leaving a parameter out.

    `faults_of` checks the values whose types are right. Raises `InvalidInput`, which names every invalid parameter.
    """
    given, names, faults = _with_own_names(schema, sent)
    faults = {**dict(schema.type_faults(given)), **faults}
    params = None
    try:
        params = schema.model_validate({name: value for name, value in given.items() if name not in faults})
    except ValidationError as error:
        faults = {**dict(faults_in(error, schema)), **faults}
    if faults_of is not None:
        checked = params or _without_faults(schema, given, faults)
        further = faults_of(checked) if checked is not None else ()
        faults |= {name: sentence for name, sentence in further if name not in faults}
    if params is None or faults:
        raise InvalidInput.from_faults([_as_sent(name, sentence, names) for name, sentence in faults.items()])
    return params


def _with_own_names(
    schema: type[RequestParams], sent: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Return the parameters by the names of `schema`, the names of other servers that were sent, and faults."""
    given: dict[str, Any] = {}
    names: dict[str, str] = {}
    faults: dict[str, str] = {}
    for name, value in sent.items():
        own = schema.other_names.get(name, name)
        if value is None and own in schema.model_fields:
            continue
        if own in given and given[own] != value:
            faults[own] = f"{own} and {name if name != own else names[own]} differ; send one of them."
        elif own != name:
            names[own] = name
        given.setdefault(own, value)
    return given, names, faults


def _without_faults(schema: type[P], given: Mapping[str, Any], faults: Mapping[str, str]) -> P | None:
    """Return the parameters without those that have faults; required ones get a text in their place."""
    faulty = {name.partition("[")[0] for name in faults}
    required = {name: "-" for name, field in schema.model_fields.items() if field.is_required() and name in faulty}
    valid = {name: value for name, value in given.items() if name not in faulty}
    try:
        return schema.model_validate({**valid, **required})
    except ValidationError:
        return None


def _as_sent(name: str, sentence: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Return a fault with the name that the client sent."""
    own_name_first = name in names and sentence.startswith(f"{name} must")
    return names.get(name, name), names[name] + sentence.removeprefix(name) if own_name_first else sentence


def raise_invalid(error: ValidationError, schema: type[BaseModel] | None = None) -> NoReturn:
    """Raise Pydantic's errors as one `InvalidInput`, which names every invalid parameter."""
    raise InvalidInput.from_faults(faults_in(error, schema)) from error


def faults_in(error: ValidationError, schema: type[BaseModel] | None = None) -> list[tuple[str, str]]:
    """Return (parameter, sentence) of Pydantic's errors, one for each parameter; `schema` knows both ends of a range.

    A parameter of several types has an error for each of them; its sentence names all types.
    """
    sentences: dict[str, str] = {}
    expected: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False, include_input=False):
        if fault["type"] == NESTED:
            sentences |= fault["ctx"]["faults"]
            continue
        name = str(fault["loc"][0] if fault["loc"] else "body")[:_NAME_SHOWN]
        words = _expected(fault["type"], fault.get("ctx", {}), _range_in(schema, name))
        if words is None:
            sentences.setdefault(name, _sentence(name, fault["type"], fault["msg"]))
        else:
            sentences.setdefault(name, "")
            expected.setdefault(name, []).append(words)
    return [
        (name, sentence or f"{name} must be {' or '.join(dict.fromkeys(expected[name]))}.")
        for name, sentence in sentences.items()
    ]


def _expected(kind: str, values: Mapping[str, Any], ends: Mapping[str, float]) -> str | None:
    """Return what a parameter must be; `None` for errors of another form."""
    if kind in _BOUNDS:
        end, words = _BOUNDS[kind]
        if "ge" in ends and "le" in ends:
            return f"between {number_text(ends['ge'])} and {number_text(ends['le'])}"
        return f"{words} {number_text(values[end])}"
    if kind in ("literal_error", "enum"):
        return str(values["expected"])
    if kind == "string_too_long":
        return f"a text of up to {values['max_length']} characters"
    return _EXPECTED.get(kind)


def _range_in(schema: type[BaseModel] | None, name: str) -> dict[str, float]:
    field = schema.model_fields.get(name) if schema is not None else None
    metadata = field.metadata if field is not None else []
    return {end: getattr(part, end) for part in metadata for end in ("ge", "le") if hasattr(part, end)}


def _sentence(name: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return f"{name} is not a parameter here."
    if kind == "missing":
        return f"{name} is missing."
    message = message.removeprefix("Value error, ")
    return f"{name} {message}." if message.startswith("is ") else f"{name}: {message[0].lower()}{message[1:]}."
