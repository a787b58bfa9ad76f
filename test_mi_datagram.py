# SPDX-License-Identifier: 0BSD
"""Tests of mi_datagram, in the order of its sections: tables first, then helpers, then section by section.

`python3 test_mi_datagram.py` runs everything on every Python there is (it fetches tox into .venv, for which Debian
needs python3-venv); `python -m pytest` runs the tests on one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_tox(arguments):
    """Run tox from an environment that the first run makes here or, if this is read-only, in the user's cache."""
    place, environment = HERE, dict(os.environ)
    if not os.access(HERE, os.W_OK):
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "mi_datagram")
    work = Path(environment.setdefault("TOX_WORK_DIR", str(place / ".tox")))
    home = place / ".venv"
    python, complete = home / "bin" / "python", home / "complete"
    if not (complete.exists() and python.exists()):  # one that is half-made is made anew
        try:
            if importlib.util.find_spec("ensurepip") is None:
                raise OSError("this Python has no ensurepip; on Debian and Ubuntu: apt install python3-venv")
            venv.create(home, clear=True, with_pip=True)
            command = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "tox"]
            subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
            complete.touch()
        except (OSError, subprocess.CalledProcessError) as error:
            shutil.rmtree(home, ignore_errors=True)
            *_, reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            print(f"no environment for tox could be made in {home}: {reason}", file=sys.stderr)
            return 2
    parallel = ["run-parallel", "--parallel", "2", "--parallel-no-spinner"]
    done = subprocess.run([python, "-m", "tox", *(arguments or parallel)], cwd=HERE, env=environment, check=False)
    for log in [] if arguments else sorted(work.glob("*/log/*.log")):  # as in parallel tox shows what fails alone
        for skipped in re.findall("(?m)^SKIPPED.*", log.read_text("utf-8", "replace")):
            print(f"{log.parts[-3]}: {skipped}")
    return done.returncode


if __name__ == "__main__":  # before pytest is needed, which a fresh machine does not have
    sys.exit(run_tox(sys.argv[1:]))

import ast
import asyncio
import contextlib
import ctypes
import dataclasses
import enum
import errno
import fcntl
import functools
import gc
import grp
import itertools
import json
import logging
import math
import pwd
import queue
import random
import resource
import select
import shlex
import signal
import socket
import stat
import statistics
import struct
import tempfile
import termios
import textwrap
import threading
import time
import types
import typing
import unittest.mock

import pytest

import mi_datagram
from mi_datagram import Client, CommandError, Interface, Node, Reply

MODULE = HERE / "mi_datagram.py"
DEADLINE = 20  # s after which what a test waits for counts as not happening
MI = (sys.executable, "-m", "mi_datagram")
# Each Python that is started here finds the module, and does not compile it anew, which takes longer than most tests.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, here and below

# ------------------------------------------------------------------ helpers ----

# A watcher with this TICK replaces nobody while a test waits, and still ends a server that was told to just before.
LONG_TICK = 1.5 * DEADLINE


def wait_until(condition, deadline=DEADLINE):
    """Wait until CONDITION() is true, and return its value; fail if it never is."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"never happened: {condition}"
        time.sleep(0.002)
    return value


def pause(seconds):
    """Let time go by that is part of what is tested."""
    time.sleep(seconds)


def interface(core=None, **parameters):
    """Make an Interface with `echo` (its arguments as sent) and `nothing`."""
    mi = Interface(core=core, **parameters)

    @mi.command(pass_request=True, read_only=True)
    def echo(request, *values, **named):
        return [Node(name or None, value) for name, value in request.arguments]

    mi.command(lambda: None, name="nothing", read_only=True)
    return mi


@pytest.fixture
def folder():
    """A short folder of its own: the path of a UNIX socket has 107 bytes at most."""
    path = tempfile.mkdtemp(prefix="mi-", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(params=["unix", "udp"])
def name(request, folder):
    """A socket_name, once for each transport."""
    return str(folder / "s") if request.param == "unix" else "udp:127.0.0.1:0"


def serving(mi, socket_name, **parameters):
    """Return a server of MI, which serves in the background in a `with` block."""
    return mi.server(str(socket_name), **parameters)


def set_deadline(sock):
    """Let sends and receives take DEADLINE, by the kernel: Python's own timeout spins, and sends nothing on PyPy."""
    sock.settimeout(None)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, TIMEVAL.pack(DEADLINE, 0))


def client_socket(server, connect=False, bind=True):
    """Make a plain socket for talking to SERVER, in no way helped by Client."""
    sock = socket.socket(getattr(server, "address_family", socket.AF_UNIX), socket.SOCK_DGRAM)
    if bind and sock.family == socket.AF_UNIX:
        sock.bind("")  # to a name of the kernel's choice
    if connect:
        sock.connect(server.server_address)
    set_deadline(sock)
    return sock


def ask(server, request, sock=None):
    """Send the bytes of one request, and return those of its reply."""
    with contextlib.nullcontext(sock) if sock else client_socket(server) as sock:
        sock.sendto(request, server.server_address)
        return sock.recv(1 << 20)


def count(server_or_interface, statistic):
    """Return a statistic of the server's own group."""
    mi = getattr(server_or_interface, "interface", server_or_interface)
    return mi.statistics[f"mi_datagram:{statistic}"]()


def run(*command, **options):
    """Run a command to its end; return the CompletedProcess, with text."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.fixture
def main(monkeypatch, capfd):
    """A function that runs the command line in this process, and returns what run() does; to serve is a failure."""

    def main(*words):
        try:
            status = mi_datagram.main([*map(str, words)])
        except SystemExit as end:  # argparse's way
            status = end.code
        return subprocess.CompletedProcess(words, status, *capfd.readouterr())

    monkeypatch.setattr(mi_datagram, "Signals", object)
    monkeypatch.setattr(mi_datagram, "_serve", lambda *_: pytest.fail("it serves"))
    monkeypatch.setattr(mi_datagram.audit, "setLevel", lambda level: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return main


@contextlib.contextmanager
def process(*arguments, command=MI, env=(), **options):
    """Run COMMAND until the block ends; give its Popen, once it listens, with the lines of its stderr as `log`."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": {**os.environ, **dict(env)}, **options}
    with subprocess.Popen([*command, *map(str, arguments)], text=True, **options) as popen:
        popen.log = []
        reader = in_thread(lambda: [popen.log.append(line) for line in popen.stderr])
        try:
            wait_until(lambda: any("listening on" in line for line in popen.log) or not reader.is_alive())
            yield popen
        finally:
            popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(DEADLINE)
            popen.kill()
            reader.join(DEADLINE)


def rpc(mi, method, params=(), answer=None):
    """Call METHOD by JSON-RPC; return the result or the error, None for no reply."""
    reply = (answer or mi.answer)(json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).encode())
    return next(value for key, value in json.loads(reply).items() if key in ("result", "error")) if reply else None


def error(code, message, data=None):
    return {"code": code, "message": message, **({"data": data} if data else {})}


# Requests of the line dialect: what follows `:echo:`, and the nodes that are echoed, or where it breaks the grammar.
RECORDED = [
    (b"a\nn::v\n", b"a\nn:: v\n"), (b"a\n\n", b"a\n"), (b"", b""), (b" \t\v\f\r\n", b""),
    (b" a \n\tb\v\f\r\n", b"a\nb\n"), (b"a\rb", b"a\\rb\n"), (b"a\n:echo:\nb", b"a\n:echo:\nb\n"),
    (b"[2001:db8::1]:5060", b"[2001:db8:: 1]:5060\n"), (b"::v", b"v\n"), (b"a::b::c", b"a:: b::c\n"),
    (b"a:::b", b"a:: :b\n"), (b"::::", b"::\n"), (b"name::\nb", b"name:: \nb\n"), (b" my name :: v ", b"my name:: v\n"),
    (b"a::1\na::2", b"a:: 1\na:: 2\n"), (b"'a b'\nit's::v", b"'a b'\nit's:: v\n"), (b'"a b"', b"a b\n"),
    (b'n:: " a b" \r', b"n::  a b\n"), (b'::"a::b"', b"a::b\n"), (b'"a\r\n\nb"', b"a\\r\\n\\nb\n"),
    (b'"a\\"b"\nc', b'a"b\nc\n'), (b'"back\\\\slash"', b"back\\\\slash\n"), (b'"back\\\\"', (0, "not closed")),
    (b"\xc3\xa9\n::\n::", (3, "neither")), (b'"n"::v', (3, "behind")), (b'"a"\x1c', (3, "behind")),
    (b'\xc3\xa9"x"', (2, "inside")), (b'a\nn::v"w"', (6, "inside")), (b'"\xc3\xa9" "y"', (4, "behind")),
    # not as the original, which refuses these, reads past their ends, or drops what follows a NUL
    (b'""\nx', b"\nx\n"), (b'n::""', b"n:: \n"), (b"name::", b"name:: \n"), (b'"\\"a"', b'"a\n'),
    (b'"a\\"b\\"c"', b'a"b"c\n'), (b"a\n\0b", b"a\n\0b\n"), (b'"a\0b"', b"a\0b\n"),
    ("jméno::žluťoučký kůň 🙂".encode(), "jméno:: žluťoučký kůň 🙂\n".encode()), (b"\xff\xc0\x80", b"\xff\xc0\x80\n"),
]  # fmt: skip
PARSE_ERROR = b"400 parse error in command\n"


def reference_reader(request):
    """Answer a request to `echo` as the grammar says it, piece by piece."""
    if not request.startswith(b":echo:\n"):
        return b"500 command not available\n"
    rest, reply = request[7:], b"200 OK\n"
    while rest:
        line = re.match(rb'[^"\n]*', rest)[0]
        mark, rest = rest[len(line) : len(line) + 1], rest[len(line) + 1 :]
        name, value = [part.strip() for part in line.split(b"::", 1)] if b"::" in line else (b"", line.strip())
        if mark == b'"':
            quoted = re.match(rb'((?:\\"|[^"\\]|\\(?!"))*)"[^\S\n]*(?:\n|\Z)', rest)
            if value or not quoted:
                return PARSE_ERROR
            value, rest = quoted[1].replace(b'\\"', b'"'), rest[quoted.end() :]
        elif not (name or value):
            if line.strip():
                return PARSE_ERROR
            continue
        node = (name and name + b":: ") + value
        reply += node.replace(b"\n", b"\\n").replace(b"\r", b"\\r") + b"\n"
    return reply


TOO_LONG = ("500 Internal server error\n", error(-32603, "Internal error"))
REFUSED = [  # what no request can carry: command, values, names; and how the refusal calls it
    ("a:b", [], {}, "'a:b'"), ("c", [" x\\"], {}, r"' x\\'"), ("c", [], {"n::m": "v"}, "'n::m'"),
    ("\ud800", [], {}, r"\ud800"), ("c", ["\udcc3\udca9"], {}, r"\udcc3"), ("c", [], {"n": "\udfff"}, r"\udfff"),
    ("c", [], {"\ud800": "v"}, r"\ud800"),
]  # fmt: skip
INVALID = '{V, "error": {"code": -32600, "message": "Invalid Request"}, "id": null}'
NOT_JSON = '{V, "error": {"code": -32700, "message": "Parse error"}, "id": null}'
SPECIFICATION = [  # the examples in section 7 of the JSON-RPC 2.0 specification; V is the version member
    ('{V, "method": "subtract", "params": [42, 23], "id": 1}', '{V, "result": 19, "id": 1}'),
    ('{V, "method": "subtract", "params": [23, 42], "id": 2}', '{V, "result": -19, "id": 2}'),
    ('{V, "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}', '{V, "result": 19, "id": 3}'),
    ('{V, "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}', '{V, "result": 19, "id": 4}'),
    ('{V, "method": "update", "params": [1,2,3,4,5]}', None), ('{V, "method": "foobar"}', None),
    ('{V, "method": "foobar", "id": "1"}', '{V, "error": {"code": -32601, "message": "Method not found"}, "id": "1"}'),
    ('{V, "method": "foobar, "params": "bar", "baz]', NOT_JSON), ('{V, "method": 1, "params": "bar"}', INVALID),
    ('[{V, "method": "sum", "params": [1,2,4], "id": "1"}, {V, "method" ]', NOT_JSON), ("[]", INVALID),
    ("[1]", f"[{INVALID}]"), ("[1,2,3]", f"[{INVALID}, {INVALID}, {INVALID}]"),
    ('[{V, "method": "sum", "params": [1,2,4], "id": "1"}, {V, "method": "notify_hello", "params": [7]},'
     ' {V, "method": "subtract", "params": [42,23], "id": "2"}, {"foo": "boo"},'
     ' {V, "method": "foo.get", "params": {"name": "myself"}, "id": "5"}, {V, "method": "get_data", "id": "9"}]',
     '[{V, "result": 7, "id": "1"}, {V, "result": 19, "id": "2"}, ' + INVALID + ', {V, "error": {"code": -32601,'
     ' "message": "Method not found"}, "id": "5"}, {V, "result": ["hello", 5], "id": "9"}]'),
    ('[{V, "method": "notify_sum", "params": [1,2,4]}, {V, "method": "notify_hello", "params": [7]}]', None),
]  # fmt: skip
CALLS = [  # of a call its members, the code of its error, 0 for a result, and the id in the answer
    *[('V,"method":"update","id":' + ident, 0, ident)
     for ident in ("1", "0", "-5", "1.5", "12345678901234567890123", '"x"', '""', '"\\u00e9"', "null")],
    *[('V,"method":"update","id":' + ident, -32600, "null") for ident in ("true", "[1]", "{}")],
    *[('V,"method":"update","id":' + ident, -32700, "null") for ident in ("1e400", "NaN", "01")],
    *[(f'V,"method":"update","params":{params},"id":1', -32600, "1") for params in ('"x"', "null", "7", "true")],
    ('V,"method":"update","result":1,"error":2,"id":1', 0, "1"), ('"method":"update","id":"x"', -32600, '"x"'),
    ('"jsonrpc":2.0,"method":"update","id":1', -32600, "1"), ('V,"id":1', -32600, "1"), ('"a":1}{', -32700, "null"),
    ('"\udcff":1', -32700, "null"), ('V,"method":"none","id":1.5', -32601, "1.5"),
]  # fmt: skip
ANSWERS = [  # what must never be answered, as it is somebody's answer already
    b"", b"2", b"200 OK\n", b"9" * 70000, b'{"result":"' + b"x" * 70000 + b'"}', b'{"error":[]}', b'[1,{"error":1}]',
    b' \r\n{"result":null}', b'[{"jsonrpc":"2.0","method":"burst","id":1},{"jsonrpc":"2.0","result":1,"id":1}]',
    b'[{"result":1}' + b',{"jsonrpc":"2.0","method":"burst","id":1}' * 100 + b"]",
]  # fmt: skip
Weird = type("Weird", (Exception,), {"__str__": lambda self: 1 / 0})
Bare = type("Bare", (CommandError,), {"__init__": lambda self: None})
Gone, Entry = type("Gone", (Reply,), {}), dataclasses.make_dataclass("Entry", [("key", str), ("ttl", object, None)])
Color = enum.Enum("Color", {"RED": "red"})
ENDLESS = []
ENDLESS.append(ENDLESS)
TREES = [  # what a command returns, or a function that makes it; its reply below `200 OK`; its result in JSON
    (None, "", "OK"), (False, "false\n", False), ({"a": Node("b", 1)}, "a:: \n\tb:: 1\n", {"a": {"b": 1}}),
    *[(one, f"{one}\n", one) for one in ("x", "", 0, 1.5, "a\u2028\v\x85b")], ([], "", []), ({}, "", {}),
    ({"a": 1, "b": None}, "a:: 1\nb:: \n", {"a": 1, "b": None}), (("x", 2), "x\n2\n", ["x", 2]),
    ({"a": {"b": [1, 2]}, "c": 3}, "a:: \n\tb:: \n\t\t1\n\t\t2\nc:: 3\n", {"a": {"b": [1, 2]}, "c": 3}),
    (Node("P", None, {"ID": 0, "PID": 7}), "P::  ID=0 PID=7\n", {"P": {"ID": 0, "PID": 7}}),
    (Node("a", 1, {"k": 2}, [Node("b", 3)]), "a:: 1 k=2\n\tb:: 3\n",
     {"a": {"value": 1, "attributes": {"k": 2}, "children": [{"b": 3}]}}),
    ({"a": Node(None, 1, {"k": 2})}, "a:: 1 k=2\n", {"a": {"value": 1, "attributes": {"k": 2}}}),
    ([Node("a", 1), Node("a", 2)], "a:: 1\na:: 2\n", [{"a": 1}, {"a": 2}]), (Reply(nodes=["x"]), "x\n", ["x"]),
    (Reply(), "", "OK"), (Reply(nodes=0), "0\n", 0), (Node(None, None, {"k\n": "\r"}), " k\\n=\\r\n", {"k\n": "\r"}),
    ({"a\nb": "c\r\nd"}, "a\\nb:: c\\r\\nd\n", {"a\nb": "c\r\nd"}), (range(2), "0\n1\n", [0, 1]),
    # what neither dialect knows by itself
    *[(one, f"{one}\n", str(one)) for one in (Path("/a"), Color.RED, 1 + 2j)],
    (lambda: (n for n in (1, 2)), "1\n2\n", [1, 2]), (types.MappingProxyType({"a": 1}), "a:: 1\n", {"a": 1}),
    ({"a": {"b": 1}.items()}, "a:: \n\t\n\t\tb\n\t\t1\n", {"a": [["b", 1]]}),
    (Entry("k"), "key:: k\nttl:: \n", {"key": "k", "ttl": None}),
    ([Entry("k", {1})], "\n\tkey:: k\n\tttl:: \n\t\t1\n", [{"key": "k", "ttl": [1]}]),
    *[(type("Odd", (kind,), {"__str__": lambda self: "odd"})(value), f"{value}\n", value)
      for kind, value in ((int, 1), (float, 0.5), (str, "a"))],
    ([b"\xc3\xa9", bytearray(b"a"), memoryview(b"b")], "é\na\nb\n", ["é", "a", "b"]),
    (lambda: {"a": (n for n in (1, 2)), Color.RED: {4}, (1, 2): [{b"k": Node(None, iter([3]), {"a": 4})}]},
     "a:: \n\t1\n\t2\nColor.RED:: \n\t4\n(1, 2):: \n\t\n\t\tk::  a=4\n\t\t\t3\n",
     {"a": [1, 2], "Color.RED": [4], "(1, 2)": [{"k": {"value": [3], "attributes": {"a": 4}}}]}),
]  # fmt: skip
NOT_FOUND, FAILED = error(-32601, "Method not found"), ("500 command failed\n", error(-32000, "Server error"))
FAILURES = [  # what a command returns or raises, its reply, its answer in JSON
    *[(kind("secret"), *FAILED) for kind in (ValueError, SystemExit, KeyboardInterrupt, MemoryError, GeneratorExit)],
    (Weird(), *FAILED), (ENDLESS, *FAILED), ([Weird()], *FAILED), (float("nan"), "200 OK\nnan\n", FAILED[1]),
    (Bare(), FAILED[0], error(500, "command failed")), (CommandError(404, "\ud800"), FAILED[0], error(404, "\ud800")),
    (CommandError(404, "x" * 70000), *TOO_LONG), (CommandError(404, "Gone", Weird()), "404 Gone\n", FAILED[1]),
    (CommandError(404, Weird()), *FAILED), (Gone(404, "Gone"), "404 Gone\n", error(404, "Gone")),
    (CommandError(404, "Not\r\nFound"), "404 Not\\r\\nFound\n", error(404, "Not\r\nFound")),
    (CommandError(404, "Gone", [7]), "404 Gone\n", error(404, "Gone", [7])),
    (Reply(404, "Gone", {"a": 1}), "404 Gone\na:: 1\n", error(404, "Gone", {"a": 1})), ("x" * 70000, *TOO_LONG),
]  # fmt: skip
SIGNATURES = [
    "", "a", "a, b='d'", "a='d', b='e'", "*rest", "a, *rest", "*rest, k='d'", "*, k", "*, k='d'", "a, /, b", "a, /",
    "**names", "a, **names", "a, /, **names", "a='d', /, **names", "a, b='d', *rest, k, **names", "self='d'",
]  # fmt: skip
GIVEN = [{}, *map(dict.fromkeys, ("a", "b", "k", "ab", "ba", "bk", ["self", "a"], ["request"]))]
BAD = "refused"
CONVERSIONS = [  # annotation, what is sent, a text in both dialects and anything else in JSON, what the command gets
    *[("int", sent, int(sent)) for sent in (42, -7, 0, 10**30, "42", "-7", 5.0)],
    *[("int", sent, BAD) for sent in ("x", "1_0", "", "5.0", 1.5, True, None, [1], {"a": 1})],
    *[("float", sent, float(sent)) for sent in (1.5, 2, "2", "1.5", "-1e3")],
    *[("float", sent, BAD) for sent in ("x", "1_0", "", "inf", "nan", "1e999", "9" * 60_000, 10**400, True, None, [])],
    *[("bool", sent, True) for sent in ("true", "yes", "on", "1", "YES", True, 1, 1.0)],
    *[("bool", sent, False) for sent in ("false", "no", "off", "0", False, 0)],
    *[("bool", sent, BAD) for sent in ("x", "2", "", 2, 0.5, None, [])],
    *[("str", sent, str(sent)) for sent in ("5", "", "a b", 5, 1.5, -7)],
    *[("str", sent, BAD) for sent in (True, None, [], {})],
    *[(kind, sent, got) for kind in ("Optional[int]", "typing.Union[int, None]", "int | None", "None|int",
     "'int | None'", "Optional['int']", "typing.Annotated[Optional[int], 'ms']")
     for sent, got in (("5", 5), (5, 5), (5.0, 5), ("", None), (None, None), ("x", BAD), (True, BAD), ([], BAD))],
    *[("Optional[str]", sent, got) for sent, got in (("", ""), ("5", "5"), (5, "5"), (None, None), (True, BAD))],
    *[(kind, sent, sent) for kind in ("list", "Unknown", "Optional[Unknown]", "int | str", "typing.List[int]",
     "typing.Any") for sent in ("5", "", 5, True, None, [1, {"a": None}])],
]  # fmt: skip
COUNTED = {  # what counts a request of each dialect, or the command and the value that do in both
    "parse_errors": (b":echo:\n::\n", b"{"), "invalid_requests": (b":\n", b"{}"),
    "too_long_requests": (b":echo:\n" + b"x" * 70000, b'{"method":' + b" " * 70000 + b"}"),
    "unknown_commands": ("none", 1), "ambiguous_commands": ("same", 1), "bad_arguments": ("nothing", 1),
    "bad_parameters": ("give", "x"), "command_errors": ("give", 404), "failed_commands": ("give", -1),
    "too_long_replies": ("give", 70000),
}  # fmt: skip
CORE = [
    "arg", "clear_statistics", "debug", "get_statistics", "help", "kill", "list_statistics", "log_level", "ps", "pwd",
    "reset_all_statistics", "reset_statistics", "threads", "uptime", "version", "which",
]  # fmt: skip
NOW, SINCE = time.ctime(9999), time.ctime(8998)
CORE_REPLIES = [  # core commands in the line dialect, and their replies as the original has them
    ("uptime:\n", rf"Now:: {NOW}\nUp since:: {SINCE}\nUp time:: 1000 \[sec\]\n"),
    ("version:\n", r"Server:: probe \(1\.2\)\n"), ("pwd:\n", rf"WD:: {re.escape(os.getcwd())}\n"),
    ("ps:\n", rf"Process::  ID=0 PID={os.getpid()} Type=[^\n]+\nProcess::  ID=2 PID=7 Type=child\n"),
    ("arg:\n", "".join([re.escape(argument) + "\n" for argument in sys.argv])), ("debug:\n", r"DEBUG:: 0\n"),
    ("log_level:\n", r"Log level:: 1\n"), ("kill:\n", ""), ("help:\nsize\n", "Usage:: size\n"),
    ("which:\n", "".join([f"{command}\n" for command in sorted([*CORE, "flush", "size"])])),
    ("which:\nflush\n", "flush zone::\nflush zone:: limit::\n"), ("which:\ncache:\n", "size\n"),
    ("help:\n", r"(.*\n)*flush:: Drop the entries of ZONE\.\n(.*\n)*size:: \n(.*\n)*"),
    ("help:\nflush\n", r"Usage:: flush ZONE \[LIMIT:int\]\nHelp:: \n\tDrop the .+\n\t\n\tAt most LIMIT.\n"),
    ("get_statistics:\nall\n", r"(\w+:\w+:: \d+\n)+"), ("threads:\n", r"(Thread:: [^\n]+\n(\t[^\n]+:\d+ [^\n]+\n)+)+"),
    ("get_statistics:\nsize\nnone\nhits\n", "cache:size:: 7\ncache:hits:: 3\nother:hits:: 1\n"),
    ("clear_statistics:\ncache:hits\n", "cache:hits:: 3\n"), ("reset_statistics:\nother:\n", ""),
    ("get_statistics:\ncache:\nother:\n", "cache:hits:: 0\ncache:size:: 7\nother:hits:: 0\n"),
    ("list_statistics:\ncache:\n", "cache:hits:: incremental\ncache:size:: non-incremental\n"),
]  # fmt: skip
BAD_PARAMS, CHILD, GONE = (-32602, "Invalid params"), {"ID": 2, "PID": 7, "Type": "child"}, error(404, ".+ Not Found")
BAD_LEVEL = error(*BAD_PARAMS, "Bad type for parameter 'level'")
BAD_NUMBER = error(*BAD_PARAMS, "Too few or too many parameters")
CWD, ARGUMENTS, BOTH = re.escape(os.getcwd()), [*map(re.escape, sys.argv)], {"cache:size": 7, "other:hits": 1}
SHAPES = [  # names of a command, its params, the answer, of texts a pattern, as OpenSIPS 4 and Kamailio 5 have it
    ("uptime core:uptime", [], {"Now": NOW, "Up since": SINCE, "Up time": r"1000 \[sec\]"}),
    ("pwd core:pwd", [], {"WD": CWD}), ("version core:version", {}, {"Server": r"probe \(1\.2\)"}),
    ("version core.version", ["a", "b"], BAD_NUMBER), ("get_statistics reset", [], BAD_NUMBER),
    ("arg core:arg core.arg", [], ARGUMENTS), ("debug core:debug", [], {"DEBUG": 0}), ("which", ["none:"], GONE),
    ("ps core:ps", [], {"Processes": [{"ID": 0, "PID": os.getpid(), "Type": ".+"}, CHILD]}),
    ("log_level core:log_level", [], {"Log level": 1}), ("which core:which", ["log_level"], [[], ["level"]]),
    *[("log_level debug", [level], BAD_LEVEL) for level in ("x", 5, -6)], ("which", ["cache:"], ["cache:size"]),
    ("which", {"command": "kill"}, [[]]), ("which", ["list"], [[], ["statistics"]]), ("which", ["take"], [[], ["k"]]),
    ("which", ["statistics:"], [f"statistics:{name}" for name in ("clear", "get", "list", "reset", "reset_all")]),
    ("help core:help", ["uptime"], {"Help": "Tell the time.*", "Exported by": "core", "Usage": "uptime"}),
    ("help", {"mi_cmd": "statistics:get"}, {"Help": ".+", "Exported by": "statistics", "Usage": "get_statistics .+"}),
    ("help", {"command": "size"}, {"Help": "", "Exported by": "cache", "Usage": "cache:size"}),
    ("help", ["flush"], {"Help": "D(.*\n)+At most L.+", "Exported by": "probe", "Usage": r"flush ZONE \[LIMIT:int\]"}),
    *[("get_statistics statistics:get", params, BOTH)
     for params in ({"statistics": ["size", "other:"]}, [["size", "other:"]], ["size", "other:"])],
    ("get_statistics", {"statistics": []}, error(*BAD_PARAMS, "Empty array in parameter 'statistics'")),
    ("get_statistics list", [["none", "", "none:", "cache", "cache:hit"]], GONE),
    ("list_statistics list", [["cache:"]], {"cache:hits": "incremental", "cache:size": "non-incremental"}),
    ("reset_statistics reset", {"statistics": ["cache:"]}, "OK"), ("get", ["hits"], {"cache:hits": 0, "other:hits": 1}),
    ("clear_statistics", ["other:"], {"other:hits": 1}), ("reset_all_statistics reset_all", [], "OK"),
    ("which help", ["none"], GONE), ("kill core:kill", [], "OK"), ("core.version", [], r"probe \(1\.2\)"),
    ("core.uptime", [], {"now": NOW, "up_since": SINCE, "uptime": 1000}), ("core.pwd", [], [CWD]),
    ("core.psx", [], [{"IDX": 0, "PID": os.getpid(), "DSC": ".+"}, {"IDX": 2, "PID": 7, "DSC": "child"}]),
    ("system.methodHelp", ["ps"], "List the .+"), ("system.methodHelp", [], error(400, "Method Name Expected")),
    ("system.methodHelp", ["none"], error(400, "command not found")), ("stats.get_statistics", ["none"], []),
    ("system.methodHelp", ["core.uptime"], "Tell the time.+"), ("stats.fetch stats.fetchn", ["none"], {}),
    ("system.listMethods", [], [
        "cache:size", "core.arg", "core.psx", "core.pwd", "core.uptime", "core.version", "flush", "stats.fetch",
        "stats.fetchn", "stats.get_statistics", "system.listMethods", "system.methodHelp", "take"]),
    ("stats.get_statistics", ["cache:", "other:hits"], ["cache:hits = 0", "cache:size = 7", "other:hits = 0"]),
    ("stats.get_statistics stats.fetch stats.fetchn", [], error(400, "Please provide which stats to retrieve")),
    ("stats.fetch", ["size"], {"cache.size": "7"}), ("stats.fetchn", ["size"], {"cache.size": 7}),
    ("core.ps core:none system: :ps core psx", [], NOT_FOUND),
]  # fmt: skip
FORBIDDEN = [  # what a peer may not ask, and the command that `authorize` hears of, call by call
    (b":nothing:\n", ["nothing"]), (b":nothing:\n::\n", ["nothing"]), (b":nothing:\ntoo many\n", ["nothing"]),
    (b"nonsense", [""]), (b":none:\n", ["none"]), (b":burst:\n", ["burst"]), (b":echo:\n" + b"x" * 65451, [""]),
    (b"{", [""]), (b'{"jsonrpc":"2.0","method":"none","id":1}', ["none"]), (b"[{}" + b",{}" * 64 + b"]", [""]),
    (b'[{"jsonrpc":"2.0","method":"nothing","id":1},7]', ["nothing", ""]),
]  # fmt: skip
QUIET = """
import logging, os, signal, sys, threading, warnings
def state():
    umask = os.umask(0o22)
    os.umask(umask)
    return (os.listdir("/dev/fd"), threading.enumerate(), [signal.getsignal(n) for n in signal.valid_signals()], umask,
            os.getcwd(), logging.root.handlers[:], logging.root.level, warnings.filters[:], os.environ.copy())
before = state()
import mi_datagram
assert state() == before
assert not {"argparse", "asyncio", "readline", "cmd"} & set(sys.modules)
"""
ELSEWHERE = """
import os, select, signal, socket, sys
sys.modules.update(fcntl=None, grp=None, pwd=None, readline=None)
for name in "AF_UNIX SO_PASSCRED MSG_DONTWAIT CMSG_LEN SCM_RIGHTS".split():
    vars(socket).pop(name, None)  # PyPy lacks some
del os.fork, os.getuid, select.poll, signal.pthread_sigmask
import mi_datagram
assert mi_datagram.Interface().answer(b":pwd:\\n").startswith(b"200 OK\\nWD:: ")
for arguments, status in (["-s", "./s"], 2), (["-s", "udp:127.0.0.1:0"], 2), (["call", "-s", "./s", "uptime"], 3):
    said = []
    mi_datagram.print_error = lambda text, prefix="": said.append(text)
    assert mi_datagram.main(arguments) == status and "this system" in said[-1]
"""


