"""What to read, how to tokenise it and how to cut it into batches."""

import dataclasses

FORMATS = ('auto', 'text', 'jsonl', 'synthetic')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The data pipeline's settings; together with the files they determine every batch.

  Attributes:
    path: file, folder or glob; None reads the Python standard library's own sources.
    validation_path: file, folder or glob of held-out documents; None splits `path`.
    validation_fraction: expected fraction of documents held out, in (0, 1); unused with
      `validation_path`.
    validation_seed: seed of the held-out split; kept apart from `seed`, so that runs which differ
      in `seed` are evaluated on the same documents.
    format: "auto" (by suffix: .jsonl is one object a line, anything else plain text), "text" or
      "jsonl". A further .xz or .gz suffix is decompressed in each case. "synthetic": `path` is the
      name of a task (rla_jax.data.synthetic.tasks); of the other keys, those of batches count.
    text_field: the field of a jsonl object that holds the document.
    document_separator: plain text is split into documents here; None makes a file one document.
    tokenizer: "byte", or a path that `load_tokenizer` understands.
    seq_len: T, tokens in a row.
    batch_size: B, rows in the global batch of one step, over all processes.
    seed: seed of packing and order.
    cache_dir: folder that keeps the tokenised corpus between runs; None keeps it in memory.
    num_threads: threads that assemble batches; does not affect their content.
    prefetch_batches: batches assembled ahead; does not affect their content.
  """

  path: str | None = None
  validation_path: str | None = None
  validation_fraction: float = 0.05
  validation_seed: int = 0
  format: str = 'auto'
  text_field: str = 'text'
  document_separator: str | None = None
  tokenizer: str = 'byte'
  seq_len: int = 1024
  batch_size: int = 8
  seed: int = 0
  cache_dir: str | None = None
  num_threads: int = 2
  prefetch_batches: int = 8

  def __post_init__(self):
    for name in ('seq_len', 'batch_size', 'num_threads', 'prefetch_batches'):
      _expect_int(name, getattr(self, name), least=1)
    for name in ('seed', 'validation_seed'):
      _expect_int(name, getattr(self, name), least=0)
    if self.path is None and self.format != 'auto':
      raise ValueError(f'format={self.format!r} needs a path; the default corpus is plain text')
    if self.format not in FORMATS:
      raise ValueError(f"format is {self.format!r}, expected one of {', '.join(FORMATS)}")
    if not 0.0 < self.validation_fraction < 1.0:
      raise ValueError(
        f'validation_fraction is {self.validation_fraction!r}, expected a number between 0 and 1'
      )
    for name in ('path', 'validation_path', 'document_separator', 'cache_dir'):
      if getattr(self, name) == '':
        raise ValueError(f'{name} is empty; use None to leave it out')
    for name in ('text_field', 'tokenizer'):
      if not getattr(self, name):
        raise ValueError(f'{name} is empty, expected a name')


def _expect_int(name: str, value, least: int) -> None:
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise ValueError(f'{name} is {value!r}, expected an integer of at least {least}')
