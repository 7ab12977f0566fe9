"""`mla-jax serve-demo`: a small random model served with paged caches, continuous batching and a shared prompt."""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

from mla_jax.cli import CommandError
from mla_jax.cli.progress import Progress

AXES = ("data", "heads", "context")


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "serve-demo",
        help="serve a small random model on this machine",
        description="Decodes random requests with a small random model: paged caches and a block allocator, requests "
        "that join and leave between steps, a system prompt that is cached once for all. On a CPU, --mesh makes as "
        "many CPU devices as it needs.",
    )
    kinds = ("v3", "v32", "model1")
    parser.add_argument("--attention", choices=kinds, default="v32", help="kind of every layer (default v32)")
    parser.add_argument("--layers", type=int, default=2, help="attention layers (default 2)")
    parser.add_argument("--requests", type=int, default=16, help="how many requests (default 16)")
    parser.add_argument("--batch", type=int, default=4, help="requests at a time (default 4)")
    parser.add_argument("--pages", type=int, default=24, help="pages of 16 tokens a layer (default 24)")
    parser.add_argument("--system-prompt", type=int, default=24, metavar="TOKENS", help="shared tokens (default 24)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and requests (default 0)")
    parser.add_argument(
        "--mesh", default="", metavar="data=2,heads=2,context=2", help="devices along each axis (default: one device)"
    )
    parser.set_defaults(run=run)


def parse_mesh(text: str) -> dict[str, int]:
    """"data=2,context=4" -> sizes of all three axes, 1 where none is named."""
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise CommandError(f"--mesh {text}: cannot read {part!r}; accepted: data=N,heads=N,context=N")
        sizes[name] = int(size)
    return sizes


def run(args: argparse.Namespace) -> int:
    from mla_jax import serve
    from mla_jax.sharding import DecodeSharding

    ds = DecodeSharding(_make_mesh(parse_mesh(args.mesh)), *AXES)
    print(f"mesh    {dict(ds.mesh.shape)} of {jax.devices()[0].device_kind} ({jax.devices()[0].platform})")
    rng = np.random.default_rng(args.seed)
    try:
        config = serve.ModelConfig(
            kind=args.attention, num_layers=args.layers, num_heads=16, prompt_pages=max(1, -(-args.system_prompt // 16))
        )
        engine = serve.Engine(
            config,
            ds,
            serve.init_params(config, ds, args.seed),
            batch=args.batch,
            num_pages=args.pages * args.layers,
            system_prompt=rng.integers(0, config.vocab_size, args.system_prompt).tolist(),
            temperature=args.temperature,
        )
        longest = min(config.max_tokens, engine.pages.capacity_tokens)
        for _ in range(args.requests):
            prompt = rng.integers(0, config.vocab_size, int(rng.integers(2, 12)))
            engine.submit(prompt.tolist(), int(rng.integers(min(16, longest), longest + 1)))
    except ValueError as error:
        raise CommandError(str(error)) from error
    fmt = config.attention.kv_format
    print(f"model   {args.layers} layers of {args.attention}, {fmt.name}, {config.num_heads} heads")
    print(f"prompt  {args.system_prompt} tokens, cached once")
    engine.step()  # compiles
    start, tokens, steps = time.perf_counter(), 0, 0
    with Progress(args.requests) as progress:
        while not engine.is_idle:
            tokens += engine.step()
            steps += 1
            rate = tokens / (time.perf_counter() - start)
            running = sum(row is not None for row in engine.rows)
            state = f"{running} running, {engine.pages.num_free} pages free, {rate:.0f} tokens/s"
            progress.show(len(engine.finished), f"{len(engine.finished)}/{args.requests} done, {state}")
    seconds = time.perf_counter() - start
    engine.pages.check()
    preempted = f"{engine.num_preempted} preemptions"
    print(f"done    {len(engine.finished)} requests, {tokens} tokens in {steps} steps, {preempted}")
    print(f"speed   {tokens / seconds:.0f} tokens/s, {seconds / max(steps, 1) * 1e3:.1f} ms a step")
    first = min(engine.finished)
    print(f"request {first}: {' '.join(map(str, engine.finished[first].tokens[:16]))} ...")
    return 0


def _make_mesh(sizes: dict[str, int]) -> jax.sharding.Mesh:
    """A mesh of the first devices; on CPUs, of as many devices as it takes, unless jax has begun to run."""
    need = int(np.prod(list(sizes.values())))
    if need > 1:
        try:
            if jax.config.jax_num_cpu_devices < need:
                jax.config.update("jax_num_cpu_devices", need)
        except RuntimeError:  # backends are up: what there is, is what there is
            pass
    devices = jax.devices()
    if len(devices) < need:
        raise CommandError(f"--mesh needs {need} devices and this machine has {len(devices)}; accepted: a smaller mesh")
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices[:need])
