"""Greedy continuations of many prompts, each up to one of its stop strings."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from rla_jax import generation
from rla_jax.data import Tokenizer
from rla_jax.evaluation.scorer import Scorer


def continue_greedily(
  scorer: Scorer,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  until: Sequence[Sequence[str]],
  max_new_tokens: int,
  *,
  batch_size: int = 16,
  description: str | None = None,
) -> list[str]:
  """Continues every prompt by the most probable tokens, through the recurrent step.

  Args:
    scorer: holds the model; its chunk is that of reading the prompts.
    tokenizer: the model's.
    prompts: texts, each the beginning of a document; may be empty.
    until: strings that end a continuation, one list a prompt; they are not part of it.
    max_new_tokens: of each.
    batch_size: prompts that are continued together.
    description: of the progress bar; None: none.

  Returns:
    The continuations, in the order of the prompts.
  """
  encoded = [np.concatenate(([tokenizer.bos_id], ids)) for ids in tokenizer.encode_batch(prompts)]
  order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
  found = [''] * len(prompts)
  hidden = None if description is not None else True
  with tqdm(total=len(prompts), desc=description, unit='prompt', disable=hidden) as bar:
    for start in range(0, len(order), batch_size):
      index = order[start : start + batch_size]
      rows = [encoded[i] for i in index]
      # A batch of another size would be compiled anew.
      rows += [rows[-1]] * (min(batch_size, len(order)) - len(rows))
      texts = _continue(scorer, tokenizer, rows, [until[i] for i in index], max_new_tokens)
      for i, text in zip(index, texts, strict=True):
        found[i] = text
      bar.update(len(index))
  return found


def cut(text: str, until: Sequence[str]) -> str:
  """The text before the first of the stop strings; empty ones stop nothing."""
  ends = [text.find(stop) for stop in until if stop]
  return text[: min((end for end in ends if end >= 0), default=len(text))]


def _continue(scorer, tokenizer, rows, until, max_new_tokens) -> list[str]:
  chunk = min(scorer.chunk, 256)
  made = np.zeros((len(rows), 0), np.int32)
  for block in generation.stream(
    scorer.model, scorer.params, rows, max_new_tokens, temperature=0.0,
    stop_token=tokenizer.eos_id, prefill_chunk=chunk,
  ):  # fmt: skip
    made = np.concatenate((made, block), axis=1)
    texts = [_text(tokenizer, row) for row in made[: len(until)]]
    cuts = [cut(text, stops) for text, stops in zip(texts, until, strict=True)]
    ended = (made[: len(until)] == tokenizer.eos_id).any(axis=1)
    if all(e or len(c) < len(t) for e, c, t in zip(ended, cuts, texts, strict=True)):
      break
  return cuts


def _text(tokenizer: Tokenizer, ids: np.ndarray) -> str:
  stops = np.flatnonzero(ids == tokenizer.eos_id)
  ids = ids[: stops[0]] if stops.size else ids
  # A model's vocabulary may be rounded up: ids beyond the tokenizer's stand for nothing.
  return tokenizer.decode(ids[ids < tokenizer.vocab_size])
