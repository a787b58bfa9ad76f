#!/usr/bin/env python3
# SPDX-License-Identifier: 0BSD
"""A Management Interface (MI): ask and steer a running Python program.

See which thread hangs, flush a cache, change the log level, over a UNIX datagram socket or UDP. One datagram
asks, one answers, in the line dialect of the SIP servers Kamailio and OpenSIPS or in JSON-RPC 2.0: their clients
work with it unchanged.

    :cache_flush:\\nprefix::a\\n  {"jsonrpc":"2.0","method":"cache_flush","params":{"prefix":"a"},"id":1}
    200 OK\\nFlushed:: 2\\n       {"jsonrpc":"2.0","result":{"Flushed":2},"id":1}

Copy this one file into a project and write:

    import mi_datagram

    mi = mi_datagram.Interface()              # has the core commands

    @mi.command
    def cache_flush(prefix: str = "", limit: int = 100):
        '''Drop the entries that begin with PREFIX, LIMIT at most.'''
        return {"Flushed": cache.flush(prefix, limit)}

    with mi.server("/run/app/mi.sock", unix_socket_mode=0o600):
        app.run()                             # served in the background

or run `python3 -m mi_datagram --help`. Only the standard library is needed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import select
import signal
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
import traceback
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import get_ident
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from typing_extensions import Self, Unpack

__all__ = [
    "Client", "CommandError", "Counter", "Deferred", "Error", "Handler", "Interface", "NoAnswer", "Node",
    "ParameterError", "Peer", "Reply", "Request", "RequestError", "SocketError", "UDPServer", "UnixServer",
    "allow_networks", "allow_users", "format_reply", "format_request", "parse_reply", "parse_request",
]  # fmt: skip
__version__ = "1.1"

log = logging.getLogger("mi_datagram")
audit = logging.getLogger("mi_datagram.audit")

# ---------------------------------------------------------------- limits ----

SOCKET_TIMEOUT = 2000  # ms that a reply may wait for its client (the original's default)
SOCKET_BUF_SIZE = 65457  # bytes of a request or a reply (the original's: 65,535 less headers)
UDP_PAYLOAD = 65507  # bytes that one IPv4 datagram can carry
UNIX_PAYLOAD = 1 << 20  # bytes; beyond this a datagram needs memory in one piece that the kernel rarely has
UNIX_PATH = 107  # bytes of a socket's path: sun_path less its final NUL
SEND_BUFFER = 4 << 20  # bytes asked for: replies that no client has read yet are charged to it
MAX_THREADS = 64  # threads of one server, the one that watches included
SPARE_THREADS = 8  # idle threads kept for the next slow command
TICK = 0.0025  # s; a request that takes longer is slow: another thread receives meanwhile
QUIET_TICKS = 20  # ticks without a request after which the watching stops as well
NESTING = 200  # levels of a JSON document
BATCH = 64  # calls in one JSON-RPC batch
DEFER_TIMEOUT = 60_000  # ms that a deferred reply may take
MAX_OPEN = 1000  # deferred replies of one server that are open: each holds what its command keeps
BACKLOG = 1000  # requests that wait while all threads are held
BACKLOG_BYTES = 8 << 20  # of them together
DRAIN = 1000  # datagrams that are still answered when a server stops: more than a socket's queue holds
LOG_LINES = 10  # lines a second of each kind of event that peers cause
DETAIL = 200  # characters of what a peer sent that the log shows
FRAMES = 8  # innermost frames that `threads` shows of each thread
THREADS_LINES = 500  # that `threads` answers: more might not fit into a reply
WHITE = " \t\n\v\f\r"  # the line dialect's white space; bytes.strip() means the same six

# ---------------------------------------------------------------- errors ----


class Error(Exception):
    """The root of what this module raises."""


class ParameterError(Error, ValueError):
    """A parameter has a value that is not allowed; the text names both and says what is."""


class SocketError(ParameterError, OSError):
    """The socket of this name cannot be made (`errno` has the system's reason), or nobody can be reached by it."""


class RequestError(Error, ValueError):
    """Bytes that are not of the line dialect, or what cannot be written in it; `position` is the first wrong byte."""

    def __init__(self, reason: str, position: int | None = None) -> None:
        super().__init__(reason if position is None else f"{reason} at byte {position}")
        self.reason = reason
        self.position = position


class CommandError(Error):
    """Raise it in a command to answer `code reason`; Client raises it for such an answer."""

    code, reason, data = 500, "command failed", None  # of a subclass that leaves out our __init__

    def __init__(self, code: int, reason: str, data: Any = None) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason
        self.data = data

    def __str__(self) -> str:
        return f"{self.code} {self.reason}" + ("" if self.data is None else f" ({self.data})")


# What the service itself refuses: the statistic that counts it, the reply in
# the line dialect, the code and message in JSON-RPC 2.0 (its section 5.1).
FAULTS = {
    "parse_errors": (400, "parse error in command", -32700, "Parse error"),
    "invalid_requests": (500, "command not available", -32600, "Invalid Request"),
    "unknown_commands": (500, "command not available", -32601, "Method not found"),
    "ambiguous_commands": (500, "command not available", -32001, "Method ambiguous"),
    "bad_arguments": (400, "Too few or too many arguments", -32602, "Invalid params"),
    "bad_parameters": (400, "Bad parameter", -32602, "Invalid params"),
    "failed_commands": (500, "command failed", -32000, "Server error"),
    "too_long_requests": (400, "request too long", -32600, "Invalid Request"),
    "too_long_replies": (500, "Internal server error", -32603, "Internal error"),
    "forbidden": (403, "Forbidden", 403, "Forbidden"),
    "too_many_open": (500, "Too many open requests", -32000, "Too many open requests"),
    "not_requests": (0, "", 0, ""),  # these two are never answered
    "dropped_deferred": (0, "", 0, ""),
}


class _Fault(CommandError):
    """One of FAULTS, by the name of its statistic; `detail` is for the log alone, a silent one gets no reply."""

    def __init__(self, kind: str, data: str | None = None, detail: object = "", silent: bool = False) -> None:
        self.code, self.reason, self.json_code, self.json_message = FAULTS[kind]
        self.data = data
        self.kind = kind
        self.detail = detail
        self.silent = silent or not self.code


def _note(level: int, text: str, *args: object, error: BaseException | None = None, to: logging.Logger = log) -> None:
    """Log, with ERROR for whoever collects exceptions; a log handler that raises stops nothing.

    What came from a peer is printed by %a, and a traceback is indented, so that neither forges a line.
    """
    if not to.isEnabledFor(level):
        return
    try:
        exc_info = None if error is None else (type(error), error, error.__traceback__)
        # Not by to.log(), which looks for its caller: that takes a sixth of the time, and here it says nothing.
        record = to.makeRecord(to.name, level, __file__, 0, text, args, exc_info)
        if error is not None:
            record.exc_text = _traceback(error)
        to.handle(record)
    except Exception:  # there is nobody left to tell
        pass


def _traceback(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:  # it reads files, and there may be no descriptor left
        text = f"{type(error).__name__}: {error}"
    lines = [line[:DETAIL] for line in escape_control_characters(text).split("\n") if line]
    return "    | " + "\n    | ".join(lines)


def escape_control_characters(text: str) -> str:
    """Escape what would drive a terminal."""
    return "".join([c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text])


def _run_here(function: Callable[..., object], *arguments: Any) -> None:
    function(*arguments)


class LogLimit:
    """Bounds the log of what peers cause: LOG_LINES a second of each kind, then one line that says how many more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = -math.inf  # of this second
        self._counts: dict[str, int] = {}  # what came in it, by kind

    def allows(self, kind: str) -> bool:
        """Count one more of a kind; whether it may be written."""
        if self._clock() >= self._end:
            self.tell()
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        return count <= LOG_LINES

    def tell(self, at_once: bool = False, run: Callable[..., object] = _run_here) -> float:
        """Have RUN write how many were left out in the second that is over, or so far; return when there is more."""
        now = self._clock()
        if at_once or now >= self._end:
            self._end = now + 1
            for kind in list(self._counts):
                more = self._counts.pop(kind, 0) - LOG_LINES  # of two threads that tell, one has the count
                if more > 0:
                    run(_note, logging.WARNING, "%s: %d more in this second", kind, more)
        return self._end if any([count > LOG_LINES for count in list(self._counts.values())]) else math.inf


# ---------------------------------------------------------------- values ----


@dataclasses.dataclass
class Node:
    """One node of a reply's tree: a line in the line dialect, with `attributes` behind the value.

    `children` is whatever a command may return. In JSON a node is its value, attributes or children, of several an
    object of these; where it has a name, that is the one member of an object.
    """

    name: str | None = None
    value: Any = None
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    children: Any = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Reply:
    """A reply with its own code, reason and tree (`nodes`: whatever a command may return)."""

    code: int = 200
    reason: str = "OK"
    nodes: Any = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the code is one of success, 200 to 299."""
        return 200 <= self.code < 300


CREDENTIALS = "iII"  # struct ucred
NO_CREDENTIALS = struct.pack(CREDENTIALS, 0, 65534, 65534)  # of a datagram older than our SO_PASSCRED


class Peer:
    """Who sent a request: the address, and on a UNIX socket what the kernel vouches for.

    `pid`, `uid` and `gid` (real ids; root can claim others) are None where the system does not tell.
    """

    def __init__(self, address: Any = None, credentials: bytes | None = None) -> None:
        self.address = address
        ids: tuple[int | None, ...] = (None, None, None)
        if credentials is not None and credentials != NO_CREDENTIALS:
            ids = struct.unpack(CREDENTIALS, credentials)
        self.pid, self.uid, self.gid = ids

    def __str__(self) -> str:
        if isinstance(self.address, tuple):
            return _udp_name(self.address)
        return "unknown" if self.uid is None else f"pid {self.pid} uid {self.uid} gid {self.gid}"


@dataclasses.dataclass
class Request:
    """One call of a command, in the `dialect` "line" or "json"; `peer` is None where it came through no socket.

    `arguments` has (name, value) pairs in order and as sent, with the name "" for a value by position.
    """

    command: str
    arguments: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    peer: Peer | None = None
    dialect: str = "line"
    _call: Call | None = dataclasses.field(default=None, repr=False, compare=False)

    def defer(self, timeout: float = DEFER_TIMEOUT) -> Deferred:
        """Answer later: the command returns what this returns; whoever holds it replies, in `timeout` ms or never."""
        if not 0 <= timeout < math.inf:
            raise ParameterError(f"timeout {timeout!a}: a finite number of ms is allowed")
        call = self._call  # which the command's end takes away, maybe now
        if call is None:
            raise Error("nobody waits for an answer to this request")
        return call.defer(timeout)


def _udp_name(address: Any) -> str:
    host, port = address[:2]
    if len(address) > 3 and address[3] and "%" not in host:
        host = f"{host}%{address[3]}"  # the scope of a link-local address
    return f"udp:[{host}]:{port}" if ":" in host else f"udp:{host}:{port}"


# ------------------------------------------- the grammar of the line dialect ----
#
#   request           = first_line (argument '\n')*
#   first_line        = ':' command_name ':' '\n'
#   argument          = (arg_name '::' (arg_value)?) | (arg_value)
#   arg_name          = not-quoted_string
#   arg_value         = not-quoted_string | '"' string '"'
#   not-quoted_string = string - {',",\n,\r}
#
# As the original reads it: white space around names and values is dropped, blank lines mean nothing, the last
# '\n' may be missing, ' is a character like others, and in a quoted value \" stands for ", other bytes for themselves.


def parse_request(data: bytes) -> Request:
    """Read a request of the line dialect; raise RequestError for any other bytes."""
    name, text = _parse_first_line(data)
    return Request(name, _parse_arguments(name, text))


def _parse_first_line(data: bytes) -> tuple[str, str]:
    """Return the command's name, and the text of the arguments behind it."""
    name, separator, text = data[1:].decode("utf-8", "surrogateescape").partition(":\n")
    if not (separator and name) or ":" in name or "\n" in name or data[:1] != b":":
        raise RequestError("no first line ':name:'", 0)
    return name, text


# An argument as it stands: what is before a quote, the quote and what is in it, the closing quote, what is behind.
_ARGUMENT = re.compile(r'([^"\n]*)(?:("[^"]*(?:(?<=\\)"[^"]*)*)("?)([^\n]*))?(?:\n|\Z)')


def _parse_arguments(command: str, text: str) -> list[tuple[str, str]]:
    """Read the (name, value) pairs behind the first line of COMMAND."""
    arguments = []
    has_quotes = '"' in text
    pieces: list[Any] = _ARGUMENT.findall(text) if has_quotes else text.split("\n")
    before = quoted = closing = behind = ""
    for piece in pieces:
        if has_quotes:
            before, quoted, closing, behind = piece
        else:
            before = piece
        name, mark, value = before.partition("::")
        if not mark:
            name, value = "", before
        name, value = name.strip(WHITE), value.strip(WHITE)
        if not quoted and (name or value):
            arguments.append((name, value))
        elif closing and not value and not behind.strip(WHITE):
            arguments.append((name, quoted[1:].replace('\\"', '"')))
        elif quoted or mark:
            reason, right = "neither name nor value", ""
            if quoted:
                reason, right = "quote inside a value" if value else "quote not closed", before
            if closing and not value:
                reason, right = "text behind a closing quote", before + quoted + closing
            # An equal piece before this one would have failed first, so index() finds this one.
            read = "\n".join([f":{command}:", *map("".join, pieces[: pieces.index(piece)]), right])
            raise RequestError(reason, len(read.encode("utf-8", "surrogateescape")))
    return arguments


def format_request(command: str, /, *values: object, **named: object) -> bytes:
    """Write a request of the line dialect, quoted where needed; raise RequestError for what it cannot carry."""
    return _format_request(command, [("", value) for value in values] + list(named.items()))


def _format_request(command: str, arguments: Iterable[tuple[str, object]]) -> bytes:
    if not command or ":" in command or "\n" in command:
        raise RequestError(f"command {command!a}: the line dialect takes a name without ':' or line break, JSON any")
    lines = [f":{command}:\n"]
    for name, value in arguments:
        if name != name.strip(WHITE) or name.endswith(":") or any([mark in name for mark in ("::", '"', "\n")]):
            raise RequestError(f"name {name!a} cannot be written")
        text = _text(value)
        line = f"{name}::{text}\n" if name or "::" in text else f"{text}\n"
        if not text or text != text.strip(WHITE) or '"' in text or "\n" in text:
            if text.endswith("\\"):
                raise RequestError(f"value {text!a} needs quotes and cannot end with a backslash in them")
            quoted = text.replace('"', '\\"')
            line = f'{name}::"{quoted}"\n' if name else f'"{quoted}"\n'
        lines.append(line)
    request = "".join(lines)
    if not _has_bytes(request):
        raise RequestError(f"{request!a} has surrogates that do not come back")
    return request.encode("utf-8", "surrogateescape")


def _has_bytes(text: str) -> bool:
    """Whether the bytes of TEXT give it back: a surrogate can only stand for a byte that is no UTF-8."""
    with contextlib.suppress(UnicodeEncodeError):
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == text
    return False


_SCALARS = (str, int, float, bool, type(None))  # as most values are
_BYTES = (bytes, bytearray, memoryview)


def _text(value: object) -> str:
    """Write a scalar as the line dialect has it; of a number or text of a derived class what JSON would show."""
    if value is None:
        return ""
    if value.__class__ is bool:
        return "true" if value else "false"
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, _BYTES):
        return bytes(value).decode("utf-8", "surrogateescape")
    if inspect.iscoroutine(value):  # of an `async def` that a decorator hides
        value.close()
        raise Error(f"{value.__qualname__} was not awaited: its decorator is to be `async def` too")
    return str(value)


# What _container found, by class. No lru_cache: on PyPy it has a lock, which a RecursionError can leave locked.
_containers: dict[type, Callable[[Any], Any] | None] = {}


def _container(kind: type) -> Callable[[Any], Any] | None:
    """Return what makes a dict or a list of an object of class KIND; None where it is a scalar or a Node."""
    if kind in _containers:
        return _containers[kind]
    make: Callable[[Any], Any] | None = None
    if not issubclass(kind, (str, *_BYTES, Node)):
        if issubclass(kind, Mapping):
            make = dict
        elif dataclasses.is_dataclass(kind):
            make = _fields
        elif issubclass(kind, Iterable):
            make = list
    if len(_containers) < 64:  # a program may make classes without an end
        _containers[kind] = make
    return make


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def format_reply(reply: Any = None, indent: str = "\t") -> bytes:
    """Write what a command returned as a reply of the line dialect.

    None is `200 OK` alone, a mapping or a dataclass named nodes, any other iterable unnamed ones, and everything
    else one value; a Reply brings its own code and reason. INDENT is one level of the tree.
    """
    lines = ["200 OK\n"]
    if isinstance(reply, Reply):
        lines = [f"{reply.code} {reply.reason}\n"]
        reply = reply.nodes
    _format_nodes(reply, "", indent, lines)
    text = "".join(lines)
    if "\r" in text or text.count("\n") != len(lines):  # nothing that a command says can forge a line
        text = "".join([line[:-1].replace("\n", "\\n").replace("\r", "\\r") + "\n" for line in lines])
    return text.encode("utf-8", "surrogateescape")


def _format_nodes(data: Any, depth: str, indent: str, lines: list[str]) -> None:
    """Append the lines of DATA, each with its line break."""
    if data is None:
        return
    if data.__class__ is not dict:
        convert = _container(data.__class__)
        data = convert(data) if convert else [data]
    pairs = data.items() if isinstance(data, dict) else [("", value) for value in data]
    for name, value in pairs:
        if value.__class__ is str and name.__class__ is str and name:
            lines.append(f"{depth}{name}:: {value}\n")
            continue
        name, attributes, below = _text(name), "", []
        if isinstance(value, Node):
            if name and value.name is not None:  # a node with a name of its own stands below
                value = Node(children=[value])
            name = name or value.name or ""
            attributes = "".join([f" {key}={_text(one)}" for key, one in value.attributes.items()])
            value, below = value.value, [value.children]
        if value.__class__ not in _SCALARS and _container(value.__class__):
            value, below = None, [value, *below]
        label = f"{name}:: " if name else ""
        lines.append(f"{depth}{label}{_text(value)}{attributes}\n")
        for nodes in below:
            _format_nodes(nodes, depth + indent, indent, lines)


def parse_reply(data: bytes) -> Reply:
    """Read a reply of the line dialect: code, reason, and a tree of Node with children.

    Any indent is read, and a closing blank line (OpenSIPS sends one) is dropped; attributes stay part of the value, as
    nothing in the text tells them apart. Raises RequestError for no reply.
    """
    text = data.decode("utf-8", "surrogateescape")
    first, *lines = text.removesuffix("\n").removesuffix("\n").split("\n")  # the second is a closing blank line's
    code, _, reason = first.partition(" ")
    if not (len(code) == 3 and code.isascii() and code.isdigit()):
        raise RequestError("no first line 'CODE REASON'", 0)
    levels: list[tuple[int, list[Node]]] = [(0, [])]  # the indent of each open level, and its nodes
    for line in lines:
        text = line.lstrip(WHITE)
        width = len(line) - len(text)
        while width < levels[-1][0]:
            levels.pop()
        if width > levels[-1][0] and levels[-1][1]:
            levels.append((width, levels[-1][1][-1].children))
            if len(levels) > NESTING:
                raise RequestError(f"nested deeper than {NESTING}")
        name, separator, value = text.partition(":: ")
        levels[-1][1].append(Node(name, value) if separator else Node(None, text))
    return Reply(int(code), reason, levels[0][1])


# ------------------------------------------------- the JSON-RPC 2.0 dialect ----

BOM = b"\xef\xbb\xbf"  # some write it before UTF-8


def _is_json(data: bytes) -> bool:
    """Whether a datagram is of this dialect, by its first byte that is not white space."""
    return data[:1] in (b"{", b"[") or data.removeprefix(BOM).lstrip()[:1] in (b"{", b"[")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # 1e400, or NaN and Infinity, which are Python's own
        raise ValueError(f"{text} is no JSON")
    return number


_decode_json = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).decode


