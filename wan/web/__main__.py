"""The command of the page: `python -m wan.web`, or wan-web where it is installed."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from leanwan.errors import InputError

from .guard import Guard, is_loopback

NAME = "wan-web"
AUTH = "WAN_WEB_AUTH"  # an environment variable
MISSING = (
    'the page needs Gradio, install it with: pip install "wan-low-memory[web]", or ".[web]" in a checkout'
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME, description="A page that makes videos with Wan2.1, and their queue."
    )
    parser.add_argument("--port", type=int, default=7860, help="Port (default 7860); 0 for a free one.")
    parser.add_argument(
        "--host", default="127.0.0.1", help="Address to listen at (default 127.0.0.1, this machine alone)."
    )
    parser.add_argument(
        "--auth_file",
        metavar="FILE",
        help="A file whose first line is USER:PASSWORD, which the page and the JSON interface then ask for. Or set "
        f"{AUTH} to it in the environment.",
    )
    parser.add_argument(
        "--auth", metavar="USER:PASSWORD", help="The same, for whoever lists processes to see, too."
    )
    parser.add_argument(
        "--open_to_all",
        action="store_true",
        help="Listen for other machines without a password, all the same.",
    )
    parser.add_argument(
        "--ckpt_dir",
        action="append",
        default=[],
        help="Folder of a checkpoint, or its name on the Hugging Face hub; repeat it for several. Toy tasks need none.",
    )
    parser.add_argument(
        "--out", default="wan-videos", metavar="DIR", help="Folder of all that is made (default wan-videos)."
    )
    parser.add_argument("--device", help="Where to compute, as of the command line.")
    parser.add_argument(
        "--offload_folder", metavar="DIR", help="Where converted weights are kept, as of the command line."
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is interrupted. Returns the exit code: 2 for bad input, 1 for a port that cannot be had."""
    args = build_parser().parse_args(argv)
    try:
        auth = _auth(args)
        _check(args, auth)
        sock = _bound(args.host, args.port)
    except InputError as error:
        return _complain(error.told("--"), 2)
    except OSError as error:
        return _complain(f"{args.host}:{args.port}: {error.strerror or error}", 1)
    try:
        serve(args, auth, sock)
    except ImportError as error:
        if error.name not in ("gradio", "fastapi", "uvicorn"):
            raise
        return _complain(MISSING, 2)
    except InputError as error:
        return _complain(error.told("--"), 2)
    return 0


def serve(args: argparse.Namespace, auth: str | None, sock: socket.socket) -> None:
    """Serves the page on a bound socket, to clients that know `auth` (see Guard).

    Raises InputError for a folder or a checkpoint that cannot be used.
    """
    from leanwan.options import MemoryOptions

    from ..weights.hub import check_checkpoint
    from .jobs import Rules

    folder = _made(args.out)
    for name in args.ckpt_dir:
        check_checkpoint(name)
    MemoryOptions(offload_folder=args.offload_folder)
    checkpoints = tuple(os.path.abspath(name) if Path(name).is_dir() else name for name in args.ckpt_dir)
    offload = args.offload_folder and os.path.abspath(args.offload_folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import uvicorn

    from .page import build_site
    from .service import Service

    service = Service(Rules(folder, checkpoints, args.device, offload))
    guarded = Guard(build_site(service), auth, is_loopback(args.host))
    # At the end uvicorn cuts the stream that each tab keeps open, and would log it.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not record.msg.startswith("Cancel "))
    server = uvicorn.Server(
        uvicorn.Config(
            guarded, log_level="warning", access_log=False, timeout_graceful_shutdown=2, server_header=False
        )
    )
    host, port = sock.getsockname()[:2]
    print(
        f"The page is at http://{f'[{host}]' if ':' in host else host}:{port}, results in {folder}",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[sock])
    print("Ending after this step; what is unfinished goes on at the next start", flush=True)
    try:
        service.close()
    except KeyboardInterrupt:  # a second Ctrl-C does not wait
        service.close(0)


def _auth(args: argparse.Namespace) -> str | None:
    """USER:PASSWORD from --auth, --auth_file or the environment, where child processes then do not see it; or None.

    Raises InputError for text of another form.
    """
    given, named = os.environ.pop(AUTH, None), f" in ${AUTH}"
    where: tuple[str, ...] = ()
    if args.auth is not None and args.auth_file is not None:
        raise InputError("give one of them", ("auth", "auth_file"))
    if args.auth is not None:
        given, named, where = args.auth, "", ("auth",)
    elif args.auth_file is not None:
        given, named, where = _first_line(args.auth_file), " in its first line", ("auth_file", args.auth_file)
    if given is None:
        return None
    user, _, password = given.partition(":")
    if not user or not password or not given.isprintable():
        raise InputError(f"give USER:PASSWORD{named}", *where)
    if args.auth is not None:
        _say(f"--auth shows the password to whoever lists processes; --auth_file FILE and ${AUTH} do not")
    return given


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.readline(4096).rstrip("\r\n")
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", "auth_file", path) from error
    except ValueError as error:
        raise InputError("is not UTF-8 text", "auth_file", path) from error


def _check(args: argparse.Namespace, auth: str | None) -> None:
    if not 0 <= args.port <= 65535:
        raise InputError("give 0 to 65535", "port", args.port)
    if not is_loopback(args.host) and not auth and not args.open_to_all:
        raise InputError(
            "lets other machines in: give --auth_file FILE, or --open_to_all if that is meant",
            "host",
            args.host,
        )


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    if os.name != "nt":  # on Windows it would let two servers share a port
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def _made(out: str) -> Path:
    folder = Path(out).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be made a folder ({error.strerror})", "out", out) from error
    return Path(os.path.realpath(folder))


def _say(line: str) -> None:
    print(f"{NAME}: {line}", file=sys.stderr)


def _complain(message: str, code: int) -> int:
    _say(message)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
