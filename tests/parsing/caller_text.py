"""Every regular expression and parser that processes callers' text, with its limit and its test inputs.

`test_growth.py` measures them, and compares the list of expressions with the source; `benchmarks/parsers.py` prints
the table. A parser gets its text and may refuse it in any way.
"""

from __future__ import annotations

import ast
import asyncio
import gc
import importlib
import re
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request

from stable_diffusion_server import parsing
from stable_diffusion_server.api import base64_images, dialect_paths, dispatch, image_sources, request_parsing
from stable_diffusion_server.api.automatic1111 import (
    checkpoint_names,
    controlnet_routes,
    name_mapping,
    options,
    prompt_syntax,
    protocol,
    responses,
    task_params,
    upscale_routes,
)
from stable_diffusion_server.api.automatic1111.task_params import Txt2Img
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.api.middleware import access, access_policy, api_keys, cors, proxy_headers
from stable_diffusion_server.api.openai import protocol as openai_parameters
from stable_diffusion_server.api.schemas import params, validation
from stable_diffusion_server.app.upscalers import Upscalers
from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.generation import limits, prompt_fitting, prompts, replay
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.preprocessing import InProcessPreprocessor
from stable_diffusion_server.imaging import infotext, metadata
from stable_diffusion_server.jobs.events import JobEventLog
from stable_diffusion_server.net import url_policy
from stable_diffusion_server.parsing import strict_json, unicode_text
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.storage import object_headers
from stable_diffusion_server.storage.keys import KEY_MAX_BYTES, object_key
from stable_diffusion_server.types import Caller, StoredObject

# The embedded upscaler and the filters.
UPSCALERS = Upscalers(Settings())
STOP_WORDS = prompts.BUILTIN_STOP_WORDS
A_LIST = parsing.parse_wildcard_lines("a {b|c}\n__a__")
PACKAGE = Path(strict_json.__file__).parent.parent
HEADER = 16_384
MEBIBYTE = 1_048_576

# Regular expressions that process no caller's text, by module and source, with the reason.
NEVER_CALLERS = {
    "settings/models.py": "settings are the operator's",
    "settings/auth.py": "settings are the operator's",
    "settings/http.py": "settings are the operator's",
    "settings/storage.py": "settings are the operator's",
    "storage/factory.py": "the bucket's name and address are settings",
    "pipelines/loading/checkpoint_configs.py": "names of tensors in a file that the operator chose",
    "pipelines/loading/qwen3_names.py": "names of tensors in a file that the operator chose",
    "app/fetch_order.py": "the command line is the operator's",
    "pipelines/loading/hub_listing.py": "names of files in a repository that the operator chose",
    "pipelines/library/shards.py": "names of files in a folder that the operator chose",
}

# Typical causes of quadratic time: unclosed brackets, separators, runs, escapes, combining marks, near matches.
_METHODS = {"match", "fullmatch", "search", "sub", "subn", "finditer"}
SHAPES: dict[str, str] = {
    "[": "[",
    "(": "(",
    "<": "<",
    "(:": "(:",
    "[a:": "[a:",
    "1:": "1:",
    "digits": "1",
    "dots": "1.",
    "<lora:": "<lora:",
    "<lora:a:1": "<lora:a:1",
    "<lora:a>": "<lora:a>",
    "(a:1)": "(a:1)",
    "commas": ",",
    "semicolons": ";",
    "colons": ":",
    "blanks": " ",
    "a blank": "a ",
    "lines": "\n",
    "backslashes": "\\",
    "quotes": '"',
    "escaped quotes": '\\"',
    "slashes": "/",
    "dashes": "1-,",
    "percents": "%41",
    "pairs": "a=b&",
    "letters": "a",
    "data:a/b;": "data:a/b;",
    "marks": "\u0315\u0323",
    "composed marks": "\u0f73\u0323",
    "wide": "\u732b",
    "emoji": "\U0001f469\u200d",
}

