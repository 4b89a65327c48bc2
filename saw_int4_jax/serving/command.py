"""`saw-int4 serve`: a model from disk behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
import pathlib
import sys

import jax
import jax.numpy as jnp

from saw_int4_jax.cache import init_cache
from saw_int4_jax.demo import METHOD_OPTIONS, REFERENCE_MODEL
from saw_int4_jax.models import Model, load_model
from saw_int4_jax.models.llama import one_layer_forward
from saw_int4_jax.rotation import balance_keys, fold_values
from saw_int4_jax.serving.engine import Engine
from saw_int4_jax.sharding import make_mesh, shard_params

API_KEY = "SAW_INT4_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="as for generate; default: the bundled one")
    parser.add_argument("--name", help="what clients call the model; default: its directory's")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--api-key", help=f"what clients must send; default: ${API_KEY} if set, else nothing"
    )
    parser.add_argument("--method", choices=METHOD_OPTIONS, default="bdr")
    parser.add_argument("--order", type=int, metavar="N", help="rotation order of bdr")
    parser.add_argument(
        "--rotate-v", action="store_true", help="rotate values too, in the weights; bdr alone"
    )
    parser.add_argument("--page-size", type=int, default=128, metavar="S", help="tokens in a page")
    parser.add_argument(
        "--pool-gb",
        type=float,
        metavar="GB",
        help="of the cache on all devices; default: 85%% of free memory",
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="tensor parallel over so many"
    )
    parser.add_argument("--rows", type=int, default=32, help="the most requests at a time")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a request; default: the model's"
    )
    parser.add_argument("--piece", type=int, metavar="T", help="prompt tokens in a prefill row")
    parser.add_argument("--pieces", type=int, metavar="R", help="rows of a prefill call")
    parser.add_argument("--steps", type=int, default=4, help="decode steps of a dispatch")
    parser.add_argument("--max-waiting", type=int, default=256, help="the rest are refused: 429")
    parser.add_argument("--timeout", type=float, metavar="S", help="end answers after S seconds")
    parser.add_argument("--max-body-mb", type=float, default=4.0, help="the rest are refused: 413")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Loads, compiles, then serves until interrupted.

    Raises:
      ValueError: an option does not fit.
      OSError: the extra `serve` is missing, or the model.
    """
    try:
        import uvicorn

        from saw_int4_jax.serving.chat import load_chat_template
        from saw_int4_jax.serving.protocol import Served
        from saw_int4_jax.serving.server import create_app
    except ImportError as error:
        raise OSError(f"{error}: install saw-int4-jax[serve]") from error
    path = pathlib.Path(arguments.model or REFERENCE_MODEL)
    on_cpu = jax.default_backend() == "cpu"
    # One device may be too small for a model that is to lie on several.
    where = jax.devices("cpu")[0] if arguments.devices > 1 else None
    with jax.default_device(where):
        model = load_model(path, arguments.dtype or ("float32" if on_cpu else "bfloat16"))
        model = dataclasses.replace(model, params=balance_keys(model.params, model.config))
    template = load_chat_template(path) if path.is_dir() else None
    engine = make_engine(model, arguments)
    served = Served(
        arguments.name or path.resolve().stem,
        model.tokenizer,
        model.config.vocab_size,
        engine.max_length,
        template.render if template else None,
        arguments.timeout,
    )
    api_key = arguments.api_key or os.environ.get(API_KEY)
    if api_key is None and not is_loopback(arguments.host):
        print(f"saw-int4: warning: {arguments.host} is open to all: no API key", file=sys.stderr)
    print(
        f"{served.name}: {engine.limits.num_pages * engine.limits.page_size:,} tokens of cache, "
        f"compiling",
        file=sys.stderr,
    )
    engine.warm_up()
    app = create_app(
        engine, served, api_key=api_key, max_body_bytes=int(arguments.max_body_mb * 2**20)
    )
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="info",
        timeout_graceful_shutdown=5,
    )


def make_engine(model: Model, arguments: argparse.Namespace) -> Engine:
    """The engine that the options ask for.

    Raises:
      ValueError: an option does not fit.
    """
    options = dict(METHOD_OPTIONS[arguments.method], page_size=arguments.page_size)
    if arguments.order is not None:
        options["order"] = arguments.order
    spec = model.config.cache_spec(1, **options)
    params = model.params
    if arguments.rotate_v:
        if arguments.method != "bdr":
            raise ValueError(f"Expected {arguments.method=} to be 'bdr' with --rotate-v")
        params = fold_values(params, model.config, spec.format.order)
    mesh = None
    if arguments.devices != 1:
        devices = jax.devices()
        if not 1 <= arguments.devices <= len(devices):
            raise ValueError(f"Expected {arguments.devices=} to be within 1 .. {len(devices)}")
        mesh = make_mesh(model.config.num_kv_heads, devices=devices[: arguments.devices])
        params = shard_params(params, mesh)
    page_bytes = spec.bytes_per_token * spec.page_size
    pool_bytes = arguments.devices * free_bytes()
    if arguments.pool_gb is not None:
        pool_bytes = arguments.pool_gb * 1e9
    if pool_bytes < page_bytes:
        raise ValueError(f"Expected a pool of {pool_bytes / 1e9:.3f} GB to hold a page")
    length = min(arguments.max_length or model.config.max_length, model.config.max_length)
    # More than all rows at their longest is never used.
    most = arguments.rows * -(-length // spec.page_size)
    spec = dataclasses.replace(spec, num_pages=min(most, int(pool_bytes // page_bytes)))
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(jax.tree.leaves(params)[0].dtype)
    return Engine(
        one_layer_forward(model.config, dtype),
        {"params": params},
        init_cache(spec, arguments.rows, length, mesh=mesh),
        tokenizer=model.tokenizer,
        piece=arguments.piece or (32 if on_cpu else 256),
        pieces=arguments.pieces or (4 if on_cpu else 8),
        steps=arguments.steps,
        max_waiting=arguments.max_waiting,
    )


def free_bytes() -> float:
    """What the pool may take: 85 % of the device's free memory, 1 GB where that is not known."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return 1e9
    return 0.85 * (stats["bytes_limit"] - stats["bytes_in_use"])


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
