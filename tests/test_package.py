"""The package as it is shipped: one name, kernels inside, and an import that costs nothing."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """A wheel built from a copy of what git tracks."""
  source = tmp_path_factory.mktemp('source')
  tracked = subprocess.run(
    ['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True, text=True
  ).stdout.split('\0')
  for name in filter(None, tracked):
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    if (ROOT / name).exists():
      shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
  out = tmp_path_factory.mktemp('wheel')
  command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation']
  subprocess.run([*command, '--wheel-dir', out, source], check=True)
  return next(out.glob('*.whl'))


def test_wheel_has_one_top_level_name_and_holds_the_kernels(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  top = {name.split('/')[0] for name in names if '.dist-info' not in name}
  assert top == {'rla_jax'}
  for needed in ('ops/api.py', 'kernels/__init__.py', 'kernels/residual/gpu/__init__.py',
                 'kernels/residual/tpu/__init__.py', 'py.typed'):  # fmt: skip
    assert f'rla_jax/{needed}' in names


def test_wheel_holds_every_tracked_file_of_the_package(wheel):
  shipped = set(zipfile.ZipFile(wheel).namelist())
  tracked = subprocess.run(
    ['git', 'ls-files', 'rla_jax', 'kernels'], cwd=ROOT, capture_output=True, check=True, text=True
  ).stdout.split()
  for name in tracked:
    if name != 'rla_jax/kernels' and (ROOT / name).exists():
      expected = name if name.startswith('rla_jax/') else f'rla_jax/{name}'
      assert expected in shipped


def test_wheel_imports_and_computes_from_elsewhere(wheel, tmp_path):
  zipfile.ZipFile(wheel).extractall(tmp_path)
  program = (
    'import jax.numpy as jnp, rla_jax.ops as ops, rla_jax.layers, rla_jax.kernels;'
    'x = jnp.ones((1, 3, 1, 2)) / 2; g = jnp.ones((1, 3, 1)) / 2;'
    'o, _ = ops.residual_delta_rule(x, x, x, -g, g, g);'
    'print(rla_jax.__file__, bool(jnp.isfinite(o).all()))'
  )
  env = os.environ | {'PYTHONPATH': str(tmp_path)}
  result = subprocess.run(
    [sys.executable, '-c', program], cwd=tmp_path, env=env, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  path, finite = result.stdout.split()
  assert path.startswith(str(tmp_path)) and finite == 'True'


@pytest.mark.parametrize('module', ['rla_jax', 'rla_jax.ops', 'rla_jax.layers', 'rla_jax.models',
                                    'rla_jax.nnx', 'rla_jax.kernels'])  # fmt: skip
def test_import_is_light_and_touches_no_device(module):
  """Grain, Orbax and Triton stay out, and no backend is initialised."""
  program = (
    f'import sys, {module}\n'
    'heavy = {"grain", "orbax", "triton", "jax_triton", "torch", "tensorflow", "matplotlib"}\n'
    'found = heavy & set(sys.modules)\n'
    'from jax._src import xla_bridge\n'
    'print(sorted(found), xla_bridge.backends_are_initialized())'
  )
  result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT)
  assert result.returncode == 0, result.stderr
  allowed = '[]' if module != 'rla_jax.nnx' else None
  loaded, _, initialised = result.stdout.strip().rpartition(' ')
  assert initialised == 'False'
  assert allowed is None or loaded == allowed


@pytest.mark.parametrize(
  ('missing', 'module', 'extra'),
  [
    ('grain', 'rla_jax.data', 'train'),
    ('ml_collections', 'rla_jax.training', 'train'),
    ('triton', 'rla_jax.kernels.residual.gpu.selftest', 'cuda'),
  ],
)
def test_a_missing_package_is_told_with_the_extra_that_has_it(missing, module, extra):
  program = f'import sys; sys.modules[{missing!r}] = None; import {module}'
  result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT)
  assert result.returncode != 0
  assert result.stderr.strip().splitlines()[-1] == (
    f"ModuleNotFoundError: {missing} is not installed: pip install -e '.[{extra}]'"
  )


def test_the_self_test_as_a_program_tells_of_a_missing_package_in_one_line():
  program = (
    'import runpy, sys; sys.modules["triton"] = None;'
    'runpy.run_module("rla_jax.kernels.residual.gpu.selftest", run_name="__main__")'
  )
  result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT)
  assert result.returncode == 2
  assert result.stderr == "error: triton is not installed: pip install -e '.[cuda]'\n"


def test_messages_name_extras_as_the_readme_does():
  """The package is installed from its sources: `pip install -e '.[cuda]'`."""
  found = subprocess.run(
    ['git', 'grep', '-nE', r'rla[-_]jax\[[a-z,]+\]'], cwd=ROOT, capture_output=True, text=True
  )
  assert (found.returncode, found.stdout) == (1, '')  # 1: nothing found


def test_the_docstring_and_the_readme_name_what_the_base_install_needs():
  import rla_jax

  setup = (ROOT / 'setup.py').read_text(encoding='utf-8')
  names = re.findall(r"'([a-z]+)>=", re.search(r'install_requires=\[(.*)\]', setup)[1])
  for text in (rla_jax.__doc__, (ROOT / 'README.md').read_text(encoding='utf-8')):
    needs = re.search(r'needs ([a-z, ]+?) only', ' '.join(text.split()))[1]
    assert sorted(re.split(', | and ', needs)) == sorted(names)


def test_kernels_refuse_to_be_imported_under_another_name():
  result = subprocess.run(
    [sys.executable, '-c', 'import kernels'], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode != 0
  assert "import this package as 'rla_jax.kernels'" in result.stderr


# What imports jax alone, such as the mesh that operators and trainer agree on, is at the bottom.
_LEVELS = {
  'shapes': 0, 'sharding': 0, 'kernels': 0, 'ops': 1, 'layers': 2, 'nnx': 2, 'models': 3,
  'generation': 4, 'data': 4, 'training': 4, 'evaluation': 4,
}  # fmt: skip


def test_imports_point_one_way():
  """experiments -> training -> models -> layers -> ops -> kernels, never upward."""
  wrong = []
  for path in sorted((ROOT / 'rla_jax').rglob('*.py')) + sorted((ROOT / 'kernels').rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    own = parts[1] if parts[0] == 'rla_jax' else 'kernels'
    for imported in _imports(path):
      name = imported.split('.')
      if name[0] in ('experiments', 'configs', 'tests'):
        wrong.append((str(path), imported))
      known = name[0] == 'rla_jax' and len(name) > 1 and name[1] in _LEVELS and own in _LEVELS
      if known and _LEVELS[name[1]] > _LEVELS[own]:
        wrong.append((str(path), imported))
  assert not wrong


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_every_public_name_has_a_docstring():
  import importlib
  import inspect

  missing = []
  for module_name in ('ops', 'layers', 'models', 'nnx', 'data', 'training', 'generation'):
    module = importlib.import_module(f'rla_jax.{module_name}')
    for name in getattr(module, '__all__', ()):
      value = getattr(module, name)
      if (inspect.isfunction(value) or inspect.isclass(value)) and not inspect.getdoc(value):
        missing.append(f'{module_name}.{name}')
  assert not missing