@pytest.mark.parametrize("code", [QUIET, ELSEWHERE], ids=["quiet", "elsewhere"])
def test_import(code):
    """Importing starts, opens, changes and says nothing, needs no UNIX, and leaves argparse to the command line."""
    done = run(sys.executable, "-W", "error", "-c", code)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_the_house():
    """All is small, nothing above sending knows sockets, and a method reads once what another thread may take away."""
    text = MODULE.read_text("utf-8")
    taken_away = {"_Threads": ("_threads", "current"), "Request": ("_call",), "Client": ("_socket",)}
    nodes, above = [*ast.walk(ast.parse(text))], text[: text.index(" sending ----")]
    sockets = [node.lineno for node in nodes if getattr(node, "id", "") in ("socket", "socketserver")]
    assert "\nclass LeaderFollowers:" in above and min(sockets) > above.count("\n")
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = sorted([(node.end_lineno - node.lineno + 1, node.name) for node in functions])
    assert lengths[-1][0] <= 40 and lengths[len(lengths) // 2][0] <= 8, lengths[-1]
    for node in [node for node in nodes if isinstance(node, ast.ClassDef)]:
        own = [getattr(one, "id", "") for line in node.body for one in getattr(line, "targets", ())]
        own += [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
        own += [one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store)
                and getattr(one.value, "id", "") == "self"]
        assert len({*own}) <= 15 and node.end_lineno - node.lineno < 250, node.name
        attributes = taken_away.pop(node.name, ())
        for method in node.body if attributes else ():
            read = [one.attr for one in ast.walk(method) if getattr(one, "attr", "") in attributes
                    and isinstance(one.ctx, ast.Load)]
            assert len(read) == len({*read}), f"{node.name}.{method.name}"
    assert max(map(len, text.splitlines())) <= 120 and not taken_away


# ------------------------------------------------------------------ the line dialect ----


def test_requests_are_read_as_recorded_and_as_the_grammar_says():
    """Whatever stands together in a request is read as the reference reader does, which reads what is recorded so."""
    mi, rng = interface(), random.Random(3)
    replies = {b":echo:\n" + sent: PARSE_ERROR if type(shown) is tuple else b"200 OK\n" + shown
               for sent, shown in RECORDED}
    assert replies == {request: reference_reader(request) for request in replies}
    assert not any([mi.answer(reply) for reply in replies.values()])  # as they are somebody's answer
    pieces = (b"a", b":", b"::", b'"', b'\\"', b" ", b"\n", b"\r")
    bodies = [b"".join(body) for count in range(5) for body in itertools.product(pieces, repeat=count)]
    bodies += [b"".join(rng.choices(pieces, k=rng.randrange(5, 14))) for _ in range(2_000)]
    places = (b"?", b"a?b", b"?a", b"a?", b"n::?v", b"n::v?", b"?n::v", b"n?::v", b'"?"', b'n:: "?"', b'?"a"', b'"a"?')
    bodies += [place.replace(b"?", bytes([byte])) for byte in range(256) for place in places]
    parts, right = (b":", b"echo", b"\n", b" ", b"\r", b"\0", b"x"), (b":", b"echo", b":", b"\n")
    heads = [b":" + b"".join(head) for head in itertools.product(parts, repeat=3)]
    heads += [b"".join([*right[:place], part, *right[place:]]) for place in range(5) for part in parts]
    heads += [*[part + b"echo:\n" for part in parts], b":ECHO:\n", b":\xe9cho:\n", b"\xef\xbb\xbf:echo:\n"]
    for request in [*heads, *[b":echo:\n" + body for body in bodies]]:
        replies[request] = reference_reader(request)
    answers = [(request, reply, mi.answer(request)) for request, reply in replies.items()]
    assert not [answer for answer in answers if answer[1] != answer[2]]


def test_errors_say_what_is_wrong_and_where(caplog):
    """A breach of the grammar is logged with its byte and `400` for the peer; format_request names what it refuses."""
    for sent, (position, what) in [row for row in RECORDED if type(row[1]) is tuple]:
        with pytest.raises(mi_datagram.RequestError, match=what) as caught:
            mi_datagram.parse_request(b":echo:\n" + sent)
        assert caught.value.position == position + 7 and interface(core=[]).answer(b":echo:\n" + sent) == PARSE_ERROR
        assert re.search(rf"{what}.* at byte {position + 7}'", caplog.records[-1].getMessage())
    for first_line in (b":a:b:\n", b":a\nb:\n", b"::\n", b"a:\n", b":a"):
        with pytest.raises(mi_datagram.RequestError, match="first line"):
            mi_datagram.parse_request(first_line)
    for command, values, named, culprit in REFUSED:
        with pytest.raises(mi_datagram.RequestError, match=re.escape(culprit)):
            mi_datagram.format_request(command, *values, **named)


def random_text(rng, alphabet):
    return "".join(rng.choices(alphabet, k=rng.randrange(6)))


def test_requests_come_back_from_their_bytes():
    """What the grammar can carry comes back from parse_request(format_request(...)), and nothing else is written."""
    rng, refused, needs_quotes = random.Random(1), 0, r"(?s)[ \t\n\v\f\r].*|.*[ \t\n\v\f\r]|.*[\n\"].*"
    for _ in range(2_000):
        command, *texts = [random_text(rng, "ab:\\\"\n\r \t\x0b\0,'é\x85\udcff") for _ in range(5)]
        values, named = texts[: rng.randrange(3)], {name or "n": value for name, value in zip(texts[3:], texts[2:])}
        impossible = not re.fullmatch("[^:\n]+", command)  # or a value that ends its quotes, or a name that needs some
        quoted = [value for value in [*values, *named.values()] if re.fullmatch(needs_quotes, value)]
        impossible |= any(value.endswith("\\") for value in quoted)
        impossible |= any(re.fullmatch(needs_quotes, name) or re.search(r"::|:\Z", name) for name in named)
        request, back = mi_datagram.Request(command, [*[("", value) for value in values], *named.items()]), None
        with contextlib.suppress(mi_datagram.RequestError):
            back = mi_datagram.parse_request(mi_datagram.format_request(command, *values, **named))
        assert back == (None if impossible else request)
        refused += impossible
    assert 200 < refused < 1_800


def test_replies_come_back_from_their_bytes():
    """parse_reply(format_reply(...)) gives back code, reason, depths, names and values, at any indent."""
    rng = random.Random(2)

    def text():
        return rng.choice("ab\0é") + random_text(rng, 'ab: \t\0"é\x0b\x85\u2028\udcff').replace(":: ", "")

    def tree(depth):
        count = rng.randrange(4) if depth < 4 else 0
        return [Node(rng.choice([text(), None]), text(), {}, tree(depth + 1)) for _ in range(count)]

    for _ in range(400):
        reply = Reply(rng.randrange(100, 1000), random_text(rng, "ab :é\udcff"), tree(0))
        data = mi_datagram.format_reply(reply, rng.choice(["\t", " ", "   ", "\t\t"]))
        assert mi_datagram.parse_reply(data) == mi_datagram.parse_reply(data + b"\n") == reply  # as OpenSIPS closes it


@pytest.mark.parametrize("part", ['"', '\\"', "::", " ", "\n", '""\n', '"\n', 'a::"\n"\n', "a\n", "[", '{"a":', '"",'])
def test_time_grows_with_the_size_alone(part):
    """Eight times the bytes take about eight times as long in every reader, and not 64 times."""
    read_request, read_reply, answer = mi_datagram.parse_request, mi_datagram.parse_reply, interface().answer

    def cpu_time(size):
        before, data = time.thread_time(), (part * (size // len(part))).encode()
        for read, head in (read_request, b":c:\n"), (read_request, b':c:\n"'), (read_reply, b"200\n"), (answer, b"["):
            with contextlib.suppress(mi_datagram.RequestError):
                read(head + data)
        return time.thread_time() - before

    small = max(0.0002, min([cpu_time(3_000) for _ in "123"]))
    assert any(cpu_time(24_000) < 30 * small for _ in "123")


# ------------------------------------------------- the JSON-RPC 2.0 dialect ----


def test_json_is_read_as_the_specification_says():
    """Each of its examples is answered as printed there, compact, ids come back as sent, and no answer is answered."""
    mi, version, numbers = Interface(core=[]), '"jsonrpc":"2.0"', []
    mi.command(lambda minuend, subtrahend: minuend - subtrahend, name="subtract")
    mi.command(lambda *numbers: sum(numbers), name="sum")
    mi.command(lambda: ["hello", 5], name="get_data")
    mi.command(lambda: numbers.append(1), name="burst")
    for name in ("update", "notify_sum", "notify_hello"):
        mi.command(lambda *values: None, name=name)
    for request, reply in SPECIFICATION:
        answer = mi.answer(request.replace("V", version).encode())
        assert answer == (reply and json.dumps(json.loads(reply.replace("V", version)), separators=(",", ":")).encode())
        assert answer is None or mi.answer(answer) is None
    for members, code, ident in CALLS:
        reply = mi.answer((" \n{" + members.replace("V", version) + "}").encode("utf-8", "surrogateescape")).decode()
        assert reply.endswith(f',"id":{ident}}}') and json.loads(reply).get("error", {}).get("code", 0) == code, members
    before = count(mi, "not_requests")
    assert [mi.answer(answer) for answer in ANSWERS] == [None] * len(ANSWERS) and not numbers
    assert count(mi, "not_requests") == before + len(ANSWERS)


def test_deep_and_huge_json_gets_an_answer():
    """A value nested to the allowed depth, or a number, comes back; deeper is a parse error, on a small stack too."""
    mi, call, replies = interface(core=[]), b'{"jsonrpc":"2.0","id":1,"method":"echo","params":[%b]}', []
    for value in (b"1", b'"%b"' % (b"[]" * 500), b'"%b"' % (b'\\"[' * 300)):
        for depth, code in ((198, None), (199, -32700)):  # object and params are two more
            reply = json.loads(mi.answer(call % (b"[" * depth + value + b"]" * depth)))
            assert reply.get("error", {}).get("code") == code
    for digits in (100, 4300, 4301, 60_000):
        reply = mi.answer(call % (b"9" * digits))
        assert b"9" * digits in reply or (digits > 4300 and b'"error"' in reply)
    before, requests = threading.stack_size(256 * 1024), (b"[" * 60_000, b'{"a":' * 12_000, b'["[[", ' + b"[" * 9000)
    try:
        in_thread(lambda: replies.extend(map(mi.answer, requests))).join(DEADLINE)
    finally:
        threading.stack_size(before)
    assert len(replies) == 3 and all(b"-32700" in reply for reply in replies)


def test_batches_and_notifications():
    """Up to 64 calls run and are answered in order, of more none; without an id a call runs and is never answered."""
    mi, calls = interface(core=[]), []
    mi.command(lambda n: calls.append(n), name="tick")
    mi.command(lambda length: "x" * length, name="fill")

    def batch(method, values):
        made = [{"jsonrpc": "2.0", "method": method, "params": [n], "id": n} for n in values]
        return json.loads(mi.answer(json.dumps(made).encode()))

    assert [answer["id"] for answer in batch("tick", range(64))] == calls == list(range(64))
    assert batch("tick", range(65))["error"]["code"] == -32600 and len(calls) == 64
    assert len(batch("fill", [30000, 30001])) == 2 and batch("fill", [40000, 40001])["error"] == TOO_LONG[1]
    for call in ('"tick","params":["x"]', '"tick","params":{"n":"y"}', '"tick"', '"none"', '"fill","params":["x"]'):
        assert mi.answer(f'{{"jsonrpc":"2.0","method":{call}}}'.encode()) is None
    assert calls[64:] == ["x", "y"]


@pytest.mark.parametrize("limit", [100, 65457])
@pytest.mark.parametrize("request_, reply, too_long, too_much", [
    (":%s:\n%s", "200 OK\n%s\n", "400 request too long\n", "500 Internal server error\n"),
    ('{"jsonrpc":"2.0","method":"%s","params":["%s"],"id":7}', '{"jsonrpc":"2.0","result":"%s","id":7}',
     '{"jsonrpc":"2.0","error":{"code":-32600,"message":"Invalid Request"},"id":null}',
     '{"jsonrpc":"2.0","error":{"code":-32603,"message":"Internal error"},"id":7}'),
], ids=["line", "json"])  # fmt: skip
def test_limit_of_size(name, request_, reply, too_long, too_much, limit, caplog):
    """Requests and replies of socket_buf_size bytes pass whole; of one more none is run, and none is sent."""
    mi, sizes = interface(), []
    mi.command(lambda text: sizes.append(len(text)) or "", name="size")
    mi.command(lambda length: "x" * int(length), name="fill")
    most, room = limit - len(request_ % ("size", "")), limit - len(reply % "")
    with serving(mi, name, socket_buf_size=limit) as server:
        calls = ("size", "x" * most), ("size", "x" * (most + 1)), ("fill", room), ("fill", room + 1)
        replies = [ask(server, (request_ % call).encode()).decode() for call in calls]
    assert replies == [reply % "", too_long, reply % ("x" * room), too_much] and sizes == [most]
    assert any(str(limit + 1) in line and str(limit) in line for line in caplog.text.splitlines())


# ------------------------------------------------------------------- commands ----


def taker(signature, prefix="", **options):
    """Make an Interface with a command `take(SIGNATURE)`, and the list of what it gets, call by call."""
    names = {"got": [], "typing": typing, "Optional": typing.Optional}
    exec(compile(f"{prefix}\ndef take({signature}): got.append(locals())", "taker", "exec", dont_inherit=True), names)
    mi = Interface(core=[])
    mi.command(names["take"], **options)
    return mi, names["got"]


def test_what_a_command_returns_or_raises_becomes_the_reply(folder, monkeypatch, caplog):
    """A result is lines, each node one, and data in JSON; of a failure peers hear that, the log has what can be had."""
    mi, rows = interface(), [(result, "200 OK\n" + line, data) for result, line, data in TREES] + FAILURES

    @mi.command
    def give(row: int):
        result = rows[row][0]
        if isinstance(result, BaseException):
            raise result
        return result() if callable(result) else result

    with monkeypatch.context() as patch:  # no descriptor is left, so no traceback can be made
        patch.setattr("traceback.format_exception", lambda *_: os.open("/no/such/file", os.O_RDONLY))
        assert mi.answer(b":give:\n%d" % len(TREES)) == FAILED[0].encode() and "| ValueError: secret" in caplog.text
    with serving(mi, folder / "s") as server, client_socket(server) as sock:
        for number, (result, line, data) in enumerate(rows):
            assert ask(server, b":give:\n%d" % number, sock).decode("utf-8", "surrogateescape") == line, result
            assert rpc(mi, "give", [number], lambda request: ask(server, request, sock)) == data, result
    assert "Traceback" in caplog.text and " in give" in caplog.text and count(mi, "handler_errors") == 0


@pytest.mark.parametrize("first", ["", "request, "])
def test_arguments_bind_as_in_a_python_call(first):
    """Values bind by position and by name in both dialects, beside a Request or not; else it is refused and not run."""
    peer = mi_datagram.Peer(("127.0.0.1", 5))
    for signature in SIGNATURES:
        (mi, calls), (plain, expected) = taker(first + signature, pass_request=bool(first)), taker(signature)
        for values, names in itertools.product(("", "x", "xy", "xyz"), GIVEN):
            named = {name: f"of {name}" for name in names}
            calls.clear(), expected.clear()
            if not (first and "request" in named and "/" not in signature):  # no peer can name that one
                with contextlib.suppress(TypeError):
                    plain.commands["take"].function(*values, **named)
            replies = [mi.answer(mi_datagram.format_request("take", *values, **named), peer) for _ in "12"]
            assert replies == [b"200 OK\n" if expected else b"400 Too few or too many arguments\n"] * 2
            if not (values and named):
                reason = "Named parameters do not match" if named else "Too few or too many parameters"
                result = rpc(mi, "take", named or [*values], lambda data: mi.answer(data, peer))  # noqa: B023
                assert result == ("OK" if expected else error(*BAD_PARAMS, reason))
            sent = [*[("", value) for value in values], *named.items()]
            for call, dialect in zip(calls if first else (), ("line", "line", "json")):
                assert call.pop("request") == mi_datagram.Request("take", sent, peer, dialect)
            assert calls == expected * len(calls) and bool(calls) == bool(expected), (signature, values, named)


@pytest.mark.parametrize("prefix", ["", "from __future__ import annotations"])
def test_annotations_convert(prefix):
    """int, float, bool, str and Optional of them convert a text, and JSON data that stands for one; others pass all."""
    cached_taker = functools.lru_cache(maxsize=None)(taker)
    for annotation, sent, got in CONVERSIONS:
        since = (3, 14) if "Unknown" in annotation else (3, 10) if "|" in annotation else ()
        if not prefix and sys.version_info < since:
            continue  # Python cannot evaluate it
        mi, calls = cached_taker(f"a: {annotation}, b: int", prefix)
        calls.clear()
        expected = [error(*BAD_PARAMS, "Bad type for parameter 'a'") if got is BAD else "OK"] * 2
        replies = [rpc(mi, "take", params) for params in ([sent, "7"], {"a": sent, "b": 7.0})]
        if isinstance(sent, str):
            requests = mi_datagram.format_request("take", sent, 7), mi_datagram.format_request("take", a=sent, b=7)
            replies += map(mi.answer, requests)
            expected += [b"400 Bad parameter\n" if got is BAD else b"200 OK\n"] * 2
        assert replies == expected and repr(calls) == repr([{"a": got, "b": 7}] * len(calls)), (annotation, sent)
        assert len(calls) == (0 if got is BAD else len(replies))


def test_annotations_of_odd_parameters():
    """A text is read at registration where the function was made; a name is for one value, a star's holds for each."""
    mi, calls = taker("a: 'Kind'", "Kind = int")
    take = mi.commands["take"].function
    decorated = functools.wraps(take)(lambda *values: take(*values))
    mi.command(functools.partial(decorated), name="part")
    take.__globals__["Kind"], take.__annotations__["a"] = bool, "bool"
    assert mi.answer(b":take:\n5\n") == mi.answer(b":part:\n5\n") == b"200 OK\n" and calls == [{"a": 5}] * 2
    assert mi.commands["part"].doc == ""  # and not the one of partial
    part = functools.partial(decorated)
    part.__doc__ = "Its own."
    mi.command(part, name="told")
    assert mi.commands["told"].doc == "Its own."
    mi, calls = taker("a: str = 'd', /, *b: int, k: int = 0, **c: bool")
    for arguments in ("k::1\nk::2", "v\nx", "x::7", "v\na::7"):
        assert mi.answer(f":take:\n{arguments}\n".encode())[:3] == b"400"
    assert mi.answer(b":take:\nx::no\nx::yes\nv\n1\n2\n") == mi.answer(b":take:\na::no\nk::3\n") == b"200 OK\n"
    assert calls == [{"a": "v", "b": (1, 2), "k": 0, "c": {"x": True}}, {"a": "d", "b": (), "k": 3, "c": {"a": False}}]


def test_registering_commands():
    """A function stays itself, a name is taken once unless replaced, and only what was registered is a command."""
    mi, pong = interface(), lambda: "pong"
    assert mi.command(pong, name="pong") is mi.command(name="other")(pong) is pong
    assert mi.command(pong, name="pwd", replace=True) is pong
    assert mi.answer(b":pong:\n") == mi.answer(b":other:\n") == mi.answer(b":pwd:\n") == b"200 OK\npong\n"
    assert interface(core=["debug", "which"]).answer(b":which:\n") == b"200 OK\ndebug\necho\nnothing\nwhich\n"
    for wrong in ("echo", "a:b:c", ":a", "a:", "a\nb", "\ud800"):
        with pytest.raises(ValueError, match="replace=True" if wrong == "echo" else "GROUP:NAME is allowed"):
            mi.command(pong, name=wrong)
    with pytest.raises(ValueError, match="allowed are"):
        Interface(core=["rm"])
    for command in ("none", "Echo", "echo ", "echo.__class__", "__init__", "answer", "kill", "{0}", "%s"):
        assert mi.answer(f':{command}:\n"x\n'.encode()) == b"500 command not available\n"  # wins over bad arguments
        assert rpc(mi, command, [[]]) == NOT_FOUND


def test_groups_of_commands_and_merged_interfaces():
    """JSON calls `group:name`, both dialects `name` where no other has it; what is merged is the program's own."""
    mi, other = Interface(core=["ps", "pwd", "list_statistics", "help"]), Interface()

    def add(*names, to=mi, says=None):
        for name in names:
            to.command(lambda text=says or name: text, name=name, replace=True)

    def called(name):
        return mi.answer(f":{name}:\n".encode()).decode()[7:-1], rpc(mi, name)

    ambiguous = -32001, "Method ambiguous"
    add("a:flush", "a:list", "a:ps")
    assert called("flush") == ("a:flush", "a:flush") and rpc(mi, "a:flush") == "a:flush"
    assert called("list") == ("a:list", error(*ambiguous, "supported names: a:list, statistics:list"))  # in JSON alone
    assert rpc(mi, "which") == NOT_FOUND and rpc(mi, "ps") == rpc(mi, "core:ps") != rpc(mi, "a:ps") == "a:ps"
    add("b:flush", "pwd", to=other)
    other.counter("cache:hits").add(5)
    mi.include(other)
    with pytest.raises(ValueError, match="command name"):
        mi.include(other)
    assert mi.statistics["cache:hits"]() == 5
    for says in ("b:flush", "new"):
        assert rpc(mi, "b:flush") == says and mi.answer(b":flush:\n") == b"500 command not available\n"
        assert rpc(mi, "flush") == rpc(mi, "help", ["flush"]) == error(*ambiguous, "supported names: a:flush, b:flush")
        add("b:flush", says="new")
    add("flush", "core.psx", "list_statistics")
    assert called("flush") == ("flush", "flush") and rpc(mi, "core.psx") == "core.psx"
    assert rpc(mi, "statistics:list") == NOT_FOUND and rpc(mi, "list") == "a:list"  # the core's is replaced
    mi.add_core(["which", "pwd"])
    here = ["core.psx", "flush", "help", "list", "list_statistics", "ps", "pwd", "which"]
    assert called("pwd") == ("pwd", "pwd") and mi.answer(b":which:\n").decode().split("\n")[1:-1] == here
    whole = ["a:flush", "a:list", "a:ps", "b:flush", "core.psx", "core:help", "core:ps", "core:which"]
    assert rpc(mi, "which") == [*whole, *here[1:]]


# ----------------------------------------------------- deferred and async replies ----


def later():
    """Make an Interface with the command `later`, and the list of its Deferreds."""
    mi, deferred = interface(), []

    @mi.command(pass_request=True)
    def later(request, timeout: float = 60_000):
        deferred.append(request.defer(timeout))
        return deferred[-1]

    return mi, deferred


@pytest.mark.parametrize("told, then, act, line, data", [  # what the Deferred is told, what the command does then
    ("", None, lambda deferred: deferred.reply({"a": 1}), b"200 OK\na:: 1\n", {"a": 1}),
    ("", None, lambda deferred: deferred.reply(), b"200 OK\n", "OK"),
    ("", None, lambda deferred: deferred.fail(404, "No"), b"404 No\n", error(404, "No")),
    ("", None, lambda deferred: deferred.reply("x" * 70000), TOO_LONG[0].encode(), TOO_LONG[1]),
    *[(told, then, lambda deferred: deferred.reply("late"), line, data) for told, then, line, data in (
        *[("first", then, b"200 OK\nfirst\n", "first") for then in (None, "second", ValueError())],
        ("", CommandError(404, "No"), b"404 No\n", error(404, "No")),
        ("", type("Odd", (list,), {"__eq__": lambda *_: 1 / 0})(["x"]), b"200 OK\nx\n", ["x"]),  # as an array compares
    )],
])  # fmt: skip
def test_one_answer_to_one_request(told, then, act, line, data):
    """Whatever a command and four threads do with a Deferred, a request has one answer, and its batch is complete."""
    mi, sent, kept, answered = interface(), [], [], []

    @mi.command(pass_request=True)
    def odd(request):
        kept.append(request.defer())
        if told:
            kept[-1].reply(told)
            request.defer()
        if isinstance(then, Exception):
            raise then
        return kept[-1] if then is None else then

    call = b'{"jsonrpc":"2.0","method":"%s","id":%d}'
    batch = b"[%s,%s]" % (call % (b"odd", 1), call % (b"nothing", 2))
    for request in (b":odd:\n", batch, b'{"jsonrpc":"2.0","method":"odd"}'):
        sent.append(mi.answer(request, send=sent.append))
        for thread in [in_thread(lambda: answered.append(act(kept[-1]))) for _ in range(4)]:
            thread.join(DEADLINE)
    reply, answers = [reply for reply in sent if reply]  # and none for the notification
    assert reply == line and [list(answer.values())[1] for answer in json.loads(answers)] == [data, "OK"]
    assert answered.count(True) == (0 if told or then else 3) and len(answered) == 12
    assert count(mi, "dropped_deferred") == 0 and count(mi, "failed_commands") == 3 * isinstance(then, ValueError)


def test_a_deferred_that_nobody_answers_is_dropped(name, caplog, threads):
    """After its timeout, or when its server stops, it is dropped, logged and counted, whatever sending raises then."""
    (mi, deferred), call = later(), b'{"jsonrpc":"2.0","method":"%s","params":[%s],"id":1}'
    batch = b"[%s,%s]" % (call % (b"later", b"30"), call % (b"echo", b"5"))
    with FaultySocket(name) as listening, holding(name, mi=mi, listening=listening) as (server, other, _):
        with client_socket(server) as sock:
            listening.sending.append(MemoryError())
            send(server, sock, batch)
            wait_until(lambda: not listening.sending)
            send(server, sock, b":later:\n30\n")
            assert ask(server, batch, sock) == b'[{"jsonrpc":"2.0","result":[5],"id":1}]'  # without what was dropped
            wait_until(lambda: count(mi, "dropped_deferred") == 3)
            send(server, sock, b":later:\n")
            wait_until(lambda: len(deferred) == 4)
            server.drain_time, start = 0.05, time.monotonic()
            server.stop()  # which waits for it so long, and no longer for the command that runs
            assert 0.05 <= time.monotonic() - start < DEADLINE / 4
            assert [one.reply() for one in deferred] == [False] * 4 and is_empty(sock) and is_empty(other)
    assert count(mi, "dropped_deferred") == caplog.text.count("'later' from") == 4
    wait_until(lambda: not threads())


def test_deferrals_that_are_refused(monkeypatch):
    """Nothing is deferred without a request, after it, for no time, or beyond the limit; another's is no answer."""
    limit = mi_datagram.MAX_OPEN
    monkeypatch.setattr(mi_datagram, "MAX_OPEN", 5)
    (mi, deferreds), requests = later(), [mi_datagram.Request("change")]
    mi.command(lambda request: requests.append(request) or deferreds[0], name="thief", pass_request=True)
    mi.command(lambda: deferreds[0], name="other_thief")
    mi.command(lambda request: request.defer() and None, name="forget", pass_request=True)
    assert mi.answer(b":later:\n1000\n") is None
    for refused in (b":thief:\n", b":other_thief:\n", b":later:\n-1\n"):
        assert mi.answer(refused) == b"500 command failed\n"
    assert deferreds[0].drop() and len(requests) == 2
    for request, timeout in itertools.product(requests, (5, math.inf, math.nan)):
        with pytest.raises(mi_datagram.Error, match="nobody waits" if timeout == 5 else "finite"):
            request.defer(timeout)
    replies = [[mi.answer(request) for _ in range(6)] for request in (b":later:\n0\n", b":forget:\n", b":later:\n")]
    assert replies == [[None] * 6, [b"200 OK\n"] * 6, [None] * 5 + [b"500 Too many open requests\n"]]
    assert rpc(mi, "later") == error(-32000, "Too many open requests") and count(mi, "too_many_open") == 2
    assert limit == 1000 and deferreds[-1].reply() and mi.answer(b":later:\n") is None


def test_async_commands(name):
    """They bind, run on the given loop, answer, fail and defer as others do; what is cancelled is dropped."""
    loop, bad = asyncio.new_event_loop(), error(*BAD_PARAMS, "Bad type for parameter 'request'")
    mi = interface(loop=loop)

    @mi.command(pass_request=True)
    async def divide(me, request: int, how: str = "return"):
        await asyncio.sleep(0.01)  # until the server has turned to other requests
        assert asyncio.get_running_loop() is loop
        if how == "defer":
            loop.call_later(0.01, me.defer().reply, 1)
            return me.defer()
        if how == "steal":
            return mi_datagram.Deferred(None)
        if how != "return":
            raise {"refuse": CommandError(404, "No"), "exit": SystemExit("no"), "end": asyncio.CancelledError()}[how]
        return {me.dialect: 10 / request}

    @mi.command
    async def end(request):
        server.stop()  # returns at once
        return request, server.socket.fileno() > 0

    def create_cancelled(loop, coroutine, **options):  # before its first step
        task = asyncio.Task(coroutine, loop=loop, **options)
        task.cancel()
        return task

    def talk():
        for text, params, reply, data in (
            ("4", [4], b"200 OK\nline:: 2.5\n", {"json": 2.5}),
            ("request::4", {"request": 4}, b"200 OK\nline:: 2.5\n", {"json": 2.5}),
            ("x", ["x"], b"400 Bad parameter\n", bad), ("0", [0], FAILED[0].encode(), FAILED[1]),
            *[(f"4\n{how}", [4, how], FAILED[0].encode(), FAILED[1]) for how in ("exit", "steal")],
            ("4\nrefuse", [4, "refuse"], b"404 No\n", error(404, "No")), ("4\ndefer", [4, "defer"], b"200 OK\n1\n", 1),
        ):  # fmt: skip
            assert ask(server, f":divide:\n{text}".encode(), sock) == reply
            assert rpc(mi, "divide", params, lambda request: ask(server, request, sock)) == data
        for dropped, factory in enumerate([None, create_cancelled], 1):
            loop.set_task_factory(factory)
            send(server, sock, b":divide:\n%d\nend" % dropped)  # one equal to the last may be taken for that
            wait_until(lambda: count(mi, "dropped_deferred") == dropped)  # noqa: B023
        loop.set_task_factory(None)
        assert ask(server, b":end:\nrequest::bye\n", sock) == b"200 OK\nbye\ntrue\n"
        wait_until(lambda: server.socket.fileno() < 0)

    with contextlib.closing(loop), serving(mi, name) as server, client_socket(server) as sock:
        loop.run_until_complete(asyncio.to_thread(talk))


def test_async_replies_that_cannot_be_sent(caplog):
    """The log tells what is raised by whoever sends a late reply, and of a coroutine that a decorator leaves alone."""
    loop = asyncio.new_event_loop()
    mi = interface(loop=loop)

    @mi.command
    async def late():
        pass

    loop.call_soon(mi.answer, b":late:\n", None, lambda reply: loop.stop() or 1 / 0)
    with contextlib.closing(loop):
        loop.run_forever()
    assert "ZeroDivisionError" in caplog.text
    mi.command(lambda: late(), name="hidden")
    assert (mi.answer(b":hidden:\n").decode(), rpc(mi, "hidden")) == FAILED and caplog.text.count(".late was not") == 2


@pytest.mark.parametrize("raised, statuses", [(None, [0]), (ValueError, [1]), (KeyboardInterrupt, [])])
def test_async_command_in_a_forked_process(raised, statuses, monkeypatch):
    """A process that it forked ends without a reply, whatever it does there; Ctrl-C, the user's, ends the loop."""
    loop, ended, sent = asyncio.new_event_loop(), [], []
    service = mi_datagram.Service(Interface(), loop=loop)
    monkeypatch.setattr(os, "_exit", ended.append)
    loop.set_exception_handler(lambda *_: None)  # nobody fetches the exception that ends the loop

    @service.interface.command
    async def fork():
        loop.call_soon(loop.stop)
        service.is_forked = True
        if raised:
            raise raised

    loop.call_soon(mi_datagram.Exchange(service, None, sent.append).answer, b":fork:\n")
    with contextlib.closing(loop), pytest.raises(KeyboardInterrupt) if not statuses else contextlib.nullcontext():
        loop.run_forever()
    assert ended[:1] == statuses and not sent


# ------------------------------------------------------------- core commands ----


@pytest.fixture
def probe(monkeypatch):
    """An Interface with all the core commands, two of its own, and statistics; it kills nobody, its clock stands."""
    mi = Interface("probe", "1.2", core=CORE, logger=logging.Logger("probe", logging.WARNING))
    mi.processes = lambda: [(os.getpid(), "main process"), (0, "not running"), (7, "child")]
    mi.killed, now = [], mi.started + 1000.5
    monkeypatch.setattr(os, "kill", lambda *signal: mi.killed.append(signal))
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "time", lambda: 9999)  # long ago, as somebody has set the clock

    @mi.command
    def flush(zone: str, limit: int = 0):
        """Drop the entries of ZONE.

        At most LIMIT.
        """

    mi.command(lambda: None, name="cache:size")
    mi.counter("cache:hits").add(3)
    mi.statistic("cache:size", lambda: 7)
    mi.counter("other:hits").add()
    return mi


def fits(pattern, value):
    """Whether VALUE is as PATTERN says, in which texts are regular expressions."""
    if type(pattern) is not type(value):
        return False
    if isinstance(pattern, dict):
        return [*pattern] == [*value] and all(map(fits, pattern.values(), value.values()))
    if isinstance(pattern, list):
        return len(pattern) == len(value) and all(map(fits, pattern, value))
    return pattern == value or (isinstance(pattern, str) and re.fullmatch(pattern, value))


def test_core_commands_answer_as_the_original(probe):
    """In the line dialect core commands keep the format that other programs read."""
    answers = [(request, reply, probe.answer(b":" + request.encode()).decode()) for request, reply in CORE_REPLIES]
    assert not [answer for answer in answers if not re.fullmatch("200 OK\n" + answer[1], answer[2])]
    assert probe.killed == [(os.getpid(), signal.SIGTERM)]


def test_core_commands_answer_as_opensips_and_kamailio(probe):
    """In JSON core commands have the names, parameters and forms that the clients of both know."""
    probe.command(lambda a, /, *b, k=1, **c: None, name="take")
    calls = [(name, params, shape) for names, params, shape in SHAPES for name in names.split()]
    answers = [(name, params, shape, rpc(probe, name, params)) for name, params, shape in calls]
    assert not [answer for answer in answers if not fits(answer[2], answer[3])]
    assert probe.killed == [(os.getpid(), signal.SIGTERM)] * 2
    for method in (b"ps", b"uptime", b"which"):  # of whose replies an exporter and a Ruby client read so much
        assert len(probe.answer(b'{"jsonrpc":"2.0","method":"%b","id":1}' % method)) <= 1500
    names, kamailio = {*rpc(probe, "which")}, {name for name in rpc(probe, "system.listMethods") if "." in name}
    assert not kamailio & names and {*CORE, "core:ps", "statistics:get", "size", "cache:size"} <= names
    assert {*CORE} - {*Interface().commands} == {"kill", "arg", "debug", "log_level"}


def test_core_commands_under_other_names():
    """What a program left out or replaced has no name at all; `authorize` hears the registered name under any."""
    for mi in (Interface(core=["pwd"]), Interface()):
        for name in CORE[:-1]:
            mi.command(lambda: "ours", name=name, replace=True)
        for alias in ("core:arg", "core.arg", "core.psx", "system.methodHelp", "stats.fetch", "statistics:get", "list"):
            assert rpc(mi, alias) == NOT_FOUND
    mi, heard = Interface(core=()), []
    mi.command(lambda: "ours", name="statistics:get")
    mi.add_core(CORE)
    assert rpc(mi, "statistics:get") == rpc(mi, "get") == "ours"
    service = mi_datagram.Service(mi, authorize=lambda peer, command: heard.append(command) or True)
    for name in ("ps", "core:ps", "core.psx", "list", "none"):
        assert rpc(mi, name, answer=mi_datagram.Exchange(service, None, None).answer)
    assert heard == ["ps", "ps", "ps", "list_statistics", "none"]


def test_threads_tells_where_each_thread_stands(monkeypatch):
    """`threads` answers while the main thread hangs, and of many threads, with the innermost lines and no variable."""
    go_on, replies = threading.Event(), []

    def stuck(password, deep=100):
        stuck(password, deep - 1) if deep else go_on.wait(DEADLINE)

    in_thread(stuck, "secret").name = "waits\nhere"
    in_thread(lambda: replies.append(interface().answer(b":threads:\n").decode())).join(DEADLINE)
    go_on.set()
    for name, function in ((r"waits\\nhere", "stuck"), ("MainThread", "test_threads_tells_where_each_thread_stands")):
        assert re.search(rf"\nThread:: {name}\n(\t.*\n)*\t{re.escape(__file__)}:\d+ {function}\n", replies[0])
    assert "secret" not in replies[0] and 1 < replies[0].count(" stuck\n") < 20
    for many in (60, 100, 250, 5000):
        found = dict.fromkeys([*range(1, many), threading.get_ident()], sys._getframe())
        monkeypatch.setattr(sys, "_current_frames", found.copy)
        shown = rpc(interface(), "threads")
        assert shown[0]["Thread"]["value"] == "MainThread" and len(shown) == min(many, 251)
        assert (many > 250) == (shown[-1] == {"Threads": f"{many - 250} more"})
        assert len(interface().answer(b":threads:\n")) > len(shown) * 50


@pytest.mark.parametrize("command, lowest, highest", [("debug", -5, 3), ("log_level", -3, 4)])
def test_levels_of_the_log(probe, command, lowest, highest):
    """`debug` and `log_level` show and set the level of the Interface's logger, as the original and OpenSIPS count."""
    levels = []
    for level in range(lowest, highest + 1):
        assert [[*rpc(probe, command, params).values()] for params in ([level], [])] == [[level], [level]]
        levels.append(probe.logger.level)
    assert levels == sorted(levels, reverse=True) and Interface().logger is logging.getLogger()
    assert levels[-2:] == [logging.INFO, logging.DEBUG] and {logging.WARNING, logging.ERROR} <= {*levels}


def test_statistics_are_asked_for(probe):
    """`all` has the server's own group too; what has no value or fails is left out, and a truth value is a number."""
    everything = rpc(probe, "get_statistics", ["all"])
    assert {"cache:hits": 3, "cache:size": 7}.items() <= everything.items() and everything["mi_datagram:requests"] == 1
    stack = {"size": [9, 8], "full": [False, True], "none": [None, ""], "nan": [math.nan, math.inf], "fails": []}
    for name, values in stack.items():
        probe.statistic(f"stack:{name}", iter(values).__next__)
    for values in ((9, 0), (8, 1)):
        assert probe.answer(b":get_statistics:\nstack:\n") == b"200 OK\nstack:size:: %d\nstack:full:: %d\n" % values
    assert probe.answer(b":get_statistics:\nstack:\n") == b"200 OK\n" and rpc(probe, "stats.fetch", ["stack:"]) == {}
    for wrong in ("cache:size", "nogroup", ":x", "x:"):
        with pytest.raises(ValueError, match="statistic name"):
            probe.statistic(wrong, int)


def test_counters_made_by_several_threads(switching):
    """Threads that mention a counter for the first time at once have the same one, and its readers no error."""
    mi = interface()

    def count_all():
        for number in range(400):
            mi.counter(f"made:c{number}").add()

    threads = [in_thread(count_all) for _ in range(3)]
    while any([thread.is_alive() for thread in threads]):
        assert mi.answer(b":get_statistics:\nall\n").startswith(b"200")
    assert all([mi.statistics[f"made:c{number}"]() == 3 for number in range(400)])


def test_counter_that_is_held():
    """A forked process and a signal handler count, though a thread of the parent, or their own, is at that counter."""
    counter, held, go = interface().counter("cache:hits"), threading.Event(), threading.Event()
    counter._ones = iter(lambda: held.set() or go.wait(DEADLINE), None)
    reader = in_thread(counter)
    assert held.wait(DEADLINE)
    child = os.fork()
    if not child:
        signal.alarm(DEADLINE)  # which ends it
        counter.add()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    go.set()
    reader.join()
    counter._ones = iter(lambda: counter.add() or 7, None)  # as a signal handler does between two steps
    reader = in_thread(counter)
    reader.join(DEADLINE)
    assert not reader.is_alive() and counter._others == -1


@pytest.mark.parametrize("statistic", COUNTED)
def test_each_kind_of_error_is_counted(statistic):
    """An error counts as one of its kind and as nothing else, in both dialects."""
    mi, (one, other) = interface(), COUNTED[statistic]

    def give(size: int):
        if size == 404:
            raise CommandError(404, "Not Found")
        return "x" * size if size >= 0 else 1 / 0

    for name in ("give", "a:same", "b:same"):
        mi.command(give, name=name)
    if isinstance(one, str):
        assert mi.answer(mi_datagram.format_request(one, other)) and rpc(mi, one, [other])["code"]
    else:
        assert mi.answer(one) and mi.answer(other)
    counts = {kind: count(mi, kind) for kind in (*COUNTED, "requests", "replies", "forbidden", "not_requests")}
    assert {kind: number for kind, number in counts.items() if number} == {"requests": 2, statistic: 2}


# ------------------------------------------------------- access, and the log of it ----


def test_ready_made_rules():
    """Networks let in UDP peers, IPv4 mapped into IPv6 as IPv4; users let in whom the kernel names; others stay out."""
    rules = mi_datagram.allow_networks("10.0.0.0/8", "::1", "fe80::/10"), mi_datagram.allow_users(ME, "root")
    addresses = ["10.1.2.3", "::ffff:10.1.2.3", "::1", "fe80::1%lo", "11.0.0.1", "::ffff:11.0.0.1", "::2", "127.0.0.1"]
    peers = [mi_datagram.Peer((host, 5)) for host in addresses]
    peers += [mi_datagram.Peer("10.1.2.3", struct.pack("iII", 1, uid, 0)) for uid in (0, ME, ME + 1)]
    peers += [mi_datagram.Peer(address) for address in (b"\0x", None)]
    allowed = [[rule(peer, "echo") for peer in peers] for rule in rules]
    assert allowed == [[True] * 4 + [False] * 9, [False] * 8 + [True] * 2 + [False] * 3]
    for make, wrong in ((mi_datagram.allow_networks, "10.0.0.0/33"), (mi_datagram.allow_users, "no such user")):
        with pytest.raises(ValueError, match=wrong):
            make(wrong)


def test_refusals(name, caplog):
    """`authorize` is asked once a call, before lookup and binding; UNIX peers hear 403, UDP peers nothing."""
    asked, silent, replies = [], name.startswith("udp:"), [answer for answer in ANSWERS if len(answer) < 65_000]

    def authorize(peer, command):
        asked.append(command)
        return command == "echo" or (command == "burst" and 1 / 0)

    with serving(interface(), name, authorize=authorize) as server, client_socket(server) as sock:
        for request, commands in FORBIDDEN:
            asked.clear()
            send(server, sock, request)
            wait_until(lambda: asked == commands)  # noqa: B023
            answers = b"" if silent else sock.recv(10_000)
            assert answers.count(b"403") == answers.count(b"Forbidden") == (0 if silent else len(commands))
        send(server, sock, *replies)  # as if another server had sent them
        refused = sum([len(commands) for _, commands in FORBIDDEN])
        wait_until(lambda: (count(server, "forbidden"), count(server, "not_requests")) == (refused, len(replies)))
        assert 0 < caplog.text.count("forbidden") <= refused and is_empty(sock)
        calls = [{"jsonrpc": "2.0", "method": m, "id": m} for m in ("nothing", "echo")]
        outcomes = [a.get("error", a.get("result")) for a in json.loads(ask(server, json.dumps(calls).encode(), sock))]
        assert outcomes == ([[]] if silent else [error(403, "Forbidden"), []])


def test_audit(name, caplog):
    """One line for each command that may change something, with the command and its peer, and `debug` lowers it not."""
    caplog.set_level(logging.INFO)  # of the logger that `debug` sets, through which the audit goes
    caplog.set_level(logging.NOTSET, "mi_datagram.audit")  # and again when the test has ended
    mi = interface(core=["debug", "reset_all_statistics"])
    mi.command(lambda: None, name="a\rb")
    calls = [{"jsonrpc": "2.0", "method": m, "id": 1} for m in ("echo", "a\rb", "a\rb", "none", "statistics:reset_all")]
    with serving(mi, name) as server, client_socket(server, connect=True) as sock:
        for request in (b":debug:\n-1\n", b":a\rb:\n", b":echo:\n", json.dumps(calls).encode()):
            ask(server, request, sock)
        peer = str(sock.getsockname()[1] if name.startswith("udp:") else os.getpid())
    lines = [record.getMessage() for record in caplog.records if record.name == "mi_datagram.audit"]
    assert [line.split("'")[1] for line in lines] == ["debug", *[r"a\rb"] * 3, "reset_all_statistics"]
    assert all(peer in line and line.isprintable() for line in lines)


def test_no_peer_forges_a_line_in_the_log(caplog):
    """Whatever a peer sends, no line of the log begins with it or is as long, and control characters are escaped."""
    caplog.set_level(logging.DEBUG, "mi_datagram")
    mi, evil = interface(), "\nFORGED\r\x1b[2J\x85\u2028%s{0}"

    @mi.command
    def burst(text, number: int = 0):
        raise ValueError(text) if number else CommandError(404, text, text)

    for method, params in [*[("burst", params) for params in ([evil], [evil, 1], ["", evil], {evil: 1})], (evil, [])]:
        assert rpc(mi, method, params)["code"]
        assert mi.answer(f':{method}:\n{evil}::"{evil}"\n"{evil}"'.encode())[:1] in b"45"
    for request in ('{"' + evil, evil, f':burst:\n"{evil}', f':burst:\n"{evil}"\n', f':burst:\n"{evil}"\n1\n'):
        assert mi.answer(request.encode())
    name, service = "x" * 10_000, mi_datagram.Service(mi, authorize=lambda peer, command: 1 / 0)
    call = json.dumps({"jsonrpc": "2.0", "method": name, "id": 1})
    for request in (f":{name}:\n", call, f"[{call}]", f":burst:\n{name}\n1\n"):
        assert mi.answer(request.encode()) and mi_datagram.Exchange(service, None, None).answer(request.encode())
    assert len(caplog.records) > 20
    lines = "\n".join([logging.Formatter().format(record) for record in caplog.records]).split("\n")
    assert all(line.isprintable() and not line.startswith("FORGED") and len(line) < 1000 for line in lines)


def test_program_without_logging_or_docstrings():
    """What set up no logging still sees on stderr that a command failed; without docstrings `help` has the usage."""
    code = "import mi_datagram; mi = mi_datagram.Interface(); mi.command(lambda: 1 / 0, name='fails')"
    done = run(sys.executable, "-OO", "-c", code + "; print(mi.answer(b':fails:\\n'), mi.answer(b':help:\\nps\\n'))")
    assert done.stdout == "b'500 command failed\\n' b'200 OK\\nUsage:: ps\\n'\n" and "ZeroDivisionError" in done.stderr


# --------------------------------------------------- servers: tables and helpers ----

NO_DIGITS = "9" * 5000  # more than int() reads
WRONG_ACCOUNTS = ("no such one", "", "a\0b", -1, 1.5, True, 2**32 - 1, "\u00b2", NO_DIGITS)
WRONG_VALUES = {
    "socket_name": (
        None, 5, b"/x", "", "x", "/", "/a\0b", "/\ud800", "/" + "a" * 200, "/no/such/folder/s", "/dev/null/s", "udp:h",
        "udp::8080", "udp:h:", "udp:h:-1", "udp:[::1]:70000", "udp:h:\u0663", f"udp:h:{NO_DIGITS}", "udp:a..b:1"),
    "children_count": (0, -1, 1.0, None, 2), "unix_socket_mode": ("09", "rw", "", 660, -1, 0o1000, 6.0, True, None),
    "unix_socket_user": WRONG_ACCOUNTS, "unix_socket_group": WRONG_ACCOUNTS,
    "socket_timeout": (-1, 1.5, "x", "", True, None, [], NO_DIGITS), "socket_buf_size": (0, -1, 2**30, "64 k", None),
    "reply_indent": ("\n", 4, None), "pretty_printing": ("maybe", 2, None), "max_threads": (0, -1, "x", None),
    "trace_destination": ("x",),
    "authorize": (asyncio.sleep, type("Late", (), {"__call__": asyncio.sleep})()),  # they would let in everybody
}  # fmt: skip
DEFAULTS = {
    "children_count": 1, "unix_socket_mode": 0o660, "unix_socket_user": None, "unix_socket_group": None,
    "socket_timeout": 2000, "reply_indent": "\t", "socket_buf_size": 65457, "pretty_printing": False, "max_threads": 64,
}  # fmt: skip
HAS_IPV6 = os.path.exists("/proc/net/if_inet6") and "00000001 " in Path("/proc/net/if_inet6").read_text()
IS_ROOT = os.geteuid() == 0
QUEUE = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())  # datagrams that wait for one reader
TIMEVAL = struct.Struct("@qq" if getattr(socket, "SO_SNDTIMEO", 0) == 67 else "@ll")  # of SO_SNDTIMEO, SO_RCVTIMEO
FOREVER = DEADLINE * 10_000  # ms that no test waits


def bound_socket(path, kind=socket.SOCK_DGRAM):
    """Make a UNIX socket, alive as long as it is open."""
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    return sock


def dead_socket(path):
    """Leave a socket file that nobody listens on."""
    bound_socket(path).close()


OBSTACLES = {  # each makes something at a path, with the help of a neighbour, and may give a socket to be kept
    "a file": lambda path, other: path.write_text("kept"), "a folder": lambda path, other: path.mkdir(),
    "a pipe": lambda path, other: os.mkfifo(path), "a symlink to nothing": lambda path, other: path.symlink_to(other),
    "a symlink to a dead socket": lambda path, other: (dead_socket(other), path.symlink_to(other)),
    "a live socket": lambda path, other: bound_socket(path),
    "a live stream socket": lambda path, other: bound_socket(path, socket.SOCK_STREAM),
}


def contents(folder):
    """Describe all files of a folder, so that any change shows."""
    return {path.name: (path.lstat()[:7], path.lstat().st_mtime_ns) for path in folder.iterdir()}


class FaultySocket(socket.socket):
    """A server's socket, bound to NAME: what its next sendings and receivings raise; s that each sending takes more."""

    def __init__(self, name):
        super().__init__(socket.AF_UNIX if "/" in name else socket.AF_INET, socket.SOCK_DGRAM)
        self.bind(name if "/" in name else ("127.0.0.1", 0))
        self.sending, self.receiving, self.lingers = [], [], 0


for _method in ("sendto", "sendmsg", "recvfrom_into", "recvmsg_into"):
    def _call(self, *arguments, method=_method, is_sending="send" in _method):
        errors = self.sending if is_sending else self.receiving
        if errors:
            raise errors.pop(0)
        done = getattr(super(FaultySocket, self), method)(*arguments)
        pause(self.lingers * is_sending)
        return done
    setattr(FaultySocket, _method, _call)


def send(server, sock, *requests):
    """Send requests to SERVER, and wait for no reply."""
    for request in requests:
        sock.sendto(request, server.server_address)


def receive(sock, number=1):
    """Receive so many replies."""
    return [sock.recv(1 << 20) for _ in range(number)]


def blocking(mi=None):
    """Have an Interface, or MI, with a command `block`; return it, the list of its runs, and what lets them go on."""
    mi, runs, go = mi or interface(), [], threading.Event()

    @mi.command(read_only=True)
    def block(which: str = ""):
        runs.append(which)
        assert go.wait(DEADLINE)
        return which or "done"

    return mi, runs, go


@contextlib.contextmanager
def holding(socket_name, many=1, mi=None, **parameters):
    """Serve while MANY calls of `block` of one client run; give server, client, and what lets the calls go on."""
    mi, runs, go = blocking(mi)
    with serving(mi, socket_name, **parameters) as server, client_socket(server) as sock:
        send(server, sock, *[b":block:\n%d\n" % number for number in range(many)])
        wait_until(lambda: len(runs) == many)
        try:
            yield server, sock, go
        finally:
            go.set()


def counted(server):
    """Add up what became of every reply."""
    kinds = "replies", "dropped_unread", "dropped_gone", "dropped_denied", "dropped_errors"
    return sum([count(server, kind) for kind in kinds])


def is_empty(sock):
    """Whether no datagram waits to be read."""
    return not select.select([sock], [], [], 0)[0]


@pytest.fixture
def switching():
    """Have Python switch threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def threads():
    """Give a function that lists the threads started since."""
    before = threading.enumerate()
    return lambda: [thread for thread in threading.enumerate() if thread not in before]


def in_thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    return thread.start() or thread


def become_nobody():
    """Take from this thread what root may do to files."""
    if IS_ROOT:
        ctypes.CDLL(None).setfsuid(65534)


def try_server(made, path, **parameters):
    """Make a server, and add it to MADE, or the error."""
    try:
        made.append(interface().server(str(path), **parameters))
    except mi_datagram.SocketError as error:
        made.append(error)


def meanwhile(function, act, after=False):
    """Have ACT called just before the next call of FUNCTION, one of `os`, or just AFTER it."""
    real = getattr(os, function)

    def call(*arguments, **named):
        setattr(os, function, real)
        result = after and real(*arguments, **named)
        act()
        return result if after else real(*arguments, **named)

    return unittest.mock.patch.object(os, function, call)


@contextlib.contextmanager
def no_descriptors():
    """Have the system give this process no more descriptors."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def refusing_threads(monkeypatch, numbers):
    """Have the start of a thread fail where its number, from 0, is in NUMBERS."""
    count, start = itertools.count(), threading.Thread.start

    def count_and_start(thread):
        if next(count) in numbers:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", count_and_start)


def derived(name, **methods):
    """Make a server, of the class for NAME with METHODS put in, of the usual commands."""
    base = mi_datagram.UDPServer if name.startswith("udp:") else mi_datagram.UnixServer
    return type("Server", (base,), methods)(name, interface())


# ------------------------------------------------------------- turn-taking, with made-up work ----


class MadeUp:
    """Functions in a queue are the items that a LeaderFollowers takes until the block ends; an error there is raised.

    `item` makes one that notes something in `ran`; `held` is one that notes "held", and waits for `go`.
    """

    def __init__(self, max_workers=4, urgent=(), **callables):
        self.queue, self.ran, self.told, self.acts = [], [], [], []
        self.news, self.polling, self.go = queue.SimpleQueue(), threading.Lock(), threading.Event()
        work = mi_datagram.Work(**{
            "receive": self.receive, "handle": lambda item: item(), "size": lambda item: 1, "poll": self.poll,
            "wake": lambda: self.news.put("the end"), "is_urgent": lambda item: item in urgent,
            "stalled": lambda: self.told.append("stalled"), "failed": lambda kind, error: self.told.append(kind),
            **callables})  # fmt: skip
        self.turns = mi_datagram.LeaderFollowers(work, max_workers)

    def receive(self):
        item = self.queue.pop(0) if self.queue else BlockingIOError()
        if isinstance(item, Exception):
            raise item
        return item

    def poll(self):
        assert self.polling.acquire(blocking=False)  # one at a time
        if self.news.get() == "the end":
            self.news.put("the end")  # from now on nobody waits
        self.polling.release()

    def put(self, *items):
        self.queue.extend(items)
        self.news.put("items")

    def item(self, note):
        return lambda: self.ran.append(note)

    def held(self):
        self.ran.append("held")
        assert self.go.wait(DEADLINE)
        self.turns.yield_lead()  # which changes nothing where another one leads

    def act(self):
        self.acts.append(1)
        return math.inf

    def is_asleep(self):
        """Whether the watcher sleeps."""
        self.acts.clear()
        pause(5 * mi_datagram.TICK)
        return not self.acts

    def is_over(self):
        return self.turns.is_ending() and self.turns.is_done()

    def __enter__(self):
        assert self.turns.start()
        self.watcher = in_thread(self.turns.watch, self.act, self.is_over)
        wait_until(lambda: self.polling.locked() or self.turns.is_ending())
        self.told.clear()  # on a busy machine a leader that just began may be replaced
        return self

    def __exit__(self, *_):
        self.turns.shutdown(1000)
        self.go.set()
        self.watcher.join(DEADLINE)
        assert self.is_over() and not self.watcher.is_alive()
        wait_until(lambda: not workers())


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "mi_datagram worker"]


