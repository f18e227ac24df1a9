"""A Python that starts in milliseconds: a small client of a server that has imported everything once and forks.

The client passes its words, environment, folder and standard streams on, then signals; it ends as its fork ends, and
the fork with it. Otherwise it does what ``python main.py …`` and ``python -m torch.distributed.run …`` do; the client
``python_without_pictures`` leaves out the pictures, which take most of the time of a small run.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
DRAWING, SPARING = "python", "python_without_pictures"

CLIENT = r"""
import json, os, signal, socket, sys
client, address, *words = sys.argv[1:]
server = socket.socket(socket.AF_UNIX)
server.connect(address)
socket.send_fds(server, [b" "], [0, 1, 2])
asked = dict(words=words, executable=client, folder=os.getcwd(), environment=dict(os.environ))
server.sendall(json.dumps(asked).encode() + b"\n")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
code = int(server.recv(8) or 99)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@cache
def python(name: str = DRAWING) -> Path:
    """The client, to be used in place of ``sys.executable``."""
    return _start() / name


@cache
def _start() -> Path:
    """The server, which goes with this process: the folder of its clients."""
    folder = tempfile.TemporaryDirectory()  # pytest's has too long a name for a socket
    address = Path(folder.name, "socket")
    for name in (DRAWING, SPARING):
        client = Path(folder.name, name)
        words = shlex.join([sys.executable, "-ISc", CLIENT, str(client), str(address)])
        client.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        client.chmod(0o755)
    server = subprocess.Popen([sys.executable, "-m", "tests.served", address], cwd=ROOT, env=ENVIRONMENT)

    @atexit.register
    def stop() -> None:
        server.kill()
        server.wait()
        folder.cleanup()

    while not address.exists():
        assert server.poll() is None
        time.sleep(0.02)
    return Path(folder.name)


def serve(path: str) -> None:
    """Fork for every client, as long as the process that started this one lives."""
    parent = os.getppid()
    import torch.distributed.run  # noqa: F401

    import tests.warm  # noqa: F401

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen(64)
        os.rename(f"{path}.new", path)
        server.settimeout(5)
        while os.getppid() == parent:
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                server.close()
                keep(client)
            client.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass


def keep(client: socket.socket) -> None:
    """Run what a client asks for, with its signals, until either ends."""
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):  # killed meanwhile
        os._exit(0)
    asked = json.loads(line)
    process = os.fork()
    if process == 0:
        client.close()
        os._exit(run(streams=streams, **asked))
    client.setblocking(False)
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            with contextlib.suppress(OSError):
                client.send(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        try:
            signals = list(client.recv(8)) or [signal.SIGKILL]  # no client, no run
        except BlockingIOError:
            signals = []
        except OSError:
            signals = [signal.SIGKILL]
        for number in signals:
            os.kill(process, number)
        time.sleep(0.01)


def run(words: list[str], folder: str, environment: dict[str, str], executable: str, streams: list[int]) -> int:
    """What ``python WORDS`` does; the exit code."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = executable
    if Path(executable).name == SPARING:
        from tests.forked import without_pictures

        without_pictures()
    code: object = 1
    try:
        words = [word for word in words[:1] if word != "-u"] + words[1:]
        module = words[0] == "-m"
        sys.argv = words[module:]
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


if __name__ == "__main__":
    serve(sys.argv[1])
