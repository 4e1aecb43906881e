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
_FIGURE = 'read off a figure (+-0.003), two layers, best of four learning rates; Based setting'


def _row(wikitext: float, lambada: float) -> dict[str, float]:
  return {'wikitext word_perplexity': wikitext, 'lambada perplexity': lambada}


def _needle(s1: float, s2: float, s3: float) -> dict[str, float]:
  names = (f'needle_s{i} accuracy_2048' for i in (1, 2, 3))
  return {name: value / 100 for name, value in zip(names, (s1, s2, s3), strict=True)}


PUBLISHED = {
  'Transformer': Published(_RLA, _row(17.33, 19.53)),
  'Mamba-2': Published(_RLA, _row(18.42, 20.80)),
  'Gated DeltaNet': Published(_RLA, _row(17.27, 15.76)),
  'RDN': Published(_RLA, _row(16.57, 14.93)),
  'DeltaNet (needle)': Published(_GDN, _needle(96.8, 45.6, 47.0)),
  'Mamba-2 (needle)': Published(_GDN, _needle(98.8, 98.8, 47.6)),
  'Gated DeltaNet (needle)': Published(_GDN, _needle(88.4, 99.8, 84.2)),
  'DeltaNet, d = 64': Published(_FIGURE, {'mqar accuracy': 0.793}),
  'Gated DeltaNet, d = 64': Published(_FIGURE, {'mqar accuracy': 0.890}),
  'DeltaNet, d = 128': Published(_FIGURE, {'mqar accuracy': 0.963}),
  'Gated DeltaNet, d = 128': Published(_FIGURE, {'mqar accuracy': 0.988}),
}