def _parse_json(data: bytes) -> Any:
    """Decode a document; raise ValueError or RecursionError for what is none, or nested too deep."""
    depth = 0
    if data.count(b"[") + data.count(b"{") > NESTING:  # json's own C code may need more stack than a thread has
        outside_strings = b"".join(re.sub(rb"\\.", b"", data, flags=re.DOTALL).split(b'"')[::2])
        for bracket in re.findall(rb"[][{}]", outside_strings):
            depth += 1 if bracket in b"[{" else -1
            if depth > NESTING:
                raise ValueError(f"nested deeper than {NESTING}")
    return _decode_json(data.removeprefix(BOM).decode())


@functools.lru_cache(maxsize=8)
def _json_encoder(indent: str | None) -> Callable[[Any], str]:
    """Return the encoder for compact replies (None) or for indented ones; JSON is indented by white space alone."""
    indent = "\t" if indent and indent.strip(" \t") else indent
    separators = (",", ":") if indent is None else (",", ": ")
    encode = json.JSONEncoder(allow_nan=False, default=_plain, indent=indent, separators=separators).encode

    def write(value: Any) -> str:
        try:
            return encode(value)
        except TypeError:
            return encode(_spell_out(value))

    return write


def _plain(value: Any) -> Any:
    """Convert what json does not know by itself, as the line dialect does; refuse what can be read only once."""
    if isinstance(value, Iterator):
        raise TypeError("an iterator")
    if isinstance(value, Node):
        parts = {"value": value.value, "attributes": dict(value.attributes), "children": value.children}
        parts = {key: part for key, part in parts.items() if part or (key == "value" and part is not None)}
        content = parts if len(parts) > 1 else next(iter(parts.values()), None)
        return content if value.name is None else {value.name: content}
    convert = _container(value.__class__)
    return convert(value) if convert else _text(value)


def _spell_out(value: Any) -> Any:
    """Convert all that json does not know: iterators, and the names of a mapping, too."""
    if not isinstance(value, (dict, list, tuple, *_SCALARS)):
        return _spell_out(list(value) if isinstance(value, Iterator) else _plain(value))
    if isinstance(value, dict):
        return {name if isinstance(name, _SCALARS) else _text(name): _spell_out(one) for name, one in value.items()}
    return [_spell_out(one) for one in value] if isinstance(value, (list, tuple)) else value


def _is_answer(document: Any) -> bool:
    """Whether a document is, or has, somebody's answer; answering those would set two servers against each other."""
    if isinstance(document, list):
        return any(map(_is_answer, document))
    return isinstance(document, dict) and "method" not in document and ("result" in document or "error" in document)


def _json_member(outcome: Any) -> tuple[str, Any]:
    """Return the member that answers: ("result", …) or ("error", …)."""
    if isinstance(outcome, Reply):
        data = None if outcome.nodes.__class__ is list and not outcome.nodes else outcome.nodes
        outcome = data if outcome.ok else CommandError(outcome.code, outcome.reason, data)
    if not isinstance(outcome, CommandError):
        return "result", "OK" if outcome is None else outcome  # a client takes a falsy result for a failure
    error = {"code": outcome.code, "message": outcome.reason}
    if isinstance(outcome, _Fault):
        error = {"code": outcome.json_code, "message": outcome.json_message}
    return "error", error if outcome.data is None else {**error, "data": outcome.data}


# ----------------------------------------------------------------- commands ----

TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _convert(kind: Any, optional: bool, value: Any) -> Any:
    """Convert a text, or JSON data of clients that know no types; raise LookupError, ValueError or OverflowError."""
    if value.__class__ is kind:
        return value
    if optional and (value is None or value == ""):
        return None
    if value.__class__ is str:
        if kind is bool:
            return TRUTH[value.lower()]
        if "_" in value:  # Python's own notation
            raise ValueError(value)
    elif value.__class__ not in (int, float) or (kind is bool and value not in (0, 1)) or (kind is int and value % 1):
        raise ValueError(value)
    converted: Any = kind(value)
    if kind is float and not math.isfinite(converted):
        raise ValueError(value)
    return converted


_CONVERTED: dict[Any, tuple[type, bool]] = {  # by annotation: what a value becomes, and whether it is Optional
    annotation: (kind, annotation is not kind)
    for kind in (int, float, bool, str)
    for annotation in (kind, typing.Optional[kind])
}


_signature: Callable[[Any], inspect.Signature] = inspect.signature
if sys.version_info >= (3, 14):  # there an annotation that only type checkers can read is an error when it is looked at
    import annotationlib

    _signature = functools.partial(inspect.signature, annotation_format=annotationlib.Format.FORWARDREF)


def _innermost(function: Any) -> Any:
    """Return the function that decorators and partials stand for."""
    inner = function.func if isinstance(function, functools.partial) else getattr(function, "__wrapped__", None)
    return function if inner is None else _innermost(inner)


def _read_annotations(function: Any, parameters: list[inspect.Parameter]) -> dict[str, tuple[type, bool]]:
    """Return what is in _CONVERTED for those of the PARAMETERS that are annotated so."""
    plain = _innermost(function)
    scope = getattr(plain, "__globals__", None) or getattr(type(plain).__call__, "__globals__", {})
    known = {}
    for parameter in parameters:
        with contextlib.suppress(Exception):  # any other annotation, or one that only type checkers can read
            annotation = parameter.annotation
            if isinstance(annotation, str):  # where | has no meaning on Python 3.9
                options = annotation.strip("'\"").replace("|", ",")
                annotation = f"Union[{options}]"
            holder = type("_", (), {"__annotations__": {"it": annotation}})  # it reads what is in Optional["int"] too
            known[parameter.name] = _CONVERTED[typing.get_type_hints(holder, scope, {"Union": typing.Union})["it"]]
    return known


class Command:
    """One registered command, and how arguments bind to its function."""

    def __init__(self, name: str, function: Any, pass_request: bool, read_only: bool, core: bool = False) -> None:
        if not (isinstance(name, str) and re.fullmatch(r"([^:\n]+:)?[^:\n]+", name) and _has_bytes(name)):
            raise ParameterError(f"command name {name!a}: NAME or GROUP:NAME is allowed, without line breaks")
        self.name = name
        is_async = inspect.iscoroutinefunction(function)
        self.function = run_on_loop(function, pass_request) if is_async else function
        self.pass_request = pass_request or is_async
        self.read_only = read_only
        self.core = core
        has_none = isinstance(function, functools.partial) and "__doc__" not in vars(function)
        self.doc = inspect.getdoc(function.func if has_none else function) or ""
        self.slow = False  # whether its last run took longer than a TICK
        self._signature = _signature(function)
        parameters = [*self._signature.parameters.values()]
        self._by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._first = int(pass_request)  # how many of the values by position are ours
        self.parameters = parameters[self._first :]
        self._kinds = _read_annotations(function, self.parameters)
        self._plan = functools.lru_cache(maxsize=16)(self._plan_call)  # of the last shapes: no peer fills the memory
        # Calls that need no bind(): their number of values, or with names a tuple of it and these.
        self.ready: dict[str, set[Any]] = {"line": set(), "json": set()}

    def bind(self, values: list[Any], named: dict[str, Any], dialect: str) -> None:
        """Check VALUES and NAMED against the signature and convert them in place, or raise a _Fault."""
        for place, parameter, kind, optional in self._plan(len(values), (*named,), dialect):
            holder: Any = values if place.__class__ is int else named
            try:
                holder[place] = _convert(kind, optional, holder[place])
            except (LookupError, ValueError, OverflowError):
                raise _Fault("bad_parameters", f"Bad type for parameter '{parameter}'") from None

    def _plan_call(self, count: int, names: tuple[str, ...], dialect: str) -> list[tuple[Any, str, type, bool]]:
        """List (index or name, parameter, type, whether Optional) of what such calls convert, or raise a _Fault."""
        # Each place is bound to itself, and one for **names is marked: up to Python 3.12 bind() takes its name for that
        # of a parameter by position alone.
        named = {name if name in self._by_name else f"*{name}": name for name in names}
        try:
            bound = self._signature.bind(*range(-self._first, count), **named).arguments
        except TypeError:
            reason = "Named parameters do not match" if names else "Too few or too many parameters"
            raise _Fault("bad_arguments", reason) from None
        plan: list[tuple[Any, str, type, bool]] = []
        for parameter, (kind, optional) in self._kinds.items():
            if parameter in bound and (kind is not str or dialect == "json"):  # the line dialect has texts alone
                place = bound[parameter]
                places = place.values() if isinstance(place, dict) else place if isinstance(place, tuple) else [place]
                plan += [(place, parameter, kind, optional) for place in places]
        if not (plan or self.pass_request) and len(self.ready[dialect]) < 16:
            self.ready[dialect].add((count, *names) if names else count)
        return plan

    def split_arguments(self, arguments: list[tuple[str, str]]) -> tuple[list[Any], dict[str, Any]]:
        """Split the arguments of the line dialect into values by position and by name."""
        values: list[Any] = []
        named: dict[str, Any] = {}
        for name, value in arguments:
            if not name:
                values.append(value)
            elif name in named and name in self._by_name:
                raise _Fault("bad_arguments", "Named parameters do not match")
            else:
                named[name] = value
        return values, named

    def overloads(self) -> list[list[str]]:
        """List the lists of parameters that a call by name may have, shortest first."""
        named = [p for p in self.parameters if p.name in self._by_name]
        optional = [p.name for p in named if p.default is not p.empty]
        return [[p.name for p in named if p.name not in optional[more:]] for more in range(len(optional) + 1)]

    def usage(self) -> str:
        """Write the call as a line to type: required parameters bare, others in brackets, types where there are."""
        words = [self.name]
        for p in self.parameters:
            word = p.name.upper() if p.kind is not p.VAR_KEYWORD else "NAME::VALUE"
            word = f"{p.name}::{word}" if p.kind is p.KEYWORD_ONLY else word
            kind, _ = self._kinds.get(p.name, (str, False))
            word += "" if kind is str else f":{kind.__name__}"
            dots = "..." if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) else ""
            words.append(f"[{word}]{dots}" if dots or p.default is not p.empty else word)
        return " ".join(words)


class Counter:
    """A statistic that counts, right from any thread and forked process; a signal handler may count, too."""

    def __init__(self) -> None:
        self.renew_lock()
        _counters.add(self)
        self._others = 0  # all that add() counted, less what was there at the last reset, less our looks at _ones
        # Each request counts two: a step of this iterator is one step of the interpreter, which needs no lock.
        self._ones = itertools.count()
        has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        self.add_one: Callable[[], object] = self._ones.__next__ if has_gil else self.add

    def renew_lock(self) -> None:
        # A signal handler may count while its thread does; up to Python 3.9 one of the two may be lost.
        self._lock = threading.RLock()

    def add(self, amount: int = 1) -> None:
        """Count AMOUNT more."""
        with self._lock:
            self._others += amount

    def reset(self) -> None:
        """Count from zero again."""
        self.add(-self())

    def __call__(self) -> int:
        with self._lock:
            self._others -= 1
            return next(self._ones) + self._others + 1


_counters: weakref.WeakSet[Counter] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # a lock that another thread holds then is released by nobody in the child
    os.register_at_fork(after_in_child=lambda counters=_counters: [counter.renew_lock() for counter in counters])


# -------------------------------------------------------------------- calls ----


class Deferred:
    """A reply that comes later, once, from any thread; made by Request.defer."""

    deadline = math.inf  # by time.monotonic()
    task: Any = None  # of an `async def` command: its loop holds it by a weak reference alone

    def __init__(self, call: Call) -> None:
        self._call = call
        self._once = threading.Lock()  # whoever gets it answers

    def reply(self, result: Any = None) -> bool:
        """Answer with RESULT, as if the command had returned it; return False if it is too late."""
        is_first = self.claim()
        if is_first:
            self._call.finish(result)
        return is_first

    def fail(self, code: int, reason: str) -> bool:
        """Answer `code reason`; return False if it is too late."""
        return self.reply(CommandError(code, reason))

    def drop(self) -> bool:
        """Give up the reply; return False if there was one already."""
        return self.reply_or_log(_Fault("dropped_deferred", detail="never answered"))

    def reply_or_log(self, result: Any) -> bool:
        """Answer where nobody is there to learn that it cannot be sent."""
        try:
            return self.reply(result)
        except Exception as error:  # of whoever sends
            _note(logging.ERROR, "a late reply was not sent", error=error)
            return True

    def claim(self) -> bool:
        """Take the right to answer, which is given once."""
        return self._once.acquire(blocking=False)


class OpenReplies:
    """The Deferreds without a reply: MAX_OPEN at most, each dropped at its deadline; `on_change` hears of new ones."""

    def __init__(self, on_change: Callable[[], object] = lambda: None) -> None:
        self._on_change = on_change
        self.lock = threading.Lock()  # also of the batches with such a reply
        self._open: set[Deferred] = set()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, deferred: Deferred) -> None:
        """Add a Deferred, or see to its new deadline; raise a _Fault if there are too many."""
        if len(self._open) >= MAX_OPEN:
            self.drop_late(time.monotonic())
        with self.lock:
            if len(self._open) >= MAX_OPEN and deferred not in self._open:
                raise _Fault("too_many_open")
            self._open.add(deferred)
        self._on_change()

    def discard(self, deferred: Deferred) -> None:
        with self.lock:
            self._open.discard(deferred)

    def drop_late(self, now: float, run: Callable[..., object] = _run_here) -> float:
        """Have RUN drop what is late at the time NOW; return the next deadline."""
        with self.lock:
            late = [deferred for deferred in self._open if deferred.deadline <= now]
            self._open.difference_update(late)
            deadline = min([deferred.deadline for deferred in self._open], default=math.inf)
        if late:
            run(self._drop, late)
        return deadline

    def _drop(self, late: list[Deferred]) -> None:
        for deferred in late:
            deferred.drop()


class Step:
    """A part of the answering that may wait, as `authorize` or the log; `slow` says that it did last time."""

    slow = False


@dataclasses.dataclass
class Service:
    """An Interface as one server offers it: its commands under that server's limits, looks and access."""

    interface: Interface
    limit: int = SOCKET_BUF_SIZE  # bytes of a request and of a reply
    indent: str = "\t"
    json_indent: str | None = None
    authorize: Authorize | None = None
    silent: bool = False  # whether a refused peer gets no reply at all
    loop: Any = None  # where `async def` commands run, if not on the Interface's
    is_forked: bool = False  # whether this process is a fork of the server's, and so has nothing to answer
    open_replies: OpenReplies = dataclasses.field(default_factory=OpenReplies)
    access: Step = dataclasses.field(default_factory=Step)
    logging: Step = dataclasses.field(default_factory=Step)

    def __post_init__(self) -> None:
        call = getattr(type(self.authorize), "__call__", None)  # noqa: B004 - of an object that is no function
        if any(map(inspect.iscoroutinefunction, (self.authorize, call))):  # it returns what is true for everybody
            raise _wrong("authorize", self.authorize, "a function that is not `async def` is allowed")

    def event_loop(self) -> Any:
        """Return the loop where `async def` commands run; None where there is none."""
        return self.loop or self.interface.loop

    def is_on_loop(self) -> bool:
        """Whether this is the thread of that loop."""
        asyncio: Any = sys.modules.get("asyncio")
        with contextlib.suppress(RuntimeError, AttributeError):  # no loop runs here, or nobody has imported it
            return asyncio.get_running_loop() is self.event_loop()
        return False


PENDING: Any = object()  # in place of an answer that comes later


class Call:
    """One call of one command. It owns its one outcome, which comes now or, after Request.defer(), later.

    A class for each dialect reads the call (`answer`) and writes the outcome (`format`): what the command returned,
    or its CommandError; None where nothing is to be sent.
    """

    exchange: Exchange
    dialect = "line"
    name = ""  # of the command, as it is registered
    deferred: Deferred | None = None  # made by defer(), and with it all that a late reply needs
    format: Callable[[Any], Any]

    def run(self, command: Command, values: list[Any], named: dict[str, Any], sent: Any = None) -> Any:
        """Bind the arguments and run the command; return what it returns, or PENDING; raise CommandError alone.

        SENT are the arguments as a Request has them, where the caller has them at hand.
        """
        exchange = self.exchange
        request = None
        count = len(values)
        if ((count, *named) if named else count) not in command.ready[self.dialect]:
            if command.pass_request:
                sent = sent or [*[("", value) for value in values], *named.items()]
                request = Request(command.name, sent, exchange.peer, self.dialect, self)
            command.bind(values, named, self.dialect)
            if request is not None:
                values.insert(0, request)
        if not command.read_only and audit.isEnabledFor(logging.INFO):
            exchange.log(logging.INFO, "%a by %s", command.name, exchange.peer, to=audit)
        exchange.step = command
        try:
            if command.slow:
                outcome = exchange.run_slow(command, command.function, *values, **named)
            else:
                outcome = command.function(*values, **named)
        except BaseException as error:
            return self._decide(self.convert_error(error), request)
        is_answer = request is None and outcome.__class__ is not Deferred
        return outcome if is_answer else self._decide(outcome, request)

    def convert_error(self, error: BaseException) -> CommandError:
        """Return the error that the peer may see of an exception; a forked process of the command's ends with it."""
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise error  # the user's Ctrl-C, not the command's
        is_forked = self.exchange.service.is_forked
        if is_forked and isinstance(error, SystemExit):
            os._exit(error.code if isinstance(error.code, int) else bool(error.code))
        failure = self.exchange.failure("command", self.name, error)
        if is_forked:
            os._exit(1)
        return failure

    def defer(self, timeout: float) -> Deferred:
        """Return the Deferred of this call; TIMEOUT is in ms, and the last one counts."""
        if self.deferred is None:
            self.deferred = Deferred(self)
            self.exchange.keep_open()  # first, as what is added may be dropped at once
        self.deferred.deadline = time.monotonic() + timeout / 1000
        self.exchange.service.open_replies.add(self.deferred)
        return self.deferred

    def _decide(self, outcome: Any, request: Request | None) -> Any:
        """Return OUTCOME if that is the answer, or PENDING where the Deferred answers, or did."""
        if request is not None:
            request._call = None  # from now on nothing can be deferred
        deferred = self.deferred
        if deferred is not None and outcome is deferred:
            return PENDING
        if isinstance(outcome, Deferred):
            outcome = self.convert_error(Error("it returned the Deferred of another request"))
        if deferred is not None:
            self.exchange.service.open_replies.discard(deferred)
            if not deferred.claim():
                if isinstance(outcome, CommandError):
                    self.exchange.record_error(outcome, self.name)
                return PENDING
        if isinstance(outcome, CommandError):
            raise outcome from None
        return outcome

    def finish(self, outcome: Any) -> None:
        """Answer late; for the Deferred."""
        exchange = self.exchange
        if not exchange.service.is_forked:
            try:
                if isinstance(outcome, CommandError):
                    exchange.record_error(outcome, self.name)
                reply = exchange.gather(self, self.format(outcome))
                if reply is not PENDING:
                    exchange.send(reply)
            finally:  # so that stopping waits for what is being sent
                exchange.service.open_replies.discard(self.deferred)  # type: ignore[arg-type]


