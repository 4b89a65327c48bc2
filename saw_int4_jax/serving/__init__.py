"""Many requests at a time over one pool of pages: continuous batching over fixed shapes.

The engine in fifteen lines, here with the bundled model:

    from saw_int4_jax import init_cache
    from saw_int4_jax.demo import REFERENCE_MODEL
    from saw_int4_jax.models import Llama, load_model
    from saw_int4_jax.serving import Engine, Request

    model = load_model(REFERENCE_MODEL)
    cache = init_cache(model.config.cache_spec(num_pages=64), batch=8, max_length=1024)
    forward = Llama(model.config, last_only=True).apply
    engine = Engine(forward, model.variables, cache, tokenizer=model.tokenizer)

    encode = model.tokenizer.encode
    poem = engine.submit(Request(encode("My fellow "), max_new_tokens=80, temperature=0.8, seed=1))
    code = engine.submit(Request(encode("def "), max_new_tokens=80, stop=["\\n\\n"]))
    for piece in engine.stream(code):  # the other goes on beside it
        print(piece, end="", flush=True)
    engine.run()
    print(poem.text, poem.finish, engine.status())

`server` puts an OpenAI-compatible HTTP interface before it; its imports need the extra `serve`.
"""

from saw_int4_jax.serving.engine import Engine
from saw_int4_jax.serving.metrics import Metrics, Timing, summarize
from saw_int4_jax.serving.request import Request, Response
from saw_int4_jax.serving.scheduler import Limits, Overloaded, Scheduler

__all__ = [
    "Engine",
    "Limits",
    "Metrics",
    "Overloaded",
    "Request",
    "Response",
    "Scheduler",
    "Timing",
    "summarize",
]
