"""State tracking: parity, arithmetic modulo 5, or permutations of five things (S5), for a mixer.

Reproduces: that DeltaNet carries parity to longer texts with beta in (0, 2) and not in (0, 1); the
  published 1.0 and 0.017 scaled accuracy (arXiv:2411.12537) are of other lengths.
Command: python experiments/state_tracking_sweep.py --workdir=runs/tracking
  or one run: python experiments/train.py --workdir=runs/parity
  --config=configs/state_tracking.py:delta_net,parity,negative, then python experiments/evaluate.py
  --workdir=runs/parity --suite=state_tracking. The third word of the config string makes the range
  of beta (0, 2).
Hardware: one NVIDIA H200, or a CPU for a smaller --config.steps.
Wall time: the sweep's 18 rows of three seeds, some six minutes beside other work on the card. 600
  steps of half the batch take 3 to 5 minutes on a CPU.
Result: experiments/results/state_tracking, scaled accuracy at 64, 128 and 256 tokens, three seeds.
  Parity with beta in (0, 1): delta_net 0.992, 0.664, 0.334, gdn 0.997, 0.705, 0.353, rdn 0.987,
  0.693, 0.348; in (0, 2) all three 1.000, 1.000 and 0.985 to 0.995. Modular arithmetic at 64
  tokens: 0.53 to 0.69, at most 0.04 more by the range, within the spread of the seeds.
  Permutations are not learned.
"""

from rla_jax.layers import registry
from rla_jax.training import get_config as get_base_config

TASKS = ('parity', 'modular_arithmetic', 'permutations')
EPOCHS, STEPS_AN_EPOCH = 6, 782


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
  c.steps = EPOCHS * STEPS_AN_EPOCH
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
  c.model.unroll_layers = True  # two small layers: a loop's copies cost more than its compilation
  c.data.format = 'synthetic'
  c.data.path = task
  c.data.seq_len = 64
  c.data.batch_size = 128
  c.optimizer.learning_rate = 1e-3
  c.optimizer.final_learning_rate = 1e-5
  c.optimizer.warmup_steps = 200
  c.log_every = 100
  c.eval_every = c.checkpoint_every = STEPS_AN_EPOCH
  return c
