"""Reads a parameter that is a list of objects: a list in JSON, its JSON text in a form or a query."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from stable_diffusion_server.api.schemas.validation import NESTED, faults_in
from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.parsing import JsonLimits, parse_object

T = TypeVar("T", bound=BaseModel)
# The list as a member, since only objects are parsed.
_LIST = "list"


def read_objects(value: object, name: str, schema: type[T], most: int, most_json: int) -> tuple[T, ...]:
    """Return the objects of the parameter `name`, at most `most`, whose text has `most_json` characters at most.

    Raises `PydanticCustomError`, from which `faults_in` names every field at fault, such as `repairs[0].confidence`.
    """
    if isinstance(value, str):
        value = _parsed(value, name, most_json)
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("list_type", "it is no list")
    if len(value) > most:
        raise _faulty([(name, f"{name} has more than {most} entries.")])
    read: list[T] = []
    faults: list[tuple[str, str]] = []
    for number, entry in enumerate(value):
        if not isinstance(entry, dict | schema):
            faults.append((f"{name}[{number}]", f"{name}[{number}] must be an object."))
            continue
        try:
            read.append(schema.model_validate(entry))
        except ValidationError as error:
            found = faults_in(error, schema)
            faults += [(f"{name}[{number}].{field}", f"{name}[{number}].{sentence}") for field, sentence in found]
    if faults:
        raise _faulty(faults)
    return tuple(read)


def _faulty(faults: list[tuple[str, str]]) -> PydanticCustomError:
    return PydanticCustomError(NESTED, "entries of a list are at fault", {"faults": faults})


def _parsed(text: str, name: str, most: int) -> object:
    if len(text) > most:
        raise _faulty([(name, f"{name} is longer than {most} characters.")])
    if not text.strip():
        return None
    try:
        members = parse_object(f'{{"{_LIST}":{text}}}'.encode(), JsonLimits(2 * most))
    except (ServerError, ValueError):
        members = {}
    if [*members] != [_LIST]:
        raise _faulty([(name, f"{name} must be a list of objects in JSON.")])
    return members[_LIST]