# More causes in the syntax of prompts, and in parameters texts.
SYNTAX = {
    **SHAPES,
    "[a|": "[a|",
    "[a:b:0.5]": "[a:b:0.5]",
    "nested schedules": "[a:[",
    "crossed": "](",
    "escapes": "\\(",
    "AND": "a:1 AND ",
    "BREAK": "BREAK ",
    "signs": "a++",
    "numbers": ")1.5",
    "unopened weights": "a:1.2)",
}
WILDCARDS = {
    **SHAPES,
    "{": "{",
    "}": "}",
    "{a|": "{a|",
    "{a|b}": "{a|b}",
    "{a}": "{a}",
    "nested": "{a}}{",
    "_": "_",
    "__a": "__a",
    "__a__": "__a__ ",
    "__a b/": "__a b/",
    "{2$$": "{2$$",
    "$$": "$$",
    "{1::": "{1::",
    "escaped braces": "\\{",
}
FACTS = {
    **SHAPES,
    "facts": "Steps: 4, ",
    "lines of facts": "Negative prompt: a\n",
    "quoted facts": 'a: "b, c", ',
    "open quotes": 'a: "\\',
}


def repeated(shape: str, size: int) -> str:
    """`size` characters of a pattern."""
    return (shape * (size // len(shape) + 1))[:size]


def opened(shape: str, size: int) -> str:
    """The same after a prefix that makes expressions search further."""
    return ("[" + repeated(shape, size))[:size]


@dataclass(frozen=True)
class Parser:
    """A parser of callers' text of up to `limit` characters or bytes, in the form that `built` makes of a test input.

    `refuses` says that it enforces that limit itself, so longer input costs nothing.
    """

    name: str
    limit: int
    read: Callable[[Any], object]
    built: Callable[[str], Any] = str
    shapes: dict[str, str] = field(default_factory=lambda: SHAPES)
    refuses: bool = True

    def seconds(self, shape: str, size: int) -> float:
        """CPU seconds for an input of that size."""
        given = [self.built(make(self.shapes[shape], size)) for make in (repeated, opened)]
        return seconds_of(lambda: [self.tried(text) for text in given])

    def tried(self, text: Any) -> object:
        try:
            return self.read(text)
        except (ServerError, ValueError):
            return None


def seconds_of(work: Callable[[], object]) -> float:
    """CPU seconds of one run: the minimum of several, which together take a measurable fraction of a millisecond.

    Garbage collection is off, as in timeit: its time depends on all other objects.
    """
    taken: list[float] = []
    gc.disable()
    try:
        while sum(taken) < 0.0003 or len(taken) < 2:
            began = time.thread_time()
            work()
            taken.append(time.thread_time() - began)
            if taken[-1] > 0.02:
                break
    finally:
        gc.enable()
    return min(taken)


@dataclass(frozen=True)
class Expression:
    """A regular expression of the package, and the methods that are called on it."""

    module: str
    name: str
    pattern: re.Pattern[Any]
    methods: tuple[str, ...]

    def read(self, text: Any) -> None:
        if isinstance(self.pattern.pattern, bytes):
            text = text.encode()
        for method in self.methods:
            if method in ("sub", "subn"):
                self.pattern.sub(text[:0], text)
            elif method == "finditer":
                list(self.pattern.finditer(text))
            else:
                getattr(self.pattern, method)(text)


def calls_of_re() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call of `re` in the package: the module, the call, and the module constant it is assigned to, if any."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        made = {
            id(node.value): target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            function = node.func if isinstance(node, ast.Call) else None
            if (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and function.value.id == "re"
            ):
                assert isinstance(node, ast.Call)
                yield path.relative_to(PACKAGE).as_posix(), node, made.get(id(node), "")


def expressions() -> list[Expression]:
    """The expressions that process callers' text, found in the source."""
    found = []
    for module, _, name in calls_of_re():
        if module in NEVER_CALLERS or not name:
            continue
        dotted = "stable_diffusion_server." + module.removesuffix(".py").replace("/", ".")
        used = re.findall(rf"\b{name}\.(\w+)\(", (PACKAGE / module).read_text())
        pattern = getattr(importlib.import_module(dotted), name)
        # An expression that other modules use is tested with both of its methods.
        methods = tuple(sorted({*used} & _METHODS)) or ("fullmatch", "search")
        found.append(Expression(module, name, pattern, methods))
    return found


def request_of(body: bytes, media_type: str, query: bytes = b"") -> Request:
    """A request as the routes get it, with a body that is split into chunks lazily."""
    at = 0

    async def receive() -> Any:
        nonlocal at
        at += 65_536
        return {"type": "http.request", "body": body[at - 65_536 : at], "more_body": at < len(body)}

    headers = [(b"content-type", media_type.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": query, "headers": headers, "state": {}}
    request = Request(scope, receive)
    if not media_type.startswith("multipart/"):
        request._body = body  # the cost of reading is not measured
    return request


def run(work: Any) -> object:
    with asyncio.Runner() as runner:
        return runner.run(work)


def sent(media_type: str) -> Callable[[bytes], object]:
    """A body parsed into parameters."""

    def read(body: bytes) -> object:
        return run(request_parsing.read_parameters(request_of(body, media_type), frozenset({"image_file"})))

    return read


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + b"\0\0\0\0"


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def webp(exif: bytes) -> bytes:
    inner = b"WEBP" + b"EXIF" + struct.pack("<I", len(exif)) + exif
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


def exif(text: str) -> bytes:
    """EXIF with a user comment in UTF-16, as this server writes it."""
    comment = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    entry = struct.pack(">HHII", 0x9286, 7, len(comment), 44)
    return (
        b"MM\0*"
        + struct.pack(">IH", 8, 1)
        + struct.pack(">HHII", 0x8769, 4, 1, 26)
        + b"\0\0\0\0"
        + (struct.pack(">H", 1) + entry + b"\0\0\0\0")
        + comment
    )


def quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def headers_of(name: str) -> Callable[[str], Headers]:
    return lambda text: Headers({name: text.encode("latin-1", "replace").decode("latin-1")})


class Carrier:
    """A minimal request for code that reads headers only."""

    def __init__(self, headers: Headers) -> None:
        self.headers = headers


async def followed(after: str) -> None:
    happenings = JobEventLog("epoch")
    happenings.close()
    async for _ in happenings.follow(f"epoch.{after}", 1.0):
        pass


HOUSE = DialectContext(RequestLimits(), MODELS, "sdxl", {}, 10, 67_108_864)
PICTURES = strict_json.JsonLimits(image_fields=frozenset({"p"}), max_image_bytes=27_963_051)
TO_JSON: dict[str, str] = {
    "lists": "[],",
    "objects": "{},",
    "open lists": "[",
    "open objects": '{"a":',
    "texts": '"",',
    "escaped quotes": '\\"',
    "backslashes": "\\",
    "numbers": "1,",
    "digits": "1",
    "blanks": " ",
    "letters": "a",
    "pairs": '"a":1,',
}


def seen(text: str) -> object:
    scope = {
        "type": "http",
        "path": "/",
        "query_string": b"",
        "client": ("127.0.0.1", 1),
        "headers": [(b"x-forwarded-for", text.encode("latin-1", "replace"))],
        "state": {},
    }
    access.check_header_limits(scope)
    return proxy_headers.TrustedProxies((url_policy.ipaddress.ip_network("127.0.0.0/8"),)).seen_through(scope)


def head_of(text: str) -> Any:
    """A request head with this text in headers of a thousand characters."""
    pieces = (text[at : at + 1000] for at in range(0, len(text), 1000))
    headers = [(b"a", piece.encode("latin-1", "replace")) for piece in pieces]
    return {"type": "http", "path": "/", "query_string": b"", "headers": headers}


def asking(text: str) -> Headers:
    return Headers(raw=[(b"access-control-request-headers", text.encode("latin-1", "replace"))])


def traced(headers: Headers) -> object:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(headers)


# A thousand, of which many begin as the patterns do.
EMBEDDINGS = parsing.NameIndex(
    [
        *(f"style{number}" for number in range(900)),
        *("a " * number + "b" for number in range(50)),
        *("1-" * n for n in range(1, 50)),
    ]
)
PARSERS = [
    Parser("a prompt, cleaned", limits.TEXT_MAX, prompts.clean_prompt, refuses=False),
    Parser("a text in NFC", limits.TEXT_MAX, unicode_text.nfc, refuses=False),
    Parser(
        "prompt of our own routes",
        limits.TEXT_MAX,
        lambda text: validation.validated(params.TextToImageParams, {"prompt": text}),
    ),
    Parser(
        "lora of our own routes",
        2000,
        lambda text: validation.validated(params.TextToImageParams, {"prompt": "a", "lora": text}).to_request_fields(),
    ),
    Parser(
        "unknown names",
        100_000,
        lambda text: validation.validated(
            params.TextToImageParams,
            {text[at : at + len(text) // 100 + 1]: 1 for at in range(0, len(text), len(text) // 100 + 1)},
        ),
        refuses=False,
    ),
    Parser(
        "tags and brackets of an AUTOMATIC1111 prompt",
        limits.TEXT_MAX,
        lambda text: prompt_syntax.read_prompt(text, "prompt", 20),
        shapes=SYNTAX,
        refuses=False,
    ),
    Parser(
        "the same for models that read weights",
        limits.TEXT_MAX,
        lambda text: prompt_syntax.read_prompt(text, "prompt", 20, weighted=True),
        shapes=SYNTAX,
        refuses=False,
    ),
    Parser("weights", limits.TEXT_MAX, parsing.parse_weights, shapes=SYNTAX, refuses=False),
    Parser("names of embeddings", limits.TEXT_MAX, EMBEDDINGS.split, shapes=SYNTAX, refuses=False),
    Parser("schedules", limits.TEXT_MAX, lambda text: parsing.scheduled_texts(text, 4), shapes=SYNTAX, refuses=False),
    Parser(
        "wildcards",
        limits.TEXT_MAX,
        lambda text: parsing.expand_wildcards(text, lambda: 0.5, {"a": A_LIST}.get, parsing.WildcardLimits()),
        shapes=WILDCARDS,
        refuses=False,
    ),
    Parser("compel's weights", limits.TEXT_MAX, parsing.from_compel, shapes=SYNTAX, refuses=False),
    Parser(
        "a prompt with weights, shortened",
        limits.TEXT_MAX,
        lambda text: prompt_fitting.shorten_weighted_text(text, 4, lambda part: 20 * len(part), STOP_WORDS),
        shapes=SYNTAX,
        refuses=False,
    ),
    Parser("prompt of /sdapi", 5000, lambda text: protocol.parse_task(Txt2Img(prompt=text), HOUSE, {}), shapes=SYNTAX),
    Parser("infotext of /sdapi", 100_000, infotext.parse_parameters, shapes=FACTS, refuses=False),
    Parser(
        "infotext with a name at its end",
        1_000_000,  # below it the square of searches in C does not show
        lambda text: infotext.parse_parameters(f"Steps: 1, {text}, Seed: 2"),
        shapes=FACTS,
        refuses=False,
    ),
    Parser(
        "infotext in a request",
        100_000,
        lambda text: task_params.with_infotext(Txt2Img(infotext=text)),
        shapes=FACTS,
        refuses=False,  # Pydantic counts all characters; JSON has at most 131,072 bytes in a text
    ),
    Parser(
        "sampler of /sdapi",
        limits.NAME_MAX,
        lambda text: protocol.parse_task(Txt2Img(sampler_name=text), HOUSE, {}),
    ),
    Parser(
        "model of /sdapi",
        limits.NAME_MAX,
        lambda text: protocol.parse_task(Txt2Img(override_settings={"sd_model_checkpoint": text}), HOUSE, {}),
    ),
    Parser("name of a checkpoint", limits.NAME_MAX, lambda text: checkpoint_names.model_named(text, HOUSE)),
    Parser("an option of /sdapi", 1000, lambda text: options.CallerOptions().update(Caller(), {"a": text}, HOUSE)),
    Parser("name of an option", 100, lambda text: options.CallerOptions().update(Caller(), {text: 1}, HOUSE)),
    Parser(
        "upscaler of /sdapi",
        limits.NAME_MAX,
        lambda text: upscale_routes.ExtrasParams.model_validate({"upscaler_1": text, "upscaler_2": text}).choose(
            UPSCALERS
        ),
    ),
    Parser(
        "numbers as text of /sdapi",
        10_000,
        lambda text: upscale_routes.ExtrasParams.model_validate({"upscaling_resize_w": text, "upscaling_resize": text}),
        refuses=False,
    ),
    Parser(
        "module of /controlnet",
        limits.NAME_MAX,
        lambda text: controlnet_routes.DetectParams(controlnet_module=text).chosen(InProcessPreprocessor()),
    ),
    Parser(
        "size of OpenAI",
        10_000,
        lambda text: openai_parameters.GenerateImagesParams(prompt="a", size=text).pixels(),
        refuses=False,
    ),
    Parser(
        "an image in JSON of OpenAI",
        4 * MEBIBYTE,
        image_sources.read_source,
        lambda text: f"data:image/png;base64,{text}",
        {"letters": "a", "lines": "aaaa\n", "semicolons": ";", "commas": ",", "equals": "="},
        refuses=False,
    ),
    Parser(
        "an address in JSON of OpenAI",
        MEBIBYTE,
        image_sources.read_source,
        lambda text: {"image_url": text},
        refuses=False,
    ),
    Parser(
        "the name of a field in a list",
        100_000,
        lambda text: request_parsing._merged([(f"image[{text}]", 1), (text, 1)], frozenset({"image"})),
        refuses=False,
    ),
    Parser(
        "JSON",
        MEBIBYTE,
        strict_json.parse_object,
        lambda text: b'{"a":[' + text.encode() + b"1]}",
        TO_JSON,
    ),
    Parser(
        "JSON with pictures",
        28_000_000,
        lambda body: strict_json.parse_object(body, PICTURES),
        lambda text: b'{"p":"' + text.encode() + b'"}',
        TO_JSON,
        refuses=False,  # above it the body limit applies
    ),
    Parser("JSON written", MEBIBYTE, strict_json.dumps, lambda text: ["\ud800", float("inf"), text], refuses=False),
    Parser("a query", 65_536, request_parsing.read_query, lambda text: text.encode(), refuses=False),
    Parser("a form", MEBIBYTE, sent("application/x-www-form-urlencoded"), lambda text: text.encode()),
    Parser(
        "a multipart text",
        MEBIBYTE,
        sent("multipart/form-data; boundary=edge"),
        lambda text: (
            b'--edge\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + text.encode() + b"\r\n--edge--\r\n"
        ),
    ),
    Parser(
        "a multipart file",
        4 * MEBIBYTE,
        sent("multipart/form-data; boundary=edge"),
        lambda text: (
            b'--edge\r\nContent-Disposition: form-data; name="image_file"; filename="a"\r\n\r\n'
            + text.encode()
            + b"\r\n--edge--\r\n"
        ),
        {"letters": "a", "near edges": "\r\n--edg", "carriage returns": "\r", "dashes": "-"},
        refuses=False,
    ),
    Parser("a media type", 500, lambda text: sent(f"multipart/form-data; boundary=edge; {text}")(b"--edge--\r\n")),
    Parser(
        "a picture in base64",
        28_000_000,
        lambda text: base64_images.bytes_of(text, "image"),
        shapes={"letters": "a", "lines": "aaaa\n", "semicolons": ";", "data:a/b;": "data:a/b;", "equals": "="},
        refuses=False,
    ),
    Parser("Prefer", HEADER, lambda one: dispatch.preferences_of(Carrier(one)), headers_of("prefer"), refuses=False),  # type: ignore[arg-type]  # has what is asked of it
    Parser(
        "Idempotency-Key",
        HEADER,
        lambda one: dispatch.preferences_of(Carrier(one)),
        headers_of("idempotency-key"),
        refuses=False,
    ),  # type: ignore[arg-type]  # the same
    Parser(
        "X-Job-ID", HEADER, lambda one: dispatch.preferences_of(Carrier(one)), headers_of("x-job-id"), refuses=False
    ),  # type: ignore[arg-type]  # the same
    Parser("Last-Event-ID", HEADER, lambda text: run(followed(text)), refuses=False),
    Parser(
        "Authorization",
        HEADER,
        lambda text: api_keys.ApiKeyring().holder(Headers({"authorization": f"Basic {text}"})),
        refuses=False,
    ),
    Parser("a bare key", HEADER, api_keys._authorized, refuses=False),
    Parser("names of a preflight request", 4096, lambda text: cors._preflight_response("a", asking(text))),
    Parser("a path", 1000, access.canonical_path, lambda text: f"/models/{text}"),
    Parser(
        "a path without a route",
        1000,
        lambda text: (dialect_paths.is_openai_path(text), dialect_paths.openai_hint(text)),
    ),
    Parser("Host", HEADER, access_policy._host_name, refuses=False),
    Parser("X-Forwarded-For", HEADER, seen),
    Parser("traceparent", HEADER, traced, headers_of("traceparent"), refuses=False),
    Parser(
        "tracestate",
        HEADER,
        traced,
        lambda text: Headers(
            {
                "traceparent": f"00-{'1' * 32}-{'1' * 16}-01",
                "tracestate": text.encode("latin-1", "replace").decode("latin-1"),
            }
        ),
        refuses=False,
    ),
    Parser("the head of a request", 65_536, access.check_header_limits, head_of),
    Parser(
        "an address to fetch",
        url_policy.MAX_URL_LENGTH,
        lambda text: url_policy.parse_url(text, "image_url"),
        lambda text: "http://" + text,
    ),
    Parser(
        "an address with a path",
        url_policy.MAX_URL_LENGTH,
        lambda text: url_policy.parse_url(text, "image_url"),
        lambda text: "http://a/" + text,
    ),
    Parser("save_path", KEY_MAX_BYTES, lambda text: object_key("static", text)),
    Parser("the name of a file", KEY_MAX_BYTES, object_headers.content_disposition, refuses=False),
    Parser("a whole number", limits.TEXT_MAX, limits.parse_int),
    Parser(
        "record in a PNG",
        1_000_000,
        metadata.read_record,
        lambda text: png(chunk(b"iTXt", b"record\0\0\0\0\0" + f'{{"prompt":"{quoted(text)}"}}'.encode())),
    ),
    Parser(
        "record in a WebP",
        1_000_000,
        metadata.read_record,
        lambda text: webp(exif(f'{{"prompt":"{quoted(text)}"}}')),
    ),
    Parser(
        "a PNG of many chunks",
        1_200_000,
        metadata.read_record,
        lambda text: png(chunk(b"iTXt", b"") * (len(text) // 12)),
        {"chunks": "a"},
    ),
    Parser(
        "a JPEG of many segments",
        400_000,
        metadata.read_record,
        lambda text: b"\xff\xd8" + b"\xff\xe1\0\2" * (len(text) // 4),
        {"segments": "a"},
    ),
    Parser(
        "a WebP of many chunks",
        800_000,
        metadata.read_record,
        lambda text: b"RIFF\0\0\0\0WEBP" + b"ABCD\0\0\0\0" * (len(text) // 8),
        {"chunks": "a"},
    ),
    Parser(
        "AUTOMATIC1111's text in a PNG",
        100_000,
        responses.png_info_body,
        lambda text: png(chunk(b"iTXt", b"parameters\0\0\0\0\0" + text.encode())),
        FACTS,
    ),
    Parser("a stored object's record", 10_000, lambda text: replay.read_record(text.encode()), refuses=False),
    Parser(
        "a stored object's size",
        10_000,
        lambda text: StoredObject("a", 1, "a", "a", {"bytes": text}).is_complete,
        refuses=False,
    ),
    Parser(
        "parameters in errors",
        10_000,
        lambda text: name_mapping.renamed(ServerError(text, field="strength")),
        refuses=False,
    ),
]
