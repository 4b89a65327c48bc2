"""EleutherAI's lm-evaluation-harness on a model with any way of storing keys and values.

    import lm_eval
    from saw_int4_jax.harness import CachedLM

    lm = CachedLM(load_model(DIR), "bdr")
    lm_eval.simple_evaluate(model=lm, tasks=[...])

Needs the extra `evaluate`. Prompts are scored through the cache: every token is stored before
anything reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from saw_int4_jax.comparison import Prepared, advance, prepare
from saw_int4_jax.methods import dense, make_method
from saw_int4_jax.models import Model

# Sequences are padded to a multiple of this: few shapes, few compilations.
_GRAIN = 128


class CachedLM(LM):
    """A model behind a cache, as the harness wants it.

    Args:
      model: the model.
      method: a name that `make_method` knows.
      calibration: text for methods that fit to some.
      batch_size: sequences at a time.
      max_length: longest sequence; older tokens are dropped. `None`: the model's context.
      seed: of what is random in the method.

    Raises:
      ValueError: the method is unknown, or needs calibration text and got none.
    """

    def __init__(
        self,
        model: Model,
        method: str = "bdr",
        *,
        calibration: str = "",
        batch_size: int = 8,
        max_length: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.max_length = max_length or model.config.max_length
        made = make_method(method, model.config.head_dim)
        samples = []
        if made.uses_text and calibration:
            tokens = model.tokenizer.encode(calibration)[: self.max_length]
            samples = dense.layer_samples(model.config, model.params, np.asarray([tokens]))
        self.prepared: Prepared = prepare(made, model.config, model.params, samples, seed)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = []
        for request in requests:
            context, continuation = request.args
            whole, start = self._encode(context + continuation), len(self._encode(context))
            pairs.append((whole, min(max(1, start), len(whole) - 1)))
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        # Every token is predicted once, in stretches of the context's length.
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self._encode(request.args[0])
            for begin in range(0, len(tokens) - 1, self.max_length):
                pairs.append((tokens[begin : begin + self.max_length + 1], 1))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(pairs)):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _encode(self, text: str) -> list[int]:
        """Token ids after a BOS or, without one, an EOS token: there is always a first."""
        tokens = self.model.tokenizer.encode(text)
        if self.model.tokenizer.bos_id is None:
            tokens = [*self.model.tokenizer.eos_ids[:1], *tokens]
        return tokens

    def _score(self, pairs: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """For (tokens, first to score): log-likelihood, and whether it is the greedy choice."""
        results: list[tuple[float, bool]] = []
        for row in range(0, len(pairs), self.batch_size):
            part = [
                (tokens[cut:], max(1, start - cut))
                for tokens, start in pairs[row : row + self.batch_size]
                for cut in [max(0, len(tokens) - 1 - self.max_length)]
            ]
            logits = self._logits([tokens[:-1] for tokens, _ in part])
            for (tokens, start), row_logits in zip(part, logits):
                here = row_logits[start - 1 : len(tokens) - 1].astype(np.float64)
                targets = np.asarray(tokens[start:])
                shifted = here - here.max(-1, keepdims=True)
                log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
                chosen = log_p[np.arange(len(targets)), targets]
                results.append((float(chosen.sum()), bool((here.argmax(-1) == targets).all())))
        return results

    def _logits(self, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "B T vocab"]:
        length = -(-max(map(len, rows)) // _GRAIN) * _GRAIN
        tokens, counts = _pad(rows, self.batch_size, length)
        cache, p = self.prepared.open(self.batch_size, length), self.prepared
        return np.asarray(advance(p.forward, p.variables, tokens, counts, cache)[0])

    def _generate(self, context: str, options: dict) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise ValueError(f"Expected greedy decoding, got {options}")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = int(options.get("max_gen_toks", 256))
        room = max(1, self.max_length - limit)
        prompt = self._encode(context)[-room:]
        length = -(-(len(prompt) + limit) // _GRAIN) * _GRAIN
        tokens, counts = _pad([prompt], 1, -(-len(prompt) // _GRAIN) * _GRAIN)
        p, cache = self.prepared, self.prepared.open(1, length)
        logits, cache = advance(p.forward, p.variables, tokens, counts, cache)
        token = int(logits[0, len(prompt) - 1].argmax())
        new: list[int] = []
        while len(new) < limit and token not in self.model.tokenizer.eos_ids:
            new.append(token)
            text = self.model.tokenizer.decode(new)
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
            step = np.asarray([[token]], np.int32), np.ones(1, np.int32)
            logits, cache = advance(p.forward, p.variables, *step, cache)
            token = int(logits[0, 0].argmax())
        return self.model.tokenizer.decode(new)


def _pad(
    rows: Sequence[Sequence[int]], batch: int, length: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    tokens, counts = np.zeros((batch, length), np.int32), np.zeros(batch, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], counts[i] = row, len(row)
    return tokens, counts
