"""State tracking: parity, arithmetic modulo 5, or permutations of five things (S5), for a mixer.

Reproduces: DeltaNet's parity at beta in (0, 1) and (0, 2): 0.017 and 1.0 scaled accuracy
  (arXiv:2411.12537), 0.51 and 1.0 as a share of right answers.
Command: python experiments/train.py --config=configs/state_tracking.py:delta_net,parity
  --workdir=runs/parity, then python experiments/evaluate.py --workdir=runs/parity
  --suite=state_tracking. The third word of the config string widens beta's range:
  --config=configs/state_tracking.py:delta_net,parity,negative
Hardware: one GPU, or a CPU for a smaller --config.steps.
Wall time: not yet run at full length.
Result: not yet run at full length.
"""

from rla_jax.layers import registry
from rla_jax.training import get_config as get_base_config

TASKS = ('parity', 'modular_arithmetic', 'permutations')


def get_config(arguments: str = 'rdn,parity'):
  """The config of a mixer on a task.

  Args:
    arguments: 'MIXER,TASK' or 'MIXER,TASK,negative': beta in (0, 2) instead of (0, 1).

  Raises:
    ValueError: an unknown mixer, task or third word; a mixer without beta for 'negative'.
  """
  mixer, *words = arguments.split(',')
  task, *rest = words or ['parity']
  if mixer not in registry.LAYERS:
    raise ValueError(f'unknown mixer {mixer!r}; expected one of {", ".join(registry.LAYERS)}')
  if task not in TASKS or rest not in ([], ['negative']):
    raise ValueError(f'the config string is {arguments!r}; expected MIXER,TASK or with ,negative')
  c = get_base_config()
  c.steps = 20_000
  c.model.num_layers = 2
  c.model.model_dim = 128
  c.model.ffn_dim = 256
  c.model.num_heads = 4
  c.model.head_dim = 32
  c.model.pattern = (mixer,)
  if rest:
    c.model.layer_options = {mixer: {'allow_neg_eigval': True}}
  c.model.dtype = 'float32'
  c.model.remat = 'none'
  c.data.format = 'synthetic'
  c.data.path = task
  c.data.seq_len = 64
  c.data.batch_size = 256
  c.optimizer.learning_rate = 1e-3
  c.optimizer.final_learning_rate = 1e-5
  c.optimizer.warmup_steps = 200
  c.log_every = 100
  c.eval_every = c.checkpoint_every = 2000
  return c
