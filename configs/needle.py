"""A small model that learns to find a needle in a haystack, byte by byte.

Reproduces: nothing published: small models do not do this task unless they are trained on its
  format. It is to reach 100 % on needle_s1 at its training length.
Command: python experiments/train.py --config=configs/needle.py:rdn,needle_s1 --workdir=runs/needle
  then python experiments/evaluate.py --workdir=runs/needle --suite=needle_s1 --lengths=1024,2048
Hardware: one GPU.
Wall time: not yet run.
Result: not yet run at this size. Two layers of two heads of 32, width 64, on 768 bytes in batches
  of 8 did not find the needle in 1,000 of 2,000 steps on a CPU; they learned what is said without
  looking back (0.08 nats a byte), and no more. The question alone has 170 bytes; most heads begin
  with memories, 1 / (A dt), below 60, though that run had a seed with 308 for one head.
"""

from rla_jax.data.synthetic.needle import NEEDLES
from rla_jax.layers import registry
from rla_jax.training import get_config as get_base_config


def get_config(arguments: str = 'rdn,needle_s1'):
  """The config of a mixer on a task.

  Args:
    arguments: 'MIXER' or 'MIXER,TASK', a layer and a task of `NEEDLES`.

  Raises:
    ValueError: an unknown mixer or task.
  """
  mixer, _, task = arguments.partition(',')
  task = task or 'needle_s1'
  if mixer not in registry.LAYERS:
    raise ValueError(f'unknown mixer {mixer!r}; expected one of {", ".join(registry.LAYERS)}')
  if task not in NEEDLES:
    raise ValueError(f'unknown task {task!r}; expected one of {", ".join(NEEDLES)}')
  c = get_base_config()
  c.steps = 3000
  c.model.num_layers = 4
  c.model.model_dim = 256
  c.model.ffn_dim = 512
  c.model.num_heads = 8  # many, since few begin with a memory of hundreds of bytes
  c.model.head_dim = 64
  c.model.pattern = (mixer,)
  c.model.remat = 'none'
  c.data.format = 'synthetic'
  c.data.path = task
  c.data.seq_len = 1024
  c.data.batch_size = 64
  c.optimizer.learning_rate = 2e-3
  c.optimizer.final_learning_rate = 2e-5
  c.optimizer.warmup_steps = 100
  c.log_every = 50
  c.eval_every = c.checkpoint_every = 500
  return c