def run_on_loop(function: Callable[..., Any], pass_request: bool) -> Callable[..., Deferred]:
    """Make a command of an `async def` function: it runs on the loop of the server, or else of the Interface."""

    async def run(call: Call, deferred: Deferred, request: Request, values: Any, named: Any) -> None:
        import asyncio

        try:
            outcome = await function(*([request] if pass_request else []), *values, **named)
            if isinstance(outcome, Deferred) and outcome is not deferred:
                raise Error("it returned the Deferred of another request")
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # SystemExit included: it would end the program's loop
            outcome = call.convert_error(error)
        finally:
            request._call = None  # from now on nothing can be deferred
        if call.exchange.service.is_forked:
            os._exit(0)
        if outcome is not deferred:  # which answers in its own time
            deferred.reply_or_log(outcome)

    def start(request: Request, /, *values: Any, **named: Any) -> Deferred:
        call: Any = request._call
        loop = call.exchange.service.event_loop()
        if loop is None or not loop.is_running():
            raise Error("no event loop runs: serve it by `async with`, or give Interface(loop=...)")
        deferred: Deferred = call.defer(math.inf)  # until the coroutine or the server ends
        own = dataclasses.replace(request)  # which can be deferred until the coroutine ends, not only until we return

        def start_task() -> None:  # makes the coroutine on the loop: one that never gets there leaves no warning
            deferred.task = task = loop.create_task(run(call, deferred, own, values, named))
            # One that is cancelled before it begins does not get into run().
            task.add_done_callback(lambda task: (task.cancelled() or task.exception()) and deferred.drop())

        loop.call_soon_threadsafe(start_task)
        return deferred

    return start


class LineCall(Call):
    """A call in the line dialect."""

    def answer(self, data: bytes) -> bytes | None:
        """Return the reply to a datagram; None where there is none, or not yet."""
        exchange = self.exchange
        service = exchange.service
        try:
            first_line, separator, rest = data.partition(b"\n")
            command = service.interface.first_lines.get(first_line.decode("latin-1"))
            if command is None or not separator or len(data) > service.limit:
                command = self._find(data)
            elif service.authorize is not None:
                exchange.authorize(command.name)
            self.name = command.name
            text = rest.decode("utf-8", "surrogateescape")
            if "::" in text or '"' in text:
                sent = _parse_arguments(command.name, text)
                outcome = self.run(command, *command.split_arguments(sent), sent)
            else:  # by position alone and not quoted, as most are: read in half the time
                values = [value for line in text.split("\n") if (value := line.strip(WHITE))]
                outcome = self.run(command, values, {})
        except (CommandError, RequestError) as error:
            outcome = exchange.record_error(error, self.name)
        return None if outcome is PENDING else self.format(outcome)

    def _find(self, data: bytes) -> Command:
        """Return the command that a datagram calls; raise what is wrong with one that calls none."""
        exchange = self.exchange
        if len(data) > exchange.service.limit:
            exchange.refuse("too_long_requests", f"more than {exchange.service.limit} bytes")
        try:
            self.name, _ = _parse_first_line(data)
        except RequestError as error:
            exchange.refuse("invalid_requests", error)
        return exchange.find(self.name, "line")

    def format(self, outcome: Any) -> bytes | None:
        exchange = self.exchange
        if isinstance(outcome, CommandError):
            if isinstance(outcome, _Fault) and outcome.silent:
                return None
            outcome = Reply(outcome.code, outcome.reason, None)
        try:
            reply = format_reply(outcome, exchange.service.indent)
        except Exception as error:  # a value whose str() raises, a tree without an end, a reason that has no bytes
            return self.format(exchange.record_error(exchange.failure("reply of", self.name, error), self.name))
        return reply if len(reply) <= exchange.service.limit else self.format(exchange.too_long(reply, self.name))


class JsonCall(Call):
    """A call in the JSON-RPC 2.0 dialect; CALL is what was decoded, whether or not it is a Request object."""

    dialect = "json"

    def __init__(self, exchange: Exchange, call: Any = None) -> None:
        self.exchange = exchange
        members = call if isinstance(call, dict) else {}
        given = members.get("id")
        self.id = given if isinstance(given, (str, int, float)) and given.__class__ is not bool else None
        self.is_call = (  # a Request object of the specification's section 4
            members.get("jsonrpc") == "2.0"
            and isinstance(members.get("method"), str)
            and isinstance(members.get("params", ()), (list, dict, tuple))
            and self.id == given
        )
        self.is_notification = self.is_call and "id" not in members

    def answer(self, call: Any) -> Any:
        """Return the answer, None where there is none, PENDING where it comes later."""
        exchange = self.exchange
        try:
            if not self.is_call:
                exchange.refuse("invalid_requests", "no Request object")
            self.name = call["method"]
            command = exchange.find(self.name, "json")
            self.name = command.name
            params = call.get("params", ())
            values, named = ([], dict(params)) if isinstance(params, dict) else ([*params], {})
            outcome = self.run(command, values, named)
        except CommandError as error:
            outcome = exchange.record_error(error, self.name)
        return PENDING if outcome is PENDING else self.format(outcome)

    def format(self, outcome: Any) -> bytes | None:
        exchange, limit = self.exchange, self.exchange.service.limit
        if self.is_notification or (isinstance(outcome, _Fault) and outcome.silent):
            return None
        member, value = _json_member(outcome)
        try:
            reply = self._write(member, value, self.id)
        except Exception as error:  # what JSON cannot say
            return self.format(exchange.record_error(exchange.failure("reply of", self.name, error), self.name))
        if len(reply) > limit:
            member, value = _json_member(exchange.too_long(reply, self.name))
            reply = self._write(member, value, self.id)
            if len(reply) > limit:
                reply = self._write(member, value, None)
        return reply

    def _write(self, member: str, value: Any, call_id: Any) -> bytes:
        indent = self.exchange.service.json_indent
        encode = _json_encoder(indent)
        if indent is None:
            written = call_id if call_id.__class__ is int else encode(call_id)
            return f'{{"jsonrpc":"2.0","{member}":{encode(value)},"id":{written}}}'.encode()
        return encode({"jsonrpc": "2.0", member: value, "id": call_id}).encode()


class Exchange:
    """One datagram: its calls, and its one reply.

    For derived classes (a server's Handler is one): `peer` tells who sent it, `send` delivers a late reply, or
    learns that there is none (None), `yield_lead` is called before what is known to wait, `keep_open` when a
    reply comes later.
    """

    service: Service
    step: Any = None  # what runs now and may wait: a Step or a Command
    batch: dict[JsonCall, Any] | None = None  # the answer to each call of a JSON array, PENDING until it is there

    def __init__(self, service: Service, peer: Peer | None, send: Callable[[bytes], object] | None) -> None:
        self.service = service
        self._peer = peer
        self._send = send

    @property
    def peer(self) -> Peer | None:
        return self._peer

    def send(self, reply: bytes | None) -> None:
        if reply is not None and self._send is not None:
            self._send(reply)

    def yield_lead(self) -> None:
        pass

    def keep_open(self) -> None:
        pass

    def answer(self, data: bytes) -> bytes | None:
        """Return the reply to the datagram; None where there is none, or not yet."""
        self.service.interface.count_request()
        first = data[:1]
        if first != b":":
            if not first or first.isdigit():  # an answer; answering it could set two servers against each other
                self.record_error(_Fault("not_requests", detail="empty, or an answer"), "")
                return None
            if _is_json(data):
                return self._answer_json(data)
        call = LineCall()  # no __init__, as every request makes one
        call.exchange = self
        return call.answer(data)

    def _answer_json(self, data: bytes) -> bytes | None:
        try:
            document = self._parse_json(data)
        except CommandError as error:
            return JsonCall(self).format(self.record_error(error, ""))
        reply: Any = PENDING
        if document.__class__ is list:
            calls = [JsonCall(self, call) for call in document]
            self.batch = dict.fromkeys(calls, PENDING)
            for call, sent in zip(calls, document):
                reply = self.gather(call, call.answer(sent))
        else:
            reply = JsonCall(self, document).answer(document)
        if reply is PENDING:
            return None
        if reply is None:  # a command may have deferred it all the same
            self.send(None)
        return reply  # type: ignore[no-any-return]

    def _parse_json(self, data: bytes) -> Any:
        """Return the call, or the list of 1 to BATCH calls."""
        limit = self.service.limit
        if len(data) > limit:
            if b'"method"' not in data:  # as far as one can see, somebody's long answer
                raise _Fault("not_requests", detail="an answer")
            self.refuse("too_long_requests", f"more than {limit} bytes")
        try:
            document = _parse_json(data)
        except (ValueError, RecursionError) as error:
            self.refuse("parse_errors", error)
        if _is_answer(document):
            raise _Fault("not_requests", detail="an answer")
        if document.__class__ is list and not 1 <= len(document) <= BATCH:
            self.refuse("invalid_requests", f"{len(document)} calls, 1 to {BATCH} allowed")
        return document

    def gather(self, call: Any, answer: Any) -> Any:
        """Take the answer of a call; return the reply, which is PENDING until the answers of all calls are there."""
        if self.batch is None or answer is PENDING:
            return answer
        with self.service.open_replies.lock:
            self.batch[call] = answer
            if PENDING in self.batch.values():
                return PENDING
        answers = [answer for answer in self.batch.values() if answer is not None]
        reply = b"[%s]" % b",".join(answers)
        if len(reply) > self.service.limit:
            return JsonCall(self).format(self.too_long(reply, ""))
        return reply if answers else None

    def replace_too_large(self, reply: bytes) -> bytes | None:
        """Return what to send in place of a reply that is too large for the system; None if that is no help."""
        call: Call = JsonCall(self, json.loads(reply)) if _is_json(reply) else LineCall()
        call.exchange = self
        shorter: bytes | None = call.format(self.too_long(reply, ""))
        return shorter if shorter is not None and len(shorter) < len(reply) else None

    def run_slow(self, step: Any, function: Callable[..., Any], /, *values: Any, **named: Any) -> Any:
        """Run what was slow last time, while another thread receives."""
        self.yield_lead()
        started = time.monotonic()
        try:
            return function(*values, **named)
        finally:
            step.slow = time.monotonic() - started > TICK

    def find(self, name: str, dialect: str) -> Command:
        """Return the command that NAME means; a peer that may not run it does not learn if there is one."""
        try:
            command = self.service.interface.find(name, dialect)
        except _Fault:
            self.authorize(name)
            raise
        self.authorize(command.name)
        return command

    def authorize(self, name: str) -> None:
        """Raise the fault "forbidden" unless this peer may run the command NAME, which need not exist."""
        authorize = self.service.authorize
        if authorize is None:
            return
        peer = self.peer or Peer()
        step = self.step = self.service.access
        try:
            if self.run_slow(step, authorize, peer, name) if step.slow else authorize(peer, name):
                return
        except Exception as error:
            self.failure("authorize of", name, error)
        raise _Fault("forbidden", detail=name, silent=self.service.silent)

    def refuse(self, kind: str, detail: object) -> typing.NoReturn:
        """Refuse a datagram that yields no command; a peer that may not ask learns only that."""
        self.authorize("")
        raise _Fault(kind, detail=detail)

    def failure(self, what: str, name: str, error: BaseException) -> CommandError:
        """Return the error that the peer may see: a CommandError; of any other only that it failed, and log it."""
        if isinstance(error, CommandError):
            return error
        if self.service.interface.log_limit.allows("failures"):
            self.log(logging.ERROR, "%s %a failed", what, name[:DETAIL], error=error)
        return _Fault("failed_commands", detail=type(error).__name__)

    def record_error(self, error: CommandError | RequestError, name: str) -> CommandError:
        """Count and log what went wrong in the command NAME; return it as the error that the peer may see."""
        if isinstance(error, RequestError):
            error = _Fault("parse_errors", detail=error)
        kind = error.kind if isinstance(error, _Fault) else "command_errors"
        self.service.interface.count(kind)
        level = logging.INFO if kind in ("command_errors", "not_requests") else logging.WARNING
        if log.isEnabledFor(level) and self.service.interface.log_limit.allows(kind):
            try:
                detail = str(error.detail) if isinstance(error, _Fault) and error.detail else str(error)
            except Exception:  # a reason that has no text
                detail = type(error).__name__
            self.log(level, "%a from %s: %s: %a", name[:DETAIL], self.peer, kind, detail[:DETAIL])
        return error

    def too_long(self, reply: bytes, name: str) -> CommandError:
        """Record that a reply is too long; return the error to send instead."""
        fault = _Fault("too_long_replies", detail=f"{len(reply)} bytes, {self.service.limit} allowed")
        return self.record_error(fault, name)

    def log(self, level: int, *arguments: Any, to: logging.Logger = log, **options: Any) -> None:
        """Log; while another thread receives, if the log waited last time."""
        step = self.step = self.service.logging
        if step.slow:
            self.run_slow(step, _note, level, *arguments, to=to, **options)
        else:
            _note(level, *arguments, to=to, **options)


def is_urgent(interface: Interface, data: bytes) -> bool:
    """Whether a datagram calls core commands alone, which are answered when all threads are held."""
    command = interface.first_lines.get(data.partition(b"\n")[0].decode("latin-1"))
    if command is not None or not _is_json(data):
        return command is not None and command.core
    try:
        document = _parse_json(data)
        calls = document if isinstance(document, list) else [document]
        return all([interface.find(call["method"], "json").core for call in calls])
    except (ValueError, RecursionError, TypeError, LookupError, CommandError):
        return False


# ---------------------------------------------------------------- Interface ----

# Beside FAULTS, what is counted in the statistics of the group mi_datagram.
COUNTERS = (
    "requests", "replies", "command_errors", "retransmissions", "dropped_denied", "dropped_errors", "dropped_gone",
    "dropped_unbound", "dropped_unread", "handler_errors", "receive_errors", "thread_errors",
)  # fmt: skip

_F = typing.TypeVar("_F", bound=Callable[..., Any])
Authorize = Callable[[Peer, str], bool]


class Interface:
    """The commands and statistics of a program, and how a datagram is answered with them.

    `name` and `version` are what the command `version` tells. `core` names the core commands to have: by default all
    but `kill`, `arg`, `debug` and `log_level`. `logger` is the one whose level the last two show and set, by default
    the root logger. `async def` commands run on `loop`. One Interface may feed several servers, on whose threads
    commands run, several at once, even the same one: they guard what they share.
    """

    def __init__(
        self,
        name: str = "mi_datagram",
        version: str = __version__,
        core: Iterable[str] | None = None,
        logger: logging.Logger | None = None,
        loop: Any = None,
    ) -> None:
        self.name = name
        self.version = version
        self.logger = logger or logging.getLogger()
        self.loop = loop
        self.started = time.monotonic()
        self.commands: dict[str, Command] = {}  # by the names that they are registered under
        self._aliases: dict[str, dict[str, Command]] = {}  # by any other name, then by the whole names that it means
        self.statistics: dict[str, Callable[[], Any]] = {}
        self.processes: Callable[[], list[tuple[int, str]]] = lambda: [(os.getpid(), "main process")]
        self.level_changed: Callable[[int], object] = lambda level: None
        # By the bytes that a request begins with, as Latin-1 text: without a GIL that alone is found without a lock.
        self.first_lines: dict[str, Command] = {}
        self.log_limit = LogLimit()
        self._service = Service(self)
        self.use_counters(Counter)
        self.add_core([name for name in CORE if name not in CORE_ON_REQUEST] if core is None else core)

    @typing.overload
    def command(
        self, f: _F, /, *, name: str | None = ..., pass_request: bool = ..., read_only: bool = ..., replace: bool = ...
    ) -> _F: ...
    @typing.overload
    def command(
        self, *, name: str | None = ..., pass_request: bool = ..., read_only: bool = ..., replace: bool = ...
    ) -> Callable[[_F], _F]: ...

    def command(
        self,
        function: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        pass_request: bool = False,
        read_only: bool = False,
        replace: bool = False,
    ) -> Any:
        """Register a function as a command; used as `@mi.command`, `@mi.command(…)` or a call.

        `name` is another name than the function's, `group:name` for a command of a group; `pass_request` gives it the
        Request as first argument; `read_only` says that it changes nothing, so it is not audited; `replace` lets it
        take the place of a command of that name, which is a ParameterError otherwise.
        """
        if function is None:
            options = {"name": name, "pass_request": pass_request, "read_only": read_only, "replace": replace}
            return functools.partial(self.command, **options)
        command = Command(name or function.__name__, function, pass_request, read_only)
        if command.name in self.commands and not replace:
            raise ParameterError(f"command name {command.name!a}: there is one already; replace it by replace=True")
        self._put(command)
        return function

    def _put(self, command: Command) -> None:
        """Have COMMAND found by its name, and without its group as long as no other group has one of that name."""
        self.commands[command.name] = command
        group, _, local = command.name.rpartition(":")
        if group:
            self._aliases.setdefault(local, {})[command.name] = command
        first_line = sys.intern(f":{local}:".encode("utf-8", "surrogateescape").decode("latin-1"))
        try:
            self.first_lines[first_line] = self.find(local, "line")
        except _Fault:
            self.first_lines.pop(first_line, None)

    def find(self, name: str, dialect: str) -> Command:
        """Return the command that NAME means in a dialect; raise the _Fault to answer if there is none, or several."""
        command = self.commands.get(name)
        if command is not None:
            return command
        found = {
            whole: one
            for whole, one in list(self._aliases.get(name, {}).items())
            if whole in self.commands or (dialect == "json" and self.commands[one.name].core)  # or it was replaced
        }
        if not found:
            raise _Fault("unknown_commands", detail=name)
        if len(found) > 1:
            raise _Fault("ambiguous_commands", f"supported names: {', '.join(sorted(found))}", name)
        return found.popitem()[1]

    def names(self, dialect: str) -> dict[str, Command]:
        """Return what a dialect can call, by name, and of the names in Kamailio 5 none."""
        found = {}
        for name in {*self.commands, *self._aliases}:
            with contextlib.suppress(_Fault):  # it means several, or one of the core's that was replaced
                command = self.find(name, dialect)
                if self.commands[command.name] is command and (dialect == "json" or ":" not in name):
                    found[name] = command
        return found

    def counter(self, name: str) -> Counter:
        """Return the counter called `group:name`, made at its first mention."""
        counter = self.statistics.get(name) or self._add_statistic(name, Counter())  # of two threads one makes it
        if not isinstance(counter, Counter):
            raise ParameterError(f"statistic name {name!a}: there is one already")
        return counter

    def statistic(self, name: str, function: Callable[[], Any]) -> None:
        """Have `group:name` show what FUNCTION returns whenever somebody asks."""
        if self._add_statistic(name, function) is not function:
            raise ParameterError(f"statistic name {name!a}: there is one already")

    def _add_statistic(self, name: str, function: Callable[[], Any]) -> Callable[[], Any]:
        """Return the statistic of this name: FUNCTION where there was none."""
        if not all(name.partition(":")):
            raise ParameterError(f"statistic name {name!a}: group:name is allowed")
        return self.statistics.setdefault(name, function)

    def include(self, other: Interface) -> None:
        """Take over the commands and statistics of OTHER that are not the core's."""
        for command in [one for one in other.commands.values() if not one.core]:
            if command.name in self.commands and not self.commands[command.name].core:
                raise ParameterError(f"command name {command.name!a}: two of the interfaces have one")
            self._put(command)
        for name, function in other.statistics.items():
            if not name.startswith("mi_datagram:"):
                self.statistic(name, function)

    def add_core(self, names: Iterable[str]) -> None:
        """Add the core commands of these NAMES that are not there yet."""
        for name in names:
            if name not in CORE:
                raise ParameterError(f"core command {name!a}: allowed are {', '.join(CORE)}")
            if name not in self.commands:
                self._put(_core_command(self, name, name))
                for alias in (CORE[name], CORE[name].partition(":")[2]):
                    self._aliases.setdefault(alias, {}).setdefault(CORE[name], self.commands[name])
                for alias in KAMAILIO:
                    if KAMAILIO[alias][0] == name:
                        self._aliases[alias] = {alias: _core_command(self, *KAMAILIO[alias])}

    def server(self, socket_name: str | os.PathLike[str], **options: Unpack[_ServerOptions]) -> UnixServer | UDPServer:
        """Make a server of these commands: a UnixServer or a UDPServer; help() of these lists the PARAMETERS."""
        kind: Any = UDPServer if isinstance(parse_socket_name(socket_name), tuple) else UnixServer
        return kind(socket_name, self, **options)  # type: ignore[no-any-return]

    def answer(self, data: bytes, peer: Peer | None = None, send: Callable[[bytes], Any] | None = None) -> bytes | None:
        """Return the reply to one datagram of either dialect; None where there is none, or not yet: SEND gets that."""
        return Exchange(self._service, peer, send).answer(data)

    def use_counters(self, make: Callable[[], Counter]) -> None:
        """Count the service's own statistics with what MAKE makes, always asked in the same order."""
        self.statistics.update({f"mi_datagram:{kind}": make() for kind in (*COUNTERS, *FAULTS)})
        ours = "mi_datagram"
        self.statistics[f"{ours}:threads"] = lambda: sum([t.name.startswith(ours) for t in threading.enumerate()])
        self.count_request = self.counter("mi_datagram:requests").add_one  # each request needs these two
        self.count_reply = self.counter("mi_datagram:replies").add_one

    def count(self, name: str) -> None:
        """Count one more in the service's own group of statistics."""
        counter: Any = self.statistics[f"mi_datagram:{name}"]
        counter.add()


