"""Packaging of rla_jax: the base install is CPU JAX; accelerators and tools are extras."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
TRAIN = [
  'absl-py>=2.1',
  'grain>=0.2.18',
  'matplotlib>=3.9',
  'ml_collections>=1.1',
  'optax>=0.2.8',
  'orbax-checkpoint>=0.12.8',
  'sentencepiece>=0.2',
  'tensorboardX>=2.6',
  'tokenizers>=0.21',
  'tqdm>=4.66',
]
# jax-triton 0.4.1 does not lower under jit on jax 0.12.
CUDA = ['jax[cuda13]<0.12', 'jax-triton>=0.3.1,<0.4', 'triton>=3.6']
# The compilers for TPUs and GPUs, without NVIDIA's libraries, which a compiler does not need.
TEST = [
  'flatbuffers>=24',
  'hypothesis>=6.100',
  'jax[cuda13-local,tpu]',
  'jax-triton>=0.3.1,<0.4',
  'lm_eval>=0.4.13',
  'pytest>=8',
  'pytest-xdist>=3.6',
  'ruff==0.17.6',
  'setuptools>=65',
  'triton>=3.6',
  'typeguard>=4.4',
  'wheel',
]

setup(
  name='rla-jax',
  version='0.1.0',
  description='Residual Linear Attention and Residual Delta Net in JAX and Flax, for TPU and GPU',
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['rla_jax', 'rla_jax.*']),
  package_data={'rla_jax': ['kernels/**/*.json', 'py.typed']},
  install_requires=['jax>=0.10.2', 'flax>=0.12.8', 'jaxtyping>=0.3', 'numpy>=2.0'],
  extras_require={
    'train': TRAIN,
    'cuda': CUDA,
    'tpu': ['jax[tpu]'],
    'eval': [*TRAIN, 'lm_eval>=0.4.13'],
    'test': TRAIN + TEST,
  },
)
