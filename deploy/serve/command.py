"""The command line of `bouquet serve`: vLLM where it is installed, else a small server over PEFT."""

import argparse
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from common.error import BouquetError
from deploy.place import add_model
from deploy.settings import Commands, add_command

EXAMPLE = """Example: bouquet serve exports/flu exports/colds
         bouquet serve flu=runs/flu/adapter --port 8080 --engine peft
         curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' \\
             -d '{"model": "flu", "prompt": "A fever is", "max_tokens": 32}'
All adapters share one base model, which is served too, under its own name. A prompt is continued as it stands: one for
an instruction model must be in that model's own format. Requests for different adapters are answered in one batch."""


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    serve = add_command(commands, "serve", help="serve adapters on an OpenAI-compatible address", example=EXAMPLE)
    serve.add_argument("adapters", nargs="+", metavar="[NAME=]DIR", help="adapter folders, or run directories")
    serve.add_argument(
        "--engine", choices=["auto", "vllm", "peft"], default="auto", help="auto: vLLM if it is installed"
    )
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="the port (default 8000)")
    serve.add_argument("--batch", type=int, default=8, help="requests answered together (peft; default 8)")
    serve.add_argument("--max-tokens", type=int, default=512, help="the longest answer (peft; default 512)")
    add_model(serve)
    serve.set_defaults(work=_serve)


def _serve(options: argparse.Namespace) -> int:
    from deploy import adapters  # what loads models takes seconds to import

    folders = {name: adapters.find(folder) for name, folder in named(options.adapters).items()}
    configs = {name: adapters.settings(folder, options.model) for name, folder in folders.items()}
    first, *others = configs
    for name in others:
        if configs[name].model != configs[first].model:
            raise BouquetError(
                "the adapters are of different base models",
                where=f"{first}, {name}",
                expected=f"'{configs[first].model.name}' for all",
                got=f"'{configs[name].model.name}'",
                cure="Serve them separately; --model says where their common base model is.",
            )
    for name, config in configs.items():
        adapters.demand_language(name, config)
    rank = max(adapters.lora(folder).rank for folder in folders.values())
    if options.engine == "vllm" or (options.engine == "auto" and shutil.which("vllm")):
        return _vllm(folders, configs[first].model.name, rank, options)
    return _peft(folders, options)


def named(arguments: list[str]) -> dict[str, Path]:
    """Adapters by name: the one before ``=``, or the folder's. Raises :class:`BouquetError` where two are the same."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, equals, place = argument.partition("=")
        folder = Path(place if equals else argument)
        name = name if equals else folder.resolve().name
        if not name or name in found:
            raise BouquetError("two adapters with the same name", got=repr(name), cure="Give each its own: NAME=DIR.")
        found[name] = folder
    return found


def _vllm(folders: Mapping[str, Path], base_name: str, rank: int, options: argparse.Namespace) -> int:
    """Become vLLM."""
    from common.models import base
    from deploy.serve import vllm

    places = {name: folder.resolve() for name, folder in folders.items()}
    command = vllm.command(base.location(base_name), places, rank)
    command += ["--host", options.host, "--port", str(options.port)]
    print(shlex.join(command), flush=True)
    if shutil.which("vllm") is None:
        raise BouquetError("vLLM is not installed", cure="pip install vllm, or --engine peft.")
    os.execvp(command[0], command)  # noqa: S606


def _peft(folders: Mapping[str, Path], options: argparse.Namespace) -> int:
    from deploy import adapters
    from deploy.serve.batches import Batches
    from deploy.serve.http import Server

    config = adapters.settings(next(iter(folders.values())), options.model)
    models = {config.model.name: ""} | {name: name for name in folders}
    with (
        Batches(folders, config, options.device, most=options.batch) as batches,
        Server((options.host, options.port), batches, models, options.max_tokens) as server,
    ):
        print(
            f"serving {', '.join(models)} on http://{options.host}:{server.server_port}/v1, Ctrl-C to stop", flush=True
        )
        if options.host not in ("127.0.0.1", "::1", "localhost"):
            print("whoever reaches this address can use it, unencrypted: put a proxy with TLS and keys in front of it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
    return 0