# ------------------------------------------------------------ core commands ----

# The levels of `logging` by the numbers that `debug` has, which are the original's, and `log_level`, OpenSIPS's.
DEBUG_LEVELS = {3: 10, 2: 20, 1: 25, 0: 30, -1: 40, -2: 50, -3: 51, -4: 52, -5: 53}
LOG_LEVELS = {4: 10, 3: 20, 2: 25, 1: 30, 0: 35, -1: 40, -2: 50, -3: 51}


class _Core:
    """The core commands, each a method, and what Kamailio's names need beside them."""

    def __init__(self, interface: Interface) -> None:
        self._interface = interface

    def uptime(self) -> Any:
        """Tell the time, when the program started, and for how long it has run."""
        now, seconds = time.time(), time.monotonic() - self._interface.started  # which no change of the clock touches
        return {"Now": time.ctime(now), "Up since": time.ctime(now - seconds), "Up time": f"{int(seconds)} [sec]"}

    def version(self) -> Any:
        """Tell the name and the version of the program."""
        return {"Server": f"{self._interface.name} ({self._interface.version})"}

    def pwd(self) -> Any:
        """Tell the working directory."""
        return {"WD": os.getcwd()}

    def arg(self) -> Any:
        """List the arguments that the program was started with."""
        return list(sys.argv)

    def ps(self, request: Request) -> Any:
        """List the processes of the program."""
        found = enumerate(self._interface.processes())
        processes = [{"ID": number, "PID": pid, "Type": kind} for number, (pid, kind) in found if pid]
        return {"Processes": processes} if request.dialect == "json" else [Node("Process", None, p) for p in processes]

    def kill(self) -> None:
        """End the program, as SIGTERM does."""
        os.kill(self._interface.processes()[0][0], signal.SIGTERM)

    def threads(self) -> Any:
        """Tell what each thread is doing now: its name and its innermost frames, fewer where there are many threads."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        nodes, current = [], sys._current_frames()
        depth = max(1, min(FRAMES, THREADS_LINES // len(current) - 1))
        for ident in sorted(current, key=threading.main_thread().ident.__ne__)[: THREADS_LINES // 2]:
            stack = itertools.islice(traceback.walk_stack(current[ident]), depth)
            frames = [f"{one.f_code.co_filename}:{line} {one.f_code.co_name}" for one, line in stack]
            nodes.append(Node("Thread", names.get(ident, str(ident)), children=frames))
        left = len(current) - len(nodes)
        return [*nodes, Node("Threads", f"{left} more")] if left else nodes

    def which(self, request: Request, command: str | None = None) -> Any:
        """List the commands, those of a group (`GROUP:`), or the ways to call COMMAND by names of parameters."""
        is_json, names = request.dialect == "json", self._interface.names(request.dialect)
        found = [name for name, one in names.items() if (name if is_json else one.name).startswith(command or "")]
        if command is None or (command.endswith(":") and found):
            return sorted(found)
        calls = self._find(command, request.dialect).overloads()
        return calls if is_json else [" ".join([command, *[f"{name}::" for name in call]]) for call in calls]

    def help(self, request: Request, command: str | None = None, *, mi_cmd: str | None = None) -> Any:
        """Say what each command does, or how to call COMMAND; OpenSIPS's clients call the parameter mi_cmd."""
        is_json = request.dialect == "json"
        name = mi_cmd if command is None else command
        if name is None:
            names = self._interface.commands if is_json else self._interface.names("line")
            return {name: names[name].doc.partition("\n")[0] for name in sorted(names)}
        found = self._find(name, request.dialect)
        if is_json:
            whole = CORE[found.name] if found.core else found.name
            group = whole.rpartition(":")[0] or self._interface.name
            return {"Help": found.doc, "Exported by": group, "Usage": found.usage()}
        usage = {"Usage": found.usage().removeprefix(found.name.rpartition(":")[0] + ":")}
        return {**usage, "Help": found.doc.split("\n")} if found.doc else usage  # run as -OO there are no texts

    def _find(self, name: str, dialect: str, code: int = 404, reason: str = "Command Not Found") -> Command:
        try:
            return self._interface.find(name, dialect)
        except _Fault as fault:
            raise CommandError(code, reason) if fault.kind == "unknown_commands" else fault from None

    def _list_methods(self) -> Any:
        """List Kamailio's names of the core commands, and the program's own commands."""
        core = {command.name: command.core for command in list(self._interface.commands.values())}
        known = [alias for alias, (name, *_) in KAMAILIO.items() if core.get(name)]
        return sorted([*known, *[name for name in core if not core[name]]])

    def _method_help(self, name: str | None = None) -> Any:
        """Say what the command NAME does."""
        if name is None:
            raise CommandError(400, "Method Name Expected")
        return self._find(name, "json", 400, "command not found").doc

    def debug(self, level: int | None = None) -> Any:
        """Tell the log level or set it: -5 alert ... -1 error, 0 warning, 1 notice, 2 info, 3 debug."""
        return {"DEBUG": self._level(level, DEBUG_LEVELS)}

    def log_level(self, level: int | None = None) -> Any:
        """Tell the log level or set it: -3 alert ... -1 error, 1 warning, 2 notice, 3 info, 4 debug."""
        return {"Log level" if level is None else "New global log level": self._level(level, LOG_LEVELS)}

    def _level(self, level: int | None, levels: dict[int, int]) -> int:
        """Set a level where one is given; return the one that holds."""
        logger = self._interface.logger
        if level is not None:
            if level not in levels:
                raise _Fault("bad_parameters", "Bad type for parameter 'level'")
            if logger in (log, logging.getLogger()):  # whose level the audit has unless it has one of its own
                audit.setLevel(audit.getEffectiveLevel())
            logger.setLevel(levels[level])
            self._interface.level_changed(levels[level])
        return next((number for number, low in levels.items() if logger.getEffectiveLevel() <= low), min(levels))

    def get_statistics(self, statistics: Any, *more: Any) -> Any:
        """Tell the statistics called `group:name` or `name`, those of a `group:`, or `all`."""
        values = {}
        for name, statistic in self._select(statistics, *more).items():
            try:  # one that fails or has no value is left out, or its readers could read none of them
                value = statistic()
                if not (value is None or value == "" or (isinstance(value, float) and not math.isfinite(value))):
                    values[name] = int(value) if value.__class__ is bool else value
            except Exception as error:
                _note(logging.ERROR, "statistic %a failed", name, error=error)
        return values

    def list_statistics(self, statistics: Any = "all", *more: Any) -> Any:
        """Tell which statistics there are, and which of them count; select them as in get_statistics."""
        found = self._select(statistics, *more)
        return {name: "incremental" if isinstance(one, Counter) else "non-incremental" for name, one in found.items()}

    def reset_statistics(self, statistics: Any, *more: Any) -> None:
        """Count from zero again what get_statistics tells for the same names."""
        for statistic in self._select(statistics, *more).values():
            if isinstance(statistic, Counter):
                statistic.reset()

    def reset_all_statistics(self) -> None:
        """Count all statistics from zero again."""
        self.reset_statistics("all")

    def clear_statistics(self, statistics: Any, *more: Any) -> Any:
        """Tell the statistics and count them from zero again."""
        values = self.get_statistics(statistics, *more)
        self.reset_statistics(statistics, *more)
        return values

    def _fetch(self, *names: Any) -> Any:
        """Tell statistics as Kamailio does, to which a name that selects nothing is no error."""
        if not names:
            raise CommandError(400, "Please provide which stats to retrieve")
        with contextlib.suppress(CommandError):
            return self.get_statistics(*names)
        return {}

    def _select(self, *names: Any) -> dict[str, Callable[[], Any]]:
        """Return the statistics that are meant, at least one; OpenSIPS's clients send the names in one list."""
        wanted = [str(one) for name in names for one in (name if isinstance(name, (list, tuple)) else [name])]
        if not wanted:
            raise _Fault("bad_parameters", "Empty array in parameter 'statistics'")
        by_word: dict[str, list[str]] = {}  # what each word selects: one look at each statistic and each word
        for full in list(self._interface.statistics):
            group, _, rest = full.partition(":")
            for word in ("all", full, f"{group}:", rest):
                by_word.setdefault(word, []).append(full)
        selected = [full for word in dict.fromkeys(wanted) for full in by_word.get(word, ())]
        if not selected:
            raise CommandError(404, "Statistics Not Found")
        return {full: self._interface.statistics[full] for full in selected}


# Of each core command, which is a public method, its name in OpenSIPS 4; ours is that of the versions before.
CORE = {
    name: f"statistics:{name.removesuffix('_statistics')}" if name.endswith("_statistics") else f"core:{name}"
    for name in sorted(vars(_Core))
    if not name.startswith("_")
}
CORE_CHANGING = ("clear_statistics", "debug", "kill", "log_level", "reset_all_statistics", "reset_statistics")
CORE_ON_REQUEST = ("arg", "debug", "kill", "log_level")  # a program has these only where it names them

# Of each name in Kamailio 5: ours, the method of _Core that answers, and what makes Kamailio's form of that.
KAMAILIO: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "core.arg": ("arg", "arg", list),
    "core.psx": ("ps", "ps", lambda told: [
        {"IDX": one["ID"], "PID": one["PID"], "DSC": one["Type"]} for one in told["Processes"]]),
    "core.pwd": ("pwd", "pwd", lambda told: [told["WD"]]),
    "core.uptime": ("uptime", "uptime", lambda told: {
        "now": told["Now"], "up_since": told["Up since"], "uptime": int(told["Up time"].split()[0])}),
    "core.version": ("version", "version", lambda told: told["Server"]),
    "stats.fetch": ("get_statistics", "_fetch", lambda told: {k.replace(":", "."): _text(v) for k, v in told.items()}),
    "stats.fetchn": ("get_statistics", "_fetch", lambda told: {k.replace(":", "."): v for k, v in told.items()}),
    "stats.get_statistics": ("get_statistics", "_fetch", lambda told: [f"{k} = {_text(v)}" for k, v in told.items()]),
    "system.listMethods": ("which", "_list_methods", list),
    "system.methodHelp": ("help", "_method_help", str),
}  # fmt: skip


def _core_command(interface: Interface, name: str, method: str, form: Callable[[Any], Any] | None = None) -> Command:
    """Make a core command of a method of _Core, which gets the Request if it has a parameter of that name."""
    function = getattr(_Core(interface), method)
    pass_request = "request" in function.__code__.co_varnames
    command = Command(name, function, pass_request, name not in CORE_CHANGING, core=True)
    if form is not None:
        command.function = lambda *values, **named: form(function(*values, **named))
    return command


# ------------------------------------------------------------------- access ----


def allow_networks(*networks: str) -> Authorize:
    """Make an `authorize` that lets in the UDP peers of these NETWORKS ("10.0.0.0/8", "::1").

    An IPv4 address mapped into IPv6 is matched as IPv4. Raises ParameterError for no network.
    """
    import ipaddress

    try:
        allowed = [ipaddress.ip_network(network, strict=False) for network in networks]
    except ValueError as error:
        raise ParameterError(f"allow_network: {error}") from None

    @functools.lru_cache(maxsize=1024)
    def is_allowed(host: str) -> bool:
        address = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return any([address in network for network in allowed])

    return lambda peer, command: isinstance(peer.address, tuple) and is_allowed(peer.address[0])


def allow_users(*users: str | int) -> Authorize:
    """Make an `authorize` that lets in the peers on a UNIX socket that run as one of these USERS, names or numbers.

    A peer whose user the kernel does not tell is refused. Raises ParameterError for a user that does not exist.
    """
    allowed = frozenset([_account("allow_user", user) for user in users])
    return lambda peer, command: peer.uid in allowed


# --------------------------------------------------------------- parameters ----


def _wrong(name: str, value: object, allowed: str) -> ParameterError:
    return ParameterError(f"{name} {value!a}: {allowed}")


def _number(name: str, value: Any, low: int, high: int, octal: bool = False) -> int:
    """Check a number: an int, or its text, which is decimal, 0x, or octal where it says so."""
    number: int = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = int(value, 8 if octal else 16 if value[:2].lower() == "0x" else 10)
    if number.__class__ is not int or not low <= number <= high:
        allowed = f"an octal number from 0 to 0{high:o}" if octal else f"a number from {low} to {high}"
        raise _wrong(name, value, f"{allowed} is allowed")
    return number


def _mode(name: str, value: Any) -> int:
    """Check permissions; 0 would lock everybody out and becomes 0o600."""
    mode = _number(name, value, 0, 0o777, octal=True)
    if not mode:
        _note(logging.WARNING, "%s 0: taken as 0600", name)
    return mode or 0o600


def _between(low: int, high: int) -> Callable[[str, Any], int]:
    return functools.partial(_number, low=low, high=high)


def _account(name: str, value: Any) -> int:
    """Check the name or number of a user, or of a group where the parameter's NAME ends so."""
    text = str(value)
    if text.isascii() and text.isdigit():
        return _number(name, text, 0, 2**32 - 2)
    try:
        import grp
        import pwd

        return grp.getgrnam(text).gr_gid if name.endswith("group") else pwd.getpwnam(text).pw_uid
    except (ImportError, KeyError, ValueError):
        raise _wrong(name, value, "there is none of this name; a name or a number is allowed") from None


def _truth(name: str, value: Any) -> bool:
    if str(value).lower() not in TRUTH:
        raise _wrong(name, value, "true or false is allowed")
    return TRUTH[str(value).lower()]


