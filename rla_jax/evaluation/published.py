"""Published numbers that results stand beside, by `Result.name`."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Published:
  """One row of a published table.

  Attributes:
    source: where it stands, and what was measured.
    values: numbers by task and metric.
  """

  source: str
  values: Mapping[str, float]


_RLA = 'arXiv:2509.25223, 1.5 B parameters, 100 B tokens of SlimPajama'
_GDN = 'arXiv:2412.06464, 1.3 B parameters, 100 B tokens'
_ZOOLOGY = 'read off a figure (+-0.003), two layers, best of four learning rates; Based setting'

# Accuracy of multi-query associative recall in the Based setting, by mixer and width.
MQAR = {
  'delta_net': {64: 0.793, 128: 0.963, 256: 0.995},
  'gdn': {64: 0.890, 128: 0.988, 256: 0.994},
  'gla': {64: 0.532, 128: 0.771, 256: 0.950},
}
_NAMES = {'delta_net': 'DeltaNet', 'gdn': 'Gated DeltaNet', 'gla': 'GLA'}


def _row(wikitext: float, lambada: float, recall: float | None = None) -> dict[str, float]:
  values = {'wikitext word_perplexity': wikitext, 'lambada perplexity': lambada}
  return values if recall is None else values | {'recall average': recall / 100}


def _needle(s1: float, s2: float, s3: float) -> dict[str, float]:
  names = (f'needle_s{i} accuracy_2048' for i in (1, 2, 3))
  return {name: value / 100 for name, value in zip(names, (s1, s2, s3), strict=True)}


PUBLISHED = {
  'Transformer': Published(_RLA, _row(17.33, 19.53)),
  'Mamba-2': Published(_RLA, _row(18.42, 20.80, 42.54)),
  'Gated DeltaNet': Published(_RLA, _row(17.27, 15.76, 44.99)),
  'RDN': Published(_RLA, _row(16.57, 14.93, 47.11)),
  'DeltaNet (needle)': Published(_GDN, _needle(96.8, 45.6, 47.0)),
  'Mamba-2 (needle)': Published(_GDN, _needle(98.8, 98.8, 47.6)),
  'Gated DeltaNet (needle)': Published(_GDN, _needle(88.4, 99.8, 84.2)),
  **{
    f'{_NAMES[mixer]}, d = {width}': Published(_ZOOLOGY, {'mqar accuracy': accuracy})
    for mixer, by_width in MQAR.items()
    for width, accuracy in by_width.items()
  },
}