def test_items_stay_on_one_thread():
    """One worker handles them all as long as it is in another one whenever the watcher looks."""
    def act():
        number = len(made.ran)
        if made.queue:
            next_one.release()
            wait_until(lambda: len(made.ran) > number)
        return math.inf

    def item():
        made.ran.append(threading.get_ident())
        assert next_one.acquire(timeout=DEADLINE)

    made, next_one = MadeUp(), threading.Semaphore(0)
    made.act = act
    with made:
        made.put(*[functools.partial(item) for _ in range(20)], made.item("last"))
        wait_until(lambda: made.ran[-1:] == ["last"])
        assert len({*made.ran}) == 2 and not made.told


@pytest.mark.parametrize("before, sleeps", [(0, False), (3, False), (0, True)])
def test_leader_that_stalls_is_replaced(before, sleeps):
    """A leader that is in one item for a TICK, the first, the last, or one after the watcher slept, holds up nobody."""
    with MadeUp() as made:
        if sleeps:
            wait_until(made.is_asleep)
            made.turns.wake_watcher()
            wait_until(lambda: len(made.acts) > 1)  # it does not fall asleep again at once
            wait_until(made.is_asleep)
        assert not made.told  # one that polls is not replaced
        made.put(*[made.item("before")] * before, lambda: made.turns.wake_watcher() or made.held())
        wait_until(lambda: "stalled" in made.told)
        made.put(made.item("next"))
        wait_until(lambda: sorted(made.ran) == ["before"] * before + ["held", "next"])


def test_each_item_has_a_whole_tick(monkeypatch):
    """A leader keeps the lead though the watcher saw another item before the poll, or is told of something else."""
    def look():
        made.acts.clear()
        wait_until(lambda: made.acts)

    def is_left_alone():  # as it is but on a busy machine
        made.ran.clear(), made.told.clear()
        made.put(lambda: look() or made.ran.append("seen"))
        wait_until(lambda: made.ran and made.polling.locked())
        made.put(made.item("next"))
        return wait_until(lambda: len(made.ran) == 2) and not made.told

    monkeypatch.setattr(mi_datagram, "TICK", 0.05)
    made = MadeUp(receive=lambda: (made.ran and made.queue and look()) or made.receive())
    with made:
        wait_until(is_left_alone)
    monkeypatch.setattr(mi_datagram, "TICK", LONG_TICK)
    with MadeUp() as made:
        made.put(made.held)
        wait_until(lambda: made.ran)
        for number in range(3):
            made.acts.clear()
            made.turns.spawn(made.item(number))  # whose end is told
            wait_until(lambda: made.acts)
        assert not made.told


@pytest.mark.parametrize("more", [0, 1])
def test_leader_that_is_replaced_while_it_receives(more):
    """It may take one item more, but does not poll beside the next leader, and does not have that one replaced."""
    def receive():
        try:
            return made.receive()
        finally:
            me = threading.get_ident()
            wait_until(lambda: me not in made.ran or made.polling.locked() or made.turns.is_ending())

    made = MadeUp(receive=receive)
    with made:
        made.put(lambda: made.ran.append(threading.get_ident()), *[made.held] * more)
        wait_until(lambda: len(made.ran) == 1 + more and made.polling.locked())
        made.told.clear()
        pause(5 * mi_datagram.TICK)
        assert not made.told
        made.put(made.item("next"))
        wait_until(lambda: made.ran[-1] == "next")


def test_item_that_yields_the_lead():
    """A leader that yields before it waits is replaced at once, also by the last worker, which nothing else takes."""
    def yielding():
        made.ran.append(is_replaced := made.turns.yield_lead())
        assert not is_replaced or made.go.wait(DEADLINE)

    with MadeUp(max_workers=2, urgent=[yielding]) as made:
        made.put(lambda: made.ran.append(made.turns.spawn(made.held)), yielding, yielding)
        wait_until(lambda: sorted(made.ran) == [False, False, True])  # the second one finds nobody