def _indent(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\n" in value or "\r" in value or not _has_bytes(value):
        raise _wrong(name, value, "any text without a line break is allowed")
    return value


# Of every parameter but socket_name: its default, its check, which takes its own type or text, and its meaning.
PARAMETERS: dict[str, tuple[Any, Callable[[str, Any], Any], str]] = {
    "children_count": (1, _between(1, 1024), "processes that serve the socket; python -m only"),
    "unix_socket_mode": (0o660, _mode, "permissions of the socket file; text is octal"),
    "unix_socket_user": (None, _account, "owner of the socket file, name or number"),
    "unix_socket_group": (None, _account, "group of the socket file, name or number"),
    "socket_timeout": (SOCKET_TIMEOUT, _between(0, 2**31 - 1), "ms that a reply may wait; 0: not at all"),
    "reply_indent": ("\t", _indent, "one level of a reply's tree"),
    "socket_buf_size": (SOCKET_BUF_SIZE, _between(64, UNIX_PAYLOAD), "longest request and longest reply, bytes"),
    "pretty_printing": (False, _truth, "whether JSON replies are indented"),
    "max_threads": (MAX_THREADS, _between(3, 4096), "threads of a server"),
}


class Parameters(typing.TypedDict, total=False):
    """The types of PARAMETERS as keywords."""

    children_count: int
    unix_socket_mode: int | str
    unix_socket_user: int | str | None
    unix_socket_group: int | str | None
    socket_timeout: int
    reply_indent: str
    socket_buf_size: int
    pretty_printing: bool
    max_threads: int


class _ServerOptions(Parameters, total=False):
    """What a server takes beside its name and its Interface."""

    handler: Callable[[Any, Any, Any], Any]
    authorize: Authorize | None
    listening: Any


def _meaning(parameter: str) -> str:
    """Tell a parameter's meaning and default."""
    default, check, meaning = PARAMETERS[parameter]
    shown = f"0{default:o}" if check is _mode else "TAB" if default == "\t" else _text(default)
    return f"{meaning} (default {shown})" if shown else meaning


def check_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters checked, those not given at their defaults; raise ParameterError for a wrong one."""
    checked = {name: default for name, (default, _, _) in PARAMETERS.items()}
    for name, value in parameters.items():
        if name not in PARAMETERS:
            raise ParameterError(f"parameter {name!a}: allowed are socket_name, {', '.join(PARAMETERS)}")
        if value is not checked[name]:
            checked[name] = PARAMETERS[name][1](name, value)
    return checked


def parse_socket_name(name: str | os.PathLike[str]) -> str | tuple[str, int]:
    """Tell a UNIX socket's path from the (host, port) of `udp:HOST:PORT`; raise ParameterError for others."""
    text = os.path.join(".", os.fsdecode(name)) if isinstance(name, os.PathLike) else name  # which keeps no ./
    if not isinstance(text, str):
        raise _wrong("socket_name", name, "a text is allowed")
    if text[:4].lower() == "udp:":
        match = re.fullmatch(r"(?:\[(.+)\]|(.+)):([0-9]{1,5})", text[4:], re.DOTALL)
        if not match or int(match[3]) > 65535:
            raise _wrong("socket_name", name, "udp:HOST:PORT is allowed, with a port from 0 to 65535")
        return match[1] or match[2], int(match[3])
    try:
        path = os.fsencode(text)
    except UnicodeEncodeError:  # of a character that the locale lacks
        path = b""
    if not path.startswith((b"/", b"./")) or b"\0" in path or path.endswith(b"/"):
        raise _wrong("socket_name", name, "/path, ./path or udp:HOST:PORT is allowed")
    if len(path) > UNIX_PATH:
        raise _wrong("socket_name", name, f"a path of at most {UNIX_PATH} bytes is allowed")
    return text


# ------------------------------------------------------------------ threads ----


class Work(typing.NamedTuple):
    """What the threads of a LeaderFollowers do. An item is whatever `receive` returns."""

    receive: Callable[[], Any]  # take an item without waiting; BlockingIOError where there is none
    handle: Callable[[Any], object]
    poll: Callable[[], object]  # wait until there is an item, or until wake() was called
    wake: Callable[[], object]
    is_urgent: Callable[[Any], bool]
    size: Callable[[Any], int]  # bytes
    stalled: Callable[[], object]  # the leader was replaced, as it is in one item for a TICK
    failed: Callable[[str, Exception], object]  # to receive, or to start a thread: the statistic, the error


FORKED = -math.inf  # in place of LeaderFollowers._left


class LeaderFollowers:
    """Threads that take turns in receiving: one worker leads, the others handle what waits, or follow.

    1. One worker at a time is the leader: it takes an item without waiting, handles it in place, and takes the next;
       when there is none it polls. So quick items cost no change of threads.
    2. A leader that may be long in an item is replaced: by `yield_lead`, which it calls before it waits, or by the
       watcher, the thread in `watch`, which finds it in the same item for a whole TICK.
    3. The lead goes to a follower, or else to a new worker, `max_workers` at most; where there is neither the leader
       stays. Nobody waits for the change: the lead is vacant until the other one wakes up.
    4. `_leader` changes under the lock alone. A worker reads it without the lock before each item, so one that was
       just replaced may take one item more. Before it polls it looks again, under the lock: one thread polls.
    5. The last free worker is the reserve, and does nothing but lead. It handles in place what is urgent alone, and
       leaves the rest to the backlog; when that is full it stops receiving. A worker that is done takes from the
       backlog first, and while something is in it, nothing that is not urgent goes past it.
    6. A worker that finds neither backlog nor vacant lead follows, or ends if SPARE_THREADS follow already. One that
       dies of an error is replaced.
    7. The watcher sleeps only while the leader polls, after QUIET_TICKS, and who has polled wakes it up. Both change
       `_poll_ticks` under the lock, so neither misses the other. An idle server makes no wake-ups.
    8. At the shutdown the leader goes on until there is no item left, or `drain` were taken; workers that are done
       empty the backlog and end.
    9. In a process that is forked no worker goes on: the one that forked ends it. The watcher returns.
    """

    def __init__(self, work: Work, max_workers: int) -> None:
        self.work = work
        self._max_workers = max_workers
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)  # here followers wait
        self._state_changed = threading.Condition(self._lock)  # here the watcher waits, and the reserve for room
        self._workers: set[int | None] = set()  # their idents
        self._followers = 0
        self._leader = 0  # an ident; 0 while the lead is vacant
        self._current: Any = None  # the item that the leader is in
        self._poll_ticks = 0  # 0: the leader does not poll; n: it does, and has for n - 1 ticks of the watcher
        self._backlog: collections.deque[Any] = collections.deque()
        self._room = BACKLOG_BYTES  # that the backlog has left
        self._is_careful = False  # whether the leader is to ask _admit() before it handles an item
        self._left = math.inf  # items to take until the end: less than inf from the shutdown on, 0 at its end
        self._requested: int | None = None  # the `drain` of request_shutdown

    def start(self) -> bool:
        """Start the first worker; False if no thread can be had."""
        return self.spawn(self._work)

    def spawn(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Run FUNCTION on a worker of its own; False if there is none left, or only the one that may have to lead."""
        worker = threading.Thread(target=self._run, args=(function, *arguments), name="mi_datagram worker", daemon=True)
        with self._lock:
            left = self._max_workers - len(self._workers)
            if left < 1 or (left == 1 and not self._followers and function != self._work):
                return False
            try:
                worker.start()
            except (RuntimeError, MemoryError) as error:
                self.work.failed("thread_errors", error)
                return False
            self._workers.add(worker.ident)
            return True

    def yield_lead(self) -> bool:
        """Have another worker receive, as what this thread does next may take long; return False if there is none."""
        with self._lock:
            if self._leader == get_ident() and self._promote_follower():
                self._leader = 0
            return self._leader != get_ident()

    def is_worker(self) -> bool:
        return get_ident() in self._workers

    def is_ending(self) -> bool:
        return self._left < math.inf

    def is_done(self) -> bool:
        with self._lock:  # under which one that died is replaced
            return not self._workers

    def wake_watcher(self) -> None:
        """Have the watcher call its `act` soon."""
        with self._lock:
            if self._poll_ticks:
                self._poll_ticks = 1
                self._state_changed.notify_all()

    def request_shutdown(self, drain: int) -> None:
        """Have the watcher call shutdown(). Takes no lock, so a signal handler may call it."""
        self._requested = drain
        self.work.wake()

    def shutdown(self, drain: int) -> None:
        """Take DRAIN items more, as far as there are any now, and end."""
        with self._lock:
            self._left = min(self._left, drain)
            if not self._left:
                self._end_lead()
            self._update()
            self._state_changed.notify_all()
        self.work.wake()

    def end(self) -> None:
        """End now: no worker takes another item."""
        with self._lock:
            self._end_lead()
            self._left = -1  # so the reserve that waits for room does not go on with its item
            self._backlog.clear()

    def abandon(self) -> None:
        """Have no worker go on, in a process that was forked."""
        self._leader, self._left = 0, FORKED

    def watch(self, act: Callable[[], float], is_over: Callable[[], bool]) -> None:
        """Replace leaders until IS_OVER(); call ACT between, which returns in how many s it is to be called again."""
        seen: Any = None
        since = time.monotonic()  # when it was seen first, or its leader replaced
        while not is_over():
            delay = act()
            if self._left == FORKED:  # by ACT; nobody may be here to release the lock
                return
            if self._requested is not None:
                self.shutdown(self._requested)
            with self._lock:
                if is_over():  # since the last look: nobody notifies it a second time
                    break
                may_sleep = self._poll_ticks > QUIET_TICKS and self._left == math.inf
                self._state_changed.wait(min(delay, threading.TIMEOUT_MAX if may_sleep else TICK))
                now = time.monotonic()
                if self._current is not seen:
                    seen, since = self._current, now
                elif self._poll_ticks:
                    self._poll_ticks += 1
                elif self._leader:
                    if now >= since + TICK and self._promote_follower():  # or else it was notified of something
                        self._leader, since = 0, now
                        self.work.stalled()
                elif now > since + QUIET_TICKS * TICK and self._left > 0:  # nobody leads: no thread could be had
                    since = now
                    self._promote_follower()

    def _run(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            function(*arguments)
        finally:
            if self._left == FORKED:  # without the lock, which nobody may be here to release
                os._exit(0)
            with self._lock:
                self._workers.discard(get_ident())
                if self._leader == get_ident():  # it died of an error
                    self._leader = self._poll_ticks = 0
                if self._backlog or not (self._leader or self._left <= 0):
                    self._promote_follower()
                self._state_changed.notify_all()

    def _work(self) -> None:
        while self._left != FORKED and (turn := self._take_turn()) is not None:
            turn()

    def _take_turn(self) -> Callable[[], object] | None:
        """Wait until there is something to do, and return that; None if this worker is not needed any more."""
        with self._lock:
            max_followers = min(SPARE_THREADS, (self._max_workers - 1) // 2)  # one is left for a late reply
            if self._leader and not self._backlog:  # or else it follows for no moment, so that the leader is careful
                if self._followers >= max_followers:
                    return None
                self._followers += 1
                self._update()
                try:
                    self._turn.wait_for(lambda: self._backlog or not self._leader)
                finally:  # of a MemoryError too
                    self._followers -= 1
            turn: Callable[[], object] | None = None
            if self._backlog:
                item = self._backlog.popleft()
                self._room += self.work.size(item)
                self._state_changed.notify_all()
                turn = functools.partial(self.work.handle, item)
            elif self._left > 0:
                self._leader, self._current, turn = get_ident(), None, self._lead
            self._update()
            return turn

    def _lead(self) -> None:
        me = get_ident()
        receive, handle = self.work.receive, self.work.handle
        is_last_look = False
        while self._leader == me:
            try:
                item = receive()
            except BlockingIOError:
                is_last_look = self._wait_for_items(is_last_look)
                continue
            except OSError as error:
                self.work.failed("receive_errors", error)
                continue
            if self._is_careful and not self._admit(item):
                continue
            self._current = item
            handle(item)

    def _wait_for_items(self, is_last_look: bool) -> bool:
        """Poll; at the shutdown return True, so that the leader looks for what came before it, and then end."""
        with self._lock:
            if self._leader != get_ident():
                return False
            if self._left < math.inf:
                if is_last_look:
                    self._end_lead()
                return True
            self._poll_ticks = 1
        self.work.poll()
        with self._lock:
            if self._poll_ticks > QUIET_TICKS:
                self._state_changed.notify_all()
            self._poll_ticks = 0
            self._current = None  # what the watcher saw is over: the next item gets a TICK of its own
        return False

    def _admit(self, item: Any) -> bool:
        """Count what is taken at the end; whether the leader may handle ITEM, or else put it into the backlog."""
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                self._end_lead()
            if not self._is_crowded() or self.work.is_urgent(item):
                return True
            size = self.work.size(item)
            while self._leader == get_ident() and (len(self._backlog) >= BACKLOG or size > self._room):
                self._state_changed.wait()
            if self._left < 0:
                return False
            if not self._is_crowded():  # any more
                return True
            self._backlog.append(item)  # nobody follows, so there is nobody to be told
            self._room -= size
            return False

    def _is_crowded(self) -> bool:
        return not self._followers and len(self._workers) >= self._max_workers

    def _update(self) -> None:
        self._is_careful = self._left < math.inf or self._is_crowded()

    def _promote_follower(self) -> bool:
        """Have another worker look for a turn; False if there is none. Under the lock."""
        self._turn.notify()
        return bool(self._followers) or self.spawn(self._work)

    def _end_lead(self) -> None:
        self._leader = self._left = 0
        self._turn.notify_all()
        self._state_changed.notify_all()


# ------------------------------------------------------------------ sending ----

MSG_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
SO_SNDBUFFORCE = 32  # Linux: beyond net.core.wmem_max, for root
# Of SO_SNDTIMEO: s and µs, both 0 mean forever. 32-bit systems with a 64-bit time_t have SO_SNDTIMEO 67.
TIMEVAL = struct.Struct("@qq" if getattr(socket, "SO_SNDTIMEO", 0) > 60 else "@ll")

# Why a reply was dropped, by the error that says so: the statistic, and a hint for the log.
DROP_REASONS = {
    errno.EAGAIN: ("dropped_unread", "the client does not read"),
    errno.EACCES: ("dropped_denied", "the client's socket is not writable for us"),
    errno.EPERM: ("dropped_denied", "the client's socket is not writable for us, or connected elsewhere"),
    errno.ECONNREFUSED: ("dropped_gone", "the client is gone"),
    errno.ECONNRESET: ("dropped_gone", "the client is gone"),
    errno.ENOENT: ("dropped_gone", "the client is gone, or its socket is in another mount namespace: PrivateTmp="),
}


def set_send_timeout(sock: socket.socket, timeout: int) -> None:
    """Have sends wait TIMEOUT ms in the kernel, whatever the program's default is: Python's own timeout would spin."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(*divmod(timeout * 1000, 1_000_000)))


class Outbox:
    """Sends replies: at once where that can be done, else where nobody else waits for it.

    A reply that its client does not take waits `timeout` ms at most, one for each client, on half of `max_threads`
    in all; every other one is dropped. `run_slow(function, *arguments)` runs what waits, or returns False if it may not
    wait now. A request is (data, socket, source, …): the reply leaves by the socket, and from the address that
    `source` tells, if it is not empty.
    """

    def __init__(self, interface: Interface, timeout: int, max_threads: int, run_slow: Callable[..., bool]) -> None:
        self._interface = interface
        self._timeout = timeout
        self._max_waiting = min(max_threads // 2, max_threads - 3)  # one is left for commands, and the reserve
        self._run_slow = run_slow
        self._lock = threading.Lock()
        self._waiting: set[Any] = set()  # the clients that a reply waits for

    def prepare(self, sock: socket.socket) -> None:
        """Set what a socket needs for sending."""
        set_send_timeout(sock, self._timeout)
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def send(self, asked: Any, reply: bytes) -> None:
        """Send the reply to what was ASKED (a Handler), or drop, count and log it."""
        request, address = asked.request, asked.client_address
        try:
            if request[2]:
                self._sendto(request, reply, MSG_DONTWAIT, address)
            else:
                request[1].sendto(reply, MSG_DONTWAIT, address)
        except BlockingIOError as error:
            self._send_later(request, reply, address, error)
        except (OSError, TypeError) as error:  # TypeError: the client has no address
            shorter = asked.replace_too_large(reply) if getattr(error, "errno", 0) == errno.EMSGSIZE else None
            if shorter is None:
                self._drop(request, address, error)
            else:
                self.send(asked, shorter)
        else:
            self._interface.count_reply()

    def _send_later(self, request: Any, reply: bytes, address: Any, error: OSError) -> None:
        """Send a reply that was not taken at once; ERROR says why."""
        if address in self._waiting:
            self._drop(request, address, error)
            return
        try:
            self._sendto(request, reply, MSG_DONTWAIT, address)
        except BlockingIOError:
            if not self._run_slow(self._send_blocking, request, reply, address):
                self._drop(request, address, error)
        except OSError as other:
            self._drop(request, address, error if other.errno == errno.EPERM else other)
        else:
            self._interface.count_reply()

    def _send_blocking(self, request: Any, reply: bytes, address: Any) -> None:
        try:
            with self._lock:
                if not self._timeout or address in self._waiting or len(self._waiting) >= self._max_waiting:
                    raise BlockingIOError(errno.EAGAIN, "too many replies wait")
                self._waiting.add(address)
            try:
                self._sendto(request, reply, 0, address)
            finally:
                self._waiting.discard(address)
        except OSError as error:
            self._drop(request, address, error)
        else:
            self._interface.count_reply()

    def _sendto(self, request: Any, reply: bytes, flags: int, address: Any) -> None:
        """Send from the address that was asked; from the host's own if that is for receiving alone."""
        _, sock, source, *_ = request
        try:
            sock.sendmsg([reply], source, flags, address)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EADDRNOTAVAIL, errno.ENETUNREACH):
                raise
            sock.sendto(reply, flags, address)

    def _drop(self, request: Any, address: Any, error: Exception) -> None:
        if request[1].fileno() < 0:  # it is over, or this process is a fork
            return
        kind, hint = DROP_REASONS.get(getattr(error, "errno", 0), ("dropped_errors", ""))
        if not address:
            kind = "dropped_unbound"
        self._interface.count(kind)
        if address and self._interface.log_limit.allows(kind):
            _note(logging.WARNING, "reply to %a dropped: %s%s", address, error, hint and f" ({hint})")


class UnixOutbox(Outbox):
    """Sends from one-off sockets too: the kernel charges replies that nobody reads yet to the buffer of the sender.

    So silent clients fill the buffer of the bound socket, and a socket of its own still reaches the others. Not
    those that are connected: they take replies from the bound socket alone (EPERM), and have no limit of their
    own, so to wait for them could be to wait forever.
    """

    def _sendto(self, request: Any, reply: bytes, flags: int, address: Any) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            self.prepare(sock)
            sock.sendto(reply, flags, address)


# ------------------------------------------------------------------ handler ----
#
# The way of a datagram whose command is quick: `get_request` takes it off the socket (recvmsg), and `_handle` asks the
# hooks of socketserver: verify_request and `process_request`, whose finish_request makes a Handler. Its `handle`
# gives the bytes to `Exchange.answer`, which knows the dialect. `LineCall.answer` reads them (`JsonCall.answer` each
# call of a JSON document), `Call.run` binds the arguments and runs the command, and `LineCall.format` writes what
# that returned, by `format_reply` and `_format_nodes`. `Outbox.send` sends it (sendto); over UDP `_reply_to`, on the
# way there, learns that the request runs no more.


class Handler(socketserver.BaseRequestHandler, Exchange):
    """Answers one datagram: the Exchange with a peer on a server's socket."""

    server: ServerMixIn  # pyright: ignore[reportIncompatibleVariableOverride]
    request: Any  # (data, socket, source, credentials, …), see get_request

    @property
    def peer(self) -> Peer:
        """Who sent the request; made when somebody asks, as few do."""
        return Peer(self.client_address, self.request[3])

    def handle(self) -> None:
        server = self.server
        server.current = self
        self.service = server.service
        reply = self.answer(self.request[0])
        if reply is not None:
            server.reply_to(self, reply)

    def send(self, reply: bytes | None) -> None:
        if reply is None:
            self.server.keep_open(self.request, False)
        else:
            self.server.reply_to(self, reply)

    def yield_lead(self) -> None:
        self.server.yield_lead()

    def keep_open(self) -> None:
        self.server.keep_open(self.request)
        self.request = (b"", *self.request[1:])  # what waits for its reply does not hold its datagram


# ------------------------------------------------------------------ servers ----

Socket = socket.socket  # by another name, as in the servers `socket` is an attribute
SO_PASSCRED = getattr(socket, "SO_PASSCRED", 16 if sys.platform == "linux" and hasattr(socket, "CMSG_LEN") else 0)
O_PATH = getattr(os, "O_PATH", 0o10000000 if sys.platform == "linux" else 0)
IP_PKTINFO, IPV6_RECVPKTINFO, IPV6_PKTINFO = 8, 49, 50  # Linux; the socket module lacks some
SCM_CREDENTIALS = 2  # Linux; the socket module names it only on some builds
ANCILLARY = socket.CMSG_LEN(struct.calcsize(CREDENTIALS)) if SO_PASSCRED else 0  # no room for foreign descriptors

_servers: weakref.WeakSet[ServerMixIn] = weakref.WeakSet()  # those of this process: a fork has none of them
if hasattr(os, "register_at_fork"):  # the set as it is now: reload() makes another one
    os.register_at_fork(after_in_child=lambda servers=_servers: [server.abandon() for server in servers])


class Poller:
    """Waits until a socket has a datagram, or until wake() was called: from then on it does not wait any more."""

    def __init__(self, sock: socket.socket) -> None:
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        poll = select.poll()
        with contextlib.suppress(ValueError):  # where SOCK was closed meanwhile
            for one in (self._reading, sock):
                poll.register(one, select.POLLIN)
        self.poll = poll.poll

    def wake(self) -> None:
        """Takes no lock, so a signal handler may call it."""
        with contextlib.suppress(OSError):
            self._writing.send(b".")

    def close(self) -> None:
        self._reading.close()
        self._writing.close()


class _Buffer(threading.local):
    """A receive buffer for each thread: one for each datagram, 64 kB cut down, would fragment the heap."""

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))


