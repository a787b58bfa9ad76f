# SPDX-License-Identifier: 0BSD
"""Tests of mi_datagram, in the order of its sections: tables first, then helpers, then section by section.

`python3 test_mi_datagram.py` runs everything on every Python there is (it fetches tox into .venv);
`python -m pytest` runs the tests on one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_tox(arguments):
    """Run tox, from an environment of its own beside this file, with these arguments; give its exit status."""
    import venv

    home = HERE / ".venv"
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "tox"], check=True)
    return subprocess.run([python, "-m", "tox", *arguments], cwd=HERE, check=False).returncode


if __name__ == "__main__":  # before pytest is needed, which a fresh machine does not have
    sys.exit(run_tox(sys.argv[1:]))

import ast  # noqa: E402
import asyncio  # noqa: E402
import contextlib  # noqa: E402
import ctypes  # noqa: E402
import doctest  # noqa: E402
import errno  # noqa: E402
import fcntl  # noqa: E402
import gc  # noqa: E402
import grp  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import pwd  # noqa: E402
import random  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import select  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import stat  # noqa: E402
import struct  # noqa: E402
import tempfile  # noqa: E402
import termios  # noqa: E402
import textwrap  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import typing  # noqa: E402

import pytest

import mi_datagram
from mi_datagram import Client, CommandError, Interface, Node, Reply, Request

MODULE = HERE / "mi_datagram.py"
DEADLINE = 20  # s after which what a test waits for counts as not happening

# ------------------------------------------------------------------ helpers ----


def wait_until(condition, deadline=DEADLINE):
    """Wait until CONDITION() is true, and give its value; fail if it never is."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"never happened: {condition}"
        time.sleep(0.002)


def interface(core=None, **parameters):
    """Make an Interface with `echo` (its arguments as sent) and `nothing`."""
    mi = Interface(core=core, **parameters)

    @mi.command(pass_request=True, read_only=True)
    def echo(request, *values, **named):
        """Give the arguments back."""
        return [Node(name or None, value) for name, value in request.arguments]

    @mi.command(read_only=True)
    def nothing():
        """Say nothing."""

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


@contextlib.contextmanager
def serving(mi, socket_name, **parameters):
    """Serve MI in the background; give the server."""
    server = mi.server(str(socket_name), **parameters)
    try:
        yield server.start()
    finally:
        server.stop()


_names = 0


def client_socket(server, connect=False, bind=True):
    """Make a plain socket for talking to SERVER, in no way helped by Client."""
    global _names
    if isinstance(server.server_address, tuple):
        sock = socket.socket(server.address_family, socket.SOCK_DGRAM)
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if bind:
            _names += 1
            sock.bind(f"\0mi-test.{os.getpid()}.{_names}")
    if connect:
        sock.connect(server.server_address)
    sock.settimeout(DEADLINE)
    return sock


def ask(server, request, sock=None):
    """Send the bytes of one request, and give those of its reply."""
    with contextlib.ExitStack() as stack:
        if sock is None:
            sock = stack.enter_context(client_socket(server))
        sock.sendto(request, server.server_address)
        return sock.recv(1 << 20)


def count(server_or_interface, statistic):
    """Give a statistic of the server's own group."""
    mi = getattr(server_or_interface, "interface", server_or_interface)
    return mi.statistics[f"mi_datagram:{statistic}"]()


def run(*arguments, stdin=None, **options):
    """Run `python -m mi_datagram ARGUMENTS` to its end; give the CompletedProcess, with text."""
    command = [sys.executable, "-m", "mi_datagram", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(HERE), **options.pop("env", {})}
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, env=environment, check=False, **options
    )


@contextlib.contextmanager
def process(*arguments, command=("-m", "mi_datagram"), **options):
    """Run `python -m mi_datagram ARGUMENTS` until the block ends; give its Popen, once it listens.

    Its stderr is collected in `popen.log`, a list of lines.
    """
    environment = {**os.environ, "PYTHONPATH": str(HERE), **options.pop("env", {})}
    popen = subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )
    popen.log = []

    def read():
        for line in popen.stderr:
            popen.log.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        wait_until(lambda: any("listening on" in line for line in popen.log) or popen.poll() is not None)
        yield popen
    finally:
        if popen.poll() is None:
            popen.terminate()
            try:
                popen.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()
        reader.join(DEADLINE)
        popen.stdout.close()
        popen.stderr.close()


# ------------------------------------------------------------- smoke ----
def test_one_request_goes_the_whole_way(name):
    """A datagram is answered over either transport."""
    with serving(interface(), name) as server:
        assert ask(server, b":echo:\na\n") == b"200 OK\na\n"


def test_process(folder):
    """The command line serves and asks."""
    with process("--socket_name", folder / "s") as server:
        done = run("call", "-s", folder / "s", "pwd")
        assert done.stdout == f"WD:: {os.getcwd()}\n"
    assert server.returncode == 0 and not os.path.exists(folder / "s")
