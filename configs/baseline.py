"""The paper's model of 1.5 B parameters with any mixer in all its layers, 100 B tokens.

Reproduces: the paper's tables, row by row: its baselines are the Transformer, RetNet, Mamba-2, GLA,
  DeltaNet, sGLA and GDN; two_state is the control with RDN's state and parameters, and no residual.
Command: python experiments/train.py --config=configs/baseline.py:mamba2 --workdir=runs/mamba2
  --config.data.path, validation_path and tokenizer say where your text is.
Hardware: meant for 8 GPUs of 80 GB or more, or a TPU slice; --config.device_tokens trades memory
  for speed.
Wall time: not yet run.
Result: not yet run.

Heads of 128 at width 2048, but for these, whose keys and values differ in size as published:
RetNet and GLA have K = 64 and V = 128, half the state of the others; Mamba-2 has 64 heads with one
key of 128 for all and V = 64, so that H V = 2 D, twice their state.
"""

from ml_collections import ConfigDict

from rla_jax.training.paper import get_paper_config

# Mixer of the config string: layer, heads, key size, further attributes of the layer.
BASELINES = {
  'transformer': ('attention', 32, 128, {'num_kv_heads': 4}),
  'retnet': ('retnet', 16, 64, {}),
  'mamba2': ('mamba2', 64, 128, {}),
  'gla': ('gla', 16, 64, {}),
  'delta_net': ('delta_net', 16, 128, {}),
  'sgla': ('sgla', 16, 128, {}),
  'gdn': ('gdn', 16, 128, {}),
  'two_state': ('two_state', 16, 128, {}),
  'kda': ('kda', 16, 128, {}),
  'rla': ('rla', 16, 128, {}),
  'rdn': ('rdn', 16, 128, {}),
}


def get_config(name: str = 'gdn'):
  """The config of a baseline.

  Args:
    name: one of `BASELINES`.

  Raises:
    ValueError: another name.
  """
  if name not in BASELINES:
    raise ValueError(f'unknown baseline {name!r}; expected one of {", ".join(BASELINES)}')
  layer, heads, key_dim, options = BASELINES[name]
  c = get_paper_config('gdn_1p5b')
  c.model.pattern = (layer,)
  c.model.num_heads = heads
  c.model.head_dim = key_dim
  with c.unlocked():
    c.model.layer_options = ConfigDict({layer: options} if options else {})
  return c