class _Threads(socketserver.BaseServer):
    """What the threads of a server do with a datagram, by the hooks that socketserver has for subclasses."""

    interface: Interface
    current: Handler | None = None  # the one that the leader is in
    _threads: LeaderFollowers | None = None  # while it serves

    def yield_lead(self) -> bool:
        """Have another thread receive while this one waits; return False if there is none."""
        threads = self._threads  # read once, here and below: another thread may change it
        return threads is None or threads.yield_lead()

    def _run_slow(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Run what may wait, on a worker; return False if nobody would receive then."""
        threads = self._threads
        if threads is not None and not threads.is_worker():
            return threads.spawn(function, *arguments)
        if not self.yield_lead():
            return False
        function(*arguments)
        return True

    def _run_aside(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run for the watcher what may wait for the log: on a worker, if one can be had."""
        if not self._run_slow(function, *arguments):
            function(*arguments)

    def _wake_watcher(self) -> None:
        threads = self._threads
        if threads is not None:
            threads.wake_watcher()

    def _mark_slow(self) -> None:
        step = getattr(self.current, "step", None)
        if step is not None:
            step.slow = True

    def _handle(self, item: Any) -> None:
        try:
            if self.verify_request(*item):
                self.process_request(*item)
        except BaseException:  # one request must not end the others
            self.handle_error(*item)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle the request in the thread that received it."""
        self.finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Count and log what the handler raised."""
        self._record("handler_errors", sys.exc_info()[1])

    def _record(self, kind: str, error: BaseException | None) -> None:
        """Count and log an error that is no request's own."""
        self.interface.count(kind)
        if self.interface.log_limit.allows(kind):
            _note(logging.ERROR, "%s: %a", kind, error, error=error)
        if kind == "receive_errors":
            time.sleep(TICK)  # whatever it is, it may last


class ServerMixIn(_Threads):
    """What UnixServer and UDPServer share: their life.

    The thread in serve_forever is the watcher of a LeaderFollowers; it and the workers are `max_threads` at most.
    """

    socket: Socket
    _watcher = 0  # the ident of the thread that watches
    _is_over = False  # whether it is to be closed when it has stopped

    def __init__(
        self,
        socket_name: str | os.PathLike[str],
        interface: Interface,
        handler: Callable[[Any, Any, Any], socketserver.BaseRequestHandler] = Handler,
        authorize: Authorize | None = None,
        listening: Socket | None = None,
        **parameters: Unpack[Parameters],
    ) -> None:
        """Bind the socket, or take over LISTENING, which is bound already; PARAMETERS are the original's.

        Raises ParameterError for a wrong value and SocketError for a socket that cannot be made; nothing is left then.
        """
        if not (MSG_DONTWAIT and hasattr(select, "poll")):
            raise SocketError("this system lacks MSG_DONTWAIT or poll")
        name = parse_socket_name(socket_name)
        self.parameters = values = check_parameters(parameters)
        if values["children_count"] > 1:
            raise _wrong("children_count", values["children_count"], "only python -m mi_datagram has children")
        limit, indent, is_udp = values["socket_buf_size"], values["reply_indent"], isinstance(name, tuple)
        json_indent = indent if values["pretty_printing"] else None
        deadlines = OpenReplies(self._wake_watcher)
        # A UDP peer may be forged, so a refused one gets no reply.
        self.service = Service(interface, limit, indent, json_indent, authorize, is_udp, open_replies=deadlines)
        self.interface = interface
        self.drain = 0 if listening else DRAIN  # datagrams that are still answered at the end, if not by a successor
        self.drain_time: float = max(values["socket_timeout"], SOCKET_TIMEOUT) / 1000  # s that stopping waits
        self.buffer = _Buffer(limit + 1)  # one byte more shows that a request is too long
        outbox = Outbox if is_udp else UnixOutbox
        self.outbox = outbox(interface, values["socket_timeout"], values["max_threads"], self._run_slow)
        self.reply_to: Callable[[Handler, bytes], object] = self.outbox.send
        self._ended = threading.Condition()
        _servers.add(self)  # before it has a socket
        try:
            super().__init__(self._resolve(name), handler, listening is None)  # type: ignore[call-arg]
        except OSError as error:
            named = SocketError(f"socket_name {os.fspath(socket_name)!a}: {error.strerror or error}")
            named.errno = error.errno
            raise named from None
        self._prepare(listening)

    @property
    def socket_name(self) -> str:
        """The name that a client gives; over UDP with the port that was found for port 0."""
        address: Any = self.server_address
        return _udp_name(address) if isinstance(address, tuple) else os.fsdecode(address)

    def _resolve(self, name: str | tuple[str, int]) -> Any:
        """Check that NAME is one for this class and return the address to bind."""
        raise NotImplementedError

    def _prepare(self, listening: Socket | None) -> None:
        """Set what the socket has, bound here or passed in."""
        if listening is not None:
            self.socket.close()
            self.socket, self.server_address = listening, listening.getsockname()
        self.outbox.prepare(self.socket)

    def keep_open(self, request: Any, is_open: bool = True) -> None:
        """Learn that the reply to a request comes later, or that there is none after all."""

    def remove_file(self) -> None:
        """Remove the socket file, if there is one and it is still ours; takes no lock."""

    def start(self) -> Self:
        """Serve in the background; return once serving. A server that cannot have what it needs for that is closed."""
        try:
            has_begun = self._begin()
            if has_begun:
                threading.Thread(target=self._serve, name="mi_datagram", daemon=True).start()
        except BaseException:
            self._end()
            self.stop()
            raise
        if not has_begun:
            raise Error("this server serves already" if self._threads else "this server is closed")
        return self

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until shutdown() or stop(); wait for that if it is served in the background already.

        A subclass's service_actions is called every POLL_INTERVAL seconds.
        """
        if not (self._begin() and self._serve(poll_interval)):
            with self._ended:
                self._ended.wait_for(lambda: self._threads is None)

    def _begin(self) -> bool:
        """Have a thread receive; return False if this server serves already, or is closed."""
        if self.service.is_forked:
            raise Error("this server is another process's: make one after the fork")
        monkey = sys.modules.get("gevent.monkey")
        # gunicorn's worker will patch: later than post_fork, which starts servers.
        if "gunicorn.workers.ggevent" in sys.modules or (monkey and monkey.is_module_patched("threading")):
            raise Error("gevent replaces threading (monkey.patch_all): a server needs real threads")
        with self._ended:
            if self._threads is not None or self.socket.fileno() < 0:
                return False
            self._poller = Poller(self.socket)
            work = Work(
                receive=self.get_request,
                handle=self._handle,
                poll=self._poller.poll,
                wake=self._poller.wake,
                is_urgent=lambda item: is_urgent(self.interface, item[0][0]),
                size=lambda item: len(item[0][0]),
                stalled=self._mark_slow,
                failed=self._record,
            )
            self._threads = LeaderFollowers(work, self.parameters["max_threads"] - 1)
            if not self._is_over and self._threads.start():
                return True
        self._end()
        if self._is_over:  # stop() came meanwhile, and has closed the socket if it saw no threads
            return False
        raise Error("no thread could be started")

    def _serve(self, poll_interval: float = 0.5) -> bool:
        """Watch until the end, and drain; return False if another thread does that, or did."""
        if type(self).service_actions is socketserver.BaseServer.service_actions:  # which does nothing
            poll_interval = math.inf
        with self._ended:
            threads = self._threads
            if threads is None or self._watcher:
                return False
            self._watcher = get_ident()
        try:
            threads.watch(functools.partial(self._act, poll_interval), threads.is_ending)
        finally:
            self._drain(threads)
        return True

    def _act(self, poll_interval: float = math.inf) -> float:
        """Do what is due beside requests; return in how many s there is more to do."""
        if poll_interval < math.inf:
            self.service_actions()
        replies, limit, run = self.service.open_replies, self.interface.log_limit, self._run_aside
        now = time.monotonic()
        return min(replies.drop_late(now, run) - now, limit.tell(run=run) - now, poll_interval)

    def _drain(self, threads: LeaderFollowers) -> None:
        """Let what runs finish and reply, for drain_time; drop the rest."""
        if self.service.is_forked:
            return
        deadline = time.monotonic() + self.drain_time

        def is_drained() -> bool:
            return (threads.is_done() and not self.service.open_replies) or time.monotonic() >= deadline

        try:
            threads.shutdown(self.drain if self._is_over else 0)
            threads.watch(self._act, is_drained)
        finally:  # after a second Ctrl-C too
            threads.end()
            self.service.open_replies.drop_late(math.inf)
            self.interface.log_limit.tell(at_once=True)
            with self._ended:
                self._poller.close()
                self._threads, self._watcher = None, 0
                if self._is_over:  # or else stop(), which sets it, finds no threads
                    self.socket.close()
                self._ended.notify_all()

    def shutdown(self) -> None:
        """End serve_forever and wait for it; in a thread of this server, or on the loop of its commands, only ask."""
        threads = self._threads
        is_ours = (threads and threads.is_worker()) or get_ident() == self._watcher or self.service.is_on_loop()
        self._end(wait=not is_ours)

    def _end(self, wait: bool = True) -> None:
        threads = self._threads
        if threads is not None:
            threads.shutdown(self.drain if self._is_over else 0)
            if wait:
                self._serve()  # where nobody watches yet, or ever, as Ctrl-C came just before
                with self._ended:
                    self._ended.wait_for(lambda: self._threads is not threads)

    def stop(self, wait: bool = True) -> None:
        """Take no more requests, let running commands reply, remove the socket file and close.

        In a thread of this server, or on the loop of its commands, it asks and returns; so it does
        everywhere with wait=False, which takes no lock and is what a signal handler calls.
        """
        if self.service.is_forked:
            return
        self._is_over = True
        self.remove_file()  # first: newcomers are told at once, and while the socket lives no other file has its inode
        threads = self._threads
        if threads is None:
            self.socket.close()
        elif wait:
            self.shutdown()
        else:
            threads.request_shutdown(self.drain)

    def server_close(self) -> None:
        """Remove the socket file if it is still ours, and close; the same as stop()."""
        self.stop()

    def __enter__(self) -> Self:
        return self.start()  # BaseServer's __exit__ calls server_close()

    async def __aenter__(self) -> Self:
        import asyncio

        if self._threads is None:  # or else it is refused, and another loop has the commands
            self.service.loop = asyncio.get_running_loop()
        return self.start()

    async def __aexit__(self, *_: object) -> None:
        """Stop, without blocking the loop."""
        import asyncio

        self.stop()  # which only asks on this loop
        while self.socket.fileno() >= 0:
            await asyncio.sleep(TICK)

    def fork(self) -> int:
        """Fork a child that has this server in its turn, as `children_count` does; call it before it serves."""
        _servers.discard(self)
        try:
            return os.fork()
        finally:
            _servers.add(self)

    def abandon(self) -> None:
        """Give up this server in a process that was forked: neither socket nor threads are its own."""
        self.service.is_forked = True
        self.service.open_replies = OpenReplies()  # as another thread may have held the lock of the old ones
        if self._threads is not None:
            self._threads.abandon()
            self._poller.close()
            self._threads = None
        if hasattr(self, "socket"):  # it may be half made
            self.socket.close()


class UDPServer(ServerMixIn, socketserver.ThreadingUDPServer):
    """Serves an Interface on `udp:HOST:PORT`, IPv4 or IPv6.

    A datagram equal to one of the same peer that still runs is a retransmission: counted, and not run again.
    """

    _source_size = 0  # bytes of what tells the address that was asked, on a wildcard address

    def _resolve(self, name: str | tuple[str, int]) -> Any:
        if isinstance(name, str):
            raise _wrong("socket_name", name, "udp:HOST:PORT is allowed here")
        self.address_family, address = _udp_address(name)
        if self.service.limit > UDP_PAYLOAD:
            raise _wrong("socket_buf_size", self.service.limit, f"at most {UDP_PAYLOAD} over UDP")
        for unix in ("unix_socket_user", "unix_socket_group"):
            if self.parameters[unix] is not None:
                raise _wrong(unix, self.parameters[unix], "only a UNIX socket has one")
        return address

    def _prepare(self, listening: Socket | None) -> None:
        super()._prepare(listening)
        self.reply_to = self._reply_to
        self._running: dict[Any, Any] = {}  # by (digest, address) of each datagram that runs, whose it is
        host = str(self.server_address[0])
        wildcards = {"0.0.0.0": (socket.IPPROTO_IP, IP_PKTINFO), "::": (socket.IPPROTO_IPV6, IPV6_RECVPKTINFO)}
        if sys.platform == "linux" and host in wildcards:
            self.socket.setsockopt(*wildcards[host], 1)
            self._source_size = socket.CMSG_SPACE(20)  # of the longer one
        if self.service.authorize is None and not (host == "::1" or host.startswith("127.")):
            _note(logging.WARNING, "%s is open to everybody who reaches it: there is no authorize", self.socket_name)

    def get_request(self) -> Any:
        """Take a datagram without waiting: (data, socket, source of the reply, None, (digest, address)), address."""
        view = self.buffer.view
        source: Any = ()
        if self._source_size:
            size, ancillary, _, address = self.socket.recvmsg_into([view], self._source_size, MSG_DONTWAIT)
            for level, kind, value in ancillary:
                if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):  # struct in_pktinfo: interface, our address, …
                    source = [(level, kind, bytes(4) + value[4:8] + bytes(4))]
                elif (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):  # struct in6_pktinfo: address, interface
                    source = [(level, kind, value if value[0] == 0xFE else value[:16] + bytes(4))]  # FE80: link-local
        else:
            size, address = self.socket.recvfrom_into(view, 0, MSG_DONTWAIT)
        data = view[:size].tobytes()
        return (data, self.socket, source, None, (hash(data), address)), address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle the request in the thread that received it, unless it is a retransmission."""
        key = request[4]
        if self._running.setdefault(key, key) is not key:
            self.interface.count("retransmissions")
            return
        try:
            self.finish_request(request, client_address)
        finally:
            if self._running.get(key) is key:
                self._running.pop(key, None)

    def keep_open(self, request: Any, is_open: bool = True) -> None:
        if is_open:
            self._running[request[4]] = PENDING
        else:
            self._running.pop(request[4], None)

    def _reply_to(self, handler: Handler, reply: bytes) -> None:
        self._running.pop(handler.request[4], None)  # before it is sent: then the client may ask the same again
        self.outbox.send(handler, reply)


def _udp_address(name: tuple[str, int]) -> tuple[int, Any]:
    """Resolve (host, port) to a family and an address, IPv4 first, as the original does."""
    try:
        found = socket.getaddrinfo(*name, type=socket.SOCK_DGRAM)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, str(error)) from None
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address


if TYPE_CHECKING or hasattr(socketserver, "ThreadingUnixDatagramServer"):
    _UnixBase = socketserver.ThreadingUnixDatagramServer
else:
    _UnixBase = socketserver.ThreadingUDPServer  # to be importable; __init__ refuses


class UnixServer(ServerMixIn, _UnixBase):
    """Serves an Interface on a UNIX datagram socket, `/path` or `./path`."""

    _file: tuple[str, os.stat_result] | None = None  # the path and status of the socket file that we made
    _remover: Any = None  # of that file, once: the next one may have the same inode

    def _resolve(self, name: str | tuple[str, int]) -> Any:
        if not isinstance(name, str):
            raise _wrong("socket_name", _udp_name(name), "/path or ./path is allowed here")
        path = os.path.abspath(name)
        return path if len(os.fsencode(path)) <= UNIX_PATH else name

    def server_bind(self) -> None:
        """Bind with the mode and owner asked for, at no moment with more."""
        path, values = self.socket_name, self.parameters
        with _locked_folder(path):  # so that of two servers that start together one sees the other
            _clear_path(path)
            os.fchmod(self.socket.fileno(), values["unix_socket_mode"] & 0o600)
            self.socket.bind(path)
            status = os.lstat(path)
        self._file = os.path.abspath(path), status
        self._remover = weakref.finalize(self, _remove_file, *self._file, os.getpid())
        try:
            _set_owner_and_mode(path, status, values)
        except OSError as error:
            raise OSError(error.errno, f"owner or mode cannot be set: {error.strerror}") from None

    def _prepare(self, listening: Socket | None) -> None:
        super()._prepare(listening)
        if SO_PASSCRED:
            self.socket.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)

    def remove_file(self) -> None:
        known = self._remover and self._remover.peek()
        if known:
            _remove_file(*known[2])
            self._remover.detach()  # not before, as another thread may end the process meanwhile

    def get_request(self) -> Any:
        """Take a datagram without waiting: (data, socket, (), struct ucred of the peer), address."""
        sock, view, credentials = self.socket, self.buffer.view, None
        size, ancillary, _, address = sock.recvmsg_into([view], ANCILLARY, MSG_DONTWAIT)
        for _, kind, value in ancillary:
            if kind == SCM_CREDENTIALS:
                credentials = value
        return (view[:size].tobytes(), sock, (), credentials), address


for _kind in (UDPServer, UnixServer):
    _kind.__doc__ = "\n    ".join([f"{_kind.__doc__ or ''}\n", *[f"{name}: {_meaning(name)}" for name in PARAMETERS]])


def _set_owner_and_mode(path: str, ours: os.stat_result, values: Mapping[str, Any]) -> None:
    """Set them on the socket file that is ours, not on what somebody put in its place."""
    owner = [-1 if values[name] is None else values[name] for name in ("unix_socket_user", "unix_socket_group")]
    if not (O_PATH and os.path.exists("/proc/self/fd")):  # in a chroot it need not be there
        if owner != [-1, -1]:  # which stands for: as it is
            raise OSError(errno.ENOTSUP, "this needs O_PATH and /proc")
        os.chmod(path, values["unix_socket_mode"])
        return
    descriptor = os.open(path, O_PATH | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if not (os.path.samestat(status, ours) and stat.S_ISSOCK(status.st_mode)):
            raise OSError(errno.EEXIST, "somebody else put another file there")
        os.chown(f"/proc/self/fd/{descriptor}", *owner)
        os.chmod(f"/proc/self/fd/{descriptor}", values["unix_socket_mode"])
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked_folder(path: str) -> typing.Iterator[None]:
    """Lock the folder of PATH for a moment; go on without after a second: anybody may lock /tmp."""
    import fcntl

    folder = os.path.dirname(path)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that we may write but not read
        yield
        return
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.005)
        else:
            _note(logging.WARNING, "%a is locked by somebody else; going on without", folder)
        yield
    finally:
        with contextlib.suppress(OSError):  # closing is not enough: what was forked meanwhile has it open too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _clear_path(path: str) -> None:
    """Remove a dead socket at PATH; raise OSError for anything else there."""
    with contextlib.suppress(FileNotFoundError):  # there is nothing, or not any more
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "there is something that is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            error = probe.connect_ex(path)
        if error == errno.ECONNREFUSED:
            os.unlink(path)
        elif error != errno.ENOENT:
            what = f"a socket in use ({os.strerror(error)})" if error else "a server that listens; stop it first"
            raise OSError(errno.EADDRINUSE, f"there is {what}")


def _remove_file(path: str, ours: os.stat_result, pid: int) -> None:
    """Remove the socket file if it is still OURS, and that of process PID."""
    with contextlib.suppress(OSError):
        if pid == os.getpid() and stat.S_ISSOCK(ours.st_mode) and os.path.samestat(os.lstat(path), ours):
            os.unlink(path)


# ------------------------------------------------------------------- client ----


class NoAnswer(Error, TimeoutError):
    """No reply came in time, or none that can be read."""


