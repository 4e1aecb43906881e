"""From nothing to a trained Residual Delta Net: trains, evaluates, samples, draws.

  python experiments/quickstart.py --workdir=runs/quickstart

Trains configs/quickstart.py on the sources of Python's standard library. The same command again
goes on where it was stopped.
"""

import math
import pathlib
import resource
import runpy
import statistics
import sys

from absl import flags

from rla_jax import data
from rla_jax.data import baselines
from rla_jax.training import train_and_evaluate
from rla_jax.training.command_line import FAILED, run
from rla_jax.training.config import check
from rla_jax.training.metrics import read
from rla_jax.training.plots import draw
from rla_jax.training.trained import continue_text, evaluate_run

_WORKDIR = flags.DEFINE_string('workdir', 'runs/quickstart', 'Folder of the run.')
_CONFIG = pathlib.Path(__file__).resolve().parents[1] / 'configs' / 'quickstart.py'
_PROMPT = 'def read_'
_KIB = 1024 if sys.platform == 'linux' else 1  # Unit of ru_maxrss: KiB on Linux, bytes on macOS.


def main(_):
  """Trains, evaluates, samples, draws and sums up."""
  workdir = _WORKDIR.value
  config = runpy.run_path(str(_CONFIG))['get_config']()
  outcome = train_and_evaluate(config, workdir)
  if outcome.stopped_by:
    return FAILED

  print('\nevaluating on all held-out files ...', flush=True)
  step, model = evaluate_run(workdir)
  known = baselines.measure(*data.load_documents(check(config)))
  text = _PROMPT + continue_text(workdir, _PROMPT, 400, temperature=0.6)
  nats = math.log(2) * model.bytes / model.tokens
  levels = {name: getattr(known, name) * nats for name in ('unigram', 'bigram', 'xz')}
  draw([workdir], f'{workdir}/loss.png', levels=levels)

  speeds = [r.get('train/tokens_per_second') for r in read(f'{workdir}/metrics.jsonl')]
  speed = statistics.median(s for s in speeds if s)
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB / 2**30
  print(f"""
{'-' * 30} a sample, from {_PROMPT!r} {'-' * 30}
{text}
{'-' * 86}

bits per byte of {model.bytes:,} held-out bytes (the standard library's, not trained on)
  unigram                  {known.unigram:6.3f}
  bigram                   {known.bigram:6.3f}
  xz -9                    {known.xz:6.3f}
  Residual Delta Net       {model.bits_per_byte:6.3f}   after {step} steps; loss {model.loss!r}

training     {speed:,.0f} tokens/s, at most {memory:.1f} GiB of memory
checkpoint   {workdir}/checkpoints
metrics      {workdir}/metrics.jsonl, metrics.csv, tensorboard/
loss curve   {workdir}/loss.png

next:
  {sys.executable} experiments/generate.py --workdir={workdir} --prompt='class '
  {sys.executable} experiments/train.py --config=configs/quickstart.py --workdir=runs/mine \\
      --config.data.path='my_text/*.txt' --config.steps=2000
""")
  return 0


if __name__ == '__main__':
  run(main)
