"""The catalogue of faults and bad inputs by row, and which tests cover which row. Runs no test.

A test is bound to rows by `@pytest.mark.fault(12)`, on the function or on one of its parameters; several numbers and
"40b" are allowed. Tests stay in the folder of their package. `scripts/fault_table.py` runs them all and writes
`docs/robustness-tests.md`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
PAGE = TESTS.parent / "docs" / "robustness-tests.md"
_LINE = re.compile(r"^\| (\w*) \| (.*) \| `(tests/\S+)` \| (.+) \|$", re.MULTILINE)

# The fault, in the words of the table.
GROUPS: dict[str, dict[str, str]] = {
    "Request shape": {
        "1": "the prompt is missing",
        "2": "the prompt is empty or blank",
        "3": "the prompt is no text",
        "4": "the prompt has 100,000 characters, or a megabyte",
        "5": "NUL, lone surrogates, overrides of direction, zero width, emoji; composed and decomposed text",
        "6": "a prompt or a name like a path (`../`, `%2f`, `//`, line breaks) on its way into a key",
        "7": "width and height of 0, negative, 1, odd, no multiple of 8, 1e9, a fraction, NaN, `1024x`",
        "8": "0, 201 and 1e9 steps",
        "9": "a guidance of NaN, infinity, -1, 21",
        "10": "a seed of -1, 2^32, 2^63, `abc`, none at all",
        "11": "0 and 11 pictures at once",
        "12": "a strength of 0, 1, above 1, and one that leaves no step",
        "13": "an output format that is not taken (gif, svg)",
        "14": "broken JSON, 10,000 levels deep, a name twice, 100 MB, a wrong length, a body in slow pieces",
        "15": "a parameter given several times, or as an array in the query",
        "16": "a model that is not loaded, an absolute path, a climbing path",
        "17": "a path as LoRA or ControlNet",
        "18": "multipart: a file name beyond ASCII, 1,001 parts, no boundary, a huge part header",
    },
    "Pictures that come in": {
        "19": "a PNG or JPEG cut short",
        "20": "no bytes at all",
        "21": "HTML or text called .png",
        "22": "a file that is a PNG and also a ZIP, an SVG or a PDF",
        "23": "a PNG of a few kilobytes that claims 50,000 × 50,000 pixels",
        "24": "as many pixels as are taken, and one more",
        "25": "a progressive JPEG of very many scans",
        "26": "an animation of 10,000 frames (GIF, WebP, APNG)",
        "27": "print colours, 16 bits, 1 bit, palettes with transparency, grey with alpha, AVIF of 10 bits",
        "28": "all orientations of EXIF, EXIF that refers to itself, an ICC profile of 10 MB, GPS data",
        "29": "a mask of another size, all black, all white, with transparency",
        "30": "pictures of 1 × 1 and 1 × 10,000 pixels",
        "31": "formats that are not taken (FITS, PSD, TIFF, EPS, DDS, FPX, JPEG 2000)",
        "32": "a decoder that crashes or never ends",
    },
    "Addresses": {
        "33": "loopback and link-local addresses in any spelling, with a trailing dot, by a name that leads there",
        "34": "the same inside IPv6 transition addresses",
        "35": "a name that is public when it is checked and private when it is dialled",
        "36": "redirects inside, in a circle, too many, to `file:` and `gopher:`",
        "37": "a body that drips, never ends, is compressed, has no length or a wrong one",
        "38": "a user name in the address, port 22, a proxy in the environment",
        "39": "the server's own address, and its storage's, as source of a picture",
    },
    "Storage": {
        "40": "looking for an object is answered 403, 404, 500, or not at all",
        "40b": "the object is absent when looked for and there when written (412)",
        "41": "two writers of one name",
        "42": "a write is answered 409 and then taken",
        "43": "a write breaks off half way",
        "44": "the storage is down",
        "45": "an object of no bytes, or a broken one, under the name",
        "46": "the credentials expire",
        "47": "the disk is full, the folder is read-only, the name is too long",
        "48": "the storage takes 30 seconds",
        "49": "the clock is wrong by more than signatures allow",
    },
    "Device and process": {
        "50": "SIGTERM, SIGINT and SIGKILL to the server, its watchdog and the whole tree, idle and under load",
        "51": "the memory of the device runs out while drawing",
        "52": "another program takes nearly all memory of the device",
        "53": "an assertion on the device, an illegal address",
        "54": "numbers that are not finite, black pictures",
        "55": "a step that never ends",
        "56": "the process dies while it loads, again and again",
        "57": "weights that are missing, cut short, of another class; no hub",
        "58": "no accelerator where one was asked for",
        "59": "compiling the model fails",
    },
    "Load and clients": {
        "60": "100 identical requests at once",
        "61": "the queue is full",
        "62": "the client leaves while it waits, while it is drawn for, while its picture is encoded",
        "63": "clients that send or read slowly, 1,000 idle connections",
        "64": "a restart under load, forged X-Forwarded-For, answers of 500 requests in disorder, a long soak",
    },
    "Web interface: events and uploads": {
        "100": "dictionaries, paths and addresses of files in every field of every event of the web UI, by any role",
        "101": "bombs and foreign kinds of picture files sent to the web UI",
        "102": "pictures sent to the web UI and never used; very many of them; those of other visitors",
        "103": "event bodies of the web UI that are no JSON, are nested 60,000 deep, or hold NaN and half a surrogate",
        "104": "every route of Gradio that no page of ours calls; another visitor's session",
        "105": "odd forms and characters beyond ASCII where a key is asked for or compared",
        "106": "the web UI opened as a picture, a script or a frame of another page",
        "107": "a stranger who asks by way of the web UI, which stands on the server's own machine",
    },
    "Waiting on children and peers": {
        "110": "clients that hang up at any moment of a decode, decodes that time out, children that hang and crash",
        "111": "slow pictures and silent webhooks of one caller, while others ask",
        "112": "a decoder, or what draws accepted jobs, that makes no progress; an event loop that stands still",
        "113": "the clock set back or forward while something is waited for; a secret that cannot sign",
        "114": "bodies that stand still or drip, at every route; more and larger ones at a time than memory holds",
        "115": "hundreds of followers of one job, some of whom read slowly or not at all",
        "116": "silent hosts and silent name servers of one caller, while others have pictures fetched",
    },
    "Bounds before parsing": {
        "120": "texts made for expressions and parsers that grow with the square: brackets, tags, separators, marks",
        "121": "texts, lists and heads of requests far beyond their limits; bodies of tens of megabytes of anything",
        "122": "JSON of millions of values, thousands of levels, or pictures where there are none, in every dialect",
        "123": "NaN, infinities, huge numbers, lone surrogates, names given twice, at any depth, in every dialect",
        "124": "records, metadata and outcomes of others that hold what JSON cannot, on their way into an answer",
        "125": "numbers of thousands of digits in headers, ids and addresses",
        "126": "forms in encodings that are slow, broken or no text",
        "127": "an option that is refused, at an endpoint that keeps options",
    },
    "Storage: what it refuses and answers": {
        "130": "a Host of another name or port than the socket's, in every dialect; forwarded with and without trust",
        "131": "a bucket that no PUBLIC_BASE_URL gives an address",
        "132": "a name that the storage refuses: too long, a denied folder, too large, bad metadata; or every name",
        "133": "a spooled object that is refused, or fails for now, among others that are not",
        "134": "a write that is answered 200 and stored nothing, or something else",
        "135": "answers without headers, without a body, cut short, of another length, HTML; objects that are garbage",
        "136": "a start while the bucket refuses, resets, hangs, answers HTML, noise, 500, nothing, wrong XML, no TLS",
        "137": "a full, read-only or broken disk under the bucket or the spool, while jobs wait",
        "138": "anything odd in DATA_DIR/spool: folders, links, pipes, files that are cut, forged, empty or foreign",
    },
    "Strangers, sites and proxies": {
        "140": "clients without a key list, follow, cancel, overwrite, delete, read and interrupt what others did",
        "141": "a job id that another key, or an earlier request of one's own, has used too",
        "142": "a key without the admin mark lists, reads, deletes and overwrites what another key drew",
        "143": "a picture that holds but a digest is replayed by a key that may not read its record",
        "144": "a prompt is guessed by the name it would have, by `cached`, `coalesced` or a taken name",
        "145": "an idempotency key is repeated after its picture was deleted",
        "146": "the state of the server is asked without a key",
        "147": "pages of another port or subdomain draw, delete and load the UI, as pictures, frames and by fetch",
        "148": "forwarded headers from nobody the settings name, under `serve` and under uvicorn",
        "149": "a hundred wrong keys from one address, or from one IPv6 network",
    },
    "Deaths, journal and shares": {
        "150": "the server is killed from outside again and again, while jobs are drawn",
        "151": "a job that ends the process each time it is drawn, beside others that do not",
        "152": "one row is damaged: a state, a time, an order, an outcome, a key, a message, an entry of the history",
        "153": "a file of DATA_DIR is damaged, cut, empty, a folder, a link to nothing, or of another program",
        "154": "one caller fills the journal with jobs that ended, answered keys, or pictures of waiting jobs",
        "155": "the clock is set back or forward while someone is at its rate",
        "156": "one caller fills the queue for the device, or that of accepted jobs",
        "157": "requests that arrive while the server stops, on new and on kept connections",
        "158": "a journal of an earlier version",
        "159": "any signal, exit status, hang or kill for memory ends the process, with and without a watchdog",
    },
    "Adapter files": {
        "160": "an adapter's file of another family, half-matching, not finite, torn, or that would change the model",
        "161": "adapters whose numbers are finite and whose pictures are not, many in a row",
        "162": "an adapter or a model replaced under its name while the server runs; what was kept of the one before",
        "163": "links that lead out, nowhere or in circles; folders, pipes, devices and pointers named like adapters",
        "164": "an adapter's file written over, cut short, replaced or removed while it is in use",
    },
    "Model files and the hub": {
        "165": "weight files that are pointers of git-lfs, cut short, pickles, quantized, links to nowhere, no shards",
        "166": "parts that lack weights, or were made for another model",
        "167": "weights replaced under their names: over a restart, while they load, written over in place",
        "168": "a hub with gated, missing, changed repositories, without fp16 files, cut off, a full disk",
        "169": "callers who hang up, and failures, while weights travel; placements that do not go together",
    },
    "Marks, logs and addresses": {
        "170": "a picture is stored without a mark that a model made it",
        "171": "paths and headers of 60 KB on their way into the log",
        "172": "metadata services of clouds, sinks, relays and unassigned networks as addresses",
        "173": "fruitless searches of a long history, 120 at once; words that mean something to its index",
    },
    "What is held while it is waited for": {
        "190": "bodies that say they bring much and bring little, half-arrived ones, from many addresses at a time",
        "191": "the clock set back or forward while events of the studio or signs of life are counted",
        "192": "a route of this server that takes nothing, answers nothing or stops midway, asked by a page",
        "193": "a flood of reads, deletions and lists by one caller, before a bucket or a folder that takes its time",
        "194": "garbage in the local bucket under a picture's name, with its record and without",
    },
    "A second hour of attack": {
        "174": "bodies in 200,000 chunks of a byte, heads that do not come, what is no HTTP behind an answer",
        "175": "events of the UI with null in every field, or with values that no component takes",
        "176": "odd names, reasons and folders among the dead letters, for the server and for `spool`",
        "177": "a form of a million bare percent signs",
        "178": "facts of an object at Google that no header and no receipt can hold",
    },
}
ROWS: dict[str, str] = {number: text for rows in GROUPS.values() for number, text in rows.items()}


@cache
def marked() -> dict[str, tuple[str, ...]]:
    """The tests with the mark, as `tests/folder/test_file.py::test_name` → their rows, read from the source."""
    return {name: rows for path in sorted(TESTS.rglob("test_*.py")) for name, rows in _marked_in(path)}


def reported() -> dict[str, dict[str, str]]:
    """The content of the page: row → its tests and their results. Raises `ValueError` for a row with other words."""
    found: dict[str, dict[str, str]] = {}
    row = ""
    for number, text, test, result in _LINE.findall(PAGE.read_text()):
        row = number or row
        if number and ROWS.get(number) != text:
            raise ValueError(f"row {number} is not {text!r}")
        found.setdefault(row, {})[test] = result
    return found


def by_row(tests: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """The tests of every row, in the order of the catalogue."""
    return {row: [name for name, rows in tests.items() if row in rows] for row in ROWS}


def _marked_in(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        marks = (mark for decorator in node.decorator_list for mark in ast.walk(decorator) if _is_mark(mark))
        rows = dict.fromkeys(str(argument.value) for mark in marks for argument in mark.args)
        if rows:
            yield f"{path.relative_to(TESTS.parent).as_posix()}::{node.name}", tuple(rows)


def _is_mark(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fault"