class Client:
    """Runs commands of a server: `call` in the line dialect, `call_json` in JSON-RPC 2.0.

    `timeout` is in ms. On Linux a client of a UNIX socket has an abstract name; elsewhere, and
    with `reply_dir` (for a server in another network namespace), a socket in a private folder
    made there. Not for several threads at once; a forked process gets a socket of its own.
    Nothing is left behind. Who has a mount namespace of his own can bind the server's path there and forge a reply.
    """

    def __init__(
        self, socket_name: str | os.PathLike[str], timeout: int = SOCKET_TIMEOUT, reply_dir: str | None = None
    ) -> None:
        self._address = parse_socket_name(socket_name)
        self.socket_name = os.fspath(socket_name)
        self.timeout = _number("timeout", timeout, 1, 2**31 - 1)
        self._reply_dir = reply_dir
        self._folder = ""  # the private one, while there is one
        self._socket: socket.socket | None = None
        self._pid = 0  # of the process that made the socket
        self._last_id = 0

    def call(self, command: str, /, *values: object, **named: object) -> Reply:
        """Run a command and return its reply; its nodes are Node objects.

        Raises CommandError for an error reply, NoAnswer, SocketError where nobody listens, and
        RequestError for what cannot be written.
        """
        return self._call(format_request(command, *values, **named))

    def _call(self, request: bytes) -> Reply:
        reply: Reply = self.exchange(request, parse_reply)
        if not reply.ok:
            raise CommandError(reply.code, reply.reason)
        return reply

    def call_json(self, method: str, /, *params: Any, **named: Any) -> Any:
        """Run a command and return its result; raises what call does, and RequestError for mixed parameters."""
        if params and named:
            raise RequestError("JSON-RPC takes parameters by position or by name, not both")
        self._last_id += 1
        call = {"jsonrpc": "2.0", "method": method, "params": named or list(params), "id": self._last_id}
        try:
            request = json.dumps(call, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as wrong:
            raise RequestError(f"parameters of {method!a}: {wrong}") from None
        answer = self.exchange(request, self._read_answer)
        if "result" in answer:
            return answer["result"]
        error = answer["error"]
        raise CommandError(error["code"], error["message"], error.get("data"))

    def _read_answer(self, reply: bytes) -> Any:
        """Return the answer to the present call; an error may have lost its id."""
        answer = _parse_json(reply)
        if isinstance(answer, dict) and answer.get("id") in (self._last_id, None):
            error = answer.get("error")
            if "result" in answer or (isinstance(error, dict) and error.keys() >= {"code", "message"}):
                return answer
        raise ValueError("it answers no present call")

    def exchange(self, request: bytes, read: Callable[[bytes], Any] = bytes) -> Any:
        """Send the bytes of a request and return those of its reply.

        READ makes something else of them; it raises ValueError for a datagram that is not the reply.
        """
        deadline = time.monotonic() + self.timeout / 1000
        dropped = ""
        try:
            sock = self._open()
            receive = self._send(sock, request)
            while (left := deadline - time.monotonic()) > 0:
                sock.settimeout(left)
                try:
                    return read(receive())
                except ValueError as reason:
                    dropped = f"; a datagram was dropped: {reason}"
            raise BlockingIOError
        except BaseException as error:
            self.close()  # with its address goes whatever reply comes later
            if isinstance(error, (BlockingIOError, socket.timeout)):
                raise NoAnswer(f"no answer from {self.socket_name} within {self.timeout} ms{dropped}") from None
            if isinstance(error, (ConnectionError, FileNotFoundError)):
                raise SocketError(f"nobody listens on {self.socket_name}") from None
            if isinstance(error, OSError) and not isinstance(error, Error):
                raise SocketError(f"{self.socket_name}: {error.strerror or error}") from None
            raise

    def _open(self) -> socket.socket:
        """Return the socket of this process: connected over UDP, otherwise with a name to reply to."""
        sock = self._socket  # read once, here and in close(): after Ctrl-C another thread closes it, see _ask_all
        if sock is not None and self._pid == os.getpid():
            return sock
        self.close()
        self._pid = os.getpid()
        if isinstance(self._address, str):
            if not hasattr(socket, "AF_UNIX"):
                raise SocketError(f"socket_name {self._address!a}: this system has no UNIX sockets")
            sock = self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            if SO_PASSCRED:
                sock.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
            self._bind(sock)
        else:
            family, address = _udp_address(self._address)
            sock = self._socket = socket.socket(family, socket.SOCK_DGRAM)
            sock.connect(address)
        return sock

    def _bind(self, sock: socket.socket) -> None:
        if sys.platform == "linux" and self._reply_dir is None:
            sock.bind(f"\0mi_datagram.{self._pid}.{os.urandom(8).hex()}")
            return
        import tempfile

        try:
            self._folder = tempfile.mkdtemp(prefix="mi_datagram.", dir=self._reply_dir)
            os.chmod(self._folder, 0o711)  # the server may run as somebody else
            path = os.path.join(self._folder, "reply")
            sock.bind(path)
            os.chmod(path, 0o666)  # whatever the umask
        except (OSError, ValueError) as error:
            raise SocketError(f"reply_dir {self._reply_dir!a}: {getattr(error, 'strerror', None) or error}") from None

    def _send(self, sock: socket.socket, request: bytes) -> Callable[[], bytes]:
        """Send a request and return what receives its reply, and raises ValueError for a datagram of somebody else.

        OpenSIPS and the original reply from another socket, without an address, so a UNIX client is not connected.
        It takes a reply from the address that the server is bound to, or from a sender without an address
        that runs, as the kernel says, as the owner of the socket file or as root.
        """
        set_send_timeout(sock, self.timeout)
        if not isinstance(self._address, str):
            sock.send(request)
            return lambda: sock.recv(UNIX_PAYLOAD)
        owner = os.stat(self._address).st_uid
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            probe.connect(self._address)
            address = probe.getpeername()

        def receive() -> bytes:
            reply, ancillary, _, sender = sock.recvmsg(UNIX_PAYLOAD, ANCILLARY)
            uid = Peer(sender, *[data for _, kind, data in ancillary if kind == SCM_CREDENTIALS]).uid
            # A relative address can be had by anybody, in another working directory.
            is_server = sender == address and os.path.isabs(os.fsencode(sender))
            if is_server or (uid in (owner, 0) and sender in (address, "", None)):
                return reply
            raise ValueError(f"its sender is {sender or 'unbound'!a} of uid {uid}, the server {address!a}")

        sock.sendto(request, self._address)
        return receive

    def close(self) -> None:
        """Close the socket and remove what it needed; the next call makes it anew."""
        sock, folder, self._socket, self._folder = self._socket, self._folder, None, ""
        if sock is not None:
            sock.close()
        if folder and self._pid == os.getpid():  # what a forked process has is its parent's
            import shutil

            shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


###############################################################################
#                                                                             #
#   The library ends here. What follows is what `python -m mi_datagram`       #
#   needs: children, systemd, configuration files, shell, command line.       #
#                                                                             #
###############################################################################


def print_error(text: str, prefix: str = "mi_datagram: ") -> None:
    """Print to stderr, past its buffer; where that cannot be written, there is nobody to tell."""
    with contextlib.suppress(OSError):
        line = f"{prefix}{escape_control_characters(text)}\n"
        os.write(STDERR, line.encode(getattr(sys.stderr, "encoding", None) or "utf-8", "backslashreplace"))


# ------------------------------------------------------------------ systemd ----


def activated_socket() -> socket.socket | None:
    """Return the socket that systemd opened for this process (sd_listen_fds), if any."""
    if os.environ.pop("LISTEN_PID", None) != str(os.getpid()):
        return None
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
    if os.environ.pop("LISTEN_FDS", "0") == "1":
        with contextlib.suppress(OSError):  # descriptor 3 is no socket
            os.set_inheritable(3, False)
            sock = socket.socket(fileno=3)
            if sock.type == socket.SOCK_DGRAM and sock.family in families and not isinstance(sock.getsockname(), bytes):
                return sock
            sock.close()
    raise ParameterError("LISTEN_FDS: only one ListenDatagram= with a path or a UDP address is allowed")


# ------------------------------------------------------------------ signals ----

TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = [*TERMINATION_SIGNALS, *[getattr(signal, n) for n in ("SIGHUP", "SIGCHLD", "SIGALRM") if hasattr(signal, n)]]


class Signals:
    """The signals of this process, read from a pipe, so that one that comes just before the wait is not missed.

    A process that a command forks has its own handlers, and no use of the pipe; signals to it wait until that is so.
    """

    def __init__(self) -> None:
        if not hasattr(signal, "pthread_sigmask"):
            raise Error("this system lacks pthread_sigmask")
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # in a script's `... &`: it stays so
        taken = [number for number in SIGNALS if not (number == signal.SIGINT and is_ignored)]
        self._replaced = {number: signal.signal(number, self._ignore) for number in taken}
        self._masks: dict[int, set[int]] = {}  # of the threads that are about to fork
        os.register_at_fork(before=self._hold, after_in_parent=self._release, after_in_child=self._give_back)
        # Deliver termination signals first: a SIGCHLD overtakes the SIGTERM to the group that the child died of.
        chunks = iter(lambda: sorted(os.read(reading, 64), key=lambda number: number not in TERMINATION_SIGNALS), None)
        self.numbers = itertools.chain.from_iterable(chunks)

    def wait(self, on_other: Callable[[int], bool]) -> bool:
        """Wait for SIGTERM or SIGINT, or until ON_OTHER returns true for another signal: return False then."""
        number = next(number for number in self.numbers if number in TERMINATION_SIGNALS or on_other(number))
        return number in TERMINATION_SIGNALS

    def _ignore(self, number: int, frame: object) -> None: ...

    def _hold(self) -> None:
        self._masks[get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _release(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.pop(get_ident()))

    def _give_back(self) -> None:
        if sys.implementation.name == "pypy":  # to it the thread that forked is not the main thread
            __import__("__pypy__").thread.signals_enabled.__enter__()
        signal.set_wakeup_fd(-1)
        while self._replaced:
            signal.signal(*self._replaced.popitem())
        self._release()


def wait_for_termination(server: UnixServer | UDPServer, signals: Signals, on_other: Callable[[int], bool]) -> bool:
    """Tell systemd that the server is ready (sd_notify), and wait as Signals.wait does; told again, it ends at once."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if name:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", "\0" + name[1:] if name.startswith("@") else name)
    is_told = signals.wait(on_other)
    server.remove_file()  # newcomers are told at once, and a burst of signals leaves no file
    for number in TERMINATION_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    return is_told


# ---------------------------------------------------------------------- log ----

STDERR = 2  # the descriptor: a thread that waits in sys.stderr would hold its lock
LOG_QUEUE, AUDIT_QUEUE = 1000, 5000  # lines that may wait for stderr; beyond, they are lost, those of the audit last
LOG_BATCH, LOG_PAUSE = 100, 0.01  # lines written at once; s of pause after fewer, as waking a thread costs more
LOG_DEADLINE = 1.0  # s that the end waits for lines not written yet


class LogFormatter(logging.Formatter):
    """Formats most lines as one text, and writes out the time of each second once: in half the time."""

    _second = (-1, "")

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info or record.exc_text or record.stack_info:
            return super().format(record)
        second, text = self._second
        if second != int(record.created):
            second, text = int(record.created), self.formatTime(record, "%Y-%m-%d %H:%M:%S")
            self._second = second, text
        return f"{text},{int(record.msecs):03} {record.levelname} {record.name}: {record.getMessage()}"


class LogWriter(logging.Handler):
    """Writes the log from a thread of its own, so that a stderr that is slow, or that nobody reads, delays nobody.

    Lines that find the queue full, or that stderr refuses, are lost; the next line says how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(LogFormatter())
        ascii("")  # PyPy imports a codec for it: now, as beside a thread that imports no command could fork
        self.take_over()

    def take_over(self) -> None:
        """Write from a thread of this process; one that a command forks writes without."""
        self.process = os.getpid()
        self.waiting: queue.SimpleQueue[logging.LogRecord | str] = queue.SimpleQueue()
        self.queued = self.written = 0
        self.lost = Counter()
        self.is_running = False

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record; the thread formats those of the audit, which are frequent and never change."""
        is_audit = record.name == audit.name
        if self.process != os.getpid():
            self.write(self.line(record))
        elif self.queued - self.written >= (AUDIT_QUEUE if is_audit else LOG_QUEUE):
            self.lost.add()
        else:
            self.queued += 1
            self.waiting.put(record if is_audit else self.line(record))
            if not self.is_running:
                with contextlib.suppress(RuntimeError):  # no thread can be had: the next line tries again
                    threading.Thread(target=self.run, name="mi_datagram log", daemon=True).start()
                    self.is_running = True

    def line(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record) + "\n"
        except Exception as error:
            return f"{record.name}: {record.msg!a} cannot be formatted: {error!a}\n"

    def run(self) -> None:
        while True:
            batch = [self.waiting.get()]
            while len(batch) < LOG_BATCH and not self.waiting.empty():
                batch.append(self.waiting.get())
            lost = self.lost()
            notice = f"mi_datagram: {lost} log lines were lost\n" if lost else ""
            lines = [one if isinstance(one, str) else self.line(one) for one in batch]
            self.lost.add(-lost if self.write(notice + "".join(lines)) else len(batch))
            self.written += len(batch)
            if len(batch) < LOG_BATCH:
                time.sleep(LOG_PAUSE)

    def write(self, text: str) -> bool:
        """Write to stderr, however long that takes; return False if it refuses."""
        data = text.encode(errors="backslashreplace")
        with contextlib.suppress(OSError):
            while data:
                select.select([], [STDERR], [])  # whoever started us may have set it not to block
                data = data[os.write(STDERR, data) :]
        return not data

    def flush(self) -> None:
        """Wait until all is written, for LOG_DEADLINE at most."""
        end = time.monotonic() + LOG_DEADLINE
        while self.written < self.queued and self.process == os.getpid() and time.monotonic() < end:
            time.sleep(LOG_PAUSE / 4)


# ----------------------------------------------------------------- children ----

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # s before a child that died young, or could not be forked, is replaced


class _SharedCounter(Counter):
    """Counts in the cell OWN of COLUMN, which has one for each child and a last one for resets."""

    def __init__(self, column: Any, own: int) -> None:
        super().__init__()
        self._column, self._own, self.add_one = column, own, self.add

    def add(self, amount: int = 1) -> None:
        with self._lock:
            self._column[self._own] += amount

    def reset(self) -> None:
        self._column[-1] = -sum(self._column[:-1])

    def __call__(self) -> int:
        return int(sum(self._column))


class Supervisor:
    """The parent of `children_count` processes that serve one socket.

    It forks them before any thread starts, and serves nothing. They share a table with a row for each child, and one
    for all; its columns are the counters, the PID of the child that serves, and the log level that `debug` set.
    With a SO_REUSEPORT socket for each, peers would wait for a child that computes.
    """

    def __init__(self, server: UnixServer | UDPServer, count: int, signals: Signals, log_writer: LogWriter) -> None:
        import mmap
        import warnings

        self.server, self.signals, self.log_writer = server, signals, log_writer
        self.parent = os.getpid()
        self.running: dict[int, int] = {}  # the PIDs of the children, and which it is of each
        self.due = dict.fromkeys(range(count), 0.0)  # the children that are missing, and when to start each
        self.starts, self.pauses = [0.0] * count, [0.0] * count  # when each was started last, and the pause before that
        width = len(COUNTERS) + len(FAULTS) + 2
        cells = memoryview(mmap.mmap(-1, 8 * width * (count + 1))).cast("q")
        *self.counters, self.serving, self.level = [cells[column::width] for column in range(width)]
        self.lifeline, held_open = os.pipe()  # it ends with the parent, which alone holds it open
        in_child = contextlib.ExitStack()  # closed by the first fork alone
        in_child.callback(os.close, held_open)
        os.register_at_fork(after_in_child=in_child.close)
        server.interface.processes = self.processes
        server.interface.level_changed = self.spread_level
        warnings.filterwarnings("ignore", ".*use of fork")  # a child needs nothing that the thread of our log may hold

    def processes(self) -> list[tuple[int, str]]:
        children = [(pid, f"MI datagram child={i}") for i, pid in enumerate(self.serving[:-1]) if pid]
        return [(self.parent, "attendant"), *children]

    def run(self) -> int:
        """Fork the children, replace those that die, end with them; return the exit status."""
        self.supervise()
        is_told = wait_for_termination(self.server, self.signals, self.supervise)
        self.kill(signal.SIGTERM)
        patience = self.server.drain_time + LOG_DEADLINE + 0.5
        deadline = time.monotonic() + patience
        signal.setitimer(signal.ITIMER_REAL, patience, 0.1)
        while self.running:
            next(self.signals.numbers)
            if time.monotonic() >= deadline:
                self.kill(signal.SIGKILL)
            self.reap()
        self.server.stop()
        return 0 if is_told else 1

    def supervise(self, number: int = 0) -> bool:
        """Pass on a SIGHUP, and start the children that are missing; return True if one ended before it served."""
        if number == signal.SIGHUP:
            self.kill(signal.SIGHUP)
        now = time.monotonic()
        for pid, child, how in self.reap():
            if self.serving[child] != pid:
                log.error("child %d ended before it could serve (wait status %d)", child, how)
                return True
            self.serving[child] = 0
            log.warning("child %d, PID %d, died (wait status %d): another takes its place", child, pid, how)
            is_young = now < self.starts[child] + 1
            self.pauses[child] = min(2 * self.pauses[child] or FIRST_PAUSE, LONGEST_PAUSE) if is_young else 0.0
            self.due[child] = now + self.pauses[child]
        for child in [child for child, due in self.due.items() if due <= now]:
            self.fork(child)
        signal.setitimer(signal.ITIMER_REAL, min([due - now for due in self.due.values()], default=0))
        return False

    def reap(self) -> list[tuple[int, int, int]]:
        """List the children that ended: PID, which it is, wait status."""
        waited = [os.waitpid(pid, os.WNOHANG) for pid in self.running]
        return [(pid, self.running.pop(pid), how) for pid, how in waited if pid]

    def fork(self, child: int) -> None:
        self.starts[child] = time.monotonic()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child has a pipe of its own
        try:
            pid = self.server.fork()
            if not pid:
                self.serve(child)
            self.running[pid] = child
            del self.due[child]
        except OSError as error:
            log.error("child %d cannot be started: %s", child, error.strerror)
            self.due[child] = self.starts[child] + LONGEST_PAUSE
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def serve(self, index: int) -> typing.NoReturn:
        """Serve as a child until the parent says so or is gone."""
        status = 1
        try:
            self.log_writer.take_over()
            self.signals = Signals()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # before threads, and what they run, inherit it
            self.take_level()
            counters = iter(self.counters)
            self.server.interface.use_counters(lambda: _SharedCounter(next(counters), index))
            threading.Thread(target=self.watch_parent, name="mi_datagram lifeline", daemon=True).start()
            self.serving[index] = os.getpid()  # before its first reply, as it may be killed right after
            try:
                self.server.start()
            except BaseException:
                self.serving[index] = 0
                raise
            self.signals.wait(self.take_level)
            self.server.stop()  # further SIGTERMs, to the process group for one, are ignored; the parent can SIGKILL
            status = 0
        except BaseException as error:
            _note(logging.ERROR, "child %d failed", index, error=error)
        finally:
            self.log_writer.flush()
            os._exit(status)

    def watch_parent(self) -> None:
        """End this child when the parent is gone, and remove the socket file in its stead."""
        os.read(self.lifeline, 1)
        log.error("the parent process is gone: ending")
        if isinstance(self.server, UnixServer) and self.server._file:
            _remove_file(*self.server._file, os.getpid())
        self.log_writer.flush()
        os._exit(1)

    def kill(self, number: int) -> None:
        for pid in self.running:
            os.kill(pid, number)

    def spread_level(self, level: int) -> None:
        """Have every child take over the log level that `debug` set in this one."""
        self.level[-1] = level
        os.kill(self.parent, signal.SIGHUP)

    def take_level(self, number: int = 0) -> bool:
        if self.level[-1]:  # `debug` set it
            self.server.interface.logger.setLevel(self.level[-1])
        return False


# ----------------------------------------------------------- modparam files ----

# Strings and comments are matched too, so that nothing inside them is taken for a line of ours.
_MODPARAM = r"""/\*.*?(?:\*/|\Z) | //[^\n]* | \#[^\n]*
      | modparam \s* \( \s* (["']) (?P<module>[^"'\n]*) \1 \s* , \s* (["']) (?P<name>\w+) \3 \s* ,
        \s* (?P<value> "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | [^)\s]* ) \s* \)
      | "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*'
    """
_ESCAPES = {"t": "\t", "n": "\n", "r": "\r"}


def read_modparams(text: str, file: str) -> list[tuple[str, Any]]:
    """List the (name, value) pairs of the `modparam("mi_datagram", …)` lines in the text of FILE.

    An unknown parameter is skipped with a warning; raises ParameterError for a value that is no literal.
    """
    pairs: list[tuple[str, Any]] = []
    for match in re.finditer(_MODPARAM, text, re.VERBOSE | re.DOTALL):
        name, value = match["name"], match["value"]
        if not name or "mi_datagram" not in match["module"].split("|"):
            continue
        if name != "socket_name" and name not in PARAMETERS:
            print_error(f"{file}: parameter {name} has no meaning here, skipped")
            continue
        if value[:1] in ("'", '"'):
            value = re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), value[1:-1])
        else:
            try:
                value = int(value, 8 if re.match(r"-?0\d", value) else 0)
            except ValueError:
                line = text.count("\n", 0, match.start()) + 1
                raise ParameterError(f"{file}:{line}: {name} {value}: a string or a number is allowed") from None
        pairs.append((name, value))
    if re.search(r"^\s*#!if", text, re.MULTILINE):
        print_error(f"{file}: its #!if lines are not evaluated, all of the file is read")
    return pairs


# ---------------------------------------------------------- call and shell ----

# What came of a command on one server: the exit status, the nodes or the JSON result, lines for stderr.
_Answer = tuple[int, Any, list[str]]


def _run(options: argparse.Namespace, words: list[str], as_json: bool) -> int:
    """Run a command as typed on all servers, print replies and errors, return the worst exit status."""
    for word in words[1:] if sys.stderr.isatty() else ():
        if re.match(r"\w+=", word) and "::" not in word:
            print_error(f"{word} is sent as a value by position; by name it is {word.replace('=', '::', 1)}")
    answers = _ask_all(options, words, as_json)
    is_one = len(answers) == 1
    found = {name: data for name, (status, data, _) in answers.items() if not status}
    if not as_json and sys.stdout.isatty():
        found = {name: nodes or "OK" for name, nodes in found.items()}
    if found:
        data = found.popitem()[1] if is_one else found
        print(end=_json_text(data, indent=4) + "\n" if as_json else escape_control_characters(_tree(data)))
    sys.stdout.flush()
    for name, (status, _, errors) in answers.items():
        for line in errors:
            print_error(line, "mi_datagram: " if status > 1 else "" if is_one else f"{name}: ")
    return max([status for status, _, _ in answers.values()])


def _ask_all(options: argparse.Namespace, words: list[str], as_json: bool) -> dict[str, _Answer]:
    """Ask all servers at once, return the answers by their names; after Ctrl-C no thread is waited for."""
    import glob

    # A pattern stands for the files that it matches now.
    names = [name for pattern in options.socket_name for name in sorted(glob.glob(pattern)) or [pattern]]
    clients = [Client(name, options.timeout, options.reply_dir) for name in dict.fromkeys(names)]
    answers: dict[str, _Answer] = {client.socket_name: (3, None, []) for client in clients}

    def ask(client: Client) -> None:
        answers[client.socket_name] = _ask(client, words, as_json)

    threads = [threading.Thread(target=ask, args=(client,), daemon=True) for client in clients]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for client in clients:
            client.close()
    return answers


def _ask(client: Client, words: list[str], as_json: bool) -> _Answer:
    """Run a command as typed on one server."""
    arguments: list[tuple[str, Any]] = []
    for word in words[1:]:
        name, value = word.split("::", 1) if "::" in word else ("", word)
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON is a string
            value = _decode_json(value) if as_json else value
        arguments.append((name, value))
    try:
        if not as_json:
            return 0, client._call(_format_request(words[0], arguments)).nodes, []
        values = [value for name, value in arguments if not name]
        return 0, client.call_json(words[0], *values, **{name: value for name, value in arguments if name}), []
    except CommandError as error:
        data = "" if error.data is None else f": {_json_text(error.data)}"
        hints = [] if words == ["which"] else _hints(client, words[0], arguments, error, as_json)
        return 1, None, [f"{error.code} {error.reason}{data}", *hints]
    except Error as error:
        return 2 if isinstance(error, RequestError) else 3, None, [str(error)]


def _hints(client: Client, command: str, arguments: list[Any], error: CommandError, as_json: bool) -> list[str]:
    """Say what would do in place of a call that was refused, as far as the server tells."""
    import difflib

    is_question = arguments and command in ("help", "which") and error.reason == "Command Not Found"
    if is_question or error.code == -32601 or error.reason == "command not available":
        command = str(arguments[0][1]) if is_question else command
        names = difflib.get_close_matches(command, _names(_ask(client, ["which"], as_json)[1], ".+"))
        return [f"did you mean {' or '.join(names)}?"] if names else []
    is_misfit = error.code == -32602 or error.reason in ("Bad parameter", "Too few or too many arguments")
    if is_misfit and command != "help":  # which is what is asked
        usages = re.findall("(?m)^Usage:: .*", _tree(_ask(client, ["help", command], as_json)[1]))
        return [line for usage in usages for line in (*_misfits(usage, arguments), usage)]
    return []


def _misfits(usage: str, arguments: list[tuple[str, Any]]) -> typing.Iterator[str]:
    """Say what does not fit one like `Usage:: command ZONE [LIMIT:int] [more::MORE:bool] [NAME::VALUE]...`."""
    usage = "".join(usage.split(" ", 2)[2:])
    words = re.findall(r"(?<!\S)(\[?)(\w+::)?(\w+)(?::(int|float|bool))?\]?(\.*)(?!\S)", usage)
    kinds = {"" if key == "NAME::" else name: kind for _, key, name, kind, _ in words}
    by_place = [(name, dots) for _, key, name, _, dots in words if not key]
    places = itertools.chain(*[itertools.repeat(name) if dots else [name] for name, dots in by_place])
    given = set()
    for name, value in arguments:
        parameter = name.upper() or next(places, None)
        given.add(parameter)
        kind = kinds.get(parameter, kinds.get("") if name else None)
        if kind is None:
            yield f"{name or value}: there is no parameter for it"
        elif kind:
            try:
                _convert({"int": int, "float": float, "bool": bool}[kind], True, value)
            except (LookupError, ValueError, OverflowError):
                yield f"{parameter}: {value} is no {kind}"
    yield from [f"{name}: missing" for bracket, _, name, *_ in words if not bracket and name not in given]


def _names(which: Any, pattern: str) -> list[str]:
    """List what PATTERN finds in what `which` gave, as far as it can be typed."""
    names = dict.fromkeys(re.findall(pattern, _tree(which)))
    return [name for name in names if name.isprintable() and name.split() == [name] and "\\" not in name]


def _tree(data: Any) -> str:
    return format_reply(data).partition(b"\n")[2].decode("utf-8", "replace")


def _json_text(data: Any, indent: int | None = None) -> str:
    """Write JSON with each character as it is where it can be shown."""
    is_ascii = not (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(data, indent=indent, ensure_ascii=is_ascii)
    return "".join([c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text])


class _Shell:
    """Reads commands line by line, from a terminal or a pipe, and runs them on the servers that OPTIONS name."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.prompt = f"{' '.join(options.socket_name)}> " if is_terminal else ""
        self.found: list[str] = []  # what TAB offers for the present text
        self.save_history: Callable[[], object] = lambda: None

    def run(self) -> int:
        """Run commands until the end, `exit` or `quit`; return the worst exit status, on a terminal 0."""
        if self.prompt:
            self.start_line_editing()
            print("`help` lists the commands, TAB completes them, `json` before one shows JSON, `exit` ends")
            for status, _, errors in _ask_all(self.options, ["which"], self.options.json).values():
                if status == 3:
                    print_error(errors[0])
        worst = max(iter(self.step, None), default=0)
        with contextlib.suppress(OSError):
            self.save_history()
        return 0 if self.prompt else worst

    def step(self) -> int | None:
        """Read and run one command; return its exit status, or None at the end."""
        import shlex

        text = ""
        try:
            while True:
                text += input("... " if text and self.prompt else self.prompt)
                try:
                    words = shlex.split(text)
                    break
                except ValueError:  # a quoted text goes on in the next line
                    text += "\n"
            if words in (["exit"], ["quit"]):
                return None
            command, as_json = self.interpret(words)
            if words and not command:
                print_error(f"{words[-1]}: which command?")
                return 2
            return _run(self.options, command, as_json) if command else 0
        except EOFError:
            if text:
                print_error("no closing quotation")
                return 2
            print(end="\n" if self.prompt else "")
            return None
        except KeyboardInterrupt:  # on a terminal it ends the line, or the waiting for a reply
            if not self.prompt:
                raise
            print()
            return 0

    def interpret(self, words: list[str]) -> tuple[list[str], bool]:
        """Return the command that WORDS call, and whether in JSON."""
        as_json = words[:1] == ["json"]
        words = words[as_json:]
        if words[:1] == ["call"]:  # also for a server's command `exit` or `json`
            words = words[1:]
        elif words:
            words = ["help" if words[0] == "?" else words[0].strip(":"), *words[1:]]
        return words, as_json or self.options.json

    def start_line_editing(self) -> None:
        """Have readline complete, and remember the lines of earlier shells, where there is readline and a history."""
        with contextlib.suppress(ImportError, OSError):
            import readline

            readline.set_completer(self.complete)
            readline.set_completer_delims(" \t\n")
            readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
            readline.set_history_length(1000)
            path = os.path.expanduser(os.environ.get("MI_DATAGRAM_HISTORY", "~/.mi_datagram_history"))
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            readline.read_history_file(path)
            self.save_history = functools.partial(readline.write_history_file, path)

    def complete(self, text: str, state: int) -> str | None:
        """Complete commands first, then the names of the command's parameters; for readline."""
        import readline

        if state == 0:
            words, as_json = self.interpret(readline.get_line_buffer()[: readline.get_begidx()].split())
            command = [] if words[:1] == ["help"] else words[:1]
            answers = _ask_all(self.options, ["which", *command], as_json).values()  # the first one will do
            pattern = ".+" if not command else r"\S+" if as_json else r"(?<!\S)(\S+)::"
            names = next((_names(which, pattern) for status, which, _ in answers if not status), [])
            self.found = [name + ("::" if command else " ") for name in names if name.startswith(text)]
        return self.found[state] if state < len(self.found) else None


# ------------------------------------------------------------- command line ----

DEFAULT_SOCKET = "./mi_datagram.sock"
SOCKET_NAMES = f"/path, ./path or udp:HOST:PORT (default {DEFAULT_SOCKET})"

# Of serving and of each subcommand: how it is written, and what it does.
USAGES = {
    "": """[-s NAME] [--load MODULE_OR_FILE[:NAME]]... [OPTION]...
        Serve commands over a UNIX datagram socket or UDP; `call --help` and `shell --help` say how to ask a server.
        The last value of an option wins, but --load and --allow_... add up; --a_b and --a-b are the same.""",
    "call": """call [-s NAME]... [--json] [--timeout MS] COMMAND [VALUE | NAME::VALUE | ::VALUE]...
        Run one command of a server and print its reply. A VALUE stands by position, NAME::VALUE by name; one with ::
        in it is written ::VALUE. Behind -- are no options. Exit with 0 for success, 1 for an error, 2 for wrong usage,
        3 for no answer, 4 if it cannot write; of several servers the worst counts.""",
    "shell": """shell [-s NAME]... [--json] [--timeout MS]
        Run commands of a server as they are typed: `help` lists them, `json` before one shows JSON, `exit` ends. The
        history is ~/.mi_datagram_history, or the file that MI_DATAGRAM_HISTORY names (empty: none).""",
}


def _open_streams() -> None:
    """Have streams where they are closed, so that no socket gets their number; escape what an encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode, closefd=False))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _parse(command: str, arguments: Iterable[str]) -> argparse.Namespace:
    """Parse the options of `call`, of `shell`, or of serving (""); --a_b and --a-b are the same option."""
    import argparse
    import shlex

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> typing.NoReturn:
            raise ParameterError(f"{message}; see `python3 -m {self.prog} --help`")

    usage, _, description = USAGES[command].partition("\n")
    prog = f"mi_datagram {command}".rstrip()
    parser = Parser(prog, f"python3 -m mi_datagram {usage}", description, allow_abbrev=False)
    add = parser.add_argument
    add("--version", action="version", version=f"mi_datagram {__version__}")
    if command:
        many = f"{SOCKET_NAMES}; several, or a quoted /path/*.sock: all are asked"
        add("-s", "--socket_name", help=many, metavar="NAME", action="append")
        add("--timeout", help="ms to wait for a reply (default %(default)s)", metavar="MS", default=SOCKET_TIMEOUT)
        add("--reply_dir", help="folder for its socket, if the server is in another network namespace", metavar="DIR")
        add("--json", help="ask in JSON-RPC 2.0, also values that are JSON, and print JSON", action="store_true")
    else:
        _add_serving(add)
    add("words", nargs="*", help=argparse.SUPPRESS)
    words = list(arguments)
    for index in range(words.index("--") if "--" in words else len(words)):
        words[index] = re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), words[index])
    options = parser.parse_intermixed_args(words)
    if command == "call" and not options.words:
        parser.error("which command? `call which` lists them")
    if command != "call" and options.words:
        line = shlex.join(options.words)
        meant = line if options.words[0] in ("call", "shell") else f"call {line}"
        raise ParameterError(f"{line}: did you mean `{meant}`?")
    if command:
        options.socket_name = options.socket_name or [DEFAULT_SOCKET]
    return options


def _add_serving(add: Callable[..., Any]) -> None:
    """Add the options of serving; `settings` are parameters and --config as (name, value), in their order."""
    meanings = {"socket_name": SOCKET_NAMES, "config": 'read the modparam("mi_datagram", ...) lines of the file VALUE'}
    meanings.update({name: _meaning(name) for name in PARAMETERS})
    many: dict[str, Any] = {"action": "append", "default": []}
    for name, meaning in meanings.items():
        names = ["-s", "--socket_name"] if name == "socket_name" else [f"--{name}"]
        add(*names, help=meaning, metavar="VALUE", type=lambda value, name=name: (name, value), dest="settings", **many)
    add("--load", help="serve its Interface mi, or NAME; several are merged", metavar="MODULE_OR_FILE[:NAME]", **many)
    add("--allow_network", help="over UDP, let in this network", metavar="NETWORK", **many)
    add("--allow_user", help="on a UNIX socket, let in this user", metavar="USER", **many)
    add("-v", "--verbose", help="log errors that commands answer; twice: everything", action="count", default=0)


def _read_config(path: str) -> list[tuple[str, Any]]:
    """Read the parameters that a configuration file has for us."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return read_modparams(file.read(), path)
    except OSError as error:
        raise ParameterError(f"config {path!a}: {error.strerror}") from None


def _load(what: str) -> Interface:
    """Import a module, or run a .py file, and return its Interface."""
    import importlib.util

    source, name = what.rsplit(":", 1) if ":" in what else (what, "mi")
    try:
        if source.endswith(".py"):
            sys.path.insert(0, os.path.dirname(os.path.abspath(source)))  # as for a script
            spec = importlib.util.spec_from_file_location(os.path.basename(source)[:-3], source)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            sys.modules[module.__name__] = module
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(source)
    except Exception as error:
        raise ParameterError(f"load {what!a}: {type(error).__name__}: {error}") from error
    interface = getattr(module, name, None)
    if isinstance(interface, Interface):
        return interface
    kind, why = type(interface), f"it has no Interface called {name}"
    if kind.__name__ == "Interface":
        why = f"its Interface is of another copy of this file, {inspect.getfile(kind)}, not of {__file__}"
    raise ParameterError(f"load {what!a}: {why}")


def _make_server(options: argparse.Namespace) -> tuple[UnixServer | UDPServer, Signals, int]:
    """Return the server, the signals that come, and the number of children."""
    given: dict[str, Any] = {}
    for option, value in options.settings:  # the last value of each counts, be it of a file
        given.update(_read_config(value) if option == "config" else {option: value})
    listening = activated_socket()
    if listening is not None:
        address = listening.getsockname()
        given["socket_name"] = address if listening.family == socket.AF_UNIX else _udp_name(address)
    is_default = "socket_name" not in given
    name = given.pop("socket_name", DEFAULT_SOCKET)
    parameters = check_parameters(given)
    children_count = parameters.pop("children_count")
    interface, *others = [_load(what) for what in options.load] or [Interface(core=())]
    for other in others:
        interface.include(other)
    interface.add_core(CORE)
    is_udp = isinstance(parse_socket_name(name), tuple)
    if options.allow_user if is_udp else options.allow_network:
        raise ParameterError("allow_network is for UDP, allow_user for a UNIX socket")
    if options.allow_user and not SO_PASSCRED:
        raise ParameterError("allow_user: this system does not tell who a peer is")
    allowed = [*options.allow_network, *options.allow_user]
    authorize = (allow_networks if is_udp else allow_users)(*allowed) if allowed else None
    signals = Signals()  # before there is a file that somebody must remove
    server = interface.server(name, authorize=authorize, listening=listening, **parameters)
    if is_default:
        print_error(f"no socket_name given, using {DEFAULT_SOCKET}")
    print_error(f"listening on {server.socket_name}")
    return server, signals, children_count


def _serve(server: UnixServer | UDPServer, signals: Signals, children_count: int, log_writer: LogWriter) -> int:
    """Serve until SIGTERM, Ctrl-C or `kill`; return the exit status."""
    if children_count > 1:
        return Supervisor(server, children_count, signals, log_writer).run()
    server.start()
    wait_for_termination(server, signals, lambda number: False)
    server.stop()
    return 0


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit status."""
    command = arguments[0] if arguments[:1] in (["call"], ["shell"]) else ""
    _open_streams()
    try:
        options = _parse(command, arguments[1:] if command else arguments)
        if command:
            return _Shell(options).run() if command == "shell" else _run(options, options.words, options.json)
        log_writer = LogWriter()
        logging.basicConfig(level=max(logging.WARNING - 10 * options.verbose, logging.DEBUG), handlers=[log_writer])
        audit.setLevel(logging.INFO)
        status = _serve(*_make_server(options), log_writer)
        for number in SIGNALS:  # one that comes while the interpreter ends is not to kill it
            signal.signal(number, signal.SIG_IGN)
        return status
    except Error as error:
        print_error(str(error))
        return 2
    except OSError as error:  # of stdout: a full disk, or `| head -1`, which is to be told nothing
        if not isinstance(error, BrokenPipeError):
            print_error(str(error))
        with contextlib.suppress(OSError):  # there may be no descriptor left
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left in its buffer
        return 4 if command else 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    # What is loaded imports this copy under the name that it was started by, which its package may have done before.
    _name = __spec__.name if __spec__ else "mi_datagram"
    _module: Any = sys.modules.setdefault(_name, sys.modules["__main__"])
    if "." in _name:
        setattr(sys.modules[_name.rpartition(".")[0]], _name.rpartition(".")[2], _module)
    sys.exit(_module.main(sys.argv[1:]))

# --------------------------------------------------------------------- 0BSD ----
#
# Permission to use, copy, modify, and/or distribute this software for any
# purpose with or without fee is hereby granted.
#
# THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH
# REGARD TO THIS SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF MERCHANTABILITY
# AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT,
# INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM
# LOSS OF USE, DATA OR PROFITS, WHETHER IN AN ACTION OF CONTRACT, NEGLIGENCE OR
# OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR
# PERFORMANCE OF THIS SOFTWARE.
