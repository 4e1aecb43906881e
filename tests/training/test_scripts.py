"""The launch scripts: sound shell, and only flags and keys that there are."""

import pathlib
import re
import subprocess

import pytest

from rla_jax.training.config import get_config, leaves

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / 'scripts').iterdir())


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_script(path):
  subprocess.run(['bash', '-n', str(path)], check=True)
  text = path.read_text()
  assert 'experiments/train.py' in text
  keys = re.findall(r'--config\.([\w.]+)=', text)
  assert set(keys) <= set(leaves(get_config()))
  assert ('--distributed' in text) == (path.name != 'gpu_node.sh')


def test_the_page_names_files_that_exist():
  text = (ROOT / 'docs' / 'training.md').read_text()
  links = re.findall(r'\]\(\.\./([\w./]+)\)', text)
  assert {'scripts/slurm.sbatch', 'rla_jax/training/config.py'} <= set(links)
  for link in links:
    assert (ROOT / link).exists(), link
  for key in re.findall(r'`(\w+_\w+|ema_decay|wandb)`', text):
    known = {path.rpartition('.')[2] for path in leaves(get_config())}
    assert key in known or key in ('conv_width', 'grad_norm', 'param_norm'), key