@pytest.mark.parametrize("size, fits", [(1, mi_datagram.BACKLOG), (mi_datagram.BACKLOG_BYTES // 2, 2)])
def test_reserve(size, fits):
    """With all others held the last worker handles what is urgent; of the rest as much as may waits, in its order."""
    def first():
        wait_until(lambda: len(made.queue) == 3)  # as there is room again
        made.ran.append("first")

    urgent = [lambda: made.ran.append("urgent")]
    with MadeUp(max_workers=2, urgent=urgent, size=lambda item: size) as made:
        made.put(made.held)
        wait_until(lambda: made.ran == ["held"])
        rest = [made.item(number) for number in range(fits + 4)]
        made.put(first, *urgent, *rest)
        wait_until(lambda: len(made.queue) == 4)  # one more waits for room
        pause(0.01)
        assert len(made.queue) == 4 and made.ran[1:] == ["urgent"]
        made.go.set()
        wait_until(lambda: len(made.ran) == 3 + len(rest))
        assert made.ran[2:fits + 2] == ["first", *range(fits - 1)] and sorted(made.ran[3:]) == [*range(len(rest))]


def test_nothing_overtakes_the_backlog():
    """Not even while a worker takes an item from it, when the leader has the next one in its hands."""
    def receive():
        if len(made.queue) == 1:
            made.ran.append("receives")
            taking.wait(DEADLINE)
        return made.receive()

    def size(item):
        if made.go.is_set():
            taking.set()
            pause(0.01)
        return 1

    made, taking = MadeUp(2, receive=receive, size=size), threading.Event()
    with made:
        made.put(made.held, made.item("waits"), made.item("next"))
        wait_until(lambda: "receives" in made.ran)
        made.go.set()
        wait_until(lambda: len(made.ran) == 4)
    assert made.ran == ["held", "receives", "waits", "next"]


@pytest.mark.parametrize("max_workers, stay", [(3, 2), (4, 2), (30, 1 + mi_datagram.SPARE_THREADS)])
def test_followers(max_workers, stay):
    """While one follows the leader handles what comes; of those that are done few stay, so other work finds room."""
    with MadeUp(max_workers) as made:
        made.put(*[lambda: made.turns.yield_lead() and made.held()] * (max_workers - 2), made.turns.yield_lead)
        wait_until(lambda: len(made.ran) == max_workers - 2 and len(workers()) == max_workers and made.polling.locked())
        pause(10 * mi_datagram.TICK)  # so that the last one but the leader follows
        made.put(made.item("next"))
        wait_until(lambda: made.ran[-1] == "next")
        made.go.set()
        wait_until(lambda: len(workers()) == stay)
        pause(5 * mi_datagram.TICK)
        assert len(workers()) == stay and made.turns.spawn(made.item("spawned"))
        wait_until(lambda: made.ran[-1] == "spawned")


@pytest.mark.parametrize("many", [1, 2])
def test_end_leaves_what_waits(many):
    """After end() no worker handles another item: none that comes, or is in the backlog, or waits for room there."""
    with MadeUp(max_workers=2, size=lambda item: mi_datagram.BACKLOG_BYTES) as made:
        made.put(made.held, *[made.item("waits")] * many)
        wait_until(lambda: made.ran and not made.queue)
        made.turns.end()
        made.put(made.item("comes"))
        wait_until(lambda: len(workers()) == 1)
    assert made.ran == ["held"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("dies", [False, True])
def test_thread_that_cannot_be_started(monkeypatch, dies):
    """A leader that is held, or dies, is replaced once there is a thread again; without any nothing starts."""
    with MadeUp() as made:
        refusing_threads(monkeypatch, range(1 << 30))
        made.put(lambda: 1 // 0 if dies else made.held(), made.item("next"))
        wait_until(lambda: "thread_errors" in made.told)
        assert "next" not in made.ran and not MadeUp().turns.start()
        monkeypatch.undo()
        wait_until(lambda: made.ran[-1:] == ["next"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_worker_that_dies_is_replaced(monkeypatch):
    """Where receiving fails, or an item ends its worker by an error, what waits and what comes is handled."""
    def die():
        made.turns.yield_lead()
        made.held()
        raise ValueError

    monkeypatch.setattr(mi_datagram, "TICK", LONG_TICK)  # so the watcher sees to nothing
    with MadeUp(max_workers=2) as made:
        made.put(OSError(), lambda: 1 // 0, die, made.item("next"))
        wait_until(lambda: made.ran == ["held"] and not made.queue)
        made.go.set()
        wait_until(lambda: made.ran == ["held", "next"])
        assert made.told == ["receive_errors"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_follower_that_dies_follows_no_more():
    """A follower that dies for want of memory is not counted on: another thread replaces the next leader to stall."""
    def wait_for(predicate):
        if not predicate():
            del made.turns._turn.wait_for  # from now on there is memory
            raise MemoryError

    with MadeUp() as made:
        made.turns._turn.wait_for = wait_for
        made.put(made.held)
        wait_until(lambda: len(workers()) == 2)
        made.go.set()
        wait_until(lambda: len(workers()) == 1)
        made.go.clear()
        made.put(made.held, made.item("next"))
        wait_until(lambda: made.ran == ["held", "held", "next"])


@pytest.mark.parametrize("drain", [0, 3, 1000])
@pytest.mark.parametrize("moment", ["it polls", "it is held", "it has just looked"])
def test_shutdown(drain, moment):
    """What is there is handled, `drain` items at most, whatever the leader does just then; then all workers end."""
    def end():
        made.queue.extend([made.item("drained")] * 10)
        made.turns.shutdown(drain)

    def receive():
        if moment == "it has just looked" and not (made.queue or made.turns.is_ending()):
            end()
            raise BlockingIOError
        return made.receive()

    made = MadeUp(receive=receive)
    made.queue.extend([made.held] * (moment == "it is held"))
    with made:  # where the first leader is held the next one polls
        if not made.turns.is_ending():
            end()
    assert made.ran.count("drained") == min(drain, 10)


def test_watcher_at_the_end(monkeypatch):
    """From the shutdown on it looks all the time, be the leader not woken; once all is over it waits no more."""
    with MadeUp(wake=lambda: None) as made:
        wait_until(made.is_asleep)
        made.turns.shutdown(0)
        wait_until(lambda: len(made.acts) > 3)
        made.put()
    monkeypatch.setattr(mi_datagram, "TICK", 10 * DEADLINE)
    made = MadeUp()
    made.act = lambda: made.turns.shutdown(0) or (wait_until(made.turns.is_done) and math.inf)
    with made:
        made.watcher.join(DEADLINE)
        assert not made.watcher.is_alive()


def test_mixed_items():
    """Of 10,000 items, a slow one in each hundred, none is lost or handled twice; request_shutdown() takes no lock."""
    def slow():
        made.ran.append(0)
        made.turns.yield_lead()
        time.sleep(0.002)

    with MadeUp(max_workers=8) as made:
        made.put(*[made.item(number) if number % 100 else slow for number in range(10_000)])
        wait_until(lambda: len(made.ran) == 10_000)
        assert sorted(made.ran) == [0] * 100 + [number for number in range(10_000) if number % 100]
        wait_until(made.is_asleep)
        with made.turns._lock:
            asking = in_thread(made.turns.request_shutdown, 0)
            wait_until(lambda: not asking.is_alive())
        wait_until(made.turns.is_ending)


# --------------------------------------------------------------- sending, with pairs of sockets ----


@pytest.fixture
def outbox(request):
    """A UnixOutbox with its bound socket, and a timeout of `request.param` ms; what waits has a thread of its own."""
    mi, waits, timeout = interface(), [], getattr(request, "param", FOREVER)
    outbox = mi_datagram.UnixOutbox(mi, timeout, 4, lambda *what: waits.append(in_thread(*what)) or True)
    with bound_socket("") as sock:
        outbox.prepare(sock)

        def send(address, reply=b"reply"):
            asked = types.SimpleNamespace(request=(b"", sock, (), None), client_address=address)
            asked.replace_too_large = lambda reply: b"too large" if len(reply) > 1000 else None
            outbox.send(asked, reply)

        yield types.SimpleNamespace(send=send, mi=mi, waits=waits, sock=sock, timeout=timeout)
        for thread in waits:
            thread.join(DEADLINE)


def flood(sock, address):
    """Send to ADDRESS until it takes no more; give it."""
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.sendto(b"x" * 1000, mi_datagram.MSG_DONTWAIT, address)
    return address


@contextlib.contextmanager
def full_buffer(sock):
    """Fill the send buffer of a socket; give the client that reads nothing."""
    with bound_socket("") as silent:
        silent.connect(sock.getsockname())  # or else its own queue would be full first
        flood(sock, silent.getsockname())
        yield silent


def drops(outbox):
    kinds = "unread", "gone", "unbound", "errors", "denied"
    return {kind: number for kind in kinds if (number := count(outbox.mi, f"dropped_{kind}"))}


@pytest.mark.parametrize("outbox, waits", [(0, False), (20, False), (FOREVER, True)], indirect=["outbox"])
def test_reply_waits_for_its_client(outbox, waits):
    """One reply a client waits, until it reads or for `timeout` ms; others, and for others, are dropped at once."""
    with bound_socket("") as client, bound_socket("") as other:
        for dropped, silent in enumerate([client, client, other], 1 - waits):
            address, begin = flood(outbox.sock, silent.getsockname()), time.monotonic()
            outbox.send(address)
            wait_until(lambda: drops(outbox) == ({"unread": dropped} if dropped else {}))  # noqa: B023
            assert waits or time.monotonic() - begin >= outbox.timeout / 1000
        client.recv(2000)
        wait_until(lambda: count(outbox.mi, "replies") == waits)


def test_overflow_socket(outbox):
    """While the bound socket's buffer is full a one-off one, if to be had, reaches who is not connected, and goes."""
    with full_buffer(outbox.sock) as silent, bound_socket("") as client:
        before = os.listdir("/proc/self/fd")
        for reply in (b"reply", b"x" * 300_000):
            outbox.send(client.getsockname(), reply)
            assert client.recvfrom(1 << 20) == (reply, None)
        outbox.send(silent.getsockname())
        with no_descriptors():
            outbox.send(client.getsockname())
        assert drops(outbox) == {"unread": 1, "errors": 1} and count(outbox.mi, "replies") == 2
        while not is_empty(silent):
            silent.recv(2000)
        outbox.send(silent.getsockname())
        assert silent.recv(2000) == b"reply" and not outbox.waits and len(os.listdir("/proc/self/fd")) == len(before)


def test_replies_that_cannot_be_sent(outbox):
    """A reply too large for the system is replaced; one to nobody, or to who is gone, is dropped and counted."""
    outbox.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # which gives the least that there is
    with bound_socket("") as client:
        outbox.send(client.getsockname(), b"x" * 50_000)
        assert client.recv(100) == b"too large"
    outbox.send("\0nobody")
    outbox.send(None)
    assert drops(outbox) == {"gone": 1, "unbound": 1}


# --------------------------------------------------- servers: parameters and names ----


@pytest.mark.parametrize("keyword", WRONG_VALUES)
def test_wrong_values(folder, keyword):
    """A wrong value is one error that names parameter, value and what is allowed; nothing is made or removed."""
    dead_socket(folder / "s")
    before, mi = contents(folder), Interface(core=())
    for value in WRONG_VALUES[keyword]:
        with pytest.raises(mi_datagram.ParameterError) as caught:
            mi.server(**{"socket_name": str(folder / "s"), keyword: value})
        text = str(caught.value)
        assert keyword in text and (ascii(value) in text or keyword == "trace_destination") and "\n" not in text
        assert re.search("allowed|only", text) or isinstance(caught.value, mi_datagram.SocketError)
    assert contents(folder) == before


@pytest.mark.parametrize("given, host", [
    ("udp:127.0.0.1:0", "127.0.0.1"), ("UDP:localhost:0", "127.0.0.1"), ("udp:[::1]:0", "[::1]"), ("udp:::1:0", "[::1]")
])  # fmt: skip
def test_udp_names(given, host):
    """All ways to write a UDP address work; with port 0 the server tells the one it found, which no other can share."""
    if "[" in host and not HAS_IPV6:
        pytest.skip("no IPv6 here")
    with serving(interface(), given) as server, Client(server.socket_name) as client:
        assert re.fullmatch(f"udp:{re.escape(host)}:[1-9][0-9]*", server.socket_name)
        assert client.call("echo", "a").nodes == [Node(None, "a")] and ask(server, b":nothing:\n") == b"200 OK\n"
        with pytest.raises(mi_datagram.SocketError, match=f"socket_name.*{re.escape(server.socket_name)}"):
            interface().server(server.socket_name)


def test_names_and_defaults(caplog):
    """A path may be a PathLike, a link-local address keeps its scope; UDP has limits of its own, and a warning."""
    names = {Path("s"): "./s", Path("/a/s"): "/a/s", Path("udp:h:5"): "./udp:h:5", "udp:[fe80::%l]:5": ("fe80::%l", 5)}
    assert {name: mi_datagram.parse_socket_name(name) for name in names} == names
    assert str(mi_datagram.Peer(("fe80::1", 5, 0, 3))) == "udp:[fe80::1%3]:5"
    assert mi_datagram.check_parameters({}) == DEFAULTS and Client("./s").timeout == 2000
    assert {*mi_datagram.Parameters.__annotations__} == {*DEFAULTS}
    with pytest.raises(TypeError, match="socket_name"):
        interface().server()
    for parameter in ("socket_buf_size", "unix_socket_user", "unix_socket_group"):
        with pytest.raises(mi_datagram.ParameterError, match=f"{parameter}.*100000"):
            interface().server("udp:127.0.0.1:0", **{parameter: 100_000})
    local = mi_datagram.allow_networks("127.0.0.1")
    for host, authorize, warns in (("127.0.0.1", None, False), ("0.0.0.0", local, False), ("0.0.0.0", None, True)):
        interface().server(f"udp:{host}:0", authorize=authorize).stop()
        assert ("authorize" in caplog.text) is bool(caplog.records) is warns  # anybody can reach it, and it asks nobody


def test_limits_looks_and_access_are_each_servers_own(folder):
    """Of several servers of one Interface each has its own size limit, indent, pretty printing and `authorize`."""
    mi, tree, call = interface(), b"200 OK\na:: \n%sb:: " + b"x" * 70 + b"\n", b'{"jsonrpc":"2.0","method":"tree","id":1}'
    mi.command(lambda: {"a": {"b": "x" * 70}}, name="tree")
    request = b":echo:\n" + b"a" * 150_000 + b"\n"  # more than UDP can carry
    first = {"socket_buf_size": len(request), "reply_indent": "| ", "pretty_printing": True}
    second = {"socket_buf_size": 64, "authorize": lambda peer, command: command != "nothing"}
    with serving(mi, "udp:127.0.0.1:0") as three:
        with serving(mi, folder / "1", **first) as one, serving(mi, folder / "2", **second) as two:
            assert [ask(server, b":nothing:\n")[:3] for server in (one, two, three)] == [b"200", b"403", b"200"]
            trees = [ask(server, b":tree:\n") for server in (one, two, three)]
            assert trees == [tree % b"| ", b"500 Internal server error\n", tree % b"\t"]
            assert b'\n\t"result": {' in ask(one, call)  # JSON knows no indent but white space
            assert ask(one, request) == request.replace(b":echo:", b"200 OK")
        assert b"\n" not in ask(three, call)  # it goes on without the others


# ------------------------------------------------------- servers: the socket file ----

ME, MINE = os.getuid(), os.getgid()
ROOTS = pytest.mark.skipif(not IS_ROOT, reason="only root may")
USER, GROUP = (pwd.getpwall()[-1], grp.getgrall()[-1]) if IS_ROOT else (pwd.getpwuid(ME), grp.getgrgid(MINE))
FILES = [  # parameters of the socket file, and the mode, user and group that it has then
    ({}, (0o660, ME, MINE)), *[({"unix_socket_mode": mode}, (right, ME, MINE))
      for mode, right in ((0o600, 0o600), (0o777, 0o777), ("0640", 0o640), ("606", 0o606), (0, 0o600))],
    *[({"unix_socket_user": user}, (0o660, USER.pw_uid, MINE))
      for user in (USER.pw_name, USER.pw_uid, str(USER.pw_uid))],
    *[({"unix_socket_group": group}, (0o660, ME, GROUP.gr_gid))
      for group in (GROUP.gr_name, GROUP.gr_gid, str(GROUP.gr_gid))],
]  # fmt: skip


@pytest.mark.parametrize("parameters, right", FILES, ids=str)
def test_mode_and_owner(folder, parameters, right, caplog):
    """The file has the mode asked for, and 0600 for 0; user and group go by name or number, neither sets the other."""
    with serving(interface(), folder / "s", **parameters):
        status = (folder / "s").lstat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == right
    assert ("0600" in caplog.text) is (parameters.get("unix_socket_mode") == 0)


def test_mode_and_owner_without_proc(folder, monkeypatch):
    """In a chroot that has no /proc the file gets its mode; an owner, which cannot be set safely there, is refused."""
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/proc/self/fd")
    with serving(interface(), folder / "s", unix_socket_mode=0o640):
        assert stat.S_IMODE((folder / "s").lstat().st_mode) == 0o640
    with pytest.raises(mi_datagram.SocketError, match=r"owner.*/proc"):
        interface().server(str(folder / "s"), unix_socket_user=ME)
    assert not contents(folder)


def test_socket_file_while_it_is_made(folder):
    """It never has more rights than asked, nor those of another owner; a file that a rival puts there keeps its own."""
    mi, victim, path = interface(), folder / "victim", folder / "s"
    user, group = (4242, 4243) if IS_ROOT else (ME, MINE)

    def look(frame, event, function):
        if event == "c_call" and os.access(path, os.F_OK):
            status = os.lstat(path)
            seen.add((stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid))
            if next(calls) == moment:  # the rival comes; in the last round it does not
                victim.rename(path)

    for moment in itertools.count(1):  # noqa: B007
        victim.touch(mode=0o600)
        calls, made, seen, umask = itertools.count(1), [], set(), os.umask(0)
        sys.setprofile(look)
        with contextlib.suppress(mi_datagram.SocketError):
            made.append(mi.server(str(path), unix_socket_mode=0o666, unix_socket_user=user, unix_socket_group=group))
        sys.setprofile(None)
        os.umask(umask)
        for server in made:
            server.stop()
        if victim.exists():
            break
        status = path.stat()
        assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o600, ME, MINE)
        path.unlink()
    assert moment > 10 and seen == {(0o600, ME, MINE), (0o600, user, group), (0o666, user, group)}


@pytest.mark.parametrize("serves", [False, True])
@pytest.mark.parametrize("kind", OBSTACLES)
def test_obstacle_is_refused_and_left_alone(folder, kind, serves):
    """What is at the path and no dead socket is refused and stays; so does what replaces the server's own file."""
    server = interface().server(str(folder / "s")) if serves else None
    if server:
        (folder / "s").unlink()
    kept = OBSTACLES[kind](folder / "s", folder / "other")
    with kept if isinstance(kept, socket.socket) else contextlib.nullcontext():
        before = contents(folder)
        if server:
            server.stop()
        else:
            with pytest.raises(mi_datagram.SocketError, match=f"socket_name.*{folder / 's'}") as caught:
                interface().server(str(folder / "s"))
            assert caught.value.errno in (errno.EEXIST, errno.EADDRINUSE)
        assert contents(folder) == before


def test_dead_socket_is_replaced(folder):
    """A dead socket is taken over, and may go just then; a server that has ended takes nothing from the next one."""
    dead_socket(folder / "s")
    with meanwhile("lstat", (folder / "s").unlink, after=True):
        interface().server(str(folder / "s")).stop()
    dead_socket(folder / "s")
    server = interface().server(str(folder / "s"))
    server.stop()
    with interface().server(str(folder / "s")):  # whose file may have the same inode
        server.stop()
        assert [*contents(folder)] == ["s"]
    assert not contents(folder)


def test_two_find_the_same_dead_socket(folder):
    """Of two that start at the same instant one serves, and the other is told so and takes nothing away."""
    dead_socket(folder / "s")
    made, starting = [], []

    def start_another():
        starting.append(in_thread(try_server, made, folder / "s"))
        starting[0].join(0.1)  # it waits for the first one

    with meanwhile("unlink", start_another):
        try_server(made, folder / "s")
    starting[0].join(DEADLINE)
    refusal, server = sorted(made, key=lambda outcome: not isinstance(outcome, Exception))
    with server:
        assert ask(server, b":nothing:\n") == b"200 OK\n" and str(folder / "s") in str(refusal)


def test_locked_folder(folder, caplog, monkeypatch):
    """A folder that somebody else keeps locked keeps no server from its socket for longer than a second."""
    waits, descriptor = [], os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    monkeypatch.setattr(time, "sleep", waits.append)
    interface().server(str(folder / "s")).stop()
    os.close(descriptor)
    assert "locked" in caplog.text and str(folder) in caplog.text and 0.5 < sum(waits) < 1.01


def test_fork_while_a_server_is_made(name, monkeypatch, caplog):
    """A process that is forked while a server is half made keeps neither its folder locked nor its port."""
    (end, held), children = os.pipe(), []

    def fork():
        children.append(os.fork())
        if not children[0]:
            signal.alarm(DEADLINE)
            os.close(held)
            os.read(end, 1)
            os._exit(0)

    def bind(sock, address, bind=socket.socket.bind):
        bind(sock, address)
        children or in_thread(fork).join()

    def start_again():
        with contextlib.suppress(mi_datagram.SocketError):  # the child may not be that far
            return interface().server(server.socket_name)

    monkeypatch.setattr(socket.socket, "bind", bind)
    server = interface().server(name)
    server.stop()
    wait_until(start_again).stop()
    os.close(held)
    assert os.waitpid(children[0], 0)[1] == 0 and not caplog.text
    os.close(end)


@pytest.mark.parametrize("mode, parameters, left, problem", [
    (0o333, {}, "", None),  # a folder that the server may not read, and so not lock, is good enough
    (0o644, {}, "", "Permission"),  # it may not even look for the file
    pytest.param(0o1777, {}, "s", "permitted", marks=ROOTS),  # as /tmp: the dead socket is another user's
    (0o777, {"unix_socket_user": ME + 1}, "", "owner"),  # the kernel refuses
])  # fmt: skip
def test_what_the_folder_allows(folder, mode, parameters, left, problem):
    """What keeps the server from its file is an error that names the socket, and what was there stays."""
    if left:
        dead_socket(folder / left)
        (folder / left).chmod(0o777)
    folder.chmod(mode)
    made = []
    in_thread(lambda: become_nobody() or try_server(made, folder / "s", **parameters)).join(DEADLINE)
    if problem is None:
        with made[0] as server:
            assert ask(server, b":nothing:\n") == b"200 OK\n"
    else:
        assert isinstance(made[0], Exception) and str(folder / "s") in str(made[0]) and problem in str(made[0])
    folder.chmod(0o700)
    assert [*contents(folder)] == [*left]


def test_no_descriptor_for_the_socket(name):
    """Where the system gives a server no descriptor, that is an error that names the socket."""
    with no_descriptors(), pytest.raises(mi_datagram.SocketError, match=f"{re.escape(name)}.*Too many open files"):
        interface().server(name)


def test_relative_path(folder, monkeypatch):
    """A file given as ./path goes wherever the program is by then; ./path may be short where the folder's is long."""
    deep = folder / ("long" * 30)
    deep.mkdir()
    for place, back in ((folder, "/"), (deep, deep)):
        monkeypatch.chdir(place)
        with serving(interface(), "./s") as server:
            monkeypatch.chdir(back)
            assert (place / "s").is_socket() and ask(server, b":nothing:\n") == b"200 OK\n"
            monkeypatch.chdir("/")
        assert not (place / "s").exists()


# ---------------------------------------------------------- servers: who is asking ----


@pytest.mark.parametrize("ids", [(ME, MINE), pytest.param((4242, 4243), marks=ROOTS)])
def test_peer(name, ids):
    """A UNIX peer has the ids that the kernel vouches for, a UDP peer its address; one that is bound gets its reply."""
    mi, peers, is_unix = interface(), [], "/" in name
    mi.command(lambda request: peers.append(request.peer), name="who", pass_request=True)
    claim = [(socket.SOL_SOCKET, 2, struct.pack("iII", os.getpid(), *ids))] if is_unix and ids != (ME, MINE) else []
    with serving(mi, name) as server:
        for connect, bind in (True, True), (False, True), (False, False):
            with client_socket(server, connect, bind) as sock:
                sock.sendmsg([b":who:\n"], claim, 0, None if connect else server.server_address)
                if bind or not is_unix:
                    assert sock.recvfrom(1000) == (b"200 OK\n", server.server_address)
                    assert peers[-1].address == sock.getsockname() or not connect
        wait_until(lambda: count(server, "dropped_unbound") == is_unix)
    known = (os.getpid(), *ids) if is_unix else (None, None, None)
    assert [(peer.pid, peer.uid, peer.gid) for peer in peers] == [known] * 3
    far = mi_datagram.Peer("x", struct.pack("iII", 7, 3_000_000_000, 4_000_000_000))  # a uid from 2**31 up is that uid
    assert (far.uid, far.gid) == (3_000_000_000, 4_000_000_000) and mi_datagram.allow_users(3_000_000_000)(far, "x")


@pytest.mark.parametrize("early, first", [(0, b"403 Forbidden\n"), (1, b"200 OK\n")])
def test_datagram_older_than_its_server_has_no_known_sender(folder, early, first):
    """A datagram queued before anybody asked for credentials comes from nobody known, so user rules refuse it."""
    with bound_socket(folder / "s") as listening, bound_socket(folder / "client") as sock:
        listening.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_PASSCRED", 16), early)  # systemd: PassCredentials=
        sock.settimeout(DEADLINE)
        sock.sendto(b":nothing:\n", str(folder / "s"))
        users = mi_datagram.allow_users(65534, os.geteuid())
        with serving(interface(), folder / "s", listening=listening, authorize=users) as server:
            assert sock.recv(1000) == first and ask(server, b":nothing:\n", sock) == b"200 OK\n"


@pytest.mark.parametrize("number", [1, 100])
def test_foreign_descriptors_are_not_kept(folder, number):
    """File descriptors that a peer sends along are closed at once; its request runs."""
    read, write = os.pipe()
    rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{number}i", *[write] * number)
    with serving(interface(), folder / "s") as server, client_socket(server, True) as sock, open(read, "rb") as end:
        sock.sendmsg([b":nothing:\n"], [rights])
        os.close(write)
        assert sock.recv(1000) == b"200 OK\n"
        assert select.select([end], [], [], DEADLINE)[0] and end.read() == b""  # nobody has it open


# ------------------------------------------------------------ servers: their life ----


def traces():
    """What a server that has stopped must leave as it was: settings of the process, its threads, its descriptors."""
    loggers = [(logger.level, [*logger.handlers], logger.propagate)
               for logger in (logging.getLogger(), mi_datagram.log, mi_datagram.audit)]
    umask = re.findall("Umask.*", Path("/proc/self/status").read_text())
    settings = umask, os.getcwd(), [*map(signal.getsignal, sorted(signal.valid_signals()))], loggers
    return settings, {*threading.enumerate()}, {*os.listdir("/proc/self/fd")}


def no_more_than(before):
    """Whether there is nothing but what was there before; a thread that has ended is listed for a moment longer."""
    settings, threads, descriptors = traces()
    return settings == before[0] and threads <= before[1] and descriptors <= before[2]


def test_starting_and_stopping_leaves_no_trace(name, folder):
    """Starting and stopping leaves no file, descriptor or thread, and no setting of the process is changed."""
    mi, before = interface(), traces()
    with mi.server(name):
        settings, threads, _ = traces()
        assert settings == before[0] and all(thread.daemon for thread in threads - before[1])
    for _ in range(100):
        with mi.server(name):
            pass
    wait_until(lambda: no_more_than(before), 5)
    assert not contents(folder)


@pytest.mark.parametrize("in_command, timeout", [(False, 0), (True, 5000)])
def test_stop_lets_what_runs_reply(name, in_command, timeout):
    """stop() waits 2 s or more for commands, Deferreds and their replies; called by a command it returns at once."""
    mi, deferred = later()
    mi.command(lambda: server.stop() or "bye", name="end")
    with holding(name, mi=mi, socket_timeout=timeout) as (server, sock, go), client_socket(server) as other:
        assert server.drain_time == max(timeout / 1000, 2)
        send(server, other, b":later:\n")
        wait_until(lambda: deferred)
        assert not in_command or ask(server, b":end:\n") == b"200 OK\nbye\n"
        stopping = in_thread(server.stop)
        for finish, one, reply in ((go.set, sock, b"200 OK\n0\n"), (deferred[0].reply, other, b"200 OK\n")):
            wait_until(lambda: not os.path.exists(name))  # the file goes while the socket lives
            pause(0.01)
            assert stopping.is_alive()
            finish()
            assert one.recv(1000) == reply
        stopping.join(DEADLINE)
        assert not stopping.is_alive() and server.socket.fileno() == -1
        server.stop()  # once more is harmless


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_async_with(folder, is_cancelled):
    """`async with` serves on one loop, and on another one later; left or cancelled, it lets a command reply."""
    mi, ending = interface(), []

    @mi.command
    async def linger():
        ending.pop()()
        for _ in range(5):
            await asyncio.sleep(0.001)  # which shows that the loop goes on

    async def serve(server, sock, leaving):
        async with server:
            await asyncio.get_running_loop().run_in_executor(None, refuse, server)
            send(server, sock, b":linger:\n")
            await asyncio.wait_for(leaving.wait(), DEADLINE)

    def refuse(server):
        with pytest.raises(mi_datagram.Error, match="serves already"):
            asyncio.run(serve(server, None, None))

    async def main(server, sock):
        leaving = asyncio.Event()
        task = asyncio.ensure_future(serve(server, sock, leaving))
        ending.append(task.cancel if is_cancelled else leaving.set)
        await asyncio.wait([task])

    for _ in range(2):
        server = mi.server(str(folder / "s"))
        with client_socket(server) as sock:
            asyncio.run(main(server, sock))
            assert sock.recv(1000) == b"200 OK\n" and server.socket.fileno() < 0


def test_interrupted_end_is_an_end(folder):
    """A second Ctrl-C while serve_forever waits for a command ends it, and stop() works afterwards."""
    mi, go, ended = interface(), threading.Event(), []

    @mi.command
    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        wait_until(lambda: re.search(rb" watch\n.* _drain\n", mi.answer(b":threads:\n")))  # so it waits for this
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        ended.append(go.wait(DEADLINE))

    server = mi.server(str(folder / "s"), socket_timeout=FOREVER)
    with client_socket(server) as sock, pytest.raises(KeyboardInterrupt):
        send(server, sock, b":interrupt:\n")
        server.serve_forever()
    assert not ended
    go.set()
    server.stop()
    assert not contents(folder)


FORK = """
import importlib, os, signal, socket, sys, threading, time, mi_datagram
mi, path, opened, running = mi_datagram.Interface(), sys.argv[1], [], threading.Event()
dropped = mi.statistics["mi_datagram:dropped_deferred"]
mi.command(lambda request, ms: opened.append(request.defer(float(ms))) or opened[-1], name="later", pass_request=True)
mi.command(lambda: running.set() or time.sleep(99), name="block")

def send(path, request, until):
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(request, path)
    while not until():
        time.sleep(0.001)

def serve():
    with mi.server(path + "2"):
        send(path + "2", b":later:\\n1\\n", dropped)

server = mi.server(path).start(); importlib.reload(mi_datagram)  # as a notebook does
send(path, b":later:\\n60000\\n", lambda: opened)
for method in (server.start, server.serve_forever, server.shutdown, server.stop, server.server_close, serve):
    if not os.fork():
        signal.alarm(20)  # should it hang
        try:
            method()
        except mi_datagram.Error:
            print("refused", flush=True)
        sys.exit(0)
    print(os.wait()[1], os.listdir(os.path.dirname(path)), flush=True)
print(mi_datagram.Client(path, 20_000).call_json("pwd")["WD"], dropped(), flush=True)
never_serves = mi.server(path + "2")
send(path, b":block:\\n", running.is_set)
sys.exit("over")
"""


def test_program_that_forks_and_ends_without_stop(folder):
    """A forked process can neither start the server nor take its file; the parent's end, amid a command, takes all."""
    done, status = run(sys.executable, "-W", "ignore", "-c", FORK, folder / "s"), "0 ['s']"
    said = ["refused", status, "refused", *[status] * 5, f"{os.getcwd()} 0"]
    assert done.stdout.splitlines() == said and not contents(folder)
    assert re.fullmatch(".*'never answered'\nover\n", done.stderr) and done.returncode == 1  # no more than that


def test_fork_while_another_thread_holds_a_lock():
    """A command, and serve_forever() behind its service_actions(), end in a forked process, whoever has held a lock."""
    statuses, parent = [], os.getpid()

    def fork(lock):
        held, go = threading.Event(), threading.Event()
        in_thread(lambda: [lock.acquire(), held.set(), go.wait(DEADLINE), lock.release()])
        assert held.wait(DEADLINE)
        child = os.fork()
        if child:
            go.set()
            statuses.append(os.waitpid(child, 0)[1])
        else:
            signal.alarm(DEADLINE)  # should it hang

    def serve():
        server.serve_forever(0.001)
        if os.getpid() != parent:
            os._exit(0)

    server = derived("udp:127.0.0.1:0", service_actions=lambda self: statuses or fork(self._threads._lock))

    @server.interface.command(pass_request=True)
    def late(request):
        request.defer()
        fork(server.service.open_replies.lock)

    thread = in_thread(serve)
    wait_until(lambda: statuses)
    with client_socket(server) as sock:
        assert ask(server, b":late:\n", sock) == b"200 OK\n"
    server.stop()
    thread.join()
    assert statuses == [0, 0]


def test_serve_forever_and_shutdown(name):
    """shutdown() ends serve_forever() and leaves the socket, on which it can begin again; server_close() ends it."""
    server = interface().server(name)
    server.shutdown()  # not serving yet: returns
    with client_socket(server) as sock:
        for end in server.shutdown, server.server_close:
            send(server, sock, b":nothing:\n")  # waits in the socket
            assert is_empty(sock)
            thread = in_thread(server.serve_forever)
            assert sock.recv(1000) == b"200 OK\n"
            end()
            thread.join(DEADLINE)
            assert not thread.is_alive()
    assert server.socket.fileno() == -1 and not os.path.exists(name)
    server.serve_forever()  # returns
    with pytest.raises(mi_datagram.Error, match="closed"):
        server.start()


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_service_actions(folder, error):
    """A subclass's service_actions() is called at the poll interval; stop() returns there, and errors come out."""
    replies = []

    def service_actions(self):
        replies.append(ask(self, b":nothing:\n"))
        if len(replies) == 20:
            return 1 / 0 if error else self.stop()

    def serve():
        with pytest.raises(error) if error else contextlib.nullcontext():
            server.serve_forever(0.001)
        replies.append("over")

    server = derived(str(folder / "s"), service_actions=service_actions)
    in_thread(serve).join(DEADLINE)
    assert replies == [b"200 OK\n"] * 20 + ["over"]
    server.stop()
    assert not contents(folder) and server.socket.fileno() == -1


HOOKS = ["get_request", "verify_request", "process_request", "finish_request"]


def hooked(after):
    """Make each of HOOKS, and handle_error, do what it does, and then call AFTER with its name."""
    def call(self, *arguments, hook):
        result = getattr(super(type(self), self), hook)(*arguments)
        after(hook)
        return result

    return {hook: functools.partialmethod(call, hook=hook) for hook in [*HOOKS, "handle_error"]}


def test_way_of_a_datagram(name):
    """A quick request enters 10 functions from receiving to sending, over UDP 11, and the hooks in their order."""
    entered, called = [], []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == str(MODULE) and frame.f_code.co_name[0] != "<":
            entered.append(frame.f_code.co_name)

    with client_socket(server := derived(name, **hooked(called.append))) as sock:
        for _ in range(2):  # the first one also makes a plan for the command
            send(server, sock, b":nothing:\n")
            item = server.get_request()
            entered.clear()
            sys.setprofile(note)
            server._handle(item)
            sys.setprofile(None)
    server.stop()
    assert len(entered) <= 10 + ("udp" in name) + 2 * ("t" in sys.abiflags), entered  # without a GIL two count by add()
    assert called == ["get_request", "verify_request", "finish_request", "process_request"] * 2


def test_hooks_decide(name):
    """What verify_request() turns down is neither run nor answered; process_request() may use threads of its own."""
    started = []
    with derived(name, verify_request=lambda self, request, address: b"echo" in request[0],
                 process_request=lambda self, *item: started.append(in_thread(self.finish_request, *item))) as server, \
            client_socket(server) as sock:
        send(server, sock, b":nothing:\n")
        assert [ask(server, b":echo:\na\n", sock) for _ in range(3)] == [b"200 OK\na\n"] * 3
        wait_until(lambda: len(started) == count(server, "requests") == 3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("hooks", [*[[hook] for hook in HOOKS], ["finish_request", "handle_error"]], ids=" and ".join)
def test_hook_that_raises(name, hooks, threads):
    """If one of these methods raises, that is counted, the next request is served, and the same may come again."""
    trouble = []
    with derived(name, **hooked(lambda hook: hook in trouble and 1 / trouble.remove(hook))) as server:
        with client_socket(server) as sock:
            for number in (1, 2, 3):
                trouble[:] = hooks
                wait_until(lambda: send(server, sock, b"200 OK\n") or not trouble)  # which gets no reply
                assert ask(server, b":echo:\na\n") == b"200 OK\na\n"
                wait_until(lambda: count(server, "handler_errors") == number or hooks == ["get_request"])  # noqa: B023
    wait_until(lambda: not threads())  # or another test has their errors


# --------------------------------------------------------------- servers: threads ----


@pytest.mark.parametrize("words", ["more in this second", "never answered"])
def test_log_that_is_stuck_beside_requests(folder, words, monkeypatch):
    """While a log handler is stuck in what no request causes just then, a command that gets stuck delays nobody."""
    mi, runs, go = blocking()
    stuck, handler = threading.Event(), logging.Handler()
    handler.emit = lambda record: words in record.getMessage() and (stuck.set() or go.wait(DEADLINE))
    monkeypatch.setattr(mi_datagram.log, "handlers", [handler])
    mi.command(lambda request: request.defer(1), name="later", pass_request=True)
    with serving(mi, folder / "s") as server, client_socket(server) as sock:
        for _ in range(mi_datagram.LOG_LINES + 1):
            ask(server, b":none:\n")
        send(server, sock, b":later:\n")
        assert stuck.wait(DEADLINE)
        send(server, sock, b":block:\n")
        wait_until(lambda: runs)
        assert ask(server, b":nothing:\n") == b"200 OK\n"
        go.set()
        assert sock.recv(1000) == b"200 OK\ndone\n"


@pytest.mark.parametrize("what, request_, reply", [
    ("command", b":block:\n", b"200 OK\ndone\n"), ("log", b":none:\n", b"500 command not available\n"),
    ("audit", b":change:\n", b"200 OK\n"), ("authorize", b":echo:\n", b"200 OK\n"),
])  # fmt: skip
def test_slow_until_quick_again(name, what, request_, reply, monkeypatch, caplog):
    """From a slow run to the next quick one a command, `authorize` or a log makes way before anybody notices."""
    mi, runs, go = blocking()
    block, handler = mi.commands["block"].function, logging.Handler()
    handler.emit = lambda record: block()
    monkeypatch.setattr(mi_datagram.audit if what == "audit" else mi_datagram.log, "handlers", [handler])
    caplog.set_level(logging.INFO, "mi_datagram.audit")
    mi.command(lambda: None, name="change")
    with serving(mi, name, authorize=lambda peer, command: command != "echo" or block()) as server, \
            client_socket(server) as sock:
        step = {"command": mi.commands["block"], "authorize": server.service.access}.get(what, server.service.logging)
        for number in (1, 2, 3):
            go.clear()
            with pytest.MonkeyPatch.context() as patch:
                if number > 1:
                    patch.setattr(mi_datagram, "TICK", LONG_TICK)  # so nobody notices
                send(server, sock, request_)
                wait_until(lambda: len(runs) == number and step.slow)  # noqa: B023
                if number > 1:  # the first time they would make `authorize` quick again
                    assert [ask(server, b":nothing:\n") for _ in range(50)] == [b"200 OK\n"] * 50 and is_empty(sock)
            pause(2 * mi_datagram.TICK)
            go.set()
            assert sock.recv(1000) == reply and step.slow
        wait_until(lambda: ask(server, request_) and not step.slow)


def test_threads_and_counters_are_right_under_stress(name, switching):
    """With leaders that change all the time every client gets its own reply, and the counters count each once."""
    mi, replies = interface(), []
    mine = mi.counter("test:naps")
    mi.command(lambda number: (time.sleep(0.004), [mine.add() for _ in range(500)], number)[-1], name="nap")

    def client(first):
        with client_socket(server, connect=True) as sock:
            for number in range(first, first + 40):
                sock.send(b":%s:\n%d\n" % (b"nap" if number % 4 else b"echo", number))
                replies.append(sock.recv(1000) == b"200 OK\n%d\n" % number)

    with serving(mi, name, max_threads=6) as server:
        for thread in [in_thread(client, 1000 * first) for first in range(8)]:
            thread.join(DEADLINE)
    assert replies == [True] * 320 and mine() == 120_000 and count(server, "requests") == counted(server) == 320


def test_idle_servers_sleep(folder, threads):
    """Servers with nothing to do wake up not once."""
    def stay_asleep(seconds):
        files = [Path(f"/proc/self/task/{thread.native_id}/status") for thread in threads()]
        switches = [re.findall("voluntary_ctxt_switches.*", file.read_text()) for file in files]
        pause(seconds)
        return switches == [re.findall("voluntary_ctxt_switches.*", file.read_text()) for file in files]

    mi = interface()
    mi.command(lambda: time.sleep(0.02), name="slow")
    with serving(mi, folder / "s") as unix, serving(mi, "udp:127.0.0.1:0") as udp:
        for request in (b":slow:\n", b":slow:\n", b":nothing:\n"):
            assert ask(unix, request) == ask(udp, request) == b"200 OK\n"
        wait_until(lambda: stay_asleep(0.1))
        assert stay_asleep(1.1)


# ------------------------------------------------ servers: clients that do not read ----


@pytest.mark.parametrize("size, buffer, connect, max_threads", [
    (1, 1 << 12, False, 3), (1, 1 << 12, True, 8), (65000, 1 << 17, False, 8), (65000, 1 << 17, True, 3),
])  # fmt: skip
def test_silent_clients(folder, threads, size, buffer, connect, max_threads, caplog, monkeypatch):
    """Clients that never read delay nobody, hold few threads, and what they do not get is counted and logged."""
    mi, many = interface(), max_threads // 8
    mi.command(lambda: "a" * size, name="get")
    with holding(folder / "s", many, mi, max_threads=max_threads, socket_timeout=FOREVER) as (server, slow, go):
        wait_until(lambda: not many or mi.commands["block"].slow)  # so somebody else receives
        monkeypatch.setattr(mi_datagram, "TICK", LONG_TICK)  # so nobody notices one that waits: it hands over before
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)  # soon full
        with contextlib.ExitStack() as silent:
            for _ in range(20):
                send(server, silent.enter_context(client_socket(server, connect)), *[b":get:\n"] * (QUEUE + 2))
            for number in range(100):
                assert ask(server, b":echo:\n%d\n" % number) == b"200 OK\n%d\n" % number
            with Client(server.socket_name, timeout=DEADLINE * 250) as client:
                assert client.call("nothing").code == 200
            wait_until(lambda: len(threads()) <= max_threads)
            wait_until(lambda: count(server, "dropped_unread") and "the client does not read" in caplog.text)
            go.set()
            assert receive(slow, many) == [b"200 OK\n0\n"] * many
        wait_until(lambda: counted(server) == count(server, "requests"))


@pytest.mark.parametrize("blocked", [0, 10])
def test_late_reply_to_a_silent_client(folder, blocked):
    """A late reply waits on a thread of the server's, not on its caller's; or else it is dropped."""
    mi, deferred = later()
    _, runs, go = blocking(mi)
    with serving(mi, folder / "s", max_threads=5, socket_timeout=FOREVER) as server:
        with client_socket(server) as sock, client_socket(server) as other:
            send(server, sock, b":later:\n")
            send(server, sock, *[b":nothing:\n"] * (QUEUE + 1))  # whose replies fill its queue
            wait_until(lambda: count(server, "replies") == QUEUE + 1)
            send(server, other, *[b":block:\n"] * blocked)
            wait_until(lambda: len(runs) == min(blocked, 3))
            in_thread(deferred[0].reply, "late").join(DEADLINE)
            assert count(server, "dropped_unread") == (blocked > 0)
            go.set()
            assert receive(other, blocked) == [b"200 OK\ndone\n"] * blocked
            replies = receive(sock, QUEUE + (1 if blocked else 2))
            assert replies[-1] == (b"200 OK\n" if blocked else b"200 OK\nlate\n") and is_empty(sock)


@pytest.mark.parametrize("passed", [False, True])
def test_socket_options(name, passed):
    """A reply may wait on the bound socket for socket_timeout, and that socket holds more replies than usual."""
    listening = FaultySocket(name) if passed else None
    if passed:
        listening.setblocking(False)
    with serving(interface(), name, socket_timeout=1500, listening=listening) as server, client_socket(server) as sock:
        assert server.socket.getblocking() and ask(server, b":nothing:\n") == b"200 OK\n"
        timeval = server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.size)
        assert TIMEVAL.unpack(timeval) == (1, 500_000)
        sizes = [one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for one in (server.socket, sock)]
        assert sizes[0] > sizes[1]


# ------------------------------------------------------- servers: retransmissions ----

NOTIFICATION = b'{"jsonrpc":"2.0","method":"%b","params":["%d"]}'  # without an id, so a notification
BATCH = b"[" + NOTIFICATION + b"]"


@pytest.mark.parametrize("command", [b"block", b"later"])
@pytest.mark.parametrize("request_", [b":%b:\n%d\n", NOTIFICATION, BATCH])
def test_repeated_request_runs_once(request_, command, folder):
    """Over UDP a request that is repeated while it runs, or is deferred, runs once; then, or at a UNIX socket, again."""
    mi, runs, go = blocking()

    @mi.command(pass_request=True)
    def later(request, which: str):
        runs.append(which)
        deferred = request.defer()
        in_thread(lambda: go.wait(DEADLINE) and deferred.reply(which))
        return deferred

    with serving(mi, "udp:127.0.0.1:0") as server, client_socket(server) as sock, client_socket(server) as other:
        for which in (1, 2):
            send(server, sock, request_ % (command, which))
            wait_until(lambda: len(runs) == which)  # noqa: B023
            send(server, sock, *[request_ % (command, which)] * 3)
            wait_until(lambda: count(server, "retransmissions") == 3 * which or len(runs) > which)  # noqa: B023
        assert runs == ["1", "2"]
        send(server, other, request_ % (command, 1))  # another peer's is no repetition
        wait_until(lambda: len(runs) == 3)
        go.set()
        if request_[:1] == b":":
            replies = sorted([*receive(sock, 2), *receive(other)])
            assert replies == [b"200 OK\n1\n", b"200 OK\n1\n", b"200 OK\n2\n"]
        for which in (1, 2):
            before = len(runs)
            wait_until(lambda: send(server, sock, request_ % (command, which)) or len(runs) > before)  # noqa: B023
    go.clear()
    with serving(mi, folder / "s") as server, client_socket(server) as sock:
        send(server, sock, *[request_ % (command, 3)] * 2)
        wait_until(lambda: runs.count("3") == 2)
        go.set()


@pytest.mark.parametrize("request_", [b":later:\n", NOTIFICATION % (b"fail", 1), BATCH % (b"fail", 1)])
def test_request_deferred_in_vain_may_come_again(request_):
    """Over UDP that is one whose Deferred was dropped as soon as it was open, or a notification that failed then."""
    mi, deferred = later()
    mi.command(lambda request, which: deferred.append(request.defer()) or 1 // 0, name="fail", pass_request=True)
    with serving(mi, "udp:127.0.0.1:0") as server, client_socket(server) as sock:
        if b"later" in request_:
            server.service.open_replies = replies = mi_datagram.OpenReplies(lambda: replies.drop_late(math.inf))
        for number in range(3):
            wait_until(lambda: send(server, sock, request_) or len(deferred) > number)  # noqa: B023


@pytest.mark.parametrize("command", ["tick", "slow"])
def test_request_that_is_over_may_come_again_at_once(command):
    """Over UDP equal requests that come one after the other all run, while the server is not done with sending too."""
    mi, ran, listening = interface(), [], FaultySocket("udp:127.0.0.1:0")
    mi.command(lambda: ran.append(1), name="tick")
    mi.command(lambda: time.sleep(0.004) or ran.append(1), name="slow")
    listening.lingers = 3 * mi_datagram.TICK
    with serving(mi, "udp:127.0.0.1:0", listening=listening) as server, client_socket(server) as sock:
        assert [ask(server, f":{command}:\n".encode(), sock) for _ in range(20)] == [b"200 OK\n"] * len(ran)


# --------------------------------------------------------------- servers: faults ----


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("befall, reason, reason_if_full", [
    (lambda sock: sock.close(), "gone", "gone"), (lambda sock: os.unlink(sock.getsockname()), "gone", "gone"),
    (lambda sock: sock.connect(sock.getsockname()), "denied", "unread"),  # it takes what it sends itself alone
    (lambda sock: os.chmod(sock.getsockname(), 0) or become_nobody(), "denied", "denied"),
], ids=["closed", "removed", "connected elsewhere", "not writable"])  # fmt: skip
def test_reply_that_the_kernel_refuses(outbox, folder, caplog, befall, reason, reason_if_full, is_full):
    """It is dropped, logged and counted by its reason, from the bound socket and from a one-off one."""
    path, expected = str(folder / "client"), reason_if_full if is_full else reason
    with bound_socket(path) as sock, full_buffer(outbox.sock) if is_full else contextlib.nullcontext():
        in_thread(lambda: befall(sock) or outbox.send(path)).join(DEADLINE)
    assert drops(outbox) == {expected: 1} and path in caplog.text
    assert ("not writable" in caplog.text) is (expected == "denied")


@pytest.mark.parametrize("error", [errno.ENOBUFS, errno.ENOMEM, errno.ENETUNREACH])
def test_kernel_that_is_short_of_something(name, error):
    """Whatever the kernel says to a reply or to receiving, that is counted and the next request is served."""
    listening = FaultySocket(name)
    with serving(interface(), name, listening=listening) as server, client_socket(server) as sock:
        for faults, statistic in ((listening.sending, "dropped_errors"), (listening.receiving, "receive_errors")):
            faults.append(OSError(error, os.strerror(error)))
            send(server, sock, b":nothing:\n")
            wait_until(lambda: count(server, statistic) == 1)  # noqa: B023
        assert sock.recv(1000) == b"200 OK\n" and is_empty(sock)


@pytest.mark.parametrize("failing", [0, 1, "gevent.monkey", "gunicorn.workers.ggevent"])
def test_no_thread_to_start_with(folder, failing, monkeypatch):
    """A server that cannot have its threads, or has those of gevent, says so in start(), and leaves nothing."""
    before = traces()
    server = interface().server(str(folder / "s"))
    with monkeypatch.context() as patch:
        if isinstance(failing, int):
            refusing_threads(patch, [failing])
        else:
            patch.setitem(sys.modules, failing, types.SimpleNamespace(is_module_patched=lambda name: True))
        with pytest.raises((mi_datagram.Error, RuntimeError), match="thread"):
            server.start()
    wait_until(lambda: no_more_than(before))
    assert not contents(folder) and count(server, "thread_errors") == (failing == 0)


def test_log_handler_that_raises(monkeypatch, caplog):
    """A log handler that raises costs no request, no reply and no count."""
    broken, mi = logging.Handler(), interface()
    broken.emit = lambda record: 1 / 0
    for logger in (mi_datagram.log, mi_datagram.audit):
        monkeypatch.setattr(logger, "handlers", [broken])
        caplog.set_level(logging.DEBUG, logger.name)
    mi.command(lambda divisor: 1 // int(divisor), name="divide")
    replies = [mi.answer(request) for request in (b":none:\n", b":divide:\n0\n", b":divide:\n1\n")]
    assert replies == [b"500 command not available\n", FAILED[0].encode(), b"200 OK\n1\n"]
    assert count(mi, "unknown_commands") == count(mi, "failed_commands") == 1


# --------------------------------------- servers: host programs, systems, hostile peers ----


@pytest.mark.parametrize("bound, asked, answers", [
    *[("0.0.0.0", one, one) for one in ("127.0.0.1", "127.0.0.2")], ("0.0.0.0", "127.255.255.255", None),
    *[("[::]", one, one) for one in ("::1", "::ffff:127.0.0.2")],
])  # fmt: skip
def test_reply_comes_from_the_address_that_was_asked(bound, asked, answers):
    """On a wildcard address a connected client hears every reply, slow and late ones too; broadcast works."""
    if ":" in bound and not HAS_IPV6:
        pytest.skip("no IPv6 here")
    mi, deferred = later()
    mi.command(lambda: time.sleep(0.02), name="slow")
    with serving(mi, f"udp:{bound}:0") as server, socket.socket(server.address_family, socket.SOCK_DGRAM) as sock:
        set_deadline(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        to = asked, server.server_address[1]
        if answers:
            sock.connect(to)
        for request in (b":nothing:\n", b":slow:\n", b":slow:\n", b":later:\n"):
            sock.send(request) if answers else sock.sendto(request, to)
            if request == b":later:\n":
                wait_until(lambda: deferred)[0].reply()
            received, address = sock.recvfrom(1000)
            assert received == b"200 OK\n" and address[1] == to[1] and address[0] == (answers or "127.0.0.1")


FORKS = """
import os, signal, sys, time, mi_datagram
mi = mi_datagram.Interface()
@mi.command
def fork(how):
    child = os.fork()
    if child:
        return child
    if how == "raises":
        os.execv("/no/such/program", ["x"])
    if how == "exits":
        sys.exit(7)
    time.sleep(60 if how == "lives" else 0)
    return 0
if len(sys.argv) == 2:
    with mi.server(sys.argv[1]):
        print("listening on", file=sys.stderr, flush=True)
        signal.pause()
"""


@pytest.mark.parametrize("command", [["forks.py"], ["-m", "mi_datagram", "--load", "forks.py", "-s"]], ids=" ".join)
def test_forked_child_of_a_command(folder, command):
    """It replies to nothing and serves nothing: it ends, whatever its command does; one that lives blocks no path."""
    def fork(how):
        sock.sendto(f":fork:\n{how}\n".encode(), str(folder / "s"))
        return int(sock.recv(1000).split()[-1])

    (folder / "forks.py").write_text(FORKS)
    with process(folder / "s", command=[sys.executable, *command], cwd=folder, start_new_session=True) as popen:
        try:
            with bound_socket(folder / "client") as sock:
                set_deadline(sock)
                for how, status in ("raises", 1), ("returns", 0), ("exits", 7):
                    stat_file = Path(f"/proc/{fork(how)}/stat")
                    wait_until(lambda: ") Z " in stat_file.read_text())  # noqa: B023
                    assert int(stat_file.read_text().split()[-1]) >> 8 == status and is_empty(sock)
                fork("lives")
                popen.kill()
                popen.wait()
                made = []  # at last, as the child, which may have come no further than the fork, closes its socket
                wait_until(lambda: try_server(made, folder / "s") or not isinstance(made[-1], Exception))
                with made[-1] as server:
                    assert ask(server, b":nothing:\n", sock) == b"200 OK\n"
        finally:
            os.killpg(popen.pid, signal.SIGKILL)


def test_default_timeout_of_the_program(folder):
    """Whatever socket.setdefaulttimeout() says, silent clients, slow servers and such as read nothing cost no CPU time."""
    mi, _, go = blocking()
    socket.setdefaulttimeout(2 * DEADLINE)
    try:
        with serving(mi, folder / "s", socket_timeout=FOREVER) as server, client_socket(server) as silent, \
                bound_socket(folder / "full"):
            send(server, silent, *[b":nothing:\n"] * (QUEUE + 4))  # more than fill its queue of replies
            wait_until(lambda: count(server, "dropped_unread"))  # so there is one that waits
            for path in server.socket_name, flood(silent, str(folder / "full")):
                started, cpu = time.monotonic(), time.process_time()
                with Client(path, timeout=300) as client, pytest.raises(mi_datagram.NoAnswer):
                    client.call("block")
                assert time.process_time() - cpu < 0.15 and time.monotonic() - started < DEADLINE
            assert ask(server, b":nothing:\n") == b"200 OK\n" and socket.getdefaulttimeout() == 2 * DEADLINE
            go.set()
    finally:
        socket.setdefaulttimeout(None)


def test_log_is_not_flooded(name, caplog, monkeypatch):
    """Of what peers cause each kind writes 10 lines a second, then one that says how many more; all are counted."""
    mi, now, handler = interface(), [1e9], logging.Handler()
    mi.log_limit = mi_datagram.LogLimit(lambda: now[0])
    handler.emit = lambda record: mi.log_limit.tell()  # as another thread may at the same time
    monkeypatch.setattr(mi_datagram.log, "handlers", [handler])
    with serving(mi, name, authorize=lambda peer, command: command != "no") as server, client_socket(server) as sock:
        for second in (1, 2):
            for number in range(30):  # an equal request that still runs would be a retransmission
                send(server, sock, b":none:\n", b":no:\n%d\n" % number)
                receive(sock, 2 if "/" in name else 1)
            wait_until(lambda: count(mi, "unknown_commands") == count(mi, "forbidden") == 30 * second)  # noqa: B023
            now[0] += 1
    lines = [record.getMessage() for record in caplog.records]
    said = "\n".join(lines)
    more = [re.findall(rf"(?m)^{kind}: (\d+) more in this second", said) for kind in ("unknown_commands", "forbidden")]
    assert len(lines) == 44 and [(len(of_kind), sum(map(int, of_kind))) for of_kind in more] == [(2, 40)] * 2


@pytest.mark.parametrize("request_, refusal", [
    (b":%b:\n", b"500 Internal server error\n"), (b'{"jsonrpc":"2.0","method":"%b","id":1}', b'"code":-32603'),
])  # fmt: skip
def test_reply_that_is_too_long_for_the_system(folder, request_, refusal):
    """Where the send buffer cannot be as large as a reply, now or late, the client is told so."""
    mi, deferred = later()
    mi.command(lambda: "x" * 50_000, name="large")
    with serving(mi, folder / "s") as server, client_socket(server) as sock:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        assert refusal in ask(server, request_ % b"large", sock)
        send(server, sock, request_ % b"later")
        wait_until(lambda: deferred)[0].reply("x" * 50_000)
        assert refusal in sock.recv(1000)


def test_stop_answers_what_is_queued(name, monkeypatch):
    """Requests that the kernel had taken when stop() is called are answered."""
    monkeypatch.setattr(mi_datagram, "TICK", LONG_TICK)  # so they stay in the queue while the first one runs
    with holding(name) as (server, sock, go):
        send(server, sock, *[b":echo:\n%d\n" % number for number in range(1, QUEUE)])
        stopping = in_thread(server.stop)
        pause(0.03)
        go.set()
        assert {*receive(sock, QUEUE)} == {b"200 OK\n%d\n" % number for number in range(QUEUE)}
        stopping.join(DEADLINE)


def test_all_threads_are_held(name):
    """Then the core commands are answered at once; others wait in their order, 1,000 of them, more in the kernel."""
    mi, runs, go = blocking()
    with serving(mi, name, max_threads=8) as server, contextlib.ExitStack() as stack:
        sock, other, operator, crowd = [stack.enter_context(client_socket(server)) for _ in range(4)]
        send(server, sock, *[b":block:\n%d\n" % number for number in range(50)])
        wait_until(lambda: len(runs) > 4)
        urgent = b":uptime:\n", b":threads:\n", b":get_statistics:\nall\n", b'{"jsonrpc":"2.0","method":"ps","id":1}'
        for request in urgent * 3:
            assert ask(server, request, operator).startswith((b"200 OK\n", b'{"jsonrpc":"2.0","result":'))
        send(server, other, *[b":echo:\n%d\n" % number for number in range(QUEUE)])
        pause(0.05)
        assert is_empty(other) and len(runs) < 8
        if "/" in name:
            sent = 1001
            send(server, crowd, *[b":nothing:\n"] * (sent - 50 - QUEUE))
            last = time.monotonic()
            crowd.setblocking(False)
            while time.monotonic() < last + 0.05:  # until nothing more is taken
                with contextlib.suppress(BlockingIOError):
                    send(server, crowd, b":nothing:\n")
                    sent, last = sent + 1, time.monotonic()
            assert sent < 1010 + 2 * QUEUE
        go.set()
        assert {*receive(other, QUEUE)} == {b"200 OK\n%d\n" % number for number in range(QUEUE)}


@pytest.mark.parametrize("in_background", [False, True])
def test_stop_from_a_signal_handler(name, in_background):
    """stop(wait=False) in a signal handler returns at once, and the running command's reply still goes out."""
    mi, runs, go = blocking()

    def on_signal(*_):
        server.stop(wait=False)  # asks, and returns before the command does
        go.set()

    def send_signals():  # several, as Python may miss one that comes just as a thread goes to sleep
        wait_until(lambda: runs)
        wait_until(lambda: os.kill(os.getpid(), signal.SIGWINCH) or server.socket.fileno() < 0)

    default = signal.signal(signal.SIGWINCH, on_signal)
    with client_socket(server := mi.server(name)) as sock:
        send(server, sock, b":block:\n")
        sending = in_thread(send_signals)
        if in_background:
            server.start()
        server.serve_forever()
        assert sock.recv(1000) == b"200 OK\ndone\n" and server.socket.fileno() < 0 and not os.path.exists(name)
    sending.join(DEADLINE)
    signal.signal(signal.SIGWINCH, default)


@pytest.mark.parametrize("moment", ["Poller", "LeaderFollowers"])
def test_stop_while_it_starts(name, moment, threads, monkeypatch):
    """stop(wait=False) in a signal handler ends a server also where that only begins to serve."""
    made = getattr(mi_datagram, moment)
    monkeypatch.setattr(mi_datagram, moment, lambda *arguments: server.stop(wait=False) or made(*arguments))
    server = interface().server(name)
    in_thread(server.serve_forever).join(DEADLINE)
    assert server.socket.fileno() < 0 and not threads()
    server = interface().server(name)
    with pytest.raises(mi_datagram.Error, match="closed"):
        server.start()


@pytest.mark.parametrize("serve, number", [("start", 0), ("start", 1), ("serve_forever", 0)])
@pytest.mark.parametrize("is_late", [False, True])
def test_interrupted_start(name, serve, number, is_late, threads):
    """stop() ends a server also where Ctrl-C came as it started its threads, just before one ran or just after."""
    start, started = threading.Thread.start, []

    def interrupt(thread):
        started.append(thread)
        if len(started) <= number or is_late:
            start(thread)
        if len(started) > number:
            raise KeyboardInterrupt

    server = interface().server(name)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupt)
        getattr(server, serve)()
    in_thread(server.stop).join(DEADLINE)
    assert server.socket.fileno() < 0
    wait_until(lambda: not threads())


def test_stop_at_the_end_of_a_shutdown(name):
    """stop() closes also where it comes while shutdown(), which leaves the socket open, is nearly over."""
    def set_(self, attribute, value):
        if (attribute, value) == ("_threads", None):
            self.stop(wait=False)
        object.__setattr__(self, attribute, value)

    server = derived(name, __setattr__=set_).start()
    server.shutdown()
    assert server.socket.fileno() < 0


# ---------------------------------------------------------------------- client ----

DEEP = b'{"id":1,"result":' + b"[" * 200 + b"]" * 200 + b"}"
NONSENSE = {  # what is no reply to the first call of a client in each dialect
    "line": [b"", b"?", DEEP, b"200 OK\n" + b"".join([b" " * depth + b"x\n" for depth in range(300)])],
    "json": [b"[" * 60000, b"\xff", b"[]", b'{"id":1}', b'{"id":1,"error":{}}', b'{"id":1,"error":7}',
             b'{"id":9,"result":1}', DEEP],
}  # fmt: skip


def test_client_speaks_both_dialects(name):
    """Client quotes what needs it, gives nodes or result, and passes over what is no reply, or another sender's."""
    mi, taken = interface(), []
    values = "a", "", "a b", ' "quoted" \n two lines ', "a::b", "::", "\u20ac", "{", ":"
    named = dict(zip("abcdefghi", values))

    @mi.command(pass_request=True)
    def take(request, *values, **named):
        taken.append((values, named))
        for nonsense in NONSENSE[request.dialect]:
            server.socket.sendto(nonsense, request.peer.address)
        forged = {"line": b"200 OK\nforged\n", "json": b'{"result":0,"id":null}'}[request.dialect]
        with client_socket(server) as stranger, contextlib.suppress(PermissionError):  # which is the server's user too
            stranger.sendto(forged, request.peer.address)
        return {"text": "a", "number": 1.5}

    with serving(mi, name) as server, Client(server.socket_name) as client:
        for arguments, names in ((values, {}), ((), named)):
            assert client.call_json("take", *arguments, **names) == {"text": "a", "number": 1.5}
            assert client.call("take", *arguments, **names).nodes == [Node("text", "a"), Node("number", "1.5")]
        assert client.call_json("take", 1.5, None, ["a"]) and client.call("take", 1.5, **named)
    assert taken == [(values, {})] * 2 + [((), named)] * 2 + [((1.5, None, ["a"]), {}), (("1.5",), named)]


def test_client_takes_no_late_reply(name):
    """A reply that comes after its timeout is never taken for that of the next call, in either dialect."""
    mi, runs, go = blocking()
    with serving(mi, name) as server, Client(server.socket_name, timeout=20) as client:
        for call in (client.call, client.call_json):
            with pytest.raises(TimeoutError, match=re.escape(f"{server.socket_name} within 20 ms")):
                call("block", "late")
        wait_until(lambda: len(runs) == 2)
        go.set()
        wait_until(lambda: counted(server) == 2)
        client.timeout = DEADLINE * 1000
        assert client.call("echo", "now").nodes == [Node(None, "now")]
        assert client.call_json("echo", "now") == ["now"]


@contextlib.contextmanager
def stand_in(name, serve):
    """Have a plain socket in place of a server; SERVE(socket, request, client) does what others and hostile ones do."""
    with FaultySocket(str(name)) as sock:
        thread = in_thread(lambda: serve(sock, *sock.recvfrom(1 << 16)))
        yield f"udp:127.0.0.1:{sock.getsockname()[1]}" if name == "udp:" else name
        thread.join(DEADLINE)


US, NOBODY, OTHER = os.getuid(), 65534, 65533
REPLIERS = [  # who owns the socket file, who replies, from which socket, and whether a client takes it
    (US, US, "server", True), (US, US, "unbound", True), (US, US, "elsewhere", False),  # the second: OpenSIPS
    (0, NOBODY, "server", True), (0, NOBODY, "unbound", False), (0, NOBODY, "elsewhere", False),
    (NOBODY, NOBODY, "unbound", True), (NOBODY, 0, "unbound", True), (NOBODY, OTHER, "unbound", False),
    (NOBODY, OTHER, "./s", False), (NOBODY, 0, "./s", True),  # anybody can have a relative name, in another folder
]  # fmt: skip


@pytest.mark.parametrize("owner, replier, whence, taken", REPLIERS)
def test_whose_reply_a_client_takes(folder, monkeypatch, owner, replier, whence, taken):
    """It takes what comes from the server's address, or unbound from the file's owner or root; nothing else."""
    if US and {owner, replier} != {US}:
        pytest.skip("only root can send as somebody else")
    monkeypatch.chdir(folder)

    def serve(server, request, client):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            if whence == "./s":
                os.mkdir("other")
                os.chdir("other")
            if whence in ("elsewhere", "./s"):
                other.bind("" if whence == "elsewhere" else whence)
            claim = socket.SOL_SOCKET, 2, struct.pack("iII", os.getpid(), replier, os.getgid())  # root may be anybody
            (server if whence == "server" else other).sendmsg([b"200 OK\nfirst\n"], [claim], 0, client)
        with contextlib.suppress(ConnectionError):
            server.sendto(b"200 OK\nlast\n", client)

    with stand_in("./s" if whence == "./s" else folder / "s", serve) as path, Client(path) as client:
        os.chown(path, owner, -1)
        assert client.call("anything").nodes == [Node(None, "first" if taken else "last")]


@pytest.mark.parametrize("name, call", [("./s", "call"), ("./s", "call_json"), ("udp:", "call_json")])
def test_client_gives_up(folder, monkeypatch, name, call):
    """At its timeout a client gives up, however many datagrams that are no reply go on coming; it says so."""
    def serve(server, request, client):
        with contextlib.suppress(ConnectionError):  # the client is gone
            for _ in range(10):
                server.sendto(b'{"result":1,"id":9}', client)

    clock = itertools.count(0, 3)  # 3 s go by at each look
    monkeypatch.chdir(folder)
    monkeypatch.setattr(mi_datagram, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with stand_in(name, serve) as name, Client(name, timeout=10_000) as client:
        with pytest.raises(mi_datagram.NoAnswer, match="within 10000 ms; a datagram was dropped: "):
            getattr(client, call)("x")
        assert next(clock) > 10


def test_client_in_a_forked_process(folder, name):
    """In a forked process a client makes a socket of its own, and leaves its parent's and its folder alone."""
    mi, seen = interface(), []
    mi.command(lambda request: seen.append(request.peer.address), name="look", pass_request=True)
    with serving(mi, name) as server, Client(server.socket_name, reply_dir=folder) as client:
        client.call("look")
        child = os.fork()
        if not child:
            try:
                with client:
                    client.call("look")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        client.call("look")
    assert seen[0] == seen[2] != seen[1] and len(seen) == 3


@pytest.mark.parametrize("reply_dir, value, error", [
    *[(None, value, mi_datagram.RequestError) for value in (object(), float("nan"), {1, 2})],
    *[(path, "x", mi_datagram.SocketError) for path in ("/missing", "a\0b", "\udc00" * 3, "x" * 300)],
])  # fmt: skip
def test_what_a_client_cannot_do_is_named(folder, reply_dir, value, error):
    """A parameter without a JSON form is a RequestError, a `reply_dir` that takes no folder a SocketError; both say it."""
    named = "reply_dir" if reply_dir else "parameters of 'echo'"
    with Client(str(folder / "s"), reply_dir=reply_dir) as client, pytest.raises(error, match=named):
        client.call_json("echo", value)


@pytest.mark.parametrize("platform, option", [("linux", ()), ("linux", ("--reply-dir", "replies")), ("elsewhere", ())])
def test_where_the_replies_come_to(folder, main, monkeypatch, platform, option):
    """A client has an abstract name on Linux; elsewhere and with `reply_dir` a private folder, which goes with it."""
    mi, replies, modes = interface(), folder / "replies", []
    mi.command(lambda: modes.append([one.stat().st_mode for one in sorted(replies.rglob("*"))]), name="look")
    replies.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(replies))
    monkeypatch.setattr(mi_datagram.sys, "platform", platform)
    with contextlib.ExitStack() as stack, serving(mi, folder / "s") as server:
        stack.callback(os.umask, os.umask(0o077))
        assert main("call", "-s", server.socket_name, *option, "look").stderr == ""
        with Client(server.socket_name, reply_dir=replies if option else None) as client:
            assert (client.call("look").code, client.call_json("look")) == (200, "OK")
        assert list(replies.iterdir()) == []
    in_folder = [stat.S_IFDIR | 0o711, stat.S_IFSOCK | 0o666]  # so that a server of any user can write to it
    assert modes == [[] if platform == "linux" and not option else in_folder] * 3


# ------------------------------------------------------------- command line ----

OPS = '''
import os, time
from mi_datagram import CommandError, Interface, Node, Reply

mi = Interface()

@mi.command(pass_request=True)
def echo(request, *values, **named):
    return [Node(name or None, value) for name, value in request.arguments]

@mi.command
def cache_flush(zone: str = "all", limit: int = 0):
    """Drop the cached entries of ZONE."""
    if zone == "none":
        raise CommandError(404, "No such zone", {"zone": "n\\xf6ne\\x9b\\u202e"})
    return {"Flushed": {"zone": zone, "limit": limit}}

@mi.command
def nothing(): pass

@mi.command
def give(code: int, *, key: float = 0): return Reply(code, "So", ["tree"])

@mi.command
def typed(first: bool, *more: int, **others: bool): pass

@mi.command
def exit(): return "left"

@mi.command
def who(): return os.getpid()

@mi.command
def hold(name):
    """Make a file NAME, and wait until somebody removes it."""
    open(name, "w").close()
    while os.path.exists(name):
        time.sleep(0.002)
    return "released"

@mi.command
def note(number):
    """Append NUMBER to the file notes, and take some time."""
    with open("notes", "a") as notes:
        notes.write(number + " ")
    time.sleep(0.02)
    return number
'''
WRONG = [  # words of the command line that cannot be served, the file `f` beside, and words of the one line about them
    *[(words, "", words[2:].split()[:2]) for words in (
        "--socket_name udp:127.0.0.1:-1", "--socket_name ./file/s", "--socket_name ./taken", "--unix_socket_mode 1777",
        "--children_count 0", "--config missing.cfg", "--config folder", "--load missing.py", "--load no_module:mi",
        "--allow_network 10.0.0.0/33 -s udp:127.0.0.1:0", "--allow_user no-such-name",
    )], ("--allow_network ::", "", ["allow_network is for UDP"]),
    ("--allow_user 0 -s udp:127.0.0.1:0", "", ["allow_user for a UNIX socket"]),
    ("--allow_user 0", "", ["allow_user", "does not tell who a peer is"]),
    *[("--config f", f'modparam("mi_datagram", "{name}", {value})', [name, said]) for name, value, said in (
        ("socket_name", "1", "1"), ("unix_socket_mode", "660", "660"), ("unix_socket_mode", "09", "f:1"),
        ("unix_socket_user", '"\\""', "'\"'"), ("reply_indent", '"\\n"', r"\n"), ("socket_timeout", "soon", "f:1"),
        ("socket_timeout", "0x", "f:1"), ("socket_timeout", "-1", "-1"),
    )], ("--load f.py", "mi = 1", ["f.py", "mi"]), ("--load f.py:ours", OPS, ["f.py:ours"]),
    ("--load f.py", "1 / 0", ["f.py", "ZeroDivisionError"]), ("--load f.py --load f.py", OPS, ["echo"]),
    ("--load f.py", "from copied import mi_datagram as m; mi = m.Interface()", ["copied/mi_datagram.py", str(MODULE)]),
]  # fmt: skip
# Two values of each parameter, and what the later ones mean.
EARLIER = {"socket_name": "./earlier", "unix_socket_mode": "0600", "reply_indent": "  ", "socket_buf_size": "60000",
           "pretty_printing": "no", "socket_timeout": "600000", "children_count": "1"}
LATER = {"socket_name": "./s", "unix_socket_mode": "0640", "reply_indent": "\t ", "socket_buf_size": "300",
         "pretty_printing": "yes", "socket_timeout": "1", "children_count": "2"}
MEANT = {"unix_socket_mode": 0o640, "reply_indent": "\t ", "socket_buf_size": 300, "pretty_printing": True,
         "socket_timeout": 1}
# The values of LATER, as they may stand in the configuration file of a SIP server.
CONFIGURATION = r'''#!KAMAILIO
# don't take modparam("mi_datagram", "socket_name", "./wrong1")
// nor "modparam("mi_datagram", "socket_name", "./wrong2")
/* nor this one, it's commented out, too:
modparam("mi_datagram", "socket_name", "./wrong3") */
loadmodule "mi_datagram.so"
modparam("mi_fifo", "socket_name", "./wrong4")
modparam("usrloc", "db_url", "http://host/*#1") modparam("mi_datagram", "unix_socket_mode", 0640) # "
modparam("mi_datagram", "trace_destination", "hep(1)")
  modparam ( 'mi_datagram' ,
    "reply_indent" , "\t " )
modparam("mi_datagram", "socket_buf_size", 0x12C) // '
modparam("mi_datagram", "socket_timeout", 1)modparam("mi_datagram","socket_name","./\"earlier\"")
modparam("mi_datagram", "pretty_printing", 'yes')
#!ifdef MANY
modparam("mi_datagram", "children_count", 2)
#!endif
modparam("mi_datagram", "socket_name", "./\s")
request_route {
    xlog("L_INFO", "modparam(\"mi_datagram\", \"socket_name\", \"./wrong5\")\n");
    xlog('modparam("mi_datagram", "socket_name", "./wrong6")');
}
/* and here the file ends: modparam("mi_datagram", "socket_name", "./wrong7")
'''
COPIES = [  # how a copy of the file is started, the __init__.py of the package that it is in, and what is loaded
    ("python3 -m pack.mi_datagram", "", "pack.ops"), ("./mi_datagram.py", None, "ops.py"),
    ("python3 -m pack.mi_datagram", "from . import mi_datagram; mi = mi_datagram.Interface()", "pack"),
]
USAGE = "Usage:: cache_flush [ZONE] [LIMIT:int]\n"
COMMAND_LINES = [  # words of `call`, exit status, stdout, stderr
    (["nothing"], 0, "", ""),
    (["echo", "a", "b c", "", 'say "hi"', "two\nlines"], 0, 'a\nb c\n\nsay "hi"\ntwo\\nlines\n', ""),
    (["echo", "n::v", "n::", "::x::y", "-1", "--", "--json", "-x"], 0, "n:: v\nn:: \nx::y\n-1\n--json\n-x\n", ""),
    (["cache_flush", "limit::3", "zone::x"], 0, "Flushed:: \n\tzone:: x\n\tlimit:: 3\n", ""),
    (["cache_flush", "none"], 1, "", "404 No such zone\n"),
    *[([*dialect, "give", code], 0, stdout, "") for code in ("200", "299")
      for dialect, stdout in (([], "tree\n"), (["--json"], '[\n    "tree"\n]\n'))],
    (["give", "199"], 1, "", "199 So\n"), (["--json", "give", "300"], 1, "", '300 So: ["tree"]\n'),
    (["cache_flush", "limit::many"], 1, "", f"400 Bad parameter\nLIMIT: many is no int\n{USAGE}"),
    (["cache_flush", "1", "2", "3", "zon::x"], 1, "", "400 Too few or too many arguments\n"
     f"3: there is no parameter for it\nzon: there is no parameter for it\n{USAGE}"),
    (["give", "1", "2", "key::y"], 1, "", "400 Too few or too many arguments\n2: there is no parameter for it\n"
     "KEY: y is no float\nUsage:: give CODE:int [key::KEY:float]\n"),
    (["typed", "maybe", "1", "x", "", "y", "other::z"], 1, "", "400 Bad parameter\nFIRST: maybe is no bool\n"
     "MORE: x is no int\nMORE: y is no int\nOTHER: z is no bool\nUsage:: typed FIRST:bool [MORE:int]... [NAME::VALUE:bool]...\n"),
    (["give", "key::1"], 1, "", "400 Too few or too many arguments\nCODE: missing\nUsage:: give CODE:int [key::KEY:float]\n"),
    (["--json", "cache_flush", "limit::[1]"], 1, "",
     f"""-32602 Invalid params: "Bad type for parameter 'limit'"\nLIMIT: [1] is no int\n{USAGE}"""),
    (["cache_flsh"], 1, "", "500 command not available\ndid you mean cache_flush?\n"),
    (["--json", "cache_flsh"], 1, "", "-32601 Method not found\ndid you mean cache_flush?\n"),
    (["nonesuch"], 1, "", "500 command not available\n"),
    (["help", "cache_flsh"], 1, "", "404 Command Not Found\ndid you mean cache_flush?\n"),
    (["--json", "which", "cache_flsh"], 1, "", "404 Command Not Found\ndid you mean cache_flush?\n"),
    (["--json", "cache_flush", "none"], 1, "", '404 No such zone: {"zone": "n\xf6ne\\u009b\\u202e"}\n'),
    *[(words, 0, json.dumps(result, indent=4, ensure_ascii=False) + "\n", "") for words, result in [
        (["--json", "nothing"], "OK"),
        (["--json", "echo", "1", "-1.5", "true", '{"a":[]}', "x", "NaN", '"1"'], [1, -1.5, True, {"a": []}, "x", "NaN", "1"]),
        (["cache_flush", "limit::3", "--json", "zone::x"], {"Flushed": {"zone": "x", "limit": 3}}),
        (["echo", "\u20ac", "--json"], ["\u20ac"]),
    ]],
]
WRONG_CALLS = [  # wrong words of the command line, and what the one line about them says
    (["call"], "which command? `call which` lists them"), (["call", "echo", '"\\'], "backslash"),
    (["call", "a:b"], "a:b': the line dialect takes a name without ':'"),
    (["call", "--json", "echo", "a", "b::c"], "not both"), (["call", "--timeout", "soon", "nothing"], "soon"),
    (["call", "--timeout", "0", "nothing"], "timeout"), (["call", "nothing", "-s", "nonsense"], "nonsense"),
    (["call", "nothing", "-x"], "unrecognized arguments: -x; see `python3 -m mi_datagram call --help`"),
    (["uptime"], "did you mean `call uptime`?"), (["-s", "./s", "call", "uptime"], "did you mean `call uptime`?"),
    (["shell", "uptime"], "did you mean `call uptime`?"), ([""], "did you mean `call ''`?"),
    (["--nonsense"], "--nonsense"), (["--config"], "--config"),
]
CANNOT_SERVE = [  # what ends children before they serve, some once there is a file `bad`, and what the log says of it
    ("os.register_at_fork(after_in_child=lambda: os._exit(7))", "before it could serve"),
    ("start = mi_datagram.UnixServer.start\n"
     "mi_datagram.UnixServer.start = lambda self: 1 / 0 if os.path.exists('bad') else start(self)", "ZeroDivisionError"),
]
DEATHS = [  # the signal to a child that serves, what happens then, what the log says, and how many die
    (signal.SIGKILL, """
real, calls, mi_datagram.LONGEST_PAUSE = os.fork, [], 0.1
def fork():
    calls.append(1)
    if len(calls) == 3:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return real()
os.fork = fork
""", "cannot be started: Resource temporarily", 1),
    (signal.SIGKILL, """
calls = []
os.register_at_fork(before=lambda: calls.append(1),
                    after_in_child=lambda: len(calls) == 3 and os.kill(os.getpid(), signal.SIGTERM))
""", "(wait status 0)", 2),
]
DIE_YOUNG = """
import time
calls = []
os.register_at_fork(before=lambda: calls.append(1))
def start(self, start=mi_datagram.UnixServer.start):
    start(self)
    os.write(2, b"fork %d at %f\\n" % (len(calls), time.monotonic()))
    if len(calls) in (2, 3):
        os.kill(os.getpid(), signal.SIGKILL)
mi_datagram.UnixServer.start = start
"""
WORKERS = """
import logging, multiprocessing, threading, time
context = multiprocessing.get_context("fork")

def work(name):
    logging.error("at work on %s", name)
    while os.path.exists(name):
        time.sleep(0.002)

def run(function, argument, end=lambda process: None):
    process = context.Process(target=function, args=(argument,))
    process.start()
    end(process)
    process.join()
    return process.exitcode

def fork_in_the_parent():
    while not os.path.exists("parent"):
        time.sleep(0.002)
    run(work, "parent")

threading.Thread(target=fork_in_the_parent, daemon=True).start()

@mi.command
def blocked(): return os.popen("grep SigBlk /proc/self/status").read().split()[1]

@mi.command
def terminated(): return run(time.sleep, 60, lambda process: process.terminate())

@mi.command
def hold_in_fork(name):
    open(name, "w").close()
    return run(work, name)
"""
# Passes on a socket as systemd does: as descriptor 3 of a process that keeps its PID.
LAUNCHER = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, "-m", "mi_datagram", *sys.argv[2:]])"""


def values(socket_name, command, *arguments):
    """Run a command; give the values that it answers."""
    with Client(str(socket_name), timeout=1000 * DEADLINE) as client:
        return [node.value for node in client.call(command, *arguments).nodes]


def post(path, request):
    """Send a request to a UNIX socket; give the socket that the reply comes to."""
    sock = client_socket(types.SimpleNamespace(server_address=str(path)))
    sock.sendto(request, str(path))
    return sock


def kill(pid, number=signal.SIGKILL):
    """Kill a child, and wait until it is gone: what it takes meanwhile is lost."""
    os.kill(pid, number)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def processes(path, count=3):
    """List what `ps` says: the PIDs of the parent and its children, once there are COUNT."""
    def pids():
        found = [re.search(r"PID=(\d+) Type=(.+)", value).groups() for value in values(path, "ps")]
        assert len({*found}) == len(found) == len({kind for _, kind in found}) and ("0", found[-1][1]) not in found
        return len(found) == count and [int(pid) for pid, _ in found]
    return wait_until(pids)


def process_state(pid):
    """Give a process's state as one letter, and its process group."""
    with contextlib.suppress(OSError):
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
        return state, int(group)
    return "X", 0


def left_of(group):
    """List the processes of a group that still run."""
    states = [(int(pid), *process_state(pid)) for pid in os.listdir("/proc") if pid.isdigit()]
    return [pid for pid, state, its_group in states if its_group == group and state not in "ZX"]


@contextlib.contextmanager
def alone(child, children):
    """Halt the other children, so that CHILD answers."""
    others = [pid for pid in children if pid != child]
    try:
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: {process_state(pid)[0] for pid in others} <= {"T"})
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def ops_process(folder, *arguments, load="", fails=False, **options):
    """Serve OPS, and what else to LOAD, at folder/s from a process group of its own, of which nothing may be left.

    Only where the server FAILS may there be a traceback in its log.
    """
    (folder / "ops.py").write_text(OPS)
    if load:
        (folder / "load.py").write_text(f"import os, signal, mi_datagram\nmi = mi_datagram.Interface()\n{load}")
        arguments = ["--load", "load.py", *arguments]
    arguments = ["--socket_name", "./s", "--load", "ops.py", *arguments]
    try:
        with process(*arguments, cwd=folder, start_new_session=True, **options) as server:
            yield server
        wait_until(lambda: not left_of(server.pid))
        assert not (folder / "s").exists()
        assert fails or "Traceback" not in "".join(server.log)
    finally:
        for pid in left_of(server.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def ops():
    """The socket of a process that serves OPS, for all tests that only ask."""
    with tempfile.TemporaryDirectory(prefix="mi-", dir="/tmp") as folder, ops_process(Path(folder)):
        yield Path(folder) / "s"


@contextlib.contextmanager
def manager(name):
    """Have a socket for what a server tells its service manager; give it and the server's environment."""
    with bound_socket(name.replace("@", "\0")) as sock:
        set_deadline(sock)
        yield sock, {"NOTIFY_SOCKET": name}


def small_pipe():
    """Make a pipe that takes 4,096 bytes; give both of its ends."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, 1031, 4096)  # F_SETPIPE_SZ, which Python names since 3.10
    return reading, writing


def end(server, how, path):
    """Tell a server of a process group of its own to end; where that is by SIGTERM, an alarm comes beside it."""
    if how == "kill":
        assert values(path, "kill") == []
    elif how.startswith("Ctrl-C"):
        os.killpg(server.pid, signal.SIGINT)  # as a terminal does
    else:
        for number in (signal.SIGSTOP, signal.SIGALRM, signal.SIGTERM, signal.SIGCONT):
            server.send_signal(number)


class Terminal(contextlib.AbstractContextManager):
    """COMMAND with ARGUMENTS in a terminal of its own, until the block ends."""

    def __init__(self, *arguments, command=MI, cwd=None, history=""):
        self.descriptor, inner = os.openpty()
        self.text = ""
        self.popen = subprocess.Popen(
            [*command, *map(str, arguments)], stdin=inner, stdout=inner, stderr=inner, start_new_session=True, cwd=cwd,
            env={**os.environ, "TERM": "vt100", "INPUTRC": "/dev/null", "MI_DATAGRAM_HISTORY": str(history)},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)

    def __exit__(self, *_):
        self.popen.kill()
        self.popen.wait()
        os.close(self.descriptor)

    def type(self, text):
        wait_until(lambda: process_state(self.popen.pid)[0] == "S")  # Python misses a Ctrl-C just before it waits
        os.write(self.descriptor, text.encode())

    def expect(self, text):
        """Wait for TEXT behind what was expected before."""
        while text not in self.text:
            assert select.select([self.descriptor], [], [], DEADLINE)[0], self.text
            self.text += os.read(self.descriptor, 4096).decode()
        self.text = self.text[self.text.index(text) + len(text) :]

    def end(self):
        """Wait for the end; give the exit status and what was shown last."""
        status = self.popen.wait(DEADLINE)
        with contextlib.suppress(OSError):  # raised where nobody has the terminal any more
            while True:
                self.text += os.read(self.descriptor, 4096).decode()
        return status, self.text.replace("^C", "").strip()


# ---- parameters, and what is loaded


@pytest.fixture
def served(main, monkeypatch, folder):
    """Give a function that has the command line serve in this process and FOLDER while ASK(server, children) runs."""
    monkeypatch.chdir(folder)

    def served(ask, *words):
        def serve(server, signals, children_count, log_writer):
            with server:
                ask(server, children_count)
            raise mi_datagram.Error("asked")

        monkeypatch.setattr(mi_datagram, "_serve", serve)
        done = main(*words)
        assert done.stderr.endswith("mi_datagram: asked\n"), done
        return done.stderr.splitlines()[:-1]

    return served


@pytest.mark.parametrize("words, text, said", WRONG)
def test_what_cannot_be_served_is_one_line(folder, main, monkeypatch, caplog, words, text, said):
    """A wrong value, also in a file, or what cannot be loaded is one line that names it, exit status 2, and no more."""
    (folder / "folder").mkdir()
    (folder / "copied").mkdir()
    shutil.copy(MODULE, folder / "copied")
    (folder / "file").write_text("of value")
    (folder / ("f.py" if "f.py" in words else "f")).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    if words == "--allow_user 0":  # which would let in nobody
        monkeypatch.setattr(mi_datagram, "SO_PASSCRED", 0)
    with bound_socket(folder / "taken"):
        before = contents(folder)
        done = main(*words.split())
        assert (done.returncode, done.stderr.count("\n"), caplog.text) == (2, 1, ""), done.stderr
        assert all(word in done.stderr for word in said), done.stderr
        assert contents(folder) == before


@pytest.mark.parametrize("literal, value", [
    ("10", 10), ("0", 0), ("-10", -10), ("010", 8), ("0x10", 16), ("0X1f", 31), ('"10"', "10"), ("'010'", "010"),
    (r'"a\tb\"c\\"', 'a\tb"c\\'),
])  # fmt: skip
def test_literals_in_a_file(literal, value):
    """Numbers are decimal, 0-octal or 0x, and in a string a backslash escapes, as in a SIP server's file."""
    line = f'modparam("mi_datagram", "socket_timeout", {literal})'
    assert mi_datagram.read_modparams(line, "f.cfg") == [("socket_timeout", value)]


def written(form, parameters, folder):
    """Return parameters as options with _ or -, in a file, or as CONFIGURATION has them."""
    if form in "_-":
        return [word for name, value in parameters.items() for word in (f"--{name.replace('_', form)}", value)]
    lines = [f'modparam("mi_datagram", "{name}", "{value}")\n' for name, value in parameters.items()]
    file = folder / f"{parameters['unix_socket_mode']}.cfg"
    file.write_text("".join(lines) if form == "file" else CONFIGURATION)
    return ["--config", file]


@pytest.mark.parametrize("earlier, later", [
    ("_", "-"), ("-", "file"), ("file", "_"), ("file", "file"), ("_", "SIP server's"),
])
def test_last_value_wins(folder, served, earlier, later):
    """Every parameter works with _, with - and in a file, beside what is none of ours there; its last value counts."""
    def ask(server, children_count):
        assert (server.socket_name, children_count) == (f"{folder}/s", 2) and MEANT.items() <= server.parameters.items()

    *warnings, listening = served(ask, *written(earlier, EARLIER, folder), *written(later, LATER, folder))
    assert "listening" in listening and len(warnings) == (2 if later == "SIP server's" else 0)
    assert all(word in warning for word, warning in zip(("trace_destination", "#!if"), warnings))


def test_lines_of_the_log():
    """They are those that logging writes, times to the ms, also from one second to the next and back, and tracebacks."""
    ours, theirs = mi_datagram.LogFormatter(), logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    failed, text = {"exc_info": (ValueError, ValueError("x"), None)}, {"exc_text": "  | x"}
    for more in ({}, failed, text, {**failed, **text}, {"stack_info": "at"}):
        for created in (0.0, 0.5, 0.9996, 1.25, 0.004, 1e9):
            record = logging.LogRecord("a.b", logging.WARNING, __file__, 1, "%a by %s", ("caf\xe9", 1), None)
            vars(record).update({"created": created, "msecs": created % 1 * 1000, **more})
            assert ours.format(record) == theirs.format(record)


@pytest.mark.parametrize("options", [[], ["-v"]])
def test_load_and_log(folder, options):
    """Files and modules are merged, and have all core commands; the log has who ran what, and with -v the errors."""
    (folder / "pack").mkdir()
    third = OPS.replace("def ", "def third_").replace("Interface()", "Interface(core=())")
    (folder / "pack" / "three.py").write_text(third)
    (folder / "two.py").write_text(third.replace("third", "second").replace("mi = ", "ours = ").replace("@mi", "@ours"))
    with ops_process(folder, "--load", folder / "two.py:ours", "--load", "pack.three", *options) as server:
        commands = values(folder / "s", "which")
        assert {"who", "second_who", "third_who", "uptime", "kill", "arg", "debug"} <= set(commands)
        for command in ("cache_flush", "second_cache_flush", "third_cache_flush"):
            with pytest.raises(CommandError, match="404 No such zone"):
                values(folder / "s", command, "none")
    log = "".join(server.log)
    assert re.search(rf"audit: 'third_cache_flush' by pid {os.getpid()} ", log)
    assert ("404 No such zone" in log) is bool(options)


@pytest.mark.parametrize("start, package, load", COPIES)
def test_copy_that_is_run_is_the_one_that_is_imported(folder, start, package, load):
    """Whatever the name under which the file was started, what it loads imports the same copy by that name."""
    home, imports = folder, "import mi_datagram"
    if package is not None:
        home = folder / "pack"
        imports = "import pack.mi_datagram; from . import mi_datagram; assert pack.mi_datagram is mi_datagram"
        home.mkdir()
        (home / "__init__.py").write_text(package)
    shutil.copy(MODULE, home)
    (home / "ops.py").write_text(f"{imports}; mi = mi_datagram.Interface()")
    (folder / "python3").symlink_to(sys.executable)
    env = {"PYTHONPATH": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}
    with process("-s", "./s", "--load", load, command=start.split(), cwd=folder, env=env):
        assert values(folder / "s", "version")


# ---- call and shell


@pytest.mark.parametrize("words, status, stdout, stderr", COMMAND_LINES)
def test_call(ops, main, words, status, stdout, stderr):
    """`call` prints a reply's tree, or with --json its result, and exits with 0; an error on stderr, and exits with 1."""
    done = main("call", "-s", ops, *words)
    assert (done.returncode, done.stdout, done.stderr) == (status, stdout, stderr)


def test_hints_of_odd_servers(main, folder):
    """A parameter's place counts behind whatever name; a `help` that refuses to help is not asked for help about it."""
    mi = interface()

    @mi.command(name="new:to-day")
    def today(limit: int):
        pass

    with serving(mi, folder / "s"):
        call = functools.partial(main, "call", "-s", folder / "s")
        hint = "LIMIT: x is no int\nUsage:: {} LIMIT:int\n"
        assert call("to-day", "x").stderr == "400 Bad parameter\n" + hint.format("to-day")
        assert call("--json", "to-day", "x").stderr.endswith(hint.format("new:to-day"))
        for error in (CommandError(404, "Command Not Found"), CommandError(400, "Bad parameter")):
            mi.command(unittest.mock.Mock(side_effect=error), name="help", replace=True)
            assert call("help").stderr == f"{error}\n"
            assert call("to-day", "x").stderr == "400 Bad parameter\n"


@pytest.mark.parametrize("words, why", WRONG_CALLS)
def test_wrong_usage(ops, main, words, why):
    """Wrong usage, and what cannot be sent, is one line that says what is wrong, and exits with 2."""
    done = main(*words[:1], *["-s", ops][: 2 * (words[:1] == ["call"])], *words[1:])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and why in done.stderr


def test_call_of_several_servers(folder, main, monkeypatch):
    """A command runs on all servers at once; replies stand under the sockets' names, and the worst exit status counts."""
    monkeypatch.chdir(folder)
    dead_socket(folder / "c.sock")
    meet = threading.Barrier(2, timeout=DEADLINE)
    gone, names = "mi_datagram: nobody listens on ./c.sock\n", ["-s", "./[ab]*.sock", "-s", "./[c-z].sock", "-s", "./a.sock"]
    both = "./a.sock: 500 command not available\n./b.sock: 500 command not available\n"
    with contextlib.ExitStack() as stack:
        for letter in "ab":
            mi = interface()
            mi.command(lambda letter=letter: [meet.wait() * 0, letter], name="meet")
            stack.enter_context(serving(mi, f"./{letter}.sock"))
        for words, status, stdout, stderr in [
            ([*names, "meet"], 3, "./a.sock:: \n\t0\n\ta\n./b.sock:: \n\t0\n\tb\n", gone),
            ([*names[:2], "echo", "x"], 0, "./a.sock:: \n\tx\n./b.sock:: \n\tx\n", ""),
            ([*names[:2], "--json", "echo"], 0, '{\n    "./a.sock": [],\n    "./b.sock": []\n}\n', ""),
            ([*names, "nonesuch"], 3, "", both + gone), (["-s", "./a*", "echo", "x"], 0, "x\n", ""),
            (["-s", "./z*", "nothing"], 3, "", gone.replace("c.sock", "z*")),
        ]:
            done = main("call", *words)
            assert (done.returncode, done.stdout, done.stderr) == (status, stdout, stderr)
        done = run(*MI, "shell", "--json", *names, input="echo\nwhich nonesuch\n", cwd=folder)
        assert done.returncode == 3 and {*json.loads(done.stdout)} == {"./a.sock", "./b.sock"}


def test_help(main):
    """Each --help says in the README's words how it is called, and has each parameter's meaning."""
    readme = " ".join((HERE / "README.rst").read_text("utf-8").split())
    texts = [main(*words, "--help").stdout for words in ((), ("call",), ("shell",))]
    for text, usage in zip(texts, mi_datagram.USAGES.values()):
        usage = usage.partition("\n")[0]
        assert text.startswith(f"usage: python3 -m mi_datagram {usage}\n") and "None" not in text
        assert f"python3 -m mi_datagram {usage}" in readme
    for name, (_, _, meaning) in mi_datagram.PARAMETERS.items():
        assert f"--{name} VALUE" in texts[0] and meaning in " ".join(texts[0].split())
    assert main("--version").stdout == f"mi_datagram {mi_datagram.__version__}\n"


def test_call_without_an_answer(ops, main, folder):
    """No answer within the timeout exits with 3; where nobody listens at once, whatever the timeout."""
    with serving(interface(), "udp:127.0.0.1:0") as server:
        gone = server.socket_name
    dead_socket(folder / "dead")
    for socket_name, timeout, said in [
        (ops, "50", "no answer from {} within 50 ms\n"),
        *[(name, "600000", "nobody listens on {}\n") for name in (folder / "missing", folder / "dead", gone)],
    ]:
        done = main("call", "--socket-name", socket_name, "--timeout", timeout, "hold", folder / "held")
        assert (done.returncode, done.stdout, done.stderr) == (3, "", "mi_datagram: " + said.format(socket_name))
    wait_until((folder / "held").exists)
    (folder / "held").unlink()


CALL = f"{' '.join(MI)} call -s ./s "
STREAMS = {  # what a shell makes of the streams: the exit status, and what stderr says
    CALL + "large | true": (4, ""), "yes large | " + CALL.replace("call", "shell") + "| head -c1 > /dev/null": (4, ""),
    CALL + "nothing >&-": (0, ""), CALL + "euro > /dev/full": (4, "mi_datagram: [Errno 28] No space left on device\n"),
    CALL.replace("call", "shell") + "<&-": (0, ""), "PYTHONIOENCODING=ascii " + CALL + "euro": (0, ""),
    "printf 'euro\\nbad \\377\\neuro\\n' | " + CALL.replace("call", "shell") + "> out; test $(wc -l < out) = 2": (0, None),
    CALL + "--json echo $(printf '[%.0s' $(seq 30000))": (0, ""), CALL + "escape": (1, "404 \\x1b]0;owned\\x07\n"),
    CALL + "--timeout 99 garbage": (3, "mi_datagram: no answer from ./s within 99 ms; a datagram was dropped: no first line 'CODE REASON' at byte 0\n"),
    "PYTHONIOENCODING=ascii " + CALL + "--json euro | grep -q 'u20ac'": (0, ""), CALL + "none 2>/dev/full": (1, ""),
    "test -z \"$(" + CALL.replace("./s", "./none") + "nothing 2>&-)\" && " + CALL.replace("./s", "./none") + "nothing 2>&-": (3, ""),
    CALL.replace("-s ./s", "") + "2>&-": (2, ""),
    "echo x | " + CALL.replace("call -s ./s", "shell -s x") + "2>&1 | grep -q 'x.: /path, ./path or udp:HOST:PORT'": (2, ""),
    f"(ulimit -n 5; {' '.join(MI)} -s ./t) 2>&1 | grep -x 'mi_datagram:.*Too many open files'; test $? = 2 && test ! -e t": (0, ""),
}


@pytest.mark.parametrize("command", STREAMS, ids=range(len(STREAMS)))
def test_streams_of_the_command_line(folder, command):
    """Streams that are closed, full, or read no further, and bytes that do not fit them, bring no traceback."""
    mi = interface()
    mi.command(lambda: "x" * 60_000, name="large")
    mi.command(lambda: "\u20ac", name="euro")
    mi.command(lambda: Reply(404, "\x1b]0;owned\x07"), name="escape")
    with serving(mi, folder / "s") as server:
        if "garbage" in command:
            server.finish_request = lambda request, address: server.socket.sendto(b"?", address)
        done = run("bash", "-o", "pipefail", "-c", command, cwd=folder, env={**os.environ, "PYTHONUNBUFFERED": ""})
    status, said = STREAMS[command]
    assert done.returncode == status and said in (None, done.stderr), done


SHELL_LINES = [  # what is typed, what comes, the exit status
    ('echo a "b c" n::v\n\nnothing\n', "a\nb c\nn:: v\n", 0), ("? nothing\nhelp nothing", "Usage:: nothing\n" * 2, 0),
    ("nonesuch\ncache_flush limit::3", "Flushed:: \n\tzone:: all\n\tlimit:: 3\n", 1), ("echo x\na:b\nnothing", "x\n", 2),
    ('echo "two\nlines" x::"\n"\necho y', "two\\nlines\nx:: \\n\ny\n", 0), ('echo x\necho "y', "x\n", 2),
    (":cache_flush: limit::3", "Flushed:: \n\tzone:: all\n\tlimit:: 3\n", 0), ("json\ncall", "", 2),
    ("exit\necho x", "", 0), ("quit", "", 0), ("call exit\njson call exit", 'left\n"left"\n', 0),
    ("json echo 1\njson nonesuch", "[\n    1\n]\n", 1),
]


@pytest.mark.parametrize("lines, stdout, status", SHELL_LINES, ids=range(len(SHELL_LINES)))
def test_shell_through_a_pipe(ops, lines, stdout, status):
    """`shell` runs each line that it reads, without a prompt, goes on after errors, and exits with the worst status."""
    done = run(*MI, "shell", "-s", ops, input=lines)
    assert (done.stdout, done.returncode, bool(done.stderr)) == (stdout, status, status > 0)


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="its readline completes otherwise")
def test_shell_in_a_terminal(folder, ops):
    """`shell` prompts, completes, says OK for nothing and how a parameter is named; it has a history, Ctrl-C drops a line."""
    hint = "mi_datagram: limit=5 is sent as a value by position; by name it is limit::5\r\nlimit=5\r\n"
    typed = [("cach\t", "cache_flush "), ("li\t", "limit::"), ("3\r", "\tlimit:: 3\r\n"), ("", "> "),
             ("\033[A\r", "\tlimit:: 3\r\n"), ("", "> "), ("help upt\t\r", "Usage:: uptime\r\n"), ("", "> "),
             ("json ? core:upt\t\r", '"Usage": "uptime'), ("", "> "), ("echo limit=5\r", hint), ("", "> "),
             ("nothing\r", "OK\r\n"), ("", "> "), ("dropped", "dropped"), ("\3", "> ")]
    for keys, last in (typed, "\4"), ([("\033[A\r", "nothing\r\nOK\r\n"), ("", "> ")], "exit\r"):
        with Terminal("shell", "-s", ops, history=folder / "history") as terminal:
            for key, shown in [("", "> "), *keys]:
                terminal.type(key)
                terminal.expect(shown)
            terminal.type(last)
            assert terminal.end() == (0, last.strip("\4\r"))
    history = (folder / "history").read_text()
    assert stat.S_IMODE((folder / "history").stat().st_mode) == 0o600 and "dropped" not in history and "\nexit\n" in history


def test_shell_and_a_server_that_comes_and_goes(folder):
    """On a terminal `shell` says at once when nobody listens, and finds a server that starts; Ctrl-C ends waiting."""
    with Terminal("shell", "--timeout", "600000", "-s", folder / "s") as terminal:
        for again in (True, True, False):
            terminal.expect(f"nobody listens on {folder}/s\r\n")
            terminal.expect("> ")
            if not again:
                break
            with ops_process(folder):
                terminal.type(f"hold {folder}/held\r")
                wait_until((folder / "held").exists)
                terminal.type("\3")
                terminal.expect("> ")  # what is typed before is lost
                (folder / "held").unlink()
                terminal.type("call exit\r")
                terminal.expect("left\r\n")
            terminal.type("who\r")
        terminal.type("\4")
        assert terminal.end()[0] == 0


def test_what_tab_offers(folder, monkeypatch):
    """With libedit, too, TAB completes; of what a hostile server says, only names that can be typed, and soon."""
    long, begun = 60_000 * "x", time.monotonic()
    names = ["good", "bad name", "two\nlines", "es\x1bcape", "bi\u202edi", "c1\x9b", "", "caf\xe9"]
    mi, readline = Interface(core=()), unittest.mock.Mock(__doc__="This module uses libedit")
    monkeypatch.setitem(sys.modules, "readline", readline)
    monkeypatch.setenv("MI_DATAGRAM_HISTORY", str(folder / "history"))

    @mi.command(pass_request=True)
    def which(request, command=None):
        return names if not command else [["good"], ["c1\x9b"]] if request.dialect == "json" else ["x", "x good:: c1\x9b::", long]

    shell = mi_datagram._Shell(mi_datagram._parse("shell", ["-s", str(folder / "none"), "-s", str(folder / "s")]))
    shell.start_line_editing()
    readline.parse_and_bind.assert_called_once_with("bind ^I rl_complete")
    readline.set_completer_delims.assert_called_once_with(" \t\n")  # no others: names are completed as wholes
    with serving(mi, folder / "s"):
        for line, offered in [("", ["good ", "caf\xe9 "]), ("json ", ["good ", "caf\xe9 "]), ("help g", ["good "]),
                              ("json x go", ["good::"]), ("x go", ["good::"]), ("x y", [])]:
            begin = line.rfind(" ") + 1
            readline.get_line_buffer.return_value, readline.get_begidx.return_value = line, begin
            assert [shell.complete(line[begin:], state) for state in range(len(offered) + 1)] == [*offered, None]
    assert [*mi_datagram._misfits(f"Usage:: x {long}:", [("", "1")])] == ["1: there is no parameter for it"]
    assert time.monotonic() - begun < DEADLINE


def test_ctrl_c(folder):
    """Ctrl-C ends a server, a call and a shell without a prompt in their terminals, with nothing to read about it."""
    (folder / "lines").write_text("hold second\nnothing")
    asking = ["-s", "./s", "--timeout", "600000"]
    with ops_process(folder), Terminal("-s", "./own", cwd=folder) as server, \
            Terminal("call", *asking, "hold", "first", cwd=folder) as call, \
            Terminal("shell", *asking, command=["sh", "-c", 'exec "$@" < lines', "sh", *MI], cwd=folder) as shell:
        server.expect("own\r\n")
        wait_until(lambda: (folder / "first").exists() and (folder / "second").exists())
        for terminal, status in (server, 0), (call, 130), (shell, 130):
            terminal.type("\3")
            assert terminal.end() == (status, "")
        (folder / "first").unlink()
        (folder / "second").unlink()
        assert not (folder / "own").exists()


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy handles a SIGINT that it was started to ignore")
def test_ctrl_c_that_is_ignored_stays_so(folder):
    """A server that a script started in the background, with SIGINT ignored, serves on after a Ctrl-C there."""
    with process("-s", folder / "s", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as server:
        server.send_signal(signal.SIGINT)
        ignored = re.search(r"SigIgn:\s+(\w+)", Path(f"/proc/{server.pid}/status").read_text())[1]
        assert int(ignored, 16) >> (signal.SIGINT - 1) & 1 and values(folder / "s", "pwd")
        server.terminate()
        assert server.wait(DEADLINE) == 0


# ---- life and death


BURST = """
def remove_file(self, remove=mi_datagram.UnixServer.remove_file):
    mi_datagram.UnixServer.remove_file = remove
    os.kill(os.getpid(), signal.SIGTERM)
    remove(self)
mi_datagram.UnixServer.remove_file = remove_file
"""


@pytest.mark.parametrize("children, how", [
    *[(1, how) for how in ("SIGTERM", "kill", "burst", "Ctrl-C twice")],
    *[(3, how) for how in ("SIGTERM", "kill", "Ctrl-C", "SIGTERM twice")],
])
def test_stopping(folder, how, children):
    """Told to end, once or in a burst, a server lets the running command reply; later, at once; SIGHUP does nothing."""
    path, held = folder / "s", folder / "held"
    arguments = ["--children_count", children, "--socket_timeout", "600000"]  # so that nobody is killed for being late
    load = BURST if how == "burst" else ""
    with manager(f"@{folder}") as (notices, env), ops_process(folder, *arguments, env=env, load=load) as server:
        pids = processes(path, children + (children > 1))
        with post(path, b":hold:\nheld\n") as sock:
            wait_until(held.exists)
            for pid in pids:
                os.kill(pid, signal.SIGHUP)
            assert processes(path, len(pids)) == pids
            end(server, how, path)
            wait_until(lambda: not path.exists())
            wait_until(lambda: process_state(server.pid)[0] == "S")  # it waits for the command
            if "twice" in how:
                wait_until(lambda: server.poll() is not None or end(server, how, path))
                assert server.returncode < 0
            else:
                held.unlink()
                assert sock.recv(100) == b"200 OK\nreleased\n"
                wait_until(lambda: server.poll() is not None or server.send_signal(signal.SIGHUP))
                assert server.returncode == 0
        assert notices.recv(100) == b"READY=1" and is_empty(notices)


@pytest.mark.parametrize("children", [1, 2])
def test_signals_to_what_a_command_forked(folder, children):
    """A signal to a process that a command forked ends it, as by default; it can log, and has no signal blocked."""
    path = folder / "s"
    with ops_process(folder, "--children_count", children, load=WORKERS) as server:
        assert int(values(path, "blocked")[0], 16) == 0
        assert {values(path, "terminated")[0] for _ in range(10)} == {"-15"}
        with post(path, b":hold_in_fork:\nheld\n") as sock:
            wait_until(lambda: "at work on held" in "".join(server.log))
            os.killpg(server.pid, signal.SIGTERM)
            assert sock.recv(100) == b"200 OK\n-15\n"
        assert server.wait(DEADLINE) == 0


def redirected(redirection):
    return ["sh", "-c", f'exec "$@" {redirection}', "sh", *MI]


@pytest.mark.parametrize("children, number", [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGKILL)])
def test_stderr_that_nobody_reads(folder, children, number):
    """A pipe that nobody reads delays no reply and no end."""
    path = folder / "s"
    reading, writing = small_pipe()
    options = {"load": "mi_datagram.LOG_QUEUE = mi_datagram.AUDIT_QUEUE = 10; mi_datagram.LOG_DEADLINE = 0.2",
               "command": redirected(f"2>/dev/fd/{writing}"), "pass_fds": [writing]}
    with open(reading, "rb", 0) as pipe, ops_process(folder, "--children_count", children, **options) as server:
        os.close(writing)
        wait_until(lambda: b"listening" in pipe.read(4096))
        _, *serving = processes(path, children + (children > 1))
        for child in serving or [server.pid]:
            with alone(child, serving), Client(str(path), timeout=1000 * DEADLINE) as client:
                assert {client.call_json("who") for _ in range(100)} == {child}
        with post(path, b":hold:\nheld\n"):
            wait_until((folder / "held").exists)
            server.send_signal(number)
            wait_until(lambda: not path.exists())
            server.terminate()
            server.wait(DEADLINE)
        wait_until(lambda: not left_of(server.pid))


@pytest.mark.parametrize("redirection, children", [("2>/dev/full", 2), ("2>&-", 1), (">&- 2>&- <&-", 2)])
def test_nobody_to_tell(folder, redirection, children):
    """It serves where stderr is full or closed (no socket takes its place), and where the service manager is gone."""
    env = {"NOTIFY_SOCKET": "/nonexistent/notify", "LISTEN_PID": "1", "LISTEN_FDS": "1"}  # gone, and another process's
    with ops_process(folder, "--children_count", children, command=redirected(redirection), env=env) as server:
        wait_until(lambda: server.poll() is not None or (folder / "s").exists())
        assert values(folder / "s", "echo", "a") == ["a"]
        assert not os.readlink(f"/proc/{server.pid}/fd/2").startswith("socket")
        server.terminate()
        assert server.wait(DEADLINE) == 0 and server.stdout.read() == ""


def test_log_writer(monkeypatch):
    """Lines wait in their order; beyond a bound they are lost, those of the audit last; the end waits for them."""
    reading, writing = small_pipe()
    for name, value in {"STDERR": writing, "LOG_QUEUE": 10, "AUDIT_QUEUE": 15, "LOG_DEADLINE": 0.1}.items():
        monkeypatch.setattr(mi_datagram, name, value)
    writer, said = mi_datagram.LogWriter(), b""

    def write(name, text, *arguments):
        writer.handle(logging.LogRecord(name, logging.INFO, "", 0, text, arguments, None))

    write("x", 5000 * "x")
    for name, text in ("x", "line %d"), ("mi_datagram.audit", "audit %d"):
        for number in range(20):
            write(name, text, number)
    before = time.monotonic()
    writer.flush()
    assert 0.1 <= time.monotonic() - before < DEADLINE
    monkeypatch.setattr(mi_datagram, "LOG_DEADLINE", DEADLINE)
    for last in b"audit 4\n", b"x: '%d is no number' cannot be formatted":
        while last not in said:
            assert select.select([reading], [], [], DEADLINE)[0]
            said += os.read(reading, 4096)
        writer.flush()
        write("x", "%d is no number", "this")
    assert re.findall(rb"(?:line|audit) \d+\n", said) == [
        *[b"line %d\n" % number for number in range(9)], *[b"audit %d\n" % number for number in range(5)]]
    assert b"26 log lines were lost" in said
    writer.flush()
    os.close(reading)
    write("x", "lost")
    writer.flush()
    reading, other = os.pipe()
    os.dup2(other, writing)
    write("x", "seen")
    writer.flush()
    assert b"mi_datagram: 1 log lines were lost\n" in os.read(reading, 4096)
    for descriptor in (reading, other, writing):
        os.close(descriptor)


def test_ended_as_soon_as_started(folder):
    """Servers that are ended as soon as their socket file is there leave no file and no process."""
    paths = [folder / str(number) for number in range(6)]
    servers = [subprocess.Popen([*MI, "--children_count", str(1 + number % 2), "--socket_name", path],
                                stderr=subprocess.PIPE, start_new_session=True) for number, path in enumerate(paths)]
    waiting = dict(zip(paths, servers))

    def all_told():
        for path in [path for path in waiting if path.exists()]:
            waiting.pop(path).terminate()
        return not waiting

    wait_until(all_told)
    said = [server.communicate(timeout=DEADLINE)[1].decode() for server in servers]
    assert not [text for text in said if "listening on" not in text or text.count("\n") != 1]
    assert {server.returncode for server in servers} == {0}
    assert not any([left_of(server.pid) for server in servers]) and os.listdir(folder) == []


# ---- children


def test_children(folder):
    """All children answer, and as one, while one is busy and after one was replaced; the parent does nothing."""
    path = folder / "s"
    with ops_process(folder, "--children_count", 3) as server:
        parent, *children = processes(path, 4)
        assert parent == server.pid

        def in_each(*words):
            found = []
            for child in children:
                with alone(child, children):
                    found += values(path, *words)
            return found

        with post(path, b":hold:\nheld\n") as sock:
            wait_until((folder / "held").exists)
            assert in_each("who") == [*map(str, children)]

            def parent_sleeps():
                before = Path(f"/proc/{parent}/status").read_text()
                with Client(str(path), timeout=1000 * DEADLINE) as client:
                    assert {client.call_json("who") for _ in range(200)} <= {*children}
                return before == Path(f"/proc/{parent}/status").read_text()

            wait_until(parent_sleeps)
            (folder / "held").unlink()
            assert sock.recv(100) == b"200 OK\nreleased\n"
        requests = "get_statistics", "mi_datagram:requests"
        first = int(values(path, *requests)[0])
        assert in_each(*requests) == [str(first + i) for i in (1, 2, 3)]
        with alone(children[1], children):
            values(path, "debug", "3")
            values(path, "reset_statistics", "mi_datagram:requests")
        assert in_each(*requests) == ["1", "2", "3"]
        wait_until(lambda: in_each("debug") == 3 * ["3"])
        kill(children[0])
        _, *children = processes(path, 4)
        assert in_each("debug") == 3 * ["3"] and in_each(*requests)[0] != "1"


def test_pauses_before_children_that_die_young(folder):
    """A child that dies within a second of its start is replaced after a pause, which doubles."""
    with ops_process(folder, "--children_count", 2, load=DIE_YOUNG) as server:
        wait_until(lambda: "fork 4 at " in "".join(server.log))
    second, third, fourth = [float(re.search(f"fork {number} at (.*)", "".join(server.log))[1]) for number in (2, 3, 4)]
    assert third - second >= 0.1 and fourth - third >= 0.2


@pytest.mark.parametrize("number, hook, why, deaths", DEATHS, ids=["fork", "told"])
def test_child_that_died_is_replaced(folder, number, hook, why, deaths):
    """Another child takes the place of one that served and dies, once one can be had; the others serve on."""
    with ops_process(folder, "--children_count", 2, load=hook, fails=True) as server:
        killed = int(values(folder / "s", "who")[0])  # one that dies before it has served would end the server
        kill(killed, number)
        wait_until(lambda: why in "".join(server.log))
        assert values(folder / "s", "who")
        wait_until(lambda: "".join(server.log).count("another takes its place") == deaths)
        wait_until(lambda: killed not in processes(folder / "s"))
        server.terminate()
        assert server.wait(DEADLINE) == 0


@pytest.mark.parametrize("hook, why", CANNOT_SERVE, ids=["exits", "raises"])
def test_child_that_cannot_serve(folder, hook, why):
    """A child that ends before it served, also in a dead one's place, ends the server: it says why and exits with 1."""
    with ops_process(folder, "--children_count", 2, load=hook, fails=True) as server:
        if "bad" in hook:
            _, child, _ = processes(folder / "s")
            (folder / "bad").touch()
            os.kill(child, signal.SIGKILL)
        assert server.wait(DEADLINE) == 1
        wait_until(lambda: why in "".join(server.log))


@pytest.mark.parametrize("halted", ["parent", "child"])
def test_signal_to_all_where_one_is_halted(folder, halted):
    """A child that does not end in time is killed; a parent may hear first that its children ended."""
    load = "mi_datagram.SOCKET_TIMEOUT = mi_datagram.LOG_DEADLINE = 0.1"
    with ops_process(folder, "--children_count", 2, "--socket_timeout", 1, load=load) as server:
        parent, *children = processes(folder / "s")
        os.kill(parent if halted == "parent" else children[0], signal.SIGSTOP)
        os.killpg(server.pid, signal.SIGTERM)
        if halted == "parent":
            wait_until(lambda: {process_state(pid)[0] for pid in children} == {"Z"})
            server.send_signal(signal.SIGCONT)
        assert server.wait(DEADLINE) == 0
    assert not any("takes its place" in line for line in server.log)


def test_sigterm_under_load(folder):
    """Every request that was taken before SIGTERM gets its reply, all processes end, and the exit status is 0."""
    arguments = ["--children_count", 3, "--socket_timeout", "600000"]  # so that nobody is killed for being late
    with ops_process(folder, *arguments) as server, contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(post(folder / "s", b":note:\nfirst\n")) for _ in range(8)]
        replies = []
        while server.poll() is None:
            for sock in select.select(sockets, [], [], 0.005)[0]:
                replies.append(sock.recv(100).decode())
                with contextlib.suppress(OSError):  # nobody reads any more
                    sock.sendto(b":note:\n%d\n" % len(replies), socket.MSG_DONTWAIT, str(folder / "s"))
                if len(replies) == 100:
                    server.terminate()
        replies += [sock.recv(100).decode() for sock in select.select(sockets, [], [], 0)[0]]
        assert server.returncode == 0
    taken = (folder / "notes").read_text().split()
    assert sorted(replies) == sorted([f"200 OK\n{number}\n" for number in taken])


def test_killed_parent(folder):
    """When the parent is killed its children end by themselves, whatever runs or was forked; the socket file goes."""
    arguments = ["--children_count", 3, "--socket_timeout", "600000"]
    with ops_process(folder, *arguments, load=WORKERS) as server, post(folder / "s", b":hold:\nheld\n"):
        processes(folder / "s", 4)
        (folder / "parent").touch()
        wait_until(lambda: (folder / "held").exists() and "at work on parent" in "".join(server.log))
        server.kill()
        wait_until(lambda: len(left_of(server.pid)) == 1 and not (folder / "s").exists())
        (folder / "parent").unlink()


# ---- who is asking, systemd, and machines that lack something


@pytest.mark.parametrize("name, allow, allowed", [
    ([], ["--allow_user", os.getuid()], True), ([], ["--allow_user", os.getuid() + 1], False),
    (["-s", "./s"], ["--allow_user", os.getuid() + 1, "--allow-user", os.getuid()], True),
    (["-s", "udp:127.0.0.1:0"], ["--allow_network", "127.0.0.0/8"], True),
    (["-s", "udp:127.0.0.1:0"], ["--allow_network", "10.0.0.0/8"], False),
])  # fmt: skip
def test_whom_the_command_line_lets_in(folder, main, served, name, allow, allowed):
    """Where the server says that it listens, by default where `call` asks by default, it lets in whom it is told."""
    def ask(server, _):
        is_silent = isinstance(server.server_address, tuple) and not allowed
        asked = name and ["-s", server.socket_name]
        done = main("call", *asked, "--timeout", 50 if is_silent else 1000 * DEADLINE, "pwd")
        code, stdout = (0, f"WD:: {folder}\n") if allowed else (3 if is_silent else 1, "")
        assert (done.returncode, done.stdout) == (code, stdout) and ("403 Forbidden" in done.stderr) is (code == 1)
        assert f"mi_datagram: listening on {server.socket_name}\n" in done.stderr
        assert name or done.stderr.startswith("mi_datagram: no socket_name given, using ./mi_datagram.sock\n")
        wait_until(lambda: count(server, "forbidden") == (not allowed))

    served(ask, *name, *allow)


@pytest.mark.parametrize("host, children", [("", 1), ("127.0.0.1", 1), ("::1", 2)])
def test_passed_socket(folder, host, children):
    """A socket of systemd is served, its file and mode stay, nobody inherits it, and systemd hears READY=1."""
    path, inner = folder / "s", folder / "inner.py"
    inner.write_text("import subprocess, mi_datagram\nmi = mi_datagram.Interface()\nmi.command(lambda: subprocess.run("
                     "'ls -l /proc/self/fd; env', shell=True, close_fds=False, stdout=-1).stdout, name='inner')\n")
    notify = str(folder / "notify") if children == 1 else f"@{folder}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET if host else socket.AF_UNIX
    with socket.socket(family, socket.SOCK_DGRAM) as passed, manager(notify) as (notices, env):
        passed.bind((host, 0) if host else str(path))
        host or path.chmod(0o604)
        allow = ["--allow_network", host] if host else ["--allow_user", os.getuid()]
        socket_name = f"udp:{host}:{passed.getsockname()[1]}" if host else str(path)
        arguments = [passed.fileno(), "--load", inner, "--children_count", children, *allow]
        command = (sys.executable, "-c", LAUNCHER)
        with process(*arguments, command=command, pass_fds=arguments[:1], env=env) as server:
            passed.close()
            assert notices.recv(100) == b"READY=1"
            assert processes(socket_name, 1 if children == 1 else 3)[0] == server.pid
            text = values(socket_name, "inner")[0]
            assert "PYTHONPATH" in text and "LISTEN_" not in text and "/proc" in text and " 3 -> socket" not in text
        assert server.returncode == 0 and is_empty(notices)
        assert host or stat.S_IMODE(path.stat().st_mode) == 0o604


REFUSE = """
import os, socket, mi_datagram
unix, datagram = socket.AF_UNIX, socket.SOCK_DGRAM
for count, family, kind, name in [
    (2, unix, datagram, "./s"), (1, unix, socket.SOCK_STREAM, "./t"), (1, unix, datagram, "\\0mi-%d" % os.getpid()),
    (1, socket.AF_NETLINK, datagram, (0, 0)), (1, None, None, None),
]:
    passed = os.open(os.devnull, os.O_RDONLY)
    if name:
        sock = socket.socket(family, kind)
        sock.bind(name)
        passed = sock.detach()
    os.dup2(passed, 3)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count))
    assert mi_datagram.main([]) == 2
"""


def test_passed_socket_refused(folder):
    """Several sockets, none, or one that is of another kind or has an abstract name, are one line and exit status 2."""
    done = run(sys.executable, "-c", REFUSE, cwd=folder)
    assert done.returncode == 0 and ["LISTEN_FDS" in line for line in done.stderr.splitlines()] == 5 * [True], done


def test_tox_cannot_be_had(folder):
    """Where tox cannot be had one line says why, and an environment that is half-made is made anew, or goes."""
    shutil.copy(__file__, folder / "test.py")
    half_made = folder / ".venv" / "bin" / "python"
    half_made.parent.mkdir(parents=True)
    half_made.symlink_to(sys.executable)
    script = "import runpy, sys; sys.modules['ensurepip'] = None; runpy.run_path('test.py', run_name='__main__')"
    done = run(sys.executable, "-c", script, cwd=folder)
    assert (done.returncode, done.stderr.count("\n"), os.listdir(folder)) == (2, 1, ["test.py"]), done.stderr
    assert "apt install python3-venv" in done.stderr


# ------------------------------------------------------------------- fuzz ----
#
# The invariant, whatever comes in. Nothing leaves the module but its own errors. Each request gets one well-formed
# reply in its own dialect: three digits, a reason and whole lines; or an answer, or an array of them, with the ids that
# were sent, in their order. Nothing else is answered: an empty datagram, one that starts with a digit, a notification,
# somebody's answer, and so no reply either. A log record cannot pass for two. No thread, descriptor or memory is lost.

FUZZ_SECONDS = float(os.environ.get("MI_FUZZ_SECONDS") or 1)  # for all kinds together
FUZZ_SEED = int(os.environ.get("MI_FUZZ_SEED") or random.SystemRandom().randrange(1 << 32))
FUZZ_NAMES = ["echo", "typed", "later", "broken", "nothing", "__class__", "unknown", *CORE]  # but "kill" is not there
FUZZ_SHORT = [
    *'":,{}[]()#*/\t\n \r\v\0\x85\u2028\\\'é�²', "", ":: ", "200 OK", "\x1b[2J", "a", "all", "1", "-1", "1e999", "0x1F",
    "0660", "true", "null", "NaN", "Infinity", "\\ud800", "::", "mi_datagram:", "%s%n{0}", "../", "udp:", "[::1]",
    "#!if", "/*", "root", "id", "method", "result", "error", "params", "command",
]  # fmt: skip
FUZZ_WORDS = [*FUZZ_SHORT, *FUZZ_NAMES, "9" * 5000, "[" * 50_000, "x" * 66_000]
FUZZ_JSON = json.JSONDecoder(parse_constant=int, parse_float=lambda t: float(t) if float(t) * 0 == 0 else int(t))


def fuzz_text(rng, *seeds):
    """Spoil one of the SEEDS, or not: drop, repeat or replace a slice, or put a word in its place."""
    text = rng.choice(seeds)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        start = rng.randrange(len(text) + 1)
        end = start + rng.choice([0, 1, 1, 2, 8, 64])
        byte = bytes([rng.randrange(256)]).decode("utf-8", "surrogateescape")
        text = text[:start] + rng.choice(["", text[start:end] * 2, byte, rng.choice(FUZZ_WORDS)]) + text[end:]
    return text


def fuzz_call(rng):
    """Make a call of JSON-RPC, or nearly one."""
    values = [rng.choice([None, True, -1, 0.1, 10**30, "\ud800", [[]], {"a": {}}, *FUZZ_SHORT]) for _ in range(4)]
    params = rng.choice([*values[:1], values[:1], values[:2], values[:3], *[dict(zip(n, values)) for n in ("a", "ad")]])
    call = {"jsonrpc": "2.0", "method": rng.choice(FUZZ_NAMES), "params": params, "id": values[3]}
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        call.pop(rng.choice(["jsonrpc", "method", "params", "id"]), None)
    return call if rng.random() < 0.8 else {**call, rng.choice(["result", "error", "method"]): values[3]}


def fuzz_datagram(rng):
    """Make a datagram of either dialect, as its grammar says or spoilt, and at times too long."""
    arguments = [rng.choice(["", "a::", "command::"]) + fuzz_text(rng, *FUZZ_WORDS) for _ in range(rng.randrange(4))]
    line = "\n".join([f":{rng.choice(FUZZ_NAMES)}:", *arguments])
    batch = [fuzz_call(rng) for _ in range(rng.choice([0, 1, 2, 3, 3, 70]))]
    noise = rng.getrandbits(320).to_bytes(40, "big").decode("utf-8", "surrogateescape")
    text = fuzz_text(rng, line, line, json.dumps(fuzz_call(rng)), json.dumps(batch), noise)
    return text.encode("utf-8", "surrogateescape")[:65_500]


def fuzz_expect(data):
    """Say what DATA must get: "line" or "error" for such a reply, else the ids of the answers, [] for silence."""
    if data.lstrip()[:1] not in (b"{", b"["):
        return [] if not data or data[:1].isdigit() else "line"
    if len(data) > 65457:
        return "error" if b'"method"' in data else []
    try:
        document = FUZZ_JSON.decode(data.decode())
    except (RecursionError, ValueError):
        return "error"
    calls = document if isinstance(document, list) else [document]
    calls = [call if isinstance(call, dict) else {"id": {}} for call in calls]
    if any("method" not in call and ("result" in call or "error" in call) for call in calls):
        return []
    asked = [
        call.get("id") for call in calls if "id" in call or call.get("jsonrpc") != "2.0"
        or call.get("method").__class__ is not str or call.get("params", []).__class__ not in (list, dict)
    ]  # fmt: skip
    return [i if i.__class__ in (str, int, float) else None for i in asked] if 1 <= len(calls) <= 64 else "error"


def fuzz_requests(rng, mi, other, sock):
    """A datagram to MI, or over SOCK to a server of it: one reply or none, and as it must be."""
    data, late = fuzz_datagram(rng), []
    expected = fuzz_expect(data)
    with contextlib.suppress(mi_datagram.RequestError):
        mi_datagram.parse_reply(b"200 " + data)
    if sock is None:
        [reply] = [r for r in (mi.answer(data, None, late.append), *late) if r] or [b""]
    else:
        sock.send(data)
        reply = sock.recv(1 << 20) if expected else b""
        mark = b"%d\n" % rng.randrange(1 << 60)
        sock.send(b":echo:\n" + mark)
        assert sock.recv(1 << 20) == b"200 OK\n" + mark  # and nothing before it
    assert bool(reply) == bool(expected) and other.answer(reply) is None
    if expected == "line":
        assert re.match(rb"\d{3} [^\n]*\n", reply) and reply.endswith(b"\n") and mi_datagram.parse_reply(reply)
    elif expected:
        document = FUZZ_JSON.decode(reply.decode())
        answers = document if isinstance(document, list) else [document]
        assert {*map(tuple, answers)} <= {("jsonrpc", "result", "id"), ("jsonrpc", "error", "id")}
        if expected == "error" or answers[0].get("error", {}).get("code") == -32603:  # one for all that do not fit
            assert len(answers) == 1 and "error" in answers[0] and answers[0]["id"] in (None, expected[0])
        else:
            assert [a["id"] for a in answers] == expected and (answers is document) == data.lstrip().startswith(b"[")


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", ["answer", "unix", "udp"])
def test_whatever_comes_in_the_invariant_holds(kind, folder, monkeypatch, caplog):
    """Hostile bytes, grammatical and not, break nothing; MI_FUZZ_SEED brings the same ones again."""
    rng, sock, rounds, forged = random.Random(f"{FUZZ_SEED} {kind}"), None, 0, []
    mi, other = interface(core={*CORE} - {"kill"}, logger=logging.getLogger("fuzz")), interface()
    mi.command(lambda *values: {"\n2026-01-01 forged": 1}[values], name="broken")

    @mi.command(pass_request=True)
    def later(request, *values):
        request.defer(1000).reply(values or CommandError(404, "No\nvalue"))

    @mi.command
    def typed(a: int, b: float = 0, c: bool = False, *, d: str | None = None):
        return [Node("tree", a, {"b": b}, {"c": c, "d": d})]

    def look(record):  # and let none through, as minutes of them need memory
        if not record.getMessage().replace("\n    | ", "").isprintable():
            forged.append(record)

    for logger in (mi_datagram.log, mi_datagram.audit):
        monkeypatch.setattr(logger, "filters", [look])
        caplog.set_level(logging.DEBUG, logger.name)
    before, count_blocks = traces(), lambda: (gc.collect(), getattr(sys, "getallocatedblocks", int)())[1]  # not on PyPy
    with contextlib.ExitStack() as stack:
        if kind != "answer":
            server = stack.enter_context(serving(mi, folder / "s" if kind == "unix" else "udp:127.0.0.1:0"))
            sock = stack.enter_context(client_socket(server, connect=True))
        end = time.monotonic() + FUZZ_SECONDS / 3
        while time.monotonic() < end or rounds < 100:
            try:
                fuzz_requests(rng, mi, other, sock)
            except Exception as error:
                raise AssertionError(f"MI_FUZZ_SEED={FUZZ_SEED}, {kind}, round {rounds}") from error
            rounds += 1
            if rounds == 50:  # most of what is kept once, as the lines of a traceback, is there
                blocks = count_blocks()
    wait_until(lambda: no_more_than(before))
    print(f"MI_FUZZ_SEED={FUZZ_SEED}: {kind}, {rounds} rounds, {(more := count_blocks() - blocks)} blocks more")
    assert not forged and more < 20_000, f"MI_FUZZ_SEED={FUZZ_SEED}"


# ------------------------------------------------------- clients of others ----

X3 = {"Flushed": {"zone": "x", "limit": 3}}
OPENSIPS_CALLS = [  # for OpenSIPSMI.execute: command, parameters, and the result or the text of the error
    ("nothing", None, "OK"), ("echo", ["a", 1, None], ["a", 1, None]), ("cache_flush", ["x", 3], X3),
    ("cache_flush", {"limit": "3", "zone": "x"}, X3), ("cache_flush", ["none"], "404: No such zone"),
    ("cache_flush", [1, 2, 3], "-32602: Invalid params (Too few or too many parameters)"),
]
NO_ERRORS = {"mi_datagram:parse_errors": 0, "mi_datagram:forbidden": 0}
CLI_CALLS = [  # for `opensips-cli -x mi`: words, and what it prints
    (["nothing"], "OK"), (["echo", "a", "b c"], ["a", "b c"]), (["-j", "cache_flush", "x", "3"], X3),
    (["cache_flush", "zone=x", "limit=3"], X3), (["cache_flush", "x", "3"], X3),
    (["get_statistics", "parse_errors", "forbidden"], NO_ERRORS), (["which", "core:ps"], [[]]),
    (["statistics:get", "statistics=parse_errors forbidden"], NO_ERRORS),
]
CLI_ERRORS = [(["nonesuch"], "no command 'nonesuch'"), (["cache_flush", "zone=none"], "404: No such zone"),
              (["cache_flush", "limit=x"], "-32602: Invalid params (Bad type for parameter 'limit')")]
KAMCLI = {  # words of kamcli, and what it prints
    "ps": r" *0 +\d+ .+\n", "uptime": r'(?s).*"up_since": ".+', "srv version": r'(?s).*"result": "mi_datagram \(.+',
    "stats": r"(?s).*mi_datagram:requests = \d+.*", "stats -s parse_errors": r"(?s).*mi_datagram:parse_errors = 0.*",
    "rpcmethods": r'(?s).*"cache_flush",\s+"core\.arg".*', "jsonrpc cache_flush s:x i:3": r'(?s).*"limit": 3\s.*',
}
NODE = """const [port, ...words] = process.argv.slice(1);
const client = require("opensips-mi").create("datagram", {port: Number(port), maxRetries: 50});
const command = client.command(...words);
command.then(reply => console.log([reply.code, ...reply.body].join()), error => console.log(error.message));
"""


@pytest.mark.clients
@pytest.mark.parametrize("udp", [[], ["--socket_name", "udp:127.0.0.1:0"]], ids=["unix", "udp"])
def test_opensips(folder, udp):
    """OpenSIPS's Python client and opensips-cli run what `which` lists, and refuse others."""
    from opensips.mi import OpenSIPSMI, OpenSIPSMIException

    command = sys.executable, "-m", "opensipscli.main", "-f", "cli.cfg", "-x", "--", "mi"
    cli = functools.partial(run, *command, env={**os.environ, "HOME": str(folder)}, cwd=folder)
    with ops_process(folder, *udp) as server:
        by_port = {"datagram_ip": "127.0.0.1", "datagram_port": server.log[-1].rpartition(":")[2].strip()}
        address = by_port if udp else {"datagram_unix_socket": str(folder / "s")}
        client, settings = OpenSIPSMI("datagram", **address), {**address, "communication_type": "datagram"}
        for command, params, result in OPENSIPS_CALLS:
            try:
                assert client.execute(command, params) == result
            except OpenSIPSMIException as error:
                assert f"Error executing command: {result}" in str(error)
        lines = [f"{name}: {value}\n" for name, value in {**settings, "log_level": "ERROR"}.items()]
        (folder / "cli.cfg").write_text("[default]\n" + "".join(lines))
        for words, result in CLI_CALLS:
            done = cli(*words)
            assert (done.returncode, done.stderr, json.loads(done.stdout)) == (0, "", result)
        for words, error in CLI_ERRORS:
            done = cli(*words)
            assert done.returncode != 0 and error in done.stdout + done.stderr


@pytest.mark.clients
def test_opensips_mi(folder):
    """The Node client of OpenSIPS reads our replies; what it sends again meanwhile is not run again."""
    if not shutil.which("npm") or run("npm", "install", "--prefix", folder, "--no-audit", "opensips-mi").returncode:
        pytest.skip("there is no npm here, or it has no opensips-mi for us")
    with ops_process(folder, "--socket_name", "udp:127.0.0.1:0") as server:
        socket_name = server.log[-1].split()[-1]
        env = {**os.environ, "NODE_PATH": str(folder / "node_modules"), "NODE_NO_WARNINGS": "1"}
        node = ["node", "-e", NODE, socket_name.rpartition(":")[2]]
        for words, said in [(["echo", "a", "n::v"], "200,a,n:: v\n"), (["nonesuch"], "500 - command not available\n")]:
            assert run(*node, *words, env=env).stdout == said
        with subprocess.Popen([*node, "hold", "held"], stdout=subprocess.PIPE, text=True, env=env) as patient:
            wait_until(lambda: int(values(socket_name, "get_statistics", "retransmissions")[0]) > 2)
            (folder / "held").unlink()
            assert patient.communicate(timeout=60)[0] == "200,released\n"
        assert not (folder / "held").exists()


@pytest.mark.clients
def test_kamcli(folder):
    """Kamailio's kamcli knows our processes, statistics and commands by its own names for them."""
    if not shutil.which("kamcli"):
        pytest.skip("kamcli is not here (apt install kamcli)")
    (folder / "kamcli.ini").write_text(f"[ctl]\ntype=jsonrpc\n[jsonrpc]\ntransport=socket\noutformat=json\n"
                                       f"srvaddr={folder}/s\nrcvaddr={folder}/reply\nkamgroup={grp.getgrgid(os.getgid()).gr_name}\n")
    with ops_process(folder):
        for words, printed in KAMCLI.items():
            done = run("kamcli", "--no-default-configs", "--config", folder / "kamcli.ini", *words.split())
            assert done.returncode == 0 and re.fullmatch(printed, done.stdout), done


# ------------------------------------------------------------------- README ----


def readme(kind):
    """List the blocks of KIND in the README, as somebody would copy them."""
    blocks = re.findall(rf"\.\. code-block:: {kind}\n\n((?:    .*\n|\n)+)", (HERE / "README.rst").read_text("utf-8"))
    return [textwrap.dedent(block).strip() + "\n" for block in blocks]


@pytest.fixture
def programs(folder):
    """A folder with the README's programs, each under the name in its first line, and a /run/app that can be written."""
    for code in readme("python"):
        (folder / code.split()[1]).write_text(code.replace("/run/app", str(folder)))
    return folder


def without_place(text):
    """Leave out the time and the folder, which differ each time."""
    text = re.sub(r"\w{3} \w{3} [ \d]\d [\d:]{8} \d{4}|(?<=:: )\d+(?= .sec)", "TIME", text.replace("\r", ""))
    return re.sub(r"(?<= on )/\S*/", "/PATH/", text).strip()


def test_terminals_of_the_readme(programs):
    """What is typed in one terminal of the README serves; what is typed in the other prints what the README shows."""
    blocks = [block.removeprefix("$ python3 ").partition("\n") for block in readme("console")]
    for (words, _, shown), (first, _, others) in zip(blocks[::2], blocks[1::2]):
        with Terminal(*shlex.split(words), command=[sys.executable], cwd=programs) as server:
            wait_until(lambda: [*programs.glob("*.sock")])
            for typed in f"{first}\n{others}".split("\n$ python3 "):
                asked, _, printed = typed.partition("\n")
                done = run(sys.executable, *shlex.split(asked), cwd=programs)
                assert without_place(done.stdout + done.stderr) == without_place(printed)
            server.type("\3")
            assert without_place(server.end()[1]).startswith(without_place(shown))
        assert not [*programs.glob("*.sock")]


# Two workers; gunicorn ends one by sys.exit().
GUNICORN = """
import runpy, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
for _ in range(2):
    runpy.run_path("gunicorn.conf.py")["post_fork"](None, None)
signal.pause()
"""


@pytest.mark.parametrize(("words", "asked", "reply"), [
    (["daemon.py"], "-s ./daemon.sock version", f"Server:: mi_datagram ({mi_datagram.__version__})\n"),
    (["aio.py"], "-s ./aio.sock tasks", "Task-1\nTask-2\n"),
    (["-c", GUNICORN], "-s ./mi-*.sock version", "./mi-1.sock:: \n\tServer:: ops (1.0)\n./mi-2.sock:: \n\tServer:: ops (1.0)\n"),
])  # fmt: skip
def test_programs_of_the_readme(programs, words, asked, reply):
    """The programs serve and end in order by SIGTERM; each worker of gunicorn has a socket, and all are asked at once."""
    with Terminal("-W", "error", *words, command=[sys.executable], cwd=programs) as program:
        wait_until(lambda: run(*MI, "call", *asked.split(), cwd=programs).stdout == reply)
        program.popen.terminate()
        assert program.end() == (0, "") and not [*programs.glob("*.sock")]


def test_tests_of_the_readme(programs):
    """The README's tests of a program pass, and a program that prints prints what the comment behind it says."""
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_app.py", cwd=programs)
    assert "2 passed" in done.stdout, done
    done = run(sys.executable, "-W", "error", "check.py", cwd=programs)
    [said] = re.findall(r"print\(.*# (.*)", (programs / "check.py").read_text())
    assert (done.stdout, done.stderr) == (said.replace("; then ", "\n") + "\n", "")


def test_parameters_of_the_readme():
    """The README's tables name every parameter, statistic and core command."""
    text = (HERE / "README.rst").read_text("utf-8")
    for word in [*mi_datagram.PARAMETERS, *mi_datagram.COUNTERS[2:], *mi_datagram.CORE]:
        assert f"``{word}``" in text, word


# -------------------------------------------------------------------- bench ----

# Programs that serve `sock`, which is bound.
ECHO = """
while True:
    data, address = sock.recvfrom(65458)
    sock.sendto(data, address)
"""
ASYNCIO_ECHO = """
import asyncio

class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.transport.sendto(data, address)

loop = asyncio.new_event_loop()
loop.run_until_complete(loop.create_datagram_endpoint(Echo, sock=sock))
loop.run_forever()
"""
STOCK = """
import socketserver

class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        data, sock = self.request
        name, *values = data.decode().split("\\n")
        sock.sendto(("200 OK\\n%s:: %s\\n" % (values[0], values[1])).encode(), self.client_address)

server = socketserver.ThreadingUDPServer(None, Handler, bind_and_activate=False)
server.socket, server.max_packet_size, server.daemon_threads = sock, 65458, True
server.serve_forever()
"""
OURS = """
import time, mi_datagram
mi = mi_datagram.Interface()

@mi.command(read_only=True)
def store(name: str, value: str):
    return {name: value}

mi.command(lambda seconds: time.sleep(float(seconds)), name="sleep", read_only=True)
mi.command(lambda size: "x" * int(size), name="large", read_only=True)
name = sock.getsockname()
mi.server(name if isinstance(name, str) else "udp:%s:%d" % name, listening=sock).serve_forever()
"""
PYTHON_M = """
import os
open("ops.py", "w").write("import mi_datagram; mi = mi_datagram.Interface(core=())\\n"
    "@mi.command\\ndef store(name: str, value: str): return {name: value}\\n")
os.dup2(os.open("log", os.O_CREAT | os.O_WRONLY), 2)
sys.argv[2:] = ["--load", "ops.py"]
""" + LAUNCHER
CORES = sorted(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))  # the server's first


def differing(request):
    """Return requests with another number in place of each %d, so that no cache can flatter."""
    return [request.replace(b"%d", b"%d" % number) for number in range(8192)]


POSITIONAL = differing(b":store:\nname%d\nvalue number %d\n")
NAMED = differing(b":store:\nname%d\nvalue::value number %d\n")
CASES = [  # of each row its program, its requests, and the floor: its rate as a share of the echo loop's
    ("bare echo", ECHO, NAMED, 0), ("asyncio's bare echo", ASYNCIO_ECHO, NAMED, 0),
    ("stock threading", STOCK, POSITIONAL, 0), ("line", OURS, NAMED, 0.35),
    ("line, audited, python -m", PYTHON_M, NAMED, 0.25),
    ("JSON-RPC", OURS, differing(b'{"jsonrpc":"2.0","method":"store","params":["name%d","%d"],"id":%d}'), 0.26),
    ("unknown command, python -m", PYTHON_M, differing(b":none%d:\n"), 0.16),
]  # fmt: skip
NOISE = 0.85  # of a floor, below which it is not noise


@contextlib.contextmanager
def measured(program, address):
    """Have a program serve ADDRESS on the first core, and this process on the last; return what load() needs."""
    os.sched_setaffinity(0, {CORES[-1]})
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        code = f"import os, socket, sys\nos.sched_setaffinity(0, {{{CORES[0]}}})\n"
        code += "sock = socket.socket(fileno=int(sys.argv[1]))\n"
        command = [sys.executable, "-c", code + program, str(sock.fileno())]
        with subprocess.Popen(command, pass_fds=[sock.fileno()], stderr=subprocess.DEVNULL) as popen:
            try:
                where = {"server_address": sock.getsockname(), "address_family": sock.family}
                server = types.SimpleNamespace(pid=popen.pid, **where)
                ask(server, POSITIONAL[0])
                yield server
            finally:
                popen.kill()


def cpu_ns(pid):
    """Return the CPU time of a process, from the scheduler: ns."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total


def load(server, window, seconds, requests=POSITIONAL):
    """Keep WINDOW requests outstanding, each from its own socket; return requests/s, p50, p99 and CPU time in µs."""
    clock, following, sent, latencies = time.perf_counter, itertools.cycle(requests).__next__, [0.0] * window, []
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(client_socket(server, connect=True)) for _ in range(window)]
        for i, sock in enumerate(sockets):
            sent[i] = clock()
            sock.send(following())
        turns = [(i, sock.recv, sock.send) for i, sock in enumerate(sockets)]
        start, cpu = clock(), cpu_ns(server.pid)
        while clock() < start + seconds:
            for i, receive, send in turns:
                receive(65536)
                now = clock()
                latencies.append(now - sent[i])
                sent[i] = now
                send(following())
        elapsed, cpu = clock() - start, cpu_ns(server.pid) - cpu
        for sock in sockets:
            sock.recv(65536)
    count = len(latencies)
    latencies.sort()
    return count / elapsed, latencies[count // 2] * 1e6, latencies[count * 99 // 100] * 1e6, cpu / 1000 / count


def medians(runs):
    return [*map(statistics.median, zip(*runs))]


@pytest.mark.bench
@pytest.mark.parametrize("transport", ["unix", "udp"])
def test_throughput(transport, folder, monkeypatch):
    """What people run costs little more than a bare echo loop, each row measured beside the others in one run."""
    monkeypatch.chdir(folder)
    rounds, seconds = int(os.environ.get("MI_BENCH_ROUNDS", "5")), float(os.environ.get("MI_BENCH_SECONDS", "0.3"))
    missed = []
    with contextlib.ExitStack() as stack:
        servers = {}
        for program in dict.fromkeys(row[1] for row in CASES):
            address = str(folder / str(len(servers))) if transport == "unix" else ("127.0.0.1", 0)
            servers[program] = stack.enter_context(measured(program, address))
        print(f"\n{transport:5} {'W':>3} {'':26} {'req/s':>9} {'p50 µs':>8} {'p99 µs':>8} {'CPU µs':>7} {'of echo':>8}")
        for window in (1, 8, 32):
            seen = {row[0]: [] for row in CASES}
            for _ in range(rounds):
                for name, program, requests, _ in CASES:
                    seen[name].append(load(servers[program], window, seconds, requests))
            for name, _, _, floor in CASES:
                rate, p50, p99, cpu = medians(seen[name])
                echo = rate / medians(seen["bare echo"])[0]
                print(f"{transport:5} {window:3} {name:26} {rate:9,.0f} {p50:8.1f} {p99:8.1f} {cpu:7.2f} {echo:8.2f}")
                if window > 1 and transport == "unix" and echo < NOISE * floor:
                    missed.append(f"{name}, W={window}: {echo:.2f}, at least {floor}")
    assert not missed


@pytest.mark.bench
@pytest.mark.parametrize("transport", ["unix", "udp"])
def test_growth_with_children(transport, folder):
    """Throughput grows with children_count, as far as each child and this process have a core."""
    os.sched_setaffinity(0, CORES)
    rates = {}
    for children in [count for count in (1, 2, 4, 8, 16) if count <= len(CORES)]:
        name = f"{folder}/{children}" if transport == "unix" else "udp:127.0.0.1:0"
        with process("-s", name, "--children_count", children) as server:
            server.server_address = mi_datagram.parse_socket_name(server.log[-1].split()[-1])
            server.address_family = socket.AF_UNIX if transport == "unix" else socket.AF_INET
            rates[children] = load(server, 64, 1, [b":version:\n"])[0]
    print(f"\n{transport:5}  64 requests/s by children: {', '.join(f'{n}: {rate:,.0f}' for n, rate in rates.items())}")
    assert len(CORES) < 3 or rates[2] > 1.3 * rates[1]


@contextlib.contextmanager
def disturbed(server, request, clients, times, connect):
    """Have CLIENTS send REQUEST so many TIMES, those of more than once go on 100 times a second; they read no reply."""
    sockets, over = [client_socket(server, connect) for _ in range(clients)], threading.Event()

    def send(sock):
        with contextlib.suppress(BlockingIOError):
            sock.sendmsg([request], [], socket.MSG_DONTWAIT, None if connect else server.server_address)

    def go_on():
        for sock in itertools.cycle(sockets) if times > 1 else ():
            if over.wait(0.01):
                return
            send(sock)

    for sock in sockets * times:
        send(sock)
        pause(0.0005)
    thread = in_thread(go_on)
    yield
    over.set()
    thread.join()
    for sock in sockets:
        sock.close()


@pytest.mark.bench
def test_nobody_waits_for_slow_commands_or_silent_clients(folder):
    """Commands that sleep and clients that never read take little from the others."""
    missed = []
    print(f"\n{'clients':22} {'req/s':>9} {'p99 ms':>7} {'of undisturbed':>15} {'threads':>8}")
    small, large = b":store:\na\nb\n", b":large:\n65000\n"
    for kind, clients, connect, request, times in [
        ("sleep", 50, False, b":sleep:\n0.7\n", 1), *[("silent", 1, connect, large, 20) for connect in (False, True)],
        *[("silent", clients, connect, small, 20) for clients in (50, 100) for connect in (False, True)],
    ]:  # fmt: skip
        name = f"{clients} {kind}{' connected' if connect else ''}"
        with measured(OURS, str(folder / name)) as server:
            undisturbed, runs = [], []
            for _ in range(7):  # by turns, as the machine's own pace changes from second to second
                undisturbed.append(load(server, 8, 0.5))
                with disturbed(server, request, clients, times, connect):
                    runs.append(load(server, 8, 0.5))
                    threads = len(os.listdir(f"/proc/{server.pid}/task"))
        (alone, *_), (rate, _, p99, _) = medians(undisturbed), medians(runs)
        print(f"{name:22} {rate:9,.0f} {p99 / 1000:7.2f} {rate / alone:15.2f} {threads:8}")
        assert threads <= 64
        if p99 > 10_000 if kind == "sleep" else rate < 0.8 * alone:
            missed.append(name)
    assert not missed


@pytest.mark.bench
def test_memory_does_not_grow(folder):
    """Half a minute of requests does not make the server's memory grow."""
    with measured(OURS, str(folder / "s")) as server:
        status = Path(f"/proc/{server.pid}/status")
        before, after = [load(server, 8, seconds) and int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
                         for seconds in (3, 30)]  # fmt: skip
    print(f"\nresident kB after 3 and 33 s of requests: {before}, {after}")
    assert after - before < 500
