"""The launch scripts: sound shell, and only flags and keys that there are."""

import csv
import pathlib
import re
import shlex
import subprocess

import pytest

from rla_jax.sharding import AXES
from rla_jax.training.config import get_config, leaves

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = 'memory_gb', 'of_gb', 'all_gather_gb', 'reduce_scatter_gb', 'all_reduce_gb'
SCRIPTS = sorted((ROOT / 'scripts').iterdir())


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_script(path):
  subprocess.run(['bash', '-n', str(path)], check=True)
  text = path.read_text()
  assert 'experiments/train.py' in text
  keys = re.findall(r'--config\.([\w.]+)=', text)
  assert set(keys) <= set(leaves(get_config()))
  assert ('--distributed' in text) == (path.name != 'gpu_node.sh')


@pytest.mark.parametrize('overrides', [[], ['--config.steps=5', "--config.data.path=my text/*.xz"]])
def test_the_pod_s_script_passes_overrides_on(overrides, tmp_path):
  program = tmp_path / 'gcloud'
  program.write_text('#!/bin/sh\nfor last; do :; done\nprintf %s "$last"\n')
  program.chmod(0o755)
  done = subprocess.run(
    ['bash', ROOT / 'scripts/tpu_pod.sh', 'slice', 'zone', 'config.py', '/mnt/run', *overrides],
    env={'PATH': f'{tmp_path}:/usr/bin:/bin'}, check=True, capture_output=True, text=True,
  )  # fmt: skip
  *_, command = done.stdout.partition('train.py')
  given = ['--distributed', '--config=config.py', '--workdir=/mnt/run']
  mesh = ['--config.mesh.data=2', '--config.mesh.fsdp=-1']
  assert shlex.split(command) == [*given, *mesh, *overrides]


def test_the_page_s_table_is_the_compiler_s():
  text = (ROOT / 'docs' / 'training.md').read_text()
  with (ROOT / 'experiments' / 'results' / 'compile' / 'rdn_1p5b.csv').open() as file:
    rows = list(csv.DictReader(file))
  wanted = []
  for row in rows:
    axes = ', '.join(f'{axis} {row[axis]}' for axis in AXES if row[axis] != '1')
    sizes = [f'{float(row[name]):.1f}' for name in SIZES]
    times = [f'{float(row["links_seconds"]):.3f}', f'{float(row["bound_seconds"]):.2f}']
    cells = [row['topology'], axes, *sizes, *times, f'{100 * float(row["mfu_bound"]):.0f} %']
    wanted.append(f'| {" | ".join(cells)} |')
  assert sorted(re.findall(r'^\| v\d\w+:.*$', text, re.MULTILINE)) == sorted(wanted) != []


def test_the_page_names_files_that_exist():
  text = (ROOT / 'docs' / 'training.md').read_text()
  links = re.findall(r'\]\(\.\./([\w./]+)\)', text)
  assert {'scripts/slurm.sbatch', 'rla_jax/training/config.py'} <= set(links)
  for link in links:
    assert (ROOT / link).exists(), link
  for key in re.findall(r'`(\w+_\w+|ema_decay|wandb)`', text):
    known = {path.rpartition('.')[2] for path in leaves(get_config())}
    assert key in known or key in ('conv_width', 'grad_norm', 'param_norm'), key
